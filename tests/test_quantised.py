"""Checkpoints that are quantised already: whole layers are dropped by name, packed numbers come through as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess
from families import tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from layerscalpel import checkpoint
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.cli import main
from layerscalpel.errors import UserError
from layerscalpel.origin import peek
from layerscalpel.segment import Segment

WIDE = {"hidden_size": 64, "intermediate_size": 128}
SEGMENT = Segment(2, 5, 8)


def write_bitsandbytes(folder: Path) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is made for Linux alone")
    from transformers import BitsAndBytesConfig

    tiny("llama", **WIDE).save_pretrained(folder / "plain")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder / "model")
    return folder / "model"


def write_compressed(folder: Path) -> Path:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    settings = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head", "model.layers.3.mlp.up_proj", "model.layers.6.mlp.down_proj"],
        quantization_status=QuantizationStatus.FROZEN,
        format="pack-quantized",
    )
    model = tiny("llama", **WIDE)
    apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.view(module.weight.shape[0], -1, 32)
            module.weight_scale.data = grouped.abs().amax(-1) / 7
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    model.save_pretrained(folder / "model")
    compressor.update_config(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module", params=[write_bitsandbytes, write_compressed], ids=["bitsandbytes", "compressed"])
def quantised(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("quantised"))


def test_layers_are_dropped_and_proven(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    origin = peek(str(quantised), allow_quantised=True)
    found = cut_checkpoint(origin, SEGMENT, tmp_path / "out", device="cpu")
    assert found["proof"]["logits"]["logits_equal"]
    assert found["proof"]["logits"]["generation_equal"]
    before, after = load_file(quantised / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    packed = [name for name, tensor in after.items() if tensor.dtype in (torch.uint8, torch.int32)]
    assert packed
    for name in packed:
        old = name.replace("layers.2.", "layers.5.").replace("layers.3.", "layers.6.").replace("layers.4.", "layers.7.")
        assert torch.equal(after[name], before[name if ".layers.0." in name or ".layers.1." in name else old])
    assert found["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in after.values())


def test_names_in_the_settings_are_renumbered(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    cut_checkpoint(peek(str(write_compressed(tmp_path)), allow_quantised=True), SEGMENT, tmp_path / "out", device="cpu")
    settings = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert settings["ignore"] == ["lm_head", "model.layers.3.mlp.down_proj"]


def test_a_missing_back_end_is_refused_before_anything_is_written(quantised, tmp_path, monkeypatch):
    def absent(*_: object, **__: object) -> None:
        raise ImportError("that library is\nnot here")

    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = type(
        AutoHfQuantizer.from_config(json.loads((quantised / "config.json").read_text())["quantization_config"])
    )
    monkeypatch.setattr(quantizer, "validate_environment", absent)
    with pytest.raises(UserError, match=r"cannot be loaded here to prove its cut: that library is not here - install"):
        cut_checkpoint(peek(str(quantised), allow_quantised=True), SEGMENT, tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_searching_or_healing_a_quantised_model_is_refused(quantised, tmp_path, capsys):
    assert main(["run", str(quantised), "--segment", "2:5", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "is already quantised" in capsys.readouterr().err
