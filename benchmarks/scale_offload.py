"""The parts of benchmarks/scale.py on random models of LLaMA's shapes whose layers come in one by one."""

from __future__ import annotations

import argparse
import contextlib
import functools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from measuring import Row, Rows, UnitCosts, all_windows, median_s, peak_bytes, plain_forward, reset_peak, seconds
from shapes import Sizes, aliased, layer_file, random_model, random_tokens, write_checkpoint
from surgery import forget
from torch import Tensor

from layerscalpel.decoder import choose_device
from layerscalpel.exact import score
from layerscalpel.feed import LayerFeed
from layerscalpel.layers import Decoder, device_of
from layerscalpel.memory import host_buffer
from layerscalpel.offload import offloaded_decoder
from layerscalpel.origin import peek
from layerscalpel.probe import find_layers
from layerscalpel.reader import read_into
from layerscalpel.shards import read_weights
from layerscalpel.store import StreamStore
from layerscalpel.streams import window

PIECE_BYTES = 1 << 24
ALIASED = "every layer is the one that is stored, in host memory too"


def seventy(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    """Score all windows of a model larger than the device, whose layers come in from host memory or from files."""
    device, shape = choose_device(given.device), sizes.seventy
    folder, config = given.folder / "seventy", shape.config()
    all_of = all_windows(shape.layers, [sizes.seventy_removed])
    few = all_of[:: -(-len(all_of) // sizes.few_windows)]
    jobs = [(keep, name) for keep in ("cpu", "disk") for name in ("few", "all")]
    keys = {job: {"part": "seventy", "keep": job[0], "windows": job[1]} for job in jobs}
    if all(rows.find(**key) for key in keys.values()):
        return
    write_checkpoint(folder, config, [0], device)
    weights = aliased(read_weights(folder), shape.layers)

    @functools.cache
    def unit(tokens: tuple[int, int]) -> tuple[UnitCosts, float]:
        decoder = find_layers(random_model(shape.config(layers=2), device))
        ids = random_tokens(tokens, config.vocab_size)
        costs = UnitCosts.of(decoder, ids)
        return costs, costs.forward(2) / median_s(lambda: plain_forward(decoder, ids))

    @functools.lru_cache(maxsize=1)
    def opened(keep: Any) -> Decoder:
        options = {"device": given.device, "dtype": "bfloat16", "keep": keep}
        decoder = offloaded_decoder(peek(str(folder)), weights=weights, **options)[1]
        if keep == "cpu":
            share_one_layer(decoder)
        return decoder

    def measured(keep: str, name: str) -> Row:
        tokens, windows, repeats = (sizes.few_tokens, few, 3) if name == "few" else (sizes.tokens, all_of, 1)
        costs, flops_per_s = unit(tokens)
        floor_s = costs.full_count(shape.layers, windows) / flops_per_s
        found = offloaded(opened(keep), random_tokens(tokens, config.vocab_size), windows, given, repeats)
        at_best = max(floor_s, found["pass_bytes"] / found["copy_bytes_per_s"])
        more = {"tokens": list(tokens), "compute_floor_s": floor_s, "flops_per_s": flops_per_s, "layers": ALIASED}
        return found | more | {"wall_over_floor": found["wall_s"] / at_best}

    with memory_limit(device, given.device_gib):
        for job, key in keys.items():
            rows.measure(functools.partial(measured, *job), **key)


@contextlib.contextmanager
def memory_limit(device: torch.device, gib: float) -> Iterator[None]:
    """Within, the process gets no more of the device's memory."""
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def share_one_layer(decoder: Decoder) -> None:
    """Have all layers in host memory be one, read now: so many times its bytes need not be there."""
    feed = feed_of(decoder)
    part = feed._parts[0]
    host = host_buffer(part.buffer_bytes, device_of(decoder.model))
    for file, begin, within in part.pieces():
        read_into(host[within], file, begin)
    feed._kept.update(dict.fromkeys(range(len(decoder)), host))


def feed_of(decoder: Decoder) -> LayerFeed:
    assert isinstance(decoder.resident, LayerFeed)
    return decoder.resident


def offloaded(
    decoder: Decoder, tokens: Tensor, windows: list[tuple[int, int]], given: argparse.Namespace, repeats: int
) -> Row:
    """Time passes over a model whose layers come in one by one, beside plain copies to the device."""
    feed, device = feed_of(decoder), device_of(decoder.model)
    sizes = {"device_bytes": int(given.store_gib * 2**30), "host_bytes": 8 * 2**30}
    removals = [window(*of_window) for of_window in windows]
    copies = copy_bytes_per_s(device, feed.num_bytes // len(decoder))
    reset_peak()
    with StreamStore(device, folder=given.folder / "streams", **sizes) as store:
        work = functools.partial(score, decoder, tokens, removals, batch_size=4, store=store)
        wall_s = median_s(work, repeats) if repeats > 1 else seconds(work)[1]
        file_bytes = store.file_peak
    return {
        "num_windows": len(windows),
        "repeats": repeats,
        "wall_s": wall_s,
        "waited_s": feed.seconds_waited,
        "pass_bytes": feed.num_bytes,
        "load_bytes_per_s": feed.num_bytes / wall_s,
        "copy_bytes_per_s": copies,
        "copy_share": feed.num_bytes / wall_s / copies,
        "device_limit_bytes": int(given.device_gib * 2**30) if device.type == "cuda" else None,
        "peak_bytes": peak_bytes(),
        "host_bytes": psutil.Process().memory_info().rss,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "streams_file_bytes": file_bytes,
    }


def copy_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """Return the bandwidth of plain copies from page-locked host memory to the device."""
    host, place = host_buffer(num_bytes, device), torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes / median_s(lambda: place.copy_(host, non_blocking=True), 5)


def disk(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    """Read a checkpoint that is not in the system's cache, plainly and by a pass of few tokens, in turns."""
    device, shape, folder = choose_device(given.device), sizes.seventy, given.folder / "disk"
    num_layers = max(4, int(given.disk_gib * 2**30 / shape.layer_bytes()))
    keys = [{"part": "disk", "turn": turn, "num_layers": num_layers} for turn in range(sizes.turns)]
    if all(rows.find(**key) for key in keys):
        return
    config = shape.config(layers=num_layers)
    write_checkpoint(folder, config, range(num_layers), device)
    decoder = offloaded_decoder(peek(str(folder)), device=given.device, dtype="bfloat16", keep="disk")[1]
    files = [folder / layer_file(i) for i in range(num_layers)]
    tokens, n = random_tokens(sizes.few_tokens, config.vocab_size), max(1, num_layers // 5)
    windows = all_windows(num_layers, [n])[:: num_layers - n]

    def measured() -> Row:
        plain_s = cold_s(folder, lambda: read_plainly(files))[0]
        pass_s, read = cold_s(folder, lambda: score(decoder, tokens, [window(*each) for each in windows]))
        plain, passed = sum(file.stat().st_size for file in files) / plain_s, feed_of(decoder).num_bytes / pass_s
        found = {"plain_bytes_per_s": plain, "pass_bytes_per_s": passed, "pass_over_plain": passed / plain}
        return found | {"pass_bytes": feed_of(decoder).num_bytes, "pass_s": pass_s, "storage_read_bytes": read}

    for key in keys:
        rows.measure(measured, **key)


def cold_s(folder: Path, work: Callable[[], Any]) -> tuple[float, int | None]:
    """Return seconds and bytes that came from storage, of work on files that are not in the system's cache."""
    forget(folder)
    before = storage_bytes()
    _, wall_s = seconds(work)
    after = storage_bytes()
    return wall_s, None if before is None or after is None else after - before


def storage_bytes() -> int | None:
    """Return the bytes that this process had the system read from storage; None where it does not tell."""
    try:
        return psutil.Process().io_counters().read_bytes
    except (AttributeError, psutil.Error, OSError):
        return None


def read_plainly(files: list[Path]) -> None:
    """Read files from their beginnings to their ends, one after the other."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
