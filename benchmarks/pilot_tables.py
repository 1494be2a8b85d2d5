"""The tables of docs/benchmarks/pilot.md, from the rows of pilot.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from measuring import Row, has, table, with_error
from tasks import TASKS, drawn_retention, retention, spread

Cells = list[Any]


def of(rows: list[Row], part: str, **key: Any) -> list[Row]:
    return [row for row in rows if has(row, {"part": part, **key})]


def tables(rows: list[Row]) -> str:
    """Return all tables: the choices, what they come to, and the pilots beside the full recipe."""
    heads = ("n", "seed", "clp", "pilot", "gate and race, s", "pilots, s", "pilots healed")
    parts = ["Searches:\n\n" + table(heads, map(_search, of(rows, "search")))]
    heads = ("n", "seed", "start", "chosen by", *FIGURES, "adjusted retention, %", "healing, s")
    parts.append("Full recipe:\n\n" + table(heads, _healed(rows)))
    heads = ("n", "seed", "KL, nats", "top-1 agreement, points", "adjusted retention, points")
    parts.append("Pilot's choice less clp's, full recipe:\n\n" + table(heads, _differences(rows)))
    for search in of(rows, "search"):
        chosen = {search["clp_start"], search["pilot_start"]}
        if len(ranked := list(_ranking(rows, search))) > len(chosen):
            title = f"n = {search['n']}, seed {search['seed']}: every pilot and its full recipe:\n\n"
            parts.append(title + table(RANKING, ranked))
    return "\n\n".join(parts)


FIGURES = ("KL, nats", "top-1 agreement, %", "perplexity", *(f"{name}, %" for name in TASKS))
RANKING = (
    *("start", "KL before, nats", "pilot: held-out loss, nats", "pilot: KL, nats", "pilot: top-1 agreement, %"),
    *("full: held-out loss, nats", "full: KL, nats", "full: top-1 agreement, %", "full: adjusted retention, %"),
)


def _search(row: Row) -> Cells:
    starts = ", ".join(str(pilot["start"]) for pilot in row["pilots"])
    times = [f"{row[name]:.1f}" for name in ("gate_and_race_s", "pilots_s")]
    return [row["n"], row["seed"], row["clp_start"], row["pilot_start"], *times, starts]


def _healed(rows: list[Row]) -> Iterator[Cells]:
    for row in sorted(of(rows, "healed"), key=lambda row: (row["n"], row["seed"], row["start"])):
        search = of(rows, "search", n=row["n"], seed=row["seed"])[0]
        by = [name for name in ("clp", "pilot") if search[f"{name}_start"] == row["start"]]
        figures = [with_error(row["kl_nats"]), with_error(row["top1_agreement_fraction"], 1, 100)]
        figures += [with_error(row["ppl"], 1), *(with_error(row["tasks"][name]["acc_norm"], 1, 100) for name in TASKS)]
        kept = with_error(_retention(rows, row), 1, 100)
        yield [row["n"], row["seed"], row["start"], " and ".join(by), *figures, kept, f"{row['heal_s']:.0f}"]


def _retention(rows: list[Row], row: Row) -> Row | None:
    parents = of(rows, "parent")
    return retention(parents[0]["tasks"], row["tasks"]) if parents else None


def _differences(rows: list[Row]) -> Iterator[Cells]:
    for search in of(rows, "search"):
        cell = {"n": search["n"], "seed": search["seed"]}
        found = [of(rows, "healed", **cell, start=search[f"{name}_start"]) for name in ("pilot", "clp")]
        if not all(found):
            continue
        pilot, clp = (items[0] for items in found)
        same = pilot is clp
        figures = [pilot[name]["value"] - clp[name]["value"] for name in ("kl_nats", "top1_agreement_fraction")]
        kept = "0 (same segment)" if same else _difference_kept(rows, pilot, clp)
        yield [*cell.values(), f"{figures[0]:.3f}", f"{100 * figures[1]:.1f}", kept]


def _difference_kept(rows: list[Row], pilot: Row, clp: Row) -> str:
    parents = of(rows, "parent")
    if not parents or _retention(rows, pilot) is None:
        return ""
    drawn = [drawn_retention(parents[0]["tasks"], row["tasks"]) for row in (pilot, clp)]
    return with_error(spread(drawn[0] - drawn[1]), 1, 100)


def _ranking(rows: list[Row], search: Row) -> Iterator[Cells]:
    for pilot in search["pilots"]:
        full = of(rows, "healed", n=search["n"], seed=search["seed"], start=pilot["start"])
        cells = [pilot["start"], f"{pilot['before']['kl_nats']:.3f}", f"{pilot['validation_loss_nats']:.3f}"]
        cells += [f"{pilot['kl_nats']:.3f}", f"{100 * pilot['top1_agreement_fraction']:.1f}"]
        if full:
            row = full[0]
            cells += [f"{row['loss_nats']:.3f}", with_error(row["kl_nats"])]
            cells += [with_error(row["top1_agreement_fraction"], 1, 100), with_error(_retention(rows, row), 1, 100)]
            yield cells
