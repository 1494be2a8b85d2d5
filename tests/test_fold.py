"""Folded weights compute what the repair itself does, in every family; what cannot be folded is refused and named."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny, tokens
from healing import by_tier
from planted import changed_layers, mean_kl
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerscalpel import anatomy, rehearsal
from layerscalpel.decoder import num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.fold import Rewriter, fold
from layerscalpel.grams import sizes_of
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.rehearsal import MOST_DIFFERENCE, inserted_logits, rehearse, relative_difference, without_epsilons
from layerscalpel.seam import Repair, Seam, find_seam, inserted
from layerscalpel.stitch import CANDIDATES
from layerscalpel.twin import twin_model
from layerscalpel.witness import is_tied

START = 3
LAST = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "cohere2", "glm4_moe"), "mlp.down_proj"),
    **dict.fromkeys(("gpt_neox", "bloom"), "mlp.dense_4h_to_h"),
    "gpt2": "mlp.c_proj",
    "opt": "fc2",
}
"""The last projection of layer 2, which linear and ridge are folded into."""
ROTATES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "granite",
    "mixtral",
    "qwen3_moe",
    "glm4_moe",
    "gpt_oss",
    "nanochat",
)
SCALES = (*LAST, "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "gpt_oss", "bamba", "flex_olmo")
EXPERTS = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "flex_olmo")
NOT_STATED = ("mixtral", "flex_olmo", "nanochat")
"""Families that tests/families.py does not make."""


ALIKE = ("mistral", "qwen3", "mixtral")
"""Families whose layers write and read as those of another one here do (llama, qwen3_moe); for the slow tier."""


def families(names: Iterable[str], slow: tuple[str, ...] = ALIKE) -> Any:
    return pytest.mark.parametrize("family", by_tier(names, everyday=[name for name in names if name not in slow]))


def decoder_of(family: str) -> Decoder:
    """Return a tiny model of 8 layers in float64; experts compute in float32 at most."""
    stated = family not in NOT_STATED
    model = tiny(family) if stated else twin_model(AutoConfig.for_model(family, num_hidden_layers=8))
    return find_layers(model if family in EXPERTS else model.double())


@functools.cache
def prepared(family: str) -> tuple[Decoder, Seam]:
    """Return a decoder and what meets its stream, for tests that leave every weight as it was."""
    decoder = decoder_of(family)
    with without_epsilons(decoder.model):
        return decoder, find_seam(decoder, START)


def random_matrix(size: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(size, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_turn(width: int) -> Tensor:
    return torch.linalg.qr(random_matrix(width, width))[0]


@contextlib.contextmanager
def moved(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within, a module returns `change(its input, its output)`."""
    handle = module.register_forward_hook(lambda _module, args, output: change(args[0], output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def assert_folds(family: str, repair: Repair, by_hand: contextlib.AbstractContextManager[None]) -> None:
    """Assert that the weights of the folded repair give the logits that hooks of plain torch give."""
    decoder, seam = prepared(family)
    model, ids = decoder.model, tokens(2)
    before = copy.deepcopy(model.state_dict())
    with without_epsilons(model):
        plain = model(ids, use_cache=False).logits
        with by_hand:
            wanted = model(ids, use_cache=False).logits
        assert relative_difference(inserted_logits(decoder, seam, repair, ids), wanted) < MOST_DIFFERENCE
        with contextlib.ExitStack() as undo:
            fold(decoder, seam, repair, Rewriter(undo))
            assert relative_difference(model(ids, use_cache=False).logits, wanted) < MOST_DIFFERENCE
        assert relative_difference(plain, wanted) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@families(SCALES)
def test_folded_scale_equals_the_inserted_one(family: str) -> None:
    decoder, _ = prepared(family)
    by_hand = changed_layers(decoder.layers, {START - 1: lambda _given, output: 1.7 * output})
    assert_folds(family, Repair(alpha=1.7), by_hand)


@families(ROTATES)
def test_folded_rotation_equals_the_inserted_one(family: str) -> None:
    decoder, _ = prepared(family)
    turn = random_turn(decoder.hidden_size)
    change = lambda _given, output: 0.6 * output @ turn.to(output)  # noqa: E731
    assert_folds(family, Repair(0.6, turn), changed_layers(decoder.layers, {START - 1: change}))


@families(LAST, slow=(*ALIKE, "qwen2", "phi3"))
def test_folded_map_equals_the_inserted_one(family: str) -> None:
    decoder, _ = prepared(family)
    change = 0.1 * random_matrix(decoder.hidden_size, decoder.hidden_size)
    module = decoder.layers[START - 1].get_submodule(LAST[family])
    by_hand = moved(module, lambda _given, output: output + output @ change.to(output))
    assert_folds(family, Repair(outputs_DD=change), by_hand)


@families(LAST, slow=(*ALIKE, "qwen2", "phi3"))
def test_folded_refit_equals_the_inserted_one(family: str) -> None:
    decoder, _ = prepared(family)
    module: Any = decoder.layers[START - 1].get_submodule(LAST[family])
    inputs, outputs = sizes_of(module)
    change = 0.05 * random_matrix(inputs + (module.bias is not None), outputs)

    def refitted(given: Tensor, output: Tensor) -> Tensor:
        own = torch.cat([given, torch.ones_like(given[..., :1])], dim=-1)[..., : len(change)]
        return output + own @ change.to(output)

    assert_folds(family, Repair(inputs_ED=change), moved(module, refitted))


def test_outputs_that_a_model_adds_to_in_place_are_caught_as_they_were() -> None:
    assert rehearse(decoder_of("llama4_text"), 4, CANDIDATES)[1] == {}


@torch.no_grad()
def test_repair_of_the_last_boundary_is_folded_into_the_head() -> None:
    decoder, ids = decoder_of("llama"), tokens(2)
    repair, model = Repair(0.6, random_turn(32)), decoder.model
    with without_epsilons(model), contextlib.ExitStack() as undo:
        seam = find_seam(decoder, len(decoder))
        wanted = inserted_logits(decoder, seam, repair, ids)
        fold(decoder, seam, repair, Rewriter(undo))
        assert seam.after.writers == ()
        assert relative_difference(model(ids, use_cache=False).logits, wanted) < MOST_DIFFERENCE


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_gains_are_scaled_with_their_offset(family: str) -> None:
    decoder = decoder_of(family)
    layer, seam = decoder.layers[5], find_seam(decoder, START)
    written = layer.post_feedforward_layernorm.weight if family == "gemma2" else layer.mlp.down_proj.weight
    offset, before = float(family == "gemma2"), written.clone()
    fold(decoder, seam, Repair(alpha=2.0), Rewriter(contextlib.ExitStack()))
    torch.testing.assert_close(written.data, (before + offset) / 2 - offset, rtol=0, atol=0)
    assert torch.equal(layer.input_layernorm.weight, decoder_of(family).layers[5].input_layernorm.weight)


@torch.no_grad()
def test_gains_become_one_behind_a_rotation() -> None:
    decoder = find_layers(tiny("llama").double())
    fold(decoder, find_seam(decoder, START), Repair(1.0, random_turn(32)), Rewriter(contextlib.ExitStack()))
    gains = {i: layer.post_attention_layernorm.weight for i, layer in enumerate(decoder.layers)}
    assert [bool((gain == 1).all()) for gain in gains.values()] == [False] * START + [True] * (8 - START)


def kinds(seam: Seam) -> dict[str, str]:
    return {writer.path: writer.kind for writer in seam.after.writers}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("llama", {"self_attn.o_proj": "Linear", "mlp.down_proj": "Linear"}),
        ("gpt2", {"attn.c_proj": "Conv1D", "mlp.c_proj": "Conv1D"}),
        ("gpt_neox", {"attention.dense": "Linear", "mlp.dense_4h_to_h": "Linear"}),
        ("gemma2", dict.fromkeys(("post_attention_layernorm", "post_feedforward_layernorm"), "Gemma2RMSNorm")),
        ("qwen3_moe", {"self_attn.o_proj": "Linear", "mlp.down_proj": "Linear", "mlp.experts": "Qwen3MoeExperts"}),
    ],
)
def test_what_writes_is_found(family: str, wanted: dict[str, str]) -> None:
    assert kinds(prepared(family)[1]) == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom", "glm4_moe"])
