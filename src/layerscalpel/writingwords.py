"""What the models wrote, in rows and sentences: loops, silence, variety, and whether a child is worse than its parent.

writing_words(results)["writing_rows"]  # [{"model": "parent", "way": "greedy", "loop_fraction": {...}, ...}, ...]
"""

from __future__ import annotations

from math import comb
from typing import Any

from layerscalpel.summary import MODELS, Results, measured

Row = dict[str, Any]
WAYS = {"greedy": "greedily", "sampled": "by lot"}
MEASURES = {
    "loop_fraction": "loop",
    "empty_fraction": "empty",
    "cut_off_fraction": "no end",
    "distinct_1_fraction": "distinct 1-grams",
    "distinct_2_fraction": "distinct 2-grams",
    "distinct_3_fraction": "distinct 3-grams",
}
BY_CHANCE = 0.05
"""Probability below which more loops than the parent's are no chance."""


def writing_words(results: Results) -> dict[str, Any]:
    """Return what the templates read."""
    return {"writing_rows": writing_rows(results), "writing_measures": MEASURES, "writing_text": writing_text(results)}


def _models(results: Results) -> dict[str, Row]:
    evaluated = results.get("evaluate", {})
    return {name: evaluated[name] for name in MODELS if evaluated.get(name, {}).get("writing")}


def writing_rows(results: Results) -> list[Row]:
    """Return one row {model, way, *MEASURES} for each model and way; what was not measured is None."""
    return [
        {"model": name, "way": told} | {measure: found["writing"][way].get(measure) for measure in MEASURES}
        for name, found in _models(results).items()
        for way, told in WAYS.items()
    ]


def writing_text(results: Results) -> str:
    """Say how it was written, and how often the last model loops, beside the parent; nothing where nothing was."""
    models = _models(results)
    if not models:
        return ""
    name, last = list(models.items())[-1]
    how = last["writing"]
    parent = models.get("parent", {}).get("writing") if name != "parent" else None
    told = []
    for way, words in WAYS.items():
        beside = f" ({measured(parent[way]['loop_fraction'], 100)} % of the parent's)" if parent else ""
        told.append(f"{measured(how[way]['loop_fraction'], 100)} % of those written {words}{beside}")
    left = f" {how['left_out']} prompts leave no room in the context." if how.get("left_out") else ""
    return (
        f"Of the {name} model's continuations of {how['num_prompts']} prompts, at most {how['new_tokens']} tokens long,"
        f" {' and '.join(told)} end in a loop: three copies of one phrase in a row. By lot means temperature"
        f" {how['temperature']:g} and top-p {how['top_p']:g}.{left}"
    )


def writing_warnings(results: Results) -> list[str]:
    """Say that the last model loops, or says nothing, on more prompts than its parent, by more than chance explains."""
    models = _models(results)
    if "parent" not in models or len(models) < 2:
        return []
    name, last = list(models.items())[-1]
    found = []
    for way, words in WAYS.items():
        for broken, said in ((_loops, "end in a loop"), (_is_empty, "are empty")):
            own, parents = (
                {sample["prompt"]: broken(_text(sample, way)) for sample in model["samples"]}
                for model in (last, models["parent"])
            )
            if more_than_chance([(own[prompt], parents[prompt]) for prompt in own if prompt in parents]):
                counts = f"{sum(own.values())} of {len(own)} texts that it writes {words} {said}"
                found.append(
                    f"The {name} model writes worse than its parent: {counts}, against {sum(parents.values())}."
                )
    return found


def _text(sample: Row, way: str) -> Row:
    return sample if way == "greedy" else sample["sampled"]


def _loops(text: Row) -> bool:
    return text["loops"]


def _is_empty(text: Row) -> bool:
    return not text["text"].strip()


def more_than_chance(pairs: list[tuple[bool, bool]]) -> bool:
    """Tell whether the first of two models is broken more often: the exact sign test on prompts where one alone is."""
    more = sum(own and not other for own, other in pairs)
    differ = sum(own != other for own, other in pairs)
    return differ > 0 and sum(comb(differ, k) for k in range(more, differ + 1)) / 2**differ < BY_CHANCE
