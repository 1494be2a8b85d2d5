"""Runs to compare, made of plain values: KL by block, answers by item."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from findings import full_results, quantity
from rich.console import Console
from torch import Tensor

from layerscalpel.byblock import BlockResult, load_blocks
from layerscalpel.compare import Comparison
from layerscalpel.comparewords import print_comparison
from layerscalpel.gather import Group, Run
from layerscalpel.items import TaskResult, load_items
from layerscalpel.retention import retentions

NUM_BLOCKS = 24
SETTINGS: dict[str, Any] = {"model": {"name": "demo", "device": "cpu"}, "search": {}, "heal": {}, "seed": 0}
SETTINGS["data"] = {"evaluation": "c4", "block_tokens": 256, "evaluation_blocks": 64}


def blocks_of(kl: float, spread: float = 0.01, num_blocks: int = NUM_BLOCKS, **changes: Any) -> BlockResult:
    """Return blocks whose mean KL is as said, the hard ones hard for all."""
    hard_N = torch.linspace(-0.2, 0.2, num_blocks, dtype=torch.float64)
    own_N = torch.randn(num_blocks, generator=torch.Generator().manual_seed(int(kl * 1e6)), dtype=torch.float64)
    kl_N = kl + hard_N + spread * (own_N - own_N.mean())
    ones_N = torch.ones(num_blocks, dtype=torch.float64)
    known = {"text": "01c4", "tokenizer": "one", "nll_N": kl_N, "labelled_N": ones_N}
    return BlockResult(**{**known, "kl_N": kl_N, "agreement_N": 1 - kl_N, **changes})


def task_of(right: Tensor, name: str = "piqa", chance: float = 0.5) -> TaskResult:
    ids = tuple(f"{name}{place}" for place in range(len(right)))
    return TaskResult(name, "acc", chance, {"acc": right.double()}, higher_is_better=True, ids=ids)


def run_of(name: str, kl: float = 0.44, *, seed: int = 0, results: dict[str, Any] | None = None, **more: Any) -> Run:
    """Return a run whose cut and healed models have this KL; `more` changes its blocks."""
    results = results or full_results()
    for model in ("cut", "healed"):
        if model in results["evaluate"]:
            results["evaluate"][model]["kl_nats"] = quantity(kl, 0.02)
    results["data"]["evaluation"]["sha256"] = more.get("text", "01c4")
    own = SETTINGS | {"seed": seed, "heal": {"lr": name}}
    run = Run(Path(name), results, own)
    for model in ("parent", "cut", "healed"):
        run.read[load_blocks, model] = blocks_of(kl, **more)
        run.read[load_items, model] = None
    return run


def group_of(*runs: Run) -> Group:
    return Group(str(runs[0].path), "clp", {run.seed: run for run in runs})


def with_tasks(run: Run, definitions: dict[str, str] | None = None, **tasks: dict[str, TaskResult]) -> Run:
    """Return the run with these results of {model: {task: result}}; without a definition it is the name."""
    definitions = definitions or {}
    names = {
        name: {"metric": "acc", "num_items": len(one.ids), "definition": definitions.get(name, name)}
        for name, one in tasks["parent"].items()
    }
    run.results["evaluate"]["harness"] = {"lm_eval": "0.4.9", "limit": None, "tasks": names}
    for model, found in tasks.items():
        run.read[load_items, model] = found
        run.results["evaluate"][model]["retention"] = retentions(tasks["parent"], found).to_dict()
    return run


def best_of(comparison: Comparison, measure: str = "kl_nats") -> list[str]:
    return [row.label for row in comparison.rows if measure in row.best]


def printed(comparison: Comparison) -> str:
    console = Console(record=True, file=io.StringIO(), width=300)
    print_comparison(comparison, console)
    return console.export_text()


def right(share: float, count: int = 400) -> Tensor:
    """Return answers of which this share is right, the easy ones first."""
    return (torch.arange(count) < share * count).double()
