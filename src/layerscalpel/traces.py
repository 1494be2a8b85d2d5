"""Every trace that a layer leaves in a config, and how a cut changes it.

A trace is the layer count, a list of one item a layer, a list of layer numbers, or a depth ("dense below layer 3"). The
names grow with every release, so they are told by their form first; `plan.plan_cut` then compares what the family makes
of the cut config, layer by layer, and asks `repairs` for other readings of a number where the plain one does not fit.

Source: this project, docs/methods.md#cut.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

from layerscalpel.errors import UserError, one_line
from layerscalpel.layers import REFUSALS, count_field
from layerscalpel.renumber import Modules, renumbered
from layerscalpel.segment import Segment

DEPTHS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
"""Config fields that hold a depth: the rule applies below (or from) that layer."""
LAYER_NUMBERS = (
    r"moe_layers|.*(layer|attn|block).*_(idxs?|idxes|indexe?s|indices|ids)|.*_only_layers|cross_attention_layers"
)
"""Config lists that hold numbers of layers: mapped to their new numbers, not sliced."""
RULES = r".*(layer|block|dense|sparse|first|last|start|end|skip|prefix).*"
"""Numbers that may be a depth or a phase, where a cut layer came out wrong."""
PER_LAYER = r".*(layer|block|pattern|types|indexer).*"
"""Lists of one item a layer, told by their names; others must show what they are, see `unexplained`."""
SIZES_PER_LAYER = r".*(moe|expert|head|window|intermediate).*"
"""Lists of numbers that are sizes, one a layer."""
NEVER_PER_LAYER = r".*token_ids?|architectures|.*_section|id2label|label2id|.*_multipliers?"
"""Lists of another meaning, whatever their length."""


def cut_config(
    config: Any, segment: Segment, *, instead: dict[str, Any] | None = None, modules: Modules | None = None
) -> tuple[Any, dict[str, str]]:
    """Return a config without the segment's layers, and what was changed as {field: how}.

    Args:
        config: of the parent; the text part of a multimodal one is cut.
        segment: the layers to remove.
        instead: {field: value} that take the place of what the plain rules give.
        modules: of the model, whose names a quantisation config lists.

    Raises:
        UserError: the family's own config class refuses the result; or a pattern of module names cannot be rewritten.
    """
    outer = copy.deepcopy(config)
    text = text_part(outer)
    values = constructor_values(text)
    changed = _changes(text, values, segment) | (instead or {})
    changed = {name: value for name, value in changed.items() if value != values.get(name)}
    try:
        fresh = type(text)(**{**values, **changed})
    except REFUSALS as error:
        raise UserError(
            f"{type(text).__name__} refuses the cut config: {one_line(error)} - this segment cannot be cut"
        ) from error
    fresh._attn_implementation = text._attn_implementation
    for quantised in (fresh, outer):
        if modules and (found := getattr(quantised, "quantization_config", None)):
            quantised.quantization_config = renumbered(found, modules)
    if text is outer:
        outer = fresh
    else:
        setattr(outer, next(key for key, item in vars(outer).items() if item is text), fresh)
    return outer, {name: f"{_short(values.get(name))} -> {_short(new)}" for name, new in changed.items()}


def text_part(config: Any) -> Any:
    """Return the part of a config that describes the decoder: itself, or a sub-config of it."""
    if config.is_encoder_decoder:
        return config  # get_text_config would hand out a changed copy
    return config.get_text_config(decoder=True)


def constructor_values(text: Any) -> dict[str, Any]:
    """Return what a config's class is to be called with to get the same config."""
    left_out = ("transformers_version", "model_type")
    return {name: value for name, value in text.to_dict().items() if name not in left_out}


def _changes(text: Any, values: dict[str, Any], segment: Segment) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if count_field(text) in values:  # some families count their list of layer types instead
        found[count_field(text)] = len(segment.kept())
    for name, value in values.items():
        if name in DEPTHS and isinstance(value, int):
            found[name] = kept_below(value, segment)
        elif isinstance(value, (list, tuple, str)):
            found[name] = _cut_list(name, value, segment)
        elif isinstance(value, dict) and "layer" in name:
            found[name] = _cut_dict(value, segment)
    if "attention_layers" in found and "attention_types" in found:  # GPT-Neo spells the list as a repeated pattern
        found["attention_types"] = [[found["attention_layers"], 1]]
    return found


