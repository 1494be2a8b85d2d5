"""Random models of LLaMA's shapes, in memory or as files, and how much benchmarks/scale.py measures on them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from layerscalpel.decoder import require_room
from layerscalpel.origin import skeleton
from layerscalpel.quiet import quiet_transformers
from layerscalpel.shards import INDEX, Weights


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int

    def config(self, *, vocab: int = 32000, layers: int | None = None) -> LlamaConfig:
        """Return its config, with another number of layers if given."""
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            vocab_size=vocab,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )

    def layer_bytes(self) -> int:
        """Return the bytes of a layer in bfloat16."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.hidden // self.heads * self.kv_heads
        return 2 * (attention + 3 * self.hidden * self.mlp + 2 * self.hidden)


@dataclass(frozen=True)
class Sizes:
    """How much benchmarks/scale.py measures."""

    seven: Shape = Shape(4096, 32, 32, 32, 11008)
    vocabs: tuple[int, int] = (32000, 128256)
    removed: int = 6
    lengths: tuple[int, ...] = tuple(range(1, 17))
    """Of the windows of all rates."""
    tokens: tuple[int, int] = (8, 512)
    """Blocks, and tokens of each."""
    seventy: Shape = Shape(8192, 80, 64, 8, 28672)
    seventy_removed: int = 16
    few_tokens: tuple[int, int] = (1, 128)
    """Of a pass that waits for weights only."""
    few_windows: int = 3
    turns: int = 2
    """Of plain reads and passes from disk."""
    depths: tuple[int, ...] = (3, 6, 9, 12)
    """Layers removed from the real model."""
    block_tokens: int = 256
    race_blocks: int = 64
    gate_steps: int = 200
    gate_records: int = 2847
    """One pass over the calibration records is that many steps."""
    rank_blocks: int = 128
    rank_removed: int = 6


TINY = Sizes(
    seven=Shape(64, 8, 4, 4, 160),
    vocabs=(320, 1280),
    removed=2,
    lengths=(1, 2),
    tokens=(2, 16),
    seventy=Shape(128, 10, 4, 2, 320),
    seventy_removed=2,
    few_tokens=(1, 8),
    few_windows=2,
    turns=1,
    depths=(9,),
    block_tokens=16,
    race_blocks=8,
    gate_steps=2,
    rank_blocks=2,
    rank_removed=20,
)
"""To see whether it runs at all."""


def random_model(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    """Build a model on the device itself."""
    torch.manual_seed(0)
    with quiet_transformers(), torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def random_tokens(shape: tuple[int, int], vocab: int) -> Tensor:
    """Return token ids [blocks, tokens]."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))


def layer_file(i: int) -> str:
    return f"layer-{i:05}.safetensors"


def write_checkpoint(folder: Path, config: LlamaConfig, layers: Iterable[int], device: torch.device) -> None:
    """Write a checkpoint of random weights unless it is there: a file for each of these layers, one for the rest."""
    parameters = dict(skeleton(config).named_parameters())
    files = {layer_file(i): [name for name in parameters if name.startswith(f"model.layers.{i}.")] for i in layers}
    files["rest.safetensors"] = [name for name in parameters if not name.startswith("model.layers.")]
    index = {name: file for file, names in files.items() for name in names}
    if (folder / INDEX).exists() and json.loads((folder / INDEX).read_text())["weight_map"] == index:
        return
    folder.mkdir(parents=True, exist_ok=True)
    require_room(folder, 2 * sum(parameters[name].numel() for name in index))
    for file, names in files.items():
        tensors = {name: _random(name, parameters[name].shape, device) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        with (folder / file).open("rb") as stream:
            os.fsync(stream.fileno())  # what is not on the disk cannot be dropped from the cache
    config.save_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")


def _random(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()


def aliased(weights: Weights, num_layers: int) -> Weights:
    """Return the tensors of a model all of whose layers are stored layer 0."""
    tensors = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith("model.layers.")}
    for i in range(num_layers):
        for name, tensor in weights.tensors.items():
            if name.startswith("model.layers.0."):
                new = name.replace("layers.0.", f"layers.{i}.", 1)
                tensors[new] = replace(tensor, name=new)
    return Weights(weights.folder, tensors, weights.metadata)
