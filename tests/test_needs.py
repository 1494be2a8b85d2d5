"""Memory that training all layers takes, and its refusal before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import tiny

from layerscalpel import needs
from layerscalpel.checks import check_before_loading
from layerscalpel.config import build_config
from layerscalpel.decoder import num_parameters
from layerscalpel.errors import UserError
from layerscalpel.layers import find_layer_list
from layerscalpel.parsing import build_parser, settings_of
from layerscalpel.settings import TargetSettings


def free(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(needs, "free_bytes", lambda _: int(gib * needs.GIB))


def settings(world, **more):
    given = {"model.name": str(world / "model"), "target.layers": 2, "heal.second": "all", "model.device": "cpu"}
    given |= {"data.block_tokens": 32, "data.healing_block_tokens": 32}
    texts = {f"data.{part}": str(world / "texts.jsonl") for part in ("calibration", "healing", "evaluation")}
    return build_config([given, texts, more])


def test_all_layers_are_refused_where_they_cannot_fit(world, monkeypatch) -> None:
    free(monkeypatch, 0.00012)
    with pytest.raises(
        UserError, match=r"training all layers takes at least 0\.0\d+ GiB .* cpu has 0\.00012 GiB free .*--recipe paper"
    ):
        check_before_loading(settings(world), ["search", "cut", "heal"])
    for fits in ({"heal.second": "none"}, {"heal.second": "lora"}, {"heal.shard": True}):
        assert needs.require_memory_to_heal(settings(world, **fits), None) is None  # type: ignore[arg-type]
    free(monkeypatch, 1.0)
    check_before_loading(settings(world), ["search", "cut", "heal"])


def test_bytes_are_those_of_weights_masters_gradients_and_moments() -> None:
    model = tiny("llama")
    layers = find_layer_list(model)[1]
    layer, whole = num_parameters(layers[0]), num_parameters(model)
    config = build_config([{"heal.second": "all", "heal.objective": "ce", "target.layers": 2}])
    left, trained = whole - 2 * layer, (len(layers) - 2) * layer
    assert needs._bytes_of_all(model, config, 4) == 4 * left + 4 * trained + 8 * trained
    assert needs._bytes_of_all(model, config, 2) == 2 * left + 2 * trained + 4 * trained + 8 * trained
    with_parent = replace(config, heal=replace(config.heal, objective="both"))
    assert needs._bytes_of_all(model, with_parent, 2) == 2 * whole + needs._bytes_of_all(model, config, 2)
    named = replace(config, target=TargetSettings(segment="1:3"))
    assert needs._bytes_of_all(model, named, 2) == needs._bytes_of_all(model, config, 2)
    assert torch.finfo(torch.float32).bits == 8 * needs.FLOAT_BYTES


def test_commands_that_heal_a_model_take_the_best_recipe_unless_another_is_named() -> None:
    def chosen(*words: str):
        return settings_of(build_parser().parse_args(words), model__name="demo").heal

    assert (chosen("run", "demo").second, chosen("run", "demo").objective) == ("all", "both")
    assert chosen("run", "demo", "--recipe", "paper").second == "none"
    assert chosen("run", "demo", "--set", "heal.second=lora").second == "lora"
    assert chosen("evaluate", "demo").second == "none"
