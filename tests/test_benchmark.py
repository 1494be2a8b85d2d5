"""Rates follow from the clock alone; rounds are interleaved, the first warms up, ratios are taken within a round."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor, nn

from layerscalpel.benchmark import benchmark, jobs_of, longest_text, timing
from layerscalpel.config import build_config
from layerscalpel.errors import UserError
from layerscalpel.footprint import Peak, bytes_on_disk, flops_per_token
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.speed import measure_speed
from layerscalpel.turns import GROWING, Growing, Job, take_turn

JOB = Job(batch_size=2, prompt_tokens=7, new_tokens=5)
SETTINGS = BenchmarkSettings(prompt_tokens=7, new_tokens=5, batch_size=2, repeats=3, batch_sizes=())
WARM_UP = (100.0, 100.0)


class Toy(nn.Module):
    """A model that computes nothing and notes how it was called."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[int, ...], Any]], vocab: int = 11) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=vocab))

    def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
        assert use_cache
        self.calls.append((self.name, tuple(input_ids.shape), past_key_values))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), past_key_values=self.name)


def scripted(turns: list[tuple[float, float]]) -> Iterator[float]:
    """Return a clock's readings for turns of (prefill, decoding) seconds; a prompt is 0.25 s and a token 0.5 s away."""
    now = 5.0
    for prefill, decode in turns:
        for elapsed in (1.0, 0.25, prefill, 0.5, decode):
            now += elapsed
            yield now


def timed(parent: list[tuple[float, float]], healed: list[tuple[float, float]]) -> tuple[dict[str, Any], list]:
    """Time two toys whose turns last what is given, after a slow warm-up."""
    calls: list[tuple[str, tuple[int, ...], Any]] = []
    turns = [WARM_UP, WARM_UP] + [turn for pair in zip(parent, healed, strict=True) for turn in pair]
    readings = scripted(turns)
    models = {"parent": Toy("parent", calls), "healed": Toy("healed", calls)}
    found = timing(models, JOB, GROWING, repeats=len(parent), clock=lambda: next(readings))
    assert next(readings, None) is None  # every reading was used
    return found, calls


def test_rates_follow_from_the_clock_and_the_warm_up_is_not_counted() -> None:
    found, _ = timed([(0.4, 2.0), (0.2, 1.0), (0.3, 4.0)], [(0.1, 0.5)] * 3)
    decoded = 2 * 4  # two sequences, four tokens after the prefill's
    assert found["parent"]["prefill_s"]["value"] == pytest.approx(0.3)
    assert found["parent"]["prefill_s"]["se"] == pytest.approx(0.1 * math.sqrt(math.pi / 2) / math.sqrt(3))
    assert found["parent"]["decode_tokens_per_s"]["value"] == pytest.approx(decoded / 2.0)
    assert found["healed"]["decode_tokens_per_s"] == {"value": pytest.approx(16), "se": pytest.approx(0), "n": 3}


def test_the_first_token_is_counted_from_host_to_host() -> None:
    found, _ = timed([(0.4, 2.0)] * 2, [(0.1, 0.5)] * 2)
    assert found["parent"]["first_token_s"]["value"] == pytest.approx(0.25 + 0.4 + 0.5)
    assert found["healed"]["first_token_s"]["value"] == pytest.approx(0.25 + 0.1 + 0.5)


def test_speed_up_is_the_median_of_the_ratios_within_a_round() -> None:
    found, _ = timed([(1.0, 8.0), (10.0, 80.0), (2.0, 16.0)], [(0.5, 2.0), (5.0, 20.0), (1.0, 4.0)])
    # the machine was ten times slower in the second round: the ratios do not feel it
    assert found["speedup"]["of"] == "healed"
    assert found["speedup"]["prefill"] == {"value": pytest.approx(2), "se": pytest.approx(0, abs=1e-9), "n": 3}
    assert found["speedup"]["decode"] == {"value": pytest.approx(4), "se": pytest.approx(0, abs=1e-9), "n": 3}
    assert "undecided" not in found["speedup"]


def test_ratio_is_not_that_of_the_medians() -> None:
    found, _ = timed([(1.0, 1.0), (2.0, 1.0), (9.0, 1.0)], [(1.0, 1.0), (4.0, 1.0), (3.0, 1.0)])
    assert found["speedup"]["prefill"]["value"] == pytest.approx(1)  # of 1, 1/2 and 3; the medians' is 2/3


def test_a_ratio_whose_spread_is_larger_than_its_effect_is_not_decided() -> None:
    found, _ = timed([(1.0, 2.0), (1.4, 2.1), (0.8, 2.0)], [(1.0, 1.0)] * 3)
    assert set(found["speedup"]["undecided"]) == {"prefill"}
    assert found["speedup"]["undecided"]["prefill"].startswith("no difference can be told: over 3 rounds")


def test_rounds_are_interleaved_and_decode_with_the_own_cache() -> None:
    _, calls = timed([(1.0, 1.0)] * 3, [(1.0, 1.0)] * 3)
    turns = [name for name, shape, _ in calls if shape == (2, 7)]
    assert turns == ["parent", "healed"] * 4
    expected = [
        call for name in turns for call in [(name, (2, 7), None), *[(name, (2, 1), name)] * (SETTINGS.new_tokens - 1)]
    ]
    assert calls == expected


