"""`scalpel benchmark` on a model and on a run directory: what is found, what is printed, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import speed as script
import torch
from findings import full_results, quantity
from rich.console import Console
from speed_floor import Floor, Rates
from speed_sizes import SpeedSizes
from speed_tables import TABLES
from transformers import AutoModelForCausalLM

from layerscalpel import engines
from layerscalpel.benchmark import median
from layerscalpel.card import model_card, warnings
from layerscalpel.cli import main
from layerscalpel.speedwords import no_difference, said, speed_lines, tells
from layerscalpel.tables import print_results
from layerscalpel.turns import Job

ROOT = Path(__file__).parents[1]
SHORT = ["--set", "benchmark.prompt_tokens=4", "--set", "benchmark.new_tokens=3", "--set", "benchmark.repeats=2"]


def alone(world: Path, out: str, *more: str) -> int:
    return main(["benchmark", str(world / "model"), "--out", str(world / out), "--quiet", *SHORT, *more])


def test_a_model_alone_is_timed_sized_and_fitted_by_depth(world: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(engines.shutil, "which", lambda _: None)
    monkeypatch.setattr(engines, "installed", lambda *_: False)
    more = ("batch_sizes=2", "latency=true", "engines=vllm,llama.cpp")
    assert alone(world, "alone", *(word for text in more for word in ("--set", f"benchmark.{text}"))) == 0
    results = json.loads((world / "alone" / "results.json").read_text(encoding="utf-8"))
    found, model = results["benchmark"], results["benchmark"]["model"]
    assert {"prefill_s", "first_token_s", "decode_tokens_per_s"} <= set(model)
    weights = (world / "model" / "model.safetensors").stat().st_size
    assert (model["disk_bytes"], model["bytes"]) == (weights, results["model"]["bytes"])
    assert (model["parameters"], found["threads"]) == (results["model"]["parameters"], 1)
    assert model["flops_per_token"] > 0
    assert model["peak_memory_bytes"] > 0
    assert found["counted"]["peak_memory_bytes"].startswith("resident set")
    assert [row["batch_size"] for row in found["timings"]] == [1, 2]
    assert found["latency"]["check"]["num_layers"] == 6
    assert found["engines"]["vllm"]["missing"].startswith("vllm is not installed - pip install vllm")
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("batch 2, prompt 4, eager", "on disk", "GFLOP a token", "ms a layer", "vllm is not installed"):
        assert text in printed


def test_a_run_directory_without_models_is_refused(world: Path, capsys) -> None:
    folder = world / "searched"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {name: demo}\n", encoding="utf-8")
    for stage in ("benchmark", "evaluate"):
        assert main([stage, str(folder)]) == 2
        assert f"run directory {folder} holds no models yet" in capsys.readouterr().err


def test_a_text_past_the_context_is_refused_before_weights_are_read(world: Path, capsys) -> None:
    assert alone(world, "long", "--set", "benchmark.prompt_lengths=126") == 2
    assert "129 tokens of prompt and answer are longer than the model's context of 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "rounds", "told"),
    [
        ((1.2, 0.05), 5, True),
        ((1.2, 0.08), 5, False),
        ((1.2, 0.08), 100, True),
        ((0.8, 0.05), 5, True),
        ((1.2, 0.05), 2, False),
        ((1.2, 0.0), 1, False),
    ],
)
def test_a_ratio_is_told_where_it_is_further_from_1_than_it_spreads(ratio, rounds: int, told: bool) -> None:
    found = quantity(*ratio, rounds)
    assert tells(found) is told
    assert said(found, "text") == ("text" if told else no_difference(found))
    assert not tells(found | {"se": None})


@pytest.mark.parametrize("rounds", [2, 3, 5, 20])
def test_equal_models_are_told_apart_as_seldom_as_two_standard_errors_say(rounds: int) -> None:
    draw = random.Random(rounds)
    ratios = (median([draw.gauss(1.0, 0.05) for _ in range(rounds)]) for _ in range(2000))
    assert sum(tells(ratio.to_dict()) for ratio in ratios) < 0.055 * 2000


def test_seeds_that_are_one_row_have_the_rounds_of_each() -> None:
    found = quantity(1.2, 0.02, 4)
    assert tells(found)
    assert not tells(found | {"num_seeds": 2, "sd": 0.01})


def test_nobody_prints_a_ratio_that_tells_nothing() -> None:
    results = full_results()
    results["benchmark"]["speedup"]["decode"] = quantity(1.2345, 0.2, 5)
    console = Console(record=True, width=300)
    print_results(results, Path("nowhere"), console)
    provenance = {"layerscalpel": "0", "started": "", "wall_s": 1.0, "torch": "", "transformers": "", "python": ""}
    card = model_card(results, {}, provenance | {"platform": "", "seed": 0})
    sentence = "no difference can be told: over 5 rounds the ratio spreads by 0.57 (2.9 standard errors)"
    for text in (console.export_text(), card, " ".join(warnings(results))):
        assert sentence in text
        assert "1.23" not in text
    assert "over the parent's, medians of 5 rounds: prefill 1.22 ± 0.03," in card


def test_every_other_timing_has_a_line() -> None:
    results = full_results()["benchmark"] | {"mode": "eager, growing cache"}
    first = {name: results[name] for name in ("mode", "batch_size", "prompt_tokens", "new_tokens")}
    other = first | {"batch_size": 8, "speedup": results["speedup"]}
    lines = speed_lines(results | {"timings": [first, other]})
    assert lines == [
        "batch 8, prompt 128, eager, growing cache: speed-up prefill 1.22 ± 0.03x, decode 1.19 ± 0.04x",
    ]


@pytest.fixture(scope="module")
def measured(world: Path) -> Path:
    """The rows of a tiny run of benchmarks/speed.py, and a document with its tables."""
    out, document = world / "speed.json", world / "speed.md"
    document.write_text((ROOT / "docs" / "benchmarks" / "speed.md").read_text(encoding="utf-8"), encoding="utf-8")
    parts = ["--parts", "gpu", "latency", "cpu", "--model", str(world / "model"), "--threads", "1"]
    script.main([*parts, "--tiny", "--out", str(out), "--doc", str(document)])
    return out


@pytest.mark.slow
def test_the_script_measures_every_depth_beside_its_floor(measured: Path) -> None:
    rows = json.loads(measured.read_text(encoding="utf-8"))
    assert [row["part"] for row in rows] == ["gpu"] * 4 + ["latency", "cpu"]
    for row in rows[:4]:
        assert row["layers"] == {"whole": 10, "1": 9, "2": 8, "3": 7}
        assert set(row["speedups"]) == {"1", "2", "3"}
        for floor in ("floor_prefill_s", "floor_step_s"):
            ratios = [row[floor]["whole"] / row[floor][name] for name in ("1", "2", "3")]
            assert all(1 < ratio < row["ideal"][name] for name, ratio in zip(("1", "2", "3"), ratios, strict=True))
    fitted, real = rows[4:]
    assert (
        set(fitted["measured_ms"]) == set(fitted["predicted_ms"]) == {"10", "9", "8", "7"} or not fitted["measured_ms"]
    )
    assert (real["layers"], real["ideal"]["2"]) == ({"whole": 8, "2": 6}, 8 / 6)


@pytest.mark.slow
def test_the_script_fills_its_document_and_measures_nothing_twice(measured: Path, capsys) -> None:
    text = (measured.parent / "speed.md").read_text(encoding="utf-8")
    assert all(f"<!-- begin {part} -->\n\n" in text for part in TABLES if part != "tasks")  # not measured here
    assert "| eager, growing cache | 2 | 16 | 7 | 1.429 |" in text
    before = measured.read_text(encoding="utf-8")
    script.main(["--parts", "gpu", "--tiny", "--out", str(measured)])
    assert measured.read_text(encoding="utf-8") == before
    assert "Decoding, a step of all sequences" in capsys.readouterr().out


def test_the_floor_of_the_large_shape_is_what_its_weights_and_tokens_take() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SpeedSizes().shape.config(vocab=32000), dtype=torch.bfloat16)
    floor, rates = Floor.of(model), Rates(flops_per_s=1e15, bytes_per_s=1e12)
    assert floor.weight_bytes() == pytest.approx(13.2e9, rel=0.01)
    assert floor.prefill_s(Job(16, 2048, 2), rates) == pytest.approx(0.46, rel=0.05)  # 2 * 6.5e9 * 32768, attention
    a_token = floor.step_s(Job(1, 2, 2), rates) - floor.step_s(Job(1, 1, 2), rates)
    assert a_token == pytest.approx(2 * 32 * 4096 * 2 / 1e12)
