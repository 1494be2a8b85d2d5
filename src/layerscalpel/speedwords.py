"""When two speeds can be told apart, what is said where they cannot, and a benchmark in lines and rows.

said(speedup["decode"], "1.22 ± 0.03x")   # the text itself, or "no difference can be told: ..."
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from layerscalpel.student import two_errors

KINDS = ("prefill", "decode")


def tells(ratio: Mapping[str, Any]) -> bool:
    """Whether a measured ratio lies further from 1 than its spread reaches; that of a single round is not known."""
    error = ratio.get("se")
    return error is not None and abs(ratio["value"] - 1) > _errors(ratio) * error


def _errors(ratio: Mapping[str, Any]) -> float:
    """Return how many standard errors are its spread: Student's t over the rounds, of each run where seeds are one."""
    return two_errors(ratio["n"] // ratio.get("num_seeds", 1) - 1)


def no_difference(ratio: Mapping[str, Any]) -> str:
    """Say why a ratio is not printed."""
    if ratio.get("se") is None:
        return "no difference can be told: one round has no spread"
    errors, effect = _errors(ratio), abs(ratio["value"] - 1)
    return (
        f"no difference can be told: over {ratio['n']} rounds the ratio spreads by {errors * ratio['se']:.2g}"
        f" ({errors:.2g} standard errors) and is {effect:.2g} away from 1"
    )


def said(ratio: Mapping[str, Any], text: str) -> str:
    """Return the text of a ratio, or the sentence that stands in its place."""
    return text if tells(ratio) else no_difference(ratio)


def speed_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what a benchmark found beside its first figures, one line each."""
    lines = [f"{_job(row)}: {_figures(row)}" for row in other_timings(found)]
    lines += [_size(name, item, found) for name, item in models_in(found) if "peak_memory_bytes" in item]
    if "counted" in found:
        lines.append(f"peak: {found['counted']['peak_memory_bytes']}")
    lines += [f"{name} was not timed: {why}" for name, why in found.get("not_timed", {}).items()]
    return lines + list(_latency(found.get("latency"))) + list(_engines(found.get("engines", {})))


def models_in(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, figures) of the models of a benchmark or of one of its timings."""
    return [(name, item) for name, item in row.items() if isinstance(item, dict) and "prefill_s" in item]


def other_timings(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the timings that are not those of the first place."""
    names = ("mode", "batch_size", "prompt_tokens", "new_tokens")
    return [row for row in found.get("timings", []) if any(row[name] != found[name] for name in names)]


def timing_rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield {job, model, prefill, first, decode, gain} in words of every model of every other timing."""
    for row in other_timings(found):
        for name, item in models_in(row):
            gain = row.get("speedup", {}) if row.get("speedup", {}).get("of") == name else {}
            yield {
                "job": _job(row),
                "model": name,
                "prefill": _plain(item["prefill_s"]),
                "first": _plain(item["first_token_s"]),
                "decode": _plain(item["decode_tokens_per_s"]),
                "gain": "; ".join(f"{kind} {said(gain[kind], _times(gain[kind]))}" for kind in KINDS if kind in gain),
            }


def size_rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield {model, parameters, disk, peak, flops} in words of every model."""
    for name, item in models_in(found):
        if "peak_memory_bytes" in item:
            yield {
                "model": name,
                "parameters": f"{item['parameters'] / 1e6:,.1f} M",
                "disk": f"{item['disk_bytes'] / 1e6:,.1f} MB" if "disk_bytes" in item else "–",
                "peak": f"{(item['peak_memory_bytes'] or 0) / 2**30:.2f} GiB",
                "flops": f"{item['flops_per_token'] / 1e9:.3g}",
            }


def _job(row: Mapping[str, Any]) -> str:
    return f"batch {row['batch_size']}, prompt {row['prompt_tokens']}, {row['mode']}"


def _figures(row: Mapping[str, Any]) -> str:
    if "speedup" in row:
        ratios = ((kind, row["speedup"][kind]) for kind in KINDS)
        return "speed-up " + ", ".join(f"{kind} {said(ratio, f'{_times(ratio)}x')}" for kind, ratio in ratios)
    _, item = models_in(row)[0]
    return f"prefill {_plain(item['prefill_s'])} s, decode {_plain(item['decode_tokens_per_s'])} tokens/s"


def _size(name: str, item: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    row = next(row for row in size_rows(found) if row["model"] == name)
    first = f"first token after {_plain(item['first_token_s'])} s, " if "first_token_s" in item else ""
    return (
        f"{name}: {first}peak {row['peak']}, {row['disk']} on disk, {row['parameters']} parameters,"
        f" {row['flops']} GFLOP a token"
    )


def _latency(fit: Mapping[str, Any] | None) -> Iterator[str]:
    if fit and "refused" not in fit:
        off, error = (100 * fit["check"]["error_fraction"][part] for part in ("value", "se"))
        yield (
            f"a token takes {_plain(fit['fixed_ms'])} ms and {_plain(fit['layer_ms'])} ms a layer; at"
            f" {fit['check']['num_layers']} layers, which were not fitted, that is {abs(off):.1f} ± {error:.1f} %"
            f" {'below' if off < 0 else 'above'} what was measured"
        )


def _engines(found: Mapping[str, Any]) -> Iterator[str]:
    for engine, row in found.items():
        if "missing" in row:
            yield row["missing"]
            continue
        lacking = ((name, item) for name, item in row.items() if isinstance(item, dict) and "missing" in item)
        yield from (f"{name} in {engine}: {item['missing']}" for name, item in lacking)
        for name, item in models_in(row):
            yield (
                f"{name} in {engine}: prefill {_plain(item['prefill_s'])} s,"
                f" decode {_plain(item['decode_tokens_per_s'])} tokens/s"
            )
        if "speedup" in row:
            ratios = ((kind, row["speedup"][kind]) for kind in KINDS)
            gains = ", ".join(f"{kind} {said(ratio, f'{_times(ratio)}x')}" for kind, ratio in ratios)
            yield f"speed-up in {engine}: {gains}"


def _times(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['value']:.2f} ± {ratio['se'] or 0:.2f}"


def _plain(item: Mapping[str, Any]) -> str:
    """Return a value with its error, three digits of the value."""
    error = "unknown" if item["se"] is None else f"{item['se']:.2g}"
    return f"{item['value']:.3g} ± {error}"
