"""The tables of docs/benchmarks/quantise.md that benchmarks/quantise.py fills."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from heal_tables import Tables, parts_of
from measuring import Row, table, with_error

from layerscalpel.losses import Measured, block_mean, exp_of

TEXTS = {"C4": "c4_nll_nats", "WikiText-2": "wikitext_nll_nats"}
BAR = 1.1
"""At most so many times (L - n) / L of the whole model's seconds."""


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts of which there are rows."""
    return "\n\n".join(parts_of(TABLES, rows).values())


def mean_of(values: list[float]) -> Measured:
    """Return the mean over blocks of one length."""
    per_block = torch.tensor(values, dtype=torch.float64)
    return block_mean(per_block, torch.ones_like(per_block))


def ppl(row: Row, field: str) -> str:
    return with_error(exp_of(mean_of(row[field])).to_dict(), 2)


def dearer(row: Row, other: Row | None, field: str) -> str:
    """Return by how many percent a perplexity is above another, paired over blocks."""
    if other is None or other["name"] == row["name"]:
        return ""
    ratio = exp_of(mean_of([a - b for a, b in zip(row[field], other[field], strict=True)]))
    return f"{100 * (ratio.value - 1):+.1f} ± {100 * ratio.se:.1f}"


def named(rows: list[Row], name: str) -> Row | None:
    return next((row for row in rows if row["name"] == name), None)


def _real(rows: list[Row]) -> str:
    healed = named(rows, "healed")
    heads = ("model", "MB", *(f"{text}: perplexity" for text in TEXTS), *(f"{text}: over healed, %" for text in TEXTS))
    lines = []
    for row in rows:
        kls = [with_error(mean_of(row[f"kl_to_{name}_nats"]).to_dict(), 3) for name in ("healed", "parent")]
        of_healed = [dearer(row, healed, field) for field in TEXTS.values()]
        kls = ["" if row["name"] == name else kl for name, kl in zip(("healed", "parent"), kls, strict=True)]
        of_itself = [ppl(row, field) for field in TEXTS.values()]
        lines.append([row["name"], f"{row['bytes'] / 1e6:.1f}", *of_itself, *of_healed, *kls])
    return table((*heads, "KL to healed, nats", "KL to parent, nats"), lines)


def _against(rows: list[Row]) -> str:
    """Show GPTQ beside round-to-nearest of the same grid, paired."""
    lines = []
    for row in rows:
        other = named(rows, row["name"].replace(", gptq,", ", rtn,"))
        if row["method"] == "gptq" and other:
            kl = [a - b for a, b in zip(row["kl_to_healed_nats"], other["kl_to_healed_nats"], strict=True)]
            less = [dearer(row, other, field) for field in TEXTS.values()]
            lines.append([row["name"], *less, with_error(mean_of(kl).to_dict(), 3)])
    return table(("model", *(f"{text}: perplexity over rtn, %" for text in TEXTS), "KL to healed less rtn's"), lines)


def _errors(rows: list[Row]) -> str:
    lines = [
        [
            row["name"],
            *(f"{100 * row['errors'][kind][which]:.2f}" for kind, which in KINDS),
        ]
        for row in rows
        if "errors" in row
    ]
    heads = ("untouched, weights", "untouched, outputs", "healed, weights", "healed, outputs")
    return table(("model", *(f"{head}, %" for head in heads)), lines)


KINDS = [(kind, which) for kind in ("untouched", "healed") for which in ("weight_error", "output_error")]


def _time(rows: list[Row]) -> str:
    lines = [
        [row["name"], row["layers"], f"{row['write_s']:.0f}", f"{row['write_s'] / row['layers']:.1f}"]
        for row in rows
        if row.get("write_s")
    ]
    return table(("model", "layers", "s", "s a layer"), lines)


def _gpu(rows: list[Row]) -> str:
    heads = ("layers", "whole, s", "pruned, s", "ratio", "(L - n) / L", "over it", "bar 1.10", "s a layer", "peak, GiB")
    return table(heads, _depths(rows))


def _depths(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        whole, pruned = (statistics.median(row[name]) for name in ("whole_s", "pruned_s"))
        share = row["pruned_layers"] / row["layers"]
        over, peak = pruned / whole / share, row["peak_bytes"]
        figures = [f"{whole:.2f}", f"{pruned:.2f}", f"{pruned / whole:.3f}", f"{share:.3f}", f"{over:.3f}"]
        met = "met" if over <= BAR else "missed"
        size = "" if peak is None else f"{peak / 2**30:.2f}"
        yield [f"{row['layers']} and {row['pruned_layers']}", *figures, met, f"{whole / row['layers']:.2f}", size]


def _all_real(rows: list[Row]) -> str:
    words = {
        "Beside round-to-nearest on the same grid, paired over blocks": _against,
        "Relative errors of untouched and of healed layers, on the healed model's own inputs": _errors,
        "Seconds to write": _time,
    }
    return "\n\n".join([_real(rows), *(f"{title}:\n\n{draw(rows)}" for title, draw in words.items())])


TABLES: Tables = {
    "real": ("The real model, pruned and quantised", _all_real),
    "gpu": ("GPTQ on LLaMA2-7B's shape, whole and pruned", _gpu),
}
