"""Which recipe heals best? Named trials on a real model, several at once on each GPU.

    python benchmarks/selection.py --out .gpu/b/selection.jsonl.gz
    python benchmarks/recipes.py --data ../shared/data --chosen-by .gpu/b/selection.jsonl.gz \
        --out docs/benchmarks/recipes.json --minutes 9 --workers 5
    python benchmarks/recipes.py ... --best
    python benchmarks/recipes.py --out docs/benchmarks/recipes.json --table --doc docs/benchmarks/heal.md

A trial cuts SmolLM2's 30 layers at the segment that `clp` chooses, stitches, heals, and is measured by what trials are
chosen by (recipe_measures.py); recipe_trials.py has the list. What is reported is measured for final recipes alone,
those of the rules of recipe_choice.py (`--best`) or named ones (`--final`), healed anew with other seeds. One trial
leaves a GPU idle most of the time: each worker is a process that takes the next trial. This process alone writes; a
trial that fails has its reason for a row. `--data` is a folder of calib/, instruct/, lm/ and tasks/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from heal_tables import insert
from measuring import Row, Rows, arguments
from recipe_bench import BY_NAME, FEW, TINY, Sizes, open_bench, tiny_model, work
from recipe_choice import ALWAYS, chosen
from recipe_data import Prepared
from recipe_tables import TABLES, tables, with_parent
from recipe_trials import TRIALS

ANSWERS_S, MEASURES_S = 200.0, 60.0
"""Seconds that the parent's answers should take, and the measures of a final trial or of the parent."""


@dataclass
class Clock:
    """Tells whether a unit would end in time, from how long those before it took."""

    ratios: list[float] = field(default_factory=list)
    """Seconds over their estimate, of units that are done."""

    def estimate_s(self, unit: Row) -> float:
        """Return a unit's seconds as they are thought of beforehand."""
        if unit["part"] in ("answers", "parent"):
            return {"answers": ANSWERS_S, "parent": MEASURES_S}[unit["part"]]
        return BY_NAME[unit["name"]].estimate_s() + (MEASURES_S if unit["part"] == "final" else 0.0)

    def expects_s(self, unit: Row) -> float:
        """Return a unit's seconds as they go here."""
        return self.estimate_s(unit) * (statistics.median(self.ratios) if self.ratios else 1.0)

    def is_over(self, rows: Rows, unit: Row) -> bool:
        """Tell whether a unit would end too late."""
        return time.monotonic() - rows.began + self.expects_s(unit) > 60 * rows.minutes

    def note(self, unit: Row, took_s: float) -> None:
        """Learn from a unit that is done."""
        self.ratios.append(took_s / self.estimate_s(unit))


def waiting(rows: Rows, given: argparse.Namespace) -> Iterator[Row]:
    """Yield the units that are left: what others need, finals with the longest first, trials as they are listed."""
    names = given.trials or [trial.name for trial in TRIALS if not given.final]
    finals = [{"part": "final", "name": name, "seed": seed} for seed in given.seeds for name in given.final]
    heals = sorted(finals, key=Clock().estimate_s, reverse=True)
    heals += [{"part": "trial", "name": name, "seed": 0} for name in names]
    answers = dict.fromkeys(BY_NAME[unit["name"]].answers for unit in heals)
    units = [{"part": "parent"}, *({"part": "answers", "how": how} for how in answers if how != "given"), *heals]
    yield from (unit for unit in units if rows.find(**unit) is None or _lost(rows, given, unit))


def _lost(rows: Rows, given: argparse.Namespace, unit: Row) -> bool:
    """Tell whether answers were written on another machine: a row is there, the file is not."""
    return unit["part"] == "answers" and not (given.cache / f"answers-{unit['how']}.jsonl").exists()


def ready(unit: Row, rows: Rows, given: argparse.Namespace, running: list[Row]) -> bool:
    """Tell whether a unit can begin: the parent's answers are written, if it heals on them."""
    if unit["part"] not in ("trial", "final"):
        return True
    needs = {"part": "answers", "how": BY_NAME[unit["name"]].answers}
    written = rows.find(**needs) is not None and not _lost(rows, given, needs)
    return needs["how"] == "given" or (written and needs not in running)


