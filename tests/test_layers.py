"""Replay, inject and bypass compute what the model itself computes, in every family, and leave nothing behind."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from families import COMMON, FAMILIES, tiny, tokens
from torch import nn
from transformers import AutoConfig, BartConfig, GPT2Config, LlamaConfig, MllamaForCausalLM, PreTrainedConfig

from layerscalpel import hooks
from layerscalpel.errors import UserError
from layerscalpel.hooks import bypass, head_logits, hidden_at, hidden_in, inject, replay, resume_from
from layerscalpel.layers import Decoder, count_field, find_layer_list, num_layers_of
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment

every_family = pytest.mark.parametrize(
    "family", [*FAMILIES, "jamba", "lfm2"]
)  # the last two have layers of two classes
PATHS = {
    "gpt2": "transformer.h",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
}


@functools.cache
def decoder_of(family: str) -> Decoder:
    return find_layers(tiny(family))


def logits_of(decoder: Decoder, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return decoder.model(input_ids=ids, use_cache=False, **kwargs).logits


def traces_on(decoder: Decoder) -> list[str]:
    """Return whatever a hook or a swapped forward has left on the model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    found = [f"{name}.{h}" for name, module in decoder.model.named_modules() for h in hooks if getattr(module, h)]
    return found + [f"{name}.forward" for name, module in decoder.model.named_modules() if "forward" in vars(module)]


def differing_streams(decoder: Decoder, batch: int, count: int = 3) -> torch.Tensor:
    """Return [count * batch, 16, D] in which no two rows are alike."""
    generator = torch.Generator().manual_seed(7)
    width = hidden_at(decoder, tokens(1), 1).shape[-1]
    return torch.randn(count * batch, 16, width, generator=generator)


def step_errors(decoder: Decoder, batch: int, **kwargs: object) -> list[float]:
    """Return, for every layer, how far stepping stacked streams is from stepping each alone."""
    streams, errors = differing_streams(decoder, batch), []

    def visit(_i: int, _hidden: torch.Tensor, step: hooks.Step) -> None:
        alone = torch.cat([step(stream) for stream in streams.split(batch)])
        errors.append((step(streams) - alone).abs().max().item())

    with torch.no_grad(), replay(decoder, visit):
        decoder.model(input_ids=tokens(batch), use_cache=False, **kwargs)
    return errors


class Toy(nn.Module):
    """Something with a config of three layers and the module lists that a test wants."""

    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=3)
        for name, items in lists.items():
            setattr(self, name, nn.ModuleList(items))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))


def three(kind: type[nn.Module]) -> list[nn.Module]:
    return [kind() for _ in range(3)]


# ---------------------------------------------------------------------------------------------- finding


@every_family
def test_layers_are_found(family):
    decoder = decoder_of(family)
    assert decoder.path == PATHS.get(family, "model.layers")
    assert decoder.layers is decoder.model.get_submodule(decoder.path)
    assert len(decoder) == num_layers_of(decoder.model.config) == 8


def test_no_list_of_that_length_is_refused_with_a_listing():
    model = Toy(blocks=[nn.ReLU(), nn.ReLU()], experts=[nn.ReLU(), nn.ReLU(), nn.GELU(), nn.GELU()])
    said = r"no lists of 3 decoder layers in Toy - found: blocks \(2 x ReLU\), experts \(4 x GELU/ReLU\) - this model"
    with pytest.raises(UserError, match=said):
        find_layers(model)


def test_layers_may_be_of_several_classes_but_a_list_of_one_class_is_preferred():
    mixed = [nn.ReLU(), nn.ReLU(), nn.GELU()]
    assert find_layer_list(Toy(few=[nn.ReLU()] * 2, blocks=mixed))[0] == "blocks"
    assert find_layer_list(Toy(norms=mixed, blocks=three(nn.ReLU)))[0] == "blocks"
    with pytest.raises(
        UserError, match=r"several lists of 3 decoder layers .* a \(3 x GELU/ReLU\), b \(3 x GELU/ReLU\)"
    ):
        find_layer_list(Toy(a=mixed, b=mixed))


def test_no_list_at_all_is_said():
    with pytest.raises(UserError, match="found: no ModuleList at all"):
        find_layers(Toy())


def test_several_lists_are_refused_with_a_listing():
    with pytest.raises(UserError, match=r"several lists of 3 .* encoder \(3 x ReLU\), decoder \(3 x GELU\)"):
        find_layers(Toy(encoder=three(nn.ReLU), decoder=three(nn.GELU)))


def test_lists_inside_layers_are_not_taken_for_the_layers():
    assert find_layer_list(Toy(blocks=three(Expert)))[0] == "blocks"


