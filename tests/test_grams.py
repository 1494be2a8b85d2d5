"""The sums of one pass are those of the stated hidden states, and what is solved from them is the least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny, tokens
from planted import one_by_one
from torch import Tensor

from layerscalpel import grams
from layerscalpel.grams import (
    Grams,
    LeastSquares,
    Projection,
    accumulate,
    best_rotation,
    best_scale,
    ridge_change,
    sums_device,
)
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment

SEGMENT = Segment(3, 5, 8)
LAST = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2"}
EXACT = {"rtol": 1e-8, "atol": 1e-9}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(count: int = 200, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return (features, given, wanted) [M, D] in float64."""
    features, noise, given = torch.randn(3, count, width, dtype=torch.float64, generator=generator())
    planted = torch.randn(width, width, dtype=torch.float64, generator=generator(1))
    return features, given, given + features @ planted + 0.3 * noise


def fit_of(features: Tensor, given: Tensor, wanted: Tensor) -> LeastSquares:
    sums = Grams.empty(given.shape[1], {"linear": features.shape[1]}, torch.device("cpu"))
    for f, x, y in zip(features.split(64), given.split(64), wanted.split(64), strict=True):
        sums.add(x, y, {"linear": f})
    return sums.fits["linear"]


def weighted_lstsq(features: Tensor, change: Tensor, wanted: Tensor, damping: float = 0.0) -> Tensor:
    """Solve for f C = change directly, tokens weighted with 1 / |wanted|; the ridge stands as rows of its own."""
    root = (1 / wanted.norm(dim=-1, keepdim=True)).sqrt()
    count, width = features.shape[1], change.shape[1]
    extra = damping**0.5 * torch.eye(count, dtype=torch.float64)
    rows, targets = torch.cat([root * features, extra]), torch.cat([root * change, torch.zeros(count, width)])
    return torch.linalg.lstsq(rows, targets, driver="gelsd").solution


@torch.no_grad()
def explicit(model: Any, family: str, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, y, and the last projection's inputs and outputs, all [M, ..] and collected by plain hooks."""
    seen: list[Tensor] = []
    module = find_layers(model).layers[2].get_submodule(LAST[family])
    handle = module.register_forward_hook(lambda _module, args, output: seen.extend((args[0], output)))
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return tuple(rows.flatten(0, -2).double() for rows in (states[3], states[5], *seen[-2:]))


@pytest.fixture(scope="module", params=list(LAST))
def seen(request: pytest.FixtureRequest) -> tuple[Grams, tuple[Tensor, ...], bool]:
    """Sums of one pass, what they are sums of, and whether the projection has a bias."""
    model, ids = tiny(request.param).double(), tokens(12)
    decoder = find_layers(model)
    module = decoder.layers[2].get_submodule(LAST[request.param])
    sums = accumulate(decoder, SEGMENT, ids, Projection(module, 1.0, ("linear", "ridge")))
    assert sums.num_tokens == 12 * 16
    assert not any(part._forward_hooks for part in model.modules())
    return sums, explicit(model, request.param, ids), module.bias is not None


def test_scale_equals_least_squares(seen: Any) -> None:
    sums, (given, wanted, *_), _ = seen
    root = (1 / wanted.norm(dim=-1, keepdim=True)).sqrt()
    naive = torch.linalg.lstsq((root * given).reshape(-1, 1), (root * wanted).reshape(-1, 1)).solution
    assert best_scale(sums) == pytest.approx(naive.item(), rel=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_linear_equals_least_squares(seen: Any, ridge: float) -> None:
    sums, (given, wanted, _, outputs), _ = seen
    fit = sums.fits["linear"]
    naive = weighted_lstsq(outputs, wanted - given, wanted, ridge * float(fit.inner_EE.diagonal().mean()))
    torch.testing.assert_close(ridge_change(fit, ridge), naive, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_ridge_refit_equals_least_squares(seen: Any, ridge: float) -> None:
    sums, (given, wanted, inputs, _), biased = seen
    features = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1) if biased else inputs
    fit = sums.fits["ridge"]
    naive = weighted_lstsq(features, wanted - given, wanted, ridge * float(fit.inner_EE.diagonal().mean()))
    torch.testing.assert_close(ridge_change(fit, ridge), naive, rtol=1e-4, atol=1e-5)


def test_ridge_refit_leaves_no_more_than_the_map_does(seen: Any) -> None:
    sums, (given, wanted, inputs, outputs), biased = seen
    features = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1) if biased else inputs
    left = [
        ((wanted - given - rows @ ridge_change(sums.fits[name], 0.0)).square().sum(-1) / wanted.norm(dim=-1)).sum()
        for name, rows in (("linear", outputs), ("ridge", features))
    ]
    assert left[1] < left[0]


def test_rotation_equals_its_decomposition(seen: Any) -> None:
    sums, (given, wanted, *_), _ = seen
    cross = (given / wanted.norm(dim=-1, keepdim=True)).T @ wanted
    left, stretch, right = torch.linalg.svd(cross)
    alpha, turn = best_rotation(sums)
    torch.testing.assert_close(turn, left @ right, **EXACT)
    torch.testing.assert_close(turn @ turn.T, torch.eye(32, dtype=torch.float64), **EXACT)
    energy = (given.square().sum(-1) / wanted.norm(dim=-1)).sum()
    assert alpha == pytest.approx(float(stretch.sum() / energy), rel=1e-10)


def test_rotation_recovers_a_planted_one() -> None:
    given = torch.randn(50, 6, dtype=torch.float64, generator=generator())
    planted = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator(1)))[0]
    sums = Grams.empty(6, {}, torch.device("cpu"))
    sums.add(given, 1.7 * given @ planted, {})
    alpha, turn = best_rotation(sums)
    assert alpha == pytest.approx(1.7, rel=1e-10)
    torch.testing.assert_close(turn, planted, **EXACT)


