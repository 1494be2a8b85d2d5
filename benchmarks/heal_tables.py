"""The tables of docs/benchmarks/heal.md that benchmarks/heal.py fills."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measuring import Row, has, table, with_error

SAME_RUN = ("shape", "blocks", "micro", "take", "device", "torch", "compile", "separate_documents")
"""Rows that agree in these are compared."""
BARS = (("seconds", "wall_s", 0.27), ("filling and training", "learning_s", 0.27), ("memory", "peak_bytes", 0.5))
"""(what, its name in a row, at most so much of LoRA's) of endpoint tuning at the first start."""
Tables = Mapping[str, tuple[str, Callable[[list[Row]], str]]]


def parts_of(given: Tables, rows: list[Row]) -> dict[str, str]:
    """Return {part: its title and table} of all parts of which there are rows."""
    found = {}
    for part, (title, draw) in given.items():
        if own := [row for row in rows if has(row, {"part": part})]:
            devices = ", ".join(sorted({row["device"] for row in own}))
            found[part] = f"{title} ({devices}):\n\n{draw(own)}"
    return found


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts of which there are rows."""
    return "\n\n".join(parts_of(TABLES, rows).values())


def insert(document: Path, given: Tables, rows: list[Row]) -> None:
    """Put each table between the marks `<!-- begin PART -->` and `<!-- end PART -->` of a document."""
    text, drawn = document.read_text(encoding="utf-8"), parts_of(given, rows)
    for part in given:
        begin, end = f"<!-- begin {part} -->\n", f"<!-- end {part} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{document} has no place for the table of {part} - add {begin.strip()} and {end}")
        before, _, rest = text.partition(begin)
        held = f"\n{drawn[part]}\n\n" if part in drawn else ""
        text = before + begin + held + end + rest.partition(end)[2]
    document.write_text(text, encoding="utf-8")


def gib(count: Any) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def over(value: float | None, other: float | None, digits: int = 3) -> str:
    return f"{value / other:.{digits}f}" if value and other else ""


def lora_of(rows: list[Row], row: Row) -> Row:
    """Return the row of LoRA that a row is compared with: the cut model's depth is the same at every start."""
    key = {"method": "lora"} | {name: row[name] for name in SAME_RUN}
    return next((other for other in rows if has(other, key)), {})


def _speed(rows: list[Row]) -> str:
    heads = ("shape", "method", "start", "micro", "", "s", "filling", "training", "validation", "storing", "tokens/s")
    ratios = ("s over LoRA's", "filling and training over LoRA's", "floor over LoRA's")
    more = ("share of the product's rate", "peak, GiB", "peak over LoRA's")
    lines = []
    for row in rows:
        lora = lora_of(rows, row)
        parts = [f"{row[name]:.2f}" for name in ("wall_s", "filling_s", "training_s", "validation_s", "storing_s")]
        beside = [over(row[name], lora.get(name)) for name in ("wall_s", "learning_s", "floor_flops")]
        share = f"{row['floor_flops'] / row['learning_s'] / row['matmul_flops_per_s']:.2f}"
        memory = [gib(row["peak_bytes"]), over(row["peak_bytes"], lora.get("peak_bytes"))]
        what = [row["shape"], row["method"], row["start"], row["micro_batch_size"], _changes(row)]
        lines.append([*what, *parts, f"{row['tokens'] / row['learning_s']:.0f}", *beside, share, *memory])
    return f"{table((*heads, *ratios, *more), lines)}\n\n{_bars(rows)}"


def _changes(row: Row) -> str:
    """Return in words what a row has that others have not."""
    names = {
        "nothing cached": row["cache_gib"] == 0,
        "documents joined": not row["separate_documents"],
        "compiled": row["compile"],
        "idle layers in host memory": row["frozen"] == "cpu",
    }
    return ", ".join(name for name, is_so in names.items() if is_so)


def _bars(rows: list[Row]) -> str:
    """Return how the first start stands to its bars."""
    plain = {"shape": "7b", "method": "endpoint", "separate_documents": True, "compile": False, "frozen": "device"}
    cached = [row for row in rows if has(row, plain) and row["cache_gib"] and lora_of(rows, row)]
    if not cached:
        return ""
    row = max(cached, key=lambda row: (row["start"], -row["take"]))
    lora = lora_of(rows, row)
    words = []
    for what, name, bar in BARS:
        if row[name] and lora[name]:
            ratio = row[name] / lora[name]
            words.append(f"{what} {ratio:.3f} of LoRA's, bar {bar}: {'kept' if ratio <= bar else 'missed'}")
    rate = f"a matrix product reaches {row['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s in bfloat16"
    return f"Start {row['start']}, endpoint: {'; '.join([*words, rate])}."


def _kernels(rows: list[Row]) -> str:
    heads = ("shape", "method", "documents", "micro", "operations a step", "launches", "copies", "waits", "attention")
    lines = []
    for row in rows:
        documents = "apart" if row["separate_documents"] else "joined"
        counts = [f"{row[name]:.0f}" for name in ("operations", "launches", "copies")]
        waits, attention = (_counted(row[name]) for name in ("waits", "attention"))
        lines.append([row["shape"], row["method"], documents, row["micro"], *counts, waits, attention])
    return table(heads, lines)


def _counted(names: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('aten::')} {count:.0f}" for name, count in sorted(names.items()))


def _memory(rows: list[Row]) -> str:
    heads = (
        "objective",
        "teacher",
        "frozen layers on",
        "limit, GiB",
        "peak, GiB",
        "reserved, GiB",
        "CUDA's own, GiB",
        "s",
    )
    lines = []
    for row in rows:
        figures = [gib(row[name]) for name in ("peak_bytes", "reserved_bytes", "context_bytes")]
        outcome = row.get("failed") or f"{row['wall_s']:.1f}"
        lines.append([row["objective"], row["teacher"], row["frozen"], row["limit_gib"], *figures, outcome])
    return table(heads, lines)


def _ranks(rows: list[Row]) -> str:
    heads = (
        "method",
        "processes",
        "weights spread",
        "steps",
        "s",
        "over one process's",
        "peak, GiB",
        "losses apart, nats",
    )
    lines = []
    for row in rows:
        alone = next((other for other in rows if has(other, {"method": row["method"], "processes": 1})), {})
        pairs = zip(row["loss_nats"], alone.get("loss_nats", []), strict=False)
        apart = max((abs(one - other) for one, other in pairs), default=None)
        difference = "" if apart is None or row is alone else f"{apart:.1e}"
        ratio = over(row["wall_s"], alone.get("wall_s"), 2)
        spread = "yes" if row["shard"] else "no"
        what = [row["method"], row["processes"], spread, row["steps"], f"{row['wall_s']:.2f}", ratio]
        lines.append([*what, gib(row["peak_bytes"]), difference])
    return table(heads, lines)


def _first(rows: list[Row]) -> str:
    heads = ("model", "seed", "steps", "s", "KL, nats", "agreement, %", "perplexity")
    lines = []
    for row in rows:
        seconds = f"{row['wall_s']:.0f}" if "wall_s" in row else ""
        figures = [with_error(row.get("kl_nats"), 4), with_error(row.get("top1_agreement_fraction"), 1, 100)]
        what = [row["model"], row.get("seed", ""), row.get("steps", ""), seconds]
        lines.append([*what, *figures, with_error(row["ppl"], 2)])
    return table(heads, lines)


TABLES: Tables = {
    "speed": ("Seconds and memory beside LoRA", _speed),
    "kernels": ("What a step launches", _kernels),
    "memory": ("Memory of a LLaMA-3-8B, 6 of 32 layers removed", _memory),
    "ranks": ("Several processes", _ranks),
    "first": ("The paper's recipe, the first measurement", _first),
}
