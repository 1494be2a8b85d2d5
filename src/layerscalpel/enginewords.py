"""What an engine made of a checkpoint, in sentences for a terminal.

for line in check_lines("vllm", found):
    print(line)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def check_lines(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the sentences of one check."""
    return [
        f"{name} {found['version']} ({', '.join(_how(found))}), text {found['text']}{_length(found)}",
        *_quality(found),
        *_tokenizer(found),
        *_speed(found),
    ]


def export_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the sentences of an exported file."""
    tensors = ", ".join(f"{count} {kind}" for kind, count in found["tensors"].items())
    lines = [
        f"{found['file']}: {found['bytes'] / 1e6:,.1f} MB, type {found['type']} ({tensors});"
        f" the checkpoint's folder has {found['source_bytes'] / 1e6:,.1f} MB"
    ]
    if found["verified"] is None:
        return [*lines, f"written, NOT verified: {found['not_verified']}"]
    return [*lines, *check_lines("verified by llama.cpp", found["verified"])]


def _how(found: Mapping[str, Any]) -> list[str]:
    return [str(found[key]) for key in ("dtype", "device") if key in found]


def _length(found: Mapping[str, Any]) -> str:
    """Return how long the texts were; earlier results do not say."""
    timed = found.get("timed")
    if timed is None:
        return ""
    return (
        f" in blocks of {found['block_tokens']} tokens; timed: {timed['prompt_tokens']} tokens read,"
        f" {timed['new_tokens']} written"
    )


def _quality(found: Mapping[str, Any]) -> Iterator[str]:
    ratio, same = found["ppl_ratio"], found["top1_agreement_fraction"]
    yield (
        f"perplexity {found['ppl']['value']:.3f}, in transformers (float32) {found['reference_ppl']['value']:.3f}:"
        f" ratio {ratio['value']:.4f} ± {ratio['se'] or 0:.4f} over {ratio['n']:,} tokens;"
        f" the likeliest token is the same in {100 * same['value']:.1f} %"
    )
    equal = found["equal_fraction"]
    yield (
        f"greedy continuations have {found['common_tokens']['value']:.1f} of {found['continued_tokens']} tokens in"
        f" common, {100 * equal['value']:.0f} % of {equal['n']} are the same to their end"
    )


def _tokenizer(found: Mapping[str, Any]) -> Iterator[str]:
    if cut := found.get("tokenizer"):
        yield f"its tokenizer cuts {cut['alike']} of {cut['texts']} texts as the checkpoint's does"


def _speed(found: Mapping[str, Any]) -> Iterator[str]:
    if "decode_tokens_per_s" in found:
        decode, prefill = found["decode_tokens_per_s"], found["prefill_s"]
        yield (
            f"speed: {decode['value']:.1f} ± {decode['se'] or 0:.1f} tokens/s, first token after"
            f" {prefill['value']:.3f} ± {prefill['se'] or 0:.3f} s"
        )