def test_change_recovers_a_planted_map() -> None:
    features, given, _ = random_rows()
    planted = torch.randn(6, 6, dtype=torch.float64, generator=generator(9))
    change = ridge_change(fit_of(features, given, given + features @ planted), 0.0)
    torch.testing.assert_close(change, planted, **EXACT)


def test_ridge_draws_the_change_to_nothing() -> None:
    fit = fit_of(*random_rows())
    norms = [ridge_change(fit, ridge).norm().item() for ridge in (0.0, 0.1, 1.0, 10.0, 1e9)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-6


def test_fewer_tokens_than_features_take_the_smallest_change() -> None:
    features, given, wanted = random_rows(count=4)
    naive = weighted_lstsq(features, wanted - given, wanted)
    torch.testing.assert_close(ridge_change(fit_of(features, given, wanted), 0.0), naive, rtol=1e-6, atol=1e-8)


def test_features_that_are_all_zero_change_nothing() -> None:
    _, given, wanted = random_rows()
    change = ridge_change(fit_of(torch.zeros(200, 6, dtype=torch.float64), given, wanted), 0.01)
    assert torch.equal(change, torch.zeros(6, 6, dtype=torch.float64))


def test_projection_that_is_multiplied_is_fitted_as_such() -> None:
    decoder = find_layers(tiny("granite").double())
    module = decoder.layers[2].get_submodule("mlp.down_proj")
    once, half = (
        accumulate(decoder, SEGMENT, tokens(4), Projection(module, factor, ("linear",))).fits["linear"]
        for factor in (1.0, 0.5)
    )
    torch.testing.assert_close(half.inner_EE, 0.25 * once.inner_EE, **EXACT)
    torch.testing.assert_close(half.outer_ED, 0.5 * once.outer_ED, **EXACT)


@pytest.mark.parametrize("segment", [SEGMENT, Segment(1, 2, 8), Segment(5, 8, 8)], ids=str)
def test_sums_are_independent_of_batches_and_of_where_layers_are(segment: Segment) -> None:
    decoder, ids, turns = find_layers(tiny("gpt2").double()), tokens(6), []
    module = decoder.layers[segment.start - 1].get_submodule(LAST["gpt2"])
    projection = Projection(module, 1.0, ("linear", "ridge"))
    whole = accumulate(decoder, segment, ids, projection, batch_size=6)
    split = accumulate(decoder, segment, ids, projection, batch_size=2)
    fed = accumulate(one_by_one(decoder, turns), segment, ids, projection, batch_size=2)
    assert len(turns) == 8  # one pass
    for other in (split, fed):
        assert other.num_tokens == whole.num_tokens
        torch.testing.assert_close(other.cross_DD, whole.cross_DD, **EXACT)
        torch.testing.assert_close(other.energy, whole.energy, **EXACT)
        for name, fit in whole.fits.items():
            torch.testing.assert_close(other.fits[name].inner_EE, fit.inner_EE, **EXACT)
            torch.testing.assert_close(other.fits[name].outer_ED, fit.outer_ED, **EXACT)


def test_outputs_that_a_model_adds_to_in_place_are_kept_as_they_were() -> None:
    decoder = find_layers(tiny("llama4_text").double())
    module: Any = decoder.layers[3].feed_forward.shared_expert.down_proj
    fits = accumulate(decoder, Segment(4, 6, 8), tokens(3), Projection(module, 1.0, ("linear", "ridge"))).fits
    torch.testing.assert_close(
        fits["linear"].inner_EE, module.weight @ fits["ridge"].inner_EE @ module.weight.T, **EXACT
    )


def test_without_a_projection_a_segment_may_start_at_layer_0() -> None:
    decoder, ids = find_layers(tiny("llama").double()), tokens(3)
    sums = accumulate(decoder, Segment(0, 2, 8), ids)
    with torch.no_grad():
        states = decoder.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    given, wanted = (states[i].flatten(0, 1) for i in (0, 2))
    torch.testing.assert_close(sums.cross_DD, (given / wanted.norm(dim=-1, keepdim=True)).T @ wanted, **EXACT)
    assert sums.fits == {}


def test_sums_of_a_16_bit_model_are_float64() -> None:
    decoder = find_layers(tiny("llama").bfloat16())
    module = decoder.layers[2].get_submodule(LAST["llama"])
    sums = accumulate(decoder, SEGMENT, tokens(3), Projection(module, 1.0, ("linear", "ridge")))
    assert {sums.cross_DD.dtype, sums.energy.dtype, sums.fits["ridge"].inner_EE.dtype} == {torch.float64}
    assert torch.isfinite(ridge_change(sums.fits["ridge"], 0.01)).all()


@pytest.mark.parametrize(("free", "wanted"), [(1 << 20, "cpu"), (1 << 24, "cuda")])
def test_sums_that_do_not_fit_a_gpu_go_to_the_host(monkeypatch: pytest.MonkeyPatch, free: int, wanted: str) -> None:
    monkeypatch.setattr(grams, "free_bytes", lambda _device: free)
    assert sums_device(torch.device("cuda"), 64, {"ridge": 512}).type == wanted  # 8 * (64^2 + 512 * 576) bytes: 2.3 MiB
    assert sums_device(torch.device("cpu"), 64, {"ridge": 512}).type == "cpu"
