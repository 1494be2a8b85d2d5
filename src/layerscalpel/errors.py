"""The two ways a command ends early that are not defects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: what is wrong - what is allowed - the next step. Ends with exit code 2."""


class DivergedError(UserError):
    """A loss or gradient is not finite: what was trained is in its best state before that."""


def suggest(word: str, known: Iterable[str] | Iterable[int]) -> str:
    """Return `` - did you mean 'x'?`` when a known word is close, else the list of what is allowed."""
    words = [str(item) for item in sorted(known)]
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    is_name = bool(close) and not close[0].isdigit()  # one number is as good as another
    return f" - did you mean '{close[0]}'?" if is_name else f" - allowed: {', '.join(words)}"


def one_line(error: object) -> str:
    """Return what another library says of an error, in one line."""
    return " ".join(str(error).split())


def kind_and_line(error: BaseException) -> str:
    """Return an error's kind and what it says, if it says anything, in one line."""
    return ": ".join(filter(None, (type(error).__name__, one_line(error))))
