"""A target instead of a rate: as many layers as the KL allows, as few as size or speed ask for, or every length."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from healing import by_tier
from planted import silence
from world import byte_tokenizer, write_recipe, write_texts

from layerscalpel import parallel, targets, task
from layerscalpel.cli import main
from layerscalpel.cut import cut_model
from layerscalpel.decoder import num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.exact import score_windows
from layerscalpel.latency import Latency
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured
from layerscalpel.probe import find_layers
from layerscalpel.search import SEARCHES
from layerscalpel.segment import Segment
from layerscalpel.settings import BenchmarkSettings, SearchSettings, TargetSettings
from layerscalpel.sizes import layer_parameters
from layerscalpel.streams import Removal
from layerscalpel.targets import Aimed, aim, best_of_rates, require_target, surface
from layerscalpel.task import Task, first_sound

EVERYTHING = SearchSettings(num_blocks=4, batch_size=2, confidence=0.0, gate_blocks=2, num_starts=2)
NO_NATS = 1e-6


def aimed(decoder: Decoder, target: TargetSettings, settings: SearchSettings = EVERYTHING, **changes: Any) -> Aimed:
    return aim(Task(decoder, tokens(4), 0, settings, **changes), target, BenchmarkSettings())


def planted(start: int, num_layers: int, family: str = "llama") -> Decoder:
    """Return a random decoder of 8 layers, some of which are the identity."""
    decoder = find_layers(tiny(family))
    for layer in decoder.layers[start : start + num_layers]:
        silence(layer)
    return decoder


def refuse(*refused: Removal):
    return lambda removal: "a rule would shift" if removal in refused else None


@pytest.mark.parametrize(
    ("family", "start", "num_layers"),
    by_tier(
        [(family, *place) for family, place in product(["llama", "gemma3_text"], [(0, 1), (3, 2), (4, 3), (2, 4)])],
        everyday=[("llama", 0, 1), ("gemma3_text", 3, 2), ("gemma3_text", 4, 3), ("llama", 2, 4)],
    ),
)
def test_a_tiny_kl_removes_exactly_the_layers_that_do_nothing(family: str, start: int, num_layers: int) -> None:
    found, facts = aimed(planted(start, num_layers, family), TargetSettings(max_kl=NO_NATS))
    assert found.num_removed == facts["num_removed"] == num_layers
    assert abs(facts["kl_nats"]["value"]) <= NO_NATS
    for method in ("exact", "clp"):
        assert SEARCHES[method].find(found).segment == Segment(start, start + num_layers, 8)


def test_the_command_line_takes_a_largest_kl(tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=260)
    for layer in find_layers(model).layers[2:5]:
        silence(layer)
    save_decoder(model, byte_tokenizer(), tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", write_texts(tmp_path / "texts.jsonl"))
    shared = ["--recipe", str(recipe), "--out", str(tmp_path / "out"), "--quiet", "--max-kl", "1e-5"]
    assert main(["search", str(tmp_path / "model"), *shared]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["segment"] == [2, 5]
    assert results["search"]["target"]["kind"] == "max_kl"
    assert results["search"]["target"]["num_removed"] == 3
    assert set(results["search"]["surface"]) == {"1", "2", "3", "4"}
    assert [results["search"]["rates"][n]["start"] for n in "123"] == [2, 2, 2]


def test_as_many_layers_as_the_kl_allows() -> None:
    decoder = find_layers(tiny("llama"))
    least = {n: score_windows(decoder, tokens(4), num_removed=n, batch_size=2) for n in range(1, 5)}
    means = {n: scores.mean(scores.best()).value for n, scores in least.items()}
    for most in sorted(means.values()):
        found, facts = aimed(decoder, TargetSettings(max_kl=most + 1e-9))
        assert found.num_removed == max(n for n, mean in means.items() if mean <= most + 1e-9)
        assert facts["kl_nats"]["value"] == pytest.approx(means[found.num_removed], abs=1e-12)
        assert facts["most_layers_tried"] == 4
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_a_kl_that_no_cut_keeps_says_what_the_best_costs() -> None:
    decoder = find_layers(tiny("llama"))
    scores = score_windows(decoder, tokens(4), num_removed=1)
    best = scores.mean(scores.best()).value
    with pytest.raises(UserError, match=rf"within 0\.001 nats: the best, of n = 1, costs {best:.3f} - give a larger"):
        aimed(decoder, TargetSettings(max_kl=0.001))


def test_a_length_that_cannot_be_cut_is_passed_over() -> None:
    two = [(start, start + 1) for start in range(7)]
    found, _ = aimed(planted(3, 2), TargetSettings(max_kl=NO_NATS), sound=refuse(*two))
    assert found.num_removed == 1
    assert 2 not in found.raced


def test_a_model_that_cannot_be_cut_at_all_is_refused_with_the_reason() -> None:
    decoder, reason = find_layers(tiny("llama")), "nothing here can be cut"
    with pytest.raises(UserError, match=reason):
        aimed(decoder, TargetSettings(max_kl=1.0), sound=lambda _: reason)
    found, _ = aimed(decoder, TargetSettings(layers=2), sound=lambda _: reason)
    with pytest.raises(UserError, match=reason):
        SEARCHES["exact"].find(found)


def test_every_length_scores_what_it_scores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = find_layers(tiny("bloom"))
    found, facts = aimed(decoder, TargetSettings(layers=3), replace(EVERYTHING, all_rates=True))
    assert (found.num_removed, facts) == (3, {})
    assert list(found.raced) == [1, 2, 3, 4]
    table, best = surface(found.raced), best_of_rates(found.raced)
    for n in range(1, 5):
        alone = score_windows(decoder, tokens(4), num_removed=n, batch_size=2)
        torch.testing.assert_close(found.raced[n].scores.kl_WN, alone.kl_WN, rtol=0, atol=1e-6)
        assert list(table[str(n)]) == [str(start) for start in alone.starts]
        assert best[str(n)]["start"] == alone.best()
        assert best[str(n)]["kl_nats"] == table[str(n)][str(alone.best())]["kl_nats"]
    assert json.loads(json.dumps([table, best], allow_nan=False)) == [table, best]
    monkeypatch.setattr(task, "score", lambda *_, **__: pytest.fail("what was scored is not scored again"))
    assert SEARCHES["exact"].find(found).segment.start == best["3"]["start"]


def test_more_than_half_the_layers_are_raced_on_their_own() -> None:
    found, _ = aimed(find_layers(tiny("llama")), TargetSettings(layers=6), replace(EVERYTHING, all_rates=True))
    assert SEARCHES["exact"].find(found).scores.keys() == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("method", "family", "all_rates"),
    by_tier(
        product(["exact", "clp", "gate", "angular", "influence"], ["llama", "glm4_moe"], [False, True]),
        everyday=[
            *(("exact", *rest) for rest in product(["llama", "glm4_moe"], [False, True])),
            *((method, "glm4_moe", all_rates) for method, all_rates in [("clp", False), ("gate", True)]),
            *(("clp", "llama", True), ("angular", "glm4_moe", False), ("influence", "llama", True)),
        ],
    ),
)
def test_what_is_cut_leaves_no_more_parameters_than_asked(method: str, family: str, all_rates: bool) -> None:
    decoder = find_layers(tiny(family))
    whole, sizes = num_parameters(decoder.model), layer_parameters(decoder)
    most = whole - 2 * max(sizes)
    target = TargetSettings(params=str(most))
    found, facts = aimed(decoder, target, replace(EVERYTHING, all_rates=all_rates))
    result = first_sound(SEARCHES[method].find(found), found)
    assert found.num_removed == len(result.segment) == facts["num_removed"] == 2
    assert num_parameters(cut_model(decoder, result.segment)[0]) <= most
    allowed = [s for s in range(7) if whole - sizes[s] - sizes[s + 1] <= most]
    assert facts["starts"] == allowed
    assert (len(allowed) < 7) == (family == "glm4_moe")  # its first layers are dense
    if method in ("exact", "clp"):
        scores = score_windows(decoder, tokens(4), num_removed=2, batch_size=2, starts=allowed)
        assert result.segment.start == scores.best()


def test_a_window_that_leaves_too_many_parameters_says_so() -> None:
    decoder = find_layers(tiny("glm4_moe"))
    most = num_parameters(decoder.model) - 2 * max(layer_parameters(decoder))
    found, _ = aimed(decoder, TargetSettings(params=str(most)))
    assert found.sound((3, 4)) is None
    assert found.sound((2, 3)) == f"leaves more than the {most:,} parameters of --target-params"


def test_a_cut_that_is_refused_stays_refused_under_a_target() -> None:
    decoder = planted(3, 2)
    most = num_parameters(decoder.model) - 2 * max(layer_parameters(decoder))
    found, _ = aimed(decoder, TargetSettings(params=str(most)), sound=refuse((3, 4)))
    result = SEARCHES["exact"].find(found)
    assert result.segment.start != 3
    assert result.details["refused"] == {"3": "a rule would shift"}


def in_time(fixed_ms: float, layer_ms: float) -> Latency:
    return Latency(
        Measured(fixed_ms, 0.1, 5), Measured(layer_ms, 0.01, 5), 0.0, {"kept": True}, "cpu", "float32", 1, 128, 32, 1
    )


@pytest.mark.parametrize(("most", "num_removed"), [(9.9, 1), (9.0, 1), (8.9, 2), (5.0, 5), (4.0, 6)])
def test_as_few_layers_as_bring_the_latency(most: float, num_removed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, measured = find_layers(tiny("llama")), []

    def measure(given: Decoder, settings: BenchmarkSettings, *, seed: int) -> Latency:
        measured.append((given, settings, seed))
        return in_time(2.0, 1.0)

    monkeypatch.setattr(targets, "measure_latency", measure)
    found, facts = aimed(decoder, TargetSettings(latency_ms=most), seed=7)
    assert measured == [(decoder, BenchmarkSettings(), 7)]
    assert found.num_removed == facts["num_removed"] == num_removed
    assert facts["predicted_ms"]["value"] == pytest.approx(10 - num_removed)
    assert facts["predicted_ms"]["value"] <= most
    assert facts["latency"]["layer_ms"]["value"] == 1.0
    json.dumps(facts, allow_nan=False)


def test_one_process_measures_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would disturb each other's clock."""
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "first_says", lambda own: in_time(2.0, 1.0) if own is None else pytest.fail("who?"))
    monkeypatch.setattr(targets, "measure_latency", lambda *_, **__: pytest.fail("rank 0 does"))
    assert aimed(find_layers(tiny("llama")), TargetSettings(latency_ms=5.0))[0].num_removed == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_measuring_process_refuses_all_refuse(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> Latency:
        raise UserError("too few layers")

    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "first_says", lambda own: UserError("too few layers") if rank else own)
    monkeypatch.setattr(targets, "measure_latency", refused)
    with pytest.raises(UserError, match="too few layers"):
        aimed(find_layers(tiny("llama")), TargetSettings(latency_ms=5.0))


@pytest.mark.parametrize(("most", "said"), [(10.0, "the parent already needs 10.00 ms"), (3.9, "2 layers, the fewest")])
def test_a_latency_out_of_reach_is_refused(most: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "measure_latency", lambda *_, **__: in_time(2.0, 1.0))
    with pytest.raises(UserError, match=said):
        aimed(find_layers(tiny("llama")), TargetSettings(latency_ms=most))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (TargetSettings(params="many"), "'many' is no number of parameters"),
        (TargetSettings(layers=7), "--layers 7 removes 7 of 8 layers"),
        (TargetSettings(rate=0.95), "at least 2 must stay"),
        (TargetSettings(segment="3:12"), "does not lie in this model's layers"),
    ],
)
def test_a_target_without_sense_is_refused_before_loading(target: TargetSettings, said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_target(target, 8)


@pytest.mark.parametrize(
    "target",
    [TargetSettings(params="90M"), TargetSettings(max_kl=0.0), TargetSettings(latency_ms=5.0), TargetSettings()],
)
def test_a_target_that_only_the_model_can_answer_passes(target: TargetSettings) -> None:
    require_target(target, 8)