def kept_below(depth: int, segment: Segment) -> int:
    """Return how many of the layers below a depth stay."""
    return sum(i < depth for i in segment.kept())


def _cut_list(name: str, value: Any, segment: Segment) -> Any:
    if re.fullmatch(NEVER_PER_LAYER, name):
        return value
    if _holds_layer_numbers(name, value, segment):
        return [new for new, old in enumerate(segment.kept()) if old in value]
    if isinstance(value, str):
        is_pattern = len(value) == segment.num_layers and "pattern" in name
        return "".join(value[i] for i in segment.kept()) if is_pattern else value
    if len(value) == segment.num_layers:
        return type(value)(value[i] for i in segment.kept())
    return value


def _cut_dict(value: dict[Any, Any], segment: Segment) -> dict[Any, Any]:
    """Renumber a dict whose keys are layer numbers; leave any other as it is."""
    if not all(str(key).isdecimal() and int(key) < segment.num_layers for key in value):
        return value
    kept = segment.kept()
    return {type(key)(kept.index(int(key))): item for key, item in value.items() if int(key) in kept}


def _holds_layer_numbers(name: str, value: Any, segment: Segment) -> bool:
    if isinstance(value, str) or not re.fullmatch(LAYER_NUMBERS, name):
        return False
    rising = all(type(item) is int and 0 <= item < segment.num_layers for item in value)
    return rising and list(value) == sorted(set(value))


def unexplained(config: Any, segment: Segment) -> dict[str, Any]:
    """Return the lists of length L whose name does not say that they hold one item a layer."""
    values = constructor_values(text_part(config))
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple))
        and len(value) == segment.num_layers
        and not re.fullmatch(f"{NEVER_PER_LAYER}|{LAYER_NUMBERS}|{PER_LAYER}", name)
        and not (re.fullmatch(SIZES_PER_LAYER, name) and all(type(item) in (int, float) for item in value))
    }


def repairs(config: Any, segment: Segment) -> Iterator[dict[str, Any]]:
    """Yield other readings of the config's numbers, each as {field: value}, for a cut whose layers came out wrong.

    A number up to L may be a depth counted from either end, or the phase of a period. A period whose exceptions can be
    listed is written as such a list (the sparse step of Qwen's mixtures of experts, the pattern of RecurrentGemma). A
    scale that is divided by the square root of the depth (MiniCPM) is adapted to the new depth.
    """
    values = constructor_values(text_part(config))
    num_layers = segment.num_layers
    for name, value in values.items():
        if type(value) is not int or not 0 < value <= num_layers or not re.fullmatch(RULES, name):
            continue
        yield {name: kept_below(value, segment)}
        yield {name: value - sum(i >= num_layers - value for i in range(segment.start, segment.stop))}
    for name, value in values.items():
        if name.endswith("_offset") and type(value) is int:
            period = values.get(name.removesuffix("_offset") + "_period", num_layers)
            yield from ({name: phase} for phase in range(min(period, num_layers)))
    for name, pattern in values.items():
        if isinstance(pattern, list) and 0 < len(pattern) < num_layers and re.fullmatch(".*(types|pattern)", name):
            yield {name: [pattern[i % len(pattern)] for i in segment.kept()]}
    step = values.get("decoder_sparse_step")
    if step and "mlp_only_layers" in values:
        dense = [i for i in range(num_layers) if i in (values["mlp_only_layers"] or []) or (i + 1) % step]
        kept = segment.kept()
        yield {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(kept) if old in dense]}
    yield from _rescaled(values, segment)


def _rescaled(values: dict[str, Any], segment: Segment) -> Iterator[dict[str, Any]]:
    """Yield scales times (L' / L) ** (1 / 2), and the floats beside: the quotient must come out to the last bit."""
    ratio = math.sqrt(len(segment.kept()) / segment.num_layers)
    for name, value in values.items():
        if type(value) in (int, float) and value and "scale" in name:
            exact = value * ratio
            yield from ({name: near} for near in (exact, math.nextafter(exact, 0), math.nextafter(exact, math.inf)))


def _short(value: Any) -> str:
    return f"{len(value)} items" if isinstance(value, (list, tuple)) else str(value)
