"""The gate is the paper's valley, its loss and gradient are those of the gated model, and it finds what was planted."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import tiny, tokens
from gate_study import Sizes, judged
from gate_tables import DEFAULT, key_of
from planted import changed_layers, mean_kl, silence
from torch import Tensor

from layerscalpel import gate, losses
from layerscalpel.errors import UserError
from layerscalpel.exact import WindowScores
from layerscalpel.gate import GatePath, learn_starts, spread_starts
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.valley import _gated, backward_kl, gate_values

slow = partial(pytest.param, marks=pytest.mark.slow)
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


def learned_alone(
    decoder: Decoder, ids: Tensor, starts: list[float], k: float, checkpointing: bool = False
) -> tuple[list[float], list[float]]:
    """Return (losses, gradients) of one backward for these starts together."""
    a = torch.tensor(starts, dtype=torch.float64, requires_grad=True)
    found = backward_kl(decoder, ids, a, 2, k, checkpointing)
    assert a.grad is not None
    return found, a.grad.tolist()


def planted(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    """Return a model whose layers 3..5 do nothing."""
    decoder = find_layers(tiny(family).to(dtype))
    for i in (3, 4, 5):
        silence(decoder.layers[i])
    return decoder


@pytest.mark.parametrize("num_removed", [1, 3, 7])
@pytest.mark.parametrize("start", [0, 1])
def test_whole_start_closes_its_layers_and_no_others(num_removed: int, start: int) -> None:
    gates = gate_values(torch.tensor([float(start)]), 8, num_removed, 50.0)[0]
    closed = [start <= i < start + num_removed for i in range(8)]
    torch.testing.assert_close(gates, 1 - torch.tensor(closed, dtype=torch.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steepness", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("num_removed", [1, 2, 5])
def test_valley_is_symmetric(steepness: float, num_removed: int) -> None:
    centred = torch.tensor([(9 - num_removed) / 2], dtype=torch.float64)
    gates = gate_values(centred, 9, num_removed, steepness)[0]
    torch.testing.assert_close(gates, gates.flip(0))
    assert gates.argmin() == 4


@pytest.mark.parametrize("steepness", [0.1, 1.0, 5.0, 500.0])
def test_gates_lie_between_closed_and_open(steepness: float) -> None:
    gates = gate_values(torch.linspace(-3, 12, 61), 10, 3, steepness)
    assert gates.shape == (61, 10)
    assert gates.min() >= 0
    assert gates.max() <= 1


@pytest.mark.parametrize("steepness", [1.0, 5.0])
def test_gate_gradient_equals_finite_differences(steepness: float) -> None:
    starts = torch.tensor([0.0, 1.25, 4.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gate_values(a, 8, 3, steepness), starts)


@pytest.mark.parametrize(
    ("steepness", "family"),
    [
        *[(1.0, "llama"), (5.0, "llama"), (20.0, "llama"), (1.0, "gemma3_text"), (20.0, "bloom"), (5.0, "gpt2")],
        *[slow(steepness, "gemma3_text") for steepness in (5.0, 20.0)],
        *[slow(steepness, "bloom") for steepness in (1.0, 5.0)],
        *[slow(steepness, "gpt2") for steepness in (1.0, 20.0)],
    ],
)
def test_loss_and_gradient_equal_the_gated_model(family: str, steepness: float) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(2)
    decoder.model.requires_grad_(False)
    found, gradients = learned_alone(decoder, ids, STARTS, steepness)
    naive = [naive_loss_and_gradient(decoder, ids, start, 2, steepness) for start in STARTS]
    # float32 sums in another order, and gates of 1 - 1e-7 taken as 1
    assert found == pytest.approx([loss for loss, _ in naive], rel=1e-4, abs=1e-5)
    assert gradients == pytest.approx([gradient for _, gradient in naive], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("logits", [5 * 2, 16 * 2, 3 * 16 * 2], ids=["five tokens", "one stream", "three streams"])
def test_loss_and_gradient_do_not_depend_on_the_chunks_of_the_head(
    monkeypatch: pytest.MonkeyPatch, logits: int
) -> None:
    decoder, ids = find_layers(tiny("llama").requires_grad_(False)), tokens(2)
    whole = learned_alone(decoder, ids, STARTS, 2.0)
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * 97 * logits)
    chunked = learned_alone(decoder, ids, STARTS, 2.0)
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5)
    assert chunked[1] == pytest.approx(whole[1], rel=1e-4, abs=1e-6)


def test_the_head_takes_as_many_streams_at_once_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = find_layers(tiny("llama").requires_grad_(False)), tokens(2)
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * 97 * 3 * 16 * 2)
    seen: list[tuple[int, ...]] = []
    decoder.model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(tuple(given[2].shape[:2])))
    learned_alone(decoder, ids, STARTS, 2.0)
    assert seen == [(2, 16), (6, 16), (4, 16)]  # the parent, three streams of two blocks, the last two


@pytest.mark.parametrize("family", ["llama", "bloom", slow("gpt2")])
def test_checkpointing_changes_no_number(family: str) -> None:
    decoder, ids = find_layers(tiny(family)), tokens(3)
    kept, again = (
        learn_starts(decoder, ids, num_removed=2, initial=STARTS, checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    assert again == kept  # to the last bit


def test_checkpointing_saves_memory() -> None:
    decoder, ids = find_layers(tiny("llama").requires_grad_(False)), tokens(2)
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.model.parameters()}

    def saved_bytes(checkpointing: bool) -> int:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            learned_alone(decoder, ids, STARTS, 2.0, checkpointing)
        return sum(size for place, size in saved.items() if place not in weights)

    assert saved_bytes(True) < saved_bytes(False) / 3


def test_gate_gradient_of_a_16_bit_model_is_summed_in_32_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 1, 64, 32, generator=generator).bfloat16()
    change = torch.randn(2, 64, 32, generator=generator).bfloat16() + 1
    gates = torch.tensor([0.999, 0.3], requires_grad=True)
    mixed = _gated(lambda streams: streams + change, before, gates)
    mixed.sum().backward()
    expected = ((before[:, 0] + change).double() - before[:, 0].double()).sum((1, 2))
    assert mixed.dtype == torch.bfloat16
    assert gates.grad is not None
    torch.testing.assert_close(gates.grad.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("steepness", "family"), [(2.0, "gpt2"), (5.0, "llama"), slow(2.0, "llama"), slow(5.0, "gpt2")]
)
def test_16_bit_gradient_is_near_that_of_32_bits(family: str, steepness: float) -> None:
    narrow = find_layers(tiny(family).requires_grad_(False).bfloat16())
    wide = find_layers(copy.deepcopy(narrow.model).float())
    found, expected = (learned_alone(decoder, tokens(8, 64), STARTS, steepness) for decoder in (narrow, wide))
    largest = max(map(abs, expected[1]))
    assert found[0] == pytest.approx(expected[0], rel=0.01)  # bfloat16 has 8 bits
    assert found[1] == pytest.approx(expected[1], rel=0.03, abs=0.03 * largest)


def test_gate_of_a_16_bit_model_finds_what_was_planted() -> None:
    path = learn_starts(planted("llama", torch.bfloat16), tokens(30), num_removed=3, initial=[1.5, 4.5])
    assert path.ends(5) == [3, 3]


@pytest.mark.parametrize("order", [STARTS, slow(STARTS[::-1]), [3.0, 0.0, 6.0, 3.0]])
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

    monkeypatch.setattr(gate, "backward_kl", interrupt)
    with pytest.raises(KeyboardInterrupt):
        learn_starts(decoder, tokens(2), num_removed=2, initial=[1.0])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
def test_gate_ends_at_the_planted_identity_nearby(family: str) -> None:
    path = learn_starts(planted(family), tokens(30), num_removed=3, initial=[1.5, 2.0, 3.0, 4.0, 4.5])
    assert path.ends(5) == [3] * 5
    for column in (0, 1, 3, 4):
        first, last = path.losses[0][column], path.losses[-1][column]
        assert first is not None
        assert last is not None
        assert last < first


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


@pytest.fixture(scope="module")
def patient() -> tuple[GatePath, GatePath, list[int]]:
    """Return a path with patience, the same without, and how many streams each step of the first computed."""
    counts: list[int] = []

    def counted(*args: Any) -> list[float]:
        counts.append(len(args[2]))
        return backward_kl(*args)

    how: dict[str, Any] = {"steepness": (5.0, 5.0), "lr": 0.1, "initial": [0.0, 2.0, 3.0, 4.5, 5.0], "num_removed": 3}
    without = learn_starts(planted("llama"), tokens(24), **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "backward_kl", counted)
        return learn_starts(planted("llama"), tokens(24), **how, patience=4), without, counts


def settled_after(path: GatePath) -> list[int]:
    """Return the steps that each start was learned."""
    return [sum(row[column] is not None for row in path.losses) for column in range(len(path.starts[0]))]


def test_starts_settle_when_they_no_longer_move_and_no_earlier(patient: tuple) -> None:
    path, free, _ = patient
    steps = settled_after(path)
    assert min(steps) < max(steps) == len(path.losses)  # some did, some did not
    for column, done in enumerate(steps):
        column_of = [row[column] for row in free.starts]
        spans = [column_of[at - 4 : at + 1] for at in range(4, 25)]
        quiet = [at for at, span in enumerate(spans, 4) if max(span) - min(span) < 0.05]
        assert done == (quiet[0] if quiet else 24)


def test_a_settled_start_stays_and_its_loss_is_not_measured(patient: tuple) -> None:
    path, free, _ = patient
    for column, done in enumerate(settled_after(path)):
        losses_of, starts_of = ([row[column] for row in rows] for rows in (path.losses, path.starts))
        assert losses_of[done:] == [None] * (len(path.losses) - done)
        assert losses_of[:done] == pytest.approx([row[column] for row in free.losses[:done]], rel=1e-3, abs=1e-5)
        assert starts_of[: done + 1] == pytest.approx([row[column] for row in free.starts[: done + 1]], abs=1e-3)
        assert set(starts_of[done:]) == {starts_of[done]}


def test_a_settled_start_costs_nothing(patient: tuple) -> None:
    path, _, counts = patient
    steps = settled_after(path)
    assert counts == [sum(done > step for done in steps) for step in range(len(path.losses))]


def test_learning_ends_when_all_starts_have_settled() -> None:
    hardly: dict[str, Any] = {"num_removed": 2, "initial": [1.0, 4.0], "lr": 1e-3, "patience": 3}
    path = learn_starts(find_layers(tiny("llama")), tokens(9), **hardly, steepness=(5.0, 5.0))
    assert (len(path.starts), len(path.losses), len(path.steepness)) == (4, 3, 3)
    assert settled_after(path) == [3, 3]


def test_no_start_settles_before_the_steepness_is_near_its_last_value() -> None:
    hardly: dict[str, Any] = {"num_removed": 2, "initial": [1.0], "lr": 1e-3, "patience": 1}
    path = learn_starts(find_layers(tiny("llama")), tokens(12), **hardly, steepness=(1.0, 5.0))
    assert path.steepness[-2] < 4 <= path.steepness[-1]


@pytest.mark.parametrize("world", [slow(2), 6])
def test_paths_of_several_processes_join_to_the_path_of_one(world: int) -> None:
    decoder, ids = find_layers(tiny("llama")), tokens(4)
    whole = learn_starts(decoder, ids, num_removed=2, initial=STARTS)
    parts = [learn_starts(decoder, ids, num_removed=2, initial=STARTS[rank::world]) for rank in range(world)]
    joined = GatePath.merged(parts)
    assert joined.steepness == whole.steepness
    for found, expected in zip(joined.starts + joined.losses, whole.starts + whole.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_joining_extends_paths_that_ended_earlier() -> None:
    longer = GatePath([[0.0, 4.0], [1.0, 4.0], [2.0, 4.0]], [[0.1, 0.2], [0.3, None]], [1.0, 5.0])
    shorter = GatePath([[7.0], [8.0]], [[0.5]], [1.0])
    joined = GatePath.merged([longer, shorter])
    assert joined.starts == [[0.0, 7.0, 4.0], [1.0, 8.0, 4.0], [2.0, 8.0, 4.0]]
    assert joined.losses == [[0.1, 0.5, 0.2], [0.3, None, None]]
    assert joined.steepness == [1.0, 5.0]
    assert (longer.starts[-1], shorter.starts[-1]) == ([2.0, 4.0], [8.0])


@pytest.mark.parametrize("broken", [0, 2, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_parent_that_is_not_finite_is_refused_by_the_layer(broken: int, value: float) -> None:
    decoder = find_layers(tiny("llama"))
    decoder.layers[broken].mlp.down_proj.weight.data[0, 0] = value
    with pytest.raises(UserError, match=f"layer {broken}'s output is not finite"):
        learn_starts(decoder, tokens(2), num_removed=2, initial=[1.0, 4.0])


def test_embedding_that_is_not_finite_is_refused_by_name() -> None:
    model = tiny("llama")
    model.get_input_embeddings().weight.data[:, 0] = -math.inf
    with pytest.raises(UserError, match="the embedding is not finite"):
        learn_starts(find_layers(model), tokens(2), num_removed=2, initial=[1.0, 4.0])


def test_gated_model_that_overflows_is_refused_by_its_start() -> None:
    decoder = find_layers(tiny("llama"))
    for i, scale in {3: 1e30, 4: 1e-30, 5: 1e10, 6: 1e-10}.items():
        decoder.layers[i].forward = lambda hidden, *_args, scale=scale, **_kwargs: hidden * scale
    with pytest.raises(UserError, match=r"with the gate at layer 4\.0 the model's output is not finite"):
        learn_starts(decoder, tokens(2), num_removed=1, initial=[0.0, 4.0], steepness=(50.0, 50.0))


def scores_of(*kl: float) -> WindowScores:
    return WindowScores(tuple(range(len(kl))), 3, torch.tensor(kl, dtype=torch.float64)[:, None].repeat(1, 2), 16)


def test_the_study_judges_the_best_of_k_as_the_search_would_choose_it() -> None:
    initial = Sizes().starts(5)
    assert initial == [0, 1, 1.25, 2, 2.5, 3, 3.75, 4, 5]
    ends = [0, 0, 1, 1, 3, 3, 3, 4, 4]
    found = judged(scores_of(5, 2, 9, 3, 1, 7), scores_of(5, 2, 9, 1, 3, 7), initial, ends)
    assert (found["optimum"], found["exact_on_calibration"]) == (4, 3)
    assert (found["num_single_starts"], found["num_single_starts_there"]) == (6, 2)
    # 2.5 ends at 3; of 0, 2.5, 5 the calibration blocks prefer 3 to 4; of all whole starts too
    assert {k: best["start"] for k, best in found["best_of"].items()} == {"1": 3, "3": 3, "5": 3, "all": 3}
    assert found["best_of"]["3"]["loss_kl_nats"]["value"] == pytest.approx(2)
    agreed = judged(scores_of(5, 2, 9, 3, 1, 7), scores_of(5, 2, 9, 3, 1, 7), initial, ends)
    assert {k: best["reached"] for k, best in agreed["best_of"].items()} == {
        "1": False,
        "3": True,
        "5": True,
        "all": True,
    }


def test_the_study_changes_one_factor_at_a_time_and_measures_the_default_first() -> None:
    plan = Sizes().plan()
    changes = [sum(row[name] != value for name, value in DEFAULT.items()) for row in plan]
    assert changes == [0] * 12 + [1] * 120
    assert len({key_of(row) for row in plan}) == 132
    assert {(row["n"], row["seed"]) for row in plan[:12]} == {(n, seed) for n in (3, 6, 9, 12) for seed in range(3)}
