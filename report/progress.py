"""How far long work is: a bar in a terminal, and in a log file a line now and then."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

EVERY = 20  # seconds between two lines of a log file
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} gone, {remaining} to go{postfix}"


class Lines:
    """A stream that gets each state of a bar as a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write what a bar would overwrite itself with; the ends of a bar are no lines."""
        if text.strip():
            self.stream.write(text.strip() + "\n")

    def flush(self) -> None:
        """Flush the stream behind it."""
        self.stream.flush()


class InLines(tqdm):
    """A bar of a log file. Each number of units is a line once: the last one is not said again
    when the bar is closed, nor the first where nothing is left to do."""

    said = None

    def display(self, *args, **kwargs) -> None:
        """Write a line, unless one of as many units was the last."""
        if self.n != self.said:
            self.said = self.n
            super().display(*args, **kwargs)


def progress(
    name: str,
    total: int,
    unit: str,
    *,
    begin: int = 0,
    shown: bool = True,
    silence: float = 0,
) -> tqdm:
    """Return a bar on stderr of `total` units, `begin` of them done. What it is given to show
    besides (set_postfix_str with refresh=False) waits for its next turn. silence: seconds in which
    a log file gets nothing."""
    stream = sys.stderr
    settings = dict(desc=name, total=total, initial=begin, unit=unit, disable=not shown, miniters=1)
    if stream.isatty():
        return tqdm(file=stream, mininterval=0.5, **settings)
    settings |= dict(delay=silence, mininterval=EVERY, bar_format=LINE)
    return InLines(file=Lines(stream), **settings)


def say(line: str) -> None:
    """Write a line about what is done, at once."""
    tqdm.write(line, file=sys.stderr)
