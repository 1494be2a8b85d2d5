"""Does a short healing of several candidates find a better segment than KL before healing (clp)?

    python benchmarks/pilot.py --c4 c4.jsonl.gz --alpaca alpaca.jsonl.gz --tasks ../shared/data/tasks \
        --out docs/benchmarks/pilot.json --minutes 8 --workers 5
    python benchmarks/pilot.py --out docs/benchmarks/pilot.json --table

For every n and seed the `pilot` search runs once; what `clp` chooses is the winner of the race within it. Each choice
then gets the paper's full recipe (endpoint, cross-entropy, 2 epochs, learning rate 5e-4, blocks of 512, batch 16) and
is measured in float32 on held-out C4 blocks and on tasks. For n = 6 and seed 0 so does every other pilot: does the
ranking of the pilots predict that of the full recipe? Searched and healed is in the dtype that is the command's own
default: on CUDA the stored bfloat16 with float32 masters. Workers are processes that share the device, which one alone
does not fill; seconds are those of a shared device then. benchmarks/heal_steps.py times healing in other formats.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measuring import Row, Rows, arguments, seconds
from pilot_tables import tables
from tasks import accuracies, read_items

from layerscalpel.config import build_config
from layerscalpel.data import Parts, prepare_blocks
from layerscalpel.decoder import load_decoder
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.heal import heal_model
from layerscalpel.layers import Decoder
from layerscalpel.pilot import find_pilot, own_seam
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet
from layerscalpel.settings import Config
from layerscalpel.task import Pilots, Task

RECIPE: Row = {"heal.epochs": 2, "heal.lr": 5e-4, "heal.batch_size": 16, "heal.micro_batch_size": 16}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    plan: tuple[tuple[int, int], ...] = ((6, 0), (6, 1), (6, 2), (9, 0), (3, 0))
    """(n, seed), the most telling first."""
    every_candidate: tuple[int, int] = (6, 0)
    settings: Row = field(default_factory=lambda: {"data.evaluation_blocks": 128})
    limit: int = 1000
    """Items of a task."""
    tokens_at_once: int = 1 << 14


TINY = Sizes(
    plan=((6, 0),),
    settings={
        "data.evaluation_blocks": 2,
        "data.block_tokens": 16,
        "data.healing_blocks": 32,
        "data.healing_block_tokens": 64,
        "search.num_blocks": 8,
        "search.gate_blocks": 1,
        "search.num_starts": 1,
        "search.pilot_count": 2,
        "search.pilot_steps": 1,
        "heal.batch_size": 2,
        "heal.micro_batch_size": 2,
        "heal.epochs": 1,
        "heal.validations": 1,
    },
    limit=2,
    tokens_at_once=256,
)
"""To see whether it runs at all."""


class Bench:
    """What one worker holds: the parent to search and heal, the same in float32 to measure with, and the text."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes, scratch: Path, dtype: str = "auto") -> None:
        set_quiet(True)
        sources = {"data.calibration": given.c4, "data.evaluation": given.c4, "data.healing": given.alpaca}
        self.config: Config = build_config([RECIPE | sizes.settings | sources])
        self.sizes, self.scratch = sizes, scratch
        model, self.tokenizer, _ = load_decoder(given.model, device=given.device, dtype=dtype)
        self.parent = find_layers(model)
        self.exact = self.parent
        if model.dtype != torch.float32:
            self.exact = find_layers(load_decoder(given.model, device=given.device, dtype="float32").model)
        self.items = read_items(given.tasks, sizes.limit)
        self.parts = functools.cache(self._parts)

    def _parts(self, seed: int) -> Parts:
        search = self.config.search
        count = max(search.num_blocks, search.gate_blocks)
        return prepare_blocks(self.tokenizer, self.config.data, num_calibration=count, seed=seed)

    def task(self, n: int, seed: int) -> Task:
        """Return the search of a cell."""
        parts, scratch = self.parts(seed), self.scratch / f"search-{n}-{seed}"
        assert parts.healing is not None
        assert parts.validation is not None
        pilots = Pilots(parts.healing, parts.validation, self.config.heal, scratch)
        return Task(self.parent, parts.calibration.tokens, n, self.config.search, seed, pilots=pilots)

    def do(self, part: str, n: int = 0, seed: int = 0, start: int = 0) -> Row:
        """Measure a unit of work."""
        if part == "parent":
            return {"tasks": self.answers(self.exact)}
        return self.search(n, seed) if part == "search" else self.full_recipe(n, seed, start)

    def search(self, n: int, seed: int) -> Row:
        """Search by pilots; the race within it is all that clp would choose by."""
        task = self.task(n, seed)
        result, wall_s = seconds(lambda: find_pilot(task))
        pilots = result.details["pilots"]
        pilots_s = sum(pilot["wall_s"] for pilot in pilots)
        return {
            "clp_start": result.details["certificate"]["exact_start"],
            "pilot_start": result.segment.start,
            "certificate": result.details["certificate"],
            "pilots": [pilot | {"before": result.scores[str(pilot["start"])]} for pilot in pilots],
            "gate_and_race_s": wall_s - pilots_s,
            "pilots_s": pilots_s,
            "dtype": str(self.parent.model.dtype),
        }

    def full_recipe(self, n: int, seed: int, start: int) -> Row:
        """Heal a segment by the full recipe and measure what comes of it."""
        task = self.task(n, seed)
        assert task.pilots is not None
        child, scratch = own_seam(task, start, self.config.heal.width), self.scratch / f"heal-{n}-{seed}-{start}"
        blocks = (task.pilots.healing, task.pilots.validation)
        healed, wall_s = seconds(
            lambda: heal_model(child, None, [start], *blocks, self.config.heal, seed=seed, scratch=scratch)
        )
        figures = self.judge(find_layers(copy.deepcopy(child.model).float()), seed)
        loss = min(row["loss_nats"] for row in healed.validation)
        return {"heal_s": wall_s, "steps": healed.steps, "best_step": healed.best_step, "loss_nats": loss, **figures}

    def judge(self, child: Decoder, seed: int) -> Row:
        """Measure a child on held-out text and tasks, in float32."""
        held_out = self.parts(seed).evaluation
        reference = Reference(self.exact, final_hidden(self.exact, held_out.tokens, batch_size=16))
        return evaluate(child, held_out, reference, batch_size=16).to_dict() | {"tasks": self.answers(child)}

    def answers(self, decoder: Decoder) -> Row:
        """Return what a model gets right."""
        return accuracies(decoder, self.tokenizer, self.items, tokens_at_once=self.sizes.tokens_at_once)


