"""The paper's differentiable concave gate: learn where the segment starts by gradient descent.

Every layer's contribution is scaled, x + m_i (f_i(x) - x), by a valley of width n whose only parameter is its start a:

    m_i(a) = 1 - sigmoid(k (i - a + 1/2)) sigmoid(k (a + n - 1/2 - i))

Adam lowers the KL to the uncut parent; then a is rounded. The 1/2 centres the valley: at a whole a the layers
a .. a + n - 1 are off and both neighbours on, where without it the two edges stand at one half (our departure, as are
learning rate and annealing, which the paper leaves open). The gradient in a vanishes about 1.5 layers from the edges,
so one start is a local search; many starts are therefore learned at once, as streams that share the parent's pass.
The minima lie near half-open edges (two layers half removed cost less than one removed whole), so both whole neighbours
of a learned start are worth scoring, not the rounded one alone.

Where a gate is 1 to float32's last bit a stream still equals the parent, so it is computed only from its valley on.

Source: arXiv:2510.23652; the many starts are this project's, docs/methods.md#gate.

Dimensions: S starts, B blocks, T tokens, D hidden size, L layers, N blocks.

    path = learn_starts(decoder, tokens, num_removed=6, initial=[0.0, 12.0, 24.0])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerscalpel.layers import Decoder, Step, device_of, head_logits, hidden_at, replay, require_finite
from layerscalpel.losses import kl_to_parent, log_probabilities, token_chunks
from layerscalpel.progress import track

OPEN = 1e-7
"""A gate closer to 1 than this changes no float32 hidden state."""


@dataclass(frozen=True)
class GatePath:
    """What the learning of the start indices left behind."""

    starts: list[list[float]]
    """[steps + 1][S] the start index a before the first and after each step."""
    losses: list[list[float]]
    """[steps][S] mean KL of the gated model in nats."""
    steepness: list[float]
    """[steps] k."""

    def ends(self, last_start: int) -> list[int]:
        """Return the rounded final start of each stream, kept within 0..last_start (the paper's choice)."""
        return [min(max(round(a), 0), last_start) for a in self.starts[-1]]

    def neighbours(self, last_start: int) -> list[tuple[int, int]]:
        """Return the whole starts on both sides of each stream's final start, kept within 0..last_start."""
        return [(max(0, math.floor(a)), min(math.ceil(a), last_start)) for a in self.starts[-1]]


def gate_values(start_S: Tensor, num_layers: int, num_removed: int, steepness: float) -> Tensor:
    """Return the gates [S, L], in 0..1, of valleys that start at `start_S`."""
    layer_L = torch.arange(num_layers, dtype=start_S.dtype, device=start_S.device)
    rise = torch.sigmoid(steepness * (layer_L - start_S[:, None] + 0.5))
    fall = torch.sigmoid(steepness * (start_S[:, None] + num_removed - 0.5 - layer_L))
    return 1 - rise * fall


def spread_starts(num_starts: int, last_start: int, initial: float | None = None) -> list[float]:
    """Return evenly spaced starts over 0..last_start, or the given single one (None: the middle)."""
    if num_starts == 1:
        return [last_start / 2 if initial is None else min(initial, float(last_start))]
    return [last_start * i / (num_starts - 1) for i in range(num_starts)]


def learn_starts(
    decoder: Decoder,
    tokens: Tensor,
    *,
    num_removed: int,
    initial: Sequence[float],
    steepness: tuple[float, float] = (1.0, 5.0),
    lr: float = 0.3,
) -> GatePath:
    """Learn start indices, one Adam step per block, one pass over the blocks; the learning rate falls linearly to 0.

    Args:
        decoder: the parent; its weights are neither changed nor given gradients.
        tokens: [N, T] token ids.
        num_removed: n.
        initial: the S starts, 0 .. L - n.
        steepness: k at the first and the last step, geometric between; equal values switch annealing off.
        lr: Adam's learning rate at the first step, in layers.
    """
    start_S = torch.tensor(list(initial), dtype=torch.float64, device=_float64_device(decoder), requires_grad=True)
    adam = torch.optim.Adam([start_S], lr=lr)
    first, last = steepness
    path = GatePath([start_S.tolist()], [], [])
    frozen = [parameter for parameter in decoder.model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for done, block in enumerate(track(tokens, f"gate n={num_removed}", len(tokens))):
            k = first * (last / first) ** (done / max(1, len(tokens) - 1))
            adam.param_groups[0]["lr"] = lr * (1 - done / len(tokens))
            adam.zero_grad()
            losses = _backward(decoder, block[None].to(device_of(decoder.model)), start_S, num_removed, k)
            adam.step()
            with torch.no_grad():
                start_S.clamp_(0, len(decoder) - num_removed)
            path.losses.append(losses)
            path.steepness.append(k)
            path.starts.append(start_S.tolist())
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return path


def _float64_device(decoder: Decoder) -> torch.device:
    device = device_of(decoder.model)
    return torch.device("cpu") if device.type == "mps" else device  # mps has no float64


def _backward(decoder: Decoder, tokens_BT: Tensor, start_S: Tensor, num_removed: int, steepness: float) -> list[float]:
    """Add the gradient of every stream's mean KL to `start_S.grad`; return the KL of each."""
    gate_SL = gate_values(start_S, len(decoder), num_removed, steepness)
    streams = _GatedStreams(gate_SL)
    with torch.no_grad(), replay(decoder, streams.visit):
        parent_hidden = hidden_at(decoder, tokens_BT, len(decoder))
    require_finite(len(decoder), parent_hidden)
    hidden_SBTD = streams.hidden_SBTD.detach().requires_grad_()
    sums = torch.zeros(len(gate_SL), device=tokens_BT.device)
    batch, length = tokens_BT.shape
    for part in token_chunks(batch, length, decoder.vocab_size, tokens_BT.device):
        with torch.no_grad():
            parent = log_probabilities(head_logits(decoder, parent_hidden[:, part]))
        for row in range(len(gate_SL)):
            kl = kl_to_parent(parent, log_probabilities(head_logits(decoder, hidden_SBTD[row, :, part]))).sum()
            kl.div(tokens_BT.numel()).backward()  # frees the chunk's logits at once
            sums[row] += kl.detach()
    streams.hidden_SBTD.backward(hidden_SBTD.grad)
    in_order = (sums / tokens_BT.numel()).tolist()
    return [in_order[streams.order.index(row)] for row in range(len(in_order))]


class _GatedStreams:
    """Streams of gated models while the parent passes by, in the order in which their valleys begin."""

    def __init__(self, gate_SL: Tensor) -> None:
        closing = (1 - gate_SL.detach() > OPEN).cpu()
        begins = [int(row.nonzero()[0]) if row.any() else gate_SL.shape[1] - 1 for row in closing]
        self.order = sorted(range(len(begins)), key=lambda row: begins[row])
        self.begins = sorted(begins)
        self.gate_SL = gate_SL[self.order]
        self.hidden_SBTD = torch.empty(0)

    def visit(self, i: int, hidden_BTD: Tensor, step: Step) -> None:
        require_finite(i, hidden_BTD)
        entering = self.begins.count(i)
        if entering:
            fresh = hidden_BTD.expand(entering, *hidden_BTD.shape)
            with torch.enable_grad():  # the streams that are under way keep their graph
                self.hidden_SBTD = torch.cat([self.hidden_SBTD, fresh]) if self.hidden_SBTD.numel() else fresh.clone()
        live = sum(begin <= i for begin in self.begins)
        if not live:
            return
        with torch.enable_grad():
            before = self.hidden_SBTD
            after = step(before.flatten(0, 1)).unflatten(0, (live, -1))
            gate = self.gate_SL[:live, i].to(before)[:, None, None, None]
            self.hidden_SBTD = before + gate * (after - before)
