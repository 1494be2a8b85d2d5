"""Call one module again with other parameters or other inputs, to learn what these do to what it returns.

Nothing is known of a module but what it was called with: a linear, a norm whose gain is 1 + weight and a stack of
experts are told apart by what they do.

Dimensions: D hidden size.

    with recorded(modules) as calls:
        model(tokens)
    scaling_of(module, calls["mlp.down_proj"])  # {"weight": 0.0}
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerscalpel.hooks import leaves, map_leaves
from layerscalpel.layers import REFUSALS

SCALE = -1.5
"""Outputs are tried with this: below 0, so that a scale before a ReLU is told from one behind it."""
MOST_PARAMETERS = 6
"""More of its own no module has that writes or reads: gate, up and down of a stack of experts, with their biases."""
CLOSE, CLOSE_IN_16_BIT = 1e-4, 0.05
"""Share of the largest number by which two outputs that are the same may differ."""


@dataclass(frozen=True)
class Call:
    """How a module was called, and what it returned."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any


Hook = Callable[[nn.Module, tuple, dict, Any], Any]


@contextlib.contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Within, each module has its forward hook, which sees keyword arguments too."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nothing(_module: nn.Module, _args: tuple, _kwargs: dict, output: Tensor) -> Tensor:
    """Be the hook that makes a module return zeros."""
    return torch.zeros_like(output)


@contextlib.contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Within, note how each module is called last, in the order in which these calls end."""
    calls: dict[str, Call] = {}

    def copied(value: Any) -> Any:
        return map_leaves(value, lambda _place, leaf: leaf.clone())  # models add to their hidden states in place

    def note(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            calls.pop(name, None)
            calls[name] = Call(copied(args), copied(kwargs), copied(output))

        return hook

    with hooked((module, note(name)) for name, module in modules.items()):
        yield calls


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return a module's own floating-point parameters, not those of the modules in it."""
    own = module.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if parameter.is_floating_point()}


def recall(module: nn.Module, call: Call, changed: dict[str, Tensor]) -> Any:
    """Return what a call returns with other parameters; None where it cannot be made."""
    try:
        return functional_call(module, changed, call.args, call.kwargs)
    except REFUSALS:
        return None


def alike(one: Any, other: Any) -> bool:
    """Whether two values hold the same tensors at the same places, up to rounding."""
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    return ours.keys() == theirs.keys() and all(_close(ours[place], theirs[place]) for place in ours)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    return one.numel() == 0 or bool((one - other).abs().max() <= room(other) * other.abs().max())


def room(like: Tensor) -> float:
    """Return the share of the largest number by which tensors of this format may differ."""
    return CLOSE if torch.finfo(like.dtype).eps < 1e-5 else CLOSE_IN_16_BIT


def _subsets(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the sets of a module's own parameters, the small ones first."""
    own = own_parameters(module).items()
    if len(own) <= MOST_PARAMETERS:
        yield from map(dict, chain.from_iterable(combinations(own, size) for size in range(1, len(own) + 1)))


def scaling_of(module: nn.Module, call: Call) -> dict[str, float]:
    """Return {parameter: offset}: multiply all these parameter + offset, and the output is multiplied."""
    wanted = map_leaves(call.output, lambda _place, leaf: SCALE * leaf)
    for names in _subsets(module):
        for offsets in product(*((0.0, 1.0) if parameter.dim() == 1 else (0.0,) for parameter in names.values())):
            changed = {n: (p + o) * SCALE - o for (n, p), o in zip(names.items(), offsets, strict=True)}
            if alike(recall(module, call, changed), wanted):
                return dict(zip(names, offsets, strict=True))
    return {}


def turning_of(module: nn.Module, call: Call, turn_DD: Tensor, wanted: Any) -> dict[str, int]:
    """Return {parameter: axis}: turn all these along their axes, and the call returns what is wanted."""
    for names in _subsets(module):
        axes_of = [[axis for axis, size in enumerate(p.shape) if size == len(turn_DD)] for p in names.values()]
        for axes in product(*axes_of):
            changed = {n: turned(p, a, turn_DD) for (n, p), a in zip(names.items(), axes, strict=True)}
            if alike(recall(module, call, changed), wanted):
                return dict(zip(names, axes, strict=True))
    return {}


def turned(tensor: Tensor, axis: int, turn_DD: Tensor) -> Tensor:
    """Return a tensor whose vectors along an axis are multiplied with a matrix from the right."""
    return (tensor.movedim(axis, -1) @ turn_DD).movedim(-1, axis)


def tokens_among(call: Call, rows: Any, *, any_length: bool = False) -> set[tuple[Any, ...]]:
    """Return the places of a call's arguments [.., D] whose tokens are all among the given ones [.., D].

    With `any_length` a token may be multiplied with any number, as models scale what goes to an expert or the head.
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.dim() < 2:
        return set()
    given, wanted_MD = leaves((call.args, call.kwargs)), _tokens(rows, any_length)
    most = room(rows) * wanted_MD.abs().max()

    def among(leaf: Tensor) -> bool:
        if not leaf.is_floating_point() or leaf.dim() < 2 or leaf.shape[-1] != rows.shape[-1]:
            return False
        tokens_MD = _tokens(leaf, any_length)
        tokens_MD = tokens_MD[tokens_MD.any(-1)]  # zeros tell nothing
        return len(tokens_MD) > 0 and bool((torch.cdist(tokens_MD, wanted_MD, p=torch.inf).amin(1) <= most).all())

    return {place for place, leaf in given if among(leaf)}


def _tokens(rows: Tensor, any_length: bool) -> Tensor:
    tokens_MD = rows.flatten(0, -2).cpu().double()
    return torch.nn.functional.normalize(tokens_MD, dim=-1, eps=1e-30) if any_length else tokens_MD


def given_other(call: Call, places: set[tuple[Any, ...]], change: Callable[[Tensor], Tensor]) -> Call:
    """Return the call with other tensors at some places of its arguments."""

    def swap(place: tuple[Any, ...], leaf: Tensor) -> Tensor:
        return change(leaf) if place in places else leaf

    args, kwargs = map_leaves((call.args, call.kwargs), swap)
    return replace(call, args=args, kwargs=kwargs)
