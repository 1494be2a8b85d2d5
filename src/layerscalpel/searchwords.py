"""What a search found, in sentences that report, model card and terminal share.

Every figure comes from results.json; what a search did not do has no sentence. A start is a window's first layer.

    paragraphs = search_paragraphs(results)
    paragraphs["race"]
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from layerscalpel.racewords import confidence_text, margin_text, percent, race_text, race_warnings
from layerscalpel.segment import Segment, spoken
from layerscalpel.summary import Results, count, measured, plain, ranges, removed_segments, size
from layerscalpel.targetwords import layers, target_text, target_warnings

PLACES = {"cpu": "in host memory", "disk": "on disk"}


def search_paragraphs(results: Results) -> dict[str, str]:
    """Return {topic: what is to be said of it} in the order of reading; only topics that there are."""
    search = results.get("search", {})
    writers = {
        "target": ("target", target_text),
        "certificate": ("certificate", certificate_text),
        "race": ("race", lambda results: race_text(results["search"])),
        "confidence": ("race", lambda results: confidence_text(results["search"]["race"])),
        "pilots": ("pilots", pilots_text),
        "two runs": ("two_runs", two_runs_text),
        "refused": ("refused", refused_text),
        "every length": ("rates", rates_text),
    }
    found = {topic: write(results) for topic, (key, write) in writers.items() if search.get(key)}
    found["memory and processes"] = place_text(search)
    return {topic: text for topic, text in found.items() if text}


def certificate_text(results: Results) -> str:
    """Say what the gate chose, what the exact scores say, and what the difference costs."""
    search, found = results["search"], results["search"]["certificate"]
    windows = "the windows that can be cut" if search.get("refused") else f"all {len(search['scores'])} windows"
    gate, best, behind = found["gate_start"], found["exact_start"], measured(found["difference_kl_nats"])
    if gate == best:
        said = (
            f"The learned gate chose start {gate}, and so did the exact scores of {windows}: nothing was lost"
            f" ({behind} nats)."
        )
    else:
        runs = removed_segments(results)
        went_on = ", so the run went on with that one" if len(runs) == 1 and runs[0].start == best else ""
        said = (
            f"The learned gate chose start {gate}; the best of {windows} by their exact scores is start {best}."
            f" The gate's choice costs {behind} nats more (paired over blocks){went_on}."
        )
    return f"{said} {found['num_starts_at_optimum']} of {found['num_starts']} starts of the gate ended at the best one."


def pilots_text(results: Results) -> str:
    """Say how the pilots were held and which one was taken."""
    pilots = results["search"]["pilots"]
    steps = max(pilot["steps"] for pilot in pilots)
    return (
        f"{len(pilots)} candidates were healed alike for {steps} steps each. The lowest held-out loss wins; of those"
        " within 0.01 nats of it, the one that agrees most often with the parent. Each was healed once, so how much"
        " chance there is in the figures is not known."
    )


def pilot_rows(results: Results) -> list[dict[str, Any]]:
    """Return the pilots with the KL before their healing and whether the one was taken, by start."""
    search, runs = results.get("search", {}), removed_segments(results)
    rows = []
    for pilot in search.get("pilots", []):
        before = search["scores"][str(pilot["start"])]
        kl = {"value": before["kl_nats"], "se": before["se"], "n": before["num_blocks"]}
        rows.append(pilot | {"kl_before": kl, "taken": len(runs) == 1 and runs[0].start == pilot["start"]})
    return rows


def two_runs_text(results: Results) -> str:
    """Say what two runs of layers cost against one, whichever was taken."""
    found = results["search"]["two_runs"]
    difference, kl = found["single_less_two_kl_nats"], found["kl_nats"]
    pair = spoken([Segment(start, stop, results["parent"]["num_layers"]) for start, stop in found["segments"]])
    single = plain(kl["value"] + difference["value"]) if kl["n"] == difference["n"] else None
    against = f" against {single} of the best single run" if single else ""
    less = difference | {"value": abs(difference["value"])}
    side = "less" if difference["value"] > 0 else "more"
    verdict = "so the two runs were taken" if found["wins"] else "so the single run was kept"
    said = (
        f"The best of {found['num_pairs']} pairs of runs, {pair}, costs {measured(kl)} nats{against}: {measured(less)}"
        f" {side}, paired over {difference['n']} blocks; {verdict}."
    )
    confidence, left = found["race"]["confidence"], found["race"]["left"]
    if not confidence:
        return f"{said} No race was held; the ± does not count that the pair was picked as the best of many."
    told = "left one"
    if len(left) > 1:
        single = "" if any("+" not in name for name in left) else "not "
        told = f"could not tell {len(left)} apart, the single run {single}among them"
    return (
        f"{said} The ± does not count that the pair was picked as the best of many. The race over all of them does, and"
        f" {told} at {percent(confidence)} confidence; that does not count that the same text had picked the first run"
        f" of each pair. {margin_text(found['race'])}"
    ).strip()


def refused_text(results: Results) -> str:
    """Say which windows were ahead but cannot be cut, and why."""
    lines = [f"Starts {starts}: {reason}." for reason, starts in refusals(results["search"]).items()]
    return " ".join(["These windows were ahead, but cannot be cut.", *lines])


def refusals(search: dict[str, Any]) -> dict[str, str]:
    """Return {reason: starts} of the windows that were ahead but cannot be cut."""
    starts: dict[str, list[int]] = defaultdict(list)
    for start, reason in search.get("refused", {}).items():
        starts[reason].append(int(start))
    return {reason: ranges(sorted(group)) for reason, group in starts.items()}


def rates_text(results: Results) -> str:
    """Say how the windows of every length were compared."""
    rates = {int(n): row for n, row in results["search"]["rates"].items()}
    confidence = next(iter(rates.values()))["race"]["confidence"]
    said = f"The windows of {min(rates)} to {layers(max(rates))} were compared, each length by itself"
    said += f": {percent(confidence)} confidence for each, not for all at once." if confidence else "."
    missing = [n for n in range(1, max(rates)) if n not in rates]
    said += f" No window of n = {ranges(missing)} can be cut." if missing else ""
    open_races = [n for n, row in sorted(rates.items()) if confidence and len(row["race"]["left"]) > 1]
    if open_races:
        said += f" Several windows could not be told apart at n = {ranges(open_races)}."
    return said


def place_text(search: dict[str, Any]) -> str:
    """Say where the weights were, and how many processes there were."""
    said = []
    if found := search.get("offload"):
        said.append(f"The layers stayed {PLACES[found['keep']]} and came in one after the other:")
        said.append(f"{count(found['passes'])} passes of {size(found['pass_bytes'])} each.")
        filed = f"took up to {size(found['file_bytes'])} of a file" if found["file_bytes"] else "stayed in memory"
        said.append(f"Hidden states {filed}.")
    if search.get("processes"):
        said.append(f"{search['processes']} processes shared the search.")
    return " ".join(said)


def search_warnings(results: Results) -> list[str]:
    """Return what speaks against the choice of the search, one sentence each."""
    search = results.get("search", {})
    return race_warnings(search) + (target_warnings(results) if search.get("target") else [])
