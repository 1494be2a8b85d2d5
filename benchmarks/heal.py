"""What healing costs: seconds and memory beside LoRA, operations beside their floor, memory of an 8B model, processes.

    python benchmarks/heal.py --parts speed kernels memory --out docs/benchmarks/heal.json --minutes 9
    python benchmarks/heal.py --parts ranks --out docs/benchmarks/heal.json
    torchrun --nproc-per-node 2 benchmarks/heal.py --parts ranks --out docs/benchmarks/heal.json
    python benchmarks/heal.py --out docs/benchmarks/heal.json --table --doc docs/benchmarks/heal.md

Random weights of LLaMA's shapes and random tokens: nothing is learnt, everything is computed. How well healed models do
is benchmarks/recipes.py.

speed    Endpoint tuning and LoRA (rank 8, all linear layers, peft) on a cut LLaMA2-7B: the same blocks of packed
         documents, batches, micro-batches, epochs, loss code and validation, no checkpointing. Each row heals once for
         one step to warm up, then once for the time. The floor counts operations, and is compared with what a matrix
         product reaches in the same run.
kernels  What a step launches, how often the host waits for the device, and which attention ran.
memory   Peak memory of healing a cut LLaMA-3-8B within a limit, by objective and by where frozen weights are.
ranks    One process against several: losses and seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from heal_memory import memory
from heal_ranks import ranks
from heal_sizes import TINY, HealSizes
from heal_speed import kernels, speed
from heal_tables import TABLES, insert, tables
from measuring import Rows, arguments

from layerscalpel import parallel
from layerscalpel.progress import set_quiet

PARTS: dict[str, Callable[[Rows, argparse.Namespace, HealSizes], None]] = {
    "speed": speed,
    "kernels": kernels,
    "memory": memory,
    "ranks": ranks,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--micro", type=int, default=8, help="blocks per forward and backward, of every method")
    parser.add_argument("--blocks", type=int, help="blocks that speed heals on")
    parser.add_argument("--take", type=int, default=0, help="another number measures speed and memory once more")
    parser.add_argument("--limit-gib", type=float, default=24.0, help="device memory that part memory may use")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/heal"), help="for what frozen layers computed")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few blocks: does it run?")
    parser.add_argument("--doc", type=Path, help="a document to insert the tables into")
    given = parser.parse_args()
    set_quiet(True)
    rows = Rows(given.out, given.minutes, again=given.again)
    for part in () if given.table else given.parts:
        PARTS[part](rows, given, TINY if given.tiny else HealSizes())
    if parallel.rank() == 0:
        print(tables(rows.all))
        if given.doc:
            insert(given.doc, TABLES, rows.all)


if __name__ == "__main__":
    main()
