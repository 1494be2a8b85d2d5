"""The engines themselves, on the packaged model without a fifth of its layers: llama.cpp's file, vLLM, transformers.

    python -m pytest -m engine       # or make test-engines

LLAMA_PYTHON and VLLM_PYTHON name the interpreters of llama-cpp-python and vLLM, where these are others.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from families import tiny
from world import byte_tokenizer

from layerscalpel import cli
from layerscalpel.converter import fetch
from layerscalpel.decoder import save_decoder
from layerscalpel.engines import installed
from layerscalpel.footprint import folder_bytes

pytestmark = pytest.mark.engine
PYTHONS = {"llama.cpp": os.environ.get("LLAMA_PYTHON"), "vllm": os.environ.get("VLLM_PYTHON")}
FEW = ["--blocks", "4", "--json"]


def python_of(engine: str) -> str:
    python = PYTHONS.get(engine) or sys.executable
    if not installed(engine, python):
        pytest.skip(f"{engine} is not installed in {python}")
    return python


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """The packaged model cut at [13, 19): 24 layers."""
    folder = tmp_path_factory.mktemp("engines") / "pruned"
    assert cli.main(["cut", "demo", "--segment", "13:19", "--out", str(folder), "--no-verify"]) == 0
    return folder


def said(capsys, command: list[str]) -> dict:
    capsys.readouterr()
    assert cli.main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_the_gguf_of_a_pruned_model_is_as_good_as_its_checkpoint(pruned: Path, tmp_path, capsys) -> None:
    python, found = python_of("llama.cpp"), {}
    for kind in ("f16", "q8_0", "q4_k_m"):
        out = ["--out", str(tmp_path / f"{kind}.gguf"), "--engine-python", python]
        found[kind] = said(capsys, ["export", "gguf", str(pruned), "--type", kind, "--get-converter", *out, *FEW])
    ratios = {kind: row["verified"]["ppl_ratio"]["value"] for kind, row in found.items()}
    assert ratios["f16"] == pytest.approx(1, abs=0.002)
    assert ratios["q8_0"] == pytest.approx(1, abs=0.02)
    assert 1 < ratios["q4_k_m"] < 1.5
    assert found["f16"]["verified"]["tokenizer"] == {"texts": 20, "alike": 20}
    assert found["f16"]["verified"]["equal_fraction"]["value"] > 0.8
    assert found["q4_k_m"]["bytes"] < found["q8_0"]["bytes"] < found["f16"]["bytes"] < folder_bytes(pruned)
    assert sum(found["q4_k_m"]["tensors"].values()) == sum(found["f16"]["tensors"].values())


def test_llama_cpp_computes_what_its_file_says(pruned: Path, tmp_path, capsys) -> None:
    python, file = python_of("llama.cpp"), str(tmp_path / "q4_k_m.gguf")
    how = ["--engine-python", python]
    made = ["export", "gguf", str(pruned), "--type", "q4_k_m", "--get-converter", "--no-verify", "--out", file, *how]
    assert said(capsys, [*made, "--json"])["not_verified"] == "--no-verify"
    found = said(capsys, ["check", file, "--engine", "llama.cpp", *how, *FEW])["check"]["llama.cpp"]
    assert found["ppl_ratio"]["value"] == pytest.approx(1, abs=0.03)  # its activations are rounded to 8 bit


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_an_engine_computes_what_the_checkpoint_says(pruned: Path, capsys, engine: str) -> None:
    python = python_of(engine)
    found = said(capsys, ["check", str(pruned), "--engine", engine, "--engine-python", python, *FEW])["check"][engine]
    assert found["ppl_ratio"]["value"] == pytest.approx(1, abs=0.01)  # in bfloat16
    assert found["top1_agreement_fraction"]["value"] > 0.93
    assert found["decode_tokens_per_s"]["value"] > 1


def test_the_converter_says_what_it_does_not_know(tmp_path, capsys) -> None:
    fetch()
    for family, sentence in (
        ("gpt_neo", "does not know the architecture GPTNeoForCausalLM"),
        ("llama", "does not know how this tokeni"),
    ):
        model = tiny(family, vocab_size=260)
        save_decoder(model, byte_tokenizer(), tmp_path / family)
        assert cli.main(["export", "gguf", str(tmp_path / family), "--no-verify"]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
