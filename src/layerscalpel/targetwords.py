"""What a target asked for, what it led to, and how well that is kept, in sentences.

target_text(results)  # "At most 0.5 nats of KL to the parent were asked for: 5 layers is the most ..."
"""

from __future__ import annotations

from typing import Any

from layerscalpel.summary import Results, count, measured

FIT_FRACTION = 0.05
"""A fit of the latency that is further off is warned of, where the check does not state its own tolerance."""


def target_text(results: Results) -> str:
    """Say what was asked for, what n it led to, and how well that keeps to it."""
    return TARGETS[results["search"]["target"]["kind"]](results)


def _kl_target(results: Results) -> str:
    found = results["search"]["target"]
    n, asked = found["num_removed"], found["asked_kl_nats"]
    said = (
        f"At most {asked:g} nats of KL to the parent were asked for: {layers(n)} is the most whose best window stays"
        f" within that, at {measured(found['kl_nats'])} nats on the text of the search. Runs of"
        f" up to {layers(found['most_layers_tried'])} were tried."
    )
    held_out = results.get("evaluate", {}).get("cut", {}).get("kl_nats")
    return f"{said} On held-out text the cut model costs {measured(held_out)} nats." if held_out else said


def _parameter_target(results: Results) -> str:
    found, search = results["search"]["target"], results["search"]
    n, places, windows = found["num_removed"], len(found["starts"]), len(search["scores"])
    where = f", at {places} of {windows} places" if 0 < places < windows else ""
    left = results.get("cut", {}).get("parameters")
    ends = f" {count(left)} are left." if left else ""
    return (
        f"At most {count(found['asked_parameters'])} parameters were asked for: {layers(n)} is the least that leaves so"
        f" few{where}.{ends}"
    )


def _latency_target(results: Results) -> str:
    found = results["search"]["target"]
    fit, check, timed = found["latency"], found["latency"]["check"], step_ms(results)
    threads = layers(fit["threads"], "thread")
    predicted, seen = measured(check["predicted_ms"]), measured(check["measured_ms"])
    return (
        f"At most {found['asked_ms']:g} ms a generated token were asked for: {layers(found['num_removed'])} is the"
        f" least whose prediction, {measured(found['predicted_ms'])} ms, keeps to that. Fitted on {fit['device']},"
        f" {threads}, in {fit['dtype']} (batch of {fit['batch_size']}, {fit['prompt_tokens']} prompt"
        f" tokens, {fit['new_tokens']} new ones): {measured(fit['fixed_ms'])} ms and {measured(fit['layer_ms'])} ms a"
        f" layer. Check at a depth that was not fitted, {check['num_layers']} layers: {predicted} ms predicted,"
        f" {seen} ms measured, the prediction {_off(check)}."
        + (f" The result itself took {measured(timed)} ms in the benchmark." if timed else "")
    )


def _off(check: dict[str, Any]) -> str:
    found = check["error_fraction"]
    return f"{measured(found | {'value': abs(found['value'])}, 100)} % {'below' if found['value'] < 0 else 'above'}"


TARGETS = {"max_kl": _kl_target, "params": _parameter_target, "latency_ms": _latency_target}


def layers(n: int, noun: str = "layer") -> str:
    """Return `1 layer`, `2 layers`."""
    return f"{n} {noun}{'s' * (n > 1)}"


def step_ms(results: Results) -> dict[str, Any] | None:
    """Return the measured milliseconds of a decoding step of the final model, if it was timed."""
    timed = results.get("benchmark", {})
    final = next((name for name in ("healed", "stitched", "cut") if name in timed), None)
    if final is None:
        return None
    speed = timed[final]["decode_tokens_per_s"]
    value = 1000 * timed["batch_size"] / speed["value"]
    error = None if speed["se"] is None else value * speed["se"] / speed["value"]
    return {"value": value, "se": error, "n": speed["n"]}


def target_warnings(results: Results) -> list[str]:
    """Return what speaks against the target, one sentence each."""
    found, warnings = results["search"]["target"], []
    if found["kind"] == "max_kl":
        if found["most_layers_tried"] == found["num_removed"]:
            warnings.append(
                f"{layers(found['num_removed'])} is the most that was tried: more might stay within"
                f" {found['asked_kl_nats']:g} nats."
            )
        held_out = results.get("evaluate", {}).get("cut", {}).get("kl_nats")
        if held_out and held_out["value"] > found["asked_kl_nats"]:
            warnings.append(
                f"The target of {found['asked_kl_nats']:g} nats is not met on held-out text: the cut model costs"
                f" {measured(held_out)} nats."
            )
    elif found["kind"] == "latency_ms":
        timed, check = step_ms(results), found["latency"]["check"]
        if timed and timed["value"] > found["asked_ms"]:
            warnings.append(
                f"The target of {found['asked_ms']:g} ms is not met in the benchmark: the result took {measured(timed)}"
                " ms a token."
            )
        if abs(check["error_fraction"]["value"]) > check.get("tolerance_fraction", FIT_FRACTION):
            warnings.append(f"At a depth that was not fitted the predicted latency is {_off(check)} the measured one.")
    return warnings
