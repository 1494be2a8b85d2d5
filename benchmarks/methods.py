"""The paper's comparison on a real model: which layers to remove, and what healing makes of what is left.

    python benchmarks/methods.py --data ../shared/data --out docs/benchmarks/methods.json --minutes 9 --workers 10
    python benchmarks/methods.py --out docs/benchmarks/methods.json --table --doc docs/benchmarks/methods.md

Rates 20, 10 and 30 % of SmolLM2's 30 layers, in that order. The searches of this package, windows by three lots, and
the greedy removal of the layer without which perplexity rises least (SLEB, arXiv:2402.09025), wherever it stands. No
healing, endpoint tuning and LoRA by the paper's recipe, on the same blocks of Alpaca for the same number of steps. A
cell is a row; methods that remove the same layers share theirs, and without healing there is one seed. Texts are parted
as in benchmarks/recipes.py; tasks and held-out text are those it reports, items evenly spaced.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heal_tables import insert
from measuring import Row, Rows, arguments, seconds
from method_tables import HEALINGS, RATES, TABLES, key_of, removals, runs_of, tables, with_others
from recipe_bench import FEW, Bench, Sizes, tiny_model
from recipe_data import STORED, Prepared
from recipe_measures import MeasureSizes
from recipe_trials import Trial
from workers import Crew

from layerscalpel.cut import cut_model
from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import load_decoder, save_decoder
from layerscalpel.evaluate import evaluate
from layerscalpel.heal import heal_model
from layerscalpel.hooks import bypass
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.search import SEARCHES
from layerscalpel.segment import Segment, seams_of
from layerscalpel.settings import SearchName, SearchSettings
from layerscalpel.task import Task

LOTS = 3
"""Windows that are drawn by lot."""
SEARCHED: tuple[SearchName, ...] = ("clp", "angular", "influence", "last")
SEARCH_BLOCKS, GREEDY_BLOCKS = 64, 32
BUDGET = {"data.healing_blocks": 800, "heal.objective": "ce", "heal.epochs": 2, "heal.lr": 5e-4, "heal.validations": 1}
"""Of every healing: 100 steps of 16 blocks of 512 tokens."""
ITEMS = 1000
"""Of every task."""
ESTIMATES_S = {"segments": 60.0, "none": 15.0, "endpoint": 35.0, "lora": 45.0, "parent": 20.0}


class Cells:
    """What a worker does."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes) -> None:
        self.bench, self.more = Bench(given, sizes), BUDGET | sizes.settings
        self.parent, self.prepared = self.bench.parent, self.bench.prepared

    def do(self, part: str, n: int = 0, layers: str = "", healing: str = "none", seed: int = 0) -> Row:
        """Do a unit of work."""
        if part == "parent":
            return self.bench.measures.report(self.bench.measures.parent)
        if part == "segments":
            return {"layers": self.find(n)}
        return self.cell(layers, healing, seed)

    def find(self, n: int) -> dict[str, list[str]]:
        """Return {method: the layers that it removes, of each lot}."""
        tokenizer, decoder = self.bench.tokenizer, self.bench.measures.parent
        blocks = self.prepared.calibration(tokenizer, SEARCH_BLOCKS)
        settings = SearchSettings(num_blocks=len(blocks), batch_size=16, num_starts=3, gate_blocks=len(blocks))

        def search(method: SearchName, seed: int = 0) -> str:
            result = SEARCHES[method].find(Task(decoder, blocks.tokens, n, settings, seed))
            return key_of([i for segment in result.segments for i in range(segment.start, segment.stop)])

        found = {method: [search(method)] for method in SEARCHED}
        return found | {
            "greedy": [key_of(greedy(decoder, blocks.first(GREEDY_BLOCKS), n))],
            "random": [search("random", lot) for lot in range(LOTS)],
        }

    def cell(self, layers: str, healing: str, seed: int) -> Row:
        """Remove layers, heal, and measure what comes of it in the format that it would be saved in."""
        segments = [Segment(*run, len(self.parent)) for run in runs_of(layers)]
        child = find_layers(load_decoder(str(self.child(layers, segments)), device=self.bench.given.device).model)
        found: Row = {}
        if healing != "none":
            trial = Trial("budget", 0, "alpaca", {"heal.method": healing})
            args = (self.parent.model, self.bench.tokenizer, trial, seed, self.more)
            settings = trial.config(self.prepared.sources(), self.more).heal
            scratch = self.prepared.root / f"scratch-{layers}-{healing}-{seed}".replace(":", "-").replace(",", "+")
            healed = functools.partial(heal_model, child, None, seams_of(segments), *self.prepared.blocks(*args))
            result, found["heal_s"] = seconds(lambda: healed(settings, seed=seed, scratch=scratch))
            found |= {"steps": result.steps, "tokens": result.tokens, "trained_parameters": result.trained_parameters}
            found["best_step"] = result.best_step
        return found | self.bench.measures.report(self.bench.as_stored(child))

    def child(self, layers: str, segments: list[Segment]) -> Path:
        """Return the checkpoint of the parent without some layers."""

        def make(folder: Path) -> None:
            model: Any = self.parent.model
            for segment in reversed(segments):
                left = len(find_layers(model))
                model = cut_model(find_layers(model), Segment(segment.start, segment.stop, left))[0]
            save_decoder(model, self.bench.tokenizer, folder, dtype=STORED)

        return self.prepared.made(f"without-{layers}".replace(":", "-").replace(",", "+"), make)


