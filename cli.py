"""Command lines made from config.py's dataclasses: --key=value, one line for any mistake, exit code
2.

    python train.py --help
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise

from settings.begin import leave, program_name
from settings.fields import PATHS, comma_list, in_a_shell
from settings.implied import implied
from settings.measuring import CHOICES
from settings.places import HUB_NAME
from settings.stages import OWN, Choice


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number, such as 0.125")
    return x


HELP_LINES = 10  # before the flags
NEAR = 0.65  # how like a flag a word is that is taken for it
MODEL = ("model", "model_path", "model_name_or_path", "base_model", "checkpoint", "ckpt")
# What other programs call a flag of ours.
ELSEWHERE = dict.fromkeys(MODEL, "init_from") | {"output_dir": "out_dir", "learning_rate": "lr"}
_TYPES = {"int": int, "float": _to_float, "str": str, "bool": _to_bool}


def parse_args(
    configs: dict[str, type],
    argv: list[str] | None = None,
    prog: str | None = None,
    description: str = "",
) -> argparse.Namespace:
    """Build a command line from dataclasses, parse argv, and return a namespace with one validated
    instance per entry of `configs`, plus two sets: `given_now`, the flags named on this command
    line, and `given`, those and what the run that is resumed was given.
    --key=value and --key value both work; a bare boolean flag means true. Any mistake prints one
    line to stderr and exits with code 2. description: the program's docstring, whose first
    paragraph and examples --help begins with."""
    if argv is None:
        argv = sys.argv[1:]
    choice = next((CHOICES[key] for key in configs if key in CHOICES), None)
    value = "" if choice is None else _chosen(choice, argv)
    parser = _Parser(
        prog=prog or program_name(),
        usage="%(prog)s [--flag=value ...]",
        description="\n".join(_first_lines(description, choice, value)),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=120),
    )
    whole = choice is None or not {"-h", "--help"} & {*argv} or "--all" in argv

    def is_shown(group: str, name: str) -> bool:
        return whole or any(choice.reads(entry, group, name) for entry in comma_list(value))

    known = _add_flags(parser, configs, is_shown)
    space, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(_not_understood(rest[0], known, value))
    out = argparse.Namespace()
    try:
        chosen, out.given = implied(vars(space), configs)
        out.given_now = {*vars(space)}
        for name, cls in configs.items():
            own = {f.name: chosen[f.name] for f in fields(cls) if f.name in chosen}
            setattr(out, name, cls(**own))
    except ValueError as e:
        parser.error(str(e))
    return out


def _chosen(choice: Choice, argv: list[str]) -> str:
    """What a command line asks a program to do: a value of the choice, or a list of them."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    named = [value for flag, value in pairwise(words) if flag == f"--{choice.flag}"]
    known = bool(named) and set(comma_list(named[-1])) <= {*choice.values}
    return named[-1] if known else choice.usual


def _first_lines(description: str, choice: Choice | None, value: str) -> list[str]:
    """What --help begins with: a docstring's first paragraph, as many of its examples as there is
    room for, and where there is a choice how the flags of another are seen."""
    lines = description.splitlines()
    blank = lines.index("") if "" in lines else len(lines)
    last = []
    if choice is not None:
        others = ", ".join(name for name in choice.values if name not in comma_list(value))
        last = [
            "",
            f"Below: the flags of --{choice.flag}={value}. Of {others}: "
            f"--help --{choice.flag}=NAME. All: --help --all",
        ]
    out = [*lines[:blank], ""]
    command: list[str] = []
    for line in lines[blank:]:
        command += [line] if line.startswith("    ") else []
        whole = command and not line.endswith("\\")
        if whole and len(out) + len(command) + len(last) <= HELP_LINES:
            out += command
        command = [] if whole else command
    return out + last


