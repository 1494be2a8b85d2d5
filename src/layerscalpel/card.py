"""Write what is known of a model as a model card, in words and one table.

Every figure comes from results.json. An absent stage has no section. What speaks against the result comes first.

    text = model_card(results, to_dict(config), provenance)
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from layerscalpel.search import SEARCHES
from layerscalpel.segment import Segment
from layerscalpel.summary import summary_rows

Results = dict[str, Any]
MEASURES = {
    "kl_nats": ("KL to the parent", 1, " nats", -1),
    "top1_agreement_fraction": ("top-1 agreement", 100, " %", 1),
    "ppl": ("perplexity", 1, "", -1),
}
"""{quantity: (name, scale of print, unit, 1 where more is better)}."""
STEPS = {"stitched": "Stitching", "healed": "Healing"}
HEALED = " A healed checkpoint is not part of the proof; it was loaded from disk to be measured."
CARD = """---
{{ front_matter }}---

# {{ title }}, cut by Layer Scalpel

{{ headline }}
{% for warning in warnings %}

> **Warning.** {{ warning }}
{% endfor %}
{% if search %}

The search `{{ search.method }}` chose the segment{{ ": " + method.sentence.replace(" (default)", "") if method }}.
{% endif %}
{% if heal %}

The seam was healed: {{ heal.trained_parameters | count }} parameters in layers {{ heal.layers | join(", ") }} of the \
cut model were trained for {{ heal.steps | count }} steps on {{ heal.tokens | count }} tokens (`{{ heal.method }}`, \
objective `{{ heal.objective }}`); step {{ heal.best_step }} was kept.
{% endif %}

| model | parameters | MB | KL to the parent (nats per token) | top-1 agreement (%) | perplexity |
|---|---|---|---|---|---|
{% for row in rows %}
| {{ row.model }} | {{ row.parameters | count }} | {{ row.bytes | count(1e6) }} | {{ row.kl_nats | measured }} \
| {{ row.top1_agreement_fraction | measured(100) }} | {{ row.ppl | measured }} |
{% endfor %}

± is one standard error over blocks of held-out text; – was not measured.
{% if benchmark %}

Speed on {{ benchmark.device }} over the parent's: prefill {{ benchmark.speedup.prefill | measured }}, decoding \
{{ benchmark.speedup.decode | measured }}; the number of layers alone would give {{ benchmark.ideal_speedup | plain }}.
{% endif %}

## Use

