"""What an exact search costs: on the real model against the paper's gate, on shapes of 7 and 70 billion parameters.

    python benchmarks/scale.py --parts race seven --c4 c4.jsonl.gz --out docs/benchmarks/scale.json --minutes 4
    python benchmarks/scale.py --parts seventy disk --folder /tmp/scale --out docs/benchmarks/scale.json --minutes 5
    python benchmarks/scale.py --parts ranks --c4 c4.jsonl.gz --out docs/benchmarks/scale.json
    torchrun --nproc-per-node 2 benchmarks/scale.py --parts ranks --c4 c4.jsonl.gz --out docs/benchmarks/scale.json
    python benchmarks/scale.py --out docs/benchmarks/scale.json --table

race     The exact search with its race against the paper's gate: one start, steepness 5 throughout, a block a step, one
         pass over all records. The gate takes a part of these steps; its seconds are extrapolated from their rate. Both
         choices are compared on the same held-out blocks.
seven    LLaMA2-7B's shape with random weights, all in memory: seconds over (full count of operations / rate of plain
         forwards of the same batch), memory at two vocabularies, and the windows of all rates in one search.
seventy  LLaMA2-70B's shape under a limit of device memory: one stored layer stands for all, from host memory (`cpu`)
         and from the system's cache of files (`disk`). Few tokens wait for weights, many for arithmetic.
disk     A checkpoint of distinct layers that the system's cache does not hold, beside plain reads of the same files.
ranks    All windows of the real model by one process and by several, which must give equal scores.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Row, Rows, arguments, blocks_of, median_s, paired, seconds
from scale_memory import seven
from scale_offload import disk, seventy
from scale_tables import tables
from shapes import TINY, Sizes

from layerscalpel import parallel
from layerscalpel.clp import find_exact
from layerscalpel.data import Parts
from layerscalpel.decoder import load_decoder
from layerscalpel.exact import score, score_windows
from layerscalpel.gate import learn_starts
from layerscalpel.layers import Decoder
from layerscalpel.losses import block_mean
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet
from layerscalpel.settings import SearchSettings
from layerscalpel.streams import window
from layerscalpel.task import Task


def real_model(given: argparse.Namespace, sizes: Sizes, num_calibration: int, held_out: int) -> tuple[Decoder, Parts]:
    """Load the real model in float32, and its text."""
    model, tokenizer, _ = load_decoder(given.model, device=given.device, dtype="float32")
    counts = {"num_calibration": num_calibration, "evaluation_blocks": held_out}
    lengths = {"block_tokens": sizes.block_tokens} | counts
    return find_layers(model), blocks_of(tokenizer, given.c4, given.c4, sizes=lengths, seed=given.seed)


def race(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    """Compare exact search and gate on the real model."""

    @functools.cache
    def opened() -> tuple[Decoder, Parts]:
        return real_model(given, sizes, max(sizes.race_blocks, sizes.gate_steps), sizes.race_blocks)

    def measured(n: int) -> Row:
        decoder, parts = opened()
        tokens, last = parts.calibration.tokens, len(decoder) - n
        settings = SearchSettings(num_blocks=sizes.race_blocks, batch_size=given.batch_size)
        task = Task(decoder, tokens, n, settings, given.seed)
        score_windows(decoder, tokens[:8], num_removed=n, batch_size=8)  # the first call of a shape is slow
        exact, exact_s = seconds(lambda: find_exact(task))
        how = {"num_removed": n, "initial": [last / 2], "steepness": (5.0, 5.0)}
        learn_starts(decoder, tokens[:2], **how)
        path, gate_s = seconds(lambda: learn_starts(decoder, tokens[: sizes.gate_steps], **how))
        starts = {"exact": exact.segment.start, "gate": path.ends(last)[0]}
        removals = [window(start, n) for start in starts.values()]
        kl_exact, kl_gate = score(decoder, parts.evaluation.tokens, removals, batch_size=given.batch_size)
        full_s = gate_s / len(path.losses) * sizes.gate_records
        return {
            "starts": starts,
            "exact_s": exact_s,
            "confidence": settings.confidence,
            "blocks_raced": exact.details["race"]["num_blocks"],
            "gate_steps": len(path.losses),
            "gate_s": gate_s,
            "gate_full_s": full_s,
            "gate_full_steps": sizes.gate_records,
            "gate_full_over_exact": full_s / exact_s,
            "kl_nats": {
                name: block_mean(kl_N, torch.ones_like(kl_N)).to_dict()
                for name, kl_N in (("exact", kl_exact), ("gate", kl_gate))
            },
            "gate_less_exact_kl_nats": paired(kl_gate, kl_exact).to_dict(),
            "held_out_blocks": len(kl_exact),
        }

    for n in sizes.depths:
        rows.measure(functools.partial(measured, n), part="race", n=n, seed=given.seed)


def ranks(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    """Score all windows of the real model by as many processes as were launched."""
    parallel.join(given.device)
    n = sizes.rank_removed
    key = {"part": "ranks", "n": n, "num_blocks": sizes.rank_blocks}
    if parallel.first_says(rows.find(**key, processes=parallel.world()) is not None):
        return
    decoder, parts = real_model(given, sizes, sizes.rank_blocks, 2)
    work = functools.partial(
        score_windows, decoder, parts.calibration.tokens, num_removed=n, batch_size=given.batch_size
    )
    means = [work().mean(start).value for start in range(len(decoder) - n + 1)]
    wall_s = median_s(work)
    if parallel.rank() > 0:
        return
    found: Row = {"wall_s": wall_s, "kl_nats": means}
    alone = rows.find(**key, processes=1)
    if alone and parallel.world() > 1:
        differences = [abs(mean - other) for mean, other in zip(means, alone["kl_nats"], strict=True)]
        found |= {"max_difference_nats": max(differences), "speedup": alone["wall_s"] / wall_s}
    rows.add(key | {"processes": parallel.world()}, found, wall_s)


PARTS: dict[str, Callable[[Rows, argparse.Namespace, Sizes], None]] = {
    "race": race,
    "seven": seven,
    "seventy": seventy,
    "disk": disk,
    "ranks": ranks,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--model", default="demo", help="the real model")
    parser.add_argument("--c4", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="blocks per forward of the real model")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"), help="for checkpoints of random weights")
    parser.add_argument("--device-gib", type=float, default=20.0, help="limit of device memory: seventy")
    parser.add_argument("--store-gib", type=float, default=6.0, help="of these, for hidden states: seventy")
    parser.add_argument("--disk-gib", type=float, default=24.0, help="size of the checkpoint: disk")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few blocks: does it run?")
    given = parser.parse_args()
    if {"race", "ranks"} & set(given.parts) and not given.c4:
        parser.error("give --c4")
    set_quiet(True)
    rows = Rows(given.out, given.minutes, again=given.again)
    for part in () if given.table else given.parts:
        PARTS[part](rows, given, TINY if given.tiny else Sizes())
    if parallel.rank() == 0:
        print(tables(rows.all))


if __name__ == "__main__":
    main()
