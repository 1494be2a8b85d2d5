"""A trained model is saved over a copy of its checkpoint: what was not trained keeps its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerscalpel.decoder import load_decoder, save_decoder
from layerscalpel.overwrite import save_changed

TRAINED = "model.layers.1.mlp.down_proj.weight"


def checkpoint(folder: Path, *mixed: str) -> Path:
    """Write a tiny float32 model; tensors whose name holds one of `mixed` are in bfloat16."""
    save_decoder(tiny("llama"), None, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16() if any(part in name for part in mixed) else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("computing", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixed", [(), ("mlp",), ("norm", "self_attn")])
def test_only_what_was_trained_changes(computing: str, mixed: tuple[str, ...], tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "before", *mixed)
    model = load_decoder(str(before), device="cpu", dtype=computing).model
    with torch.no_grad():
        model.get_parameter(TRAINED).add_(0.5)
    assert save_changed(model, before, tmp_path / "after", "bfloat16") == [TRAINED]
    was, now = (load_file(folder / "model.safetensors") for folder in (before, tmp_path / "after"))
    for name, tensor in was.items():
        assert now[name].dtype == tensor.dtype
        assert torch.equal(now[name], tensor) == (name != TRAINED)
    assert torch.equal(now[TRAINED], model.get_parameter(TRAINED).to(was[TRAINED].dtype))


def test_nothing_trained_is_a_copy(tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "before", "mlp")
    model = load_decoder(str(before), device="cpu", dtype="bfloat16").model
    assert save_changed(model, before, tmp_path / "new", "float32") == []
    names = {path.name for path in before.iterdir()}
    assert names == {path.name for path in (tmp_path / "new").iterdir()} == {p.name for p in before.iterdir()}
    assert all((tmp_path / "new" / name).read_bytes() == (before / name).read_bytes() for name in names)


def test_shards_stay_and_load(tmp_path: Path) -> None:
    model = tiny("qwen2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "before", max_shard_size="20KB")
    loaded = load_decoder(str(tmp_path / "before"), device="cpu").model
    layer = loaded.model.layers[0].self_attn
    with torch.no_grad():
        layer.q_proj.weight.mul_(2.0)
    save_changed(loaded, tmp_path / "before", tmp_path / "after", "float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert len(list((tmp_path / "after").glob("*.safetensors"))) > 2
    for (name, now), (_, wanted) in zip(again.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(now, wanted), name


def test_other_names_are_written_anew_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, model = checkpoint(tmp_path / "before"), tiny("llama")
    tensors = load_file(before / "model.safetensors")
    renamed = {name.replace("model.layers", "decoder.layers"): tensor for name, tensor in tensors.items()}
    save_file(renamed, before / "model.safetensors", metadata={"format": "pt"})
    assert save_changed(model, before, tmp_path / "after", "float32") is None
    assert "all are written anew" in capsys.readouterr().err
    now = load_file(tmp_path / "after" / "model.safetensors")
    assert now.keys() == tensors.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
