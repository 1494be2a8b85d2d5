"""The part of benchmarks/heal.py that torchrun starts: one process against several, whole and spread weights."""

from __future__ import annotations

import argparse
import functools
import shutil
from dataclasses import replace

import torch
from heal_sizes import HealSizes, packed_blocks, random_child
from measuring import Row, Rows, peak_bytes, reset_peak, seconds

from layerscalpel import parallel
from layerscalpel.decoder import choose_device
from layerscalpel.heal import heal_model
from layerscalpel.settings import HealName, HealSettings

PLAN: tuple[tuple[HealName, bool], ...] = (("endpoint", False), ("endpoint", True), ("all", False), ("all", True))
"""(method, whether weights are spread over the processes)."""
SHAPE = "135m"


def ranks(rows: Rows, given: argparse.Namespace, sizes: HealSizes) -> None:
    """Heal by as many processes as were launched."""
    parallel.join(given.device)
    for method, shard in PLAN:
        if shard and parallel.world() == 1:
            continue
        key = {"part": "ranks", "method": method, "shard": shard, "processes": parallel.world(), "take": given.take}
        if parallel.first_says(rows.find(**key) is not None):
            continue
        found, took_s = seconds(functools.partial(_healed, method, shard, given, sizes))
        if parallel.rank() == 0:
            rows.add(key, found, took_s)


def _healed(method: HealName, shard: bool, given: argparse.Namespace, sizes: HealSizes) -> Row:
    """Heal twice, first for a step to warm up."""
    device, team = choose_device(given.device), parallel.team()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    settings = HealSettings(method=method, shard=shard, lr=1e-4, epochs=sizes.epochs, validations=1)
    settings = replace(settings, batch_size=sizes.batch_size, micro_batch_size=given.micro)
    blocks = packed_blocks(sizes, sizes.rank_blocks, sizes.shapes[SHAPE][1])
    scratch = given.scratch / "ranks"
    for turn in ("warm up", "measure"):
        count = sizes.batch_size if turn == "warm up" else len(blocks)
        child = random_child(sizes, SHAPE, device)
        if team.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        parallel.first_says(None)  # the folder is there
        reset_peak()
        work = functools.partial(
            heal_model,
            child,
            None,
            [sizes.starts[SHAPE][0]],
            blocks.first(count),
            blocks.first(sizes.batch_size),
            settings,
            seed=0,
            scratch=scratch,
            team=team,
            device=device,
        )
        result, wall_s = seconds(work)
    names = [name for name in result.train[0] if name.startswith("loss")]
    return {
        "wall_s": wall_s,
        "steps": result.steps,
        "peak_bytes": peak_bytes(),
        "loss_nats": [row[names[0]] for row in result.train],
        "validation": result.validation,
    }
