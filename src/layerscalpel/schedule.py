"""How many steps a training takes, and the learning rate of each."""

from __future__ import annotations

import math

from layerscalpel.settings import HealSettings


def total_steps(settings: HealSettings, num_blocks: int) -> int:
    """Return the number of optimiser steps."""
    return settings.epochs * math.ceil(num_blocks / settings.batch_size)


def learning_rate(step: int, steps: int, settings: HealSettings) -> float:
    """Return the learning rate of a step, 0-based: linear warm-up, then a cosine down to 0."""
    warmup = round(steps * settings.warmup_fraction)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