def test_a_config_without_a_layer_count_is_refused():
    config = SimpleNamespace(model_type="odd", get_text_config=lambda decoder: PreTrainedConfig())
    with pytest.raises(UserError, match="type 'odd' states no number of decoder layers"):
        num_layers_of(config)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (LlamaConfig(num_hidden_layers=7), "num_hidden_layers"),
        (GPT2Config(n_layer=7), "n_layer"),
        (BartConfig(decoder_layers=7, encoder_layers=5, is_encoder_decoder=False), "decoder_layers"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_count_of_the_decoder_is_read_under_the_name_of_its_family(config, field):
    assert count_field(config) == field
    assert num_layers_of(config) == 7


def test_what_layers_of_several_classes_return_is_known_of_each():
    decoder = decoder_of("jamba")
    assert len({type(layer) for layer in decoder.layers}) == 2
    assert len(decoder.returns) == 8
    with bypass(decoder, Segment(0, 6, 8)):
        assert torch.isfinite(logits_of(decoder, tokens())).all()


def test_layers_that_text_alone_does_not_reach_are_refused():
    config = AutoConfig.for_model("mllama_text_model", **COMMON, cross_attention_layers=[2, 5])
    said = "MllamaCrossAttentionDecoderLayer of MllamaForCausalLM take no part in a forward of text alone"
    with pytest.raises(UserError, match=said):
        find_layers(MllamaForCausalLM(config).eval())


def test_layers_that_read_the_keys_of_others_are_refused():
    with pytest.raises(UserError, match="layers of Gemma3nForCausalLM read the keys and values of other layers"):
        find_layers(tiny("gemma3n_text"))


def test_hidden_states_of_several_streams_are_found_but_not_searched():
    decoder = find_layers(tiny("gemma3n_text", num_kv_shared_layers=0))
    assert decoder.hidden_dims == 4
    said = r"pass on 4-dimensional hidden states, not \[B, T, D\] - it can be cut at a given segment \(scalpel cut\)"
    with pytest.raises(UserError, match=said):
        hidden_at(decoder, tokens(), 3)
    with pytest.raises(UserError, match=said), replay(decoder, lambda _i, _hidden, _step: None):
        pass
    with pytest.raises(UserError, match=said), inject(decoder, 3, torch.zeros(3, 16, 32)):
        pass


def test_finding_leaves_the_model_alone():
    model = tiny("llama")
    before = logits_of(decoder_of("llama"), tokens())
    decoder = find_layers(model)
    assert traces_on(decoder) == []
    assert torch.equal(logits_of(decoder, tokens()), before)


def test_alibi_grows_with_the_batch():
    grows = {place[-1] for place in decoder_of("bloom").per_row}
    assert "alibi" in grows
    assert "alibi" not in {place[-1] for place in decoder_of("llama").per_row}


# ---------------------------------------------------------------------------------------------- replay


@every_family
def test_a_step_of_the_layers_own_input_is_its_output(family):
    decoder, entered, stepped = decoder_of(family), [], []

    def visit(_i: int, hidden: torch.Tensor, step: hooks.Step) -> None:
        entered.append(hidden)
        stepped.append(step(hidden))

    with torch.no_grad(), replay(decoder, visit):
        last = hidden_at(decoder, tokens(), len(decoder))
    assert len(stepped) == len(decoder)
    for i, output in enumerate([*entered[1:], last]):
        assert torch.equal(stepped[i], output), f"layer {i}"
        assert not torch.equal(output, entered[i]), f"layer {i} does nothing, so the test says nothing"


@every_family
@pytest.mark.parametrize("batch", [1, 3])
def test_stacked_streams_step_as_each_alone(family, batch):
    # another batch size may take another matrix kernel: a few float32 roundings
    assert max(step_errors(decoder_of(family), batch)) < 2e-5


@every_family
def test_stacked_streams_keep_the_masks_of_padded_rows(family):
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :9] = 0
    assert max(step_errors(decoder_of(family), 3, attention_mask=mask)) < 2e-5


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])  # it has no position ids
def test_stacked_streams_keep_the_positions_of_rows(family):
    positions = torch.stack([torch.arange(16), torch.arange(16) + 3, torch.arange(16) + 40])
    assert max(step_errors(decoder_of(family), 3, position_ids=positions)) < 2e-5


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
@pytest.mark.parametrize("at_once", [1, 3 * 16, 6 * 16])
def test_the_size_of_a_group_does_not_matter(family, at_once, monkeypatch):
    monkeypatch.setitem(hooks.STACKED_TOKENS, "cpu", at_once)
    assert max(step_errors(decoder_of(family), 3)) < 2e-5


def test_a_step_does_not_visit_again():
    visited = []

    def visit(i: int, hidden: torch.Tensor, step: hooks.Step) -> None:
        visited.append(i)
        step(hidden)

    with torch.no_grad(), replay(decoder_of("llama"), visit):
        decoder_of("llama").model(input_ids=tokens(), use_cache=False)
    assert visited == list(range(8))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt", "bloom"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(family, dtype):
    decoder = find_layers(tiny(family).to(dtype))
    hidden = hidden_at(decoder, tokens(), 3)
    assert hidden.dtype == dtype
    with torch.no_grad():
        logits = head_logits(decoder, resume_from(decoder, tokens(), 3, hidden))
    assert torch.equal(logits, logits_of(decoder, tokens()))
    assert torch.isfinite(logits).all()


