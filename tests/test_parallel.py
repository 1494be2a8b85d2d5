"""Several processes find what one finds, one of them writes, and all end together.

Every process returns its `answers()`, and two of them search by the command line too. They are forked from this one,
which has imported torch; a launch by `torch.distributed.run` takes seconds to, so there is one of what needs least.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import names
from families import tiny, tokens
from planted import one_by_one, random_blocks, silence
from processes import forked
from world import write_model, write_recipe, write_texts

from layerscalpel import cli, parallel
from layerscalpel.cli import main
from layerscalpel.clp import find_clp, learned
from layerscalpel.exact import score
from layerscalpel.pilot import find_pilot
from layerscalpel.probe import find_layers
from layerscalpel.progress import console
from layerscalpel.settings import HealSettings, SearchSettings
from layerscalpel.similarity import boundary_cosines
from layerscalpel.streams import window
from layerscalpel.task import Pilots, Task, race_windows

REMOVALS = [*(window(start, 2) for start in range(7)), (0, 4), (3, 6, 7)]
SETTINGS = SearchSettings(
    num_blocks=16, batch_size=2, gate_blocks=3, num_starts=5, pilot_steps=2, pilot_count=3, confidence=0.9
)
GATE = 1e-3
"""Layers; streams that are stacked otherwise are rounded otherwise, and Adam's first steps only see a sign."""


def answers() -> dict[str, Any]:
    """Return what this process, with the others if there are any, finds."""
    decoder, ids = find_layers(tiny("llama")), tokens(16)
    blocks = random_blocks(4, seed=5)
    pilots = Pilots(blocks, blocks, HealSettings(batch_size=2, micro_batch_size=2), Path(tempfile.mkdtemp()))
    task = Task(decoder, ids, 2, SETTINGS, pilots=pilots)
    races = race_windows(task, range(1, 5))
    task = dataclasses.replace(task, raced=races)
    similarity = boundary_cosines(decoder, ids, batch_size=2)
    planted = find_layers(tiny("gemma3_text"))
    silence(planted.layers[4])
    return {
        "exact": score(decoder, ids, REMOVALS, batch_size=2),
        "exact, layer by layer": score(one_by_one(decoder), ids, REMOVALS, batch_size=2),
        "exact, batches that do not come out even": score(decoder, ids[:7], REMOVALS, batch_size=1),
        "exact, fewer blocks than processes": score(decoder, ids[:1], REMOVALS),
        "races": torch.cat([raced.scores.kl_WN for raced in races.values()]).nan_to_num(-1),
        "winners": {str(n): [raced.winner, raced.race] for n, raced in races.items()},
        "planted": race_windows(Task(planted, ids, 1, SETTINGS), [1])[1].winner,
        "similarity": [similarity.heat_map(), similarity.influences(), similarity.angles(2), len(similarity.last_NBB)],
        "similarity of the races": races[2].similarity.heat_map(),
        "gate": learned(task).starts,
        "gate of one start": learned(Task(decoder, ids, 2, SearchSettings(gate_blocks=2, num_starts=1))).starts,
        "clp": find_clp(task).details["certificate"],
        "pilots": find_pilot(task).details["pilots"],
        "said by the first": parallel.first_says({"rank": parallel.rank()}),
        "gathered": parallel.gather(parallel.rank()),
        "sum": parallel.add_up(torch.tensor([1.0, parallel.rank()], dtype=torch.float64)),
    }


def launched(num_processes: int, *command: object, timeout_s: int = 120) -> subprocess.CompletedProcess[str]:
    """Run a command as several processes; one that hangs fails by its time."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
    return subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return answers()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose batches are as large for two processes as for one."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "model")
    write_recipe(folder / "recipe.yaml", write_texts(folder / "texts.jsonl"), search__batch_size=2)
    return folder


def of_search(folder: Path, out: str, *more: str) -> list[str]:
    return ["search", f"{folder}/model", "--recipe", f"{folder}/recipe.yaml", "--out", f"{folder}/{out}", *more]


def said_by(folder: Path, out: str, *more: str) -> dict[str, Any]:
    """Return how `python -m layerscalpel search` ended in this process, and what it said."""
    before, sys.argv = sys.argv, ["layerscalpel", *of_search(folder, out, *more)]
    stdout, stderr = io.StringIO(), io.StringIO()
    console.file = stderr
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_module("layerscalpel", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return {"code": end.code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}
    finally:
        sys.argv = before
    raise AssertionError("a command ends with its exit code")


def searches(folder: Path) -> dict[str, Any]:
    """Search, search again, and make a mistake that every process sees, and one that only the writer sees."""
    if parallel.rank():  # looking for itself, it could see what the first one is about to write as not there yet
        cli.finished_results = None
    return {
        "search": said_by(folder, "two"),
        "search again": said_by(folder, "two"),
        "mistake": said_by(folder, "never", "--layers", "7"),
        "mistake of the writer": said_by(folder, "two", "--seed", "5"),
    }


def all_answers(folder: Path) -> dict[str, Any]:
    """Return what a process finds by functions and by the command line."""
    return answers() | searches(folder)


@pytest.fixture(scope="module")
def two(small: Path) -> list[dict[str, Any]]:
    """What each of two processes found, by functions and by the command line."""
    return forked(2, all_answers, small)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of two or four processes found."""
    return request.getfixturevalue("two") if request.param == 2 else forked(4, answers)


