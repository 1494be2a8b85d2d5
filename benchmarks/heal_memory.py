"""The part of benchmarks/heal.py on the memory of a LLaMA-3-8B: does healing fit a card of 24 GiB?"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace

import torch
from heal_sizes import HealSizes, packed_blocks
from heal_speed import LR
from measuring import Row, Rows, peak_bytes, reset_peak, seconds
from shapes import random_model

from layerscalpel.decoder import choose_device
from layerscalpel.errors import UserError
from layerscalpel.heal import heal_model
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.settings import FrozenName, HealSettings, Objective, TeacherName

PLAN: tuple[tuple[Objective, TeacherName, FrozenName], ...] = (
    ("ce", "hidden", "cpu"),
    ("both", "hidden", "cpu"),
    ("both", "topk", "cpu"),
    ("ce", "hidden", "device"),
    ("both", "hidden", "device"),
    ("both", "topk", "device"),
)
MICRO = 4


def memory(rows: Rows, given: argparse.Namespace, sizes: HealSizes) -> None:
    """Heal for a few steps within a limit; models begin in host memory where frozen layers are to wait there."""
    device = choose_device(given.device)
    shape, vocab = sizes.shapes["8b"]

    @functools.cache
    def built(layers: int) -> Decoder:
        return find_layers(random_model(shape.config(vocab=vocab, layers=layers), device))

    def measured(settings: HealSettings) -> Row:
        asked = [shape.layers - sizes.removed] + [shape.layers] * (settings.objective != "ce")
        decoders = [built(layers) for layers in asked]
        for decoder in decoders:
            decoder.model.to("cpu" if settings.frozen == "cpu" else device)
        with limited(given.limit_gib, device) as context_bytes:
            found = healed_within(decoders, settings, given, sizes)
        for decoder in decoders:
            decoder.model.to("cpu")
        return found | {"context_bytes": context_bytes}

    common = HealSettings(lr=LR, epochs=1, validations=1, batch_size=sizes.batch_size, micro_batch_size=MICRO)
    for objective, teacher, frozen in PLAN:
        key = {"objective": objective, "teacher": teacher, "frozen": frozen}
        work = functools.partial(measured, replace(common, **key))
        rows.measure(work, part="memory", **key, limit_gib=given.limit_gib, take=given.take)


@contextlib.contextmanager
def limited(limit_gib: float, device: torch.device) -> Iterator[int | None]:
    """Within, this process may take so much of a GPU, what CUDA holds for itself counted in; give that."""
    if device.type != "cuda":
        yield None
        return
    reset_peak()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((limit_gib * 2**30 - context) / total)
    try:
        yield context
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def healed_within(decoders: list[Decoder], settings: HealSettings, given: argparse.Namespace, sizes: HealSizes) -> Row:
    """Heal a cut model (and its parent, if there are two), and tell what was taken, or that it was not enough."""
    student, parent = decoders[0], decoders[1] if len(decoders) > 1 else None
    blocks = packed_blocks(sizes, sizes.memory_steps * sizes.batch_size, sizes.shapes["8b"][1])
    scratch = given.scratch / "memory"
    shutil.rmtree(scratch, ignore_errors=True)
    work = functools.partial(
        heal_model,
        student,
        parent,
        [sizes.memory_start],
        blocks,
        blocks.first(settings.micro_batch_size),
        settings,
        seed=0,
        scratch=scratch,
        device=choose_device(given.device),
    )
    reset_peak()
    found: Row = {"steps": sizes.memory_steps, "micro": settings.micro_batch_size}
    try:
        result, found["wall_s"] = seconds(work)
        found |= {"micro_batch_size": result.micro_batch_size, "cache_bytes": result.cache_bytes}
    except (torch.OutOfMemoryError, UserError) as error:
        found["failed"] = f"does not fit: {error}"[:200]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    return found | {"peak_bytes": peak_bytes(), "reserved_bytes": reserved}
