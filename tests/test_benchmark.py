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

from layerscalpel.benchmark import benchmark
from layerscalpel.errors import UserError
from layerscalpel.settings import BenchmarkSettings

SETTINGS = BenchmarkSettings(prompt_tokens=7, new_tokens=5, batch_size=2, repeats=3)
WARM_UP = (100.0, 100.0)


class Toy(nn.Module):
    """A model that computes nothing and notes how it was called."""

    def __init__(self, name: str, calls: list[tuple[str, tuple[int, ...], Any]]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=11))

    def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
        assert use_cache
        self.calls.append((self.name, tuple(input_ids.shape), past_key_values))
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), past_key_values=self.name)


def scripted(turns: list[tuple[float, float]]) -> Iterator[float]:
    """Return a clock's readings for turns of (prefill seconds, decoding seconds), with pauses between them."""
    now = 5.0
    for prefill, decode in turns:
        for elapsed in (1.0, prefill, decode):
            now += elapsed
            yield now


def timed(parent: list[tuple[float, float]], healed: list[tuple[float, float]]) -> tuple[dict[str, Any], list]:
    """Benchmark two toys whose turns last what is given, after a slow warm-up."""
    calls: list[tuple[str, tuple[int, ...], Any]] = []
    turns = [WARM_UP, WARM_UP] + [turn for pair in zip(parent, healed, strict=True) for turn in pair]
    readings = scripted(turns)
    models = {"parent": Toy("parent", calls), "healed": Toy("healed", calls)}
    found = benchmark(models, SETTINGS, clock=lambda: next(readings))
    assert next(readings, None) is None  # every reading was used
    return found, calls


def test_rates_follow_from_the_clock_and_the_warm_up_is_not_counted() -> None:
    found, _ = timed([(0.4, 2.0), (0.2, 1.0), (0.3, 4.0)], [(0.1, 0.5)] * 3)
    decoded = 2 * 4  # two sequences, four tokens after the prefill's
    assert found["parent"]["prefill_s"]["value"] == pytest.approx(0.3)
    assert found["parent"]["prefill_s"]["se"] == pytest.approx(0.1 / math.sqrt(3))
    assert found["parent"]["decode_tokens_per_s"]["value"] == pytest.approx(decoded / 2.0)
    assert found["healed"]["decode_tokens_per_s"] == {"value": pytest.approx(16), "se": pytest.approx(0), "n": 3}


def test_speed_up_is_the_median_of_the_ratios_within_a_round() -> None:
    found, _ = timed([(1.0, 8.0), (10.0, 80.0), (2.0, 16.0)], [(0.5, 2.0), (5.0, 20.0), (1.0, 4.0)])
    # the machine was ten times slower in the second round: the ratios do not feel it
    assert found["speedup"]["of"] == "healed"
    assert found["speedup"]["prefill"] == {"value": pytest.approx(2), "se": pytest.approx(0, abs=1e-9), "n": 3}
    assert found["speedup"]["decode"] == {"value": pytest.approx(4), "se": pytest.approx(0, abs=1e-9), "n": 3}


def test_ratio_is_not_that_of_the_medians() -> None:
    found, _ = timed([(1.0, 1.0), (2.0, 1.0), (9.0, 1.0)], [(1.0, 1.0), (4.0, 1.0), (3.0, 1.0)])
    assert found["speedup"]["prefill"]["value"] == pytest.approx(1)  # of 1, 1/2 and 3; the medians' is 2/3


def test_rounds_are_interleaved_and_decode_with_the_own_cache() -> None:
    _, calls = timed([(1.0, 1.0)] * 3, [(1.0, 1.0)] * 3)
    turns = [name for name, shape, _ in calls if shape == (2, 7)]
    assert turns == ["parent", "healed"] * 4
    expected = [
        call for name in turns for call in [(name, (2, 7), None), *[(name, (2, 1), name)] * (SETTINGS.new_tokens - 1)]
    ]
    assert calls == expected


def test_one_model_alone_has_no_speed_up() -> None:
    readings = scripted([WARM_UP, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)])
    found = benchmark({"model": Toy("model", [])}, SETTINGS, clock=lambda: next(readings))
    assert "speedup" not in found
    assert found["model"]["prefill_s"]["value"] == pytest.approx(1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_real_models_are_timed_and_described(family: str) -> None:
    found = benchmark({"parent": tiny(family), "cut": tiny(family)}, SETTINGS, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["device"], found["dtype"], found["prompt_tokens"]) == ("cpu", "float32", 7)
    assert found["cut"]["decode_tokens_per_s"]["value"] > 0
    assert found["cut"]["decode_tokens_per_s"]["n"] == 3


def test_model_without_keys_and_values_is_refused_by_name() -> None:
    class Recurrent(Toy):
        def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any = None) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 11), cache_params=self.name)

    with pytest.raises(UserError, match=r"Recurrent keeps no keys and values, .*benchmark.enabled=false"):
        benchmark({"model": Recurrent("a", [])}, SETTINGS, clock=lambda: 0.0)
