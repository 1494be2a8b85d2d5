"""What a training leaves so that a later call can go on: one file, written by rename, of whole tensors.

Any number of processes reads what any other number has written.

    write_state(folder / "state.pt", {"key": key, ...})
    state = read_state(folder / "state.pt", key)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerscalpel.errors import UserError, one_line
from layerscalpel.progress import say
from layerscalpel.settings import HealSettings


def training_key(parameters: Sequence[nn.Parameter], settings: HealSettings, num_blocks: int, seed: int) -> str:
    """Return what must be the same for a training to go on; the number of processes need not be."""
    return repr((replace(settings, shard=False), num_blocks, seed, [tuple(p.shape) for p in parameters]))


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write a state in the place of the one before.

    Raises:
        UserError: there is no room; the one before is kept.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    try:
        torch.save(state, draft)
    except (OSError, RuntimeError) as error:  # RuntimeError is what torch's writer raises
        draft.unlink(missing_ok=True)
        raise UserError(
            f"the state of healing cannot be written to {file.parent} ({one_line(error)})"
            " - free some space, or choose another --out; the last state that was written is kept"
        ) from error
    os.replace(draft, file)


def read_state(file: Path, key: str, *, mapped: bool = False) -> dict[str, Any] | None:
    """Return what an earlier call has stored of the same training; if mapped, tensors are read when they are used."""
    if not file.exists():
        return None
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    if state["key"] == key:
        return state
    if not mapped:
        say("the training in this folder had other settings: healing begins anew")
    return None


def turned(
    state: dict[str, Any], parameters: Sequence[nn.Parameter], turn: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Return a state of AdamW with `turn(moment, its weight)` in the place of every moment."""
    moments = {
        number: {name: value if name == "step" else turn(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    return state | {"state": moments}
