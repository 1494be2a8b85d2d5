"""Sources become packed token blocks in disjoint parts: evaluation | calibration | healing and its validation.

Documents are drawn in one seeded order; each goes to one part only, also where two parts name the same source or two
sources hold the same text. Healing may draw from several sources at once, each with its share of the tokens.

Blocks have equal length and no padding that anything could see. Text blocks each begin a document of their own, so that
blocks are independent samples; healing blocks hold whole samples (packing.py).

Dimensions: N blocks, T tokens a block.

    parts = prepare_blocks(tokenizer, config.data, num_calibration=32, seed=0)
    parts.calibration.tokens  # [N, T] int64
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerscalpel.draw import Answer, Drawer, Stream, drawn_from, spoken
from layerscalpel.errors import UserError
from layerscalpel.packing import Sample, lay_out, pack_whole
from layerscalpel.progress import say
from layerscalpel.records import sources_in
from layerscalpel.settings import DataSettings


@dataclass(frozen=True)
class TokenBlocks:
    """Packed token ids."""

    tokens: Tensor
    """[N, T] int64."""
    labelled: Tensor
    """[N, T] bool: this token is a target, predicted from the tokens before it."""
    source: str
    num_documents: int
    """Of the whole part, also where `first` left out some of its blocks; so are the counts below."""
    dropped: dict[str, int]
    """Documents left out, counted by reason."""
    positions: Tensor | None = None
    """[N, T] int64: each token's place within its own sample, from 0; None where a block is one document, or is read as
    one."""
    filled: Tensor | None = None
    """[N] int64: tokens of a block that are no filler; None where all are."""
    sources: dict[str, int] = field(default_factory=dict)
    """{source: its tokens}, of healing and validation."""
    answers: dict[str, int] = field(default_factory=dict)
    """Conversations that the parent answered (`written`), and those of them whose answer has no end (`cut_off`)."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def first(self, count: int) -> TokenBlocks:
        """Return the first blocks."""
        names = ("tokens", "labelled", "positions", "filled")
        return replace(self, **{n: t if (t := getattr(self, n)) is None else t[:count] for n in names})

    def summary(self) -> dict[str, Any]:
        """Return plain values for provenance; the hash identifies the exact tokens."""
        tensors = [self.tokens, self.labelled, *([] if self.positions is None else [self.positions])]
        filled = self.tokens.numel() if self.filled is None else int(self.filled.sum())
        found = {
            "source": self.source,
            "num_blocks": len(self),
            "block_tokens": self.tokens.shape[1],
            "labelled_tokens": int(self.labelled.sum()),
            "filled_fraction": filled / max(1, self.tokens.numel()),
            "num_documents": self.num_documents,
            "dropped": self.dropped,
            "sha256": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest(),
        }
        return found | {name: value for name in ("sources", "answers") if (value := getattr(self, name))}


@dataclass(frozen=True)
class Parts:
    """The disjoint parts of one run; healing and validation are None when nothing is healed."""

    calibration: TokenBlocks
    evaluation: TokenBlocks
    healing: TokenBlocks | None
    validation: TokenBlocks | None
    rest: Stream
    """What none of them took of the evaluation source, not drawn yet."""


def prepare_blocks(
    tokenizer: Any,
    settings: DataSettings,
    *,
    num_calibration: int,
    seed: int,
    heal: bool = True,
    answer: Answer | None = None,
) -> Parts:
    """Draw, tokenise and pack all parts of a run.

    Args:
        tokenizer: of the parent.
        settings: sources and sizes.
        num_calibration: calibration blocks; 0 where they are not read, or are sampled from the parent itself.
        seed: fixes the order of the documents.
        heal: whether healing and validation blocks are wanted.
        answer: writes the answers of healing and validation conversations; None takes those of the data.

    Raises:
        UserError: unknown source, unreadable records, or too little text.
    """
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer, so no text can be read - add its tokenizer files")
    drawer = Drawer(seed)
    # Evaluation is drawn first: runs that differ in search or healing are measured on the same text.
    stream = Stream(drawer, settings.evaluation, tokenizer)
    evaluation = _text_part("evaluation", stream, settings.block_tokens, settings.evaluation_blocks)
    stream = Stream(drawer, settings.calibration, tokenizer)
    calibration = _none(settings.calibration, settings.block_tokens)
    if num_calibration:
        calibration = _text_part("calibration", stream, settings.block_tokens, num_calibration)
    healing = validation = None
    if heal:
        mix = [Stream(drawer, name, tokenizer, weight, answer) for name, weight in sources_in(settings.healing)]
        healing, validation = _healing_parts(settings, mix, tokenizer.eos_token_id)
    return Parts(calibration, evaluation, healing, validation, Stream(drawer, settings.evaluation, tokenizer))


