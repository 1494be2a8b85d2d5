"""Other engines are found, asked for the same quantities, and named where they are missing; stand-ins play them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerscalpel import engines
from layerscalpel.engines import measure_engines
from layerscalpel.errors import UserError
from layerscalpel.speedwords import speed_lines
from layerscalpel.turns import Job

JOB = Job(batch_size=1, prompt_tokens=7, new_tokens=5)
PROMPT = torch.arange(7)[None]


class Clock:
    """Seconds that pass as the stand-ins say."""

    def __init__(self) -> None:
        self.now = 3.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "perf_counter", found)
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").touch()
    return tmp_path


@pytest.fixture
def without_program(monkeypatch) -> None:
    monkeypatch.setattr(engines.shutil, "which", lambda _: None)


def measured(name: str, place: Path, job: Job = JOB) -> dict[str, Any]:
    return measure_engines([name], {"model": place}, PROMPT.expand(job.batch_size, -1), job, repeats=3)[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [("vllm", "pip install vllm"), ("llama.cpp", "pip install llama-cpp-python, or put llama-bench on the PATH")],
)
def test_what_is_missing_is_named_with_what_to_do(checkpoint, without_program, capsys, name: str, said: str) -> None:
    found = measured(name, checkpoint)
    assert found == {"missing": f"{name} is not installed - {said}"}
    assert found["missing"] in " ".join(capsys.readouterr().err.split())
    assert speed_lines({"engines": {name: found}}) == [found["missing"]]


@pytest.fixture
def vllm(monkeypatch, clock: Clock) -> list[dict[str, Any]]:
    """A stand-in that takes 2 s a prompt and 0.5 s a further token, and notes what it was given."""
    calls: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **how: Any) -> None:
            calls.append(how)

        def generate(self, prompts: list[Any], how: Any, use_tqdm: bool) -> None:
            calls.append({"prompts": prompts, **vars(how)})
            clock.now += 2.0 + 0.5 * (how.max_tokens - 1)

    monkeypatch.setitem(engines.sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    return calls


def test_vllm_decodes_what_is_left_after_its_first_token(checkpoint, vllm: list[dict[str, Any]]) -> None:
    found = measured("vllm", checkpoint, Job(batch_size=2, prompt_tokens=7, new_tokens=5))["model"]
    assert found["prefill_s"] == {"value": pytest.approx(2), "se": pytest.approx(0, abs=1e-9), "n": 3}
    assert found["decode_tokens_per_s"]["value"] == pytest.approx(2 * 4 / 2.0)
    opened, first, second, *_ = vllm
    assert (opened["model"], opened["max_model_len"], opened["enable_prefix_caching"]) == (str(checkpoint), 12, False)
    assert first["prompts"] == [{"prompt_token_ids": list(range(7))}] * 2
    assert (first["max_tokens"], second["max_tokens"], first["ignore_eos"]) == (1, 5, True)
    assert len(vllm) == 1 + 2 * 4  # a round warms up


def test_vllm_reads_folders(checkpoint, vllm: list[dict[str, Any]]) -> None:
    found = measured("vllm", checkpoint / "model.gguf")["model"]
    assert found["missing"].startswith("model.gguf is no checkpoint folder, which vLLM reads")
    assert speed_lines({"engines": {"vllm": {"parent": found}}}) == [f"parent in vllm: {found['missing']}"]
    assert not vllm


def test_models_in_an_engine_are_compared_with_both_errors(checkpoint, monkeypatch) -> None:
    def figures(place: Path, *_: Any) -> dict[str, Any]:
        value = 1.0 if place == checkpoint else 0.5
        return {
            "prefill_s": {"value": value, "se": 0.03 * value, "n": 5},
            "decode_tokens_per_s": {"value": 10.0, "se": 0.3, "n": 5},
        }

    monkeypatch.setitem(engines.ENGINES, "vllm", engines.Engine(lambda: True, "", figures))
    places = {"parent": checkpoint, "healed": checkpoint / "other"}
    found = measure_engines(["vllm"], places, PROMPT, JOB, repeats=5)
    speedup = found["vllm"]["speedup"]
    assert speedup["prefill"] == {"value": 2.0, "se": pytest.approx(2 * 0.03 * 2**0.5), "n": 5}
    assert set(speedup["undecided"]) == {"decode"}
    lines = speed_lines({"engines": found})
    assert lines[-1].startswith("speed-up in vllm: prefill 2.00 ± 0.08x, decode no difference can be told: over 5")


def test_the_program_of_llama_cpp_is_asked_in_json(checkpoint, monkeypatch) -> None:
    rows = [
        {"n_prompt": 7, "n_gen": 0, "samples_ns": [2e9, 3e9, 4e9]},
        {"n_prompt": 0, "n_gen": 4, "samples_ns": [5e8, 5e8, 5e8]},
    ]
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps(rows), "")

    monkeypatch.setattr(engines.shutil, "which", lambda _: "/bin/llama-bench")
    monkeypatch.setattr(engines.subprocess, "run", run)
    found = measured("llama.cpp", checkpoint)["model"]
    assert found["prefill_s"]["value"] == 3.0
    assert found["decode_tokens_per_s"]["value"] == pytest.approx(8)
    assert asked[0][:9] == ["llama-bench", "-m", str(checkpoint / "model.gguf"), "-p", "7", "-n", "4", "-r", "3"]


def test_a_program_that_fails_is_quoted(checkpoint, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "one\nno such tensor\n")
    monkeypatch.setattr(engines.shutil, "which", lambda _: "/bin/llama-bench")
    monkeypatch.setattr(engines.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"llama-bench failed on .*\(no such tensor\) - leave llama.cpp out"):
        measured("llama.cpp", checkpoint)


def test_the_package_of_llama_cpp_decodes_greedily(checkpoint, without_program, monkeypatch, clock: Clock) -> None:
    read: list[list[int]] = []

    class Llama:
        def __init__(self, **how: Any) -> None:
            assert (how["model_path"], how["n_ctx"]) == (str(checkpoint / "model.gguf"), 12)

        def reset(self) -> None:
            read.clear()

        def eval(self, tokens: list[int]) -> None:
            read.append(tokens)
            clock.now += 0.25 * len(tokens)

        def sample(self, temp: float) -> int:
            assert temp == 0
            return 90 + len(read)

    monkeypatch.setitem(engines.sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    found = measured("llama.cpp", checkpoint)["model"]
    assert found["first_token_s"]["value"] == pytest.approx(7 * 0.25)
    assert found["decode_tokens_per_s"]["value"] == pytest.approx(4)
    assert read == [list(range(7)), [91], [92], [93], [94]]


def test_llama_cpp_reads_one_file_and_one_sequence(tmp_path, checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(engines.shutil, "which", lambda _: "/bin/llama-bench")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds 0 .gguf files, llama.cpp reads one - convert" in measured("llama.cpp", empty)["model"]["missing"]
    two = Job(batch_size=2, prompt_tokens=7, new_tokens=5)
    assert "2 sequences at once are not timed" in measured("llama.cpp", checkpoint, two)["model"]["missing"]
