"""Write what is known of a model as a model card, in words and one table.

Every figure comes from results.json. An absent stage has no section. What speaks against the result comes first.

    text = model_card(results, to_dict(config), provenance)
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from layerscalpel.distancewords import distance_words
from layerscalpel.healwords import heal_warnings, healing_words
from layerscalpel.longwords import long_warnings, long_words
from layerscalpel.proofwords import proof_text, proof_warnings
from layerscalpel.quantwords import quantize_warnings, quantize_words
from layerscalpel.search import SEARCHES
from layerscalpel.searchwords import pilot_rows, refusals, search_paragraphs, search_warnings
from layerscalpel.segment import Segment, spoken
from layerscalpel.speedwords import no_difference, said, size_rows, tells, timing_rows
from layerscalpel.summary import Results, count, measured, plain, removed_segments, summary_rows
from layerscalpel.taskwords import kept_text, task_warnings, task_words
from layerscalpel.writingwords import writing_warnings, writing_words

MEASURES = {
    "kl_nats": ("KL to the parent", 1, " nats", -1),
    "top1_agreement_fraction": ("top-1 agreement", 100, " %", 1),
    "ppl": ("perplexity", 1, "", -1),
}
"""{quantity: (name, scale of print, unit, 1 where more is better)}."""
STEPS = {"stitched": "Stitching", "healed": "Healing"}
HEALED = " A healed checkpoint is not part of the proof; it was loaded from disk to be measured."


def model_card(results: Results, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return a README.md with the front matter that the hub reads."""
    front: dict[str, Any] = {"library_name": "transformers", "tags": _tags(results)}
    name = results["parent"]["name"]
    if not _is_local(name) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        front["base_model"] = name
    said = words(results) | {"front_matter": yaml.safe_dump(front, sort_keys=False), "provenance": provenance}
    cut, allowed = results.get("cut", {}), config.get("model", {}).get("trust_remote_code")
    said |= {"loaded_by": cut.get("loaded_by", "AutoModelForCausalLM")}
    said |= {"remote": ", trust_remote_code=True" if allowed else ""}
    said |= {"title": shown_name(name), "history": history_lines(cut.get("history"), len(cut.get("steps", [cut])))}
    return environment(autoescape=False).get_template("card.md.j2").render(said, config=config) + "\n"


def _tags(results: Results) -> list[str]:
    """Return what was done, in the hub's words."""
    done = {"layer-pruning": bool(removed_segments(results)), "quantization": "quantize" in results}
    return [*(tag for tag, is_done in done.items() if is_done), "layerscalpel"]


def _is_local(name: str) -> bool:
    return name == "demo" or name.endswith(".gguf") or Path(name).is_absolute() or Path(name).exists()


def shown_name(name: str) -> str:
    """Return a hub id as it is, and of a path the last part: where it lay is nobody's business."""
    return Path(name).name if _is_local(name) else name


def history_lines(history: dict[str, Any] | None, num_steps: int = 1) -> list[str]:
    """Return one line for each cut back to the first parent, newest first; none where nothing was cut before.

    The first `num_steps` are those of one cut. It took the last segment first, so all of them have the layers' numbers
    in its parent.
    """
    steps = []
    while history:
        steps.append(history)
        history = history.get("before")
    lines = []
    for group in [steps[:num_steps], *([step] for step in steps[num_steps:])] if steps else []:
        parent = group[-1]
        runs = [Segment(start, stop, parent["num_layers"]) for start, stop in (step["segment"] for step in group)]
        lines.append(f"{spoken(runs)} of {shown_name(parent['parent'])} removed")
    return lines if len(lines) > 1 else []


def headline(results: Results) -> str:
    """Return the sentence that states what was removed and what it cost."""
    rows = summary_rows(results)
    parent, final = rows[0], rows[-1]
    said, shares, costs = shown_name(results["parent"]["name"]), [], []
    segments = removed_segments(results)
    if final["model"] == "quantized" and not segments:
        return f"{said}, quantised: {_fewer(results['quantize'])}."
    if segments:
        said = _removed(segments).capitalize()
        shares.append(f"{100 * sum(map(len, segments)) / segments[0].num_layers:.3g} % of the layers")
    if final["parameters"] and final is not parent:
        shares.append(f"{100 * (1 - final['parameters'] / parent['parameters']):.3g} % of the parameters")
    if final["kl_nats"]:
        costs.append(f"KL to the parent {measured(final['kl_nats'])} nats")
    if final["model"] == "quantized":
        shares.append(f"{100 * (1 - final['bytes'] / parent['bytes']):.3g} % of the bytes")
    if final["ppl"] and final is not parent and parent["ppl"]:
        costs.append(f"perplexity {measured(final['ppl'])} against {measured(parent['ppl'])} of the parent")
    if kept := kept_text(results):
        costs.append(kept)
    facts = "; ".join([", ".join(shares)] * bool(shares) + costs)
    return f"{said}: {facts}." if facts else f"{said}."


