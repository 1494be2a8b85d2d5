"""Seconds of a healing step by the number format of the weights: does another make healing faster?

    python benchmarks/heal_steps.py --c4 c4.jsonl.gz --alpaca alpaca.jsonl.gz --tasks ../shared/data/tasks \
        --out docs/benchmarks/heal_steps.json

The paper's recipe (blocks of 512, batch 16) at n = 6, start 12, in bfloat16 weights with float32 masters, and in
float32 with and without TF32. A step is the difference of a longer and a shorter healing, over the difference of their
steps: what both do once, the prefix and the validation, is out of it. Of the validation only the last is left.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from measuring import Row, Rows, arguments, seconds, table
from pilot import Bench, parse

from layerscalpel.heal import HEALERS
from layerscalpel.pilot import own_seam

PRECISIONS = (("bfloat16", False), ("float32", True), ("float32", False))
"""(dtype of the weights, whether matrix products are in TF32)."""
START = 12


def step_s(bench: Bench, steps: tuple[int, int]) -> float:
    """Return the seconds of a step from healings of so many steps."""
    heal, walls = replace(bench.config.heal, epochs=1, validations=1), []
    task, train = bench.task(6, 0), HEALERS["endpoint"].train
    assert task.pilots is not None
    assert train is not None
    held_out = task.pilots.validation.first(heal.batch_size)
    for count in (steps[0], *steps):  # the first one warms up
        child, blocks = own_seam(task, START, heal.width), task.pilots.healing.first(count * heal.batch_size)
        scratch = bench.scratch / f"steps-{len(walls)}"
        run = functools.partial(train, child, None, [START], blocks, held_out, heal, seed=0, scratch=scratch)
        walls.append(seconds(run)[1])
    return (walls[2] - walls[1]) / (steps[1] - steps[0])


def main() -> None:
    given, sizes = parse(arguments(__doc__))
    rows, steps = Rows(given.out, given.minutes, again=given.again), (1, 2) if given.tiny else (20, 60)

    def measured(dtype: str, tf32: bool) -> Row:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with tempfile.TemporaryDirectory() as scratch:
            return {"step_s": step_s(Bench(given, sizes, Path(scratch), dtype), steps)}

    for dtype, tf32 in () if given.table else PRECISIONS:
        rows.measure(functools.partial(measured, dtype, tf32), part="step", dtype=dtype, tf32=tf32)
    print(table(("weights", "TF32", "s a step"), [[r["dtype"], r["tf32"], f"{r['step_s']:.4f}"] for r in rows.all]))


if __name__ == "__main__":
    main()
