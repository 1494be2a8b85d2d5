"""The parts of benchmarks/heal.py on a random model of LLaMA2-7B's shape: seconds, memory, operations, kernels."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from heal_flops import Amount, LayerCosts, layer_flops, lora_flops
from heal_sizes import HealSizes, packed_blocks, random_child
from measuring import Row, Rows, median_s, peak_bytes, reset_peak, seconds
from torch.profiler import ProfilerActivity, profile

from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import choose_device
from layerscalpel.frozen import Frozen
from layerscalpel.heal import heal_model
from layerscalpel.layers import Decoder
from layerscalpel.settings import HealSettings
from layerscalpel.training import Training

TIMED = {
    "filling": (Frozen, "fill"),
    "validation": (Training, "_validate"),
    "storing": (Training, "_store"),
}
"""{what is timed apart: the method that does it}; what is left of a healing is its training."""
WAITING = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operations after which the host knows a number of the device."""
VARIED = ("cache_gib", "separate_documents", "compile", "frozen")
LR = 1e-5
"""Random weights learn nothing: any rate that keeps the loss finite does."""


@contextlib.contextmanager
def stopwatch() -> Iterator[Counter[str]]:
    """Within, seconds of the timed methods add up."""
    took: Counter[str] = Counter()
    own = {name: getattr(*place) for name, place in TIMED.items()}

    def timed(name: str, *args: Any, **how: Any) -> Any:
        result, wall_s = seconds(lambda: own[name](*args, **how))
        took[name] += wall_s  # type: ignore[assignment]
        return result

    def method(name: str) -> Callable[..., Any]:
        return lambda *args, **how: timed(name, *args, **how)

    for name, (owner, attribute) in TIMED.items():
        setattr(owner, attribute, method(name))
    try:
        yield took
    finally:
        for name, (owner, attribute) in TIMED.items():
            setattr(owner, attribute, own[name])


def settings_of(given: argparse.Namespace, sizes: HealSizes, **changes: Any) -> HealSettings:
    """Return the settings that all methods share, and a method's own."""
    common = {"lr": LR, "epochs": sizes.epochs, "batch_size": sizes.batch_size, "validations": 1}
    return replace(HealSettings(micro_batch_size=given.micro), **(common | changes))


