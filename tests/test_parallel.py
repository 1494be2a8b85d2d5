"""Several processes find what one finds, one of them writes, and all end together.

The file is its own worker: under `torch.distributed.run` every process saves its `answers()`, and two of them search by
the command line too. A launch takes seconds, most of them to import torch, so there is one of that kind; the four
processes are forked from one that has imported it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import socket
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


@pytest.fixture(scope="module")
def two(small: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, by functions and by the command line."""
    return found_by(2, tmp_path_factory.mktemp("two"), small)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two or four processes found."""
    return request.getfixturevalue("two") if request.param == 2 else forked(4, tmp_path_factory.mktemp("four"))


def forked(num_processes: int, folder: Path) -> list[dict[str, Any]]:
    """Return what each of several processes found, forked from a server that has imported this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_parallel"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [context.Process(target=save_answers, args=(rank, num_processes, port, folder)) for rank in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    assert [child.exitcode for child in children] == [0] * num_processes
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


def save_answers(rank: int, num_processes: int, port: int, folder: Path) -> None:
    """Be one process of several, as a launcher would have started it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    parallel.join("cpu")
    torch.save(answers(), folder / f"{rank}.pt")


def found_by(num_processes: int, folder: Path, *more: Path) -> list[dict[str, Any]]:
    done = launched(num_processes, __file__, folder, *more)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


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


@pytest.mark.slow
def test_a_launch_ends_with_the_mistake_of_the_writer(small: Path, two) -> None:
    before = names(small / "two")
    done = launched(2, "-m", "layerscalpel", *of_search(small, "two", "--seed", "5"), timeout_s=60)
    assert done.returncode != 0
    (line,) = re.findall(r"^(?:scalpel: |\[rank).*", done.stderr, flags=re.MULTILINE)
    assert line.startswith(f"scalpel: folder {small}/two was made with other settings: seed: 0 -> 5")
    assert "exitcode  : 2" in done.stderr
    assert names(small / "two") == before


if __name__ == "__main__":
    torch.set_num_threads(1)
    parallel.join("cpu")
    found = answers() if len(sys.argv) == 2 else answers() | searches(Path(sys.argv[2]))
    torch.save(found, Path(sys.argv[1]) / f"{parallel.rank()}.pt")
