"""Where the layers of two models are while some of them compute: on the device, in host memory, spread, in 4 bit.

Healing has three times, and in each of them other layers are at work: the student's below the trained ones, once; the
parent's, once; the student's from the trained ones on, at every step. With `heal.frozen=cpu` or `4bit`, and with
`heal.shard`, all others wait in host memory, so that the device never holds both models.

    place = Place(device, team, frozen="cpu")
    with place.at_work(student, range(12)): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from layerscalpel.errors import UserError
from layerscalpel.forwards import moved, parked
from layerscalpel.fourbit import in_four_bit, require_bitsandbytes
from layerscalpel.layers import Decoder, all_tensors
from layerscalpel.parallel import ALONE, Team
from layerscalpel.settings import FrozenName, HealSettings
from layerscalpel.spread import spread

Live = dict[nn.Parameter, nn.Parameter]
"""{parameter: what stands in its place where weights are spread}."""


@dataclass(frozen=True)
class Place:
    """Where one healing computes, and what it spares the device."""

    device: torch.device
    team: Team = ALONE
    frozen: FrozenName = "device"
    shard: bool = False

    @property
    def sparing(self) -> bool:
        """Whether layers that are not at work wait in host memory."""
        return spares_device(self)

    @contextlib.contextmanager
    def at_work(
        self, decoder: Decoder, layers: Collection[int], *, four_bit: bool = False, same: bool = True
    ) -> Iterator[Live]:
        """Within, these layers and all that is no layer are on the device, the other layers in host memory.

        Args:
            decoder: the model; afterwards all of it is where it was.
            layers: those that compute.
            four_bit: whether frozen ones may be rounded, if the settings ask for it.
            same: whether nothing changes but weights that ask for a gradient, so that all others need no way back.
        """
        if not self.sparing:
            yield {}
            return
        working = [decoder.layers[i] for i in layers]
        rounded = working if four_bit and self.frozen == "4bit" else []
        away = range(len(decoder)) if rounded else set(range(len(decoder))) - set(layers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(parked(decoder, away))
            stack.enter_context(_rest_on(decoder, self.device, same=same))
            if rounded:
                stack.enter_context(in_four_bit(rounded))
            if self.shard:
                yield stack.enter_context(spread(working, self.device)) if working else {}
            else:
                stack.enter_context(moved(working, self.device, same=same and not rounded))
                yield {}

    def whole(self, decoder: Decoder) -> contextlib.AbstractContextManager[object]:
        """Within, all of a model is where its weights may be changed: on the device, if one alone holds it."""
        return contextlib.nullcontext() if self.shard else self.at_work(decoder, range(len(decoder)), same=False)


@contextlib.contextmanager
def _rest_on(decoder: Decoder, device: torch.device, *, same: bool) -> Iterator[None]:
    """Within, the tensors of a model that belong to no layer are on a device."""
    of_layers = {id(tensor) for tensor in all_tensors(decoder.layers).values()}
    tensors = {id(tensor): tensor for tensor in all_tensors(decoder.model).values()}
    rest = [(tensor, tensor.data) for key, tensor in tensors.items() if key not in of_layers]
    for tensor, _ in rest:
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for tensor, before in rest:
            tensor.data = before if same and not tensor.requires_grad else tensor.data.to(before.device)


def spares_device(where: HealSettings | Place) -> bool:
    """Tell whether models may lie in host memory while one is healed: layers come to the device to be at work."""
    return where.frozen != "device" or where.shard


def require_place(settings: HealSettings, num_processes: int) -> None:
    """Refuse settings of a healing that do not go together, or need what is not there.

    Raises:
        UserError: all findings at once.
    """
    findings = []
    methods = {settings.method, settings.second} - {"none"}
    spares = [f"heal.frozen={settings.frozen}"] * (settings.frozen != "device") + ["heal.shard"] * settings.shard
    if settings.shard and num_processes == 1:
        findings.append("heal.shard spreads weights over several processes - start them with torchrun, or leave it out")
    if settings.shard and settings.frozen == "4bit":
        findings.append("heal.shard spreads plain weights - allowed beside it: heal.frozen=device or cpu")
    if settings.frozen == "4bit" and "all" in methods:
        findings.append("heal.frozen=4bit with all layers trained rounds nothing - allowed: endpoint, last, lora")
    if spares and settings.teacher == "online":
        findings.append(f"teacher=online runs the parent at every step, {spares[0]} sets it aside - choose one of them")
    if settings.frozen == "4bit":
        try:
            require_bitsandbytes()
        except UserError as error:
            findings.append(str(error))
    if findings:
        raise UserError("\n".join(findings))
