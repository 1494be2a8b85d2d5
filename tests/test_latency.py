"""The fit recovers what the clock was told that layers cost; caches work while the tail is bypassed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import tiny, tokens
from torch import Tensor

from layerscalpel import latency
from layerscalpel.benchmark import MAKERS, median
from layerscalpel.errors import UserError
from layerscalpel.graphs import NoGraphError, Static
from layerscalpel.hooks import bypass
from layerscalpel.latency import Latency, layers_to_remove, measure_latency
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.turns import GRAPH, GROWING

SETTINGS = BenchmarkSettings(prompt_tokens=7, new_tokens=5, batch_size=2, repeats=3, batch_sizes=())
WARM_UP = (9e3, 1e3, 7e3)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "bloom": {},
    "gemma3_text": {},
    "qwen3_moe": {},
    "jamba": {},  # the attention that tells the length of its cache is layer 1
    "lfm2": {"full_attn_idxs": [5, 6]},  # and here in the half that is bypassed
}


def given(fixed_ms: float, layer_ms: float) -> Latency:
    """Return a latency without errors."""
    fixed, layer = Measured(fixed_ms, 0.0, 5), Measured(layer_ms, 0.0, 5)
    return Latency(fixed, layer, 0.0, {"kept": True}, "cpu", "float32", 1, 128, 32, 1)


def scripted(rounds: list[tuple[float, float, float]]) -> Callable[[], float]:
    """Return a clock on which a step takes so many ms at depths 8, 4 and 6; where it is read is told by take_turn."""

    def readings() -> Iterator[float]:
        now = 5.0
        for times in rounds:
            for step_ms in times:
                for elapsed in (1.0, 0.1, 50.0, 0.1, step_ms / 1000 * 4):  # four tokens after the prefill's
                    now += elapsed
                    yield now

    return readings().__next__


def fitted(rounds: list[tuple[float, float, float]]) -> Latency:
    settings = replace(SETTINGS, repeats=len(rounds))
    return measure_latency(find_layers(tiny("llama")), settings, clock=scripted([WARM_UP, *rounds]))


def shortened(decoder: Decoder, num_kept: int) -> AbstractContextManager[None]:
    return bypass(decoder, Segment(num_kept, len(decoder), len(decoder)))


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_counts_the_work_that_layers_do(family: str) -> None:
    decoder, now = find_layers(tiny(family, **FAMILIES[family])), 0.0

    def work(ms: float, *_: Any) -> None:
        nonlocal now
        now += ms / 1000

    decoder.model.lm_head.register_forward_hook(lambda *_: work(7.0))
    parts = [[part for name, part in layer.named_children() if "norm" not in name] for layer in decoder.layers]
    for part in [part for layer in parts for part in layer]:
        part.register_forward_hook(lambda *_: work(3.0))
    found = measure_latency(decoder, SETTINGS, clock=lambda: now)
    per_layer = 3.0 * len(parts[0])
    assert found.fixed_ms.value == pytest.approx(7)
    assert found.layer_ms.value == pytest.approx(per_layer)
    assert found.of(5).value == pytest.approx(7 + 5 * per_layer)
    assert found.check["num_layers"] == 6
    assert found.check["error_fraction"]["value"] == pytest.approx(0, abs=1e-9)
    assert not any("forward" in vars(layer) for layer in decoder.layers)  # no layer is bypassed any more


@torch.no_grad()
def decoded(decoder: Decoder, ids: Tensor, num_prompt: int) -> Tensor:
    """Return the logits after the prompt and after each further token, with a growing cache."""
    output = decoder.model(input_ids=ids[:, :num_prompt], use_cache=True)
    logits = [output.logits[:, -1]]
    for i in range(num_prompt, ids.shape[1]):
        output = decoder.model(input_ids=ids[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_kept", [4, 6])
def test_caches_work_while_the_tail_is_bypassed(family: str, num_kept: int) -> None:
    decoder, ids = find_layers(tiny(family, **FAMILIES[family])), tokens(2, 20)
    with shortened(decoder, num_kept), torch.no_grad():
        whole = decoder.model(input_ids=ids, use_cache=False).logits[:, 11:]
        step_by_step = decoded(decoder, ids, 12)
    torch.testing.assert_close(step_by_step, whole, rtol=0, atol=2e-5)  # other shapes are added up in another order


def test_a_slow_round_does_not_bend_the_fit() -> None:
    usual = (20.0, 12.0, 16.0)  # 4 + 2 a layer
    found = fitted([usual, (200.0, 120.0, 160.0), usual])
    assert found.fixed_ms.value == pytest.approx(4)
    assert found.layer_ms.value == pytest.approx(2)
    assert found.layer_ms.n == 3
    assert found.check["error_fraction"] == {"value": pytest.approx(0), "se": pytest.approx(0, abs=1e-9), "n": 3}


def test_error_of_a_prediction_is_that_of_the_rounds_own_predictions() -> None:
    rounds = [(20.0, 12.0, 16.0), (23.0, 12.5, 17.0), (19.5, 13.0, 16.0), (21.0, 11.0, 15.0)]
    found = fitted(rounds)
    for depth in (0, 2, 4, 5, 8, 12):
        predicted = [half + (depth - 4) * (whole - half) / 4 for whole, half, _ in rounds]
        assert found.of(depth).se == pytest.approx(median(predicted).se)


def test_check_shows_layers_that_differ_even_when_timed_once_more(capsys) -> None:
    rounds = [(20.0, 12.0, 12.8)]  # layers 4 and 5 take 0.4 each, 6 and 7 take 3.6
    clock = scripted([WARM_UP, *rounds * 2, WARM_UP, *rounds * 4])
    found = measure_latency(find_layers(tiny("llama")), replace(SETTINGS, repeats=2), clock=clock)
    assert found.check["measured_ms"]["value"] == pytest.approx(12.8)
    assert found.check["predicted_ms"]["value"] == pytest.approx(16)
    assert found.check["error_fraction"] == {"value": pytest.approx(0.25), "se": pytest.approx(0, abs=1e-9), "n": 4}
    assert (found.check["kept"], found.check["tolerance_fraction"]) == (False, 0.05)
    said = " ".join(capsys.readouterr().err.split())
    assert "at 6 layers, which were not fitted, the predicted time is 25.0 ± 0.0 % above the measured one" in said
    assert "timed once more with twice the rounds" in said


def test_a_check_within_5_percent_is_kept_and_a_noisy_first_try_is_forgotten() -> None:
    assert fitted([(20.0, 12.0, 15.3)] * 2).check["kept"]  # predicted 16: 4.6 % above
    first, second = (20.0, 12.0, 12.8), (20.0, 12.0, 16.0)
    clock = scripted([WARM_UP, first, first, WARM_UP, *[second] * 4])
    found = measure_latency(find_layers(tiny("llama")), replace(SETTINGS, repeats=2), clock=clock)
    assert found.check["kept"]
    assert found.check["error_fraction"]["n"] == 4


def test_results_hold_plain_values_and_the_conditions() -> None:
    found = json.loads(json.dumps(fitted([(20.0, 12.0, 16.0)] * 2).to_dict()))
    assert found["layer_ms"] == {"value": pytest.approx(2), "se": pytest.approx(0, abs=1e-9), "n": 2}
    assert {name: found[name] for name in ("device", "dtype", "prompt_tokens", "new_tokens", "batch_size")} == {
        "device": "cpu",
        "dtype": "float32",
        "prompt_tokens": 7,
        "new_tokens": 5,
        "batch_size": 2,
    }


def test_a_family_that_hands_on_no_cache_is_named() -> None:
    decoder = find_layers(tiny("recurrent_gemma"))
    with pytest.raises(
        UserError, match=r"RecurrentGemmaForCausalLM does not .* --target-latency-ms does not work for it"
    ):
        measure_latency(decoder, SETTINGS, clock=lambda: 0.0)


def test_a_family_that_fails_with_bypassed_layers_is_named(monkeypatch) -> None:
    decoder = find_layers(tiny("llama"))
    last, inner = decoder.layers[-1], decoder.model.forward

    def fussy(*args: Any, **kwargs: Any) -> Any:
        if "forward" in vars(last):
            raise ValueError("layer 7 wants its cache")
        return inner(*args, **kwargs)

    monkeypatch.setattr(decoder.model, "forward", fussy)
    with pytest.raises(UserError, match=r"with 4 of its 8 layers \(layer 7 wants its cache\) - --target-lat"):
        measure_latency(decoder, SETTINGS, clock=scripted([WARM_UP]))
    assert "forward" not in vars(last)


def test_graphs_are_fitted_where_they_work_and_plain_steps_where_not(monkeypatch, capsys) -> None:
    made: list[str] = []

    def refused(*_: Any) -> Any:
        made.append(GRAPH)
        raise NoGraphError("why not")

    monkeypatch.setattr(latency, "device_of", lambda _: torch.device("cuda"))
    decoder, settings = find_layers(tiny("llama")), replace(SETTINGS, repeats=2)
    rounds = [WARM_UP, *[(20.0, 12.0, 16.0)] * 2]
    monkeypatch.setitem(MAKERS, GRAPH, Static)
    assert measure_latency(decoder, settings, clock=scripted(rounds)).mode == GRAPH
    monkeypatch.setitem(MAKERS, GRAPH, refused)
    assert measure_latency(decoder, settings, clock=scripted(rounds)).mode == GROWING
    assert made == [GRAPH]
    assert "without a CUDA graph: why not" in " ".join(capsys.readouterr().err.split())
    assert measure_latency(decoder, replace(settings, graphs=False), clock=scripted(rounds)).mode == GROWING


@pytest.mark.gpu
def test_recorded_steps_at_three_depths_are_timed() -> None:
    decoder = find_layers(tiny("llama").to("cuda"))
    found = measure_latency(decoder, SETTINGS)
    assert found.mode == GRAPH
    assert found.of(8).value > 0
    assert not any("forward" in vars(layer) for layer in decoder.layers)


def test_models_too_shallow_or_elsewhere_are_refused() -> None:
    with pytest.raises(UserError, match="needs a model of 4 layers or more, this one has 3 - use --layers"):
        measure_latency(find_layers(tiny("llama", num_hidden_layers=3)), SETTINGS)
    offloaded = replace(find_layers(tiny("llama")), resident=lambda: iter(range(8)))
    with pytest.raises(UserError, match="leave out --offload, or give --layers"):
        measure_latency(offloaded, SETTINGS)


def test_the_shallowest_model_is_fitted_from_different_depths() -> None:
    clock = scripted([WARM_UP, *[(20.0, 16.0, 18.0)] * 2])  # depths 4, 2 and 3
    found = measure_latency(find_layers(tiny("gpt2", n_layer=4)), replace(SETTINGS, repeats=2), clock=clock)
    assert (found.fixed_ms.value, found.layer_ms.value) == (pytest.approx(12), pytest.approx(2))
    assert found.check["num_layers"] == 3


@pytest.mark.parametrize("target_ms", [8.0, 8.1, 11.9, 12.0, 12.1, 63.9])
def test_no_fewer_layers_would_do(target_ms: float) -> None:
    found = given(4, 2)
    num_removed = layers_to_remove(found, target_ms, 30)
    assert found.of(30 - num_removed).value <= target_ms < found.of(31 - num_removed).value


def test_targets_out_of_reach_and_reached_already_are_named() -> None:
    with pytest.raises(
        UserError, match=r"2 layers, .* 8\.00 ms a token of the parent's 64\.00 - allowed: .*-ms 8\.00 or more"
    ):
        layers_to_remove(given(4, 2), 7.9, 30)
    with pytest.raises(
        UserError, match=r"already needs 64\.00 ms a token, no more than the 64 asked for - nothing to rem"
    ):
        layers_to_remove(given(4, 2), 64.0, 30)
    with pytest.raises(UserError, match=r"drowns in noise - .*benchmark\.repeats=20"):
        layers_to_remove(given(70, -0.1), 64.0, 30)


def test_a_refusal_by_a_fit_that_is_off_says_so() -> None:
    rounds = [(20.0, 12.0, 12.8), (20.0, 12.0, 13.8)]
    clock = scripted([WARM_UP, *rounds, WARM_UP, *rounds * 2])
    found = measure_latency(find_layers(tiny("llama")), replace(SETTINGS, repeats=2), clock=clock)
    off = r"the predicted time is 20\.5 ± 3\.3 % above the measured one"
    with pytest.raises(UserError, match=rf"2 layers, .* need 8\.00 .*; this is by a fit that is off: .* {off}"):
        layers_to_remove(found, 7.0, 8)
    with pytest.raises(UserError, match=rf"already needs 20\.00 ms .* asked for; this is by a fit .* {off}"):
        layers_to_remove(found, 21.0, 8)


def test_the_reachable_target_that_is_named_is_reachable() -> None:
    found = given(4.001, 2.002)
    with pytest.raises(UserError, match=r"--target-latency-ms 8\.01 or more"):
        layers_to_remove(found, 8.0, 30)
    assert layers_to_remove(found, 8.01, 30) == 28
