"""What a healing method trains: each is a context that says which parameters, and merges what it added at its end.

with seam_endpoints(student, [13], settings) as trained: ...  # trained.layers == [12, 13]
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerscalpel.errors import UserError
from layerscalpel.expand import expanded
from layerscalpel.hooks import head_logits
from layerscalpel.layers import Decoder
from layerscalpel.packedlinear import unpack
from layerscalpel.progress import say
from layerscalpel.settings import HealSettings

MOST_WEIGHTS = 0.95
"""Share of the layers' weights below which LoRA says that its adapters leave some alone."""


@dataclass(frozen=True)
class Trained:
    """What is trained."""

    parameters: list[nn.Parameter]
    layers: list[int]
    """The layers they belong to, as indices of the cut model."""
    boundary: int
    """Where hidden states enter the first of these layers; 0 where training begins at the tokens."""


def seam_layers(num_layers: int, seam: int, width: int) -> range:
    """Return the layers within `width` of the seam, as indices of the cut model.

    Args:
        num_layers: of the cut model.
        seam: index of the first layer after the seam, the removed segment's start; 0..num_layers.
        width: layers on each side; at an end of the model only the existing side is trained.
    """
    return range(max(0, seam - width), min(num_layers, seam + width))


@contextlib.contextmanager
def seam_endpoints(student: Decoder, seams: Sequence[int], settings: HealSettings) -> Iterator[Trained]:
    """Train the layers within `heal.width` of each seam (arXiv:2510.23652, Section 3.3)."""
    chosen = sorted({i for seam in seams for i in seam_layers(len(student), seam, settings.width)})
    sides = [side for seam in seams for side in (seam, len(student) - seam) if 0 < side < settings.width]
    if sides:
        say(f"heal.width={settings.width}, but only {min(sides)} layers stand on one side of a seam: all are trained")
    with _layers(student, chosen, settings) as parameters:
        yield Trained(parameters, chosen, chosen[0])


@contextlib.contextmanager
def every_layer(student: Decoder, _seams: Sequence[int], settings: HealSettings) -> Iterator[Trained]:
    """Train all layers; embedding, final norm and head stay."""
    chosen = list(range(len(student)))
    with _layers(student, chosen, settings) as parameters:
        yield Trained(parameters, chosen, 0)


@contextlib.contextmanager
def last_layers(student: Decoder, _seams: Sequence[int], settings: HealSettings) -> Iterator[Trained]:
    """Train the last layers, and what comes after them: the final norm and the head (arXiv:2411.15558).

    A head that is tied to the embedding stays, as training it would change what enters the first layer.
    """
    chosen = list(range(max(0, len(student) - settings.last_layers), len(student)))
    if settings.last_layers > len(student):
        say(f"heal.last_layers={settings.last_layers}, but there are {len(student)} layers: all are trained")
    embeddings, met = set(student.model.get_input_embeddings().parameters()), _after_the_layers(student)
    after = [parameter for parameter in met if parameter not in embeddings]
    if len(after) < len(met):
        say("the head is tied to the embedding, so it is not trained")
    with _layers(student, chosen, settings, after) as parameters:
        yield Trained(parameters, chosen, chosen[0])


@contextlib.contextmanager
def adapters(student: Decoder, _seams: Sequence[int], settings: HealSettings) -> Iterator[Trained]:
    """Train low-rank adapters on all linear layers but the head (LoRA, arXiv:2106.09685, by peft), merged at the end.

    Raises:
        UserError: peft is not installed.
    """
    require_peft()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports, and which advises on 4 bit
    import peft

    layers, rank = student.layers, settings.lora_rank
    linears = {name: part for name, part in layers.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    _say_what_gets_no_adapter(layers, linears.values())
    turned = any(isinstance(part, Conv1D) for part in linears.values())  # peft would find out, and warn
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linears), fan_in_fan_out=turned)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        # the layers alone: of a whole model peft rewrites the names of a mixture's experts
        wrapped: Any = peft.LoraModel(layers, config, "default")
    try:
        added = [parameter for parameter in layers.parameters() if parameter.requires_grad]
        with _training(student, added) as parameters:
            yield Trained(parameters, list(range(len(student))), 0)
    finally:
        wrapped.merge_and_unload(progressbar=False)


def require_peft() -> None:
    """Raise UserError where the library of LoRA is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("LoRA needs peft - pip install layerscalpel[lora], or choose another heal.method")


def _say_what_gets_no_adapter(layers: nn.Module, linears: Iterable[nn.Module]) -> None:
    adapted, total = (sum(p.numel() for m in part for p in m.parameters()) for part in (linears, [layers]))
    if adapted < MOST_WEIGHTS * total:
        share = 100 * (1 - adapted / total)
        say(f"LoRA: {share:.0f} % of the layers' weights are in no linear layer, as experts, and get no adapter")


def _after_the_layers(student: Decoder) -> list[nn.Parameter]:
    """Return the parameters that hidden states meet after the last layer: those that get a gradient there."""
    plain = [parameter for parameter in student.model.parameters() if parameter.is_floating_point()]  # not packed
    for parameter in plain:
        parameter.requires_grad_(True)
    hidden = torch.randn(1, 2, student.hidden_size, generator=torch.Generator().manual_seed(0))
    weight = next(parameter for parameter in student.layers.parameters() if parameter.is_floating_point())
    with torch.enable_grad():
        head_logits(student, hidden.to(weight)).float().sum().backward()
    found = [parameter for parameter in student.model.parameters() if parameter.grad is not None]
    student.model.requires_grad_(False)
    student.model.zero_grad()
    return found


@contextlib.contextmanager
def _layers(
    student: Decoder, chosen: Sequence[int], settings: HealSettings, more: Sequence[nn.Parameter] = ()
) -> Iterator[list[nn.Parameter]]:
    """Within, these layers, unpacked if they were packed, and some parameters more are trained."""
    layers = [student.layers[i] for i in chosen]
    unpack(layers)
    with (
        expanded(student.model, layers, settings.expand),
        _training(student, [*more, *(p for layer in layers for p in layer.parameters())]) as parameters,
    ):
        yield parameters


@contextlib.contextmanager
def _training(student: Decoder, parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within, these parameters ask for gradients and no others do."""
    chosen = list(dict.fromkeys(parameters))
    student.model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None
