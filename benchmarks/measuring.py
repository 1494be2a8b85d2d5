"""What the benchmark scripts share: rows that are kept as soon as they are measured, seconds, FLOPs, tables.

A script that is cut off keeps its rows, and the next call measures only those that are missing.

    rows = Rows(Path("docs/benchmarks/scale.json"), minutes=5)
    rows.measure(lambda: {"wall_s": seconds(work)[1]}, part="race", n=6)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from layerscalpel.config import build_config
from layerscalpel.data import Parts, prepare_blocks
from layerscalpel.hooks import hidden_at
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import Measured, block_mean

Row = dict[str, Any]
Result = TypeVar("Result")


class Rows:
    """The rows of an output file; each has a key, some of its fields."""

    def __init__(self, out: Path, minutes: float, *, again: bool = False) -> None:
        """Read what is there.

        Args:
            out: the file; it need not be there.
            minutes: no row is begun after so many, nor one that would end later if it took as long as the last ones.
            again: measure what is there anew.
        """
        self.out, self.began, self.minutes = out, time.monotonic(), minutes
        self.all: list[Row] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        self.stale = list(self.all) if again else []
        self.slowest: dict[str, float] = {}
        self.missing: list[Row] = []

    def find(self, **key: Any) -> Row | None:
        """Return the row that has these fields, if it need not be measured."""
        return next((row for row in self.all if has(row, key) and row not in self.stale), None)

    def is_over(self, part: str) -> bool:
        """Tell whether there is no time left for another row of a part."""
        return time.monotonic() - self.began + self.slowest.get(part, 0.0) > 60 * self.minutes

    def measure(self, work: Callable[[], Row], **key: Any) -> Row | None:
        """Return the row of a key: as it stands in the file, else measured now; None where time is over."""
        if found := self.find(**key):
            return found
        if self.is_over(key["part"]):
            self.miss(key)
            return None
        began = time.monotonic()
        found = work()
        return self.add(key, found, time.monotonic() - began)

    def add(self, key: Row, found: Row, took_s: float) -> Row:
        """Keep a row that took so long, in the place of one of the same key."""
        self.slowest[key["part"]] = max(self.slowest.get(key["part"], 0.0), took_s)
        row = {**key, **found, **about()}
        self.stale = [old for old in self.stale if not has(old, key)]
        self.all = [old for old in self.all if not has(old, key)] + [row]
        draft = self.out.with_name(self.out.name + ".draft")
        draft.write_text("[\n" + ",\n".join(map(json.dumps, self.all)) + "\n]\n", encoding="utf-8")
        os.replace(draft, self.out)
        print(json.dumps({name: value if len(str(value)) < 300 else "..." for name, value in row.items()}), flush=True)
        return row

    def miss(self, key: Row) -> None:
        """Note that there was no time for a row."""
        self.missing.append(key)
        print(json.dumps({"not measured": key, "reason": f"{self.minutes:g} minutes are over - run again"}), flush=True)


def has(row: Row, key: Row) -> bool:
    return all(name in row and row[name] == value for name, value in key.items())


def about() -> Row:
    """Return where and with what a row was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what all scripts take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="no row is begun after so many")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are in the file")
    parser.add_argument("--table", action="store_true", help="print the tables and measure nothing")
    parser.add_argument("--device", default="auto")
    return parser


def seconds(work: Callable[[], Result]) -> tuple[Result, float]:
    """Return what work returns, and how long it took."""
    wait_for_device()
    began = time.perf_counter()
    result = work()
    wait_for_device()
    return result, time.perf_counter() - began


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_s(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the median seconds of some repeats after a warm-up."""
    work()
    return statistics.median(seconds(work)[1] for _ in range(repeats))


def reset_peak() -> None:
    """Free what nobody uses, and count the device's peak memory from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int | None:
    """Return the most memory of the device that was in use since; None without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def paired(kl_N: Tensor, other_N: Tensor) -> Measured:
    """Return the mean of KL - other KL over the same blocks."""
    return block_mean(kl_N - other_N, torch.ones_like(kl_N))


def blocks_of(tokenizer: Any, calibration: str, held_out: str, *, sizes: dict[str, int], seed: int) -> Parts:
    """Return calibration and held-out blocks; `sizes` has block_tokens, num_calibration and evaluation_blocks."""
    settings = {
        "data.calibration": calibration,
        "data.evaluation": held_out,
        "data.block_tokens": sizes["block_tokens"],
    }
    data = build_config([settings | {"data.evaluation_blocks": sizes["evaluation_blocks"]}]).data
    return prepare_blocks(tokenizer, data, num_calibration=sizes["num_calibration"], seed=seed, heal=False)


@torch.no_grad()
def plain_forward(decoder: Decoder, tokens: Tensor) -> None:
    """Run the model once."""
    decoder.model(input_ids=tokens.to(device_of(decoder.model)), use_cache=False)


@torch.no_grad()
def flops_of(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@contextlib.contextmanager
def countable(decoder: Decoder) -> Iterator[None]:
    """Within, attention is made of products that torch counts; 2.11 does not count fused ones of grouped queries."""
    model: Any = decoder.model
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@dataclass(frozen=True)
class UnitCosts:
    """FLOPs of one layer and of the head, on some tokens."""

    layer: int
    head: int

    @classmethod
    def of(cls, decoder: Decoder, tokens: Tensor) -> UnitCosts:
        """Count them while a decoder of two layers or more runs."""
        tokens = tokens.to(device_of(decoder.model))
        with countable(decoder):
            one, two, depth = (flops_of(lambda b=b: hidden_at(decoder, tokens, b)) for b in (1, 2, len(decoder)))
            return cls(two - one, flops_of(lambda: decoder.model(input_ids=tokens, use_cache=False)) - depth)

    def forward(self, num_layers: int) -> int:
        """Return the FLOPs of the model."""
        return num_layers * self.layer + self.head

    def full_count(self, num_layers: int, windows: Iterable[tuple[int, int]]) -> int:
        """Return the FLOPs of an exact search.

        They are those of the parent, of every window's layers above it, and of a head pass for each.

        Args:
            num_layers: L.
            windows: (start, number of layers) of each.
        """
        above = [num_layers - start - n for start, n in windows]
        return (num_layers + sum(above)) * self.layer + (len(above) + 1) * self.head


def all_windows(num_layers: int, lengths: Iterable[int]) -> list[tuple[int, int]]:
    """Return (start, number of layers) of every window of these lengths."""
    return [(start, n) for n in lengths for start in range(num_layers - n + 1)]


def table(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def with_error(measured: Row | None, digits: int = 3, scale: float = 1.0) -> str:
    """Return `value ± standard error` of a measured quantity as rows keep it."""
    if measured is None:
        return ""
    error = "" if measured["se"] is None else f" ± {scale * measured['se']:.{digits}f}"
    return f"{scale * measured['value']:.{digits}f}{error}"
