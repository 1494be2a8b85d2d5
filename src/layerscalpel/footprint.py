"""What a model takes beside time: parameters, bytes, operations of a token, and memory at its peak.

with Peak(model) as peak:
    take_turn(Growing(model), job)
peak.num_bytes, flops_per_token(model, num_tokens=128)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerscalpel.layers import REFUSALS, device_of
from layerscalpel.turns import Growing, Job, random_prompt

PEAKS = {
    "cuda": "device memory: the model's own weights and the most that a turn took beyond what was there",
    "cpu": "resident set of the whole process, in which all timed models are",
}
"""What a peak counts, by the kind of device; of others none is known."""
LOOK_S = 0.005


class Peak:
    """Measures the most memory that is in use within; not for turns that are timed, whose host it disturbs."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, device_of(model)
        self.num_bytes: int | None = None

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._over, self.num_bytes = threading.Event(), _resident_bytes()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self.num_bytes = max(self.num_bytes or 0, _resident_bytes())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            beyond = torch.cuda.max_memory_allocated(self.device) - self._before
            own = [*self.model.parameters(), *self.model.buffers()]  # tied ones once
            self.num_bytes = beyond + sum(tensor.nbytes for tensor in own)
        else:
            self._over.set()
            self._thread.join()


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


@torch.no_grad()
def flops_per_token(model: Any, num_tokens: int) -> int:
    """Return the operations of one decoding step after so many tokens, as torch counts them in its products.

    Attention is computed without fused kernels meanwhile, of which torch does not count all.
    """
    job, decoding = Job(batch_size=1, prompt_tokens=num_tokens, new_tokens=2), Growing(model)
    with unfused(model):
        decoding.prefill(random_prompt(model, job, seed=0).to(device_of(model)))
        with FlopCounterMode(display=False) as counter:
            decoding.step()
    return counter.get_total_flops()


@contextlib.contextmanager
def unfused(model: Any) -> Iterator[None]:
    """Within, attention is made of plain products, where the family has them."""
    own = getattr(model.config, "_attn_implementation", None)
    try:
        if own not in (None, "eager"):
            model.set_attn_implementation("eager")
    except REFUSALS:  # a family with one kind of attention, which is counted as it is
        own = None
    try:
        yield
    finally:
        if own not in (None, "eager"):
            model.set_attn_implementation(own)


def bytes_on_disk(place: Path) -> int:
    """Return the size of a checkpoint's weights: of a file, or of a folder's safetensors, without these its pickles."""
    files = [place] if place.is_file() else list(place.glob("*.safetensors")) or list(place.glob("*.bin"))
    return sum(path.stat().st_size for path in files)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a checkpoint folder: weights, tokenizer, config and whatever else it carries."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
