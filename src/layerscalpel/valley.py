"""One pass of gated models: the KL of each to the parent, and its gradient in the start of each valley.

The streams of all starts are advanced beside the parent, stacked in the batch. Where a gate is 1 to float32's last bit
a stream still equals the parent, so it is computed only from its valley on. Then all go through the model's own head,
as many at once as the room for logits takes, and back.

Source: arXiv:2510.23652; the stacked streams are this project's, docs/methods.md#gate.

Dimensions: S starts, R of them at once, B blocks, T tokens, D hidden size, L layers, V vocabulary.

    start_S = torch.tensor([0.0, 12.0], dtype=torch.float64, requires_grad=True)
    kl_nats = backward_kl(decoder, tokens_BT, start_S, num_removed=6, steepness=5.0)
    start_S.grad  # nats per layer
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layerscalpel.errors import UserError
from layerscalpel.hooks import FiniteWatch, Step, head_logits, hidden_at, replay
from layerscalpel.layers import Decoder
from layerscalpel.losses import kl_to_parent, log_probabilities, token_chunks

OPEN = 1e-7
"""A gate closer to 1 than this changes no float32 hidden state."""


def gate_values(start_S: Tensor, num_layers: int, num_removed: int, steepness: float) -> Tensor:
    """Return the gates [S, L], in 0..1, of valleys that start at `start_S`."""
    layer_L = torch.arange(num_layers, dtype=start_S.dtype, device=start_S.device)
    rise = torch.sigmoid(steepness * (layer_L - start_S[:, None] + 0.5))
    fall = torch.sigmoid(steepness * (start_S[:, None] + num_removed - 0.5 - layer_L))
    return 1 - rise * fall


def backward_kl(
    decoder: Decoder,
    tokens_BT: Tensor,
    start_S: Tensor,
    num_removed: int,
    steepness: float,
    checkpointing: bool = False,
) -> list[float]:
    """Add the gradient of every gated model's mean KL to that of `start_S`; return the KL of each, in nats.

    Args:
        decoder: the parent; its weights ask for no gradients.
        tokens_BT: token ids, on the model's device.
        start_S: float64, on the CPU: for so few numbers a GPU costs launches only, and not every device has float64.
        num_removed: n.
        steepness: k.
        checkpointing: keep only what enters each layer and compute the rest again in the backward pass.

    Raises:
        UserError: the output of a layer or of a gated model, or its gradient, is not finite.
    """
    gate_SL = gate_values(start_S, len(decoder), num_removed, steepness)
    streams = _GatedStreams(gate_SL, tokens_BT.device, checkpointing)
    with torch.no_grad(), replay(decoder, streams.visit):
        parent_BTD = hidden_at(decoder, tokens_BT, len(decoder))
    streams.finite.look(parent_BTD)
    sums_S, gradient_SBTD = _head_gradient(decoder, parent_BTD, streams.hidden_SBTD.detach())
    streams.hidden_SBTD.backward(gradient_SBTD)
    assert streams.gate_SL.grad is not None
    # Asked here and not layer by layer: each answer waits until the device has done all that was asked before.
    streams.finite.require()
    kl_S, gradient_SL = (item.cpu().double() / tokens_BT.numel() for item in (sums_S, streams.gate_SL.grad))
    back = torch.tensor(streams.order).argsort()
    kl_S, gradient_SL = kl_S[back], gradient_SL[back]
    void = ~(kl_S.isfinite() & gradient_SL.isfinite().all(1))
    if void.any():
        where = f"layer {start_S[void][0].item():.1f}"
        raise UserError(f"with the gate at {where} the model's output is not finite - try another --dtype")
    gate_SL.backward(gradient_SL)
    return kl_S.tolist()


def _head_gradient(decoder: Decoder, parent_BTD: Tensor, hidden_SBTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return every stream's KL to the parent, summed over tokens [S], and its gradient in the streams [S, B, T, D].

    The gradient is of the sum, not the mean: in 16 bits a mean's would be too small for its format.
    """
    sums_S, gradient_SBTD = torch.zeros(len(hidden_SBTD), device=hidden_SBTD.device), torch.empty_like(hidden_SBTD)
    batch, length = parent_BTD.shape[:2]
    for part in token_chunks(batch, length, decoder.vocab_size, parent_BTD.device):
        with torch.no_grad():
            parent_BTV = log_probabilities(head_logits(decoder, parent_BTD[:, part]))
        num_logits = batch * parent_BTV.shape[1]
        for rows in token_chunks(num_logits, len(hidden_SBTD), decoder.vocab_size, parent_BTD.device):
            hidden_RBTD = hidden_SBTD[rows, :, part].clone().requires_grad_()
            logits_RBTV = head_logits(decoder, hidden_RBTD.flatten(0, 1)).unflatten(0, (-1, batch))
            kl_RBT = kl_to_parent(parent_BTV, log_probabilities(logits_RBTV))
            kl_RBT.sum().backward()  # frees the chunk's logits at once
            assert hidden_RBTD.grad is not None
            gradient_SBTD[rows, :, part] = hidden_RBTD.grad
            sums_S[rows] += kl_RBT.detach().sum((1, 2))
    return sums_S, gradient_SBTD


class _GatedStreams:
    """Streams of gated models while the parent passes by, in the order in which their valleys begin."""

    def __init__(self, gate_SL: Tensor, device: torch.device, checkpointing: bool) -> None:
        closing = 1 - gate_SL.detach() > OPEN
        begins = [int(row.nonzero()[0]) if row.any() else gate_SL.shape[1] - 1 for row in closing]
        self.order = sorted(range(len(begins)), key=lambda row: begins[row])
        self.begins = sorted(begins)
        self.gate_SL = gate_SL.detach()[self.order].float().to(device).requires_grad_()
        self.hidden_SBTD = torch.empty(0)
        self.checkpointing = checkpointing
        self.finite = FiniteWatch()

    def visit(self, i: int, hidden_BTD: Tensor, step: Step) -> None:
        self.finite.look(hidden_BTD)
        entering = self.begins.count(i)
        if entering:
            fresh = hidden_BTD.expand(entering, *hidden_BTD.shape)
            with torch.enable_grad():  # the streams that are under way keep their graph
                self.hidden_SBTD = torch.cat([self.hidden_SBTD, fresh]) if self.hidden_SBTD.numel() else fresh.clone()
        live = sum(begin <= i for begin in self.begins)
        if not live:
            return
        with torch.enable_grad():
            gate_S, gated = self.gate_SL[:live, i], partial(_gated, step)
            if self.checkpointing:  # a model in evaluation mode draws no random numbers
                gated = partial(checkpoint, gated, use_reentrant=False, preserve_rng_state=False)
            self.hidden_SBTD = gated(self.hidden_SBTD, gate_S)


def _gated(step: Step, before_SBTD: Tensor, gate_S: Tensor) -> Tensor:
    """Advance streams by a layer whose contribution is scaled.

    Mixed in float32 whatever the model computes in: the gradient of a gate is a sum over all numbers of a stream.
    """
    wide = torch.promote_types(before_SBTD.dtype, gate_S.dtype)
    after_SBTD = step(before_SBTD.flatten(0, 1)).unflatten(0, before_SBTD.shape[:2]).to(wide)
    change_SBTD = after_SBTD - before_SBTD.to(wide)
    return (before_SBTD + gate_S[:, None, None, None] * change_SBTD).to(before_SBTD.dtype)
