"""Healing never leaves a model worse than it found it, says so when it would have, and can be done again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess
from healing import TRAIN, cut_apart, parent_of
from planted import mean_kl, one_by_one
from transformers import AutoModelForCausalLM

from layerscalpel import checkpoint
from layerscalpel.cli import main
from layerscalpel.judge import Judge, ruined
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured
from layerscalpel.places import Place

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("kept", ["whole", "one by one"])
@pytest.mark.parametrize("place", [Place(CPU), Place(CPU, frozen="cpu")])
def test_a_model_is_judged_by_its_kl_to_the_parent(kept: str, place: Place) -> None:
    parent, student = parent_of("llama"), cut_apart()
    seen: Decoder = parent if kept == "whole" else one_by_one(parent)
    judge = Judge.of(seen, TRAIN, place, batch_size=2, store={})
    wanted = mean_kl(*(model.model(TRAIN.tokens, use_cache=False).logits for model in (parent, student)))
    found = judge.kl(student, "before healing")
    assert found.value == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert (found.n, found.se > 0) == (TRAIN.tokens.numel(), True)
    assert judge.kl(parent, "of itself").value == 0


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(1.0, 0.9, False), (1.0, 1.0, False), (1.0, 1.1, True), (1.0, math.nan, True)]
)
def test_farther_than_before_is_ruined(before: float, after: float, expected: bool) -> None:
    assert ruined(Measured(before, 0.1, 9), Measured(after, 0.1, 9)) == expected


@pytest.fixture(scope="module")
def cut(world: Path) -> Path:
    """A run up to its cut, to be healed in several ways."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Witness", SameProcess)
        assert scalpel(world, "--search", "last", "--until", "cut", "--no-verify") == 0
    return world / "judged"


def scalpel(world: Path, *more: str) -> int:
    recipe = ["--recipe", str(world / "recipe.yaml"), "--out", str(world / "judged")]
    return main(["run", str(world / "model"), *recipe, *(() if "--search" in more else ("--search", "last")), *more])


def healed(world: Path, **settings: object) -> int:
    """Heal the cut anew with other settings, up to the report."""
    flags = [part for name, value in settings.items() for part in ("--set", f"heal.{name}={value}")]
    return scalpel(world, "--redo", "heal", "--no-verify", *flags)


RUIN = {"lr": 0.05, "epochs": 4, "objective": "ce", "method": "all", "validations": 4}
"""Learns the healing text by heart."""


def same_weights(folder: Path) -> bool:
    before, after = (AutoModelForCausalLM.from_pretrained(folder / s / "model").state_dict() for s in ("cut", "heal"))
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_recipe_that_ruins_gives_the_weights_back_and_is_called_failed(cut: Path, world: Path, capsys) -> None:
    assert healed(world, **RUIN) == 0
    told = capsys.readouterr()
    heal = json.loads((cut / "results.json").read_text(encoding="utf-8"))["heal"]
    before, after = (heal["kl_nats"][when] for when in ("before", "after"))
    assert heal["best_step"] > 0
    assert after["value"] > before["value"]
    assert (heal["failed"], heal["kl_nats"]["text"]) == (True, "calibration")
    assert before["n"] == after["n"] == 4 * 16
    assert same_weights(cut)
    assert "healing failed: it took the KL to the parent from" in told.err
    words = "Healing failed: it took the KL to the parent"
    assert words in " ".join(told.out.split())
    for page in ("report.html", "README.md"):
        assert words in (cut / page).read_text(encoding="utf-8")


def test_after_a_stitch_the_bare_cut_is_the_measure(cut: Path, world: Path) -> None:
    assert scalpel(world, "--redo", "stitch", "--no-verify", "--until", "heal", "--set", "stitch.method=ridge") == 0
    results = json.loads((cut / "results.json").read_text(encoding="utf-8"))
    kl = results["heal"]["kl_nats"]
    assert list(kl) == ["cut", "before", "after", "text"]
    assert results["stitch"]["method"] == "ridge"
    assert kl["before"]["value"] != kl["cut"]["value"]
    assert results["heal"]["failed"] == (kl["after"]["value"] > kl["cut"]["value"])
    assert scalpel(world, "--redo", "stitch", "--no-verify", "--until", "heal") == 0


def test_a_recipe_that_heals_after_one_that_ruined(cut: Path, world: Path, capsys, without_drawings) -> None:
    assert healed(world, lr=1e-3, objective="kl", epochs=2) == 0
    heal = json.loads((cut / "results.json").read_text(encoding="utf-8"))["heal"]
    assert heal["kl_nats"]["after"]["value"] < heal["kl_nats"]["before"]["value"]
    assert heal["failed"] is False
    assert not same_weights(cut)
    assert "ealing failed" not in "".join(capsys.readouterr()) + (cut / "README.md").read_text(encoding="utf-8")


def test_steps_that_never_helped_are_not_measured_again(cut: Path, world: Path, without_drawings) -> None:
    assert healed(world, lr=5.0, objective="kl", warmup_fraction=0) == 0
    heal = json.loads((cut / "results.json").read_text(encoding="utf-8"))["heal"]
    assert (heal["best_step"], heal["failed"]) == (0, False)
    assert heal["kl_nats"]["before"] == heal["kl_nats"]["after"]
    assert same_weights(cut)


@pytest.mark.slow
def test_after_a_divergence_the_same_words_come_again_and_another_rate_heals(cut: Path, world: Path, capsys) -> None:
    told = []
    for _ in range(2):
        assert healed(world, lr="1e30", warmup_fraction=0) == 2
        told.append(capsys.readouterr().err.rpartition("healing diverged: ")[2])
    assert "learning rate 1e+30 - lower heal.lr" in told[0]
    assert told[0] == told[1]
    assert healed(world, lr=1e-3) == 0
    assert json.loads((cut / "results.json").read_text(encoding="utf-8"))["heal"]["lr"] == 1e-3


def test_a_run_that_diverged_says_it_again_and_goes_on_with_another_rate(world: Path, capsys) -> None:
    shared = ["run", str(world / "model"), "--recipe", str(world / "recipe.yaml"), "--out", str(world / "diverged")]
    shared += ["--search", "last", "--no-verify", "--until", "heal", "--set", "heal.validations=4"]
    told = []
    for _ in range(2):
        assert main([*shared, "--set", "heal.lr=1e30"]) == 2
        told.append(capsys.readouterr().err.rpartition("healing diverged: ")[2])
    assert told[0] == told[1] != ""
    assert main([*shared, "--set", "heal.lr=1e-3"]) == 0
    assert main([*shared, "--set", "heal.lr=2e-3", "--redo", "heal"]) == 0
