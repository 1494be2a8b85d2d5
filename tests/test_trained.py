"""Each method changes what it names and nothing else, and leaves a plain model behind."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from families import TOKENS, VOCAB, tiny
from healing import QUICK, TRAIN, by_tier, changed_in, cut_apart, heal, logits_of, parent_of, state_of, total
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

from layerscalpel.cut import cut_model
from layerscalpel.errors import UserError
from layerscalpel.expand import expanded
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import HealName, HealSettings
from layerscalpel.trained import adapters, last_layers, seam_endpoints, seam_layers

FAMILIES = ("llama", "gemma3_text", "gpt2", "bloom", "qwen3_moe")
METHODS: tuple[HealName, ...] = ("endpoint", "lora", "last", "all")
CHILD = Segment(4, 6, 8)


def num_linears(family: str, layers: range) -> int:
    """Return how many linear layers there are in some layers; the experts of a mixture are none."""
    if family == "qwen3_moe":
        return sum(7 if i in (0, 3) else 4 for i in layers)  # two are dense
    return len(layers) * {"llama": 7, "gemma3_text": 7, "gpt2": 4, "bloom": 4}[family]


def after_the_layers(student: Decoder) -> set[str]:
    """Return the names of the final norm's tensors, and of a head of its own."""
    names = {"llama": ("model.norm.", "lm_head."), "gemma3_text": ("model.norm.",), "gpt2": ("transformer.ln_f.",)}
    names |= {"bloom": ("transformer.ln_f.",), "qwen3_moe": ("model.norm.", "lm_head.")}
    starts = names[student.model.config.model_type]
    return {name for name in student.model.state_dict() if name.startswith(starts)}


def named_by(method: HealName, student: Decoder) -> set[str]:
    """Return the names of the tensors that a method may change, of a model cut at 4."""
    layers = {"endpoint": (3, 4), "last": (3, 4, 5)}.get(method, range(6))
    state = student.model.state_dict()
    found = {name for name in state if name.startswith(tuple(f"{student.path}.{i}." for i in layers))}
    if method == "lora":
        linear = ("proj", "c_attn", "c_fc", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
        found = {name for name in found if name.endswith(tuple(f"{part}.weight" for part in linear))}
    return found | (after_the_layers(student) if method == "last" else set())


@pytest.mark.parametrize(
    ("method", "family"),
    by_tier(
        product(METHODS, FAMILIES),
        everyday=[
            *(("endpoint", family) for family in ("gemma3_text", "qwen3_moe")),
            *(("lora", family) for family in ("gpt2", "qwen3_moe")),
            *(("last", family) for family in ("llama", "bloom")),
            ("all", "llama"),
        ],
    ),
)
def test_a_method_changes_what_it_names_learns_and_leaves_a_plain_model(
    method: HealName, family: str, tmp_path: Path
) -> None:
    student, parent = cut_apart(family, CHILD), parent_of(family)
    before, parents, names = state_of(student), state_of(parent), list(dict(student.model.named_parameters()))
    settings = replace(QUICK, method=method, lr=5e-3, epochs=6, batch_size=5, micro_batch_size=3)
    result = heal(student, tmp_path, settings, family=family, seam=4, validation=TRAIN)
    assert total(result.validation[-1]) < 0.95 * total(result.validation[0])
    assert result.best_step == result.steps
    assert changed_in(student, before) == named_by(method, student)
    assert changed_in(parent, parents) == set()
    assert list(student.model.state_dict()) == list(before)
    assert list(dict(student.model.named_parameters())) == names
    require_plain(student)
    student.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(TRAIN.tokens, use_cache=False).logits, logits_of(student))


def require_plain(student: Decoder) -> None:
    """Nothing that training added is left in the model."""
    model = student.model
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any("lora" in type(module).__module__ for module in model.modules())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(layer) for layer in student.layers)
    assert not hasattr(model, "peft_config")
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapters_compute_what_they_computed_before(family: str) -> None:
    student = cut_apart(family, CHILD)
    plain = logits_of(student)
    with adapters(student, [4], HealSettings(lora_rank=2)) as trained:
        assert torch.equal(logits_of(student), plain)
        assert len(trained.parameters) == 2 * num_linears(family, range(6))
        assert all(min(parameter.shape) == 2 for parameter in trained.parameters)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trained.parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        unmerged = logits_of(student)
    assert (unmerged - plain).abs().max() > 0.1
    torch.testing.assert_close(logits_of(student), unmerged, rtol=1e-5, atol=1e-5)
    require_plain(student)


