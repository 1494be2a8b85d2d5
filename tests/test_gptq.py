"""GPTQ through the real library, on a tiny model: better than rounding, exactly what the scheme says, in silence."""

from __future__ import annotations

import importlib.util
import os
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerscalpel import gptq, rtn
from layerscalpel.errors import UserError
from layerscalpel.gptq import needs, solve, write
from layerscalpel.quantproof import check_tensors
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings

SETTINGS = QuantizeSettings(method="gptq", group_size=32, damping=(0.01,))
library = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason=f"llmcompressor is not installed - {gptq.INSTALL}"
)


def text(num: int = 16, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (num, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("gptq") / "model"
    model = tiny("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def scheme_of(folder: Path, seams: tuple[int, ...] = (), **changes: object) -> Scheme:
    return Scheme.of(folder, replace(SETTINGS, **changes), seams)


def plain_model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def departure(folder: Path, source: Path) -> float:
    """Return how far the logits of a checkpoint are from its source's, relatively, on other text."""
    wrong, right = (plain_model(place)(text(seed=1)).logits for place in (folder, source))
    return ((wrong - right).norm() / right.norm()).item()


@library
def test_nearer_to_the_source_than_rounding_and_stored_as_the_scheme_says(source, tmp_path, capfd):
    scheme, environment = scheme_of(source), dict(os.environ)
    for name, method in {"gptq": write, "rtn": rtn.write}.items():
        method(source, tmp_path / name, text(), scheme)
        check_tensors(source, tmp_path / name, scheme)
    assert capfd.readouterr() == ("", ""), "the library's own words reach the terminal"
    assert dict(os.environ) == environment
    assert departure(tmp_path / "gptq", source) < 0.9 * departure(tmp_path / "rtn", source)


@library
def test_modules_in_more_bits_and_modules_that_stay(source, tmp_path):
    whole = scheme_of(source)
    left, wider = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    scheme = replace(
        whole,
        left=(*whole.left, left),
        wider={wider: 8},
        converted=tuple(name for name in whole.converted if name != left),
        reasons={**whole.reasons, left: "the user's wish"},
    )
    write(source, tmp_path / "out", text(), scheme)
    check_tensors(source, tmp_path / "out", scheme)
    found = plain_model(tmp_path / "out")
    found(text(1))  # its first forward unpacks
    plain = plain_model(source)
    wrong = {name: _error(found, plain, name) for name in whole.converted}
    assert wrong[left] == 0
    assert 0 < wrong[wider] < 0.02 < min(error for name, error in wrong.items() if name not in (left, wider))


def _error(model, plain, name: str) -> float:
    one, other = (m.get_submodule(name).weight for m in (model, plain))
    return ((one - other).norm() / other.norm()).item()


@library
def test_zeros_of_their_own_and_columns_in_their_order(source, tmp_path):
    scheme = scheme_of(source, symmetric=False, act_order=False)
    write(source, tmp_path / "out", text(), scheme)
    check_tensors(source, tmp_path / "out", scheme)
    rtn.write(source, tmp_path / "rtn", text(), scheme)
    assert departure(tmp_path / "out", source) < 0.95 * departure(tmp_path / "rtn", source)


@library
def test_text_that_tells_too_little(source, monkeypatch):
    """The library rounds to nearest where it cannot begin to solve, and fails where it cannot end."""
    said: list[str] = []
    monkeypatch.setattr(gptq, "say", said.append)
    few, scheme = text(1, 4), scheme_of(source)
    solve(plain_model(source), few, replace(scheme, damping=1e-9), torch.bfloat16)
    assert any("14 linear layers are rounded to nearest" in line for line in said)
    with pytest.raises(UserError, match=r"1 calibration blocks tell too little.*raise quantize\.damping"):
        solve(plain_model(source), few, replace(scheme, damping=1e-6), torch.bfloat16)


@library
def test_a_layer_that_no_text_reaches_is_refused(source):
    scheme = scheme_of(source)
    model = plain_model(source)
    idle = model.model.layers[1].mlp
    idle.forward = types.MethodType(lambda self, hidden_BTD: hidden_BTD, idle)
    with pytest.raises(UserError, match=r"did not quantise model\.layers\.1\.mlp.*raise quantize\.num_blocks"):
        solve(model, text(), scheme, torch.bfloat16)


def test_a_library_that_is_missing(monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llmcompressor" else own(name))
    with pytest.raises(UserError, match=r"needs llmcompressor.*layerscalpel\[quant\].*--no-deps llmcompressor"):
        needs(SETTINGS)


def test_the_set_up_installs_the_version_that_messages_name():
    root = Path(__file__).parents[1]
    assert all(gptq.LIBRARY in (root / name).read_text(encoding="utf-8") for name in ("Makefile", "constraints.txt"))
