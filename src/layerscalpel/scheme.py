"""What of a checkpoint is quantised, and how finely: settings resolved for one model, before its weights are read.

Quantised are the linear layers inside the decoder's layers, and the head if the user says so. Whatever else carries
weights stays as it is, and each such module is told with its reason: the counts add up to all modules with weights.

A group is so many neighbouring weights of a row that share a scale, so its size must divide the width of the row.

    scheme = Scheme.of(folder, config.quantize, seams=[13])
    scheme.converted, scheme.left, scheme.wider
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

from layerscalpel.errors import UserError
from layerscalpel.layers import find_layer_list
from layerscalpel.origin import Origin, peek, read_config, skeleton
from layerscalpel.settings import QuantizeSettings

GROUP_SIZES = (128, 64, 32)
"""Tried in this order where the user names none: fewer scales first."""
FINEST = 16
"""The smallest group that may be asked for: many scales, so never taken unasked."""
ROUTERS = ("gate", "router")
"""Last names of linear layers that choose among experts: tiny, and a wrong choice costs more than a rounded weight."""


@dataclass(frozen=True)
class Scheme:
    """What a back end is told."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    damping: float
    """Of the Hessian's diagonal, as a share of its mean."""
    left: tuple[str, ...]
    """Linear layers that stay as they are."""
    wider: Mapping[str, int]
    """{linear layer: its bits} of those that are quantised to more bits than the others."""
    converted: tuple[str, ...] = ()
    """Linear layers that are quantised, the wider ones too."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """{module: why} of all modules with weights of their own that stay as they are, the linear layers of `left` too."""

    @classmethod
    def of(cls, source: PreTrainedModel | Path, settings: QuantizeSettings, seams: Sequence[int] = ()) -> Scheme:
        """Resolve settings for one model.

        Args:
            source: a model, which may be a skeleton without numbers, or a checkpoint folder.
            settings: as the user gave them; of several values of damping the first is taken.
            seams: for each seam the first layer after it.

        Raises:
            UserError: a group size that does not divide, a tied head that is to be quantised, nothing to quantise,
                experts that could not be loaded beside packed layers.
        """
        model = source if isinstance(source, PreTrainedModel) else bare_model(source)
        _refuse_experts(model)
        path, layers = find_layer_list(model)
        reasons = dict(_kept(model, path, settings))
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        at_seam = [f"{path}.{i}." for seam in seams for i in (seam - 1, seam) if 0 <= i < len(layers)]
        beside = (
            [name for name in linears if name not in reasons and name.startswith(tuple(at_seam))] if at_seam else []
        )
        if settings.seam_bits == 16:
            reasons |= dict.fromkeys(beside, "at the seam, which quantize.seam_bits=16 leaves")
        chosen = {name: module for name, module in linears.items() if name not in reasons}
        size, odd = _group_size(chosen, settings.group_size)
        reasons |= odd
        converted = tuple(name for name in chosen if name not in odd)
        if not converted:
            smaller = bool(odd) and not any(linears[name].in_features % FINEST for name in odd)
            allowed = (
                f"--group-size {FINEST}, which divides them"
                if smaller
                else f"a model with linear layers whose inputs are multiples of {GROUP_SIZES[-1]}, or all of {FINEST}"
            )
            raise UserError(
                f"{type(model).__name__} has no linear layer that could be quantised: {spoken_reasons(reasons)}"
                f" - allowed: {allowed}"
            )
        wider = dict.fromkeys(beside, 8) if settings.seam_bits == 8 > settings.bits else {}
        return cls(
            bits=settings.bits,
            group_size=size,
            symmetric=settings.symmetric,
            act_order=settings.act_order,
            damping=settings.damping[0],
            left=tuple(name for name in linears if name in reasons),
            wider={name: bits for name, bits in wider.items() if name in converted},
            converted=converted,
            reasons=reasons,
        )

    def bits_of(self, name: str) -> int:
        """Return the bits of a quantised linear layer."""
        return self.wider.get(name, self.bits)

    def counts(self) -> dict[str, Any]:
        """Return how many modules are quantised, how many stay for which reason, and of how many."""
        kept = dict(Counter(self.reasons.values()).most_common())
        return {"converted": len(self.converted), "left": kept, "modules": len(self.converted) + len(self.reasons)}


def bare_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the skeleton of a checkpoint folder.

    Raises:
        UserError: it is quantised already.
    """
    origin = peek(str(folder), trust_remote_code=trust_remote_code, allow_quantised=True)
    refuse_quantised(origin)
    return skeleton(read_config(origin), trust_remote_code=trust_remote_code)


