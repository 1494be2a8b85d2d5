"""The factors of the gate study (gate_study.py), its files, and its tables in docs/benchmarks/search.md."""

from __future__ import annotations

import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DEFAULT: Row = {"steepness": [1.0, 5.0], "lr": 0.3, "blocks": 128, "domain": "c4"}
VARIATIONS: dict[str, Row] = {
    "default: steepness 1 to 5, lr 0.3, 128 blocks of C4": {},
    "constant steepness 5 (the paper's)": {"steepness": [5.0, 5.0]},
    "constant steepness 1": {"steepness": [1.0, 1.0]},
    "constant steepness 10": {"steepness": [10.0, 10.0]},
    "the model's own text": {"domain": "self"},
    "encyclopedic text": {"domain": "wiki"},
    "instructions": {"domain": "alpaca"},
    "lr 0.1": {"lr": 0.1},
    "lr 1": {"lr": 1.0},
    "32 blocks": {"blocks": 32},
    "512 blocks": {"blocks": 512},
}
FACTORS = ("n", "seed", *DEFAULT)
BEST_OF = {"1": 1, "3": 3, "5": 5}
"""Evenly spaced starts of which the best is taken."""
HEADS = (
    *("runs", "single starts at the optimum", *(f"best of {name} there" for name in (*BEST_OF, "all"))),
    *("exact search of the same text there", "mean loss of the best of 5, nats", "largest"),
)


def key_of(row: Row) -> str:
    return json.dumps([row[name] for name in FACTORS])


def parts_of(out: Path) -> list[Path]:
    """Return the files that workers wrote."""
    return sorted(path for path in out.parent.glob(f"{out.name}.*") if re.fullmatch(r"\d+", path.suffix[1:]))


def rows_in(*files: Path) -> dict[str, Row]:
    rows = [row for file in files if file.exists() for row in json.loads(file.read_text(encoding="utf-8"))]
    return {key_of(row): row for row in rows}


def write(path: Path, rows: list[Row]) -> None:
    """Write whole or not at all: a run may be cut off at any time."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    os.replace(draft, path)


def with_factors(rows: list[Row], **factors: Any) -> list[Row]:
    """Return the rows that have the default's factors but for those given."""
    wanted = DEFAULT | factors
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def singles(found: list[Row]) -> str:
    there, starts = (sum(item[name] for item in found) for name in ("num_single_starts_there", "num_single_starts"))
    return f"{there} of {starts} ({100 * there / starts:.0f} %)"


def best_of(found: list[Row], name: str) -> str:
    reached = [item["best_of"][name]["reached"] for item in found if name in item["best_of"]]
    return f"{sum(reached)} of {len(reached)}"


def summary(rows: list[Row], judge: str) -> list[str]:
    """Return the cells under HEADS, judged on held-out blocks of C4 (c4) or of the row's domain (own)."""
    found = [row[judge] for row in rows]
    losses = [item["best_of"]["5"]["loss_kl_nats"]["value"] for item in found if "5" in item["best_of"]]
    reached = [best_of(found, name) for name in (*BEST_OF, "all")]
    exact = f"{sum(item['exact_on_calibration'] == item['optimum'] for item in found)} of {len(found)}"
    losses = [f"{statistics.mean(losses):.3f}", f"{max(losses):.3f}"] if losses else ["", ""]
    return [str(len(rows)), singles(found), *reached, exact, *losses]


def table(heads: tuple[str, ...], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def tables(rows: list[Row]) -> str:
    """Return all tables: by n, by factor, by domain, and factors by n."""
    depths = sorted({row["n"] for row in rows})
    by_depth, by_factor, by_domain, by_both = [], [], [], []
    for n in depths:
        same = with_factors(rows, n=n)
        if same:
            optima = sorted({row["c4"]["optimum"] for row in same})
            by_depth.append([str(n), ", ".join(map(str, optima)), *summary(same, "c4")])
    for name, change in VARIATIONS.items():
        same = with_factors(rows, **change)
        if not same:
            continue
        by_factor.append([name, *summary(same, "c4")])
        if "domain" in change:
            by_domain.append([name, *summary(same, "own")])
        cells = [[row["c4"] for row in same if row["n"] == n] for n in depths]
        by_both.append([name, *(f"{singles(found)}; {best_of(found, '5')}" if found else "" for found in cells)])
    return "\n\n".join(
        (
            "Default, by n:\n\n" + table(("n", "optimum", *HEADS), by_depth),
            "One factor at a time, judged on C4:\n\n" + table(("factor", *HEADS), by_factor),
            "Other domains, judged on held-out blocks of the same:\n\n" + table(("learned from", *HEADS), by_domain),
            "Single starts at the optimum; runs in which the best of 5 is there:\n\n"
            + table(("factor", *(f"n = {n}" for n in depths)), by_both),
        )
    )
