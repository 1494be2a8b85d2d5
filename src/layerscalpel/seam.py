"""The seam of a cut model: what meets the residual stream there, and repairs inserted by a hook.

A repair makes z of the hidden state x at the seam. Inserted, it needs no weights to change: that is what a fold of it
into weights (fold.py) is compared with.

Dimensions: B blocks, T tokens, D hidden size, F inputs of the projection, E = F and, where it has a bias, one more.

    seam = find_seam(decoder, start=13)
    with inserted(decoder, seam, Repair(alpha=1.1)):
        decoder.model(tokens)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerscalpel.anatomy import Anatomy, Writer, find_anatomy, modules_of
from layerscalpel.hooks import hidden_in, split_hidden
from layerscalpel.layers import Decoder


@dataclass(frozen=True)
class Repair:
    """z = alpha x Q, or z = x + a change of what the last projection before the seam adds."""

    alpha: float = 1.0
    turn_DD: Tensor | None = None
    """Q, float64."""
    outputs_DD: Tensor | None = None
    """The projection's outputs times this are the change."""
    inputs_ED: Tensor | None = None
    """The projection's inputs, and a one where it has a bias, times this are the change."""

    @property
    def changes_projection(self) -> bool:
        """Whether it is folded into the projection before the seam, not into what follows."""
        return self.outputs_DD is not None or self.inputs_ED is not None


@dataclass(frozen=True)
class Seam:
    """Where a decoder was cut, and what meets the residual stream there."""

    start: int
    """The boundary, 0..L."""
    last: Writer | None
    """What adds to the stream last before it."""
    after: Anatomy
    """Of all that follows it."""

    @property
    def factor(self) -> float:
        """What the output of the last projection before the seam is multiplied with."""
        if self.last is None or self.last.factor is None:
            raise AssertionError("stitches that need the projection are refused where there is none")
        return self.last.factor

    def projection(self, decoder: Decoder) -> nn.Linear | Conv1D:
        """Return a decoder's last projection before the seam."""
        module = modules_of(decoder, self.last)[0] if self.last else None
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise AssertionError("stitches that need the projection are refused where there is none")
        return module

    def unlike(self, decoder: Decoder) -> str:
        """Return why weights of a decoder cannot be changed as those of the one that was tried, or nothing."""
        for part in [*([self.last] if self.last else []), *self.after.parts()]:
            kinds = {type(module).__name__ for module in modules_of(decoder, part)}
            if kinds != {part.kind}:
                found = ", ".join(sorted(kinds)) or "nothing"
                return f"{part.path} is {found}, not {part.kind} (quantised weights cannot be changed)"
        return ""


def find_seam(decoder: Decoder, start: int) -> Seam:
    """Return what a stitch at boundary `start` of a cut decoder has to do with."""
    anatomy = find_anatomy(decoder, max(0, start - 1))
    before = [writer for writer in anatomy.writers if writer.layer == start - 1]
    return Seam(start, before[-1] if before else None, anatomy.after(start))


@contextlib.contextmanager
def inserted(decoder: Decoder, seam: Seam, repair: Repair) -> Iterator[None]:
    """Within, hidden states are repaired at the seam, in float64; no weight changes."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple, output: Tensor) -> None:
        caught[:] = (rows.to("cpu", torch.float64, copy=True) for rows in (args[0], output))  # Llama 4 adds in place

    def mended(hidden_BTD: Tensor) -> Tensor:
        new_BTD = repair.alpha * hidden_BTD.cpu().double()
        if repair.turn_DD is not None:
            new_BTD = new_BTD @ repair.turn_DD.cpu()
        if repair.changes_projection:
            new_BTD += seam.factor * _change(repair, *caught).view_as(new_BTD)  # OPT's is [B * T, D]
        return new_BTD.to(hidden_BTD.dtype).to(hidden_BTD.device)

    def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, rest_args, rest_kwargs = split_hidden(args, kwargs)
        return (mended(hidden), *rest_args), rest_kwargs

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return decoder.as_output(len(decoder) - 1, mended(hidden_in(output)))

    with contextlib.ExitStack() as handles:
        if repair.changes_projection:
            handles.callback(seam.projection(decoder).register_forward_hook(catch).remove)
        if seam.start < len(decoder):
            layer = decoder.layers[seam.start]
            handles.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:
            handles.callback(decoder.layers[-1].register_forward_hook(after).remove)
        yield


def _change(repair: Repair, inputs_BTF: Tensor, outputs_BTD: Tensor) -> Tensor:
    """Return what a repair adds to the projection's output [B, T, D]."""
    if repair.outputs_DD is not None:
        return outputs_BTD @ repair.outputs_DD.cpu()
    assert repair.inputs_ED is not None
    num_inputs = inputs_BTF.shape[-1]
    weight_FD, bias_1D = repair.inputs_ED.cpu().tensor_split([num_inputs])
    return inputs_BTF @ weight_FD + bias_1D.sum(0)
