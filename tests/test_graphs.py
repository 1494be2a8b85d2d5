"""A static cache computes what a growing one does, or is refused by name; a recorded step gives the same logits."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerscalpel import benchmark as timing
from layerscalpel import graphs
from layerscalpel.graphs import NoGraphError, Static, captured, refuse_other_logits, unmasked
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.turns import GRAPH, GROWING, Growing, Job, random_prompt, take_turn

JOB = Job(batch_size=2, prompt_tokens=10, new_tokens=6)
FAMILIES = ["llama", "gpt2", "opt", "qwen3", "granite", "jamba", "lfm2", "deepseek_v3"]


SURE = ("llama", "qwen3", "granite")
"""Of these a recording must work."""


def recorded_or_skipped(model: Any) -> graphs.Captured:
    """Return a recording, or skip a family whose step cannot be recorded: it is timed plainly."""
    try:
        return captured(model, JOB)
    except NoGraphError as error:
        pytest.skip(f"timed plainly: {error}")


@torch.no_grad()
def written(model: Any, ids_BT: Tensor, count: int) -> Tensor:
    """Return the tokens that plain decoding writes."""
    decoding = Growing(model)
    decoding.prefill(ids_BT)
    found = [decoding.token]
    for _ in range(count - 1):
        decoding.step()
        found.append(decoding.token)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_writes_the_tokens_of_a_growing_one(family: str) -> None:
    model = tiny(family)
    ids_BT = random_prompt(model, JOB, seed=0)
    static = Static(model, JOB)
    refuse_other_logits(static, ids_BT)
    expected = written(model, ids_BT, JOB.new_tokens)
    assert torch.equal(static.tokens(ids_BT, JOB.new_tokens), expected)
    assert torch.equal(static.tokens(ids_BT, JOB.new_tokens), expected)  # it forgets what it read before


def test_a_static_cache_can_take_its_turn() -> None:
    model = tiny("llama")
    turn = take_turn(Static(model, JOB), JOB)
    assert min(turn.prefill_s, turn.decode_s) > 0
    assert turn.first_token_s > turn.prefill_s


def test_a_family_that_reads_a_static_cache_wrongly_is_refused() -> None:
    model = tiny("gpt_neo")  # it masks by the length of the cache
    with pytest.raises(NoGraphError, match="other logits than with a growing one"):
        refuse_other_logits(Static(model, JOB), random_prompt(model, JOB, seed=0))


def test_a_window_that_slides_is_refused_and_one_that_does_not_is_taken() -> None:
    model = tiny("mistral")  # a window of 6
    with pytest.raises(NoGraphError, match="a window of 6 tokens slides over the 16 of prompt and answer"):
        Static(model, JOB)
    short = Job(batch_size=1, prompt_tokens=3, new_tokens=3)
    ids_BT = random_prompt(model, short, seed=0)
    assert torch.equal(Static(model, short).tokens(ids_BT, 3), written(model, ids_BT, 3))


def test_what_cannot_be_recorded_is_timed_plainly_and_that_is_said(monkeypatch, capsys) -> None:
    def refused(*_: Any) -> Any:
        raise NoGraphError("its step cannot be recorded (why)")

    monkeypatch.setitem(timing.MAKERS, GRAPH, refused)
    monkeypatch.setattr(timing, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(timing, "conditions", lambda *_: {})
    settings = BenchmarkSettings(prompt_tokens=4, new_tokens=3, repeats=2, batch_sizes=())
    found = timing.benchmark({"model": tiny("llama")}, settings)
    assert found["mode"] == GROWING
    assert found["timings"][0]["no_graph"] == "its step cannot be recorded (why)"
    assert "decoded without a CUDA graph: its step cannot be recorded (why)" in capsys.readouterr().err


def test_graphs_stand_in_first_place_where_they_work(monkeypatch) -> None:
    monkeypatch.setitem(timing.MAKERS, GRAPH, Static)
    monkeypatch.setattr(timing, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(timing, "conditions", lambda *_: {})
    settings = BenchmarkSettings(prompt_tokens=4, new_tokens=3, repeats=2, batch_sizes=(2,))
    found = timing.benchmark({"parent": tiny("llama"), "cut": tiny("llama", num_hidden_layers=4)}, settings)
    assert [(row["mode"], row["batch_size"]) for row in found["timings"]] == [
        (mode, size) for size in (1, 2) for mode in (GROWING, GRAPH)
    ]
    assert found["mode"] == GRAPH
    assert found["speedup"] == found["timings"][1]["speedup"]
    plain = BenchmarkSettings(prompt_tokens=4, new_tokens=3, repeats=2, batch_sizes=(), graphs=False)
    assert timing.benchmark({"model": tiny("llama")}, plain)["mode"] == GROWING


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "gpt2", "gemma2"])
def test_a_prompt_needs_no_mask(family: str) -> None:
    model = tiny(family, **({"sliding_window": 64} if family == "gemma2" else {}))
    ids_BT, own = random_prompt(model, JOB, seed=0), model.config._attn_implementation
    with torch.no_grad():
        masked, plain = Static(model, JOB), Static(model, JOB)
        masked.prefill(ids_BT)
        with unmasked(model):
            assert (model.config._attn_implementation == own) is (own != "sdpa")
            plain.prefill(ids_BT)
    torch.testing.assert_close(plain.logits, masked.logits, rtol=0, atol=1e-5)
    assert model.config._attn_implementation == own


class Asked(TorchDispatchMode):
    """Notes what a recording forbids: numbers fetched from the device, and tensors made on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "lift_fresh")):
            self.found.add(str(function))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(("family", "asks"), [("llama", False), ("qwen3", False), ("granite", False), ("opt", True)])
