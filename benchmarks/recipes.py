"""Which recipe heals best? Named trials on a real model, several at once on each GPU.

    python benchmarks/selection.py --out .gpu/b/selection.jsonl.gz
    python benchmarks/recipes.py --data ../shared/data --chosen-by .gpu/b/selection.jsonl.gz \
        --out docs/benchmarks/recipes.json --minutes 9 --workers 5
    python benchmarks/recipes.py ... --best
    python benchmarks/recipes.py --out docs/benchmarks/recipes.json --table --doc docs/benchmarks/heal.md

A trial cuts SmolLM2's 30 layers at the segment that `clp` chooses, stitches, heals, and is measured by what trials are
chosen by (recipe_measures.py); recipe_trials.py has the list. What is reported is measured for final recipes alone,
those of the rules of recipe_choice.py (`--best`) or named ones (`--final`), healed anew with other seeds. Workers
(workers.py) take one trial after the other. `--data` is a folder of calib/, instruct/, lm/ and tasks/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from heal_tables import insert
from measuring import Row, Rows, arguments
from recipe_bench import BY_NAME, FEW, TINY, Sizes, open_bench, tiny_model, work
from recipe_choice import ALWAYS, chosen
from recipe_data import Prepared
from recipe_tables import TABLES, tables, with_parent
from recipe_trials import TRIALS
from workers import Crew

ANSWERS_S, MEASURES_S = 200.0, 60.0
"""Seconds that the parent's answers should take, and the measures of a final trial or of the parent."""


def estimate_s(unit: Row) -> float:
    """Return a unit's seconds as they are thought of beforehand."""
    if unit["part"] in ("answers", "parent"):
        return {"answers": ANSWERS_S, "parent": MEASURES_S}[unit["part"]]
    return BY_NAME[unit["name"]].estimate_s() + (MEASURES_S if unit["part"] == "final" else 0.0)


def waiting(rows: Rows, given: argparse.Namespace) -> Iterator[Row]:
    """Yield the units that are left: what others need, finals with the longest first, trials as they are listed."""
    names = given.trials or [trial.name for trial in TRIALS if not given.final]
    finals = [{"part": "final", "name": name, "seed": seed} for seed in given.seeds for name in given.final]
    heals = sorted(finals, key=estimate_s, reverse=True)
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
    """Let the workers do one unit after the other."""
    ratios = [] if sizes.records is None else [0.1]  # little text takes little time
    opener = (open_bench, (given, sizes))
    crew = Crew(rows, given.workers, opener, work, estimate_s, needed=lambda unit: "name" not in unit, ratios=ratios)
    crew.run(lambda: waiting(rows, given), lambda unit, running: ready(unit, rows, given, running))


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
