"""Gradients of a batch that several processes share.

Each process has gone through its share of the blocks, with the denominators of the whole batch, so the sum over the
processes of their gradients is the gradient of the batch. DistributedDataParallel computes the same: the mean of the
processes' gradients of their own means. DDP hooks into a module's forward, which our partial forwards do not go
through, so the sum is taken here, in float32. Weights that are spread (spread.py) have theirs summed by FSDP already.

    add_up(masters, parameters, team)
    norm = clipped(masters, parameters, 1.0, team)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerscalpel.parallel import Team


def add_up(masters: Sequence[Tensor], parameters: Sequence[nn.Parameter], team: Team) -> None:
    """Replace the gradients of the masters by their sums over the processes; those of spread weights are that already.

    A weight that got a gradient on some processes alone, as an expert to which their tokens were not routed, counts as
    0 on the others; one that got none anywhere keeps none, as in one process.
    """
    own = [m for m, p in zip(masters, parameters, strict=True) if not isinstance(p, DTensor)]
    if team.size == 1 or not own:
        return
    reached = torch.tensor([float(master.grad is not None) for master in own], device=own[0].device)
    team.add_up([reached])
    for master, count in zip(own, reached.tolist(), strict=True):
        if count and master.grad is None:
            master.grad = torch.zeros_like(master)
    team.add_up(master.grad for master in own if master.grad is not None)


def clipped(masters: Sequence[Tensor], parameters: Sequence[nn.Parameter], most: float, team: Team) -> Tensor:
    """Scale the gradients down to a norm of `most`, where it is larger; return what it was."""
    pairs = list(zip(masters, parameters, strict=True))
    own, parts = (
        [m.grad for m, p in pairs if isinstance(p, DTensor) == spread and m.grad is not None]
        for spread in (False, True)
    )
    norm = torch.nn.utils.get_total_norm(own)
    if parts:
        square = torch.nn.utils.get_total_norm(parts).square()
        team.add_up([square])
        norm = (norm.to(square).square() + square).sqrt()
    torch.nn.utils.clip_grads_with_norm_(masters, most, norm)
    return norm