def test_prefill_and_step_ask_the_device_for_nothing(monkeypatch, family: str, asks: bool) -> None:
    decoding = Static(tiny(family), JOB)
    ids_BT = random_prompt(decoding.model, JOB, seed=0)
    decoding.tokens(ids_BT, 2)
    decoding.reset()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers goes other ways then
    with unmasked(decoding.model), Asked() as prefill:
        decoding.prefill(ids_BT)
    with Asked() as step:
        decoding.step()
    assert (bool(prefill.found), bool(step.found)) == (asks, asks)


@torch.no_grad()
def test_a_prefill_that_cannot_be_recorded_is_launched_plainly(monkeypatch) -> None:
    def refused(_: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refused)
    decoding = graphs.Captured(tiny("llama"), JOB)
    ids_BT = random_prompt(decoding.model, JOB, seed=0)
    expected = decoding.tokens(ids_BT, 4)
    decoding.record_prefill(ids_BT, expected, decoding.logits_after(ids_BT, expected))
    assert decoding.plain_prefill == "it cannot be recorded (operation not permitted when stream is capturing)"
    assert torch.equal(decoding.tokens(ids_BT, 4), expected)


class Replayed:
    """A graph that computes what it was made from anew."""

    def __init__(self, work: Any) -> None:
        self.replay = work


@torch.no_grad()
def test_a_recorded_prefill_is_kept_only_if_the_same_logits_follow(monkeypatch) -> None:
    model = tiny("llama")
    decoding = graphs.Captured(model, JOB)
    ids_BT = random_prompt(model, JOB, seed=0)
    expected = decoding.tokens(ids_BT, 4)
    replayed = Replayed(lambda: Static.prefill(decoding, decoding.prompt))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: replayed)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    logits_KBV = decoding.logits_after(ids_BT, expected)
    decoding.record_prefill(ids_BT, expected, logits_KBV)
    assert decoding.plain_prefill is None
    other_BT = random_prompt(model, JOB, seed=1)
    assert torch.equal(decoding.tokens(other_BT, 4), Static(model, JOB).tokens(other_BT, 4))  # of another prompt, too
    decoding.recorded.clear()
    decoding.record_prefill(ids_BT, expected, logits_KBV.roll(1, dims=-1))
    assert decoding.plain_prefill is not None
    assert decoding.plain_prefill.startswith("recorded, it leads to other logits")
    assert torch.equal(decoding.tokens(ids_BT, 4), expected)


def test_rounding_is_told_from_other_logits() -> None:
    logits_KBV = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)) + 7.0
    assert graphs.apart(logits_KBV, logits_KBV) == 0
    rounded = logits_KBV.bfloat16()
    assert graphs.is_rounding(graphs.apart(rounded, logits_KBV), torch.bfloat16)
    assert not graphs.is_rounding(graphs.apart(rounded, logits_KBV), torch.float32)
    other = logits_KBV.clone()
    other[1, 1] += 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(1))  # one step of one sequence
    assert not graphs.is_rounding(graphs.apart(other, logits_KBV), torch.bfloat16)
    assert not graphs.is_rounding(float("nan"), torch.bfloat16)


@torch.no_grad()
def test_logits_after_given_tokens_are_those_of_one_forward() -> None:
    model = tiny("llama")
    ids_BT = random_prompt(model, JOB, seed=0)
    tokens_BK = random_prompt(model, Job(JOB.batch_size, 4, 1), seed=1)
    whole_BTV = model(torch.cat([ids_BT, tokens_BK], dim=1)).logits
    expected_KBV = whole_BTV[:, JOB.prompt_tokens - 1 : -1].transpose(0, 1)
    torch.testing.assert_close(Static(model, JOB).logits_after(ids_BT, tokens_BK), expected_KBV, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_writes_what_plain_decoding_does(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to("cuda", dtype)
    ids_BT = random_prompt(model, JOB, seed=1).to("cuda")
    decoding = captured(model, JOB) if family in SURE else recorded_or_skipped(model)
    assert family not in SURE or decoding.plain_prefill is None
    tokens_BT = decoding.tokens(ids_BT, JOB.new_tokens)
    assert torch.equal(tokens_BT, Static(model, JOB).tokens(ids_BT, JOB.new_tokens))
    if dtype == torch.float32:  # in bfloat16 other kernels may choose another of two nearly equal tokens
        assert torch.equal(tokens_BT, written(model, ids_BT, JOB.new_tokens))


@pytest.mark.gpu
def test_a_recorded_step_is_timed_and_its_memory_counted() -> None:
    model = tiny("llama").to("cuda")
    settings = BenchmarkSettings(prompt_tokens=8, new_tokens=4, repeats=2, batch_sizes=(4,))
    found = timing.benchmark({"parent": model, "cut": tiny("llama", num_hidden_layers=4).to("cuda")}, settings)
    assert found["mode"] == GRAPH
    assert found["parent"]["peak_memory_bytes"] > sum(parameter.nbytes for parameter in model.parameters())
    assert not any("no_graph" in row for row in found["timings"])


@pytest.mark.gpu
def test_a_recording_that_gives_other_logits_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(
        graphs.Captured, "record_step", lambda self, _: self.recorded.update(step=(Idle(), self.logits))
    )
    with pytest.raises(NoGraphError, match="its recorded step gives other logits"):
        captured(tiny("llama").to("cuda"), JOB)


class Idle:
    """A graph that computes nothing."""

    def replay(self) -> None:
        """Leave the token as it is."""