def test_last_projection_is_found(family: str) -> None:
    decoder, _ = prepared(family)
    name = "mlp.shared_experts.down_proj" if family == "glm4_moe" else LAST[family]
    assert find_seam(decoder, 8).projection(decoder) is decoder.layers[7].get_submodule(name)


def test_multiplied_projection_is_found_with_its_factor() -> None:
    assert prepared("granite")[1].factor == pytest.approx(0.5)


@functools.cache
def refusals(family: str, start: int = START) -> dict[str, str]:
    return rehearse(decoder_of(family), start, CANDIDATES)[1]


@families(["llama", "granite", "gpt2", "qwen2", "phi3"], slow=("qwen2", "phi3"))
def test_rehearsal_passes_what_can_be_folded(family: str) -> None:
    assert refusals(family).keys() == (set() if family in ROTATES else {"rotation"})


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("gpt2", "rotation", "GPT2LMHeadModel: LayerNorm reads the residual stream and is not the same in every basis"),
        ("cohere2", "rotation", "Cohere2ForCausalLM: Cohere2LayerNorm reads"),
        ("gemma2", "rotation", "Gemma2ForCausalLM: what Gemma2RMSNorm adds to the residual stream cannot be turned"),
        ("gemma2", "linear", r"Gemma2ForCausalLM: no plain projection adds .* \(Gemma2RMSNorm is what adds to it last"),
        ("qwen3_moe", "ridge", r"Qwen3MoeForCausalLM: no plain projection .* \(Qwen3MoeExperts is"),
        ("olmo2", "rotation", "Olmo2ForCausalLM: what Olmo2RMSNorm adds"),
    ],
)
def test_refusals_name_the_model_and_why(family: str, name: str, reason: str) -> None:
    start = 5 if family == "qwen3_moe" else START
    found = refusals(family, start)[name]
    assert re.match(reason, found), found


