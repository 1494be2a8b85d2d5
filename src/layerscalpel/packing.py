"""Samples become blocks of equal length: whole, first fit, and nothing that anything could see beside them.

A conversation is never split, a long text is cut into pieces, all for training or all for validation. What fills a
block up is unlabelled and stands to the right of everything, where causal attention does not look. Every token knows
its place within its own sample, by which attention can keep the samples of a block apart.

Dimensions: N blocks, T tokens.

    training, validation, shares = set_aside(samples, 512, fraction=0.05)
    blocks = pack_whole(training, 512)
    tokens_NT, labelled_NT, positions_NT = lay_out(blocks, 512, filler=tokenizer.eos_token_id)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class Share:
    """What validation has of a source."""

    source: str
    num_documents: int
    """Documents of the source, in training and validation."""
    wanted: float
    """Tokens that are its share."""
    tokens: int
    """Tokens that it has."""
    whole: int
    """Those of them whose documents it has whole."""
    left_out: int
    """Pieces that nobody has: the rest of a document that validation only begins."""

    @property
    def is_short(self) -> bool:
        """Tell whether there are too few documents to share them out well."""
        return self.tokens < self.wanted / 2 or self.left_out > 0

    @property
    def sentence(self) -> str:
        """What there is and why, with the numbers."""
        documents = f"{self.num_documents} document{'s' * (self.num_documents > 1)}"
        return (
            f"healing validation has {self.tokens:,} tokens of {self.source}, of {self.wanted:,.0f} that are its share:"
            f" of {documents} none may be in training too, and {self.left_out} pieces are left out"
        )


@dataclass
class _Bin:
    samples: list[Sample] = field(default_factory=list)
    used: int = 0


def pieces(ids: list[int], labelled: list[bool], length: int, *, whole: bool) -> Iterator[tuple[list[int], list[bool]]]:
    """Cut a text into pieces of at most a block; keep the beginning of a conversation (`whole`) that is longer."""
    ends = (length,) if whole else range(length, len(ids) + length, length)
    for end in ends:
        yield ids[end - length : end], [False, *labelled[end - length + 1 : end]]


def num_tokens(samples: Sequence[Sample]) -> int:
    """Return the tokens of all samples."""
    return sum(len(sample.ids) for sample in samples)


def set_aside(samples: list[Sample], length: int, fraction: float) -> tuple[list[Sample], list[Sample], list[Share]]:
    """Return (training, validation, what validation has of each source); no document is in both.

    Validation gets the same fraction of every source's tokens, so both have the mix of the samples.

    Source: this project, docs/methods.md#healing-data.

    Args:
        samples: in the order in which they were drawn, which both parts keep.
        length: tokens of a block. Validation gets one at least, if that is no more than half of all.
        fraction: validation's share of the tokens.
    """
    fraction = min(0.5, max(fraction, length / max(1, num_tokens(samples))))
    sources: dict[str, dict[Document, list[Sample]]] = {}
    for sample in samples:
        sources.setdefault(sample.document.source, {}).setdefault(sample.document, []).append(sample)
    kept: dict[Document, int] = {}
    shares = []
    for source, documents in sources.items():
        wanted = fraction * sum(map(num_tokens, documents.values()))
        of_source = _kept_aside(documents, wanted)
        tokens = sum(num_tokens(documents[one][:count]) for one, count in of_source.items())
        whole = sum(num_tokens(documents[one]) for one, count in of_source.items() if count == len(documents[one]))
        left_out = sum(len(documents[one]) - count for one, count in of_source.items())
        shares.append(Share(source, len(documents), wanted, tokens, whole, left_out))
        kept |= of_source
    training, validation = [], []
    for sample in samples:
        if sample.document not in kept:
            training.append(sample)
        elif kept[sample.document]:
            kept[sample.document] -= 1
            validation.append(sample)
    return training, validation, shares


def _kept_aside(documents: dict[Document, list[Sample]], wanted: float) -> dict[Document, int]:
    """Return {document for validation: how many of its samples}, `wanted` being at most half of all tokens.

    Documents that fit are taken whole. Where they give less than half, one that does not fit is begun: the shortest, so
    that training loses no book for the few lines that validation needs.
    """
    kept: dict[Document, int] = {}
    tokens = 0
    for document, samples in documents.items():
        if tokens + num_tokens(samples) <= wanted:
            kept[document] = len(samples)
            tokens += num_tokens(samples)
    sizes = {document: num_tokens(samples) for document, samples in documents.items() if document not in kept}
    if tokens >= wanted / 2 or len(sizes) < 2:  # training keeps one
        return kept
    begun = min(sizes, key=lambda document: sizes[document])
    kept[begun] = 0
    for sample in documents[begun]:
        if tokens < wanted:
            kept[begun] += 1
            tokens += len(sample.ids)
    return kept


def pack_whole(samples: list[Sample], length: int) -> list[list[Sample]]:
    """Put samples of 1..`length` tokens into blocks of at most `length` tokens, first fit, never split.

    Blocks are in the order of their first samples, so that the first blocks have the mix of the first samples.
    """
    made: list[_Bin] = []
    bins: list[_Bin] = []
    for sample in samples:
        fitting = next((block for block in bins if block.used + len(sample.ids) <= length), None)
        if fitting is None:
            fitting = _Bin()
            made.append(fitting)
            bins.append(fitting)
            if len(bins) > OPEN_BINS:
                bins.sort(key=lambda block: block.used, reverse=True)
                bins.pop(0)
        fitting.samples.append(sample)
        fitting.used += len(sample.ids)
    return [block.samples for block in made]


def lay_out(blocks: list[list[Sample]], length: int, filler: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, labelled, positions), each [N, T]; the filler counts its own places from 0.

    Args:
        blocks: as `pack_whole` makes them.
        length: T.
        filler: the token that fills a block up, 0 where there is none.
    """
    rows = []
    for samples in blocks:
        free = length - num_tokens(samples)
        ids = [token for sample in samples for token in sample.ids] + [filler or 0] * free
        labelled = [mark for sample in samples for mark in sample.labelled] + [False] * free
        positions = [i for sample in samples for i in range(len(sample.ids))] + [*range(free)]
        rows.append((ids, labelled, positions))
    tokens_NT, labelled_NT, positions_NT = (torch.tensor(column) for column in zip(*rows, strict=True))
    labelled_NT[:, 0] = False  # nothing stands before it
    return tokens_NT, labelled_NT, positions_NT
