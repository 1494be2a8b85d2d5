"""Choose the number of layers to remove by the parameters that may stay.

Layers may differ in size, as the dense first layers of a mixture of experts do: then it depends on the window how much
goes, and only the windows that are large enough are candidates.

    sizes = layer_parameters(find_layers(model))
    num_removed, starts = windows_within(num_parameters(model), sizes, parse_count("90M"))
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

from torch import nn

from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.packedlinear import packed_parameters

FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """Read a number of parameters: 90M, 6.7B, 500K, 1e9 or plain digits.

    Raises:
        UserError: anything else, and what is no whole number above 0.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?(?:e\+?\d{1,2})?)\s*([KMB]?)\s*", text, re.ASCII | re.IGNORECASE)
    count = Decimal(found[1]) * FACTORS[found[2].upper()] if found else Decimal(0)
    if not count or count != int(count):
        raise UserError(f"'{text[:40]}' is no number of parameters - allowed: digits with K, M or B, as 90M or 6.7B")
    return int(count)


def layer_parameters(decoder: Decoder) -> list[int]:
    """Return how many parameters go away with each layer; what another part of the model holds too does not."""
    holders = _holders(decoder.model)
    return [
        sum(p.numel() for p in layer.parameters() if inside[id(p)] == holders[id(p)]) + packed_parameters(layer)
        for layer, inside in ((layer, _holders(layer)) for layer in decoder.layers)
    ]


def _holders(module: nn.Module) -> Counter[int]:
    """Return under how many names a module holds each parameter."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def windows_within(parameters: int, per_layer: Sequence[int], target: int, *, least: int = 1) -> tuple[int, list[int]]:
    """Return the smallest n of which a window leaves at most `target` parameters, and the starts of all that do.

    Args:
        parameters: of the parent.
        per_layer: what goes away with each of its layers.
        target: the most that may stay.
        least: the smallest n that is tried.

    Raises:
        UserError: the parent is small enough already, or no cut that leaves 2 layers is.
    """
    if parameters <= target:
        raise UserError(
            f"the parent already has {parameters:,} parameters, no more than the {target:,} asked for"
            " - nothing to remove - give a smaller --target-params"
        )
    fewest = parameters
    for num_removed in range(least, len(per_layer) - 1):
        starts = range(len(per_layer) - num_removed + 1)
        left = [parameters - sum(per_layer[start : start + num_removed]) for start in starts]
        if fitting := [start for start in starts if left[start] <= target]:
            return num_removed, fitting
        fewest = min(left)
    raise UserError(
        f"no cut that leaves 2 layers comes to {target:,} parameters - allowed: --target-params {fewest} or more"
    )
