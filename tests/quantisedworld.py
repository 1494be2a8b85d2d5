"""Tiny quantised checkpoints, made by the libraries' own calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from world import byte_tokenizer

WIDE = {"hidden_size": 64, "intermediate_size": 128}
FOUR: dict[str, Any] = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
FOUR_ASYMMETRIC = FOUR | {"symmetric": False}
EIGHT: dict[str, Any] = {"num_bits": 8, "symmetric": True, "strategy": "channel"}


def compressed(
    folder: Path,
    groups: Mapping[str, tuple[Sequence[str], dict[str, Any]]] | None = None,
    ignore: Sequence[str] = ("lm_head",),
    *,
    format: str = "pack-quantized",
    dequantize: bool = False,
    model: PreTrainedModel | None = None,
) -> Path:
    """Write a model rounded to nearest by compressed-tensors; groups are {name: (targets, how weights are rounded)}."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = groups or {"all": (["Linear"], FOUR)}
    schemes = {
        name: QuantizationScheme(targets=list(targets), weights=QuantizationArgs(type="int", **how), format=format)
        for name, (targets, how) in groups.items()
    }
    settings = QuantizationConfig(
        config_groups=schemes,
        ignore=list(ignore),
        quantization_status=QuantizationStatus.FROZEN,
        format=format,
    )
    model = model or tiny("llama", vocab_size=260, **WIDE)
    apply_quantization_config(model, settings)
    for module in model.modules():
        if scheme := getattr(module, "quantization_scheme", None):
            weight, args = module.weight.data, scheme.weights
            grouped = weight.unflatten(-1, (-1, args.group_size or weight.shape[-1]))
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            module.weight_scale.data = scale
            if not args.symmetric:
                module.weight_zero_point.data = zero
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= {"dequantize": True} if dequantize else {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    byte_tokenizer().save_pretrained(folder)
    return folder


def four_bit(folder: Path) -> Path:
    """Write a model in bitsandbytes' 4 bit."""
    from transformers import BitsAndBytesConfig

    plain = folder.with_name(f"{folder.name}-plain")
    tiny("llama", vocab_size=260, **WIDE).save_pretrained(plain)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
