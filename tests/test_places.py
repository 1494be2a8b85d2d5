"""Layers that are not at work wait elsewhere, and frozen ones train in 4 bit: what is healed is what it would be."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from healing import HELD_OUT, QUICK, TRAIN, changed_in, cut_apart, heal, losses_of, parent_of, state_of
from safetensors.torch import load_file
from torch import Tensor, nn

from layerscalpel import places
from layerscalpel.cli import main
from layerscalpel.cut import cut_model
from layerscalpel.errors import UserError
from layerscalpel.fourbit import in_four_bit
from layerscalpel.heal import HealResult, heal_model
from layerscalpel.layers import Decoder
from layerscalpel.places import Place, require_place
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import FrozenName, HealSettings
from layerscalpel.workbench import Workbench

GPU = torch.device("cuda")
"""A device that is not there: in `watched` nothing goes to it, but is noted to be there."""
MOVE = nn.Module.to
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes at which NF4 rounds as it does in real models: 64 weights share a scale."""
CPU = replace(QUICK, frozen="cpu", objective="both", lr=1e-3)


class Watched:
    """Where the layers of two models are said to be, and who computed while they were there."""

    def __init__(self, student: Decoder, parent: Decoder) -> None:
        self.models = {"student": student, "parent": parent}
        self.on_device: dict[str, set[int]] = {"student": set(), "parent": set()}
        self.rest: dict[str, bool] = {"student": False, "parent": False}
        self.seen: set[tuple[str, str, tuple[int, ...], tuple[int, ...]]] = set()

    def move(self, module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        places = {id(layer): (name, i) for name, model in self.models.items() for i, layer in enumerate(model.layers)}
        if id(module) not in places:
            return MOVE(module, *args, **kwargs)
        name, i = places[id(module)]
        (self.on_device[name].add if args == (GPU,) else self.on_device[name].discard)(i)
        return module

    @contextlib.contextmanager
    def rest_on(self, model: Decoder, _device: torch.device, *, same: bool) -> Iterator[None]:
        (name,) = [name for name, other in self.models.items() if other is model]
        before, self.rest[name] = self.rest[name], True
        yield
        self.rest[name] = before

    def note(self, name: str, i: int, module: nn.Module, _args: Any) -> None:
        assert i in self.on_device[name], f"{name}'s layer {i} computes where it is not"
        assert self.rest[name]
        doing = "trains" if torch.is_grad_enabled() else "computes"
        self.seen.add((name, doing, *(tuple(sorted(self.on_device[other])) for other in ("student", "parent"))))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    student, parent = cut_apart(), find_layers(tiny("llama"))
    watch = Watched(student, parent)
    monkeypatch.setattr(nn.Module, "to", lambda module, *args, **kwargs: watch.move(module, *args, **kwargs))
    monkeypatch.setattr(places, "_rest_on", watch.rest_on)
    for name, model in watch.models.items():
        for i, layer in enumerate(model.layers):
            layer.self_attn.register_forward_pre_hook(lambda m, args, n=name, i=i: watch.note(n, i, m, args))
    yield watch
    assert watch.on_device == {"student": set(), "parent": set()}


def heal_on(watch: Watched, scratch: Path, settings: HealSettings) -> HealResult:
    student, parent = watch.models["student"], watch.models["parent"]
    blocks = {"blocks": TRAIN, "validation": HELD_OUT, "settings": settings, "seed": 0, "scratch": scratch}
    return heal_model(student, parent, [3], **blocks, device=GPU)


ALL, LOW, HIGH = (0, 1, 2, 3, 4, 5), (0, 1), (2, 3, 4, 5)


@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_both_models_are_never_on_the_device_together(teacher: Any, watched: Watched, tmp_path: Path) -> None:
    expected = heal(cut_apart(), tmp_path, replace(CPU, frozen="device", teacher=teacher))
    result = heal_on(watched, tmp_path, replace(CPU, teacher=teacher))
    assert losses_of(result) == losses_of(expected)
    assert watched.seen == {
        ("student", "computes", LOW, ()),
        ("parent", "computes", (), (2, 3, 4, 5, 6, 7)),  # from where it is no more what the student computes
        ("student", "trains", HIGH, ()),
        ("student", "computes", HIGH, ()),  # held-out blocks
    }


def test_a_parent_that_began_otherwise_runs_whole_but_alone(watched: Watched, tmp_path: Path) -> None:
    settings = replace(CPU, method="last", last_layers=2)
    expected = heal(cut_apart(), tmp_path, replace(settings, frozen="device"))
    assert losses_of(heal_on(watched, tmp_path, settings)) == losses_of(expected)
    assert ("parent", "computes", (), tuple(range(8))) in watched.seen
    assert all(not parents or not students for _, _, students, parents in watched.seen)


def test_what_is_trained_from_the_tokens_on_is_on_the_device_whole(watched: Watched, tmp_path: Path) -> None:
    heal_on(watched, tmp_path, replace(CPU, method="lora"))
    assert ("student", "trains", ALL, ()) in watched.seen
    assert ("parent", "computes", (), tuple(range(8))) in watched.seen


def test_layers_are_set_aside_only_when_all_they_compute_is_kept(tmp_path: Path) -> None:
    room = 2 * 16 * 32 * 4 / 2**30
    with pytest.raises(UserError, match=r"which takes 2\.4e-05 GiB of disk - raise heal\.cache_gib \(it is 3\.8e-06\)"):
        heal(cut_apart(), tmp_path, replace(CPU, cache_gib=room))


def test_the_parent_waits_in_host_memory_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[torch.device] = []

    class Loaded:
        model = tiny("llama")

    monkeypatch.setattr(Loaded.model, "to", moves.append)
    bench = Workbench.__new__(Workbench)
    with bench.parent_aside():
        pass
    assert moves == []  # nothing is loaded to be set aside
    vars(bench)["_parent"] = (Loaded, parent_of("llama"))
    with bench.parent_aside():
        assert moves == [torch.device("cpu")]
    assert len(moves) == 2


def wide_cut() -> tuple[Decoder, Decoder]:
    """Return (a cut of its own, its parent)."""
    parent = find_layers(tiny("llama", **WIDE))
    return find_layers(cut_model(find_layers(tiny("llama", **WIDE)), Segment(3, 5, 8))[0]), parent


def healed_wide(scratch: Path, **changes: Any) -> tuple[HealResult, Decoder, dict[str, Tensor]]:
    """Return (result, student, its tensors before)."""
    student, parent = wide_cut()
    before = state_of(student)
    settings = replace(QUICK, lr=1e-3, **changes)
    result = heal_model(student, parent, [3], TRAIN, TRAIN, settings, seed=0, scratch=scratch)
    return result, student, before


@pytest.mark.parametrize("objective", ["ce", "both"])
def test_frozen_layers_in_four_bit_leave_plain_weights_behind(objective: Any, tmp_path: Path) -> None:
    plain, _, _ = healed_wide(tmp_path, objective=objective)
    result, student, before = healed_wide(tmp_path, objective=objective, frozen="4bit")
    assert list(state_of(student)) == list(before)
    changed = changed_in(student, before)
    assert result.best_step > 0
    assert changed == {name for name in before if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert losses_of(result) == pytest.approx(losses_of(plain), rel=0.05)
    assert losses_of(result) != losses_of(plain)  # something was rounded


def test_adapters_on_four_bit_are_merged_into_plain_weights(tmp_path: Path) -> None:
    plain, _, _ = healed_wide(tmp_path, method="lora")
    result, student, before = healed_wide(tmp_path, method="lora", frozen="4bit")
    assert losses_of(result) == pytest.approx(losses_of(plain), rel=0.05)
    for name, value in student.model.state_dict().items():
        difference = value - before[name]
        assert torch.linalg.matrix_rank(difference) == 8 if "proj" in name else not difference.any()


def test_what_is_rounded_is_rounded_from_the_plain_weights_and_comes_back() -> None:
    student, _ = wide_cut()
    before, linear = state_of(student), student.layers[4].mlp.down_proj
    student.layers[4].requires_grad_(False)
    student.layers[4].mlp.up_proj.requires_grad_(True)
    with in_four_bit([student.layers[4]]) as count:
        student.layers[4].to("cpu")
        rounded, kept = student.layers[4].mlp.down_proj, student.layers[4].mlp.up_proj
        assert (count, type(rounded).__name__, type(kept).__name__) == (6, "Linear4bit", "Linear")
        given = torch.randn(5, 128)
        error = (rounded(given) - linear(given)).norm() / linear(given).norm()
    assert 0.01 < error < 0.15
    assert student.layers[4].mlp.down_proj is linear
    assert changed_in(student, before) == set()


def test_a_run_in_four_bit_saves_a_plain_checkpoint(world: Path) -> None:
    where = ["--recipe", f"{world}/recipe.yaml", "--out", f"{world}/rounded", "--quiet", "--no-verify"]
    flags = ["--segment", "3:5", "--until", "heal", "--set", "heal.frozen=4bit"]
    assert main(["run", f"{world}/model", *where, *flags]) == 0
    cut, healed = (load_file(world / f"rounded/{stage}/model/model.safetensors") for stage in ("cut", "heal"))
    assert {name: value.dtype for name, value in healed.items()} == {name: value.dtype for name, value in cut.items()}
    changed = {name for name in cut if not torch.equal(cut[name], healed[name])}
    assert changed
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in changed)
    assert "quantization_config" not in (world / "rounded/heal/model/config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"shard": True}, 1, "heal.shard spreads weights over several processes - start them with torchrun"),
        ({"shard": True, "frozen": "4bit"}, 2, "heal.shard spreads plain weights - allowed beside it: heal.frozen="),
        ({"method": "all", "frozen": "4bit"}, 1, "heal.frozen=4bit with all layers trained rounds nothing"),
        ({"second": "all", "frozen": "4bit"}, 1, "heal.frozen=4bit with all layers trained rounds nothing"),
        ({"teacher": "online", "frozen": "cpu"}, 1, "teacher=online runs the parent at every step, heal.frozen=cpu"),
        ({"teacher": "online", "shard": True}, 2, "teacher=online runs the parent at every step, heal.shard sets"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], processes: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        require_place(replace(QUICK, objective="kl", **changes), processes)
    assert str(caught.value).startswith(message)


def test_four_bit_without_its_library_is_refused_before_anything_is_loaded(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    flags = ["--segment", "3:5", "--set", "heal.frozen=4bit", "--out", f"{world}/never"]
    assert main(["run", f"{world}/model", "--recipe", f"{world}/recipe.yaml", *flags]) == 2
    assert "heal.frozen=4bit needs bitsandbytes - pip install bitsandbytes" in capsys.readouterr().err
    assert not (world / "never").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", ["cpu", "4bit"])
def test_layers_come_to_the_device_and_go(frozen: FrozenName, tmp_path: Path) -> None:
    student, parent = wide_cut()
    before = state_of(student)
    place = Place(GPU, frozen=frozen)
    with place.at_work(student, range(2, 6), four_bit=True):
        devices = [next(layer.parameters()).device.type for layer in student.layers]
        assert devices == ["cpu"] * 2 + ["cuda"] * 4
        assert student.model.get_input_embeddings().weight.device.type == "cuda"
    assert all(value.device.type == "cpu" for value in state_of(student).values())
    assert changed_in(student, before) == set()
    settings = replace(CPU, frozen=frozen)
    heal_model(student, parent, [3], TRAIN, TRAIN, settings, seed=0, scratch=tmp_path, device=GPU)
    assert {name.split(".")[2] for name in changed_in(student, before)} == {"2", "3"}
