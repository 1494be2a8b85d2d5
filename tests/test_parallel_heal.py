"""Several processes heal what one heals: the same losses, the same weights, from any of their states, and all end."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from healing import QUICK, after_step, cut_apart, losses_of, parent_of, state_of
from planted import random_blocks
from processes import forked, start
from torch import Tensor
from transformers import AutoModelForCausalLM
from world import write_recipe

from layerscalpel import frozen, parallel, rows
from layerscalpel.cli import main
from layerscalpel.errors import UserError
from layerscalpel.heal import HealResult, heal_model
from layerscalpel.layers import Decoder
from layerscalpel.objectives import SeamLoss
from layerscalpel.settings import HealSettings
from layerscalpel.training import Training

TRAIN = random_blocks(7, labelled_fraction=0.6)
TRAIN.labelled[2] = False
"""The last batch of 7 is one block, fewer than processes; one block has no target at all."""
HELD_OUT = TRAIN.first(3)
"""So that the last state is the best, and weights can be compared."""
DEFAULT = replace(QUICK, batch_size=3, micro_batch_size=2, lr=1e-3, objective="both")
SPREAD, ONCE = replace(DEFAULT, shard=True), replace(DEFAULT, epochs=1)
CASES = {
    "both": DEFAULT,
    "all terms, weight decay": replace(ONCE, seam_weight=0.5, end_weight=0.5, weight_decay=0.1),
    "some blocks kept": replace(ONCE, cache_gib=2 * 8 * 16 * 32 * 4 / 2**30),
    "top k, host memory": replace(ONCE, teacher="topk", teacher_top_k=5, frozen="cpu"),
    "online": replace(ONCE, teacher="online", micro_batch_size=1),
    "lora": replace(ONCE, method="lora"),
    "last": replace(ONCE, method="last", last_layers=2),
    "seam alone, expanded, checkpointing": replace(ONCE, objective="seam", expand=1, checkpointing=True),
    "two phases": replace(ONCE, second="all"),
}
SPREAD_CASES = ("both", "lora", "last", "seam alone, expanded, checkpointing", "two phases")
ALL_CASES = (*CASES, *(f"{name}, spread" for name in SPREAD_CASES))
FEW = ("both", "top k, host memory", "two phases", "both, spread")
"""Cases of the default tier; the others are slow."""
CLOSE = 1e-5
"""Of the losses: float32 sums in another order, over six steps of AdamW."""


def heal(scratch: Path, settings: HealSettings, team: parallel.Team, student: Decoder | None = None) -> HealResult:
    student = student or cut_apart()
    blocks = {"blocks": TRAIN, "validation": HELD_OUT}
    return heal_model(student, parent_of("llama"), [3], **blocks, settings=settings, seed=0, scratch=scratch, team=team)


def healed(scratch: Path, settings: HealSettings, team: parallel.Team) -> dict[str, Any]:
    """Return all losses of a healing, and the student's tensors after it."""
    student = cut_apart()
    result = heal(scratch, settings, team, student)
    losses = losses_of(result) + (losses_of(result.second) if result.second else [])
    figures = (result.best_step, result.layers, result.trained_parameters, result.labelled_tokens, result.cache_bytes)
    return {"losses": losses, "figures": figures, "state": state_of(student), "files": names(scratch)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value)
        yield


@contextlib.contextmanager
def broken_after(step: int) -> Iterator[None]:
    """Within, Ctrl-C is pressed after a step."""

    def press(_training: Training, done: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, press)
        yield


def interrupted(scratch: Path, settings: HealSettings, team: parallel.Team) -> set[str]:
    """Heal until after the fifth of six steps; return the files that stay."""
    with broken_after(5), pytest.raises(KeyboardInterrupt):
        heal(scratch, settings, team)
    team.most(0)
    return names(scratch)


def short_of_memory(scratch: Path, team: parallel.Team) -> dict[str, Any]:
    """Heal where the last process has no room for two blocks."""
    whole_loss, sizes = SeamLoss.__call__, []

    def limited(self: SeamLoss, batch: Any, *counts: float) -> dict[str, Tensor]:
        sizes.append(len(batch.sent.tokens_BT))
        if len(batch.sent.tokens_BT) > 1 and team.rank == team.size - 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_loss(self, batch, *counts)

    settings = replace(DEFAULT, batch_size=4, micro_batch_size=4)
    with patched(SeamLoss, "__call__", limited):
        result = heal(scratch, settings, team)
    return {"losses": losses_of(result), "micro_batch_size": result.micro_batch_size, "sizes": sizes}


