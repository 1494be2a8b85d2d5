"""Write what a run found as one HTML page and as a model card.

Every figure comes from results.json. An absent stage has no section. What speaks against the result comes first.

    page = render_report(results, to_dict(config), provenance)
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from layerscalpel import plots
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
CARD = """---
{{ front_matter }}---

# {{ parent.name }}, cut by Layer Scalpel

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
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{% if cut %}

## Proof

{{ proof }}
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


def render_report(results: Results, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return one HTML page that needs nothing from outside itself."""
    template = _environment(autoescape=True).get_template("report.html.j2")
    figures = {name: Markup(svg) for name, svg in _figures(results).items()}
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return template.render(_words(results), figures=figures, config_yaml=settings, provenance=provenance)


def model_card(results: Results, config: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Return a README.md with the front matter that the hub reads."""
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["layer-pruning", "layerscalpel"]}
    name = results["parent"]["name"]
    is_local = name == "demo" or name.endswith(".gguf") or Path(name).exists()
    if not is_local and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        front["base_model"] = name
    words = _words(results) | {"front_matter": yaml.safe_dump(front, sort_keys=False), "provenance": provenance}
    return _environment(autoescape=False).from_string(CARD).render(words, config=config) + "\n"


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
    if "cut" in results and not is_proven(results["cut"].get("proof")):
        found.append(proof_sentence(results["cut"].get("proof")))
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
    if not proof or proof["kind"] == "none":
        return False
    return proof["generation_equal"] and (proof["logits_equal"] or proof["max_difference"] <= proof["tolerance"])


def proof_sentence(proof: dict[str, Any] | None) -> str:
    """Return what was compared and how close it came."""
    if not proof or proof["kind"] == "none":
        return "The cut checkpoint was not verified (--no-verify)."
    differ = f"they differ by at most {proof['max_difference']:.3g} where {proof['tolerance']:.3g} is allowed"
    return (
        f"{'Proven' if is_proven(proof) else 'The proof FAILED'}: the saved cut checkpoint was loaded again"
        f" ({proof['kind']}, {proof['dtype']} on {proof['device']}) and its logits compared with those of the parent"
        f" with the segment bypassed: {'they are equal bit for bit' if proof['logits_equal'] else differ}."
        f" Greedy tokens with a cache are {'equal to' if proof['generation_equal'] else 'NOT'} those without."
        " A healed checkpoint is not part of the proof; it was loaded from disk to be measured."
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


def _environment(*, autoescape: bool) -> Environment:
    loader = PackageLoader("layerscalpel", ".")
    environment = Environment(loader=loader, autoescape=autoescape, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {item.__name__: item for item in (measured, plain, count)}
    environment.filters["unbroken"] = lambda text: text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")
    return environment


def _words(results: Results) -> dict[str, Any]:
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
    }


def _figures(results: Results) -> dict[str, str]:
    """Return every figure that the results allow, as SVG text."""
    search, segment = results.get("search", {}), results.get("segment", [])
    drawings = {
        "kl_curve": (search.get("scores"), lambda: plots.kl_curve(search, segment)),
        "gate_paths": (search.get("gate"), lambda: plots.gate_paths(search)),
        "similarity_map": (search.get("similarity"), lambda: plots.similarity_map(search, segment)),
        "loss_curve": (results.get("heal"), lambda: plots.loss_curve(results["heal"])),
        "quality_bars": (results.get("evaluate"), lambda: plots.quality_bars(results["evaluate"])),
        "speed_bars": (results.get("benchmark"), lambda: plots.speed_bars(results["benchmark"])),
    }
    return {name: draw() for name, (material, draw) in drawings.items() if material}
