"""A stitch is kept only where it helps, the best of all is taken, and what was planted is repaired."""

from __future__ import annotations

import copy
import functools
import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from families import tiny, tokens
from healing import by_tier
from planted import mean_kl, random_blocks, silence
from transformers import AutoModelForCausalLM
from world import write_model

from layerscalpel import stitch
from layerscalpel.cli import main
from layerscalpel.cut import cut_model
from layerscalpel.decoder import num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.rehearsal import rehearse
from layerscalpel.seam import Repair
from layerscalpel.segment import Segment
from layerscalpel.settings import StitchName, StitchSettings
from layerscalpel.stitch import CANDIDATES, STITCHES, stitch_model
from layerscalpel.witness import is_tied

SEGMENT = Segment(3, 5, 8)
AUTO = StitchSettings("auto")


def cut_apart(parent: Any, segment: Segment = SEGMENT) -> Decoder:
    """Return the parent without the segment, sharing no tensor with it."""
    return find_layers(copy.deepcopy(cut_model(find_layers(parent), segment)[0]))


REHEARSED: dict[tuple[Any, ...], Any] = {}


@pytest.fixture(autouse=True)
def rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove what is asked of a model of one config once: it is proven on a twin (tests of its own: test_fold.py)."""

    def once(student: Decoder, start: int, names: Any) -> Any:
        asked = (type(student.model), student.model.config.to_json_string(), start, *names)
        if asked not in REHEARSED:
            REHEARSED[asked] = rehearse(student, start, names)
        seam, refused = REHEARSED[asked]
        return seam, dict(refused)  # a stitch adds its own

    monkeypatch.setattr(stitch, "rehearse", once)


@functools.cache
def auto_at(segment: Segment) -> dict[str, Any]:
    """Return what is found where a segment of the plain llama is cut, for tests that only read it."""
    parent = tiny("llama")
    return stitch_model(cut_apart(parent, segment), find_layers(parent), segment, random_blocks(8), AUTO)


def plant(parent: Decoder, segment: Segment, change: Any) -> None:
    """Make the first layer of the segment a given map of the stream, the others nothing."""
    for i in range(segment.start, segment.stop):
        own = change if i == segment.start else lambda hidden: hidden
        parent.layers[i].forward = lambda hidden, *_args, own=own, **_kwargs: own(hidden)


def test_tables_have_exactly_the_names_that_settings_allow() -> None:
    assert set(STITCHES) == set(get_args(StitchName)) == {*CANDIDATES, "none", "auto"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "method"),
    by_tier(
        product(["llama", "qwen2"], [*CANDIDATES, "auto", "none"]),
        everyday=[
            *(("llama", method) for method in ("rotation", "ridge", "none")),
            *(("qwen2", method) for method in ("scalar", "linear", "auto")),
        ],
    ),
)
def test_stitch_is_never_worse_than_none_on_its_held_out_blocks(family: str, method: StitchName) -> None:
    parent, blocks = tiny(family), random_blocks(8)
    student = cut_apart(parent)
    plain, chosen = copy.deepcopy(student.model), blocks.tokens[-2:]
    found = stitch_model(student, find_layers(parent), SEGMENT, blocks, StitchSettings(method))
    wanted = parent(chosen).logits
    none, now = (mean_kl(wanted, model(chosen).logits).mean().item() for model in (plain, student.model))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["kl_nats"]["none"]["value"] == pytest.approx(none, rel=1e-4)
    assert found["kl_nats"][found["method"]]["value"] == pytest.approx(now, rel=1e-4)
    assert now <= none
    tried = {"auto": {*CANDIDATES}, "none": set()}.get(method, {method})
    assert found["kl_nats"].keys() == tried | {"none"}
    assert found["fold_error"].keys() == found["added_parameters"].keys() == tried
    assert all(error < 1e-4 for error in found["fold_error"].values())
    assert found["alpha"].keys() == tried & {"scalar", "rotation"}
    assert (found["refused"], found["num_tokens"]) == ({}, 6 * 16)


@pytest.mark.parametrize("family", by_tier(["llama", "gpt2", "qwen3_moe", "olmo2"], everyday=["llama", "olmo2"]))
def test_auto_keeps_the_lowest_of_all_that_the_family_allows(family: str) -> None:
    parent = tiny(family)
    found = stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(8), AUTO)
    values = {name: kl["value"] for name, kl in found["kl_nats"].items()}
    free = [name for name in values if not found["added_parameters"].get(name)]
    assert found["method"] == min(free, key=lambda name: values[name])
    assert values.keys() | found["refused"].keys() == {*CANDIDATES, "none"}
    assert not values.keys() & found["refused"].keys()
    assert all(type(parent).__name__ in why for why in found["refused"].values())
    for name in CANDIDATES:  # alone each finds what it found among the others
        if name in values:
            alone = stitch_model(
                cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(8), StitchSettings(name)
            )
            assert alone["kl_nats"][name] == found["kl_nats"][name]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_segment_that_multiplies_the_stream_is_repaired_by_a_scale(family: str) -> None:
    parent, segment = tiny(family), Segment(0, 4, 8) if family == "gemma3_text" else SEGMENT
    decoder = find_layers(parent)
    student = cut_apart(parent, segment)
    plant(decoder, segment, lambda hidden: 3.0 * hidden)
    found = stitch_model(student, decoder, segment, random_blocks(8), StitchSettings("scalar"))
    assert found["method"] == "scalar"
    assert found["alpha"]["scalar"] == pytest.approx(3.0, rel=1e-5)
    assert found["kl_nats"]["none"]["value"] > 1e-3
    assert found["kl_nats"]["scalar"]["value"] < 1e-5 * found["kl_nats"]["none"]["value"] + 1e-7


@pytest.mark.parametrize("segment", [SEGMENT, Segment(5, 8, 8), Segment(0, 2, 8)], ids=str)
def test_segment_that_turns_the_stream_is_repaired_by_a_rotation(segment: Segment) -> None:
    parent = tiny("llama")
    decoder, student = find_layers(parent), cut_apart(parent, segment)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    plant(decoder, segment, lambda hidden: 1.5 * hidden @ turn)
    found = stitch_model(student, decoder, segment, random_blocks(16), AUTO)
    assert found["method"] == "rotation"
    assert found["alpha"]["rotation"] == pytest.approx(1.5, rel=1e-4)
    assert found["kl_nats"]["none"]["value"] > 0.1
    assert found["kl_nats"]["rotation"]["value"] < 1e-5


@pytest.mark.parametrize("method", ["linear", "ridge"])
def test_segment_that_computes_a_fixed_linear_map_is_repaired(method: StitchName) -> None:
    parent, segment = tiny("llama"), Segment(1, 3, 8)
    decoder = find_layers(parent)
    with torch.no_grad():  # the stream at the seam is what layer 0's last projection adds, and nearly nothing else
        decoder.layers[0].mlp.down_proj.weight.mul_(1000)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    student = cut_apart(parent, segment)
    plant(decoder, segment, lambda hidden: hidden @ turn)
    found = stitch_model(student, decoder, segment, random_blocks(16), StitchSettings(method, 1e-6))
    assert found["method"] == method
    assert found["kl_nats"]["none"]["value"] > 0.3
    assert found["kl_nats"][method]["value"] < 0.02 * found["kl_nats"]["none"]["value"]


@pytest.mark.parametrize("method", CANDIDATES)
def test_stitch_that_does_not_help_leaves_every_bit(monkeypatch: pytest.MonkeyPatch, method: StitchName) -> None:
    parent = tiny("llama")
    student = cut_apart(parent)
    before, tied = copy.deepcopy(student.model.state_dict()), is_tied(student.model)
    harm = 9 * torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    harmful = {
        "scalar": Repair(0.01),
        "rotation": Repair(1.0, torch.linalg.qr(harm[:32])[0]),
        "linear": Repair(outputs_DD=harm[:32]),
        "ridge": Repair(inputs_ED=harm),
    }
    monkeypatch.setattr(stitch, "_solve", lambda name, _grams, _ridge: harmful[name])
    found = stitch_model(student, find_layers(parent), SEGMENT, random_blocks(8), StitchSettings(method))
    assert found["method"] == "none"
    assert found["kl_nats"][method]["value"] > found["kl_nats"]["none"]["value"]
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())
    assert is_tied(student.model) == tied


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("gemma2", "linear", r"Gemma2ForCausalLM: no plain projection .*Gemma2RMSNorm"),
        ("gemma3_text", "ridge", r"Gemma3ForCausalLM: no plain projection .*Gemma3RMSNorm"),
        pytest.param(
            "olmo2", "linear", r"Olmo2ForCausalLM: no plain projection .*Olmo2RMSNorm", marks=pytest.mark.slow
        ),
        ("olmo2", "rotation", r"Olmo2ForCausalLM: what Olmo2RMSNorm adds .* cannot be turned"),
        ("gpt2", "rotation", r"GPT2LMHeadModel: LayerNorm reads .* not the same in every basis"),
        pytest.param("opt", "rotation", r"OPTForCausalLM: LayerNorm reads", marks=pytest.mark.slow),
    ],
)
def test_stitch_that_a_family_does_not_allow_is_refused_by_name(family: str, method: StitchName, reason: str) -> None:
    parent = tiny(family)
    segment = Segment(4, 8, 8) if family.startswith("gemma") else SEGMENT
    student = cut_apart(parent, segment)
    before = copy.deepcopy(student.model.state_dict())
    with pytest.raises(UserError, match=rf"stitch\.method={method} .*{reason}.* - use --set stitch\.method=auto"):
        stitch_model(student, find_layers(parent), segment, random_blocks(8), StitchSettings(method))
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


@pytest.mark.parametrize("method", ["linear", "ridge"])
def test_segment_at_the_first_layer_has_no_projection_before_it(method: StitchName) -> None:
    parent, segment = tiny("llama"), Segment(0, 2, 8)
    with pytest.raises(UserError, match="starts at layer 0 - use --set"):
        stitch_model(cut_apart(parent, segment), find_layers(parent), segment, random_blocks(8), StitchSettings(method))
    assert auto_at(segment)["refused"].keys() == {"linear", "ridge"}


def test_segment_at_the_last_layer_has_none_to_scale_after_it() -> None:
    parent, segment = tiny("llama"), Segment(6, 8, 8)
    with pytest.raises(UserError, match="no layer follows the seam"):
        stitch_model(
            cut_apart(parent, segment), find_layers(parent), segment, random_blocks(8), StitchSettings("scalar")
        )
    assert auto_at(segment)["refused"].keys() == {"scalar"}


def test_factor_that_is_not_above_zero_is_refused() -> None:
    parent = tiny("llama")
    decoder, student = find_layers(parent), cut_apart(parent)
    plant(decoder, SEGMENT, lambda hidden: -hidden)
    found = stitch_model(student, decoder, SEGMENT, random_blocks(8), AUTO)
    assert found["refused"] == {"scalar": "its best factor is -1, which is not above 0"}
    with pytest.raises(UserError, match="its best factor is -1"):
        stitch_model(student, decoder, SEGMENT, random_blocks(8), StitchSettings("scalar"))


def test_parent_is_left_as_it_was() -> None:
    parent = tiny("llama")
    before = copy.deepcopy(parent.state_dict())
    stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(8), AUTO)
    assert all(torch.equal(value, before[key]) for key, value in parent.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parent.modules())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_blocks_to_fit_and_to_choose_are_a_user_error(count: int) -> None:
    parent = tiny("llama")
    with pytest.raises(UserError, match="calibration blocks"):
        stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(count), AUTO)


def test_layer_that_adds_nothing_has_nothing_to_fold_a_map_in() -> None:
    parent = tiny("llama")
    silence(find_layers(parent).layers[2])
    found = stitch_model(cut_apart(parent), find_layers(parent), SEGMENT, random_blocks(8), StitchSettings("linear"))
    assert found["method"] == "none"
    assert found["kl_nats"]["linear"] == found["kl_nats"]["none"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_stitched(dtype: torch.dtype) -> None:
    parent = tiny("llama")
    student = cut_apart(parent)
    for model in (parent, student.model):
        model.to(dtype)
    found = stitch_model(student, find_layers(parent), SEGMENT, random_blocks(8), AUTO, dtype)
    assert found["method"] != "none"
    assert found["kl_nats"][found["method"]]["value"] < found["kl_nats"]["none"]["value"]
    assert all(error < 0.03 for error in found["fold_error"].values())
    assert {parameter.dtype for parameter in student.model.parameters()} == {dtype}


@torch.no_grad()
@pytest.mark.parametrize("method", ["scalar", "rotation", "ridge"])
def test_saved_student_has_the_logits_and_the_size_that_are_reported(tmp_path: Path, method: StitchName) -> None:
    parent = tiny("llama", tie_word_embeddings=True)
    decoder, student, ids = find_layers(parent), cut_apart(parent), tokens(2)
    size = num_parameters(student.model)
    if method == "scalar":  # so that it is kept
        plant(decoder, SEGMENT, lambda hidden: 3.0 * hidden)
    found = stitch_model(student, decoder, SEGMENT, random_blocks(8), StitchSettings(method), torch.float32)
    assert found["method"] == method
    assert is_tied(student.model) == (method != "rotation")
    save_decoder(student.model, None, tmp_path / "model")
    loaded = type(parent).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(loaded(ids).logits, student.model(ids).logits)
    assert num_parameters(loaded) == size + found["added_parameters"][method]
    assert found["added_parameters"][method] == (97 * 32 if method == "rotation" else 0)


def test_a_run_saves_what_was_stitched_and_reports_its_size(world: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    shared = ["--recipe", str(world / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet", "--no-verify"]
    chosen = [
        "--search",
        "exact",
        "--until",
        "stitch",
        "--set",
        "stitch.method=rotation",
        "--set",
        "search.num_blocks=12",
    ]
    assert main(["run", str(tmp_path / "tied"), *shared, *chosen]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    found, loaded = results["stitch"], AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "stitch" / "model")
    assert found["method"] == "rotation"
    assert found["kl_nats"].keys() == {"none", "rotation"}
    assert num_parameters(loaded) == found["parameters"] == results["cut"]["parameters"] + 260 * 32
    assert not is_tied(loaded)


@pytest.mark.gpu
@pytest.mark.parametrize("method", CANDIDATES)
def test_a_gpu_finds_the_same_stitch(method: StitchName) -> None:
    parent, found = tiny("llama"), []
    for device in ("cpu", "cuda"):
        student = cut_apart(parent.to(device))
        found.append(stitch_model(student, find_layers(parent), SEGMENT, random_blocks(8), StitchSettings(method)))
        assert {parameter.device.type for parameter in student.model.parameters()} == {device}
    assert found[0]["method"] == found[1]["method"]
    assert found[1]["kl_nats"][method]["value"] == pytest.approx(found[0]["kl_nats"][method]["value"], rel=1e-2)
    assert found[1]["fold_error"][method] < 1e-4


def test_auto_keeps_no_rotation_that_costs_parameters() -> None:
    parent = tiny("llama", tie_word_embeddings=True)
    decoder, student = find_layers(parent), cut_apart(parent)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    plant(decoder, SEGMENT, lambda hidden: 1.5 * hidden @ turn)
    found = stitch_model(student, decoder, SEGMENT, random_blocks(16), AUTO)
    values = {name: kl["value"] for name, kl in found["kl_nats"].items()}
    assert min(values, key=lambda name: values[name]) == "rotation"
    assert found["method"] not in ("rotation", "none")
    assert is_tied(student.model)
