"""The exact scores on a real model: do few blocks give the optimum of many, and are they those of a naive loop?

    python benchmarks/search.py --c4 c4.jsonl.gz --out docs/benchmarks/search.json --minutes 3
    python benchmarks/search.py --out docs/benchmarks/search.json --table

exact  The start with the lowest KL on 4 and on 64 blocks, for every n and seed, and the seconds that both took.
naive  One forward for each window instead of one for all: the largest difference of a score, the seconds of both, and
       the arithmetic of the exact search over its full count, (L - n)(L - n + 1) / 2 + L layers and L - n + 2 heads.

What the search costs with its race, beside the gate and on larger shapes, is in scale.py; how far the gate gets, in
gate_study.py; by which text and in how many runs to choose, in choices.py.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

import torch
from measuring import (
    Row,
    Rows,
    UnitCosts,
    all_windows,
    arguments,
    blocks_of,
    countable,
    flops_of,
    has,
    seconds,
    table,
    with_error,
)
from torch import Tensor

from layerscalpel.decoder import load_decoder
from layerscalpel.exact import score_windows
from layerscalpel.hooks import bypass
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import kl_to_parent, log_probabilities
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet
from layerscalpel.segment import Segment


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    depths: tuple[int, ...] = (3, 6, 9, 12)
    seeds: int = 3
    few: int = 4
    many: int = 64
    block_tokens: int = 256


TINY = Sizes(depths=(20,), seeds=1, few=2, many=4, block_tokens=16)
"""To see whether it runs at all."""


@torch.no_grad()
def naive_scores(decoder: Decoder, tokens: Tensor, num_removed: int) -> Tensor:
    """Return the KL [W] of every window by one full forward each."""
    tokens = tokens.to(device_of(decoder.model))
    parent = log_probabilities(decoder.model(input_ids=tokens, use_cache=False).logits)
    means = []
    for start in range(len(decoder) - num_removed + 1):
        with bypass(decoder, Segment(start, start + num_removed, len(decoder))):
            child = log_probabilities(decoder.model(input_ids=tokens, use_cache=False).logits)
        means.append(kl_to_parent(parent, child).double().mean())
    return torch.stack(means).cpu()


def exact(decoder: Decoder, tokens: Tensor, n: int, sizes: Sizes) -> Row:
    """Score all windows on few and on many blocks."""
    few, few_s = seconds(lambda: score_windows(decoder, tokens[: sizes.few], num_removed=n))
    many, many_s = seconds(lambda: score_windows(decoder, tokens, num_removed=n, batch_size=16))
    best = many.mean(many.best()).to_dict()
    starts = {"start_few": few.best(), "start_many": many.best(), "kl_nats_many": best}
    return starts | {"blocks_few": sizes.few, "blocks_many": sizes.many, "wall_s_few": few_s, "wall_s_many": many_s}


def naive(decoder: Decoder, tokens: Tensor, n: int) -> Row:
    """Compare with a loop over the windows."""
    slow, slow_s = seconds(lambda: naive_scores(decoder, tokens, n))
    fast, fast_s = seconds(lambda: score_windows(decoder, tokens, num_removed=n))
    count = UnitCosts.of(decoder, tokens).full_count(len(decoder), all_windows(len(decoder), [n]))
    with countable(decoder):
        work = flops_of(lambda: score_windows(decoder, tokens, num_removed=n))
    return {
        "max_difference_nats": float((slow - fast.kl_WN.mean(1)).abs().max()),
        "wall_s_naive": slow_s,
        "wall_s_exact": fast_s,
        "flops_over_full_count": work / count,
    }


def measure(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    model, tokenizer, _ = load_decoder(given.model, device=given.device, dtype="float32")
    decoder = find_layers(model)

    @functools.cache
    def tokens(seed: int) -> Tensor:
        lengths = {"block_tokens": sizes.block_tokens, "evaluation_blocks": 2, "num_calibration": sizes.many}
        return blocks_of(tokenizer, given.c4, given.c4, sizes=lengths, seed=seed).calibration.tokens

    score_windows(decoder, tokens(0)[: sizes.few], num_removed=sizes.depths[0])  # the first call is slow
    for n in sizes.depths:
        rows.measure(lambda n=n: naive(decoder, tokens(0)[: sizes.few], n), part="naive", n=n, model=given.model)
    for seed in range(sizes.seeds):
        for n in sizes.depths:
            key = {"part": "exact", "n": n, "seed": seed, "model": given.model}
            rows.measure(lambda n=n, seed=seed: exact(decoder, tokens(seed), n, sizes), **key)


def tables(rows: list[Row]) -> str:
    """Return both tables."""
    found = sorted((row for row in rows if has(row, {"part": "exact"})), key=lambda row: (row["n"], row["seed"]))
    heads = ("n", "seed", "start, few blocks", "start, many", "KL, nats, many", "s, few", "s, many")
    lines = []
    for row in found:
        starts, times = (row["start_few"], row["start_many"]), (row["wall_s_few"], row["wall_s_many"])
        lines.append([row["n"], row["seed"], *starts, with_error(row["kl_nats_many"]), *(f"{t:.2f}" for t in times)])
    first = "All windows:\n\n" + table(heads, lines)
    heads = ("n", "largest difference, nats", "FLOPs over the full count", "s naive", "s exact")
    lines = []
    for row in sorted((row for row in rows if has(row, {"part": "naive"})), key=lambda row: row["n"]):
        figures = (f"{row['max_difference_nats']:.1e}", f"{row['flops_over_full_count']:.4f}")
        lines.append([row["n"], *figures, f"{row['wall_s_naive']:.2f}", f"{row['wall_s_exact']:.2f}"])
    return first + "\n\nExact and a naive loop over windows, few blocks:\n\n" + table(heads, lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--c4", default="")
    parser.add_argument("--tiny", action="store_true", help="short blocks, n = 20: does it run?")
    given = parser.parse_args()
    rows = Rows(given.out, given.minutes, again=given.again)
    if not given.table:
        if not given.c4:
            parser.error("give --c4")
        set_quiet(True)
        measure(rows, given, TINY if given.tiny else Sizes())
    print(tables(rows.all))


if __name__ == "__main__":
    main()
