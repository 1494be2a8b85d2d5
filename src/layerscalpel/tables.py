"""Tables and samples for a person at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerscalpel.segment import Segment
from layerscalpel.summary import summary_rows, with_error

SAMPLE_CHARACTERS = 320


def print_results(results: dict[str, Any], out: Path, console: Console) -> None:
    """Print what a run found: the segment, the table, the speed-up and one sample."""
    parent, segment = results.get("parent"), results.get("segment")
    if parent and segment:
        console.print(f"[bold]{escape(parent['name'])}[/] without {escape(_removed(segment, parent['num_layers']))}")
    _print_certificate(results.get("search", {}), console)
    if results.get("cut", {}).get("proof", "") is None:
        console.print("the cut checkpoint was not proven (--no-verify)")
    rows = summary_rows(results)
    if rows:
        console.print(results_table(rows))
    _print_speed(results.get("benchmark", {}), console)
    _print_sample(results.get("evaluate", {}), console)
    page = out / "report.html"
    console.print(
        f"report {page}" if (out / "report" / "done.json").exists() else f"results {out / 'results.json'}",
        highlight=False,
    )


def _removed(segment: list[int], num_layers: int) -> str:
    return str(Segment(segment[0], segment[1], num_layers))


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of a run, one row a model."""
    table = Table("model", title="± is one standard error over blocks", title_style="dim", title_justify="left")
    for title in ("parameters", "MB", "KL, nats", "top-1 agreement", "perplexity"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "-",
        f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "-",
        with_error(row["kl_nats"]),
        with_error(row["top1_agreement_fraction"], percent=True),
        with_error(row["ppl"], digits=2),
    ]


def comparison_table(runs: dict[str, dict[str, Any]]) -> Table:
    """Return one row for the final model of each run, and each parent once."""
    table = Table("run", "model", "segment", "search", title="± is one standard error over blocks", title_style="dim")
    for title in ("parameters", "MB", "KL, nats", "top-1 agreement", "perplexity"):
        table.add_column(title, justify="right", no_wrap=True)
    parents = set()
    for name, results in runs.items():
        rows = summary_rows(results)
        parent = results.get("parent", {}).get("name")
        wanted = [*(rows[:1] if parent not in parents else []), *rows[1:][-1:]]
        parents.add(parent)
        for row in wanted:
            own = row["model"] != "parent"
            segment = str(results.get("segment", "-")) if own else "-"
            found = results.get("search", {}).get("method", "given" if "segment" in results else "-")
            method = found if own else "-"
            table.add_row(escape(name), row["model"], escape(segment), method, *_cells(row)[1:])
    return table


def _print_certificate(search: dict[str, Any], console: Console) -> None:
    found = search.get("certificate")
    if not found:
        return
    ended = f"{found['num_starts_at_optimum']} of {found['num_starts']} gate starts ended there"
    text = f"exact optimum: start {found['exact_start']} ({ended})"
    if found["gate_start"] != found["exact_start"]:
        behind = with_error(found["difference_kl_nats"])
        text += f"; the gate chose {found['gate_start']}, {behind} nats worse, so the optimum was taken"
    console.print(text, highlight=False)


def _print_speed(found: dict[str, Any], console: Console) -> None:
    if "model" in found:
        prefill, decode = (with_error(found["model"][key]) for key in ("prefill_s", "decode_tokens_per_s"))
        console.print(f"prefill {prefill} s, decode {decode} tokens/s on {found['device']}", highlight=False)
    if "speedup" not in found:
        return
    gains = ", ".join(f"{kind} {with_error(found['speedup'][kind], 2)}x" for kind in ("prefill", "decode"))
    console.print(f"speed-up: {gains} (ideal {found['ideal_speedup']:.2f}x) on {found['device']}", highlight=False)


def _print_sample(evaluated: dict[str, Any], console: Console) -> None:
    final = next((name for name in ("healed", "stitched", "cut", "model") if name in evaluated), None)
    for name in dict.fromkeys(("parent", final)):
        samples = evaluated.get(name, {}).get("samples") if name else None
        if samples:
            text = " ".join(samples[0]["text"].split())[:SAMPLE_CHARACTERS]
            console.print(f"[dim]{escape(samples[0]['prompt'])}[/]\n[bold]{name}[/]: {escape(text)}", highlight=False)


def print_description(found: dict[str, Any], console: Console) -> None:
    """Print what `scalpel inspect` found: facts, places of a cut, memory."""
    for label, value in _facts(found):
        console.print(f"[bold]{label:<14}[/] {escape(value)}", highlight=False, soft_wrap=True)
    table = Table("memory, GiB", *found["memory_bytes"], box=box.SIMPLE_HEAD)
    for stage in next(iter(found["memory_bytes"].values())):
        table.add_row(stage, *(f"{needed[stage] / 2**30:.1f}" for needed in found["memory_bytes"].values()))
    console.print(table)
    console.print("weights, optimiser state and libraries; activations come on top", style="dim")


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (label, words) of a description."""
    per_layer = found["parameters_per_layer"]
    sizes = f"{per_layer:,}" if isinstance(per_layer, int) else f"{min(per_layer):,} to {max(per_layer):,}"
    n, sound = found["tried_layers"], found["sound_starts"]
    total = len(sound) + sum(len(group["starts"]) for group in found["refused_starts"])
    facts = [
        ("model", f"{found['name']} ({found['class']}, loaded by {found['loaded_by']})"),
        ("layers", found["layers"]),
        ("parameters", f"{found['parameters']:,}, {sizes} a layer"),
        (
            "bytes",
            f"{_size(found['bytes'])} as {found['dtype']}, {_size(found['bytes_per_layer'])} a layer",
        ),
        ("context", f"{found['max_tokens'] or 'not stated'}"),
        ("a cut changes", ", ".join(found["config_fields_a_cut_changes"]) or "nothing in the config"),
        (f"{n} layers", f"can be cut at {len(sound)} of {total} places"),
    ]
    if found["quantised"]:
        facts.append(("quantised", f"{found['quantised']}: can be cut at a given segment, not searched or healed"))
    if found["other_parts"]:
        facts.append(("carried along", f"{', '.join(found['other_parts'])} (unchanged; proofs are on text)"))
    return facts + [("refused", f"start {_ranges(g['starts'])}: {g['reason']}") for g in found["refused_starts"]]


def _size(num_bytes: int) -> str:
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if num_bytes >= unit)
    return f"{num_bytes / unit:,.1f} {name}"


def _ranges(numbers: list[int]) -> str:
    """Return rising numbers as `1..3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