def run(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    """Let the workers do one unit after the other; where one dies, new ones go on, unless they do not come to work."""
    clock, done = Clock([] if sizes.records is None else [0.1]), -1  # little text takes little time
    while _run(rows, given, sizes, clock):
        if len(clock.ratios) == done:
            raise SystemExit("workers die before they have done anything - look above")
        done = len(clock.ratios)
        print("a worker died: new ones go on", flush=True)


def _run(rows: Rows, given: argparse.Namespace, sizes: Sizes, clock: Clock) -> bool:
    """Return whether a worker died; what ran then is lost, and the rows of its trials say so."""
    running: dict[Future, Row] = {}
    context, died = get_context("spawn"), False
    turns = context.Value("i", 0)
    with ProcessPoolExecutor(given.workers, context, open_bench, (given, sizes, turns)) as pool:
        while not died:
            for unit in waiting(rows, given):
                if len(running) == given.workers:
                    break
                if unit in running.values() or not ready(unit, rows, given, list(running.values())):
                    continue
                if clock.is_over(rows, unit):
                    if unit not in rows.missing:
                        rows.miss(unit)
                else:
                    running[pool.submit(work, unit)] = unit
            if not running:
                return False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                died |= _keep(rows, running.pop(future), future, clock, given)
        for future, unit in running.items():
            _keep(rows, unit, future, clock, given)
    return died


def _keep(rows: Rows, unit: Row, future: Future, clock: Clock, given: argparse.Namespace) -> bool:
    """Keep what a unit found, or why it failed; return whether its worker died."""
    if error := future.exception():
        traceback.print_exception(error)
        died = isinstance(error, BrokenProcessPool)
        if "name" in unit or not died:  # what trials need is tried again where another unit may have ended the worker
            rows.add(unit, {"failed": f"{type(error).__name__}: {error}"[:300], "workers": given.workers}, 0.0)
        return died
    found, took_s = future.result()
    clock.note(unit, took_s)
    rows.add(unit, found | {"workers": given.workers, "took_s": took_s}, took_s)
    return False


def prepare(given: argparse.Namespace, sizes: Sizes) -> None:
    """Make what every worker needs, before there are several."""
    if given.tiny:
        given.model = tiny_model(given.cache / "tiny")
    prepared = Prepared(given.cache, given.data, sizes.records)
    prepared.checkpoint(given.model)
    for trial in TRIALS:
        trial.config(prepared.sources(), sizes.settings)  # a setting that is wrong is told before anything runs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--chosen-by", type=Path, default=Path(".gpu/b/selection.jsonl.gz"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/recipes"), help="for what trials share")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--trials", nargs="+", choices=BY_NAME, default=[], metavar="NAME", help="these alone")
    parser.add_argument("--final", nargs="+", choices=BY_NAME, default=[], metavar="NAME", help="heal anew and report")
    parser.add_argument("--best", action="store_true", help="the same for those that the rules choose")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of final trials")
    parser.add_argument("--few", action="store_true", help="few blocks and items of the real model")
    parser.add_argument("--tiny", action="store_true", help="few blocks and items of a tiny model: does it run?")
    parser.add_argument("--doc", type=Path, help="a document to insert the tables into")
    given = parser.parse_args()
    sizes = TINY if given.tiny else FEW if given.few else Sizes()
    rows = Rows(given.out, given.minutes, again=given.again)
    if given.best:
        print(json.dumps(answers := chosen(rows.all)), flush=True)
        given.final = list(dict.fromkeys([ALWAYS, *answers.values()]))
    if not given.table:
        prepare(given, sizes)
        run(rows, given, sizes)
    print(tables(rows.all))
    if given.doc:
        insert(given.doc, TABLES, with_parent(rows.all))


if __name__ == "__main__":
    main()
