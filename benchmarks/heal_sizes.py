"""How much benchmarks/heal.py measures, and the random models and packed blocks that it measures on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import Shape, random_model, random_tokens

from layerscalpel.data import TokenBlocks
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers


@dataclass(frozen=True)
class HealSizes:
    """Sizes of every part."""

    shapes: Mapping[str, tuple[Shape, int]] = field(
        default_factory=lambda: {
            "7b": (Shape(4096, 32, 32, 32, 11008), 32000),
            "8b": (Shape(4096, 32, 32, 8, 14336), 128256),
            "135m": (Shape(576, 30, 9, 3, 1536), 49152),
        }
    )
    """{name: (shape, vocabulary)}: LLaMA2-7B, LLaMA-3-8B, and SmolLM2-135M, where launches outweigh arithmetic."""
    starts: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"7b": (22, 17, 12), "135m": (13,)})
    """Of the segment; the first is compared most."""
    removed: int = 6
    block_tokens: int = 512
    document_tokens: int = 128
    """Of each packed document; the first 48 of every 128 are a prompt."""
    blocks: int = 384
    batch_size: int = 16
    epochs: int = 2
    matmul: int = 8192
    memory_start: int = 22
    memory_steps: int = 2
    rank_start: int = 16
    rank_blocks: int = 256

    def speed_plan(self) -> list[tuple[str, str, int, dict[str, Any]]]:
        """Return (shape, method, start, settings) of every row, the most telling first."""
        first, *others = self.starts["7b"]
        joined, compiled = {"separate_documents": False}, {"compile": True}
        plan: list[tuple[str, str, int, dict[str, Any]]] = [("7b", "lora", first, {}), ("7b", "endpoint", first, {})]
        plan += [("7b", "endpoint", start, {}) for start in others]
        plan += [("7b", "endpoint", first, how) for how in ({"frozen": "cpu"}, {"cache_gib": 0.0})]
        plan += [("7b", method, first, how) for how in (joined, compiled) for method in ("lora", "endpoint")]
        small = self.starts["135m"][0]
        return plan + [("135m", method, small, how) for method in ("endpoint", "all") for how in ({}, compiled)]

    def kernel_plan(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Return (shape, method, settings) of every row."""
        apart, joined = {"separate_documents": True}, {"separate_documents": False}
        large = [("7b", method, apart) for method in ("endpoint", "lora")]
        return [*large, ("7b", "endpoint", joined), *(("135m", method, apart) for method in ("endpoint", "all"))]


TINY = HealSizes(
    shapes={
        "7b": (Shape(64, 10, 4, 4, 160), 320),
        "8b": (Shape(64, 10, 4, 2, 160), 640),
        "135m": (Shape(48, 8, 3, 3, 96), 320),
    },
    starts={"7b": (6, 4, 3), "135m": (4,)},
    removed=2,
    block_tokens=16,
    document_tokens=8,
    blocks=8,
    batch_size=4,
    matmul=128,
    memory_start=6,
    rank_start=4,
    rank_blocks=8,
)
"""To see whether it runs at all."""


def packed_blocks(sizes: HealSizes, count: int, vocab: int) -> TokenBlocks:
    """Return blocks of equal documents of random tokens, each a prompt and an answer."""
    length, own = sizes.block_tokens, sizes.document_tokens
    tokens = random_tokens((count, length), vocab)
    positions = (torch.arange(length) % own).expand(count, length).contiguous()
    labelled = positions >= max(1, own * 48 // 128)
    return TokenBlocks(tokens, labelled, "random tokens", count * (length // own), {}, positions)


def random_child(sizes: HealSizes, name: str, device: torch.device) -> Decoder:
    """Return a cut model: the shape, without the removed layers."""
    shape, vocab = sizes.shapes[name]
    return find_layers(random_model(shape.config(vocab=vocab, layers=shape.layers - sizes.removed), device))
