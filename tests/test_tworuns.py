"""Two runs are taken where they cost less than one, and go through every stage as one does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SameProcess
from families import tiny, tokens
from healing import by_tier
from planted import changed_layers, mean_kl, naive_scores, silence
from transformers import AutoModelForCausalLM, PreTrainedModel
from world import byte_tokenizer, write_recipe, write_texts

from layerscalpel import checkpoint
from layerscalpel.cli import main
from layerscalpel.decoder import num_parameters, save_decoder
from layerscalpel.fingerprint import STAGES
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.search import SEARCHES
from layerscalpel.segment import Segment, segments_of
from layerscalpel.settings import BenchmarkSettings, SearchSettings, TargetSettings
from layerscalpel.sizes import layer_parameters
from layerscalpel.streams import Removal, window
from layerscalpel.targets import aim
from layerscalpel.task import SearchResult, Task
from layerscalpel.tworuns import better_of_one_and_two

SETTINGS = SearchSettings(num_blocks=4, batch_size=2, confidence=0.0)


def planted(*silent: int, family: str = "llama") -> Decoder:
    """Return a random decoder of 8 layers, some of which are the identity."""
    decoder = find_layers(tiny(family))
    for i in silent:
        silence(decoder.layers[i])
    return decoder


def found_in(decoder: Decoder, num_removed: int, settings: SearchSettings = SETTINGS, **changes: Any) -> SearchResult:
    task = Task(decoder, tokens(4), num_removed, settings, **changes)
    return better_of_one_and_two(SEARCHES["exact"].find(task), task)


def runs_of(*removed: int) -> tuple[Segment, ...]:
    return tuple(segments_of(removed, 8))


LLAMA, BLOOM = ("llama", 0.0), ("bloom", 0.99)
PLANTED = [(1, 5), (1, 5, 6), (0, 1, 3), (2, 4, 5, 6), (0, 7), (0, 1, 6, 7)]


@pytest.mark.parametrize(
    ("silent", "family", "confidence"),
    by_tier(
        [(silent, *rest) for silent, rest in product(PLANTED, [LLAMA, BLOOM])],
        everyday=[(silent, *(LLAMA if i % 2 else BLOOM)) for i, silent in enumerate(PLANTED)],
    ),
)
def test_two_planted_runs_are_found_and_win(silent: Removal, family: str, confidence: float) -> None:
    result = found_in(planted(*silent, family=family), len(silent), replace(SETTINGS, confidence=confidence))
    two = result.details["two_runs"]
    assert result.segments == runs_of(*silent)
    assert two["wins"]
    assert two["segments"] == [[run.start, run.stop] for run in result.segments]
    assert two["kl_nats"]["value"] == pytest.approx(0, abs=1e-6)
    assert two["single_less_two_kl_nats"]["value"] > 1e-3
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["segments"] == two["segments"]
    assert written["segment"] == two["segments"][0]


@pytest.mark.parametrize("silent", [(2, 3), (0, 1), (6, 7), (2, 3, 4), (3, 4, 5, 6)])
def test_a_single_planted_run_wins(silent: Removal) -> None:
    result = found_in(planted(*silent), len(silent))
    two = result.details["two_runs"]
    assert result.segments == runs_of(*silent)
    assert not two["wins"]
    assert len(two["segments"]) == 2
    assert two["single_less_two_kl_nats"]["value"] < -1e-3


def test_of_equals_the_single_run_wins() -> None:
    result = found_in(planted(1, 2, 5, 6), 2)
    assert result.segments == runs_of(1, 2)
    assert result.details["two_runs"]["kl_nats"]["value"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("num_removed", "seed"),
    by_tier([(2, 0), (2, 1), (3, 0), (3, 1), (4, 1)], everyday=[(2, 0), (3, 1), (4, 1)]),
)
def test_the_choice_equals_brute_force_given_the_first_run(num_removed: int, seed: int) -> None:
    decoder, ids = find_layers(tiny("llama", seed)), tokens(4)

    def best(removals: list[Removal]) -> tuple[Removal, float]:
        means = naive_scores(decoder, ids, removals).mean(1)
        return removals[int(means.argmin())], float(means.min())

    def windows(length: int) -> Iterator[Removal]:
        return (window(start, length) for start in range(9 - length))

    pairs: set[Removal] = set()
    for length in range(1, num_removed):
        first, _ = best(list(windows(length)))
        unions = [tuple(sorted({*first, *second})) for second in windows(num_removed - length)]
        pairs |= {union for union in unions if len(union) == num_removed and len(segments_of(union, 8)) == 2}
    (pair, kl), (single, single_kl) = best(sorted(pairs)), best(list(windows(num_removed)))
    result = found_in(decoder, num_removed)
    two = result.details["two_runs"]
    assert two["num_pairs"] == len(pairs)
    assert two["segments"] == [[run.start, run.stop] for run in segments_of(pair, 8)]
    assert two["kl_nats"]["value"] == pytest.approx(kl, abs=1e-5)
    assert two["single_less_two_kl_nats"]["value"] == pytest.approx(single_kl - kl, abs=1e-5)
    assert two["wins"] == (kl < single_kl)
    assert result.segments == runs_of(*(pair if kl < single_kl else single))


def test_one_layer_cannot_be_parted() -> None:
    result = found_in(planted(3), 1)
    assert result.segments == runs_of(3)
    assert "two_runs" not in result.details


def test_lengths_that_were_raced_are_not_raced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from layerscalpel import tworuns

    decoder = planted(1, 5, 6)
    task, _ = aim(
        Task(decoder, tokens(4), 0, replace(SETTINGS, all_rates=True)), TargetSettings(layers=3), BenchmarkSettings()
    )
    monkeypatch.setattr(tworuns, "race_windows", lambda *_: pytest.fail("all lengths were raced"))
    assert better_of_one_and_two(SEARCHES["exact"].find(task), task).segments == runs_of(1, 5, 6)


def refuse(*refused: Removal):
    return lambda removal: "a rule would shift" if removal in refused else None


def test_a_pair_that_cannot_be_cut_does_not_win_and_is_not_named() -> None:
    result = found_in(planted(1, 5, 6), 3, sound=refuse((1, 5, 6)))
    two = result.details["two_runs"]
    assert two["segments"] != [[1, 2], [5, 7]]
    assert result.segments != runs_of(1, 5, 6)
    assert two["wins"] == (two["single_less_two_kl_nats"]["value"] > 0)


def test_where_no_pair_can_be_cut_the_single_run_stays() -> None:
    sound = lambda removal: None if len(segments_of(removal, 8)) == 1 else "one run only"  # noqa: E731
    result = found_in(planted(1, 5), 2, sound=sound)
    assert len(result.segments) == 1
    assert "two_runs" not in result.details


@pytest.mark.parametrize("num_removed", [2, 3])
def test_where_no_shorter_run_can_be_cut_the_single_run_stays(num_removed: int) -> None:
    """A periodic rule, as one attention layer in four, may leave no shorter run."""
    sound = lambda removal: None if len(removal) >= num_removed else "a rule would shift"  # noqa: E731
    result = found_in(planted(*range(3, 3 + num_removed)), num_removed, sound=sound)
    assert result.segments == runs_of(*range(3, 3 + num_removed))
    assert "two_runs" not in result.details


def test_a_target_of_parameters_finds_what_the_number_of_layers_finds() -> None:
    """The first run may begin where no single run of the whole length could."""
    decoder = planted(6, 7)
    most = num_parameters(decoder.model) - 3 * max(layer_parameters(decoder))
    task, _ = aim(Task(decoder, tokens(4), 0, SETTINGS), TargetSettings(params=str(most)), BenchmarkSettings())
    found = better_of_one_and_two(SEARCHES["exact"].find(task), task)
    assert found.to_dict() == found_in(decoder, 3).to_dict()
    assert found.details["two_runs"]["segments"][1] == [6, 8]


def test_layers_of_unequal_size_are_counted_in_both_runs() -> None:
    """The first three layers are small: pairs with them leave more than is asked."""
    decoder = planted(0, 5, family="glm4_moe")
    sizes = layer_parameters(decoder)
    assert sizes[0] < sizes[5]
    most = num_parameters(decoder.model) - 2 * sizes[5]
    task, _ = aim(Task(decoder, tokens(4), 0, SETTINGS), TargetSettings(params=str(most)), BenchmarkSettings())
    result = better_of_one_and_two(SEARCHES["exact"].find(task), task)
    removed = [i for run in result.segments for i in range(run.start, run.stop)]
    assert num_parameters(decoder.model) - sum(sizes[i] for i in removed) <= most


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A world whose model has two runs that do nothing, and a run that removed them."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny("llama", vocab_size=260)
    for i in (1, 2, 5, 6):
        silence(find_layers(model).layers[i])
    save_decoder(model, byte_tokenizer(), folder / "model")
    write_recipe(folder / "recipe.yaml", write_texts(folder / "texts.jsonl"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "Witness", SameProcess)
        flags = ["--segments", "2", "--layers", "4", "--quiet"]
        recipe, out = str(folder / "recipe.yaml"), str(folder / "out")
        assert main(["run", str(folder / "model"), "--recipe", recipe, "--out", out, *flags]) == 0
        yield folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_whole_path_removes_both_runs(pair: Path) -> None:
    results = results_of(pair)
    assert results["segments"] == [[1, 3], [5, 7]]
    assert results["search"]["two_runs"]["wins"]
    assert len(results["cut"]["steps"]) == 2
    assert results["heal"]["layers"] == [0, 1, 2, 3]  # both sides of both seams
    assert results["benchmark"]["ideal_speedup"] == 2.0
    assert {"parent", "cut", "healed"} <= set(results["evaluate"])
    assert results["evaluate"]["cut"]["kl_nats"]["value"] == pytest.approx(0, abs=1e-6)
    assert all((pair / "out" / stage / "done.json").is_file() for stage in STAGES)
    assert not list((pair / "out").rglob("step-*"))


@torch.no_grad()
def test_the_cut_model_computes_what_the_parent_does_without_both_runs(pair: Path) -> None:
    parent, cut, ids = load(pair / "model"), load(pair / "out" / "cut" / "model"), tokens(3)
    assert cut.config.num_hidden_layers == len(cut.model.layers) == 4
    bypassed = dict.fromkeys((1, 2, 5, 6), lambda given, _output: given)
    with changed_layers(find_layers(parent).layers, bypassed):
        expected = parent(ids, use_cache=False).logits
    assert torch.equal(cut(ids, use_cache=False).logits, expected)
    kept = [parent.model.layers[i].state_dict() for i in (0, 3, 4, 7)]
    for layer, state in zip(cut.model.layers, kept, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


@torch.no_grad()
def test_the_healed_model_is_whole(pair: Path) -> None:
    healed, cut, ids = load(pair / "out" / "heal" / "model"), load(pair / "out" / "cut" / "model"), tokens(3)
    assert len(healed.model.layers) == 4
    assert mean_kl(cut(ids, use_cache=False).logits, healed(ids, use_cache=False).logits).isfinite().all()
    changed = {name for name, tensor in healed.state_dict().items() if not torch.equal(tensor, cut.state_dict()[name])}
    assert all(name.startswith("model.layers.") for name in changed)


def test_a_finished_run_of_two_runs_is_not_run_again(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerscalpel import run

    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("it is finished"))
    flags = ["--segments", "2", "--layers", "4", "--quiet"]
    recipe, out = str(pair / "recipe.yaml"), str(pair / "out")
    assert main(["run", str(pair / "model"), "--recipe", recipe, "--out", out, *flags]) == 0


def test_later_stages_alone_go_on_with_both_runs(pair: Path) -> None:
    before = results_of(pair)
    assert main(["heal", str(pair / "out"), "--quiet", "--set", "heal.lr=1e-4"]) == 0
    after = results_of(pair)
    assert after["heal"]["layers"] == before["heal"]["layers"]
    assert after["heal"]["train"] != before["heal"]["train"]
    assert after["cut"] == before["cut"]
