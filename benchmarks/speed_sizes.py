"""How much benchmarks/speed.py measures, and the models of several depths that it measures on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from shapes import Shape, random_model
from transformers import PreTrainedModel

from layerscalpel.cut import cut_model
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import TargetSettings
from layerscalpel.targets import num_removed_of
from layerscalpel.turns import GRAPH, GROWING, Job

WHOLE = "whole"
"""Name of the uncut model; the others are named by how many layers they lack."""
Planned = tuple[str, Job, int]
"""(way to decode, sizes, timed rounds)."""


@dataclass(frozen=True)
class SpeedSizes:
    """Sizes of every part."""

    shape: Shape = field(default_factory=lambda: Shape(4096, 32, 32, 32, 11008))
    vocab: int = 32000
    rates: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Shares of the layers to remove."""
    batches: tuple[int, int] = (1, 16)
    prompts: tuple[int, int] = (512, 2048)
    graph_tokens: int = 33
    """New tokens by a CUDA graph; one fewer is decoded."""
    eager_tokens: int = 17
    repeats: int = 7
    fewer_repeats: int = 4
    matmul: int = 8192
    copied: int = 1 << 30
    """Bytes that are copied to learn the device's bandwidth."""
    real: Job = field(default_factory=lambda: Job(1, 128, 33))
    """On the real model."""
    real_rate: float = 0.2
    task_items: int = 40
    """Of each task."""
    task_rounds: int = 3

    def plan(self) -> list[Planned]:
        """Return what is timed, the most telling first.

        A static cache for the largest batch and prompt is left out: those of all depths at once fill 60 GB.
        """
        (one, many), (short, long) = self.batches, self.prompts
        graphs = [(one, short), (many, short), (one, long)]
        plain = [(one, short), (many, short), (many, long), (one, long)]
        planned = [(GRAPH, Job(*sizes, self.graph_tokens), self.repeats) for sizes in graphs[:2]]
        planned += [(GROWING, Job(*sizes, self.eager_tokens), self.fewer_repeats) for sizes in plain]
        return [*planned, (GRAPH, Job(*graphs[2], self.graph_tokens), self.repeats)]


TINY = SpeedSizes(
    shape=Shape(64, 10, 4, 4, 160),
    vocab=320,
    batches=(1, 2),
    prompts=(8, 16),
    graph_tokens=5,
    eager_tokens=3,
    repeats=2,
    fewer_repeats=2,
    matmul=64,
    copied=1 << 16,
    real=Job(1, 8, 3),
    task_items=2,
    task_rounds=2,
)
"""To see whether it runs at all."""


def random_decoder(sizes: SpeedSizes, device: torch.device) -> Decoder:
    """Return the whole model, of random weights."""
    return find_layers(random_model(sizes.shape.config(vocab=sizes.vocab), device))


def depths(whole: Decoder, rates: Sequence[float]) -> dict[str, PreTrainedModel]:
    """Return the whole model and its cuts, which share its tensors: {name: model}."""
    return {WHOLE: whole.model} | {str(n): cut(whole, n) for n in removed_counts(rates, len(whole))}


def removed_counts(rates: Sequence[float], num_layers: int) -> list[int]:
    """Return how many layers each rate removes."""
    return [num_removed_of(TargetSettings(rate=rate), num_layers) for rate in rates]


def cut(whole: Decoder, n: int) -> PreTrainedModel:
    """Return the model without n layers in its middle."""
    start = (len(whole) - n) // 2
    return cut_model(whole, Segment(start, start + n, len(whole)))[0]


def num_layers_of(models: Mapping[str, PreTrainedModel]) -> dict[str, int]:
    """Return {name: number of layers}."""
    return {name: model.config.num_hidden_layers for name, model in models.items()}
