"""Search on a real model: does the exact scan find the optimum with few blocks, does the gate, and at what arithmetic.

    python benchmarks/search.py --model demo --text c4.jsonl.gz --out docs/benchmarks/search.json

Every part is appended to the output as it is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from layerscalpel.config import build_config
from layerscalpel.data import prepare_blocks
from layerscalpel.decoder import load_decoder
from layerscalpel.exact import score_windows
from layerscalpel.gate import learn_starts, spread_starts
from layerscalpel.layers import Decoder, bypass, device_of, find_layers, hidden_at
from layerscalpel.losses import kl_to_parent, log_probabilities
from layerscalpel.search import better_neighbours
from layerscalpel.segment import Segment

DEPTHS = (3, 6, 9, 12)
FEW, MANY = 4, 64


@torch.no_grad()
def naive_scores(decoder: Decoder, tokens: torch.Tensor, num_removed: int) -> torch.Tensor:
    """Return the KL [W] of every window by one full forward each."""
    tokens = tokens.to(device_of(decoder.model))
    parent = log_probabilities(decoder.model(input_ids=tokens, use_cache=False).logits)
    means = []
    for start in range(len(decoder) - num_removed + 1):
        with bypass(decoder, Segment(start, start + num_removed, len(decoder))):
            child = log_probabilities(decoder.model(input_ids=tokens, use_cache=False).logits)
        means.append(kl_to_parent(parent, child).double().mean())
    return torch.stack(means).cpu()


def flops_of(work) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def full_count(decoder: Decoder, tokens: torch.Tensor, num_removed: int) -> float:
    """Return the FLOPs of (L-n)(L-n+1)/2 + L layer passes and W + 1 head passes, from measured unit costs."""
    depth, tokens = len(decoder), tokens.to(device_of(decoder.model))
    two_layers = flops_of(lambda: hidden_at(decoder, tokens, 2))
    one_layer = two_layers - flops_of(lambda: hidden_at(decoder, tokens, 1))
    whole = flops_of(lambda: decoder.model(input_ids=tokens, use_cache=False))
    head = whole - flops_of(lambda: hidden_at(decoder, tokens, depth))
    kept = depth - num_removed
    return (kept * (kept + 1) / 2 + depth) * one_layer + (kept + 2) * head


def wall_s(work) -> tuple[object, float]:
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gate-blocks", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    model, tokenizer, _ = load_decoder(given.model, device=given.device, dtype="float32")
    decoder = find_layers(model)
    config = build_config([dict.fromkeys(("data.calibration", "data.evaluation", "data.healing"), given.text)])
    rows: list[dict] = [{"device": str(device_of(model)), "torch": torch.__version__, "model": given.model}]
    if torch.cuda.is_available():
        rows[0]["device"] = torch.cuda.get_device_name()

    def keep(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    count = max(MANY, given.gate_blocks)
    blocks = [
        prepare_blocks(tokenizer, config.data, num_calibration=count, seed=seed, heal=False).calibration.tokens
        for seed in range(given.seeds)
    ]
    scores_many = {}
    for depth in DEPTHS:
        for seed, tokens in enumerate(blocks):
            few, few_s = wall_s(lambda t=tokens, n=depth: score_windows(decoder, t[:FEW], num_removed=n))
            many, many_s = wall_s(
                lambda t=tokens, n=depth: score_windows(decoder, t[:MANY], num_removed=n, batch_size=16)
            )
            scores_many[depth, seed] = many
            keep(
                {
                    "part": "exact",
                    "n": depth,
                    "seed": seed,
                    "start_4_blocks": few.best(),
                    "start_64_blocks": many.best(),
                    "kl_nats_64_blocks": many.mean(many.best()).to_dict(),
                    "wall_s_4": few_s,
                    "wall_s_64": many_s,
                }
            )
    for depth in DEPTHS:
        tokens = blocks[0][:FEW]
        naive, naive_s = wall_s(lambda n=depth, t=tokens: naive_scores(decoder, t, n))
        exact, exact_s = wall_s(lambda n=depth, t=tokens: score_windows(decoder, t, num_removed=n))
        work = flops_of(lambda n=depth, t=tokens: score_windows(decoder, t, num_removed=n))
        keep(
            {
                "part": "naive",
                "n": depth,
                "max_difference_nats": float((naive - exact.kl_WN.mean(1)).abs().max()),
                "wall_s_naive": naive_s,
                "wall_s_exact": exact_s,
                "flops_over_full_count": work / full_count(decoder, tokens, depth),
            }
        )
    for depth in DEPTHS:
        last = len(decoder) - depth
        for seed, tokens in enumerate(blocks):
            path, took = wall_s(
                lambda t=tokens, n=depth, e=last: learn_starts(
                    decoder, t[: given.gate_blocks], num_removed=n, initial=spread_starts(5, e)
                )
            )
            best = scores_many[depth, seed].best()
            ends = better_neighbours(scores_many[depth, seed], path.neighbours(last))
            chosen = min(ends, key=lambda s, d=depth, k=seed: scores_many[d, k].mean(s).value)
            keep(
                {
                    "part": "gate",
                    "n": depth,
                    "seed": seed,
                    "learned": [round(a, 2) for a in path.starts[-1]],
                    "ends": ends,
                    "rounded_at_optimum": path.ends(last).count(best),
                    "optimum": best,
                    "chosen": chosen,
                    "starts_at_optimum": ends.count(best),
                    "wall_s": took,
                    "steps": len(path.losses),
                }
            )


if __name__ == "__main__":
    main()
