"""Samples become blocks of equal length: whole, first fit, and nothing that anything could see beside them.

A conversation is never split, a long text is cut into pieces. What fills a block up is unlabelled and stands to the
right of everything, where causal attention does not look. Every token knows its place within its own sample, by which
attention can keep the samples of a block apart.

Dimensions: N blocks, T tokens.

    blocks = pack_whole(samples, 512)
    tokens_NT, labelled_NT, positions_NT = lay_out(blocks, 512, filler=tokenizer.eos_token_id)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

OPEN_BINS = 64
"""Blocks that a sample may still join while packing."""


@dataclass(frozen=True, eq=False)
class Document:
    """What a sample was cut from; two documents are the same one only if they are the same object."""

    source: str
    by_parent: bool = False
    """Whether the parent wrote its last answer."""
    cut_off: bool = False
    """Whether that answer was cut before its end."""


@dataclass(frozen=True)
class Sample:
    """A conversation or a piece of text."""

    ids: list[int]
    labelled: list[bool]
    document: Document


@dataclass
class _Bin:
    samples: list[Sample] = field(default_factory=list)
    used: int = 0


def pieces(ids: list[int], labelled: list[bool], length: int, *, whole: bool) -> Iterator[tuple[list[int], list[bool]]]:
    """Cut a text into pieces of at most a block; keep the beginning of a conversation (`whole`) that is longer."""
    ends = (length,) if whole else range(length, len(ids) + length, length)
    for end in ends:
        yield ids[end - length : end], [False, *labelled[end - length + 1 : end]]


def pack_whole(samples: list[Sample], length: int) -> list[list[Sample]]:
    """Put samples of 1..`length` tokens into blocks of at most `length` tokens, first fit, never split."""
    done: list[_Bin] = []
    bins: list[_Bin] = []
    for sample in samples:
        fitting = next((block for block in bins if block.used + len(sample.ids) <= length), None)
        if fitting is None:
            fitting = _Bin()
            bins.append(fitting)
            if len(bins) > OPEN_BINS:
                bins.sort(key=lambda block: block.used, reverse=True)
                done.append(bins.pop(0))
        fitting.samples.append(sample)
        fitting.used += len(sample.ids)
    return [block.samples for block in [*done, *bins]]


def lay_out(blocks: list[list[Sample]], length: int, filler: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, labelled, positions), each [N, T]; the filler counts its own places from 0.

    Args:
        blocks: as `pack_whole` makes them.
        length: T.
        filler: the token that fills a block up, 0 where there is none.
    """
    rows = []
    for samples in blocks:
        free = length - sum(len(sample.ids) for sample in samples)
        ids = [token for sample in samples for token in sample.ids] + [filler or 0] * free
        labelled = [mark for sample in samples for mark in sample.labelled] + [False] * free
        positions = [i for sample in samples for i in range(len(sample.ids))] + [*range(free)]
        rows.append((ids, labelled, positions))
    tokens_NT, labelled_NT, positions_NT = (torch.tensor(column) for column in zip(*rows, strict=True))
    labelled_NT[:, 0] = False  # nothing stands before it
    return tokens_NT, labelled_NT, positions_NT