def greedy(decoder: Decoder, blocks: TokenBlocks, n: int) -> list[int]:
    """Return n layers, taken one after the other, each the one without which perplexity is lowest."""
    removed: list[int] = []
    for _ in range(n):
        ppl: dict[int, float] = {}
        for i in set(range(len(decoder))) - set(removed):
            with contextlib.ExitStack() as stack:
                for j in (*removed, i):
                    stack.enter_context(bypass(decoder, Segment(j, j + 1, len(decoder))))
                ppl[i] = evaluate(decoder, blocks, None, batch_size=16).ppl.value
        removed.append(min(ppl, key=lambda i: ppl[i] if math.isfinite(ppl[i]) else math.inf))
    return sorted(removed)


held: list[Cells] = []
"""A worker process's own."""


def open_cells(given: argparse.Namespace, sizes: Sizes) -> None:
    held.append(Cells(given, sizes))


def work(key: Row) -> tuple[Row, float]:
    """Return a unit's row and seconds, in a worker."""
    return seconds(lambda: held[0].do(**key))


def waiting(rows: Rows, given: argparse.Namespace) -> Iterator[Row]:
    """Yield the units that are left: searches, then the cells of one rate after the other."""
    units: list[Row] = [{"part": "segments", "n": n} for n in given.removed] + [{"part": "parent"}]
    for n in given.removed:
        cells = removals(rows.all, n)
        for healing in HEALINGS:
            for seed in given.seeds if healing != "none" else [0]:
                for layers, lots in cells.items():
                    if healing == "none" or lots or seed == given.seeds[0]:
                        units.append({"part": "cell", "n": n, "layers": layers, "healing": healing, "seed": seed})
    yield from (unit for unit in units if rows.find(**unit) is None)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/methods"), help="for what cells share")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--removed", nargs="+", type=int, default=list(RATES), help="numbers of layers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tiny", action="store_true", help="few blocks and items of a tiny model: does it run?")
    parser.add_argument("--doc", type=Path, help="a document to insert the tables into")
    given = parser.parse_args()
    given.chosen_by = None
    sizes = FEW if given.tiny else Sizes(MeasureSizes(items=ITEMS))
    rows = Rows(given.out, given.minutes, again=given.again)
    if not given.table:
        if given.tiny:
            given.model = tiny_model(given.cache / "tiny")
        Prepared(given.cache, given.data, sizes.records).checkpoint(given.model)
        opener, needed = (open_cells, (given, sizes)), lambda unit: unit["part"] != "cell"
        crew = Crew(rows, given.workers, opener, work, lambda u: ESTIMATES_S[u.get("healing", u["part"])], needed)
        crew.run(lambda: waiting(rows, given))
    print(tables(rows.all))
    print(json.dumps({str(n): removals(rows.all, n) for n in given.removed}))
    if given.doc:
        insert(given.doc, TABLES, with_others(rows.all))


if __name__ == "__main__":
    main()
