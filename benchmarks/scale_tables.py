"""The tables of docs/benchmarks/search.md that benchmarks/scale.py fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measuring import Row, has, table, with_error


def tables(rows: list[Row]) -> str:
    """Return the tables of all parts of which there are rows."""
    found = []
    for part, (title, draw) in TABLES.items():
        if own := [row for row in rows if has(row, {"part": part})]:
            devices = ", ".join(sorted({row["device"] for row in own}))
            found.append(f"{title} ({devices}):\n\n{draw(own)}")
    return "\n\n".join(found)


def gib(count: Any) -> str:
    return "" if count is None else f"{count / 2**30:.2f}"


def giga(rate: float) -> str:
    return f"{rate / 1e9:.1f}"


def _race(rows: list[Row]) -> str:
    heads = (
        "n",
        "exact: start",
        "blocks",
        "s",
        "gate: start",
        "steps",
        "s",
        "s of a full pass",
        "full pass over exact",
    )
    lines = []
    for row in sorted(rows, key=lambda row: (row["n"], row["seed"])):
        exact = [row["starts"]["exact"], row["blocks_raced"], f"{row['exact_s']:.2f}"]
        gate = [row["starts"]["gate"], row["gate_steps"], f"{row['gate_s']:.1f}", f"{row['gate_full_s']:.0f}"]
        kl = [with_error(row["kl_nats"][name]) for name in ("exact", "gate")]
        ratio = f"{row['gate_full_over_exact']:.0f}"
        lines.append([row["n"], *exact, *gate, ratio, *kl, with_error(row["gate_less_exact_kl_nats"])])
    return table((*heads, "KL of exact's, held out", "KL of the gate's", "difference, paired"), lines)


def _seven(rows: list[Row]) -> str:
    heads = ("vocabulary", "n", "windows", "tokens", "s", "a forward, s", "full count, forwards", "s over full count")
    lines = []
    for row in rows:
        lengths = row["lengths"]
        n = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        figures = [f"{row[name]:.{digits}f}" for name, digits in FIGURES]
        memory = [gib(row[name]) for name in ("peak_bytes", "weight_bytes", "chunk_bytes")]
        tokens = " x ".join(map(str, row["tokens"]))
        lines.append([row["vocab"], n, row["num_windows"], tokens, *figures, *memory])
    columns = ("peak memory, GiB", "of it weights", "a chunk of logits, GiB")
    return table((*heads, *columns), lines) + _memory(rows)


FIGURES = (("wall_s", 2), ("forward_s", 3), ("full_count_forwards", 2), ("wall_over_full_count", 2))


def _memory(rows: list[Row]) -> str:
    """Compare the memory of the same search at two vocabularies."""
    vocabs = sorted({row["vocab"] for row in rows})
    if len(vocabs) < 2 or rows[0]["peak_bytes"] is None:
        return ""
    lengths = next(row["lengths"] for row in rows if row["vocab"] == vocabs[1])
    small, large = (next(r for r in rows if has(r, {"vocab": v, "lengths": lengths})) for v in vocabs)
    allowed = 1.2 * small["peak_bytes"] + large["chunk_bytes"]
    beside = [row["peak_bytes"] - row["weight_bytes"] for row in (small, large)]
    return (
        f"\n\nPeak at {vocabs[1]} over that at {vocabs[0]}: {large['peak_bytes'] / small['peak_bytes']:.2f}; beside the"
        f" weights {beside[1] / beside[0]:.2f}. Allowed 1.2 times and one chunk, {gib(allowed)} GiB: "
        f"{'kept' if large['peak_bytes'] <= allowed else 'NOT kept'}."
    )


def _seventy(rows: list[Row]) -> str:
    heads = (
        "layers come from",
        "tokens",
        "windows",
        "s a pass",
        "waited, s",
        "GiB a pass",
        "GB/s",
        "plain copies, GB/s",
    )
    heads += ("share", "arithmetic alone, s", "s over the larger of both", "device memory, GiB", "limit", "host, GiB")
    lines = []
    for row in rows:
        place = "host memory" if row["keep"] == "cpu" else "cached files"
        tokens = " x ".join(map(str, row["tokens"]))
        figures = [f"{row['wall_s']:.2f}", f"{row['waited_s']:.2f}", gib(row["pass_bytes"])]
        figures += [giga(row[name]) for name in ("load_bytes_per_s", "copy_bytes_per_s")]
        figures += [f"{row[name]:.2f}" for name in ("copy_share", "compute_floor_s", "wall_over_floor")]
        memory = [gib(row[name]) for name in ("peak_bytes", "device_limit_bytes", "host_bytes")]
        lines.append([place, tokens, row["num_windows"], *figures, *memory])
    return table(heads, lines)


def _disk(rows: list[Row]) -> str:
    heads = ("turn", "layers", "GiB", "plain reads, GB/s", "a pass, GB/s", "pass over plain", "GiB from storage")
    lines = []
    for row in rows:
        rates = [giga(row[name]) for name in ("plain_bytes_per_s", "pass_bytes_per_s")]
        ratio, read = f"{row['pass_over_plain']:.2f}", gib(row["storage_read_bytes"])
        lines.append([row["turn"], row["num_layers"], gib(row["pass_bytes"]), *rates, ratio, read])
    return table(heads, lines)


def _ranks(rows: list[Row]) -> str:
    heads = ("processes", "n", "blocks", "s", "times as fast", "largest difference of a score, nats")
    lines = []
    for row in sorted(rows, key=lambda row: row["processes"]):
        speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
        difference = f"{row['max_difference_nats']:.1e}" if "max_difference_nats" in row else ""
        lines.append([row["processes"], row["n"], row["num_blocks"], f"{row['wall_s']:.2f}", speedup, difference])
    return table(heads, lines)


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "race": ("Exact search and the paper's gate on the real model", _race),
    "seven": ("LLaMA2-7B's shape in memory", _seven),
    "seventy": ("LLaMA2-70B's shape, layers elsewhere", _seventy),
    "disk": ("Layers from a disk, nothing cached", _disk),
    "ranks": ("Several processes", _ranks),
}
