"""A whole run on a parent that is quantised already, and what is refused on one by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess
from quantisedworld import FOUR, FOUR_ASYMMETRIC, compressed, four_bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from world import write_model, write_recipe, write_texts

from layerscalpel import checkpoint
from layerscalpel.cli import main
from layerscalpel.decoder import load_decoder
from layerscalpel.shards import read_weights

GENTLE = {"heal__lr": 1e-4, "heal__objective": "kl", "search__method": "exact"}


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_texts(tmp_path / "texts.jsonl")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("packed", [False, True])
def test_a_quantised_parent_is_searched_cut_and_healed(tmp_path, texts, monkeypatch, packed):
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    parent = compressed(tmp_path / "parent", {"all": (["re:.*layers.[0-7].*_proj"], FOUR)})
    recipe = write_recipe(tmp_path / "recipe.yaml", texts, **GENTLE)
    how = ["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--until", "heal", "--quiet"]
    assert main(["run", str(parent), *how, "--set", f"model.packed={str(packed).lower()}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    cut, healed = (tmp_path / "run" / stage / "model" for stage in ("cut", "heal"))
    assert results["cut"]["proof"]["logits"]["logits_equal"]
    assert results["parent"]["bytes"] == read_weights(parent).num_bytes()
    assert results["heal"]["bytes"] == read_weights(healed).num_bytes() > results["cut"]["bytes"]
    assert results["heal"]["parameters"] == results["cut"]["parameters"]
    assert results["heal"]["best_step"] > 0
    assert not results["heal"]["failed"]
    before, after = load_file(cut / "model.safetensors"), load_file(healed / "model.safetensors")
    trained = tuple(f"model.layers.{i}." for i in results["heal"]["layers"])
    frozen = [name for name in before if not name.startswith(trained)]
    assert any(name.endswith("weight_packed") for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    vanilla = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.float32)
    ours = load_decoder(str(healed), device="cpu", allow_quantised=True, packed=packed).model
    assert torch.equal(logits(vanilla), logits(ours))
    assert AutoModelForCausalLM.from_pretrained(healed, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert main(["cut", str(healed), "--segment", "1:2", "--out", str(tmp_path / "again"), "--quiet"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bitsandbytes", "asymmetric"])
def test_other_forms_are_searched_by_the_gate_and_healed(tmp_path, texts, kind):
    if kind == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is made for Linux alone")
        parent = four_bit(tmp_path / "parent")
    else:
        parent = compressed(tmp_path / "parent", {"all": (["Linear"], FOUR_ASYMMETRIC)}, dequantize=True)
    recipe = write_recipe(tmp_path / "recipe.yaml", texts, **GENTLE | {"search__method": "clp"})
    assert main(["run", str(parent), "--recipe", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert not results["heal"]["failed"]
    assert results["evaluate"]["healed"]["kl_nats"]["value"] > 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("heal.method=all", r"heal.method=all trains every layer.* - allowed: endpoint, last, none"),
        (
            "heal.method=lora",
            r"heal.method=lora merges its adapters into every layer.* - allowed: endpoint, last, none",
        ),
        (
            "heal.second=all",
            r"heal.second=all trains every layer.* - allowed: endpoint, last, none, as in --recipe paper",
        ),
        ("heal.frozen=4bit", r"would round its weights a second time - allowed: device; model.packed=true takes less"),
        ("stitch.method=linear", r"stitch.method=linear changes weights that are packed - allowed: none"),
        ("search.method=pilot", r"pilot cuts plain weights in memory - allowed: clp, gate, exact, or --segment"),
        ("model.offload=disk", r"--offload disk reads plain weights - leave it out; model.packed=true takes less"),
    ],
)
def test_what_cannot_be_done_is_refused_before_weights_are_read(tmp_path, texts, capsys, setting, told):
    parent = compressed(tmp_path / "parent")
    recipe = write_recipe(tmp_path / "recipe.yaml", texts, search__method="exact")
    how = ["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]
    assert main(["run", str(parent), *how, "--set", setting]) == 2
    assert re.search(told, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq has layers of its own, so it can only be cut at a given"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bit multiplies rounded"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"targets": ["Linear"], "input_activations": {"num_bits": 8}}},
            },
            "it quantises activations, too",
        ),
        ({"quant_method": "compressed-tensors", "quantization_status": "frozen"}, "its weights are not packed"),
    ],
)
def test_parents_of_other_forms_are_refused(tmp_path, texts, capsys, settings, told):
    parent = write_model(tmp_path / "parent")
    config = json.loads((parent / "config.json").read_text()) | {"quantization_config": settings}
    (parent / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(tmp_path / "recipe.yaml", texts)
    assert main(["run", str(parent), "--recipe", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert told in (said := " ".join(capsys.readouterr().err.split()))
    assert "search and heal the unquantised checkpoint, quantise after" in said


def test_a_missing_library_is_told(tmp_path, texts, capsys, monkeypatch):
    from transformers.quantizers import quantizer_compressed_tensors as quantizer

    parent = compressed(tmp_path / "parent")
    recipe = write_recipe(tmp_path / "recipe.yaml", texts)
    monkeypatch.setattr(quantizer, "is_compressed_tensors_available", lambda: False)
    assert main(["run", str(parent), "--recipe", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "pip install compressed-tensors" in " ".join(capsys.readouterr().err.split())


def test_packed_without_a_quantised_parent_is_refused(tmp_path, texts, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", texts)
    how = ["--recipe", str(recipe), "--out", str(tmp_path / "run"), "--set", "model.packed=true"]
    assert main(["run", str(write_model(tmp_path / "parent")), *how]) == 2
    assert "model.packed=true has no effect" in capsys.readouterr().err