# ---------------------------------------------------------------------------------------------- inject


@every_family
def test_injecting_what_was_there_changes_nothing(family):
    decoder, ids = decoder_of(family), tokens()
    expected = logits_of(decoder, ids)
    for boundary in range(len(decoder) + 1):
        with torch.no_grad():
            hidden = hidden_at(decoder, ids, boundary)
            with inject(decoder, boundary, hidden):
                injected = decoder.model(input_ids=ids, use_cache=False).logits
            resumed = head_logits(decoder, resume_from(decoder, ids, boundary, hidden))
        assert torch.equal(injected, expected), f"boundary {boundary}"
        assert torch.equal(resumed, expected), f"boundary {boundary}"


@every_family
def test_what_is_injected_counts_and_the_token_ids_do_not(family):
    decoder, ids, others = decoder_of(family), tokens(), tokens(seed=9)
    expected = logits_of(decoder, others)
    for boundary in (0, 4, 8):
        hidden = hidden_at(decoder, others, boundary)
        with inject(decoder, boundary, hidden):
            assert torch.equal(logits_of(decoder, ids), expected), f"boundary {boundary}"
    assert not torch.equal(logits_of(decoder, ids), expected)


def test_nothing_after_a_boundary_is_computed():
    decoder, ran = find_layers(tiny("llama")), []
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    hidden_at(decoder, tokens(), 3)
    assert ran == [0, 1, 2]


# ---------------------------------------------------------------------------------------------- bypass


@every_family
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (3, 6), (4, 5), (6, 8)])
def test_bypass_equals_layers_that_return_their_input(family, start, stop):
    decoder, ids = decoder_of(family), tokens()

    def give_back(_module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handles = [decoder.layers[i].register_forward_hook(give_back, with_kwargs=True) for i in range(start, stop)]
    naive = logits_of(decoder, ids)
    for handle in handles:
        handle.remove()
    with bypass(decoder, Segment(start, stop, 8)):
        assert torch.equal(logits_of(decoder, ids), naive)
    assert not torch.equal(naive, logits_of(decoder, ids))


def test_bypassed_layers_compute_nothing():
    decoder, ran = find_layers(tiny("llama")), []
    for i, layer in enumerate(decoder.layers):
        layer.self_attn.register_forward_hook(lambda _m, _a, _o, i=i: ran.append(i))
    with bypass(decoder, Segment(2, 6, 8)):
        logits_of(decoder, tokens())
    assert ran == [0, 1, 6, 7]


# ---------------------------------------------------------------------------------------------- leaving no trace


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_nothing_is_left_after_use(family):
    decoder, ids = decoder_of(family), tokens()
    expected = logits_of(decoder, ids)
    hidden = hidden_at(decoder, ids, 4)
    with replay(decoder, lambda _i, _hidden, _step: None), bypass(decoder, Segment(5, 7, 8)):
        resume_from(decoder, ids, 4, hidden)
    for boundary in (0, 4, 8):
        with inject(decoder, boundary, hidden):
            logits_of(decoder, ids)
    assert traces_on(decoder) == []
    assert torch.equal(logits_of(decoder, ids), expected)


def test_nothing_is_left_after_an_exception():
    decoder, ids = decoder_of("llama"), tokens()
    hidden = hidden_at(decoder, ids, 4)

    def fail(_i: int, _hidden: torch.Tensor, _step: hooks.Step) -> None:
        raise ArithmeticError

    within = [replay(decoder, fail), bypass(decoder, Segment(2, 4, 8))]
    for manager in [*within, *(inject(decoder, boundary, hidden) for boundary in (0, 4, 8))]:
        with pytest.raises(ArithmeticError), manager:
            fail(0, logits_of(decoder, ids), torch.clone)
        assert traces_on(decoder) == []
    with pytest.raises(IndexError):
        hidden_at(decoder, ids + 1000, 4)  # no such token
    assert traces_on(decoder) == []


def test_a_forward_that_another_library_set_comes_back():
    decoder, calls = find_layers(tiny("llama")), []
    layer = decoder.layers[3]
    inner = layer.forward

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = counted
    with bypass(decoder, Segment(2, 5, 8)):
        logits_of(decoder, tokens())
    assert calls == []
    assert layer.forward is counted
    logits_of(decoder, tokens())
    assert calls == [1]


def test_bypasses_nest():
    decoder, ids = decoder_of("llama"), tokens()
    with bypass(decoder, Segment(2, 4, 8)):
        outer = logits_of(decoder, ids)
        with bypass(decoder, Segment(3, 6, 8)):
            both = logits_of(decoder, ids)
        assert torch.equal(logits_of(decoder, ids), outer)
    with bypass(decoder, Segment(2, 6, 8)):
        assert torch.equal(logits_of(decoder, ids), both)


def test_hidden_in_reads_both_forms():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert hidden_in(hidden) is hidden
    assert hidden_in((hidden, None)) is hidden