@pytest.mark.parametrize(("start", "names"), [(0, ["linear", "ridge"]), (8, ["scalar"])])
def test_places_without_a_layer_before_or_after_are_refused(start: int, names: list[str]) -> None:
    found = refusals("llama", start)
    assert list(found) == sorted(names)
    assert all("segment starts at layer 0" in why or "no layer follows the seam" in why for why in found.values())


def test_family_whose_norms_stand_behind_the_sum_is_refused_by_the_proof() -> None:
    config = AutoConfig.for_model("bert", is_decoder=True, num_hidden_layers=8)
    student = find_layers(twin_model(config))
    found = rehearse(student, START, ["scalar"])[1]
    assert "BertLMHeadModel: logits of the folded weights differ from those of the repair itself by" in found["scalar"]


@pytest.mark.parametrize("name", ["scalar", "rotation"])
def test_proof_catches_what_was_overlooked(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    found = anatomy._Finder.writers
    monkeypatch.setattr(
        anatomy._Finder, "writers", lambda self: {k: v for k, v in found(self).items() if self.layer != 6 or "mlp" in k}
    )
    assert "differ from those of the repair" in rehearse(find_layers(tiny("llama")), START, [name])[1][name]


def test_quantised_weights_are_refused() -> None:
    class PackedLinear(nn.Linear):
        pass

    student = find_layers(tiny("llama"))
    student.layers[6].mlp.down_proj.__class__ = PackedLinear
    seam, found = rehearse(student, START, ["scalar"])
    assert "LlamaForCausalLM: mlp.down_proj is PackedLinear, not Linear (quantised weights" in found["scalar"]
    assert seam.start == START


def test_rehearsal_leaves_the_student_as_it_was() -> None:
    student = find_layers(tiny("qwen2"))
    before, epsilons = copy.deepcopy(student.model.state_dict()), student.layers[0].input_layernorm.variance_epsilon
    rehearse(student, START, CANDIDATES)
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())
    assert student.layers[0].input_layernorm.variance_epsilon == epsilons > 0


class Routed(nn.Module):
    """A list of experts in the old form: each token goes to one of them."""

    def __init__(self, experts: list[nn.Module], width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        share, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * share[rows, None])
        return out.view_as(hidden)


def without_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_config: Any) -> PreTrainedModel:
        raise UserError("a tiny twin of LlamaConfig cannot be built")

    monkeypatch.setattr(rehearsal, "twin_model", refuse)


