"""Command lines made from config.py's dataclasses: --key=value, one line for any mistake, exit code
2.

    python train.py --help
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields

from settings.fields import PATHS, in_a_shell
from settings.implied import implied


def program_name() -> str:
    """Return what the user typed: train.py, or python -m loaders.export for a module in a room."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and "." in spec.name:
        return f"python -m {spec.name}"
    return sys.argv[0].rsplit("/", 1)[-1]


class _Parser(argparse.ArgumentParser):
    """An argparse whose errors are one line on stderr and exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _to_bool(text: str) -> bool:
    """Read true or false in any of their usual spellings."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _to_float(text: str) -> float:
    """Read a finite number."""
    try:
        x = float(text)
    except ValueError:
        x = math.nan
    if not math.isfinite(x):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return x


_TYPES = {"int": int, "float": _to_float, "str": str, "bool": _to_bool}


def parse_args(
    configs: dict[str, type],
    argv: list[str] | None = None,
    prog: str | None = None,
    description: str = "",
) -> argparse.Namespace:
    """Build a command line from dataclasses, parse argv, and return a namespace with one validated
    instance per entry of `configs`, plus `given`: the set of flags named on the command line, or
    on that of the run that is resumed.
    --key=value and --key value both work; a bare boolean flag means true. Any mistake prints one
    line to stderr and exits with code 2."""
    if argv is None:
        begin_program()
    parser = _Parser(
        prog=prog or program_name(),
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=120),
    )
    known = _add_flags(parser, configs)
    space, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest:
        parser.error(_not_understood(rest[0], known))
    out = argparse.Namespace()
    try:
        chosen, out.given = implied(vars(space), configs)
        for name, cls in configs.items():
            own = {f.name: chosen[f.name] for f in fields(cls) if f.name in chosen}
            setattr(out, name, cls(**own))
    except ValueError as e:
        parser.error(str(e))
    return out


def _add_flags(parser: argparse.ArgumentParser, configs: dict[str, type]) -> list[str]:
    """Give the parser a flag for each field of the dataclasses, and return the flags' names."""
    owner: dict[str, str] = {}
    for cls in configs.values():
        group = parser.add_argument_group(cls.__doc__.splitlines()[0])
        for f in fields(cls):
            assert f.name not in owner, (
                f"{f.name} is defined by both {owner[f.name]} and {cls.__name__}"
            )
            owner[f.name] = cls.__name__
            kind = str(f.type)
            about = f"{kind}; default {f.default!r}"
            if f.metadata["choices"]:
                about += f"; one of {', '.join(map(str, f.metadata['choices']))}"
            text = f"{f.metadata['help']} ({about})"
            bare = {"nargs": "?", "const": True} if kind == "bool" else {}
            group.add_argument(
                f"--{f.name}",
                type=in_a_shell if f.name in PATHS else _TYPES[kind],
                default=argparse.SUPPRESS,
                metavar=kind.upper(),
                help=text.replace("%", "%%"),
                **bare,
            )
    return list(owner)


def _not_understood(argument: str, known: list[str]) -> str:
    """Say what is wrong with an argument that is no flag, and which flag is nearest."""
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}: flags are --key=value or --key value"
    flag = argument.split("=")[0]
    near = difflib.get_close_matches(flag.lstrip("-"), known, n=1, cutoff=0.0)
    return f"unknown flag {flag}: did you mean --{near[0]}? (--help lists all)"


def begin_program() -> None:
    """Let this process survive a terminal that cannot show a character, and end by one line at
    Ctrl-C while modules are loaded."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, _leave)


def _leave(*_) -> None:
    """End the process at Ctrl-C. An exception would not do: an import in C may make another of
    it."""
    print(f"{program_name()}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def exit_on_bad_input(main: Callable[[], None]) -> None:
    """Run main(); a ValueError, a file that cannot be had or an absurd one becomes one line on
    stderr and exit code 2; Ctrl-C exit code 130; a reader of the output that has gone, 141."""
    loading = signal.getsignal(signal.SIGINT) is _leave
    if loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # main may have files to remove
    try:
        main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
        sys.exit(141)
    except (ValueError, OSError, RecursionError, MemoryError) as e:
        say = " ".join(str(e).split()) or "more memory is needed than there is"
        print(f"{program_name()}: {say}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program_name()}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if loading:
            signal.signal(signal.SIGINT, _leave)