def refuse_quantised(origin: Origin) -> None:
    """Refuse a model that is quantised already: its weights lie on a grid that another one would not meet.

    Raises:
        UserError: it is.
    """
    if origin.quantised:
        raise UserError(
            f"model {origin.name} is already quantised ({origin.quantised}), so it cannot be quantised again"
            " - allowed: quantize.method=none, or the unquantised model"
        )


def spoken_reasons(reasons: Mapping[str, str]) -> str:
    """Return the reasons with their counts, the most frequent first."""
    return ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons.values()).most_common()) or "no module"


def _refuse_experts(model: PreTrainedModel) -> None:
    """Refuse a model whose experts transformers puts together on loading: beside packed layers it does not.

    Raises:
        UserError: it does.
    """
    mapping: Any = get_model_conversion_mapping(model)
    merged = [
        target
        for entry in mapping
        if isinstance(entry, WeightConverter) and any(isinstance(step, MergeModulelist) for step in entry.operations)
        for target in entry.target_patterns
    ]
    if any(name.endswith(tuple(merged)) for name, _ in model.named_parameters()):
        raise UserError(
            f"the experts of {type(model).__name__} are stored one by one and put together on loading, which does not"
            " go with packed layers - allowed: quantize.method=none, or a model without such experts"
        )


def _kept(model: PreTrainedModel, path: str, settings: QuantizeSettings) -> Iterator[tuple[str, str]]:
    """Yield (module, why) of those with weights of their own that are never quantised, or not as the user wishes."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    tied = tied or bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    if settings.head == "quantize" and (head is None or tied):
        raise UserError(
            f"the head of this {type(model).__name__} is {'tied to' if head is not None else 'not apart from'} its"
            " input embedding, which stays as it is - allowed: quantize.head=keep"
        )
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if module is head:
            if settings.head == "keep":
                yield name, "the head, tied to the embeddings" if tied else "the head, which quantize.head=keep leaves"
        elif module is embedding or isinstance(module, nn.Embedding):
            yield name, "embeddings"
        elif type(module) is not nn.Linear:  # what a kind of its own adds is lost once packed, if that loads at all
            what = "a linear layer of its own kind" if isinstance(module, nn.Linear) else "no linear layer"
            yield name, f"{what} ({type(module).__name__})"
        elif not name.startswith(f"{path}."):
            yield name, "outside the decoder layers"
        elif name.rpartition(".")[2] in ROUTERS:
            yield name, "a router"


def _group_size(linears: Mapping[str, nn.Linear], asked: int) -> tuple[int, dict[str, str]]:
    """Return the size of a group, and {linear: why} of those that it does not divide.

    Raises:
        UserError: the size that was asked for does not divide every width.
    """
    widths = {name: module.in_features for name, module in linears.items()}
    if asked:
        if wrong := [name for name, width in widths.items() if width % asked]:
            common = [size for size in (256, 128, 64, 32, 16) if not any(width % size for width in widths.values())]
            rest = f"; so do not {len(wrong) - 1} others" if len(wrong) > 1 else ""
            raise UserError(
                f"groups of {asked} do not divide the input of {wrong[0]}, {widths[wrong[0]]} wide{rest}"
                f" - allowed: {', '.join(map(str, common)) or 'no size divides all'}"
                " - quantize.group_size=0 takes what fits"
            )
        return asked, {}
    smallest = GROUP_SIZES[-1]
    odd = {name: f"its input is no multiple of {smallest}" for name, width in widths.items() if width % smallest}
    fitting = [width for name, width in widths.items() if name not in odd]
    size = next((size for size in GROUP_SIZES if fitting and not any(width % size for width in fitting)), smallest)
    return size, odd