def test_list_of_experts_is_folded_as_one_and_proven_on_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_twin(monkeypatch)
    model = tiny("llama").double()
    for layer in find_layers(model).layers:
        layer.mlp = Routed([copy.deepcopy(layer.mlp) for _ in range(3)], 32).double()
        with torch.no_grad():
            for parameter in layer.mlp.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    student = find_layers(model)
    before = copy.deepcopy(model.state_dict())
    seam, found = rehearse(student, START, CANDIDATES)
    assert found.keys() == {"linear", "ridge"}  # the last to add is an expert
    assert kinds(seam) == {"self_attn.o_proj": "Linear", "mlp.experts.*.down_proj": "Linear"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_without_a_twin_is_proven_itself_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    without_a_twin(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(rehearsal, "say", said.append)
    assert rehearse(find_layers(tiny("llama").to(dtype)), START, CANDIDATES)[1] == {}
    assert ["no tiny twin of LlamaForCausalLM" in line for line in said] == [True]


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_under_a_scale_and_come_apart_under_a_rotation(tied: bool) -> None:
    model = tiny("llama", tie_word_embeddings=tied)
    decoder, size, same = find_layers(model), num_parameters(model), model.lm_head.weight
    seam = find_seam(decoder, START)
    with contextlib.ExitStack() as undo:
        fold(decoder, seam, Repair(alpha=1.3), Rewriter(undo))
        assert (is_tied(model), num_parameters(model), model.config.tie_word_embeddings) == (tied, size, tied)
    with contextlib.ExitStack() as undo:
        fold(decoder, seam, Repair(1.3, random_turn(32)), Rewriter(undo))
        assert not is_tied(model)
        assert not model.config.tie_word_embeddings
        assert num_parameters(model) == size + tied * 97 * 32
    assert model.lm_head.weight is same
    assert (is_tied(model), num_parameters(model), model.config.tie_word_embeddings) == (tied, size, tied)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"),
    by_tier(
        product(["llama", "qwen3", "recurrent_gemma"], ["scalar", "rotation"]),
        everyday=[("llama", "rotation"), ("qwen3", "scalar"), ("recurrent_gemma", "rotation")],
    ),
)
def test_folded_checkpoint_loads_with_the_same_logits(tmp_path: Path, family: str, name: str) -> None:
    tied = {"tie_word_embeddings": True}
    decoder, ids = find_layers(tiny(family, **tied)), tokens(2)
    repair = Repair(1.3, random_turn(32) if name == "rotation" else None)
    seam = find_seam(decoder, START)
    wanted = inserted_logits(decoder, seam, repair, ids)
    fold(decoder, seam, repair, Rewriter(contextlib.ExitStack()))
    folded = decoder.model(ids, use_cache=False).logits
    save_decoder(decoder.model, None, tmp_path / "folded")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(loaded(ids, use_cache=False).logits, folded)
    assert mean_kl(wanted, folded).max() < 1e-6
    assert is_tied(loaded) == (name == "scalar")
    assert num_parameters(loaded) == num_parameters(decoder.model)


@torch.no_grad()
def test_folded_weights_are_rounded_to_the_format_they_are_saved_in() -> None:
    decoder = find_layers(tiny("llama"))
    fold(decoder, find_seam(decoder, START), Repair(1.3), Rewriter(contextlib.ExitStack(), torch.bfloat16))
    changed, kept = decoder.layers[5].mlp.down_proj.weight, decoder.layers[5].mlp.up_proj.weight
    assert changed.dtype == torch.float32
    assert torch.equal(changed, changed.bfloat16().float())
    assert not torch.equal(kept, kept.bfloat16().float())


@torch.no_grad()
@pytest.mark.parametrize("name", ["scalar", "rotation", "linear"])
def test_16_bit_weights_are_folded_up_to_rounding(name: str) -> None:
    decoder, ids = find_layers(tiny("llama").bfloat16()), tokens(2)
    turn, change = random_turn(32), 0.1 * random_matrix(32, 32)
    repair = {"scalar": Repair(1.3), "rotation": Repair(1.3, turn), "linear": Repair(outputs_DD=change)}[name]
    seam = find_seam(decoder, START)
    plain = decoder.model(ids, use_cache=False).logits
    with inserted(decoder, seam, repair):
        wanted = decoder.model(ids, use_cache=False).logits
    fold(decoder, seam, repair, Rewriter(contextlib.ExitStack()))
    folded = decoder.model(ids, use_cache=False).logits
    assert folded.dtype == torch.bfloat16
    assert relative_difference(folded, wanted) < 0.03 < 3 * relative_difference(plain, wanted)


def test_large_weights_are_rewritten_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = decoder_of("gpt2"), decoder_of("gpt2")
    seam = find_seam(whole, START)
    change = random_matrix(4 * 32 + 1, 32)
    fold(whole, seam, Repair(inputs_ED=change), Rewriter(contextlib.ExitStack()))
    monkeypatch.setattr("layerscalpel.fold.NUMBERS_AT_ONCE", 100)
    fold(parts, seam, Repair(inputs_ED=change), Rewriter(contextlib.ExitStack()))
    assert all(
        torch.equal(one, other) for one, other in zip(*(d.model.parameters() for d in (whole, parts)), strict=True)
    )
