"""What healing did, in sentences and rows: its phases, the terms of its loss, what it computed once, and its verdict.

healing_words(results)["healing"]  # ["Layers 12, 13 of the cut model were trained (`endpoint`) ..."]
"""

from __future__ import annotations

from typing import Any

from layerscalpel.summary import Results, count, measured, plain, ranges, size

Heal = dict[str, Any]
TERMS = {
    "ce": ("cross-entropy", "ce_nats", " nats"),
    "kl": ("KL to the parent", "kl_nats", " nats"),
    "seam": ("hidden-state error after the seam", "seam_error", ""),
    "end": ("hidden-state error after the last layer", "end_error", ""),
}
"""{term of the loss: (its name, its key in a row of the held-out losses, its unit)}."""
OLD_OBJECTIVES = {"ce": ("ce",), "kl": ("kl",), "both": ("ce", "kl")}
"""{objective: its terms} of runs that do not tell their weights."""
DOCUMENTS = {
    "apart": "kept apart in attention",
    "joined": "could attend to those before them",
}


def phases_of(heal: Heal) -> list[Heal]:
    """Return the phases of a healing in order."""
    return [heal, *([heal["second"]] if heal.get("second") else [])]


def total_loss(row: dict[str, float]) -> float:
    """Return the loss in a row of train or validation; it is not in nats where errors of hidden states are in it."""
    return row["loss"] if "loss" in row else row["loss_nats"]


def weights_in(phase: Heal) -> dict[str, float]:
    """Return {term: its weight}."""
    return phase.get("weights") or dict.fromkeys(OLD_OBJECTIVES[phase["objective"]], 1.0)


def objective_words(phase: Heal) -> str:
    """Return the terms of the loss with their weights, as `cross-entropy + 0.5 x KL to the parent`."""
    return " + ".join(
        TERMS[name][0] if weight == 1 else f"{plain(weight)} x {TERMS[name][0]}"
        for name, weight in weights_in(phase).items()
    )


def loss_unit(phase: Heal) -> str:
    """Return the unit of the loss."""
    errors = {"seam", "end"} & set(weights_in(phase))
    if not errors:
        return "nats per labelled token"
    return "relative squared error" if errors == set(weights_in(phase)) else "nats, and relative squared errors"


def healing_words(results: Results) -> dict[str, Any]:
    """Return what the templates read; empty where nothing was healed."""
    heal = results.get("heal")
    if not heal:
        return {"healing": [], "heal_verdict": "", "heal_terms": [], "heal_facts": [], "healed_layers": []}
    return {
        "healing": [_phase_text(phase) for phase in phases_of(heal)],
        "heal_verdict": _verdict(heal),
        "heal_terms": _terms(heal),
        "heal_facts": _facts(heal),
        "healed_layers": [] if heal.get("failed") else sorted({i for p in phases_of(heal) for i in p["layers"]}),
    }


def _phase_text(phase: Heal) -> str:
    layers = f"layer{'s' * (len(phase['layers']) > 1)} {ranges(phase['layers'])}"
    trained = f"{count(phase['trained_parameters'])} parameters in {layers} of the cut model"
    if phase.get("expand"):
        trained += f" (linear layers as products of {phase['expand']} times their rank, counted as such)"
    rate = f", with a learning rate of {plain(phase['lr'])}" if "lr" in phase else ""
    return (
        f"{trained} were trained (`{phase['method']}`, objective `{phase['objective']}`: {objective_words(phase)}) for"
        f" {count(phase['steps'])} steps on {count(phase['tokens'])} tokens{rate};"
        f" step {count(phase['best_step'])} was kept for its held-out loss."
    )


def _verdict(heal: Heal) -> str:
    if "kl_nats" not in heal:
        return ""
    found = heal["kl_nats"]
    if heal.get("failed"):
        return "These weights are not kept: without them the model is nearer to its parent."
    change = f"{measured(found['before'])} to {measured(found['after'])} nats per token on {found['text']} text"
    if not any(phase["best_step"] for phase in phases_of(heal)):
        return f"The KL to the parent stays {measured(found['before'])} nats per token on {found['text']} text."
    return f"Healing took the KL to the parent from {change}."