def _fewer(found: dict[str, Any]) -> str:
    """Return how much smaller the folder of a model is that was quantised and not cut, and what that cost."""
    text = f"{100 * (1 - found['bytes'] / found['source_bytes']):.3g} % fewer bytes"
    kl = found.get("kl_to_source_nats")
    return text + (f"; KL to the parent {measured(kl)} nats" if kl else "")


def _removed(segments: list[Segment]) -> str:
    if len(segments) == 1:
        return str(segments[0]).replace(" (", " removed (", 1)
    runs, _, share = spoken(segments).rpartition(", ")
    return f"{runs} removed, {share}"


def warnings(results: Results) -> list[str]:
    """Return what speaks against the result, one sentence each."""
    found = proof_warnings(results["cut"]) if "cut" in results else []
    found += heal_warnings(results) + search_warnings(results) + long_warnings(results)
    found += task_warnings(results) + writing_warnings(results) + quantize_warnings(results)
    # Rounding weights makes them worse, which is no finding: the sizes say what it is for.
    children = [row for row in summary_rows(results) if row["model"] not in ("parent", "quantized")]
    for before, after in itertools.pairwise(children):
        found += _worsenings(before, after)
    speedup = results.get("benchmark", {}).get("speedup", {})
    for name, ratio in ((kind, speedup[kind]) for kind in ("prefill", "decode") if kind in speedup):
        if not tells(ratio):
            found.append(f"Speed in {name}: {no_difference(ratio)}.")
        elif ratio["value"] < 1:
            found.append(f"The result is slower than the parent in {name}: {measured(ratio)} times its speed.")
    return found


def _worsenings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return every measure of a model that is worse than that of the model it was made from."""
    found, step = [], STEPS.get(after["model"], after["model"])
    for key, (name, scale, unit, better) in MEASURES.items():
        old, new = before[key], after[key]
        if old and new and not better * new["value"] >= better * old["value"]:  # so that NaN counts as worse
            change = f"{measured(old, scale)}{unit} before, {measured(new, scale)}{unit} after"
            found.append(f"{step} made the {name} worse: {change}.")
    return found


def environment(*, autoescape: bool) -> Environment:
    """Return the templates' environment with our ways to print a number."""
    loader = PackageLoader("layerscalpel", ".")
    environment = Environment(loader=loader, autoescape=autoescape, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {item.__name__: item for item in (measured, plain, count)}
    environment.filters["ratio"] = lambda found: said(found, measured(found))
    environment.tests["telling"] = tells
    environment.filters["unbroken"] = lambda text: text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")
    return environment


def words(results: Results) -> dict[str, Any]:
    """Return what the templates read: every stage (None where it did not run) and the sentences about them."""
    segments = removed_segments(results)
    return {
        **dict.fromkeys(("data", "search", "cut", "stitch", "heal", "quantize", "evaluate", "benchmark")),
        **results,
        "segments": segments,
        "removed": {i for run in segments for i in range(run.start, run.stop)},
        "spoken": spoken(segments) if segments else "the layers",
        "found": search_paragraphs(results),
        "pilots": pilot_rows(results),
        "refusals": refusals(results.get("search", {})),
        "method": SEARCHES.get(results.get("search", {}).get("method")),
        "rows": summary_rows(results),
        "timing_rows": list(timing_rows(results.get("benchmark", {}))),
        "size_rows": list(size_rows(results.get("benchmark", {}))),
        **long_words(results),
        **task_words(results),
        **writing_words(results),
        **distance_words(results),
        **healing_words(results),
        **quantize_words(results),
        "headline": headline(results),
        "warnings": warnings(results),
        "proof": proof_text(results["cut"]) if "cut" in results else None,
        "unproven": HEALED if "heal" in results else "",
    }
