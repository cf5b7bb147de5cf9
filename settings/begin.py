"""What a program does before it imports anything else, so that Ctrl-C, and under torchrun SIGTERM,
is answered by one line from then on. Nothing is imported here that a Python which has just begun
has not loaded already."""

import os
import sys
from _signal import (
    SIGINT,
    SIGTERM,
    signal,
)  # of the interpreter itself: signal.py loads ten modules first


def program_name() -> str:
    """Return what the user typed: train.py, python -m loaders.export for a module in a room, or
    python for a script's own lines (python -c)."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and "." in spec.name:
        return f"python -m {spec.name}"
    if sys.argv[0] == "-c":
        return "python"
    return sys.argv[0].rsplit("/", 1)[-1]


# How often a thread of PyTorch's on a CPU looks for work before it sleeps. By itself libgomp has it
# look for some milliseconds, for which every step waits where another program has one of the cores.
SPINS = "1000"


def begin_program() -> None:
    """Let this process survive a terminal that cannot show a character, end by one line at Ctrl-C,
    and a rank at SIGTERM, while modules are loaded, and share its cores with other programs."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    signal(SIGINT, leave)
    if "RANK" in os.environ:
        signal(SIGTERM, end_rank)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def leave(*_) -> None:
    """End the process at Ctrl-C. An exception would not do: an import in C may make another of
    it."""
    print(f"{program_name()}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def end_rank(*_) -> None:
    """End the process, one of torchrun's, at SIGTERM."""
    rank = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    print(f"{rank}: ended by SIGTERM", file=sys.stderr, flush=True)
    os._exit(128 + SIGTERM)
