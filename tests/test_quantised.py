"""Checkpoints that are quantised already: whole layers are dropped by name, packed numbers come through as they are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess
from quantisedworld import EIGHT, FOUR, FOUR_ASYMMETRIC, compressed, four_bit
from safetensors.torch import load_file

from layerscalpel import checkpoint
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.decoder import load_origin
from layerscalpel.errors import UserError
from layerscalpel.origin import peek
from layerscalpel.segment import Segment

SEGMENT = Segment(2, 5, 8)
NAMED = {
    "one": ([r"re:.*layers\.(1|3|6|7)\..*up_proj$", "model.layers.5.mlp.down_proj"], EIGHT),
    "gone": (["re:model.layers.4.mlp.*"], EIGHT),
    "rest": (["re:model.layers.[0-7].self_attn.*", r"re:model\.layers\.6\.mlp\.down_proj"], FOUR),
}
LEFT = ["lm_head", "re:model.layers.5.self_attn.*", "model.layers.3.self_attn.q_proj", r"re:.*\.(2|7)\.self_attn\.v.*"]
KINDS = {
    "bitsandbytes": four_bit,
    "symmetric": compressed,
    "asymmetric": partial(compressed, groups={"all": (["Linear"], FOUR_ASYMMETRIC)}, dequantize=True),
    "eight": partial(compressed, groups={"all": (["Linear"], EIGHT)}),
    "int-quantized": partial(compressed, groups={"all": (["Linear"], EIGHT)}, format="int-quantized"),
    "named": partial(compressed, groups=NAMED, ignore=LEFT),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def quantised(request, tmp_path_factory) -> Path:
    if request.param is four_bit:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is made for Linux alone")
    return request.param(tmp_path_factory.mktemp("quantised") / "model")


def test_layers_are_dropped_and_proven(quantised, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    origin = peek(str(quantised), allow_quantised=True)
    found = cut_checkpoint(origin, SEGMENT, tmp_path / "out", device="cpu")
    assert found["proof"]["logits"]["logits_equal"]
    assert found["proof"]["logits"]["generation_equal"]
    before, after = load_file(quantised / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    packed = [name for name, tensor in after.items() if tensor.dtype in (torch.uint8, torch.int32, torch.int8)]
    assert packed
    for name in packed:
        old = name.replace("layers.2.", "layers.5.").replace("layers.3.", "layers.6.").replace("layers.4.", "layers.7.")
        assert torch.equal(after[name], before[name if ".layers.0." in name or ".layers.1." in name else old])
    assert found["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in after.values())


def test_names_in_the_settings_are_renumbered(tmp_path):
    model = compressed(tmp_path / "model", groups=NAMED, ignore=LEFT)
    cut_checkpoint(peek(str(model), allow_quantised=True), SEGMENT, tmp_path / "out", proof="none")
    settings = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert settings["ignore"] == [
        "lm_head",
        "re:model.layers.2.self_attn.*",
        r"re:model\.layers\.(?:4)(?:\.self_attn\.v_proj)$",
    ]
    assert {name: group["targets"] for name, group in settings["config_groups"].items()} == {
        "one": [r"re:model\.layers\.(?:1|3|4)(?:\.mlp\.up_proj)$", "model.layers.2.mlp.down_proj"],
        "rest": ["re:model.layers.[0-7].self_attn.*", r"re:model\.layers\.3\.mlp\.down_proj"],
    }


def test_settings_beside_the_config_are_renumbered(tmp_path):
    """GPTQ keeps its own; whether the library is here does not matter for that."""
    model = compressed(tmp_path / "model")
    rules = {"-:.*layers\\.(3|5)\\..*": {}, "+:.*layers\\.7\\..*": {"bits": 8}, "-:.*layers\\.2\\..*": {}}
    for name in ("config.json", "quantize_config.json"):
        own = {"quant_method": "gptq", "bits": 4, "dynamic": rules, "modules_in_block_to_quantize": [["mlp.up_proj"]]}
        written = json.loads((model / "config.json").read_text()) | {"quantization_config": own}
        (model / name).write_text(json.dumps(written if name == "config.json" else own))
    cut_checkpoint(peek(str(model), allow_quantised=True), SEGMENT, tmp_path / "out", proof="none")
    beside = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert beside == stated
    names = [key.partition(":") for key in beside["dynamic"]]
    assert [(mark, "layers\\.(?:2)" in rest or "layers\\.4" in rest) for mark, _, rest in names] == [
        ("-", True),
        ("+", True),
    ]
    assert beside["modules_in_block_to_quantize"] == own["modules_in_block_to_quantize"]


def test_zero_points_that_are_not_loaded_packed_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    model = compressed(tmp_path / "model", groups={"all": (["Linear"], FOUR_ASYMMETRIC)})
    with pytest.raises(UserError, match=r'packs its zero points, .* - add "dequantize": true to the quantization_conf'):
        cut_checkpoint(peek(str(model), allow_quantised=True), SEGMENT, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_missing_back_end_is_refused_before_anything_is_written(quantised, tmp_path, monkeypatch):
    def absent(*_: object, **__: object) -> None:
        raise ImportError("that library is\nnot here")

    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = type(
        AutoHfQuantizer.from_config(json.loads((quantised / "config.json").read_text())["quantization_config"])
    )
    monkeypatch.setattr(quantizer, "validate_environment", absent)
    extra = "compressed-tensors" in (quantised / "config.json").read_text()
    cure = r"pip install layerscalpel\[quant\], or --no-verify" if extra else "install that"
    with pytest.raises(UserError, match=rf"cannot be loaded here to prove its cut: that library is not here - {cure}"):
        cut_checkpoint(peek(str(quantised), allow_quantised=True), SEGMENT, tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"cannot be loaded here: that library is not here - " + cure.partition(",")[0]):
        load_origin(peek(str(quantised), allow_quantised=True), device="cpu")
