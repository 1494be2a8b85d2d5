"""Frozen linear layers in 4 bit while others are trained (NF4, arXiv:2305.14314, by bitsandbytes).

The plain layers wait in host memory and come back at the end: what is saved are their own numbers, never rounded ones.

    with in_four_bit([student.layers[15]]): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from layerscalpel.errors import UserError
from layerscalpel.progress import say


def require_bitsandbytes() -> None:
    """Refuse 4 bit where the library is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "heal.frozen=4bit needs bitsandbytes - pip install bitsandbytes, or choose device or cpu"
        ) from error


@contextlib.contextmanager
def in_four_bit(layers: Iterable[nn.Module]) -> Iterator[int]:
    """Within, the frozen linear layers in these modules are in 4 bit; gives how many. They are rounded on the device.

    Move the modules to the device within, and back before the end.
    """
    chosen = [place for layer in layers for place in _frozen_linears(layer)]
    plain = [getattr(owner, name) for owner, name in chosen]
    for (owner, name), linear in zip(chosen, plain, strict=True):
        setattr(owner, name, _rounded(linear))
    if not chosen:
        say("heal.frozen=4bit finds no frozen linear layer above the trained ones: they stay as they are")
    try:
        yield len(chosen)
    finally:
        for (owner, name), linear in zip(chosen, plain, strict=True):
            setattr(owner, name, linear)


def _frozen_linears(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return (module, name of its child) of every plain linear layer that is not trained."""
    return [
        (owner, name)
        for owner in module.modules()
        for name, child in owner.named_children()
        if type(child) is nn.Linear and not any(parameter.requires_grad for parameter in child.parameters())
    ]


def _rounded(linear: nn.Linear) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, sizes = linear.weight.detach(), (linear.in_features, linear.out_features)
    rounded = Linear4bit(*sizes, bias=linear.bias is not None, compute_dtype=weight.dtype, device="meta")
    options: dict[str, Any] = {"quant_type": "nf4", "module": rounded}
    rounded.weight = Params4bit(weight.cpu(), requires_grad=False, **options)
    rounded.bias = linear.bias
    return rounded
