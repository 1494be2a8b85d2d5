"""The part of benchmarks/scale.py on a random model of LLaMA's shape in memory."""

from __future__ import annotations

import argparse
import functools

from measuring import (
    Row,
    Rows,
    UnitCosts,
    all_windows,
    median_s,
    peak_bytes,
    plain_forward,
    reset_peak,
    seconds,
)
from shapes import Sizes, random_model, random_tokens
from torch import Tensor

from layerscalpel.decoder import choose_device
from layerscalpel.exact import score
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import LOGITS_BYTES
from layerscalpel.probe import find_layers
from layerscalpel.streams import window


def seven(rows: Rows, given: argparse.Namespace, sizes: Sizes) -> None:
    """Score all windows of a model in memory: seconds over the full count, memory at two vocabularies, all rates."""
    device = choose_device(given.device)

    @functools.lru_cache(maxsize=1)
    def built(vocab: int) -> Decoder:
        return find_layers(random_model(sizes.seven.config(vocab=vocab), device))

    def measured(vocab: int, lengths: tuple[int, ...], repeats: int) -> Row:
        decoder, tokens = built(vocab), random_tokens(sizes.tokens, vocab)
        return in_memory(decoder, tokens, all_windows(len(decoder), lengths), repeats)

    for vocab, lengths, repeats in (
        (sizes.vocabs[0], (sizes.removed,), 3),
        (sizes.vocabs[0], sizes.lengths, 1),
        (sizes.vocabs[1], (sizes.removed,), 3),
    ):
        key = {"part": "seven", "vocab": vocab, "lengths": list(lengths), "tokens": list(sizes.tokens)}
        rows.measure(functools.partial(measured, vocab, lengths, repeats), **key)


def in_memory(decoder: Decoder, tokens: Tensor, windows: list[tuple[int, int]], repeats: int) -> Row:
    """Time the exact search against plain forwards of the same batch."""
    removals = [window(*of_window) for of_window in windows]
    costs, depth, device = UnitCosts.of(decoder, tokens), len(decoder), device_of(decoder.model)
    work = functools.partial(score, decoder, tokens, removals, batch_size=len(tokens))
    forward_s = median_s(lambda: plain_forward(decoder, tokens))
    reset_peak()
    wall_s = median_s(work, repeats) if repeats > 1 else seconds(work)[1]
    count = costs.full_count(depth, windows)
    weights = sum(parameter.nbytes for parameter in decoder.model.parameters())
    return {
        "num_windows": len(windows),
        "repeats": repeats,
        "wall_s": wall_s,
        "forward_s": forward_s,
        "forward_flops_per_s": costs.forward(depth) / forward_s,
        "full_count_forwards": count / costs.forward(depth),
        "wall_over_full_count": wall_s / forward_s * costs.forward(depth) / count,
        "peak_bytes": peak_bytes(),
        "weight_bytes": weights,
        "chunk_bytes": LOGITS_BYTES[device.type],
    }
