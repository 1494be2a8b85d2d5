"""The gate is the paper's valley, its loss and gradient are those of the gated model, and it finds what was planted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from families import tiny, tokens
from planted import changed_layers, mean_kl, silence
from torch import Tensor

from layerscalpel import losses
from layerscalpel.errors import UserError
from layerscalpel.gate import GatePath, _backward, gate_values, learn_starts, spread_starts
from layerscalpel.layers import Decoder, find_layers

STARTS = [0.0, 1.3, 3.0, 5.5, 6.0]


def naive_loss_and_gradient(
    decoder: Decoder, ids: Tensor, start: float, num_removed: int, steepness: float
) -> tuple[float, float]:
    """Run every layer gated, from the first on, and differentiate the KL of the full logits."""
    a = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    gates = gate_values(a, len(decoder), num_removed, steepness)[0].float()

    def gated(i: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda given, output: given + gates[i] * (output - given)

    with torch.no_grad():
        parent = decoder.model(ids, use_cache=False).logits
    with changed_layers(decoder.layers, {i: gated(i) for i in range(len(decoder))}):
        loss = mean_kl(parent, decoder.model(ids, use_cache=False).logits).mean()
    return loss.item(), torch.autograd.grad(loss, a)[0].item()


def learned_alone(decoder: Decoder, ids: Tensor, starts: list[float], k: float) -> tuple[list[float], list[float]]:
    """Return (losses, gradients) of one backward for these starts together."""
    a = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    found = _backward(decoder, ids, a, 2, k)
    assert a.grad is not None
    return found, a.grad.tolist()


@pytest.mark.parametrize("num_removed", [1, 3, 7])
@pytest.mark.parametrize("start", [0, 1])
def test_whole_start_closes_its_layers_and_no_others(num_removed: int, start: int) -> None:
    gate = gate_values(torch.tensor([float(start)]), 8, num_removed, 50.0)[0]
    closed = [start <= i < start + num_removed for i in range(8)]
    torch.testing.assert_close(gate, 1 - torch.tensor(closed, dtype=torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steepness", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("num_removed", [1, 2, 5])
def test_valley_is_symmetric(steepness: float, num_removed: int) -> None:
    centred = torch.tensor([(9 - num_removed) / 2], dtype=torch.float64)
    gate = gate_values(centred, 9, num_removed, steepness)[0]
    torch.testing.assert_close(gate, gate.flip(0))
    assert gate.argmin() == 4


@pytest.mark.parametrize("steepness", [0.1, 1.0, 5.0, 500.0])
def test_gates_lie_between_closed_and_open(steepness: float) -> None:
    gate = gate_values(torch.linspace(-3, 12, 61), 10, 3, steepness)
    assert gate.shape == (61, 10)
    assert gate.min() >= 0
    assert gate.max() <= 1


@pytest.mark.parametrize("steepness", [1.0, 5.0])
def test_gate_gradient_equals_finite_differences(steepness: float) -> None:
    starts = torch.tensor([0.0, 1.25, 4.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gate_values(a, 8, 3, steepness), starts)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom", "gpt2"])
@pytest.mark.parametrize("steepness", [1.0, 5.0, 20.0])
def test_loss_and_gradient_equal_the_gated_model(family: str, steepness: float) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(2)
    decoder.model.requires_grad_(False)
    found, gradients = learned_alone(decoder, ids, STARTS, steepness)
    naive = [naive_loss_and_gradient(decoder, ids, start, 2, steepness) for start in STARTS]
    # float32 sums in another order, and gates of 1 - 1e-7 taken as 1
    assert found == pytest.approx([loss for loss, _ in naive], rel=1e-4, abs=1e-5)
    assert gradients == pytest.approx([gradient for _, gradient in naive], rel=1e-3, abs=1e-4)


def test_loss_and_gradient_do_not_depend_on_the_chunks_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = find_layers(tiny("llama").requires_grad_(False)), tokens(2)
    whole = learned_alone(decoder, ids, STARTS, 2.0)
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * 2 * 5 * 97)  # five tokens at once
    chunked = learned_alone(decoder, ids, STARTS, 2.0)
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5)
    assert chunked[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("order", [STARTS, STARTS[::-1], [3.0, 0.0, 6.0, 3.0]])
def test_many_starts_learn_what_each_learns_alone(order: list[float]) -> None:
    decoder, ids = find_layers(tiny("llama")), tokens(4)
    together = learn_starts(decoder, ids, num_removed=2, initial=order)
    for column, start in enumerate(order):
        alone = learn_starts(decoder, ids, num_removed=2, initial=[start])
        assert [row[column] for row in together.losses] == pytest.approx([row[0] for row in alone.losses], rel=1e-4)
        assert [row[column] for row in together.starts] == pytest.approx([row[0] for row in alone.starts], abs=1e-3)


def test_weights_get_no_gradients_and_keep_their_flags() -> None:
    model = tiny("llama")
    model.get_input_embeddings().requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    learn_starts(find_layers(model), tokens(2), num_removed=2, initial=[1.0, 4.0])
    assert len(set(flags.values())) == 2
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_flags_are_kept_when_learning_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    decoder = find_layers(model)

    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerscalpel.gate._backward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn_starts(decoder, tokens(2), num_removed=2, initial=[1.0])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("offset", [-1.5, -1.0, 0.0, 1.0, 1.5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gate_ends_at_the_planted_identity_nearby(family: str, offset: float) -> None:
    decoder = find_layers(tiny(family))
    for i in (3, 4, 5):
        silence(decoder.layers[i])
    path = learn_starts(decoder, tokens(30), num_removed=3, initial=[3 + offset])
    assert path.ends(5) == [3]
    assert path.losses[-1][0] < path.losses[0][0] or offset == 0


def test_same_data_give_the_same_path() -> None:
    first, second = (
        learn_starts(find_layers(tiny("llama")), tokens(3), num_removed=2, initial=[1.0, 4.0]) for _ in range(2)
    )
    assert first == second


def test_steps_are_those_of_adam_on_the_naive_gradient() -> None:
    decoder, ids = find_layers(tiny("llama").requires_grad_(False)), tokens(4)
    path = learn_starts(decoder, ids, num_removed=2, initial=[2.5], steepness=(2.0, 2.0), lr=0.3)
    a = torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([a], lr=0.3)
    for done, block in enumerate(ids):
        adam.param_groups[0]["lr"] = 0.3 * (1 - done / 4)
        a.grad = torch.tensor([naive_loss_and_gradient(decoder, block[None], a.item(), 2, 2.0)[1]], dtype=torch.float64)
        adam.step()
        assert path.starts[done + 1] == pytest.approx([a.item()], abs=1e-4)


def test_path_has_every_step_and_anneals_geometrically() -> None:
    path = learn_starts(find_layers(tiny("llama")), tokens(3), num_removed=2, initial=[1.0, 4.0], steepness=(1.0, 4.0))
    assert path.steepness == pytest.approx([1.0, 2.0, 4.0])
    assert path.starts[0] == [1.0, 4.0]
    assert ([len(row) for row in path.starts], [len(row) for row in path.losses]) == ([2] * 4, [2] * 3)
    assert all(before != after for before, after in itertools.pairwise(path.starts))


def test_starts_stay_within_the_model() -> None:
    path = learn_starts(find_layers(tiny("llama")), tokens(6), num_removed=2, initial=[0.0, 3.0, 6.0], lr=50.0)
    values = [a for row in path.starts for a in row]
    assert min(values) == 0
    assert max(values) == 6
    assert set(path.ends(6)) <= set(range(7))


def test_ends_are_rounded_and_clamped() -> None:
    assert GatePath([[-0.4, 2.4, 2.6, 6.9]], [], []).ends(6) == [0, 2, 3, 6]


def test_neighbours_are_the_whole_starts_on_both_sides() -> None:
    path = GatePath([[0.0, 2.4, 2.6, 3.0, 6.0]], [], [])
    assert path.neighbours(6) == [(0, 0), (2, 3), (2, 3), (3, 3), (6, 6)]


def test_spread_starts_cover_the_model_evenly() -> None:
    assert spread_starts(5, 24) == [0, 6, 12, 18, 24]
    assert spread_starts(2, 7) == [0, 7]
    assert spread_starts(1, 7) == [3.5]
    assert spread_starts(1, 7, 2.0) == [2.0]
    assert spread_starts(1, 7, 30.0) == [7.0]


def test_nan_weights_are_a_user_error() -> None:
    model = tiny("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="layer 2's output is not finite"):
        learn_starts(find_layers(model), tokens(2), num_removed=2, initial=[1.0, 4.0])
