"""The tables of docs/benchmarks/speed.md that benchmarks/speed.py fills."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from heal_tables import Tables, parts_of
from measuring import Row, table, with_error
from speed_sizes import WHOLE

from layerscalpel.speedwords import said, tells

BAR = 0.97
"""At least so much of the ideal speed-up, in prefill and decoding."""
KINDS = {"prefill": "floor_prefill_s", "decode": "floor_step_s"}
"""{what is sped up: its floor in a row}."""
TITLES = {"prefill": "Prefill", "decode": "Decoding, a step of all sequences"}


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts of which there are rows."""
    return "\n\n".join(parts_of(TABLES, rows).values())


def seconds_of(row: Row, name: str) -> dict[str, float]:
    """Return the seconds of a prefill, and of a decoding step, of a model."""
    found = row["models"][name]
    return {"prefill": found["prefill_s"]["value"], "decode": row["batch_size"] / found["decode_tokens_per_s"]["value"]}


def _depths(rows: list[Row]) -> str:
    heads = ("way", "batch", "prompt", "layers", "ideal", "ms", "speed-up", "of ideal", "on paper", "share of floor")
    parts = []
    for kind, title in TITLES.items():
        lines = [line for row in rows if "models" in row for line in _lines(row, kind)]
        parts.append(f"{title}:\n\n{table(heads, lines)}")
    failed = [f"Not by a {row['mode']}: {row['failed']}." for row in rows if "failed" in row]
    return "\n\n".join([*parts, *failed, *_bars(rows)])


def _lines(row: Row, kind: str) -> Iterator[list[str]]:
    floor = row[KINDS[kind]]
    for name, layers in row["layers"].items():
        took_s = seconds_of(row, name)[kind]
        ratios = ["", "", ""]
        if name != WHOLE:
            ratio = row["speedups"][name][kind]
            share = f"{ratio['value'] / row['ideal'][name]:.3f}" if tells(ratio) else ""
            ratios = [said(ratio, with_error(ratio)), share, f"{floor[WHOLE] / floor[name]:.3f}"]
        what = [row["mode"], row["batch_size"], row["prompt_tokens"], layers, f"{row['ideal'][name]:.3f}"]
        yield [*map(str, what), f"{1000 * took_s:.2f}", *ratios, f"{floor[name] / took_s:.2f}"]


def _bars(rows: list[Row]) -> Iterator[str]:
    """Yield how the deepest cut stands to its bar in each way, and the device's rates."""
    timed = [row for row in rows if "models" in row]
    for mode in dict.fromkeys(row["mode"] for row in timed):
        own, words = [row for row in timed if row["mode"] == mode], []
        for kind in KINDS:
            shares = [_share(row, kind) for row in own]
            kept = "kept" if min(shares) >= BAR else "missed"
            words.append(f"{kind} {min(shares):.3f} to {max(shares):.3f} of the ideal, bar {BAR}: {kept}")
        yield f"Fewest layers, {mode}: {'; '.join(words)}."
    for row in timed[:1]:
        flops, copied = row["rates"]["flops_per_s"] / 1e12, row["rates"]["bytes_per_s"] / 1e12
        yield f"The device reaches {flops:.4g} TFLOP/s in a product of matrices, {copied:.3g} TB/s in a copy."


def _share(row: Row, kind: str) -> float:
    name = min(row["layers"], key=lambda name: row["layers"][name])
    return row["speedups"][name][kind]["value"] / row["ideal"][name]


def _latency(rows: list[Row]) -> str:
    heads = ("way", "batch", "prompt", "fixed, ms", "a layer, ms", "layers", "predicted, ms", "measured, ms", "off, %")
    lines = []
    for row in rows:
        fit, check = row["fit"], row["fit"]["check"]
        what = [row["mode"], row["batch_size"], row["prompt_tokens"]]
        what += [with_error(fit["fixed_ms"]), with_error(fit["layer_ms"], 4), f"{check['num_layers']}, bypassed"]
        seen = [with_error(check[name]) for name in ("predicted_ms", "measured_ms")]
        lines.append([*what, *seen, with_error(check["error_fraction"], 1, 100)])
        for layers, measured in row["measured_ms"].items():
            predicted = row["predicted_ms"][layers]
            off = f"{100 * (predicted['value'] / measured - 1):.1f}"
            lines.append([*[""] * 5, layers, with_error(predicted), f"{measured:.3f}", off])
    return table(heads, lines)


def _real(rows: list[Row]) -> str:
    heads = ("model", "threads", "layers", "ideal", "prefill, ms", "step, ms", "prefill", "decode", "decode on paper")
    lines = []
    for row in rows:
        for name, layers in row["layers"].items():
            times = [f"{1000 * took_s:.1f}" for took_s in seconds_of(row, name).values()]
            ratios = ["", "", ""]
            if name != WHOLE:
                found = (row["speedups"][name][kind] for kind in KINDS)
                on_paper = row["floor_step_s"][WHOLE] / row["floor_step_s"][name]
                ratios = [*(said(ratio, with_error(ratio)) for ratio in found), f"{on_paper:.3f}"]
            lines.append([row["model"], row["threads"], layers, f"{row['ideal'][name]:.3f}", *times, *ratios])
    return table(heads, lines)


def _tasks(rows: list[Row]) -> str:
    heads = ("model", "threads", "items", "ours, s", "the harness's own, s", "items a second, over the harness's")
    lines = []
    for row in rows:
        took = [f"{statistics.median(row['wall_s'][who]):.1f}" for who in ("ours", "theirs")]
        lines.append([row["model"], row["threads"], row["items"], *took, with_error(row["speedup"])])
    return table(heads, lines)


TABLES: Tables = {
    "gpu": ("LLaMA2-7B's shape by depth", _depths),
    "latency": ("Milliseconds a token by depth", _latency),
    "cpu": ("The real model on a CPU, a fifth of its layers removed", _real),
    "tasks": ("Tasks beside the harness's own model, the same scores", _tasks),
}
