"""Settings: merged in order, checked all at once, with the next step in every complaint."""

from __future__ import annotations

import itertools

import pytest

from layerscalpel.config import TARGET_FLAGS, build_config, parse_assignment, recipe, to_dict
from layerscalpel.errors import UserError, suggest
from layerscalpel.settings import Config


def complaint(*layers: dict) -> str:
    with pytest.raises(UserError) as caught:
        build_config(layers)
    return str(caught.value)


def test_later_settings_win() -> None:
    config = build_config([{"heal.epochs": 1, "seed": 3}, {"heal.epochs": 4}])
    assert (config.heal.epochs, config.seed) == (4, 3)


def test_defaults_are_untouched_by_a_build() -> None:
    build_config([{"heal.epochs": 9}])
    assert Config().heal.epochs == 2


def test_all_findings_come_at_once() -> None:
    text = complaint({"heal.epoch": 1, "search.method": "exakt", "target.rate": 1.5, "heal.lr": "much"})
    assert len(text.splitlines()) == 4
    assert "unknown setting 'heal.epoch' - did you mean 'heal.epochs'?" in text
    assert "search.method=exakt is unknown - did you mean 'exact'?" in text
    assert "rate 1.5 is not between 0 and 1" in text
    assert "heal.lr='much' is not a number" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("heal.epochs", 0),
        ("heal.epochs", 1.5),
        ("heal.epochs", True),
        ("heal.lr", float("nan")),
        ("data.validation_fraction", 0.9),
        ("benchmark.enabled", "yes please"),
        ("seed", -1),
        ("model.device", "tpu"),
    ],
)
def test_wrong_values_are_refused(key: str, value: object) -> None:
    assert key in complaint({key: value})


@pytest.mark.parametrize("rate", [0, 1, -0.2, 7])
def test_rates_outside_0_to_1_are_refused(rate: float) -> None:
    assert f"rate {float(rate)}" in complaint({"target.rate": rate})


TARGETS = {"rate": 0.2, "layers": 3, "segment": "3:5", "max_kl": 0.5, "params": "90M", "latency_ms": 20.0}


@pytest.mark.parametrize(("one", "other"), itertools.combinations(TARGETS, 2))
def test_two_targets_contradict(one: str, other: str) -> None:
    text = complaint({f"target.{name}": TARGETS[name] for name in (one, other)})
    assert text.startswith(f"target has {one} and {other} at once - give one of --rate, --layers, --segment, --max-kl,")
    assert len(text.splitlines()) == 1
    assert set(TARGET_FLAGS) == set(TARGETS)


SEGMENT, OFFLOAD, NO_HEALING = {"target.segment": "3:5"}, {"model.offload": "disk"}, {"heal.method": "none"}
PILOT, STITCHED = {"search.method": "pilot"}, {"search.segments": 2, "stitch.method": "linear"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OFFLOAD, "search.method=clp learns with all weights in memory - with --offload add --search exact"),
        (OFFLOAD | {"search.method": "gate"}, "search.method=gate learns with all weights in memory"),
        (OFFLOAD | PILOT, "search.method=pilot learns with all weights in memory"),
        (OFFLOAD | {"model.offload": "cpu"}, "search.method=clp learns"),
        (PILOT | NO_HEALING, "search.method=pilot heals its candidates - choose a heal.method, or --search clp"),
        (PILOT | {"search.segments": 2}, "search.segments=2 compares exact scores, search.method=pilot does not"),
        (STITCHED, "a stitch mends one seam - leave out stitch.method, or --segments"),
        ({"search.initial_start": 3.0}, "search.initial_start is for a single start - add search.num_starts=1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, expected: str) -> None:
    text = complaint(settings)
    assert text.startswith(expected)
    assert len(text.splitlines()) == 1


def test_all_that_does_not_go_together_is_told_at_once() -> None:
    assert len(complaint(OFFLOAD | PILOT | NO_HEALING | STITCHED | {"target.rate": 2.0}).splitlines()) == 5


@pytest.mark.parametrize(
    "settings",
    [
        OFFLOAD | SEGMENT,  # nothing is searched
        PILOT | NO_HEALING | SEGMENT,
        STITCHED | SEGMENT,
        *(OFFLOAD | {"search.method": method} for method in ("exact", "angular", "influence", "last", "random")),
        OFFLOAD | {"search.method": "exact", "search.segments": 2},
        STITCHED | {"search.segments": 1},
    ],
)
def test_settings_that_go_together_pass(settings: dict) -> None:
    build_config([settings])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("13:19", "13:19"),
        ("5e-4", 5e-4),
        ("1e3", 1000.0),
        ("7", 7),
        ("-1", -1),
        ("0.5", 0.5),
        ("true", True),
        ("c4", "c4"),
    ],
)
def test_values_read_as_written(text: str, value: object) -> None:
    key, read = parse_assignment(f"any.key={text}")
    assert (key, read, type(read)) == ("any.key", value, type(value))


def test_an_assignment_without_equals_is_explained() -> None:
    with pytest.raises(UserError, match="has no '='"):
        parse_assignment("heal.epochs")


def test_a_recipe_round_trips(tmp_path) -> None:
    import yaml

    config = build_config([{"target.segment": "13:19", "heal.lr": 5e-4, "model.name": "demo"}])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    assert build_config([recipe(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize("content", ["- a list", "a: [", "\x00", "just words"])
def test_no_recipe_is_explained(tmp_path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe .*recipe\.yaml"):
        recipe(path)


def test_a_missing_recipe_is_explained(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        recipe(tmp_path / "nothing.yaml")


def test_a_near_word_is_suggested():
    assert suggest("exat", ["gate", "exact"]) == " - did you mean 'exact'?"
    assert suggest("zzzz", ["gate", "exact"]) == " - allowed: exact, gate"


def test_recipes_of_the_package_are_called_by_name(tmp_path) -> None:
    assert build_config([recipe("best")]).heal.second == "all"
    own = tmp_path / "own.yaml"
    own.write_text("base: best\nheal:\n  second: lora\n")
    config = build_config([recipe(own)])
    assert (config.heal.second, config.heal.second_lr) == ("lora", 3e-4)
    own.write_text("heal:\n  epochs: 3\n")
    assert build_config([recipe(own)]).heal.second == "none"  # without a base, settings are those of settings.py


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bets", None, r"recipe bets cannot be read: .* did you mean 'best'\?, or a YAML file"),
        ("own.yaml", "base: bset\n", r"has the base bset, which is none of the package's - did you mean 'best'\?"),
        ("own.yaml", "base: [best]\n", r"has the base \['best'\], which is none of the package's"),
    ],
)
def test_a_recipe_that_is_not_there_is_explained(tmp_path, monkeypatch, name, content, said) -> None:
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        recipe(name)
