"""What each held-out block gave, one compressed file a model, so that two models can be compared block by block later.

A file is JSON in gzip. Two models are paired where `text` is the same: the hash of the very tokens.

Dimensions: N blocks.

    result = by_block(figures, text=blocks.summary()["sha256"], tokenizer=token_identity(tokenizer))
    save_blocks(folder, "healed", result)
    load_blocks(folder, "healed").kl_N  # [N] float64, nats
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel.evaluate import TokenFigures
from layerscalpel.packed import read_packed, write_packed

SPOKEN = "The mill, 3 gulls and 1,024 boats:\n\tnaïve   Zürich 河边 \U0001f6a4 </s>"
"""Text that tokenizers differ on."""
COLUMNS = ("kl_N", "agreement_N", "nll_N", "labelled_N")


@dataclass(frozen=True)
class BlockResult:
    """Figures of one model, one number a block [N] float64."""

    text: str
    """Hash of the tokens."""
    tokenizer: str
    """token_identity of what made them."""
    nll_N: Tensor
    """Mean negative log likelihood of the labelled targets."""
    labelled_N: Tensor
    """How many targets are labelled."""
    kl_N: Tensor | None = None
    """Mean KL to the parent; None where there was none to compare with."""
    agreement_N: Tensor | None = None
    """Share of positions where both hold the same token most likely."""


def token_identity(tokenizer: Any) -> str:
    """Return what tells tokenizers apart that give other ids to the same text."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], repr(item[0])))  # some tokens are bytes
    return hashlib.sha256(repr([vocab, list(tokenizer(SPOKEN).input_ids)]).encode()).hexdigest()


def by_block(figures: TokenFigures, *, text: str, tokenizer: str) -> BlockResult:
    """Return the means of every block."""
    nll_N = figures.nll_NT.sum(1) / figures.labelled_N.clamp(min=1)
    known = (figures.kl_NT.mean(1), figures.agreement_NT.mean(1)) if figures.compared else (None, None)
    return BlockResult(text, tokenizer, nll_N, figures.labelled_N, *known)


def save_blocks(folder: Path, model: str, result: BlockResult) -> Path:
    """Write a model's figures by rename; return the file."""
    columns = {name: None if (item := getattr(result, name)) is None else item.tolist() for name in COLUMNS}
    content = {"text": result.text, "tokenizer": result.tokenizer, **columns}
    return write_packed(blocks_file(folder, model), content)


def load_blocks(folder: Path, model: str) -> BlockResult:
    """Read what `save_blocks` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    return read_packed(blocks_file(folder, model), _result, "the blocks", "scalpel evaluate DIR")


def _result(content: dict[str, Any]) -> BlockResult:
    columns = {name: content.pop(name) for name in COLUMNS}
    tensors: dict[str, Any] = {
        k: None if v is None else torch.tensor(v, dtype=torch.float64) for k, v in columns.items()
    }
    return BlockResult(**content, **tensors)


def blocks_file(folder: Path, model: str) -> Path:
    """Return where a model's figures are."""
    return folder / f"{model}.blocks.json.gz"
