"""Every trace of a layer in a config is cut, nothing else in it changes, and what nobody understands is refused."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from families import COMMON, SLIDING, tiny
from transformers import Gemma3Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config

from layerscalpel.errors import UserError
from layerscalpel.plan import plan_cut
from layerscalpel.renumber import Modules
from layerscalpel.segment import Segment
from layerscalpel.traces import cut_config, kept_below, text_part, unexplained

LONG = {"s": "sliding_attention", "f": "full_attention", "c": "chunked_attention", "v": "conv", "l": "linear_attention"}


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return tiny(family)


def cut_of(family: str, *bounds: int) -> tuple[Any, dict[str, str]]:
    plan = plan_cut(model_of(family), Segment(*bounds, 8))
    return plan.config, plan.traces


# ---------------------------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize(
    ("family", "bounds", "expected"),
    [
        ("llama", (2, 5), {"num_hidden_layers": 5}),
        ("gpt2", (2, 5), {"n_layer": 5}),
        ("qwen2", (0, 1), {"layer_types": "sfsssfs", "max_window_layers": 1}),
        ("qwen2", (2, 3), {"layer_types": "sssssfs", "max_window_layers": 2}),
        ("gemma2", (2, 5), {"layer_types": "sssfs"}),
        ("gemma3_text", (5, 8), {"layer_types": "ssfss"}),
        ("olmo3", (0, 3), {"layer_types": "sssfs"}),
        ("cohere2", (1, 4), {"layer_types": "sssfs"}),
        ("exaone4", (6, 7), {"layer_types": "ssfssss"}),
        ("gpt_oss", (2, 5), {"layer_types": "sssfs"}),
        ("smollm3", (2, 4), {"no_rope_layers": [1, 1, 1, 0, 1, 1]}),
        ("llama4_text", (2, 5), {"no_rope_layers": [1, 1, 0, 1, 1], "moe_layers": [1, 4], "layer_types": "ccfcc"}),
        ("lfm2", (2, 4), {"full_attn_idxs": [3], "layer_types": "vvvfvv"}),
        ("lfm2", (6, 8), {"full_attn_idxs": [2, 5], "layer_types": "vvfvvf"}),
        ("bamba", (0, 2), {"attn_layer_indices": [0, 3]}),
        ("qwen3_moe", (0, 2), {"mlp_only_layers": [1]}),
        ("qwen3_moe", (1, 3), {"mlp_only_layers": [0, 1]}),
        ("deepseek_v3", (1, 6), {"first_k_dense_replace": 1}),
        ("deepseek_v3", (4, 6), {"first_k_dense_replace": 3}),
        ("glm4_moe", (0, 3), {"first_k_dense_replace": 0}),
        ("recurrent_gemma", (2, 5), {"block_types": ["recurrent", "recurrent", "attention"]}),  # a whole period
        ("recurrent_gemma", (0, 1), {"block_types": ["recurrent", "attention", "recurrent"] * 2 + ["recurrent"]}),
        ("gpt_neo", (1, 2), {"num_layers": 7, "attention_layers": ["global", *["global", "local"] * 3]}),
    ],
)
def test_every_trace_in_the_config_is_cut(family, bounds, expected):
    before = model_of(family).config
    config, traces = cut_of(family, *bounds)
    for name, value in expected.items():
        want = [LONG[letter] for letter in value] if isinstance(value, str) else value
        assert getattr(config, name) == want
    assert {name for name in expected if getattr(before, name) != getattr(config, name)} <= traces.keys()


@pytest.mark.parametrize(("bounds", "depth"), [((0, 2), 0), ((1, 4), 1), ((2, 5), 2), ((6, 8), 2)])
def test_layer_types_and_a_depth_that_say_the_same_still_do(bounds, depth):
    """A config made before there were layer_types derives them from max_window_layers."""
    values = COMMON | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
    config, _ = cut_config(Qwen2Config(**values), Segment(*bounds, 8))
    derived = Qwen2Config(**values | {"num_hidden_layers": config.num_hidden_layers, "max_window_layers": depth})
    assert config.max_window_layers == depth
    assert config.layer_types == derived.layer_types


@pytest.mark.parametrize(("depth", "below"), [(0, 0), (1, 1), (2, 2), (3, 2), (5, 2), (6, 3), (8, 5), (28, 5)])
def test_a_depth_counts_the_layers_below_it_that_stay(depth, below):
    assert kept_below(depth, Segment(2, 5, 8)) == below


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((2, 4), {"decoder_sparse_step": 2, "mlp_only_layers": []}),  # a whole period
        ((6, 8), {"decoder_sparse_step": 2, "mlp_only_layers": []}),
        ((2, 5), {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}),  # dense were 0, 2, 4, 6
        ((0, 1), {"decoder_sparse_step": 1, "mlp_only_layers": [1, 3, 5]}),
        ((7, 8), {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    ],
)
def test_a_sparse_step_whose_phase_moves_is_written_out(bounds, expected):
    config, traces = cut_of("qwen2_moe", *bounds)
    assert {name: getattr(config, name) for name in expected} == expected
    assert ("decoder_sparse_step" in traces) == (expected["decoder_sparse_step"] == 1)


@pytest.mark.parametrize(
    ("bounds", "offsets"),
    [
        ((1, 5), (1, 1)),  # a whole period of attention, two of experts
        ((6, 8), (1, 1)),
        ((0, 2), (3, 1)),
        ((0, 1), (0, 0)),  # both phases move
        ((0, 4), (1, 1)),
    ],
)
def test_a_period_is_told_with_another_phase_where_it_can_be(bounds, offsets):
    config, _ = cut_of("jamba", *bounds)
    assert (config.attn_layer_offset, config.expert_layer_offset) == offsets
    assert (config.attn_layer_period, config.expert_layer_period) == (4, 2)
    kinds = model_of("jamba").config.layers_block_type
    assert config.layers_block_type == [kinds[i] for i in Segment(*bounds, 8).kept()]


def test_a_scale_divided_by_the_root_of_the_depth_stays_what_it_was():
    config, traces = cut_of("minicpm3", 6, 8)
    assert traces.keys() == {"num_hidden_layers", "scale_depth"}
    assert config.scale_depth / math.sqrt(6) == 1.4 / math.sqrt(8)


def test_a_dict_whose_keys_are_layer_numbers_is_renumbered():
    by_layer = {"0": "a", "3": "b", "6": "c"}
    config, traces = cut_config(LlamaConfig(**COMMON, layer_kinds=by_layer), Segment(2, 5, 8))
    assert config.layer_kinds == {"0": "a", "3": "c"}
    assert traces.keys() == {"num_hidden_layers", "layer_kinds"}
    for other in ({"0": "a", "9": "b"}, {"first": 1, "6": 2}):
        assert cut_config(LlamaConfig(**COMMON, layer_kinds=other), Segment(2, 5, 8))[0].layer_kinds == other


def test_traces_say_what_changed():
    assert cut_of("qwen2", 0, 2)[1] == {
        "num_hidden_layers": "8 -> 6",
        "max_window_layers": "2 -> 0",
        "layer_types": "8 items -> 6 items",
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text", "llama4_text", "deepseek_v3", "jamba"])
def test_nothing_else_in_the_config_changes(family):
    before, (after, traces) = model_of(family).config, cut_of(family, 1, 5)
    changed = {name for name, value in before.to_dict().items() if after.to_dict().get(name) != value}
    assert changed - {"architectures", "dtype", "transformers_version"} == traces.keys()
    assert before.to_dict().keys() - after.to_dict().keys() <= {"architectures", "dtype", "transformers_version"}
    assert after._attn_implementation == before._attn_implementation


@pytest.mark.parametrize("family", ["qwen2", "lfm2", "llama4_text", "qwen2_moe"])
def test_the_given_config_stays_as_it_was(family):
    before = tiny(family).config
    stated = before.to_dict()
    cut_config(before, Segment(2, 5, 8))
    assert before.to_dict() == stated


def test_the_text_part_of_a_larger_config_is_cut():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2}
    config = Gemma3Config(text_config=COMMON | SLIDING | {"head_dim": 8}, vision_config=vision, mm_tokens_per_image=4)
    after, traces = cut_config(config, Segment(2, 5, 8))
    assert text_part(after) is after.text_config
    assert (after.text_config.num_hidden_layers, after.vision_config.num_hidden_layers) == (5, 8)
    assert len(after.text_config.layer_types) == 5
    assert traces.keys() == {"num_hidden_layers", "layer_types"}
    assert after.mm_tokens_per_image == 4


# ---------------------------------------------------------------------------------------------- what is refused


def test_a_rule_by_layer_number_is_refused_by_name():
    parent = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    said = (
        r"layer 5 would change as layer 2: attn\.scaling goes from .* a per-layer rule of GPT2LMHeadModel would shift"
    )
    with pytest.raises(UserError, match=said):
        plan_cut(parent, Segment(2, 5, 8))
    assert plan_cut(parent, Segment(6, 8, 8)).traces == {"n_layer": "8 -> 6"}  # no number changes


@pytest.mark.parametrize("bounds", [(2, 5), pytest.param((2, 4), marks=pytest.mark.slow), (3, 4)])
def test_a_period_that_the_config_cannot_tell_is_refused_by_name(bounds):
    said = r"layer \d would change as layer \d: .*<class> goes from Jamba\w+ to Jamba\w+ - a per-layer rule of JambaFor"
    with pytest.raises(UserError, match=said):
        plan_cut(tiny("jamba"), Segment(*bounds, 8))


def test_tensors_outside_the_layers_that_would_change_are_refused_by_name():
    parent = tiny("gemma3n_text", num_kv_shared_layers=0)
    said = r"tensor model\.embed_tokens_per_layer\.weight outside the layers would go from \(97, 64\) to \(97, 40\)"
    with pytest.raises(UserError, match=said):
        plan_cut(parent, Segment(2, 5, 8))


def test_shared_keys_and_values_are_refused():
    with pytest.raises(UserError, match="layers of Gemma3nForCausalLM read the keys and values of other layers"):
        plan_cut(tiny("gemma3n_text"), Segment(2, 5, 8))


@pytest.mark.parametrize(("family", "bounds"), [("llama", (2, 5)), ("qwen2_moe", (2, 5)), ("qwen2_moe", (2, 4))])
def test_a_list_that_nothing_explains_is_refused(family, bounds):
    said = "config field odd_ones has 8 items, as many as there are layers, and nothing shows what they mean - remove"
    with pytest.raises(UserError, match=said):
        plan_cut(tiny(family, odd_ones=[3, 1, 4, 1, 5, 9, 2, 6]), Segment(*bounds, 8))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", [2, 3, 4, 5, 6, 7, 8, 9]),
        ("suppress_token_ids", [2, 3, 4, 5, 6, 7, 8, 9]),
        ("odd_ones", [3, 1, 4]),
        ("odd_word", "eight on"),
    ],
)
def test_what_is_no_list_of_layers_is_left_alone(name, value):
    plan = plan_cut(tiny("llama", **{name: value}), Segment(2, 5, 8))
    assert getattr(plan.config, name) == value
    assert plan.traces == {"num_hidden_layers": "8 -> 5"}


class Odd(LlamaForCausalLM):
    """A llama whose layers read a list under a name that says nothing of layers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer, scale in zip(self.model.layers, config.odd_ones, strict=False):
            layer.mlp.scale = scale


