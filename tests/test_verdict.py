"""What a healing leaves: a checkpoint that differs where it was trained, measured as stored, and work to go on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SameProcess
from planted import mean_kl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerscalpel import checkpoint, training
from layerscalpel.cli import main
from layerscalpel.config import build_config, recipe
from layerscalpel.data import prepare_blocks
from layerscalpel.schedule import learning_rate
from layerscalpel.training import Training


@pytest.fixture(autouse=True, scope="module")
def same_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Witness", SameProcess)
        yield


def scalpel(world: Path, out: str, *flags: str, **heal: object) -> int:
    """Run up to the healing, with settings of the section heal."""
    sets = [part for name, value in heal.items() for part in ("--set", f"heal.{name}={value}")]
    shared = ["--recipe", str(world / "recipe.yaml"), "--out", str(world / out), "--search", "last", "--no-verify"]
    return main(["run", str(world / "model"), *shared, "--until", "heal", *flags, *sets])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def changed(run: Path, stage: str = "heal") -> set[int]:
    """Return the layers whose stored weights are not the cut model's; -1 stands for what belongs to none."""
    before, after = tensors(run / "cut"), load_file(run / stage / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    names = [name.split(".") for name in before if not torch.equal(before[name], after[name])]
    return {int(parts[2]) if parts[1] == "layers" else -1 for parts in names}


def heal_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))["heal"]


@pytest.mark.parametrize("how", [{}, {"method": "lora"}, {"expand": 1}])
def test_weights_that_are_not_trained_keep_their_bytes_in_whatever_format_is_computed(how: Any, world: Path) -> None:
    out = f"sixteen-{'-'.join(how)}"
    assert scalpel(world, out, "--dtype", "bfloat16", objective="kl", lr=2e-3, **how) == 0
    found = heal_of(world / out)
    assert found["best_step"] > 0
    assert changed(world / out, "heal/model") == set(found["layers"])


def test_a_failed_healing_leaves_a_copy_of_the_cut_model(world: Path) -> None:
    ruin = {"lr": 0.05, "epochs": 4, "objective": "ce", "method": "all"}
    assert scalpel(world, "failed", "--dtype", "bfloat16", **ruin) == 0
    assert heal_of(world / "failed")["failed"] is True
    assert changed(world / "failed", "heal/model") == set()