def _terms(heal: Heal) -> list[dict[str, Any]]:
    """Return one row {phase, name, weight, before, kept} a term, of phases whose loss has several."""
    rows = []
    for number, phase in enumerate(phases_of(heal), start=1):
        losses = {row["step"]: row for row in phase["validation"]}
        first, kept = phase["validation"][0], losses[phase["best_step"]]
        for term, weight in weights_in(phase).items():
            name, key, unit = TERMS[term]
            if key in first:
                figures = {"before": f"{first[key]:.4g}{unit}", "kept": f"{kept[key]:.4g}{unit}"}
                rows.append({"phase": number, "name": name, "weight": plain(weight)} | figures)
    return rows


def _facts(heal: Heal) -> list[tuple[str, Any]]:
    """Return (label, value) of what both phases share; None is left out."""
    phases, told = phases_of(heal), "cached_fraction" in heal
    halved = sum(phase.get("micro_batch_halvings", 0) for phase in phases)
    least = min((phase.get("micro_batch_size", 0) for phase in phases), default=0)
    labelled = sum(phase["labelled_tokens"] for phase in phases) if "labelled_tokens" in heal else None
    cached = [f"{size(p['cache_bytes'])} ({100 * p['cached_fraction']:.0f} % of the blocks)" for p in phases if told]
    return [
        ("trained parameters", " then ".join(count(phase["trained_parameters"]) for phase in phases)),
        ("steps", " + ".join(count(phase["steps"]) for phase in phases)),
        ("tokens in blocks, all epochs", count(sum(phase["tokens"] for phase in phases))),
        ("of these targets of the loss", None if labelled is None else count(labelled)),
        ("computed once and kept", " then ".join(dict.fromkeys(cached)) if told else None),
        ("number format kept", heal["cache_dtype"] if told and heal["cache_bytes"] else None),
        ("documents packed into one block", DOCUMENTS.get(heal.get("documents", ""))),
        ("blocks at once", f"{least}, halved {halved} times: memory ran out" if halved else None),
        ("processes", heal.get("processes")),
        ("time (s)", plain(heal["wall_s"]) if "wall_s" in heal else None),
        ("peak memory (MB)", count(heal["peak_memory_bytes"], 1e6) if "peak_memory_bytes" in heal else None),
    ]


def heal_warnings(results: Results) -> list[str]:
    """Return what speaks against the healing, one sentence each."""
    heal, found = results.get("heal"), []
    if not heal:
        return found
    if heal.get("failed"):
        found.append(failure_text(heal))
    kl = heal.get("kl_nats", {})
    if "cut" in kl and not heal.get("failed") and kl["after"]["value"] > kl["before"]["value"]:
        found.append(
            f"Healing gave back some of what the stitch had gained: the KL to the parent went from"
            f" {measured(kl['before'])} to {measured(kl['after'])} nats per token on {kl['text']} text."
        )
    kept = [phase["best_step"] for phase in phases_of(heal)]
    if not any(kept):
        found.append("No step of healing lowered the held-out loss: the healed model is the one it began with.")
    elif not all(kept):
        idle = "first" if not kept[0] else "second"
        found.append(f"No step of the {idle} phase of healing lowered the held-out loss.")
    return found


def failure_text(heal: Heal) -> str:
    """Say that healing ended farther from the parent than the cut model is."""
    found = heal["kl_nats"]
    unhealed, after = measured(found.get("cut", found["before"])), measured(found["after"])
    return (
        f"Healing failed: it took the KL to the parent from {unhealed} to {after}"
        f" nats per token on {found['text']} text, so the healed model has the weights that healing began with."
    )


def heal_line(results: Results) -> str:
    """Return one line for a terminal: the methods, and what they did to the KL."""
    heal = results["heal"]
    methods = ", then ".join(f"{phase['method']} ({phase['objective']})" for phase in phases_of(heal))
    if heal.get("failed"):
        return f"healed by {methods}. {failure_text(heal)}"
    if "kl_nats" not in heal:
        return f"healed by {methods}"
    kl = heal["kl_nats"]
    passed = " to ".join(measured(kl[when]) for when in ("cut", "before", "after") if when in kl)
    return f"healed by {methods}: KL {passed} nats on {heal['kl_nats']['text']} text"
