"""Every term of the loss, and its gradient, is that of the whole models; what is kept of the parent changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from families import VOCAB, tiny
from healing import (
    QUICK,
    SEGMENT,
    TRAIN,
    by_tier,
    cut_apart,
    heal,
    healed,
    naive_terms,
    packed,
    parent_of,
    plan_of,
    prepared,
    terms_of,
    total,
)
from planted import random_blocks
from torch import Tensor

from layerscalpel import losses
from layerscalpel.frozen import Batch
from layerscalpel.heal import heal_model
from layerscalpel.hooks import hidden_at
from layerscalpel.layers import Decoder
from layerscalpel.losses import kl_to_parent, top_k_kl
from layerscalpel.objectives import asks_parent, weights_of
from layerscalpel.probe import find_layers, keeps_documents_apart
from layerscalpel.segment import Segment
from layerscalpel.settings import HealSettings, Objective, TeacherName

FAMILIES = ("llama", "gemma3_text", "gpt2", "bloom", "opt", "qwen3_moe")
APART = ("llama", "gpt2", "qwen2", "gemma2", "qwen3_moe")
"""Families that keep documents apart by their position ids."""
JOINED = ("bloom", "opt", "jamba", "lfm2", "recurrent_gemma")
"""Families that cannot: no position ids, or a state that goes from token to token."""
OBJECTIVES: tuple[Objective, ...] = ("ce", "kl", "both", "seam", "end")
ALL = HealSettings(objective="both", seam_weight=0.7, end_weight=0.4, kl_weight=2.0)
CHILD = Segment(4, 6, 8)
ONCE = replace(QUICK, epochs=1, validations=1)


def gradients_of(student: Decoder, layers: tuple[int, ...]) -> list[Tensor | None]:
    return [parameter.grad for i in layers for parameter in student.layers[i].parameters()]


def require_close(found: list[Tensor | None], wanted: tuple[Tensor | None, ...]) -> None:
    for gradient, other in zip(found, wanted, strict=True):
        if other is None or not other.any():  # an expert that no token came to
            assert gradient is None or not gradient.any()
        else:
            assert gradient is not None
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (HealSettings(), {"ce": 1}),
        (HealSettings(objective="kl", kl_weight=3.0), {"kl": 1}),
        (HealSettings(objective="both", kl_weight=3.0), {"ce": 1, "kl": 3}),
        (HealSettings(objective="both", kl_weight=0.0), {"ce": 1}),
        (HealSettings(objective="seam"), {"seam": 1}),
        (HealSettings(objective="seam", seam_weight=0.5, end_weight=2.0), {"seam": 1.5, "end": 2}),
        (HealSettings(objective="end"), {"end": 1}),
        (HealSettings(seam_weight=0.1), {"ce": 1, "seam": 0.1}),
    ],
)
def test_settings_name_terms_and_weights(settings: HealSettings, expected: dict[str, float]) -> None:
    assert weights_of(settings) == expected
    assert asks_parent(settings) == (set(expected) != {"ce"})


@pytest.mark.parametrize(
    ("family", "objective"),
    by_tier(
        product(FAMILIES, [*OBJECTIVES, "all"]),
        everyday=[
            *((family, "all") for family in FAMILIES),
            ("opt", "ce"),
            ("gpt2", "kl"),
            ("gemma3_text", "both"),
            ("bloom", "seam"),
            ("qwen3_moe", "end"),
            ("llama", "end"),
        ],
    ),
)
def test_terms_and_gradients_equal_those_of_the_whole_models(family: str, objective: str, tmp_path: Path) -> None:
    student, parent, trained = cut_apart(family, CHILD), parent_of(family), (3, 4)
    settings = ALL if objective == "all" else HealSettings(objective=objective)  # type: ignore[arg-type]
    plan, blocks = plan_of(student, parent, settings, 3, 5), TRAIN.first(2)
    parameters = [parameter for i in trained for parameter in student.layers[i].parameters()]
    naive = naive_terms(student, parent, 5, blocks.tokens, blocks.labelled)
    weights = weights_of(settings)
    wanted = sum(weight * naive[name] / (32.0 if name == "seam" else 17.0) for name, weight in weights.items())
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    with prepared(student, parent, settings, tmp_path, plan=plan, blocks=blocks) as (loss, frozen):
        student.model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            found = loss(frozen.batch(torch.arange(2)), num_labelled=17.0, num_tokens=32.0)
    assert {name: value.item() for name, value in found.items()} == {
        name: pytest.approx(naive[name].item() / (32.0 if name == "seam" else 17.0), rel=1e-4) for name in weights
    }
    assert float(loss.total(found)) == pytest.approx(wanted.item(), rel=1e-4)
    require_close([parameter.grad for parameter in parameters], gradients)


@pytest.mark.parametrize(
    ("family", "objective", "chunk"),
    by_tier(
        product(["llama", "gpt2"], ["ce", "kl", "both"], [VOCAB, 7]),
        everyday=[("gpt2", "ce", 7), ("llama", "kl", 7), ("gpt2", "both", 7), ("llama", "both", VOCAB)],
    ),
)
def test_chunks_change_nothing(
    family: str, objective: Objective, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * VOCAB * chunk)
    student, parent, settings = cut_apart(family, CHILD), parent_of(family), HealSettings(objective=objective)
    naive = naive_terms(student, parent, 5, TRAIN.tokens, TRAIN.labelled)
    wanted = sum(naive[name] for name in weights_of(settings))
    gradients = torch.autograd.grad(wanted, list(student.layers[3].parameters()))
    plan = plan_of(student, parent, settings, 3, 5)
    with prepared(student, parent, settings, tmp_path, plan=plan) as (loss, frozen), torch.enable_grad():
        found = loss.total(loss(frozen.batch(torch.arange(5)), 1.0, 1.0))
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    for parameter, gradient in zip(student.layers[3].parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_does_not_differ_from_itself(family: str, tmp_path: Path) -> None:
    parent = parent_of(family)
    student = find_layers(copy.deepcopy(parent.model))
    settings = replace(ALL, objective="both")
    with prepared(student, parent, settings, tmp_path, plan=plan_of(student, parent, settings, 3, 5)) as (loss, frozen):
        terms = terms_of(loss, frozen.batch(torch.arange(2)))
    rounding = 1e-5 if family == "qwen3_moe" else 0  # tokens meet other ones at an expert in a batch of another size
    assert [terms[name] for name in ("kl", "seam", "end")] == pytest.approx([0, 0, 0], abs=rounding, rel=0)
    assert terms["ce"] > 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_more_labelled_positions_than_the_models_context(family: str, tmp_path: Path) -> None:
    blocks = random_blocks(4, length=60)  # 236 targets, a context of 128
    student, parent, settings = cut_apart(family), parent_of(family), HealSettings(objective="both", end_weight=1.0)
    for teacher in ("hidden", "topk"):
        asked = replace(settings, teacher=teacher, teacher_top_k=VOCAB)
        plan = plan_of(student, parent, asked, 2, 4)
        with prepared(student, parent, asked, tmp_path, plan=plan, blocks=blocks) as (loss, frozen), torch.no_grad():
            naive = naive_terms(student, parent, 4, blocks.tokens, blocks.labelled)
            found = terms_of(loss, frozen.batch(torch.arange(4)))
        assert found == {name: pytest.approx(naive[name].item(), rel=1e-4) for name in found}


def test_blocks_without_labels_add_nothing(tmp_path: Path) -> None:
    student, parent = cut_apart(), parent_of("llama")
    none = replace(TRAIN, labelled=torch.zeros_like(TRAIN.labelled))
    for teacher in ("hidden", "topk", "online"):
        settings = HealSettings(objective="both", end_weight=1.0, teacher=teacher)
        plan = plan_of(student, parent, settings, 2, 4)
        made = prepared(student, parent, settings, tmp_path, plan=plan, blocks=none)
        with made as (loss, frozen), torch.enable_grad():
            terms = loss(frozen.batch(torch.arange(2)), 1.0, 1.0)
        assert {name: float(value) for name, value in terms.items()} == {"ce": 0, "kl": 0, "end": 0}


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_what_is_kept_of_the_parent_does_not_change_the_loss(family: str, tmp_path: Path) -> None:
    student, parent = cut_apart(family), parent_of(family)
    found = {}
    for teacher in ("hidden", "topk", "online"):
        settings = replace(ALL, teacher=teacher, teacher_top_k=VOCAB)
        plan = plan_of(student, parent, settings, 2, 4)
        with prepared(student, parent, settings, tmp_path, plan=plan) as (loss, frozen):
            found[teacher] = terms_of(loss, frozen.batch(torch.tensor([4, 1])))
    assert found["hidden"] == pytest.approx(found["online"], rel=1e-6)
    assert found["topk"] == pytest.approx(found["hidden"], rel=1e-5)  # all probabilities are kept


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float16"])
def test_a_coarser_cache_changes_the_loss_by_two_percent_at_most(cache_dtype: str, tmp_path: Path) -> None:
    found = {}
    for dtype in ("float32", cache_dtype):
        settings = replace(ALL, cache_dtype=dtype)
        student, parent = cut_apart(), parent_of("llama")
        plan = plan_of(student, parent, settings, 2, 4)
        with prepared(student, parent, settings, tmp_path, plan=plan) as (loss, frozen):
            found[dtype] = terms_of(loss, frozen.batch(torch.arange(5)))
    assert found[cache_dtype] != found["float32"]
    assert found[cache_dtype] == pytest.approx(found["float32"], rel=2e-2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_kl_of_the_largest_probabilities_is_at_most_the_whole_one(seed: int, sharpness: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, 11, VOCAB, generator=draw)
    parent, own_logits = logits[0].log_softmax(-1), logits[1].requires_grad_(True)
    own = own_logits.log_softmax(-1)
    whole = kl_to_parent(parent, own)
    last = torch.zeros(11)
    for k in (1, 5, 40, VOCAB - 1, VOCAB):
        top = parent.topk(k)
        found = top_k_kl(top.values, top.indices, own)
        assert (found <= whole + 1e-4 * (1 + whole)).all()
        assert (found >= last - 1e-4 * (1 + last)).all()  # the more is kept, the nearer to the whole
        (gradient,) = torch.autograd.grad(found.sum(), own_logits, retain_graph=True)
        assert gradient.isfinite().all()
        last = found.detach()
    torch.testing.assert_close(last, whole.detach(), rtol=1e-5, atol=1e-5)
    exact = torch.autograd.grad(whole.sum(), own_logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("certain", [40.0, 200.0])
def test_gradients_are_finite_where_one_token_has_all_probability(certain: float) -> None:
    parent, own = torch.randn(3, VOCAB), torch.randn(3, VOCAB)
    parent[:, 7], own[:, 9] = certain, certain
    own.requires_grad_(True)
    top = parent.log_softmax(-1).topk(4)
    found = top_k_kl(top.values, top.indices, own.log_softmax(-1))
    (gradient,) = torch.autograd.grad(found.sum(), own)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


def test_the_first_losses_of_a_healing_combine_by_their_weights(tmp_path: Path) -> None:
    first = {}
    for settings in (*(replace(ONCE, objective=objective) for objective in OBJECTIVES), replace(ONCE, **_weights())):
        result = heal(cut_apart(), tmp_path, settings)
        key = settings.objective if not settings.seam_weight else "all"
        first[key] = [total(rows[0]) for rows in (result.train, result.validation)]
    for place in (0, 1):
        terms = {name: values[place] for name, values in first.items()}
        assert terms["both"] == pytest.approx(terms["ce"] + terms["kl"], rel=1e-6)
        assert terms["all"] == pytest.approx(
            terms["ce"] + 2 * terms["kl"] + 0.7 * terms["seam"] + 0.4 * terms["end"], rel=1e-5
        )
        assert min(terms.values()) > 0.01


def _weights() -> dict[str, object]:
    return {name: getattr(ALL, name) for name in ("objective", "kl_weight", "seam_weight", "end_weight")}


def test_held_out_terms_are_told_one_by_one_and_errors_have_no_nats(tmp_path: Path) -> None:
    rows = heal(cut_apart(), tmp_path, replace(QUICK, **_weights())).validation
    for row in rows:
        parts = row["ce_nats"] + 2 * row["kl_nats"] + 0.7 * row["seam_error"] + 0.4 * row["end_error"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert set(healed()[0].validation[0]) == {"step", "loss_nats"}
    assert set(heal(cut_apart(), tmp_path, replace(ONCE, objective="end")).train[0]) == {"step", "loss", "lr"}


@pytest.mark.parametrize("teacher", ["hidden", "topk", "online"])
def test_last_layers_are_compared_with_the_parent_from_its_own_tokens_on(teacher: TeacherName, tmp_path: Path) -> None:
    student, parent = cut_apart(), parent_of("llama")
    settings = replace(ONCE, method="last", objective="both", end_weight=1.0, teacher=teacher, teacher_top_k=VOCAB)
    naive = naive_terms(student, parent, 6, TRAIN.tokens, TRAIN.labelled)
    wanted = sum(float(naive[name]) for name in ("ce", "kl", "end")) / int(TRAIN.labelled.sum())
    result = heal(student, tmp_path, settings, validation=TRAIN)
    assert result.layers == [3, 4, 5]
    assert total(result.validation[0]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "teacher"),
    by_tier(
        product(APART, ["hidden", "online"]),
        everyday=[
            ("llama", "hidden"),
            ("llama", "online"),
            ("gpt2", "online"),
            ("qwen2", "hidden"),
            ("gemma2", "online"),
            ("qwen3_moe", "hidden"),
        ],
    ),
)
def test_packed_documents_have_the_loss_and_gradient_of_documents_alone(
    family: str, teacher: TeacherName, tmp_path: Path
) -> None:
    student, parent, settings = cut_apart(family, CHILD), parent_of(family), replace(ALL, teacher=teacher)
    assert keeps_documents_apart(student)
    blocks = packed(TRAIN.first(2), [3, 4, 9])
    parameters = list(student.layers[3].parameters())
    documents = [(part, naive_of(student, parent, blocks, part)) for part in (slice(0, 3), slice(3, 7), slice(7, 16))]
    wanted = {name: sum(terms[name] for _, terms in documents) for name in weights_of(settings)}
    weighted = sum(weight * wanted[name] for name, weight in weights_of(settings).items())
    gradients = torch.autograd.grad(weighted, parameters, allow_unused=True)
    plan = plan_of(student, parent, settings, 3, 5, apart=True)
    made = prepared(student, parent, settings, tmp_path, plan=plan, blocks=blocks)
    with made as (loss, frozen), torch.enable_grad():
        found = loss(frozen.batch(torch.arange(2)), 1.0, 1.0)
    assert {n: float(v) for n, v in found.items()} == {n: pytest.approx(float(v), rel=1e-4) for n, v in wanted.items()}
    require_close([parameter.grad for parameter in parameters], gradients)


def naive_of(student: Decoder, parent: Decoder, blocks, part: slice) -> dict[str, Tensor]:
    return naive_terms(student, parent, 5, blocks.tokens[:, part], blocks.labelled[:, part])


@pytest.mark.parametrize("family", JOINED)
def test_families_that_cannot_keep_documents_apart_are_found_out(family: str) -> None:
    model = tiny(family)
    if family == "jamba":
        model.config.use_cache = False
    assert not keeps_documents_apart(find_layers(model))


@pytest.mark.parametrize(
    ("family", "separate", "expected"),
    [("llama", True, "apart"), ("llama", False, "joined"), ("bloom", True, "joined")],
)
def test_result_says_whether_documents_were_kept_apart(
    family: str, separate: bool, expected: str, tmp_path: Path
) -> None:
    blocks, settings = packed(TRAIN, [6, 10]), replace(ONCE, objective="both", separate_documents=separate)
    result = heal(cut_apart(family), tmp_path, settings, family=family, blocks=blocks, validation=blocks)
    assert result.documents == expected
    joined = heal(cut_apart(family), tmp_path, settings, family=family, blocks=replace(blocks, positions=None))
    assert joined.documents == "one"
    same = total(result.train[0]) == pytest.approx(total(joined.train[0]), rel=1e-6)
    assert same == (expected == "joined")


def test_a_seam_at_the_end_of_the_model_is_compared_after_its_last_layer(tmp_path: Path) -> None:
    segment = Segment(6, 8, 8)
    student, parent = cut_apart(segment=segment), parent_of("llama")
    naive = naive_terms(student, parent, 6, TRAIN.tokens, TRAIN.labelled)
    result = heal(student, tmp_path, replace(ONCE, objective="seam"), seam=6, validation=TRAIN)
    assert total(result.validation[0]) == pytest.approx(float(naive["seam"]) / TRAIN.tokens.numel(), rel=1e-4)


def test_hidden_states_below_the_seam_are_no_part_of_the_gradient(tmp_path: Path) -> None:
    student, parent = cut_apart(), parent_of("llama")
    assert SEGMENT.start == 3
    settings = HealSettings(objective="seam")
    with prepared(student, parent, settings, tmp_path, plan=plan_of(student, parent, settings, 2, 4)) as (loss, frozen):
        batch = frozen.batch(torch.arange(2))
        assert isinstance(batch, Batch)
        assert batch.hidden_BTD is not None
        torch.testing.assert_close(batch.hidden_BTD, hidden_at(student, batch.sent.tokens_BT, 2), rtol=1e-5, atol=1e-5)
        with torch.enable_grad():
            loss(batch, 1.0, 1.0)
    asked = [i for i in range(6) if any(p.grad is not None and p.grad.any() for p in student.layers[i].parameters())]
    assert asked == [2, 3]  # those after the seam get none either: the error is taken before them


def test_layers_behind_the_seam_are_not_run_for_its_error_alone(tmp_path: Path) -> None:
    student, parent, settings = cut_apart(), find_layers(tiny("llama")), replace(ONCE, objective="seam")
    run: list[int] = []
    for model in (student, parent):
        for i in range(4, 6) if model is student else range(6, 8):
            model.layers[i].register_forward_hook(lambda *_, i=i: run.append(i))
    heal_model(student, parent, [3], TRAIN, TRAIN, settings, seed=0, scratch=tmp_path)
    assert run == []
