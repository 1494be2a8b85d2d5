"""Sources become packed token blocks in disjoint parts: evaluation | calibration | healing and its validation.

Documents are drawn in one seeded order; each goes to one part only, also where two parts name the same source or two
sources hold the same text, and calibration and healing take none that shares 13 words in a row with evaluation text
(overlap.py). Healing may draw from several sources at once, each with its share of the tokens; evaluation too, each
with its share of the blocks.

Blocks have equal length and no padding that anything could see. Text blocks each begin a document of their own, so that
blocks are independent samples; healing blocks hold whole samples (packing.py).

Dimensions: N blocks, T tokens a block.

    parts = prepare_blocks(tokenizer, config.data, num_calibration=32, seed=0)
    parts.calibration.tokens  # [N, T] int64
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from layerscalpel.draw import Answer, Drawer, Drawing, Stream, shared_out, spoken
from layerscalpel.errors import UserError
from layerscalpel.overlap import Grams
from layerscalpel.packing import Sample, lay_out, num_tokens, pack_whole
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
    """{source: its tokens}, of healing and validation, and of a mix for evaluation."""
    domains: tuple[str, ...] = ()
    """The source of each block, where evaluation mixes several."""
    answers: dict[str, int] = field(default_factory=dict)
    """Conversations that the parent answered (`written`), and those of them whose answer has no end (`cut_off`)."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def first(self, count: int) -> TokenBlocks:
        """Return the first blocks."""
        names = ("tokens", "labelled", "positions", "filled", "domains")
        return replace(self, **{n: t if (t := getattr(self, n)) is None else t[:count] for n in names})

    def last(self, count: int) -> TokenBlocks:
        """Return the last blocks."""
        names, start = ("tokens", "labelled", "positions", "filled", "domains"), len(self) - count
        return replace(self, **{n: t if (t := getattr(self, n)) is None else t[start:] for n in names})

    @property
    def sha256(self) -> str:
        """Hash of the token ids, labels and positions."""
        tensors = [self.tokens, self.labelled, *([] if self.positions is None else [self.positions])]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return plain values for provenance; the hash identifies the exact tokens."""
        filled = self.tokens.numel() if self.filled is None else int(self.filled.sum())
        found = {
            "source": self.source,
            "num_blocks": len(self),
            "block_tokens": self.tokens.shape[1],
            "labelled_tokens": int(self.labelled.sum()),
            "filled_fraction": filled / max(1, self.tokens.numel()),
            "num_documents": self.num_documents,
            "dropped": self.dropped,
            "sha256": self.sha256,
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
    """What none of them took of the evaluation source, the first one of a mix, not drawn yet."""
    used: Grams
    """All text that was drawn for calibration and healing."""


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
    held_out, used = Grams("held-out text"), Grams("text that healed or calibrated")
    mix = [Stream(drawer, n, tokenizer, weight, fills=held_out) for n, weight in sources_in(settings.evaluation)]
    evaluation = _text_part("evaluation", mix, settings.block_tokens, settings.evaluation_blocks)
    apart: dict[str, Any] = {"avoids": held_out, "fills": used}
    calibration = _none(settings.calibration, settings.block_tokens)
    if num_calibration:
        stream = Stream(drawer, settings.calibration, tokenizer, **apart)
        calibration = _text_part("calibration", [stream], settings.block_tokens, num_calibration)
    healing = validation = None
    if heal:
        sources = sources_in(settings.healing)
        healed_on = [Stream(drawer, name, tokenizer, weight, answer, **apart) for name, weight in sources]
        healing, validation = _healing_parts(settings, healed_on, tokenizer.eos_token_id)
    rest = Stream(drawer, mix[0].name, tokenizer, avoids=used)
    return Parts(calibration, evaluation, healing, validation, rest, used)


def _text_part(part: str, mix: Sequence[Stream], block_tokens: int, num_blocks: int) -> TokenBlocks:
    """Return blocks of one source each, drawn block by block of the source furthest behind its share."""
    readers = {stream.name: _text_blocks(stream, block_tokens) for stream in mix}
    taken: Counter[str] = Counter()
    blocks, documents, domains = [], 0, []
    while len(blocks) < num_blocks:
        stream = min(mix, key=lambda stream: taken[stream.name] / stream.weight)
        found = next(readers[stream.name], None)
        if found is None:
            of = f"{num_blocks} blocks" if len(mix) == 1 else f"its share of {num_blocks} blocks"
            raise UserError(
                f"{part} source {stream.name} has text for {taken[stream.name]} of {of} of {block_tokens} tokens"
                " - give more text, fewer or shorter blocks"
            )
        taken[stream.name] += 1
        blocks.append(found[:2])
        documents += found[2]
        domains.append(stream.name)
    tokens_NT, labelled_NT = (torch.tensor(column) for column in zip(*blocks, strict=True))
    labelled_NT[:, 0] = False  # nothing stands before it
    dropped: Counter[str] = sum((stream.dropped for stream in mix), Counter())
    if len(mix) == 1:
        return TokenBlocks(tokens_NT, labelled_NT, mix[0].name, documents, dict(dropped))
    name = ",".join(f"{stream.name}={stream.weight:g}" for stream in mix)
    known = {"sources": {name: count * block_tokens for name, count in taken.items()}, "domains": tuple(domains)}
    return TokenBlocks(tokens_NT, labelled_NT, name, documents, dict(dropped), **known)


def _text_blocks(stream: Stream, block_tokens: int) -> Iterator[tuple[list[int], list[bool], int]]:
    """Yield (ids, labelled, number of documents) of each block."""
    block: tuple[list[int], list[bool]] = ([], [])
    documents = 0
    for _, ids, labelled in stream.encoded():
        block = (block[0] + ids, block[1] + labelled)
        documents += 1
        if len(block[0]) >= block_tokens:  # what is left of the document is dropped: the next block is another's
            yield block[0][:block_tokens], block[1][:block_tokens], documents
            block, documents = ([], []), 0


def _none(source: str, block_tokens: int) -> TokenBlocks:
    tokens = torch.empty(0, block_tokens, dtype=torch.int64)
    return TokenBlocks(tokens, torch.empty_like(tokens, dtype=torch.bool), source, 0, {})


def _healing_parts(settings: DataSettings, mix: list[Stream], filler: int | None) -> tuple[TokenBlocks, TokenBlocks]:
    length = settings.healing_block_tokens
    drawing = Drawing(mix, length)
    training, validation, begun = shared_out(drawing, settings.healing_blocks, settings.validation_fraction)
    packed = [pack_whole(training, length)[: settings.healing_blocks], pack_whole(validation, length)]
    trained = {sample.document.source for block in packed[0] for sample in block}
    if absent := [stream.name for stream in mix if stream.name not in trained]:
        raise UserError(
            f"healing source {', '.join(absent)} gets no place in {len(packed[0])} blocks of {length} tokens"
            " - raise data.healing_blocks or its weight"
        )
    dropped: Counter[str] = sum((stream.dropped for stream in mix), +begun)  # adding leaves out what is 0
    if dropped:
        say(f"healing text {settings.healing}: left out {spoken(dropped)}")
    made = []
    for blocks in packed:
        filled = torch.tensor([num_tokens(block) for block in blocks])
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