held: list[Bench] = []
"""Of a worker's process: its bench."""


def open_bench(*arguments_: Any) -> None:
    held.append(Bench(*arguments_))


def work(key: Row) -> tuple[Row, float]:
    return seconds(lambda: held[0].do(**key))


def waiting(rows: Rows, sizes: Sizes) -> Iterator[Row]:
    """Yield the units that can be measured now, the most telling first."""
    last: list[Row] = []
    units: list[Row] = [{"part": "parent"}]
    for n, seed in sizes.plan:
        cell = {"n": n, "seed": seed}
        search = rows.find(part="search", **cell)
        if search is None:
            units.append({"part": "search", **cell})
            continue
        chosen = {search["clp_start"], search["pilot_start"]}
        units += [{"part": "healed", **cell, "start": start} for start in sorted(chosen)]
        if (n, seed) == sizes.every_candidate:
            others = sorted({pilot["start"] for pilot in search["pilots"]} - chosen)
            last += [{"part": "healed", **cell, "start": start} for start in others]
    yield from (unit for unit in units + last if rows.find(**unit) is None)


def run(rows: Rows, given: argparse.Namespace, sizes: Sizes, scratch: Path) -> None:
    """Let the workers do one unit after the other; this process alone writes."""
    running: dict[Future, Row] = {}
    context, initial = get_context("spawn"), (given, sizes, scratch)
    with ProcessPoolExecutor(given.workers, context, open_bench, initial) as pool:
        while True:
            for unit in waiting(rows, sizes):
                if len(running) == given.workers:
                    break
                if unit in running.values() or unit in rows.missing:
                    continue
                if rows.is_over(unit["part"]):
                    rows.miss(unit)
                else:
                    running[pool.submit(work, unit)] = unit
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                if error := future.exception():
                    traceback.print_exception(error)
                    rows.missing.append(unit)
                else:
                    found, took = future.result()
                    rows.add(unit, found | {"workers": given.workers}, took)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Sizes]:
    """Add what a bench takes, and read all."""
    parser.add_argument("--model", default="demo")
    parser.add_argument("--c4", default="")
    parser.add_argument("--alpaca", default="")
    parser.add_argument("--tasks", type=Path, help="folder of the task files")
    parser.add_argument("--tiny", action="store_true", help="a few short blocks of one cell: does it run?")
    given = parser.parse_args()
    if not given.table and not (given.c4 and given.alpaca and given.tasks):
        parser.error("give --c4, --alpaca and --tasks")
    return given, TINY if given.tiny else Sizes()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1)
    given, sizes = parse(parser)
    rows = Rows(given.out, given.minutes, again=given.again)
    if not given.table:
        with tempfile.TemporaryDirectory() as scratch:
            run(rows, given, sizes, Path(scratch))
    print(tables(rows.all))


if __name__ == "__main__":
    main()