def without_seconds(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_seconds(value) for key, value in found.items() if key not in ("wall_s", "processes")}
    return [without_seconds(item) for item in found] if isinstance(found, list) else found


def assert_close(found: Any, expected: Any, tolerance: float, place: str = "") -> None:
    """Compare plain values; numbers may differ by a tolerance."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), place
        for key, value in expected.items():
            assert_close(found[key], value, tolerance, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, value in enumerate(expected):
            assert_close(found[i], value, tolerance, f"{place}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=0, abs_tol=tolerance), place
    else:
        assert found == expected, place


def test_scores_and_races_are_bit_for_bit_those_of_one_process(alone, together) -> None:
    equal = [name for name, value in alone.items() if isinstance(value, torch.Tensor) and name != "sum"]
    assert len(equal) == 5
    for found in together:
        for name in equal:
            assert torch.equal(found[name], alone[name]), name
        assert found["winners"] == alone["winners"]
        assert found["planted"] == 4
    assert (alone["races"] == -1).any()  # something was dropped, so later looks had fewer candidates


def test_similarity_is_that_of_one_process(alone, together) -> None:
    for found in together:
        for name in ("similarity", "similarity of the races"):
            assert_close(found[name], alone[name], 1e-12, name)


def test_starts_that_are_dealt_out_end_where_they_end_in_one_process(alone, together) -> None:
    for found in together:
        for name in ("gate", "gate of one start"):
            assert_close(found[name], alone[name], GATE, name)
        assert found["clp"]["exact_start"] == alone["clp"]["exact_start"]
        assert found["clp"]["num_starts"] == 5


def test_pilots_that_are_dealt_out_heal_as_in_one_process(alone, together) -> None:
    assert len(alone["pilots"]) == 3
    for found in together:
        assert without_seconds(found["pilots"]) == without_seconds(alone["pilots"])


def test_all_processes_hold_the_same(together) -> None:
    for found in together:
        assert found["said by the first"] == {"rank": 0}
        assert found["gathered"] == list(range(len(together)))
        assert found["sum"].tolist() == [len(together), sum(range(len(together)))]
        for name in ("gate", "winners", "pilots", "similarity", "clp"):
            assert found[name] == together[0][name]


def test_one_process_needs_no_launcher(alone) -> None:
    assert (alone["said by the first"], alone["gathered"], alone["sum"].tolist()) == ({"rank": 0}, [0], [1.0, 0.0])
    assert not torch.distributed.is_initialized()


def test_the_command_line_finds_the_same(small: Path, two) -> None:
    assert [found["search"]["code"] for found in two] == [0, 0]
    assert main([*of_search(small, "one"), "--quiet"]) == 0
    results = [json.loads((small / out / "results.json").read_text(encoding="utf-8")) for out in ("one", "two")]
    of_one, of_two = (found["search"] for found in results)
    assert of_two["processes"] == 2
    assert of_two["scores"] == of_one["scores"]
    assert_close(of_two.pop("gate"), of_one.pop("gate"), GATE)
    assert_close(without_seconds(results[1]), without_seconds(results[0]), 1e-12)


def test_one_process_writes_and_speaks(small: Path, two) -> None:
    assert "searched: layers" in two[0]["search"]["stderr"]
    assert "without layers" in two[0]["search"]["stdout"]
    assert (two[1]["search"]["stdout"], "searched" in two[1]["search"]["stderr"]) == ("", False)
    assert main([*of_search(small, "one"), "--quiet"]) == 0
    for out in ("one", "two"):
        events = (small / out / "events.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["event"] for line in events] == ["start", "done"]
    assert names(small / "one") == names(small / "two")


def test_a_finished_search_is_over_at_once(two) -> None:
    for found in two:
        assert found["search again"]["code"] == 0
        assert "is finished; nothing to do" in found["search again"]["stderr"]
        assert "loading" not in found["search again"]["stderr"]


def test_a_mistake_that_all_see_ends_all(small: Path, two) -> None:
    for found in two:
        assert found["mistake"]["code"] == 2
        (line,) = found["mistake"]["stderr"].splitlines()
        assert line.startswith("scalpel: --layers 7 removes 7 of 8 layers - at least 2 must stay")
    assert not (small / "never").exists()


def test_a_mistake_that_only_the_writer_sees_ends_all(small: Path, two) -> None:
    writer, helper = (found["mistake of the writer"] for found in two)
    assert writer["code"] == 2
    assert "was made with other settings: seed: 0 -> 5" in writer["stderr"]
    assert (helper["stdout"], helper["stderr"]) == ("", "")


def test_a_launch_meets_and_ends(small: Path, two) -> None:
    done = launched(2, "-m", "layerscalpel", *of_search(small, "two"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is finished; nothing to do") == 2


@pytest.mark.slow
def test_a_launch_ends_with_the_mistake_of_the_writer(small: Path, two) -> None:
    before = names(small / "two")
    done = launched(2, "-m", "layerscalpel", *of_search(small, "two", "--seed", "5"), timeout_s=60)
    assert done.returncode != 0
    (line,) = re.findall(r"^(?:scalpel: |\[rank).*", done.stderr, flags=re.MULTILINE)
    assert line.startswith(f"scalpel: folder {small}/two was made with other settings: seed: 0 -> 5")
    assert "exitcode  : 2" in done.stderr
    assert names(small / "two") == before
