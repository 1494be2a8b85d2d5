"""The tables of docs/benchmarks/methods.md that benchmarks/methods.py fills."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from heal_tables import Tables, parts_of
from measuring import Row, has, table, with_error
from tasks import TASKS, counting, drawn_retention, spread

RATES = {6: "20 %", 3: "10 %", 9: "30 %"}
"""{layers removed of 30: the rate}, in the order in which they are measured."""
HEALINGS = ("none", "endpoint", "lora")
METHODS = ("clp", "angular", "influence", "last", "greedy", "random")


def key_of(layers: Sequence[int]) -> str:
    """Return removed layers as `13:19`, or `2:3,5:7` where they do not stand together."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return ",".join(f"{start}:{stop}" for start, stop in runs)


def runs_of(key: str) -> list[tuple[int, int]]:
    """Return what key_of was given, as (start, stop) of each run."""
    return [(int(start), int(stop)) for start, stop in (run.split(":") for run in key.split(","))]


def removals(rows: list[Row], n: int) -> dict[str, bool]:
    """Return {layers to remove: whether every seed heals them}; of windows by lot each is healed once."""
    found: dict[str, bool] = {}
    for row in rows:
        if has(row, {"part": "segments", "n": n}) and "failed" not in row:
            for method, lots in row["layers"].items():
                found |= {layers: found.get(layers, False) or method != "random" for layers in lots}
    return found


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts of which there are rows."""
    return "\n\n".join(parts_of(TABLES, with_others(rows)).values())


def with_others(rows: list[Row]) -> list[Row]:
    """Return the rows of searches, each with the parent's and its cells' beside it."""
    parent = next((row for row in rows if has(row, {"part": "parent"}) and "failed" not in row), None)
    cells = [row for row in rows if has(row, {"part": "cell"})]
    return [row | ({"parent": parent, "cells": cells} if row["part"] == "segments" else {}) for row in rows]


def _compared(rows: list[Row]) -> str:
    heads = ("rate", "method", "layers removed", "healing", "healings", "KL on C4, nats")
    more = ("perplexity over the parent's", "plain retention, %", "adjusted retention, %", "spread over seeds")
    lines = []
    for row in rows:
        for method in METHODS:
            lots = row["layers"].get(method, []) if "failed" not in row else []
            for healing in HEALINGS:
                own = [c for c in row["cells"] if c["layers"] in lots and c["healing"] == healing and "failed" not in c]
                if own and row["parent"]:
                    lines.append([RATES.get(row["n"], row["n"]), method, " or ".join(lots), healing, len(own)])
                    lines[-1] += _figures(own, row["parent"])
    failed = [c for row in rows[:1] for c in row["cells"] if "failed" in c]
    lost = [f"{c['layers']}, {c['healing']}, seed {c['seed']} failed: {c['failed']}." for c in failed]
    return "\n\n".join([table((*heads, *more), lines), *lost])


def _figures(cells: list[Row], parent: Row) -> list[str]:
    """Return the means over cells; the error of a retention is that of items, drawn alike for all cells."""
    c4 = [cell["c4"] for cell in cells]
    kl, ratio = (statistics.mean(row[name]["value"] for row in c4) for name in ("kl_nats", "ppl_ratio"))
    found = [f"{kl:.3f}", f"{ratio:.3f}"]
    if not counting(parent["tasks"]):
        return [*found, "", "", ""]
    values: list[float] = []
    for plain in (True, False):
        drawn = [drawn_retention(parent["tasks"], cell["tasks"], plain=plain) for cell in cells]
        found.append(with_error(spread(sum(drawn) / len(drawn)), 1, 100))
        values = [100 * one[0].item() for one in drawn]
    return [*found, f"{statistics.stdev(values):.1f}" if len(values) > 1 else ""]


def _parent(rows: list[Row]) -> str:
    lines = []
    for name in TASKS:
        task = rows[0]["tasks"][name]
        lines.append([name, task["acc_norm"]["n"], with_error(task["acc_norm"], 1, 100), f"{task['chance']:.2f}"])
    return table(("task", "items", "the parent's accuracy, %", "chance"), lines)


TABLES: Tables = {
    "parent": ("Tasks that count", _parent),
    "segments": ("Methods, rates and healings", _compared),
}
