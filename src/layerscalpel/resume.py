"""What a training leaves so that a later call can go on: one file, written by rename, of whole tensors.

Any number of processes reads what any other number has written.

    state = StateFile(folder / "state.pt", training_key(student, seams, blocks, settings, seed))
    state.write({"progress": ...})
    state.read()
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError, one_line
from layerscalpel.layers import Decoder
from layerscalpel.progress import say
from layerscalpel.settings import HealSettings

SAMPLED = 16
"""Numbers of every weight that tell one student from another."""
ELSEWHERE = ("shard", "second", "second_lr", "second_epochs")
"""Settings that a training does not depend on: the second phase is one of its own."""


@torch.no_grad()
def training_key(student: Decoder, seams: Sequence[int], blocks: TokenBlocks, settings: HealSettings, seed: int) -> str:
    """Return what must be the same for a training to go on; the number of processes need not be."""
    told = hashlib.sha256(blocks.sha256.encode())
    for name, weight in student.model.named_parameters():
        told.update(name.encode() + weight.flatten()[:SAMPLED].float().cpu().numpy().tobytes())
    plain = {field.name: field.default for field in fields(HealSettings) if field.name in ELSEWHERE}
    return repr((replace(settings, **plain), tuple(seams), seed, told.hexdigest()))


@dataclass(frozen=True)
class StateFile:
    """The file of one training."""

    path: Path
    key: str
    """Names the training."""

    def write(self, state: dict[str, Any]) -> None:
        """Write a state in the place of the one before.

        Raises:
            UserError: there is no room; the one before is kept.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        try:
            torch.save({"key": self.key, **state}, draft)
        except (OSError, RuntimeError) as error:  # RuntimeError is what torch's writer raises
            draft.unlink(missing_ok=True)
            raise UserError(
                f"the state of healing cannot be written to {self.path.parent} ({one_line(error)})"
                " - free some space, or choose another --out; the last state that was written is kept"
            ) from error
        os.replace(draft, self.path)

    def read(self, *, mapped: bool = False) -> dict[str, Any] | None:
        """Return what an earlier call has stored of this training; if mapped, tensors are read when they are used."""
        if not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
            key = state["key"]
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
            if not mapped:
                say(f"the state of healing in {self.path} is damaged ({one_line(error)}): healing begins anew")
            return None
        if key == self.key:
            return state
        if not mapped:
            say("the training in this folder had other settings, text or weights: healing begins anew")
        return None

    def is_finished(self, steps: int) -> bool:
        """Tell whether an earlier call came to the end of this training."""
        state = self.read(mapped=True)
        return state is not None and state["progress"]["step"] == steps


def turned(
    state: dict[str, Any], parameters: Sequence[nn.Parameter], turn: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Return a state of AdamW with `turn(moment, its weight)` in the place of every moment."""
    moments = {
        number: {name: value if name == "step" else turn(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return state | {"state": moments}
