"""Which texts share a long run of words with others: no text that a model was made with may count in its score.

Two texts overlap where they share 13 words in a row, case and punctuation aside: the size and the normal form of GPT-3
(arXiv:2005.14165, appendix C). A run stands within one text. Texts of fewer words have none and overlap with nothing;
nor do texts whose words no spaces part.

Nothing is sampled, no two runs are taken for one. Words are numbered; pairs of neighbours get the number of their place
in a sorted table, pairs of pairs again, and so on: 13 words are two runs of 8 that overlap. The texts taken in are
sorted once; what is looked up costs time in proportion to its words.

Dimensions: W words of all texts, R runs.

    seen = Grams("text that healed")
    seen.add("A long text ...")
    seen.meet("another one")  # False
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 13
"""Words in a row that two texts must share."""
NO_SIGN = re.compile(r"[^\w\s]|_")
Numbers = NDArray[np.int64]
_NONE = -1
"""Number of a word or run that is not known."""


def words_of(text: str) -> list[str]:
    """Return the words of a text without case and punctuation; what is nothing else is no word."""
    return NO_SIGN.sub("", text.lower()).split()


class Grams:
    """The runs of 13 words of some texts."""

    def __init__(self, of: str, run: int = RUN) -> None:
        """Begin without a text.

        Args:
            of: what the texts are, in words.
            run: words of a run, 2 or more.
        """
        self.of, self.run = of, run
        self._numbers: dict[str, int] = {}
        self._texts: list[Numbers] = []
        self._tables: list[Numbers] | None = None

    def add(self, text: str) -> None:
        """Take in a text."""
        numbers = self._numbers
        known = [numbers.setdefault(word, len(numbers)) for word in words_of(text)]
        if len(known) >= self.run:
            self._texts.append(np.array(known, dtype=np.int64))
            self._tables = None

    def meet(self, text: str) -> bool:
        """Tell whether a text shares a run with any of those taken in."""
        found_W = np.array([self._numbers.get(word, _NONE) for word in words_of(text)], dtype=np.int64)
        if len(found_W) < self.run or not self._texts:
            return False
        if self._tables is None:
            self._tables = self._sorted()
        for table, step in zip(self._tables, _steps(self.run), strict=True):
            found_W = _looked_up(table, _paired(found_W, step))
        return bool((found_W != _NONE).any())

    def _sorted(self) -> list[Numbers]:
        """Return the tables: of pairs, of pairs of these, ..."""
        parted = [part for text_W in self._texts for part in (text_W, np.array([_NONE]))]
        run_R, tables = np.concatenate(parted), []
        for step in _steps(self.run):
            pair_R = _paired(run_R, step)
            tables.append(np.unique(pair_R[pair_R != _NONE]))
            run_R = _looked_up(tables[-1], pair_R)
        return tables


def _steps(run: int) -> list[int]:
    """Return how far apart the two runs begin that make the next longer ones, from single words to `run`."""
    steps, size = [], 1
    while size < run:
        steps.append(min(size, run - size))
        size += steps[-1]
    return steps


def _paired(run_R: Numbers, step: int) -> Numbers:
    """Return one number for every two runs that begin `step` apart, _NONE where one of them has none."""
    first_R, second_R = run_R[:-step], run_R[step:]
    return np.where((first_R == _NONE) | (second_R == _NONE), _NONE, (first_R << 32) | second_R)


def _looked_up(table: Numbers, pair_R: Numbers) -> Numbers:
    """Return the place of each number in a sorted table, _NONE where it is not in it."""
    if not len(table):
        return np.full_like(pair_R, _NONE)
    place_R = np.searchsorted(table, pair_R).clip(max=len(table) - 1)
    return np.where((table[place_R] == pair_R) & (pair_R != _NONE), place_R, _NONE)


def overlaps(items: Mapping[str, Iterable[str]], seen: Grams) -> dict[str, dict[str, Any]]:
    """Return {task: {num_items, overlapping, too_short}} of the items of tasks.

    Args:
        items: the whole text of each item, question and answers, by task.
        seen: text that healed or calibrated the model.
    """
    found = {}
    for task, texts in items.items():
        texts = list(texts)
        met = sum(seen.meet(text) for text in texts)
        short = sum(len(words_of(text)) < seen.run for text in texts)
        found[task] = {"num_items": len(texts), "overlapping": met, "too_short": short}
    return found
