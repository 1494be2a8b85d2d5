"""Plan a cut without weights: what the family makes of the cut config, layer by layer, against what it was.

The family's own constructor builds the cut model on no memory. Every plain attribute, the class of every part and the
shape of every tensor of a kept layer must be what the same layer has in the parent: a rule whose phase the cut would
shift shows as a difference, is written in another way where the config has one, and is refused by name where not.

Source: this project, docs/methods.md#cut.

    plan = plan_cut(skeleton(config), Segment(13, 19, 30))
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layerscalpel.errors import UserError, one_line
from layerscalpel.layers import REFUSALS, all_tensors, find_layer_list, refuse_shared_keys
from layerscalpel.renumber import Modules
from layerscalpel.segment import Segment
from layerscalpel.traces import cut_config, repairs, unexplained

Facts = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A cut that was checked without weights."""

    segment: Segment
    path: str
    """Dotted name of the list of layers in the model."""
    config: Any
    """Of the cut model."""
    traces: dict[str, str]
    """{config field: what it was and is}."""
    parent: PreTrainedModel
    cut: PreTrainedModel
    """Without memory; its layers are what the kept layers of the parent are."""


def plan_cut(parent: PreTrainedModel, segment: Segment) -> Plan:
    """Plan a cut of a model, which may be a skeleton without weights.

    Raises:
        UserError: the family cannot be cut soundly there; the line names the reason.
    """
    path, _ = find_layer_list(parent)
    refuse_shared_keys(parent)
    _refuse_injected_images(parent, segment)
    before = [_facts(layer) for layer in parent.get_submodule(path).children()]
    plan, chosen = _without_differences(parent, segment, path, before)
    _refuse_unexplained_lists(plan, chosen, before)
    return plan


def _without_differences(
    parent: PreTrainedModel, segment: Segment, path: str, before: list[Facts]
) -> tuple[Plan, dict[str, Any]]:
    """Return a cut whose layers are what they were, and the other readings of the config's numbers that it takes.

    In each round the reading that leaves the fewest differences is chosen.
    """
    chosen: dict[str, Any] = {}
    plan = _attempt(parent, segment, path, chosen)
    found = plainly = differences(plan, before)
    while found:
        nearer = None
        for instead in repairs(parent.config, segment):
            try:
                other = _attempt(parent, segment, path, chosen | instead)
            except UserError:
                continue
            left = differences(other, before)
            if len(left) < len(found):
                plan, found, nearer = other, left, chosen | instead
            if not found:
                break
        if nearer is None:
            raise UserError(
                f"{plainly[0]} - a per-layer rule of {type(parent).__name__} would shift - choose another segment"
            )
        chosen = nearer
    return plan, chosen


def _refuse_injected_images(parent: PreTrainedModel, segment: Segment) -> None:
    """Refuse to cut where image features enter, a level a layer from layer 0 on (deepstack): text does not show it."""
    for part in [parent.config, *(getattr(parent.config, name, None) for name in parent.config.sub_configs)]:
        fields = vars(part).items() if part else ()
        levels = next((value for name, value in fields if name.startswith("deepstack")), None)
        if isinstance(levels, (list, tuple)) and segment.start < len(levels):
            raise UserError(
                f"layers 0..{len(levels) - 1} of {type(parent).__name__} take in image features by their number"
                f" (deepstack) - choose a segment that starts at {len(levels)} or later"
            )


def _attempt(parent: PreTrainedModel, segment: Segment, path: str, instead: dict[str, Any]) -> Plan:
    modules = Modules.of(parent, path, segment)
    config, traces = cut_config(parent.config, segment, instead=instead, modules=modules)
    try:
        with torch.device("meta"):
            cut = type(parent)(config)
    except REFUSALS as error:
        raise UserError(
            f"{type(parent).__name__} refuses the cut config: {one_line(error)} - it cannot be cut there"
        ) from error
    return Plan(segment, path, config, traces, parent, cut.eval())