def _add_flags(
    parser: argparse.ArgumentParser,
    configs: dict[str, type],
    is_shown: Callable[[str, str], bool],
) -> list[str]:
    """Give the parser a flag for each field of the dataclasses for which is_shown(group, name),
    and return the flags' names."""
    owner: dict[str, str] = {}
    for key, cls in configs.items():
        read = [f for f in fields(cls) if is_shown(key, f.name)]
        if not read:
            continue
        group = parser.add_argument_group(" ".join(cls.__doc__.split()).split(". ")[0].rstrip("."))
        for f in read:
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


def _not_understood(argument: str, known: list[str], stage: str) -> str:
    """Say what is wrong with an argument that is no flag, and which flag is near, if any: for --lr
    and the like the stage's own; for a model's name the one that takes it."""
    if not argument.startswith("-"):
        model = model_named(argument) if "init_from" in known else ""
        do = f"give --init_from={model}" if model else "flags are --key=value or --key value"
        return f"unexpected argument {argument!r}: {do}"
    flag = argument.split("=")[0]
    name = flag.lstrip("-")
    name = ELSEWHERE.get(name, name)
    own = [name, *(f"{prefix}_{name}" for prefix in OWN.get(stage, ()))]
    near = [flag for flag in own if flag in known]
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    if not near:
        return f"unknown flag {flag}: --help --all lists all flags"
    meant = " or ".join(f"--{flag}" for flag in near)
    return f"unknown flag {flag}: did you mean {meant}? (--help --all lists all)"


def model_named(argument: str) -> str:
    """Return the value of --init_from for a bare word that names a model, else ""."""
    if argument.startswith("hf:") or argument.lower().endswith(".gguf") or os.path.isdir(argument):
        return argument
    is_hub_name = HUB_NAME.fullmatch(argument) and not argument.endswith(".py")
    return f"hf:{argument}" if is_hub_name else ""


def note(line: str) -> None:
    """Say on stderr, at once, what takes a while now; under torchrun once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{line} ...", file=sys.stderr, flush=True)


def say_fewer(what: str, there: int, asked: int) -> None:
    """Say on stderr, under torchrun once for all ranks, where a text has fewer sequences than are
    asked for."""
    if there < asked and os.environ.get("RANK", "0") == "0":
        line = f"{what}: {there} sequences, all there are, not {asked}"
        print(line, file=sys.stderr, flush=True)


def print_rows(rows: list[dict], asked: bool) -> None:
    """Print rows as a line of JSON where --json asks for it, and where stdout is no terminal but
    another program."""
    if asked or not sys.stdout.isatty():
        print(json.dumps(rows))


def _said(e: Exception) -> str:
    """Return what an error says, in words that a user can act on."""
    if isinstance(e, OSError) and e.strerror:
        where = "the output" if e.filename is None else os.fsdecode(e.filename)
        what = e.strerror.lower()
        return f"{where}: {what}; mend the path, its permissions or the space there"
    return str(e) or "more memory is needed than there is; give smaller sizes"


def _leave_output() -> None:
    """Let what could not be written go: Python would try, and fail, once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_on_bad_input(main: Callable[[], None]) -> None:
    """Run main(); a ValueError, a file that cannot be had or an absurd one becomes one line on
    stderr and exit code 2; Ctrl-C exit code 130; a reader of the output that has gone, 141."""
    loading = signal.getsignal(signal.SIGINT) is leave
    if loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # main may have files to remove
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        _leave_output()
        sys.exit(141)
    except (ValueError, OSError, RecursionError, MemoryError) as e:
        print(f"{program_name()}: {' '.join(_said(e).split())}", file=sys.stderr)
        if loading and isinstance(e, OSError):
            _leave_output()
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program_name()}: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        if loading:
            signal.signal(signal.SIGINT, leave)


def exit_after(main: Callable[[], None]) -> None:
    """End the program by exit_on_bad_input(main). One of torchrun's processes ends without Python's
    own taking down: torch keeps threads of a sharded model's process group, and one that asks for
    the interpreter meanwhile aborts the process."""
    code = 0
    try:
        exit_on_bad_input(main)
    except SystemExit as e:
        code = e.code
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
