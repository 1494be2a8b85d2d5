"""Progress for a person: bars with the time left on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
PLAIN_LINE_S = 10.0
"""Seconds between two plain lines of one task."""

console = Console(stderr=True, highlight=False)


def set_quiet(quiet: bool) -> None:
    """Silence or restore everything that `say` and `track` print."""
    console.quiet = quiet


def say(message: str) -> None:
    """Print one line for the person who watches."""
    console.print(message, markup=False, soft_wrap=True)


def track(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    """Yield the items and show how far we are."""
    watched = _bar(items, label, total) if console.is_terminal and not console.quiet else _lines(items, label, total)
    yield from watched


def _bar(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=False) as progress:
        yield from progress.track(items, total=total, description=label)


def _lines(items: Iterable[Item], label: str, total: int) -> Iterator[Item]:
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= PLAIN_LINE_S:
            say(f"{label}: {done}/{total}, {(now - began) / done * (total - done):.0f} s left")
            last = now
        yield item
    took = time.monotonic() - began
    if took >= 2:
        say(f"{label}: {total}/{total} in {took:.0f} s")


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
    """Show that one thing of unknown length is under way."""
    if console.is_terminal and not console.quiet:
        with console.status(label):
            yield
    else:
        say(f"{label} ...")
        yield
    sys.stderr.flush()