```python
from transformers import {{ loaded_by }}, AutoTokenizer

model = {{ loaded_by }}.from_pretrained("path/to/this/folder"{{ remote }})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{% if cut %}

## Proof

{{ proof }}{{ unproven }}
{% endif %}
{% if history %}

## Where it comes from

{% for step in history %}
- {{ step }}
{% endfor %}
{% endif %}
{% if data %}

## Data (sha256 of token ids)

{% for part, blocks in data.items() %}
- {{ part }}: `{{ blocks.source }}`, {{ blocks.num_blocks }} x {{ blocks.block_tokens }} tokens, `{{ blocks.sha256 }}`
{% endfor %}
{% endif %}

## Limits

- Only the figures above were measured; other tasks, languages and long contexts were not.
- What the parent gets wrong this model gets wrong too; nothing was done about safety or bias.
- The licence is that of the parent.

Made with layerscalpel {{ provenance.layerscalpel }} and transformers {{ provenance.transformers }}.
"""


def model_card(results: Results, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return a README.md with the front matter that the hub reads."""
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["layer-pruning", "layerscalpel"]}
    name = results["parent"]["name"]
    if not _is_local(name) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        front["base_model"] = name
    said = words(results) | {"front_matter": yaml.safe_dump(front, sort_keys=False), "provenance": provenance}
    allowed = config.get("model", {}).get("trust_remote_code")
    said |= {"loaded_by": results.get("cut", {}).get("loaded_by", "AutoModelForCausalLM")}
    said |= {"remote": ", trust_remote_code=True" if allowed else ""}
    said |= {"title": shown_name(name), "history": history_lines(results.get("cut", {}).get("history"))}
    return environment(autoescape=False).from_string(CARD).render(said, config=config) + "\n"


def _is_local(name: str) -> bool:
    return name == "demo" or name.endswith(".gguf") or Path(name).is_absolute() or Path(name).exists()


def shown_name(name: str) -> str:
    """Return a hub id as it is, and of a path the last part: where it lay is nobody's business."""
    return Path(name).name if _is_local(name) else name


def history_lines(history: dict[str, Any] | None) -> list[str]:
    """Return one line for each cut back to the first parent, newest first; none where nothing was cut before."""
    lines = []
    while history:
        start, stop = history["segment"]
        segment = Segment(start, stop, history["num_layers"])
        lines.append(f"{segment} of {shown_name(history['parent'])} removed")
        history = history.get("before")
    return lines if len(lines) > 1 else []


def headline(results: Results) -> str:
    """Return the sentence that states what was removed and what it cost."""
    rows = summary_rows(results)
    parent, final = rows[0], rows[-1]
    said, shares, costs = results["parent"]["name"], [], []
    if segment := _segment(results):
        said = str(segment).replace(" (", " removed (", 1).capitalize()
        shares.append(f"{100 * len(segment) / segment.num_layers:.3g} % of the layers")
    if final["parameters"] and final is not parent:
        shares.append(f"{100 * (1 - final['parameters'] / parent['parameters']):.3g} % of the parameters")
    if final["kl_nats"]:
        costs.append(f"KL to the parent {measured(final['kl_nats'])} nats")
    if final["ppl"] and final is not parent and parent["ppl"]:
        costs.append(f"perplexity {measured(final['ppl'])} against {measured(parent['ppl'])} of the parent")
    facts = "; ".join([", ".join(shares)] * bool(shares) + costs)
    return f"{said}: {facts}." if facts else f"{said}."


def warnings(results: Results) -> list[str]:
    """Return what speaks against the result, one sentence each."""
    found = []
    proof = results.get("cut", {}).get("proof")
    if "cut" in results and not is_proven(proof):
        found.append(proof_sentence(proof))
    elif proof and not proof["logits"]:
        reason = proof["left_out"].get("logits", "no reason was kept")
        found.append(f"The checkpoint's own logits were not compared: {reason}.")
    children = [row for row in summary_rows(results) if row["model"] != "parent"]
    for before, after in itertools.pairwise(children):
        found += _worsenings(before, after)
    if results.get("heal", {}).get("best_step") == 0:
        found.append("No step of healing lowered the held-out loss: the healed model is the one it began with.")
    speedup = results.get("benchmark", {}).get("speedup", {})
    for name, ratio in ((kind, speedup[kind]) for kind in ("prefill", "decode") if kind in speedup):
        effect, spread = ratio["value"] - 1, 2 * (ratio.get("se") or 0)
        if not abs(effect) > spread:
            within = f"{measured(ratio)} times lies within two standard errors of 1"
            found.append(f"The {name} speed-up of {within}: the spread hides any gain.")
        elif effect < 0:
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


def is_proven(proof: dict[str, Any] | None) -> bool:
    """Tell whether the saved checkpoint was shown to compute what it should."""
    if not proof:
        return False
    parts = [proof[name] for name in ("logits", "twin") if proof[name]]
    enough = proof["logits"] or (proof["twin"] and proof["tensors"])
    return bool(enough) and all(_passed(part) for part in parts)


def _passed(part: dict[str, Any]) -> bool:
    close = part["logits_equal"] or 0 < part["max_difference"] <= part["tolerance"]
    return close and part["generation_equal"] is not False


def proof_sentence(proof: dict[str, Any] | None) -> str:
    """Return what was compared and how close it came."""
    if not proof:
        return "The cut checkpoint was not verified (--no-verify)."
    said = [f"{'Proven' if is_proven(proof) else 'The proof FAILED'} ({proof['kind']})."]
    if part := proof["logits"]:
        said.append(_logits_sentence("The saved cut checkpoint", part))
    if part := proof["tensors"]:
        said.append(
            f"All {part['num_tensors']:,} kept tensors ({part['num_bytes'] / 1e6:,.1f} MB) have the bytes they have in"
            f" the parent (sha256 `{part['sha256'][:16]}`)."
        )
    if part := proof["twin"]:
        said.append(_logits_sentence("The same cut of a tiny random twin of the config", part))
    said += [f"Not part of the proof, {name}: {reason}." for name, reason in proof["left_out"].items()]
    if proof.get("text_only"):
        said.append("Compared on text alone; the parts for other inputs were carried over unchanged.")
    return " ".join(said)


def _logits_sentence(what: str, part: dict[str, Any]) -> str:
    differ = f"they differ by at most {part['max_difference']:.3g} where {part['tolerance']:.3g} is allowed"
    blocks, length = part["tokens"]
    generated = {
        None: "Nothing was generated from it.",
        True: "Greedy tokens with a cache are equal to those without.",
        False: "Greedy tokens with a cache are NOT those without.",
    }[part["generation_equal"]]
    return (
        f"{what} was loaded again ({part['loaded']}, {part['dtype']} on {part['device']}) and its logits on"
        f" {blocks} x {length} random tokens compared with those of the parent with the segment bypassed:"
        f" {'they are equal bit for bit' if part['logits_equal'] else differ}. {generated}"
    )


def measured(item: dict[str, Any] | None, scale: float = 1) -> str:
    """Return `value ± error`, rounded to the error's first digit, or to two digits if the first is a 1."""
    if not item:
        return "–"
    value, error = scale * item["value"], scale * (math.nan if item.get("se") is None else item["se"])
    if error == 0 or not math.isfinite(value + error):
        return plain(value) if error == 0 else f"{plain(value)} ± unknown"
    places = min(max((f"{error:e}"[0] == "1") - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{places}f} ± {error:,.{places}f}"


def plain(value: float) -> str:
    """Return a number with three digits, or all of them before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def count(number: int | None, unit: float = 1) -> str:
    """Return a whole number with separators, or one decimal of it in a larger unit."""
    return "–" if number is None else f"{number / unit:,.{int(unit > 1)}f}"


def _segment(results: Results) -> Segment | None:
    pair = results.get("segment")
    return Segment(pair[0], pair[1], results["parent"]["num_layers"]) if pair else None


def environment(*, autoescape: bool) -> Environment:
    """Return the templates' environment with our ways to print a number."""
    loader = PackageLoader("layerscalpel", ".")
    environment = Environment(loader=loader, autoescape=autoescape, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {item.__name__: item for item in (measured, plain, count)}
    environment.filters["unbroken"] = lambda text: text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")
    return environment


def words(results: Results) -> dict[str, Any]:
    """Return what the templates read: every stage (None where it did not run) and the sentences about them."""
    return {
        **dict.fromkeys(("data", "search", "cut", "stitch", "heal", "evaluate", "benchmark")),
        **results,
        "segment": _segment(results),
        "method": SEARCHES.get(results.get("search", {}).get("method")),
        "rows": summary_rows(results),
        "headline": headline(results),
        "warnings": warnings(results),
        "proof": proof_sentence(results["cut"].get("proof")) if "cut" in results else None,
        "unproven": HEALED if "heal" in results else "",
    }
