"""Entries of a quantisation config match after a cut the modules that they matched before."""

from __future__ import annotations

import re

import pytest

from layerscalpel.errors import UserError
from layerscalpel.renumber import MARKERS, Modules, renumbered
from layerscalpel.segment import Segment

PARTS = ("", ".self_attn", ".self_attn.q_proj", ".self_attn.o_proj", ".mlp", ".mlp.up_proj", ".mlp.down_proj")


def modules(start: int = 2, stop: int = 5, num_layers: int = 16) -> Modules:
    inside = [f"model.layers.{i}{part}" for i in range(num_layers) for part in PARTS]
    return Modules("model.layers", ("model", "model.layers", *inside, "lm_head"), Segment(start, stop, num_layers))


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("model.layers.12.mlp.gate", "model.layers.9.mlp.gate"),
        ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate"),
        ("model.layers.4", None),
        ("model.layers.5", "model.layers.2"),
        ("layers.5.mlp", "layers.2.mlp"),
        ("transformer.h.3.attn", None),
        ("transformer.h.7.attn", "transformer.h.4.attn"),
        ("model.language_model.layers.15.mlp", "model.language_model.layers.12.mlp"),
        (r"re:model\.layers\.6\.mlp\..*", r"re:model\.layers\.3\.mlp\..*"),
        (r"re:model.layers.12.*", r"re:model.layers.9.*"),
        (r"re:model.layers.3.*", None),
        (r"-:model\.layers\.3\..*", None),
        (r"+:model\.layers\.6\..*", r"+:model\.layers\.3\..*"),
        ("model.layers.99.mlp", "model.layers.99.mlp"),  # a layer that the model never had
        ("lm_head", "lm_head"),
        ("model.layers.mlp.3", "model.layers.mlp.3"),
        (r"re:.*\.layers\.[0-9]+\.mlp", r"re:.*\.layers\.[0-9]+\.mlp"),
        ("re:.*down_proj", "re:.*down_proj"),
        ("*layers.6.mlp*", "*layers.3.mlp*"),
        ("*layers.3.mlp*", None),
        ("0.20.0", "0.20.0"),
        ("vision_tower.encoder.layers.5.mlp", "vision_tower.encoder.layers.5.mlp"),
        ("model.visual.blocks.3.attn", "model.visual.blocks.3.attn"),
        ("audio_tower.layers.3", "audio_tower.layers.3"),
    ],
)
def test_module_names_are_renumbered(name, new):
    assert renumbered([name, "after"], modules()) == [*([new] if new else []), "after"]


@pytest.mark.parametrize(
    "entry",
    [
        "re:model.layers.1.*",  # layers 1 and 10 to 15
        r"re:model\.layers\.(3|4|7|12)\..*",
        r"re:.*layers\.(1[0-9]|[0-6])\.mlp\.(up|down)_proj",
        r"re:.*\.[2-9]\.self_attn\..*",
        r"-:.*\.(0|5|15)\..*",
        r"+:.*\.1[0-2]\..*down.*",
        r"model.layers.[46].mlp",
        r"re:^(?!.*layers\.9\.).*q_proj$",
    ],
)
@pytest.mark.parametrize("bounds", [(2, 5), (0, 3), (9, 16), (7, 8)])
def test_a_pattern_matches_what_it_matched(entry, bounds):
    own = modules(*bounds)

    def matched(pattern: str, names: tuple[str, ...]) -> list[str]:
        marked = pattern.startswith(MARKERS)
        body = pattern.partition(":")[2] if marked else rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"
        return [name for name in names if re.match(body, name)]

    wanted = [new for name in matched(entry, own.names) if (new := own.new(name))]
    found = renumbered([entry], own)
    assert bool(found) == bool(wanted)
    for new in found:
        assert matched(new, own.after) == wanted
        assert new.partition(":")[0] == entry.partition(":")[0] or ":" not in entry


def test_a_pattern_of_other_modules_in_each_layer_is_refused():
    with pytest.raises(UserError, match=r"other modules in each layer by one pattern .* write the names out"):
        renumbered([r"re:model\.layers\.(1\.mlp|6\.self_attn)\..*"], modules())


def test_names_are_renumbered_wherever_they_stand():
    settings = {
        "bits": 4,
        "quant_method": "awq",
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "model.layers.3.mlp.gate", "model.layers.12.mlp.gate"],
        "config_groups": {"group_0": {"targets": ["Linear"], "ignore": ["model.layers.15.mlp.gate"]}},
        "extra_config": {"model.layers.4.mlp": {"bits": 8}, "model.layers.5.mlp": {"bits": 16}},
        "nothing": None,
    }
    assert renumbered(settings, modules()) == settings | {
        "modules_to_not_convert": ["model.layers.0.mlp.gate", "model.layers.9.mlp.gate"],
        "config_groups": {"group_0": {"targets": ["Linear"], "ignore": ["model.layers.12.mlp.gate"]}},
        "extra_config": {"model.layers.2.mlp": {"bits": 16}},
    }


def test_a_group_whose_every_target_is_removed_is_dropped():
    groups = {
        "gone": {"targets": ["re:model.layers.3.*", "model.layers.4.mlp.up_proj"]},
        "some": {"targets": ["model.layers.4.mlp.up_proj", "model.layers.6.mlp.up_proj"]},
        "all": {"targets": ["Linear"]},
    }
    found = renumbered({"config_groups": groups, "ignore": []}, modules())
    assert found == {
        "config_groups": {"some": {"targets": ["model.layers.3.mlp.up_proj"]}, "all": groups["all"]},
        "ignore": [],
    }
