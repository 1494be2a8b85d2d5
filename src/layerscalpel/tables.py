"""Tables and samples for a person at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerscalpel.healwords import heal_line
from layerscalpel.longwords import long_lines
from layerscalpel.quantwords import quantize_lines
from layerscalpel.racewords import race_line
from layerscalpel.searchwords import pilot_rows, refused_text, two_runs_text
from layerscalpel.segment import spoken
from layerscalpel.speedwords import said, speed_lines
from layerscalpel.summary import plain, ranges, removed_segments, size, summary_rows, with_error
from layerscalpel.targetwords import target_text
from layerscalpel.tasktables import print_tasks
from layerscalpel.writingwords import writing_warnings

SAMPLE_CHARACTERS = 320


def print_results(results: dict[str, Any], out: Path, console: Console) -> None:
    """Print what a run found: the segments, the search, the table, the speed-up and one sample."""
    if segments := removed_segments(results):
        console.print(f"[bold]{escape(results['parent']['name'])}[/] without {escape(spoken(segments))}")
    _print_search(results, console)
    if results.get("heal"):
        console.print(escape(heal_line(results)), highlight=False)
    if results.get("cut", {}).get("proof", "") is None:
        console.print("the cut checkpoint was not proven (--no-verify)")
    rows = summary_rows(results)
    if rows:
        console.print(results_table(rows))
    for line in [*long_lines(results), *writing_warnings(results)]:
        console.print(escape(line), highlight=False)
    print_tasks(results, console)
    for line in quantize_lines(results):
        console.print(escape(line), highlight=False)
    _print_speed(results.get("benchmark", {}), console)
    _print_sample(results.get("evaluate", {}), console)
    page = out / "report.html"
    console.print(
        f"report {page}" if (out / "report" / "done.json").exists() else f"results {out / 'results.json'}",
        highlight=False,
    )


def results_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of a run, one row a model."""
    table = Table("model", title="± is one standard error over blocks", title_style="dim", title_justify="left")
    table.box, table.collapse_padding, table.pad_edge = box.SIMPLE_HEAD, True, False  # it fits 80 columns
    _add_measures(table)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _add_measures(table: Table) -> None:
    for title in ("parameters", "MB", "KL, nats", "top-1\nagreement", "perplexity\n(over parent's)"):
        table.add_column(title, justify="right", no_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else "-",
        f"{row['bytes'] / 1e6:.0f}" if row["bytes"] else "-",
        with_error(row["kl_nats"]),
        with_error(row["top1_agreement_fraction"], percent=True),
        _perplexity(row["ppl"], row["ppl_ratio"]),
    ]


def _perplexity(ppl: dict[str, Any] | None, ratio: dict[str, Any] | None) -> str:
    """Return a perplexity and its ratio to the parent's, whose error is that of the difference alone, where known."""
    return with_error(ppl, digits=2) if not ppl or not ratio else f"{ppl['value']:.2f} ({with_error(ratio, 2)})"


def _print_search(results: dict[str, Any], console: Console) -> None:
    """Print one line for each thing that the search found, and its tables."""
    search = results.get("search", {})
    lines = [target_text(results)] if search.get("target") else []
    lines += [_certificate_line(search)] if search.get("certificate") else []
    lines += [race_line(search)] if search.get("race") else []
    lines += [two_runs_text(results)] if search.get("two_runs") else []
    lines += [refused_text(results)] if search.get("refused") else []
    for line in lines:
        console.print(escape(line), highlight=False)
    if search.get("rates"):
        console.print(rates_table(search["rates"]))
    if search.get("pilots"):
        console.print(pilots_table(results))


def _certificate_line(search: dict[str, Any]) -> str:
    found = search["certificate"]
    ended = f"{found['num_starts_at_optimum']} of {found['num_starts']} gate starts ended there"
    line = f"exact optimum: start {found['exact_start']} ({ended})"
    if found["gate_start"] != found["exact_start"]:
        line += f"; the gate chose {found['gate_start']}, {with_error(found['difference_kl_nats'])} nats worse"
    return line


def rates_table(rates: dict[str, dict[str, Any]]) -> Table:
    """Return the best window of every length, one row a length."""
    title = "the best window of each length; the next best costs so much more"
    table = Table(title=title, title_style="dim", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("layers", "start", "KL, nats", "blocks", "next best", "not told apart"):
        table.add_column(name, justify="right", no_wrap=name != "not told apart")
    for n, row in sorted(rates.items(), key=lambda item: int(item[0])):
        race = row["race"]
        margin = with_error(race["margin"]["difference_kl_nats"]) if race["margin"] else "-"
        together = ranges(race["left"]) if race["confidence"] and len(race["left"]) > 1 else ""
        kl = with_error({"value": row["kl_nats"], "se": row["se"]})
        table.add_row(n, str(row["start"]), kl, str(row["num_blocks"]), margin, together)
    return table


def pilots_table(results: dict[str, Any]) -> Table:
    """Return the healed candidates, one row each."""
    table = Table(title="pilots", title_style="dim", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("start", "KL before, nats", "KL after", "held-out loss", "top-1 agreement"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in pilot_rows(results):
        agreement = f"{100 * row['top1_agreement_fraction']:.1f} %"
        figures = (with_error(row["kl_before"]), plain(row["kl_nats"]), f"{row['validation_loss_nats']:.3f}", agreement)
        table.add_row(f"{row['start']}{' (taken)' if row['taken'] else ''}", *figures)
    return table


def _print_speed(found: dict[str, Any], console: Console) -> None:
    if "model" in found:
        prefill, decode = (with_error(found["model"][key]) for key in ("prefill_s", "decode_tokens_per_s"))
        console.print(f"prefill {prefill} s, decode {decode} tokens/s on {found['device']}", highlight=False)
    if "speedup" in found:
        ratios = ((kind, found["speedup"][kind]) for kind in ("prefill", "decode"))
        gains = ", ".join(f"{kind} {said(ratio, f'{with_error(ratio, 2)}x')}" for kind, ratio in ratios)
        console.print(f"speed-up: {gains} (ideal {found['ideal_speedup']:.2f}x) on {found['device']}", highlight=False)
    for line in speed_lines(found):
        console.print(escape(line), highlight=False)


def _print_sample(evaluated: dict[str, Any], console: Console) -> None:
    final = next((name for name in ("quantized", "healed", "stitched", "cut", "model") if name in evaluated), None)
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
            f"{size(found['bytes'])} as {found['dtype']}, {size(found['bytes_per_layer'])} a layer",
        ),
        ("context", f"{found['max_tokens'] or 'not stated'}"),
        ("a cut changes", ", ".join(found["config_fields_a_cut_changes"]) or "nothing in the config"),
        (f"{n} layers", f"can be cut at {len(sound)} of {total} places"),
    ]
    if found["quantised"]:
        limit = f"cut at a given segment, not searched or healed: {found['quantised_limit']}"
        facts.append(("quantised", f"{found['quantised']}: can be {limit if found['quantised_limit'] else 'healed'}"))
    if found["other_parts"]:
        facts.append(("carried along", f"{', '.join(found['other_parts'])} (unchanged; proofs are on text)"))
    return facts + [("refused", f"start {ranges(g['starts'])}: {g['reason']}") for g in found["refused_starts"]]