def test_a_list_that_the_layers_read_is_explained_by_them():
    config = LlamaConfig(**COMMON, odd_ones=[3, 1, 4, 1, 5, 9, 2, 6])
    assert unexplained(config, Segment(2, 5, 8)).keys() == {"odd_ones"}
    assert plan_cut(Odd(config), Segment(2, 5, 8)).config.odd_ones == [3, 1, 9, 2, 6]


def test_a_config_that_refuses_its_cut_is_told(monkeypatch):
    config = tiny("llama").config

    def fail(_self: object, **_values: object) -> None:
        raise ValueError("a rule\nof its own")

    monkeypatch.setattr(type(config), "__init__", fail)
    with pytest.raises(UserError, match="LlamaConfig refuses the cut config: a rule of its own - this segment cannot"):
        cut_config(config, Segment(2, 5, 8))


def test_a_config_that_validates_its_values_is_told():
    with pytest.raises(UserError, match=r"Qwen2Config refuses the cut config: .* - this segment cannot be cut"):
        cut_config(tiny("qwen2").config, Segment(2, 5, 8), instead={"layer_types": ["full_attention"]})


# ---------------------------------------------------------------------------------------------- quantised names


@pytest.mark.parametrize("of_the_text_part", [False, True])
def test_the_quantisation_of_a_config_is_renumbered(of_the_text_part):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = (
        Gemma3Config(text_config=COMMON | SLIDING, vision_config=vision)
        if of_the_text_part
        else model_of("llama").config
    )
    named = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3.mlp", "model.layers.6.mlp"]}
    config = type(config)(**config.to_dict() | {"quantization_config": named})
    segment = Segment(2, 5, 8)
    after, _ = cut_config(config, segment, modules=Modules("model.layers", (), segment))
    assert after.quantization_config == named | {"modules_to_not_convert": ["model.layers.3.mlp"]}
    assert config.quantization_config == named