def test_adapters_begin_alike_and_disturb_nobodys_random_numbers() -> None:
    begun = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.random.get_rng_state()
        with adapters(cut_apart(), [3], HealSettings()) as trained:
            begun.append([parameter.detach().clone() for parameter in trained.parameters])
        assert torch.equal(torch.random.get_rng_state(), expected)
    assert all(torch.equal(one, other) for one, other in zip(*begun, strict=True))


def test_lora_without_its_library_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(UserError, match=r"LoRA needs peft - pip install layerscalpel\[lora\]"):
        heal(cut_apart(), tmp_path, replace(QUICK, method="lora"))


@pytest.mark.parametrize(
    ("num_layers", "seam", "width", "expected"),
    [
        (6, 3, 1, [2, 3]),
        (6, 3, 2, [1, 2, 3, 4]),
        (6, 0, 1, [0]),
        (6, 6, 1, [5]),
        (6, 6, 2, [4, 5]),
        (6, 1, 2, [0, 1, 2]),
        (6, 3, 9, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_seam_layers_are_those_beside_the_seam(num_layers: int, seam: int, width: int, expected: list[int]) -> None:
    assert list(seam_layers(num_layers, seam, width)) == expected


@pytest.mark.parametrize(
    ("seams", "width", "said"),
    [
        ([3], 3, ""),
        ([0], 3, ""),
        ([6], 3, ""),
        ([3], 4, "heal.width=4, but only 3 layers stand on one side of a seam: all are trained"),
        ([1], 2, "heal.width=2, but only 1 layers stand"),
        ([5], 2, "heal.width=2, but only 1 layers stand"),
        ([0], 7, "heal.width=7, but only 6 layers stand"),
        ([1, 4], 2, "heal.width=2, but only 1 layers stand"),
    ],
)
def test_a_width_beyond_the_model_is_said_once(
    seams: list[int], width: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    student = cut_apart()
    with seam_endpoints(student, seams, HealSettings(width=width)) as trained:
        assert trained.layers == sorted({i for seam in seams for i in seam_layers(6, seam, width)})
    told = capsys.readouterr().err
    assert told.count("heal.width") == bool(said)
    assert said in told


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_last_layers_train_norm_and_head_but_no_tied_head(
    family: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = find_layers(tiny(family, tie_word_embeddings=tied))
    student = find_layers(cut_model(parent, CHILD)[0])
    before = state_of(student)
    with last_layers(student, [4], HealSettings(last_layers=1)) as trained:
        chosen = {id(parameter) for parameter in trained.parameters}
    found = {name for name, parameter in student.model.named_parameters() if id(parameter) in chosen}
    outside = {name for name in found if not name.startswith(f"{student.path}.5.")}
    norm = {
        "llama": {"model.norm.weight"},
        "opt": {f"model.decoder.{n}" for n in ("final_layer_norm.weight", "final_layer_norm.bias")}
        | {"model.decoder.project_out.weight"},
    }[family]
    assert outside == norm | (set() if tied else {"lm_head.weight"})
    assert ("the head is tied to the embedding" in capsys.readouterr().err) == tied
    assert changed_in(student, before) == set()
    require_plain(student)


def test_more_last_layers_than_there_are_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with last_layers(cut_apart(), [3], HealSettings(last_layers=9)) as trained:
        assert (trained.layers, trained.boundary) == ([0, 1, 2, 3, 4, 5], 0)
    assert "heal.last_layers=9, but there are 6 layers: all are trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "times", "dtype"),
    by_tier(
        product(FAMILIES, [1, 2], [torch.float32, torch.bfloat16]),
        everyday=[
            ("llama", 1, torch.float32),
            ("llama", 2, torch.bfloat16),
            ("gemma3_text", 2, torch.float32),
            ("gpt2", 1, torch.bfloat16),
            ("gpt2", 2, torch.float32),
            ("bloom", 2, torch.bfloat16),
            ("qwen3_moe", 1, torch.float32),
        ],
    ),
)
def test_expanded_layers_compute_what_they_did_and_are_multiplied_out_exactly(
    family: str, times: int, dtype: torch.dtype
) -> None:
    student = cut_apart(family, CHILD, dtype)
    before, layers, plain = state_of(student), list(student.layers[3:5]), logits_of(student)
    names = list(dict(student.model.named_parameters()))
    with expanded(student.model, layers, times):
        factors = [p for layer in layers for n, p in layer.named_parameters() if ".original" in n]
        assert len(factors) == 2 * num_linears(family, range(3, 5))
        assert all(factor.dtype == torch.float32 for factor in factors)
        rounding = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]  # a last bit of a weight here and there
        torch.testing.assert_close(logits_of(student), plain, rtol=rounding, atol=rounding * float(plain.std()))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for factor in factors:
                factor.mul_(1 + 0.1 * torch.randn(factor.shape, generator=draw))
        inside = logits_of(student)
    assert torch.equal(logits_of(student), inside)
    assert not torch.equal(inside, plain)
    assert list(student.model.state_dict()) == list(before)
    assert list(dict(student.model.named_parameters())) == names
    assert all(value.dtype == dtype for name, value in student.model.state_dict().items() if value.is_floating_point())
    assert len(changed_in(student, before)) == num_linears(family, range(3, 5))


@pytest.mark.parametrize("times", [1, 2])
def test_both_factors_of_an_expanded_layer_get_gradients(times: int) -> None:
    linear = nn.Linear(5, 7)
    weight, given = linear.weight.detach().clone(), torch.randn(3, 5)
    with expanded(linear, [linear], times):
        first, second = linear.parametrizations.weight.parameters()  # type: ignore[union-attr]
        assert (first.shape, second.shape) == ((7, 5 * times), (5 * times, 5))
        torch.testing.assert_close(linear(given), given @ weight.T + linear.bias)
        linear(given).square().sum().backward()
        assert all(factor.grad is not None and factor.grad.abs().max() > 0 for factor in (first, second))
        if times == 2:  # the further columns of the first are 0, so their gradient needs rows that are not
            assert first.grad[:, 5:].abs().max() > 0
    torch.testing.assert_close(linear.weight, weight)
    assert isinstance(linear.weight, nn.Parameter)


def test_shared_weights_stay_shared_and_are_not_expanded(capsys: pytest.CaptureFixture[str]) -> None:
    student = cut_apart()
    first, second = student.layers[3].mlp, student.layers[4].mlp
    second.up_proj.weight = first.up_proj.weight
    plain = logits_of(student)
    with expanded(student.model, student.layers[3:5], 1):
        assert not parametrize.is_parametrized(first.up_proj)
        assert parametrize.is_parametrized(first.down_proj)
        torch.testing.assert_close(logits_of(student), plain, rtol=1e-5, atol=1e-5)
    assert second.up_proj.weight is first.up_proj.weight
    assert "2 linear layers share their weight, which heal.expand leaves as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "family"),
    by_tier(
        product(["endpoint", "all", "last"], ["llama", "gpt2"]),
        everyday=[("endpoint", "llama"), ("all", "gpt2"), ("last", "llama")],
    ),
)
def test_expanded_healing_learns_and_leaves_a_plain_model(method: HealName, family: str, tmp_path: Path) -> None:
    student = cut_apart(family, CHILD)
    before = state_of(student)
    settings = replace(QUICK, method=method, expand=2, lr=3e-3, epochs=6, batch_size=5, micro_batch_size=5)
    result = heal(student, tmp_path, settings, family=family, seam=4, validation=TRAIN)
    assert total(result.validation[-1]) < 0.95 * total(result.validation[0])
    assert changed_in(student, before) == named_by(method, student)
    assert list(student.model.state_dict()) == list(before)
    require_plain(student)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_healed_model_writes_as_before(family: str, tmp_path: Path) -> None:
    student = cut_apart(family, CHILD)
    heal(student, tmp_path, replace(QUICK, method="lora", epochs=1, validations=1), family=family, seam=4)
    asked = torch.tensor([[5, 6, 7]])
    written = student.model.generate(asked, max_new_tokens=4, do_sample=False, pad_token_id=TOKENS["pad_token_id"])
    ids = asked
    for _ in range(written.shape[1] - 3):
        ids = torch.cat([ids, student.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert isinstance(written, Tensor)
    assert torch.equal(written, ids)
    assert int(written.max()) < VOCAB
