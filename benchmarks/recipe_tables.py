"""The tables of docs/benchmarks/heal.md that benchmarks/recipes.py fills."""

from __future__ import annotations

import math
import statistics

from heal_tables import Tables, parts_of
from measuring import Row, has, table, with_error
from tasks import TASKS, counting, retention

EASIER = {"hellaswag": 2500}
"""How many of its first items others report a task by: HellaSwag begins with its easier half."""
BARS = (
    "endpoint tuning alone, n = 6: 97 % of the reported tasks above chance",
    "any method: 100 % at n = 6, 94 % at n = 9",
    "any method, n = 6: perplexity of WikiText-2 at most 1.25 times the parent's",
)


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts of which there are rows."""
    return "\n\n".join(parts_of(TABLES, with_parent(rows)).values())


def with_parent(rows: list[Row]) -> list[Row]:
    """Return the rows of trials, each with the parent's row beside it."""
    parent = next((row for row in rows if has(row, {"part": "parent"}) and "failed" not in row), {})
    return [row | {"parent": parent} for row in rows]


def words_of(row: Row) -> str:
    """Return what a trial does that the paper's recipe does not, in the order of its settings."""
    return ", ".join(f"{name.removeprefix('heal.')}={value}" for name, value in row["settings"].items())


def retained(row: Row, where: str) -> Row | None:
    """Return the chance-adjusted retention of a trial on the tasks of `selection` or `reported`."""
    parent = row["parent"].get(where)
    return None if parent is None else retention(parent["tasks"], row[where]["tasks"])


def retained_of_first(row: Row) -> Row | None:
    """Return the chance-adjusted retention on the reported tasks, of some the first items alone."""
    parent = row["parent"].get("reported")
    if parent is None:
        return None
    return retention(
        *(
            {name: first(task, EASIER.get(name)) for name, task in found["tasks"].items()}
            for found in (parent, row["reported"])
        )
    )


def first(task: Row, count: int | None) -> Row:
    """Return what was measured of a task on its first items."""
    right = task["right"][:count]
    mean = right.count("1") / len(right)
    se = math.sqrt(mean * (1 - mean) / max(1, len(right) - 1))
    return {"acc_norm": {"value": mean, "se": se, "n": len(right)}, "chance": task["chance"], "right": right}


def loss_of(point: Row) -> float:
    """Return the loss of a step, in nats unless errors of hidden states are in it."""
    return point.get("loss_nats", point.get("loss"))


def _percent(measured: Row | None) -> str:
    return with_error(measured, 1, 100)


def _trials(rows: list[Row]) -> str:
    heads = ("trial", "n", "heals on", "settings", "seed", "s", "steps", "best step", "validation loss")
    chosen_by = ("Alpaca answers, nats", "KL on C4, nats", "its perplexity over the parent's", "adjusted retention, %")
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["name"], "", "", "", row["seed"], "", "", "", row["failed"], "", "", "", ""])
            continue
        c4, phase = row["selection"]["c4"], row.get("second") or row
        training = [str(phase.get(name, "")) for name in ("steps", "best_step")]
        what = [row["name"], row["n"], row["mix"], words_of(row), row["seed"], f"{row.get('heal_s', 0):.0f}"]
        losses = " ".join(f"{loss_of(point):.3f}" for point in phase.get("validation", []))
        ce, kl, ratio = (row["selection"]["alpaca_ce_nats"], c4["kl_nats"], c4["ppl_ratio"])
        lines.append([*what, *training, losses, with_error(ce), with_error(kl), with_error(ratio)])
        lines[-1].append(_percent(retained(row, "selection")))
    return table((*heads, *chosen_by), lines)


def _final(rows: list[Row]) -> str:
    heads = ("recipe", "n", "seed", *(f"{name}, %" for name in TASKS), "adjusted retention, %")
    more = ("WikiText-2, perplexity", "over the parent's", "KL on C4, nats", "chosen by: retention, %")
    lines = []
    if parent := rows[0]["parent"].get("reported"):
        accuracy = [_percent(parent["tasks"][name]["acc_norm"]) for name in TASKS]
        lines.append(["parent", 0, "", *accuracy, "", with_error(parent["wikitext2"]["ppl"], 2), "", "", ""])
    whole = [row for row in rows if "failed" not in row]
    for row in sorted(whole, key=lambda row: (row["n"], row["name"], row["seed"])):
        found = row["reported"]
        accuracy = [_percent(found["tasks"][name]["acc_norm"]) for name in TASKS]
        figures = [with_error(found["wikitext2"]["ppl"], 2), with_error(found["wikitext2"]["ppl_ratio"])]
        figures += [with_error(found["c4"]["kl_nats"]), _percent(retained(row, "selection"))]
        lines.append([row["name"], row["n"], row["seed"], *accuracy, _percent(retained(row, "reported")), *figures])
    lost = "\n".join(f"Seed {row['seed']} of {row['name']} failed: {row['failed']}." for row in rows if "failed" in row)
    return "\n\n".join(filter(None, (table((*heads, *more), lines), _over_seeds(whole), lost, _bars())))


def _over_seeds(rows: list[Row]) -> str:
    heads = ("recipe", "n", "seeds", "adjusted retention, %", "the same with HellaSwag's first 2,500 items, %")
    more = ("WikiText-2, over the parent's", "KL on C4, nats")
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        kept = [found["value"] * 100 for row in own if (found := retained(row, "reported"))]
        kept_of_first = [found["value"] * 100 for row in own if (found := retained_of_first(row))]
        ratios = [row["reported"]["wikitext2"]["ppl_ratio"]["value"] for row in own]
        kl = [row["reported"]["c4"]["kl_nats"]["value"] for row in own]
        means = [_mean(values, digits) for values, digits in ((kept, 1), (kept_of_first, 1), (ratios, 3), (kl, 3))]
        lines.append([name, own[0]["n"], len(own), *means])
    return "Mean over seeds, ± their standard deviation:\n\n" + table((*heads, *more), lines)


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _bars() -> str:
    return "Asked for: " + "; ".join(BARS) + "."


def _parent(rows: list[Row]) -> str:
    heads = ("task", "items", "accuracy, %", "chance, %", "standard errors above chance", "it")
    if not rows[0]["parent"]:
        return f"failed: {rows[0]['failed']}"
    lines = []
    for where, purpose in (("selection", "chooses"), ("reported", "is reported")):
        found = rows[0][where]["tasks"]
        for name, task in found.items():
            mean = task["acc_norm"]
            above = f"{(mean['value'] - task['chance']) / mean['se']:.1f}" if mean["se"] else ""
            counts = purpose if name in counting(found) else "does not count"
            lines.append([name, mean["n"], _percent(mean), f"{100 * task['chance']:.1f}", above, counts])
    return table(heads, lines)


def _answers(rows: list[Row]) -> str:
    written = [row for row in rows if "failed" not in row]
    lines = [[row["how"], row["answers"], row["cut_off"], f"{row['wall_s']:.0f}"] for row in written]
    return table(("the parent's answers", "written", "without an end", "s"), lines)


TABLES: Tables = {
    "parent": ("What the parent gets right", _parent),
    "answers": ("Answers of the parent", _answers),
    "trial": ("Every trial, by what recipes are chosen by", _trials),
    "final": ("Final recipes, healed anew with other seeds", _final),
}
