"""Where in the text, and on which text, a model departs from its parent: rows and sentences.

distance_words(results)["distance_text"]  # "The healed model's KL to the parent is 0.61 ± 0.03 nats at positions ..."
"""

from __future__ import annotations

from typing import Any

from layerscalpel.longwords import positions
from layerscalpel.summary import MEASURES, MODELS, Results, measured

Row = dict[str, Any]


def distance_words(results: Results) -> dict[str, Any]:
    """Return what the templates read."""
    return {"distance_text": distance_text(results), "domain_rows": domain_rows(results)}


def by_position(results: Results) -> dict[str, list[Row]]:
    """Return {model: rows} of the models whose KL was measured in two bins of positions or more, in order."""
    evaluated = results.get("evaluate", {})
    rows = {name: evaluated.get(name, {}).get("kl_by_position") or [] for name in MODELS}
    return {name: bins for name, bins in rows.items() if len(bins) > 1}


def distance_text(results: Results) -> str:
    """Say how the last model's KL differs between the beginning of a text and the rest of a block."""
    found = by_position(results)
    if not found:
        return ""
    name, bins = list(found.items())[-1]
    near, far = bins[0], bins[-1]
    return (
        f"The {name} model's KL to the parent is {measured(near['kl_nats'])} nats per token at positions"
        f" {positions(near)} of a block and {measured(far['kl_nats'])} at {positions(far)}."
    )


def domain_rows(results: Results) -> list[Row]:
    """Return one row {domain, num_blocks, model} and MEASURES for each domain and model; none for text of one kind."""
    evaluated, rows = results.get("evaluate", {}), []
    models = {name: found for name in MODELS if (found := evaluated.get(name, {}).get("by_domain"))}
    for domain in next(iter(models.values()), {}):
        for name, found in models.items():
            measures = {measure: found[domain].get(measure) for measure in MEASURES}
            rows.append({"domain": domain, "model": name, "num_blocks": found[domain]["num_blocks"], **measures})
    return rows