def differences(plan: Plan, before: list[Facts]) -> list[str]:
    """Return one line for everything that is not what it was, beside the layers' numbers.

    Args:
        plan: the cut.
        before: what `_facts` says of every layer of the parent.
    """
    try:
        cut_layers = plan.cut.get_submodule(plan.path)
    except AttributeError:
        return [f"the cut config makes a model without {plan.path}"]
    kept = plan.segment.kept()
    if not isinstance(cut_layers, nn.ModuleList) or len(cut_layers) != len(kept):
        return [f"the cut config makes {len(list(cut_layers.children()))} layers where {len(kept)} must stay"]
    after = [_facts(layer) for layer in cut_layers]
    numbers = dict(_layer_numbers(before).items() & _layer_numbers(after).items()).keys()
    found = []
    for new, old in enumerate(kept):
        was, now = before[old], after[new]
        for name in sorted((was.keys() | now.keys()) - numbers):
            if was.get(name) != now.get(name) and not _follows(was.get(name), now.get(name), plan.segment):
                change = f"{name} goes from {was.get(name)} to {now.get(name)}"
                found.append(f"layer {old} would change as layer {new}: {change}")
    outside = _outside(plan.parent, plan.path), _outside(plan.cut, plan.path)
    for name in sorted(outside[0].keys() | outside[1].keys()):
        if outside[0].get(name) != outside[1].get(name):
            found.append(
                f"tensor {name} outside the layers would go from {outside[0].get(name)} to {outside[1].get(name)}"
            )
    return found


def _facts(layer: nn.Module) -> Facts:
    """Return every attribute of a layer that is a plain value, the class of each part, and the shape of each tensor."""
    found: Facts = {}
    for path, module in layer.named_modules():
        found[f"{path}.<class>".lstrip(".")] = type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and _is_plain(value):
                found[f"{path}.{name}".lstrip(".")] = value
    return found | {name: f"a tensor of shape {tuple(tensor.shape)}" for name, tensor in all_tensors(layer).items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _layer_numbers(layers: list[Facts]) -> dict[str, tuple[int, int]]:
    """Return {attribute: (a, b)} of those that are a * i + b in every layer i that has them: a layer's own number."""
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for i, facts in enumerate(layers):
        for name, value in facts.items():
            if type(value) is int:
                seen[name].append((i, value))
    found = {}
    for name, points in seen.items():
        if all(value == i for i, value in points):
            found[name] = (1, 0)
        elif len(points) >= 3:
            (i, low), (j, high) = points[0], points[-1]
            slope = (high - low) // (j - i)
            if slope and all(value - low == slope * (k - i) for k, value in points):
                found[name] = (slope, low - slope * i)
    return found


def _follows(was: Any, now: Any, segment: Segment) -> bool:
    """Whether a value that a layer has from the config is the cut one: the layer count, or a list of one item a layer.

    What a layer computes with it is not seen here but by the logits of the twin.
    """
    kept = segment.kept()
    if type(was) is int:
        return (was, now) == (segment.num_layers, len(kept))
    is_list = isinstance(was, (list, tuple)) and len(was) == segment.num_layers
    return is_list and now == type(was)(was[i] for i in kept)


def _outside(model: nn.Module, path: str) -> dict[str, tuple[int, ...]]:
    tensors = all_tensors(model).items()
    return {name: tuple(tensor.shape) for name, tensor in tensors if not name.startswith(f"{path}.")}


def _refuse_unexplained_lists(plan: Plan, chosen: dict[str, Any], before: list[Facts]) -> None:
    """Refuse a list of length L that nothing shows to hold one item a layer: to slice it might change its meaning."""
    for name, whole in unexplained(plan.parent.config, plan.segment).items():
        try:
            if differences(_attempt(plan.parent, plan.segment, plan.path, chosen | {name: whole}), before):
                continue  # the layers read it
        except UserError:
            continue  # the config class wants one item a layer
        raise UserError(
            f"config field {name} has {len(whole)} items, as many as there are layers, and nothing shows what they mean"
            " - remove it from config.json if it is not needed"
        )