def healed(child: Decoder, blocks: TokenBlocks, settings: HealSettings, start: int, scratch: Path) -> Any:
    """Heal a child whose segment began at a layer, in an empty folder; one block validates."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    how = {"seed": 0, "scratch": scratch, "device": choose_device("auto")}
    return heal_model(child, None, [start], blocks, blocks.first(1), settings, **how)


def speed(rows: Rows, given: argparse.Namespace, sizes: HealSizes) -> None:
    """Time endpoint tuning and LoRA on the same blocks, with the same loss code and micro-batch."""
    device, count = choose_device(given.device), given.blocks or sizes.blocks
    child = functools.lru_cache(maxsize=1)(lambda name: random_child(sizes, name, device))
    peak = functools.cache(lambda: matmul_flops_per_s(device, sizes.matmul))

    def measured(name: str, settings: HealSettings, start: int) -> Row:
        blocks = packed_blocks(sizes, count, sizes.shapes[name][1])
        return {"matmul_flops_per_s": peak()} | timed_row(child(name), blocks, settings, start, given.scratch)

    for name, method, start, changes in sizes.speed_plan():
        settings = settings_of(given, sizes, method=method, **changes)
        own = {field: getattr(settings, field) for field in VARIED}
        key = {"part": "speed", "shape": name, "method": method, "start": start, **own}
        key |= {"blocks": count, "micro": given.micro, "take": given.take}
        rows.measure(functools.partial(measured, name, settings, start), **key)


def timed_row(child: Decoder, blocks: TokenBlocks, settings: HealSettings, start: int, scratch: Path) -> Row:
    """Heal twice, a single step to warm up and then the whole, and account for the seconds."""
    child.model.to("cpu" if settings.frozen == "cpu" else choose_device("auto"))
    warm = replace(settings, epochs=1)
    warm_up_s = seconds(lambda: healed(child, blocks.first(settings.batch_size), warm, start, scratch))[1]
    reset_peak()
    with stopwatch() as took:
        result, wall_s = seconds(lambda: healed(child, blocks, settings, start, scratch))
    parts = {f"{name}_s": took[name] for name in TIMED}
    training_s = wall_s - sum(parts.values())
    floor = floor_flops(child, blocks, settings, start)
    return {
        "wall_s": wall_s,
        "warm_up_s": warm_up_s,
        "training_s": training_s,
        **parts,
        "learning_s": parts["filling_s"] + training_s,
        "floor_flops": floor,
        "peak_bytes": peak_bytes(),
        "weight_bytes": sum(parameter.nbytes for parameter in child.model.parameters()),
        "tokens": result.tokens,
        "labelled_tokens": result.labelled_tokens,
        "steps": result.steps,
        "trained_parameters": result.trained_parameters,
        "cached_fraction": result.cached_fraction,
        "cache_bytes": result.cache_bytes,
        "documents": result.documents,
        "micro_batch_size": result.micro_batch_size,
    }


def floor_flops(child: Decoder, blocks: TokenBlocks, settings: HealSettings, start: int) -> int:
    """Return the fewest FLOPs of a healing."""
    costs = LayerCosts.of(child.model, rank=settings.lora_rank)
    how = {"depth": len(child), "epochs": settings.epochs}
    amount = Amount.of(blocks, apart=settings.separate_documents)
    if settings.method == "lora":
        return lora_flops(costs, amount, **how)
    first, trained = (start - 1, 2) if settings.method == "endpoint" else (0, len(child))
    return layer_flops(costs, amount, boundary=first, trained=trained, cached=settings.cache_gib > 0, **how)


def matmul_flops_per_s(device: torch.device, size: int) -> float:
    """Return what the device reaches in a square product of random bfloat16 matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            torch.mm(left, right)

    return 10 * 2 * size**3 / median_s(products, 5)


def kernels(rows: Rows, given: argparse.Namespace, sizes: HealSizes) -> None:
    """Count what a step launches, and name the attention that ran."""
    device = choose_device(given.device)
    child = functools.lru_cache(maxsize=1)(lambda name: random_child(sizes, name, device))
    for name, method, changes in sizes.kernel_plan():
        settings, start = settings_of(given, sizes, method=method, **changes), sizes.starts[name][0]
        blocks = packed_blocks(sizes, sizes.batch_size, sizes.shapes[name][1])
        work = functools.partial(counted, functools.partial(child, name), blocks, settings, start, given.scratch)
        rows.measure(work, part="kernels", shape=name, method=method, start=start, **changes, micro=given.micro)


def counted(
    child: Callable[[], Decoder], blocks: TokenBlocks, settings: HealSettings, start: int, scratch: Path
) -> Row:
    """Count operations of healings of one step and of three: the difference is that of two steps."""
    healed(child(), blocks, replace(settings, epochs=1), start, scratch)  # the first call launches more
    one, three = (operations(child(), blocks, replace(settings, epochs=n), start, scratch) for n in (1, 3))
    steps = {name: (three[name] - one[name]) / 2 for name in three if three[name] != one[name]}
    attention = {name: count for name, count in steps.items() if "attention" in name and "backward" not in name}
    waits = {name: count for name, count in steps.items() if "Synchronize" in name or name in WAITING}
    return {
        "launches": steps.get("cudaLaunchKernel", 0.0) + steps.get("cuLaunchKernel", 0.0),
        "copies": steps.get("cudaMemcpyAsync", 0.0),
        "operations": sum(count for name, count in steps.items() if name.startswith("aten::")),
        "attention": attention,
        "waits": waits,
    }


def operations(child: Decoder, blocks: TokenBlocks, settings: HealSettings, start: int, scratch: Path) -> Counter[str]:
    """Return {operation or call of the driver: how often} of a healing."""
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as seen:
        healed(child, blocks, settings, start, scratch)
    return Counter({event.key: event.count for event in seen.key_averages()})
