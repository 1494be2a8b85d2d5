"""What can be told of a model without its weights is right, and a place that cannot be cut is told with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import edit_json
from families import multimodal, tiny

from layerscalpel.cli import main
from layerscalpel.decoder import num_parameters, save_decoder
from layerscalpel.describe import describe
from layerscalpel.needs import LIBRARIES_BYTES, MASTER_BYTES


def described(folder: Path, family: str, num_removed: int | None = None) -> dict:
    return describe(str(save_decoder(tiny(family), None, folder / "m")), num_removed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_sizes_are_those_of_the_model(family, tmp_path):
    found, model = described(tmp_path, family), tiny(family)
    sizes = [num_parameters(layer) for layer in model.get_submodule(found["layers"].split()[2].rstrip(":"))]
    assert (found["class"], found["num_layers"], found["dtype"]) == (type(model).__name__, 8, "float32")
    assert found["parameters"] == num_parameters(model)
    assert found["parameters_per_layer"] == (sizes[0] if len(set(sizes)) == 1 else sizes)
    assert found["bytes"] == found["file_bytes"] == 4 * num_parameters(model)
    assert (found["bytes_per_layer"], found["shards"], found["quantised"]) == (4 * max(sizes), 1, None)


@pytest.fixture(scope="module")
def jamba(tmp_path_factory) -> dict:
    """What is told of a model some of whose places cannot be cut; it takes seconds."""
    return described(tmp_path_factory.mktemp("jamba"), "jamba", 2)


def test_layers_of_several_classes_are_counted(jamba):
    assert "6 x JambaMambaDecoderLayer, 2 x JambaAttentionDecoderLayer" in jamba["layers"]


def test_every_place_is_tried_and_a_refusal_has_its_reason(jamba):
    found = jamba
    refused = {start: group["reason"] for group in found["refused_starts"] for start in group["starts"]}
    assert found["tried_layers"] == 2
    assert sorted([*found["sound_starts"], *refused]) == list(range(7))
    assert {0, 6} <= set(found["sound_starts"])
    assert "per-layer rule of JambaForCausalLM would shift" in refused[2]
    assert found["config_fields_a_cut_changes"] == ["attn_layer_offset", "num_hidden_layers"]


def test_a_fifth_is_tried_by_default(tmp_path):
    found = described(tmp_path, "qwen2")
    assert (found["tried_layers"], found["sound_starts"], found["refused_starts"]) == (2, list(range(7)), [])
    assert found["config_fields_a_cut_changes"] == ["layer_types", "max_window_layers", "num_hidden_layers"]


def test_memory_grows_with_what_a_stage_holds(tmp_path):
    found, model = described(tmp_path, "llama"), tiny("llama")
    weights, layer = 4 * num_parameters(model), num_parameters(model.model.layers[0])
    needed = found["memory_bytes"]["cpu"]
    assert needed["cut"] == LIBRARIES_BYTES
    assert needed["search"] == LIBRARIES_BYTES + weights
    assert needed["search --offload disk"] == LIBRARIES_BYTES + weights - 6 * 4 * layer
    assert needed["heal (kl, both)"] == LIBRARIES_BYTES + 2 * weights + 2 * layer * MASTER_BYTES
    assert found["memory_bytes"]["cuda"]["search"] == LIBRARIES_BYTES + weights // 2  # bfloat16 there


def test_other_parts_of_a_model_are_named(tmp_path):
    save_decoder(multimodal(), None, tmp_path / "m")
    found = describe(str(tmp_path / "m"))
    assert found["other_parts"] == ["vision_tower", "multi_modal_projector"]
    assert found["loaded_by"] == "AutoModelForCausalLM"


def test_a_quantised_checkpoint_is_described(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert describe(str(tmp_path / "m"))["quantised"] == "gptq"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("much", "target.layers='much' is not a whole number"),
        ("0", "target.layers=0 is out of range - allowed: 1 or more"),
        ("-3", "target.layers=-3 is out of range"),
        ("7", "--layers 7 removes 7 of 8 layers - at least 2 must stay, so remove at most 6"),
    ],
)
def test_a_number_of_layers_that_is_none_is_refused(tmp_path, capsys, layers, said):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "m"), f"--layers={layers}"]) == 2
    assert said in capsys.readouterr().err


def test_a_person_and_a_program_are_told_the_same(tmp_path, capsys):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m"), "--layers", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(describe(str(tmp_path / "m"), 3)))
    assert main(["inspect", str(tmp_path / "m"), "--layers", "3"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said
    assert f"{found['parameters']:,}" in said