def _text_part(part: str, stream: Stream, block_tokens: int, num_blocks: int) -> TokenBlocks:
    blocks: list[tuple[list[int], list[bool]]] = []
    block: tuple[list[int], list[bool]] = ([], [])
    for documents, (_, ids, labelled) in enumerate(stream.encoded(), 1):
        block = (block[0] + ids, block[1] + labelled)
        if len(block[0]) >= block_tokens:  # what is left of the document is dropped: the next block is another's
            blocks.append((block[0][:block_tokens], block[1][:block_tokens]))
            block = ([], [])
        if len(blocks) == num_blocks:
            tokens_NT, labelled_NT = (torch.tensor(column) for column in zip(*blocks, strict=True))
            labelled_NT[:, 0] = False  # nothing stands before it
            return TokenBlocks(tokens_NT, labelled_NT, stream.name, documents, dict(stream.dropped))
    raise UserError(
        f"{part} source {stream.name} has text for {len(blocks)} of {num_blocks} blocks of {block_tokens} tokens"
        " - give more text, fewer or shorter blocks"
    )


def _none(source: str, block_tokens: int) -> TokenBlocks:
    tokens = torch.empty(0, block_tokens, dtype=torch.int64)
    return TokenBlocks(tokens, torch.empty_like(tokens, dtype=torch.bool), source, 0, {})


def _healing_parts(settings: DataSettings, mix: list[Stream], filler: int | None) -> tuple[TokenBlocks, TokenBlocks]:
    length = settings.healing_block_tokens
    most = (settings.healing_blocks or 0) * length * (1 + settings.validation_fraction) or None
    samples = drawn_from(mix, length, most)
    aside = max(1, round(len(samples) * settings.validation_fraction))
    while aside < len(samples) and samples[aside].document is samples[aside - 1].document:
        aside += 1  # all pieces of a document go to one part
    packed = [pack_whole(samples[aside:], length), pack_whole(samples[:aside], length)]
    if not all(packed):
        number = len({sample.document for sample in samples})
        raise UserError(
            f"healing source {settings.healing} gives {number} documents that fit {length} tokens - give more text"
        )
    dropped: Counter[str] = sum((stream.dropped for stream in mix), Counter())  # adding leaves out what is 0
    if dropped:
        say(f"healing text {settings.healing}: left out {spoken(dropped)}")
    made = []
    for blocks in (packed[0][: settings.healing_blocks], packed[1]):
        filled = torch.tensor([sum(len(sample.ids) for sample in block) for block in blocks])
        tokens_NT, labelled_NT, positions_NT = lay_out(blocks, length, filler)
        known = {"positions": positions_NT, "filled": filled, **_origins(blocks, mix)}
        made.append(TokenBlocks(tokens_NT, labelled_NT, settings.healing, dropped=dict(dropped), **known))
    return made[0], made[1]


def _origins(blocks: list[list[Sample]], mix: Sequence[Stream]) -> dict[str, Any]:
    """Return where the samples of blocks come from, as fields of TokenBlocks."""
    samples = [sample for block in blocks for sample in block]
    documents = {sample.document for sample in samples}
    tokens = Counter({stream.name: 0 for stream in mix})
    for sample in samples:
        tokens[sample.document.source] += len(sample.ids)
    by_parent = [document for document in documents if document.by_parent]
    answers = {"written": len(by_parent), "cut_off": sum(document.cut_off for document in by_parent)}
    return {
        "num_documents": len(documents),
        "sources": dict(tokens),
        "answers": answers if any(stream.answer for stream in mix) else {},
    }