def test_the_distance_is_that_of_the_stored_model(world: Path) -> None:
    """In float32 and by plain forwards: the checkpoint is in bfloat16, in which small steps are lost."""
    stored = world / "stored"
    AutoModelForCausalLM.from_pretrained(world / "model").bfloat16().save_pretrained(stored)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(stored)
    shared = ["--recipe", str(world / "recipe.yaml"), "--out", str(world / "bf16"), "--search", "last", "--no-verify"]
    sets = ["--set", "heal.objective=kl", "--set", "heal.lr=5e-4"]
    assert main(["run", str(stored), *shared, "--until", "heal", *sets]) == 0
    models = [AutoModelForCausalLM.from_pretrained(folder).float() for folder in (stored, world / "bf16/heal/model")]
    config = build_config([recipe(world / "recipe.yaml")])
    tokenizer, count = AutoTokenizer.from_pretrained(stored), config.search.num_blocks
    blocks = prepare_blocks(tokenizer, config.data, num_calibration=count, seed=0, heal=False).calibration
    with torch.no_grad():
        own = mean_kl(*(model(blocks.tokens, use_cache=False).logits for model in models))
    assert heal_of(world / "bf16")["kl_nats"]["after"]["value"] == pytest.approx(float(own.mean()), rel=1e-5)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the steps of trainings, and press Ctrl-C after so many."""
    counts, step = {"steps": 0, "most": 1 << 30}, Training._step

    def counted(self: Training, *given: Any) -> None:
        if counts["steps"] == counts["most"]:
            raise KeyboardInterrupt
        counts["steps"] += 1
        step(self, *given)

    monkeypatch.setattr(Training, "_step", counted)
    return counts


LONG = {"epochs": 4, "validations": 4, "batch_size": 4}


def test_an_interrupted_healing_goes_on_by_the_same_command(world: Path, interrupted: dict[str, int], capsys) -> None:
    sets = [part for name, value in LONG.items() for part in ("--set", f"heal.{name}={value}")]
    assert scalpel(world, "whole", **LONG) == 0
    steps, wanted = interrupted["steps"], tensors(world / "whole" / "heal")
    assert scalpel(world, "broken", "--until", "cut", **LONG) == 0
    for most, goes_on in ((steps // 2, False), (steps, True)):
        interrupted |= {"steps": 0, "most": most}
        code = main(["heal", str(world / "broken"), *sets])
        assert (code, "healing goes on from step" in capsys.readouterr().err) == (0 if goes_on else 130, goes_on)
    assert interrupted["steps"] < steps
    found = tensors(world / "broken" / "heal")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_interrupted_redo_gives_the_old_result_back_and_goes_on_later(world: Path, interrupted, capsys) -> None:
    assert scalpel(world, "again") == 0
    old = heal_of(world / "again")
    redo = ("--redo", "heal")
    interrupted |= {"steps": 0, "most": 3}
    assert scalpel(world, "again", *redo, **LONG) == 130
    assert heal_of(world / "again") == old
    assert (world / "again" / "heal" / "model" / "config.json").exists()
    interrupted |= {"steps": 0, "most": 1 << 30}
    capsys.readouterr()
    assert scalpel(world, "again", *redo, **LONG) == 0
    assert "healing goes on from step" in capsys.readouterr().err
    assert not [path.name for path in (world / "again").iterdir() if path.name.startswith(".unfinished")]


def test_a_second_phase_that_diverges_loses_nothing_of_the_first(world: Path, interrupted: dict[str, int]) -> None:
    phases = LONG | {"second": "all", "second_epochs": 1}
    assert scalpel(world, "phases", **phases, second_lr="1e30", warmup_fraction=0) == 2
    assert changed(world / "phases", "diverged") == {5}, "the first phase's"
    interrupted["steps"] = 0
    assert scalpel(world, "phases", **phases, second_lr=1e-4, warmup_fraction=0) == 0
    found = heal_of(world / "phases")
    assert interrupted["steps"] == found["second"]["steps"]
    assert found["steps"] > 0


def test_the_best_state_before_a_divergence_is_kept_and_told(world: Path, monkeypatch, capsys) -> None:
    def exploding(step: int, steps: int, settings: Any) -> float:
        return learning_rate(step, steps, settings) if step < steps // 2 else 1e30

    monkeypatch.setattr(training, "learning_rate", exploding)
    assert scalpel(world, "exploded", **LONG, objective="kl") == 2
    told = capsys.readouterr().err
    assert f"the best state before that is kept in {world / 'exploded' / 'diverged'}" in " ".join(told.split())
    assert changed(world / "exploded", "diverged") == {5}
    assert AutoModelForCausalLM.from_pretrained(world / "exploded" / "diverged").config.num_hidden_layers == 6


def test_other_healing_text_needs_no_new_search(world: Path, capsys) -> None:
    assert scalpel(world, "texts") == 0
    before = (world / "texts" / "search" / "done.json").read_bytes()
    more = world / "more.jsonl"
    more.write_text((world / "texts.jsonl").read_text(encoding="utf-8").upper(), encoding="utf-8")
    more.write_text(more.read_text(encoding="utf-8").replace('"TEXT"', '"text"'), encoding="utf-8")
    assert main(["heal", str(world / "texts"), "--healing", str(more)]) == 0
    assert (world / "texts" / "search" / "done.json").read_bytes() == before


@pytest.mark.parametrize("stitch", ["scalar", "rotation", "auto"])
@pytest.mark.parametrize("compared", ["heal.objective=seam", "heal.end_weight=1"])
def test_hidden_states_in_another_basis_are_not_compared(stitch: str, compared: str, world: Path, capsys) -> None:
    assert scalpel(world, "basis", "--set", f"stitch.method={stitch}", "--set", compared) == 2
    assert "another scale or basis" in capsys.readouterr().err