def message_of(work: Callable[..., Any], *given: Any) -> str:
    with pytest.raises(UserError) as caught:
        work(*given)
    return str(caught.value)


def counted_fill(scratch: Path, settings: HealSettings, team: parallel.Team) -> list[int]:
    """Return how many blocks each batch that is computed below the seam holds."""
    sizes: list[int] = []
    whole = rows.hidden_at

    def count(decoder: Decoder, tokens: Tensor, boundary: int, positions: Any = None) -> Tensor:
        sizes.append(len(tokens))
        return whole(decoder, tokens, boundary, positions)

    with patched(rows, "hidden_at", count):
        heal(scratch, settings, team)
    return sizes


def of_cases(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return what this process finds with the others in some cases."""
    team, found = parallel.team(), {}
    for name in names:
        settings = CASES[name.removesuffix(", spread")]
        found[name] = healed(folder / name, replace(settings, shard=name.endswith(", spread")), team)
    return found


def answers(folder: Path) -> dict[str, Any]:
    """Return what this process finds with the others; the folder is shared."""
    team, rank = parallel.team(), parallel.rank()
    found: dict[str, Any] = {"team": (team.size, team.rank, team.host, team.seat, team.mates)}
    found |= of_cases(folder, FEW)
    os.environ["GROUP_RANK"] = str(rank)
    hosts = parallel.team()
    del os.environ["GROUP_RANK"]
    found["two hosts"] = interrupted(folder / "two hosts", DEFAULT, hosts)
    found["interrupted"] = interrupted(folder / "interrupted", DEFAULT, team)
    found["interrupted, spread"] = interrupted(folder / "interrupted, spread", SPREAD, team)
    for name in ("alone", "alone, spread"):
        found[f"goes on from {name}"] = healed(folder / name, SPREAD if "spread" in name else DEFAULT, team)
    found["memory"] = short_of_memory(folder / "memory", team)
    found["memory, spread"] = message_of(out_of_memory, folder / "memory, spread", team)
    found["diverged"] = message_of(heal, folder / "diverged", replace(DEFAULT, lr=1e30, warmup_fraction=0.0), team)
    found["no room"] = message_of(no_room_for_the_first, folder / "no room", team)
    found["fill"] = counted_fill(folder / "fill", replace(DEFAULT, objective="ce"), team)
    found["by itself"] = losses_of(heal(folder / f"by itself {rank}", DEFAULT, parallel.ALONE))
    return found


def out_of_memory(scratch: Path, team: parallel.Team) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with patched(SeamLoss, "__call__", fail):
        heal(scratch, SPREAD, team)


def no_room_for_the_first(scratch: Path, team: parallel.Team) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("no space left")

    with patched(frozen.BlockFile, "_take_room", full):
        heal(scratch, DEFAULT, team)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one process has begun two healings."""
    folder = tmp_path_factory.mktemp("shared")
    for name in ("alone", "alone, spread"):
        interrupted(folder / name, DEFAULT, parallel.ALONE)
    return folder


@pytest.fixture(scope="module")
def two(shared: Path) -> list[dict[str, Any]]:
    return forked(2, answers, shared)


@pytest.fixture(scope="module")
def two_of_the_rest(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    rest = tuple(name for name in ALL_CASES if name not in FEW)
    return forked(2, of_cases, tmp_path_factory.mktemp("rest"), rest)


@pytest.fixture
def pair(name: str, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What two processes found in a case."""
    return [found[name] for found in request.getfixturevalue("two" if name in FEW else "two_of_the_rest")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What one process finds in a case, with whole weights."""
    folder = tmp_path_factory.mktemp("one")
    return functools.cache(lambda name: healed(folder / name, CASES[name], parallel.ALONE))


def tiers(names: Iterable[str]) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["figures"][0] > 0
    assert found["losses"] == pytest.approx(expected["losses"], rel=CLOSE)
    assert found["figures"] == expected["figures"]
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", tiers(ALL_CASES))
def test_two_processes_heal_as_one(name: str, alone, pair) -> None:
    assert pair[0]["files"] == set()
    for found in pair:
        assert_same(found, alone(name.removesuffix(", spread")))


@pytest.mark.parametrize("name", tiers(ALL_CASES))
def test_all_processes_end_with_the_same_student(name: str, pair) -> None:
    first, second = pair
    assert first["losses"] == second["losses"]
    assert all(torch.equal(value, second["state"][key]) for key, value in first["state"].items())


@pytest.mark.parametrize("name", tiers(["both", "both, spread", "last, spread", "top k, host memory"]))
def test_frozen_weights_stay_what_they_were_bit_for_bit(name: str, pair) -> None:
    before = state_of(cut_apart())
    chosen = {"last, spread": ("model.layers.4", "model.layers.5", "model.norm", "lm_head")}
    trained = chosen.get(name, ("model.layers.2", "model.layers.3"))
    for found in pair:
        changed = {key for key, value in found["state"].items() if not torch.equal(value, before[key])}
        assert changed
        assert all(key.startswith(trained) for key in changed)


def test_each_host_has_its_own_file(shared: Path, two, alone) -> None:
    kept = {"frozen-training", "frozen-validation", "frozen-training-host1", "frozen-validation-host1"}
    for found in two:
        assert {name.split(".")[0] for name in found["two hosts"]} == kept | {"state"}
    assert_same(healed(shared / "two hosts", DEFAULT, parallel.ALONE), alone("both"))
    assert [found["team"] for found in two] == [(2, 0, 0, 0, [0, 1]), (2, 1, 0, 1, [0, 1])]


def test_hosts_are_told_apart() -> None:
    team = parallel.Team(2, ("a", "b", "a"))
    assert (team.size, team.host, team.mates, team.seat) == (3, 0, [0, 2], 1)
    assert parallel.Team(1, ("a", "b", "a")).host == 1


@pytest.mark.parametrize("name", ["interrupted", "interrupted, spread"])
def test_one_process_goes_on_where_two_were_interrupted(name: str, shared: Path, two, alone) -> None:
    assert all("state.pt" in found[name] for found in two)
    assert not any("draft" in file for file in two[0][name])
    with patched(Training, "_batch_index", _late_only(Training._batch_index)):
        assert_same(healed(shared / name, DEFAULT, parallel.ALONE), alone("both"))


def _late_only(whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def late(self: Training, step: int) -> Tensor:
        assert step >= 4, "the steps up to the last state are not taken again"
        return whole(self, step)

    return late


@pytest.mark.parametrize("name", ["alone", "alone, spread"])
def test_two_processes_go_on_where_one_was_interrupted(name: str, two, alone) -> None:
    for found in two:
        assert_same(found[f"goes on from {name}"], alone("both"))


def test_memory_that_runs_out_for_one_makes_all_halve(two, tmp_path: Path) -> None:
    settings = replace(DEFAULT, batch_size=4, micro_batch_size=1)
    expected = losses_of(heal(tmp_path, settings, parallel.ALONE))
    for found in two:
        assert found["memory"]["losses"] == pytest.approx(expected, rel=CLOSE)
        assert found["memory"]["micro_batch_size"] == 1
    assert two[0]["memory"]["sizes"][:4] == [2, 2, 2, 1]  # held out; two tries of a step, for which it had room itself


def test_what_all_meet_ends_all_with_one_message(two) -> None:
    for found in two:
        assert "healing diverged: the loss is" in found["diverged"]
        assert "with heal.shard a step cannot begin again" in found["memory, spread"]
    assert two[0]["no room"] == "no space left"
    assert "another process finds no room" in two[1]["no room"]


def test_processes_of_a_host_share_what_is_computed_once(two, tmp_path: Path) -> None:
    whole = counted_fill(tmp_path, replace(DEFAULT, objective="ce"), parallel.ALONE)
    assert sum(whole) == len(TRAIN) + len(HELD_OUT)
    shares = [sum(found["fill"]) for found in two]
    assert max(shares) < sum(whole)
    assert sum(shares) >= sum(whole)


def test_a_process_by_itself_waits_for_nobody(two, tmp_path: Path) -> None:
    expected = losses_of(heal(tmp_path, DEFAULT, parallel.ALONE))
    assert [found["by itself"] for found in two] == [expected] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_every_block_counts_once_and_all_take_as_many_turns(size: int, most: int, count: int) -> None:
    hosts = ("",) * size
    shares = [parallel.Team(rank, hosts).deal(torch.arange(count), most) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    counted = torch.cat([part for share in shares for part, counts in share if counts])
    assert sorted(counted.tolist()) == list(range(count))
    assert all(0 < len(part) <= most for share in shares for part, _ in share)
    if count >= size:
        assert sum(any(counts for _, counts in share) for share in shares) == size or count % size


def of_run(folder: Path, out: str, *more: str) -> list[str]:
    where = ["--recipe", f"{folder}/recipe.yaml", "--out", f"{folder}/{out}"]
    return ["run", f"{folder}/model", *where, "--no-verify", "--until", "heal", "--quiet", *more]


def runs(folder: Path, outs: tuple[str, ...]) -> dict[str, Any]:
    """Run by the command line."""
    found = {}
    for out in outs:
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr):
            found[out] = {"code": main(of_run(folder, out, *RUNS[out])), "stderr": stderr.getvalue()}
    return found


RUNS = {
    "two": [],
    "two again": ["--segment", "3:5", "--set", "stitch.method=linear", "--set", "heal.frozen=cpu"],
    "two, spread": ["--segment", "3:5", "--set", "stitch.method=linear", "--set", "heal.shard=true"],
    "never": ["--segment", "3:5", "--set", "heal.lr=1e30", "--set", "heal.warmup_fraction=0"],
}
"""{run directory: flags}: from the search on, of a given segment with a stitch, spread, and with a mistake."""
FEW_RUNS = ("two again", "never")
"""Those of the default tier."""


@pytest.fixture(scope="module")
def ran(world: Path) -> list[dict[str, Any]]:
    """What two processes say that ran by the command line."""
    write_recipe(world / "recipe.yaml", world / "texts.jsonl", search__batch_size=2, heal__batch_size=3)
    return forked(2, runs, world, FEW_RUNS)


@pytest.fixture(scope="module")
def ran_more(world: Path, ran) -> list[dict[str, Any]]:
    return forked(2, runs, world, tuple(out for out in RUNS if out not in FEW_RUNS))


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "out", ["two again", *(pytest.param(out, marks=pytest.mark.slow) for out in ("two", "two, spread"))]
)
def test_runs_of_two_processes_find_what_one_finds(out: str, world: Path, request: pytest.FixtureRequest) -> None:
    ran = request.getfixturevalue("ran" if out in FEW_RUNS else "ran_more")
    assert [found[out]["code"] for found in ran] == [0, 0], ran
    flags = [flag.replace("shard=true", "shard=false") for flag in RUNS[out]]
    assert main(of_run(world, f"{out}, one", *flags)) == 0
    expected, found = results_of(world / f"{out}, one"), results_of(world / out)
    assert found["heal"].pop("processes") == 2
    assert "processes" not in expected["heal"]
    assert found["segment"] == expected["segment"]
    for ours, theirs in ((found["heal"][name], expected["heal"][name]) for name in ("train", "validation")):
        assert len(ours) == len(theirs) > 1
        for row, other in zip(ours, theirs, strict=True):
            assert row == pytest.approx(other, rel=1e-4)  # the stitch was found on two processes' KL
    assert names(world / out / "heal") == names(world / f"{out}, one" / "heal") == {"done.json", "model"}
    one, two = (AutoModelForCausalLM.from_pretrained(world / f"{o}/heal/model") for o in (f"{out}, one", out))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_a_healing_that_diverges_ends_all_processes(ran) -> None:
    for found in ran:
        assert found["never"]["code"] == 2
        assert "healing diverged" in found["never"]["stderr"]


@pytest.mark.slow
def test_a_launch_by_accelerate_heals(world: Path, ran_more) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--module"]
    done = subprocess.run(
        [*launcher, "layerscalpel", *of_run(world, "accelerated")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, expected = (results_of(world / out)["heal"] for out in ("accelerated", "two"))
    assert (found["processes"], found["validation"]) == (2, expected["validation"])


def fails_for_one(folder: Path) -> str:
    """Heal where the last process meets a mistake in the third step; return what the others saw."""
    team = parallel.team()

    def fail(_training: Training, done: int) -> None:
        if done == 3 and team.rank:
            raise UserError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, fail)
        try:
            heal(folder, DEFAULT, team)
        except RuntimeError as error:  # of the process group: the other one is gone
            return str(error)
    raise AssertionError("it cannot heal alone")


@pytest.mark.slow
def test_a_process_that_ends_leaves_no_other_waiting(tmp_path: Path) -> None:
    first, second = start(2, fails_for_one, tmp_path)
    for child in (first, second):
        child.join(timeout=60)
    assert (first.exitcode, second.exitcode) == (0, 1)
    assert torch.load(first.file)
