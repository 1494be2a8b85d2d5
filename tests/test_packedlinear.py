"""Packed layers compute what their library computes, pass gradients on, are unpacked to be trained, and saved plain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantisedworld import EIGHT, FOUR, FOUR_ASYMMETRIC, compressed, four_bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerscalpel.decoder import load_decoder, num_parameters, stored_bytes
from layerscalpel.errors import UserError
from layerscalpel.packedlinear import PackedLinear, is_packed, unpack
from layerscalpel.probe import find_layers
from layerscalpel.settings import HealSettings
from layerscalpel.shards import read_weights
from layerscalpel.sizes import layer_parameters
from layerscalpel.trained import last_layers, seam_endpoints
from layerscalpel.unpacked import save_unpacked

MIXED = {"eight": (["re:.*down_proj"], EIGHT), "four": (["re:.*(q|k|v|o|gate|up)_proj"], FOUR)}
KINDS = {
    "packed": (lambda folder: compressed(folder, MIXED), True),
    "held": (lambda folder: compressed(folder, MIXED), False),
    "dequantised": (lambda folder: compressed(folder, {"all": (["Linear"], FOUR_ASYMMETRIC)}, dequantize=True), False),
    "bitsandbytes": (four_bit, False),
}
TOKENS = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def checkpoint(request, tmp_path_factory) -> tuple[Path, bool]:
    write, packed = request.param
    if write is four_bit:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is made for Linux alone")
    return write(tmp_path_factory.mktemp("packed") / "model"), packed


def load(checkpoint: tuple[Path, bool], dtype: str = "float32"):
    folder, packed = checkpoint
    return load_decoder(str(folder), device="cpu", dtype=dtype, allow_quantised=True, packed=packed)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_library(checkpoint, dtype):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=getattr(torch, dtype))
    ours, theirs = logits(load(checkpoint, dtype).model), logits(plain)
    if any(type(module).__name__ == "Linear4bit" for module in plain.modules()):  # in bfloat16 on some CPUs
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()
    else:
        assert torch.equal(ours, theirs)


def test_only_what_is_asked_for_stays_in_memory(checkpoint):
    model = load(checkpoint).model
    layer = model.model.layers[0].mlp.up_proj
    tensors = {tensor.dtype for tensor in (*layer.parameters(), *layer.buffers())}
    stays_packed = checkpoint[1] or not isinstance(layer, PackedLinear)
    assert (torch.float32 in tensors) == (not stays_packed or isinstance(layer, PackedLinear))  # scales
    size = sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    assert (size < 4 * layer.in_features * layer.out_features / 2) == stays_packed


def test_parameters_and_bytes_are_those_of_the_checkpoint(checkpoint):
    loaded = load(checkpoint)
    plain = AutoModelForCausalLM.from_config(type(loaded.model.config)(**_unquantised(loaded.model.config)))
    assert num_parameters(loaded.model) == num_parameters(plain)
    assert layer_parameters(find_layers(loaded.model)) == layer_parameters(find_layers(plain))
    assert stored_bytes(loaded.model, loaded.origin) == read_weights(checkpoint[0]).num_bytes()


def _unquantised(config) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "quantization_config"}


def test_gradients_pass_through_to_hidden_states(checkpoint):
    model, plain = load(checkpoint).model, load(checkpoint).model
    unpack(plain.model.layers)
    found = []
    for each in (model, plain):
        for parameter in each.parameters():
            parameter.requires_grad_(False)
        hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        each(inputs_embeds=hidden, use_cache=False).logits.square().sum().backward()
        found.append(hidden.grad)
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def test_trained_layers_are_saved_plain_and_the_others_as_they_were(checkpoint, tmp_path):
    loaded = load(checkpoint)
    decoder = find_layers(loaded.model)
    with seam_endpoints(decoder, [3], HealSettings()) as trained, torch.no_grad():
        assert trained.layers == [2, 3]
        assert all(parameter.dtype == torch.float32 for parameter in trained.parameters)
        for parameter in trained.parameters:
            parameter.mul_(1.01)
    names = save_unpacked(loaded.model, checkpoint[0], tmp_path / "out", "float32")
    assert {name.split(".")[2] for name in names} == {"2", "3"}
    assert len(names) == 14
    again = load((tmp_path / "out", checkpoint[1])).model
    assert {name.split(".")[2] for name, part in again.named_modules() if is_packed(part)} == set("014567")
    assert torch.equal(logits(again), logits(loaded.model))
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(vanilla), logits(loaded.model), atol=0.02 * logits(vanilla).abs().max().item())
    before, after = load_file(checkpoint[0] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    touched = tuple(f"model.layers.{i}." for i in (2, 3))
    assert {n for n in before if not n.startswith(touched)} == {n for n in after if not n.startswith(touched)}
    assert all(torch.equal(after[n], before[n]) for n in after if not n.startswith(touched))
    assert {n.rpartition(".")[2] for n in after if n.startswith(touched)} == {"weight"}


def test_the_last_layers_and_the_head_are_trained(checkpoint):
    decoder = find_layers(load(checkpoint).model)
    with last_layers(decoder, [], HealSettings(last_layers=2)) as trained:
        assert trained.layers == [6, 7]
        assert {id(decoder.model.lm_head.weight), id(decoder.model.model.norm.weight)} <= set(
            map(id, trained.parameters)
        )


def test_a_packed_layer_that_the_config_calls_plain_is_refused(tmp_path):
    folder = compressed(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] += ["model.layers.1.mlp.up_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks 1 tensors of the right shape \(model.layers.1.mlp.up_proj.weight\)"):
        load((folder, False))


def test_what_is_packed_but_no_linear_layer_is_refused(tmp_path):
    folder = compressed(tmp_path / "model")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.experts.weight_scale"] = torch.ones(2)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"packs model.layers.1.experts, which is no linear layer of its own"):
        load((folder, False))