def test_several_models_are_each_compared_with_the_first() -> None:
    calls: list[Any] = []
    turns = [WARM_UP] * 3 + [(4.0, 8.0), (2.0, 4.0), (1.0, 2.0)] * 2
    readings = scripted(turns)
    models = {name: Toy(name, calls) for name in ("parent", "cut", "small")}
    found = timing(models, JOB, GROWING, repeats=2, clock=lambda: next(readings))
    assert {name: item["decode"]["value"] for name, item in found["speedups"].items()} == {"cut": 2.0, "small": 4.0}
    assert found["speedup"] == found["speedups"]["small"]


def test_one_model_alone_has_no_speed_up() -> None:
    readings = scripted([WARM_UP, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)])
    found = benchmark({"model": Toy("model", [])}, SETTINGS, clock=lambda: next(readings))
    assert "speedup" not in found
    assert found["model"]["prefill_s"]["value"] == pytest.approx(1)


def test_all_batch_sizes_and_lengths_are_timed_the_named_ones_first() -> None:
    settings = BenchmarkSettings(
        prompt_tokens=4, new_tokens=3, repeats=2, batch_sizes=(2, 1), prompt_lengths=(9,), batch_size=1
    )
    assert jobs_of(settings) == [Job(size, length, 3) for size in (1, 2) for length in (4, 9)]
    assert longest_text(settings) == 12
    found = benchmark({"parent": tiny("llama"), "cut": tiny("llama", num_hidden_layers=4)}, settings)
    assert [(row["batch_size"], row["prompt_tokens"]) for row in found["timings"]] == [(1, 4), (1, 9), (2, 4), (2, 9)]
    assert all({"parent", "cut", "speedup", "mode"} <= set(row) for row in found["timings"])
    first = found["timings"][0]
    assert (found["speedup"], found["cut"]["prefill_s"]) == (first["speedup"], first["cut"]["prefill_s"])


@pytest.mark.parametrize("text", ["1,4", [1, 4]])
def test_lists_are_given_as_text_or_as_lists(text: Any) -> None:
    assert build_config([{"benchmark.batch_sizes": text}]).benchmark.batch_sizes == (1, 4)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batch_sizes", "1,0", "benchmark.batch_sizes=0 is out of range - allowed: 1 or more"),
        ("prompt_lengths", "long", "benchmark.prompt_lengths='long' is not a whole number"),
        ("engines", "vlm", "benchmark.engines=vlm is unknown - did you mean 'vllm'"),
    ],
)
def test_lists_that_make_no_sense_are_refused(key: str, value: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_config([{f"benchmark.{key}": value}])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_real_models_are_timed_and_described(family: str) -> None:
    found = benchmark({"parent": tiny(family), "cut": tiny(family)}, SETTINGS, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["device"], found["dtype"], found["prompt_tokens"]) == ("cpu", "float32", 7)
    assert found["cut"]["decode_tokens_per_s"]["value"] > 0
    assert found["cut"]["decode_tokens_per_s"]["n"] == 3
    assert found["cut"]["flops_per_token"] > 2 * 8 * 32 * 32  # more than its attention's projections alone


def test_operations_are_those_of_products_and_of_attention_over_what_was_read() -> None:
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=2)
    linears = sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    context, width = 7 + 1, 32
    assert flops_per_token(model, 7) == pytest.approx(2 * linears + 8 * 4 * width * context, rel=0.02)
    assert model.config._attn_implementation == "sdpa"


def test_peak_counts_what_lives_only_within() -> None:
    with Peak(tiny("llama")) as peak:
        held = torch.ones(40 << 20)  # 160 MB
        del held
        take_turn(Growing(tiny("llama")), JOB)
    with Peak(tiny("llama")) as less:
        pass
    assert peak.num_bytes is not None
    assert less.num_bytes is not None
    assert peak.num_bytes > 100 << 20


def test_bytes_on_disk_are_those_of_weights(tmp_path) -> None:
    for name, size in {"a.safetensors": 5, "b.safetensors": 7, "tokenizer.json": 100, "old.bin": 1000}.items():
        (tmp_path / name).write_bytes(b"0" * size)
    assert bytes_on_disk(tmp_path) == 12
    assert bytes_on_disk(tmp_path / "a.safetensors") == 5


def test_model_without_keys_and_values_is_refused_by_name() -> None:
    class Recurrent(Toy):
        def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), cache_params=self.name)

    with pytest.raises(UserError, match=r"Recurrent keeps no keys and values, .*benchmark.enabled=false"):
        benchmark({"model": Recurrent("a", [])}, SETTINGS, clock=lambda: 0.0)


def test_models_of_different_tokenizers_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"different tokenizers \(parent 11, other 12 tokens\).*scalpel benchmark"):
        benchmark({"parent": Toy("parent", []), "other": Toy("other", [], vocab=12)}, SETTINGS, clock=lambda: 0.0)


def test_a_text_past_the_context_is_refused_before_it_is_timed() -> None:
    loaded: Any = SimpleNamespace(model=None, origin=SimpleNamespace(max_tokens=11))
    settings = BenchmarkSettings(prompt_tokens=4, new_tokens=3, prompt_lengths=(9,))
    with pytest.raises(UserError, match=r"12 tokens .* context of 11 - lower benchmark.prompt_lengths or"):
        measure_speed({"model": loaded}, settings)
