"""Heal the seam: train the few layers beside it so that the cut model speaks like its parent again.

Cutoff endpoint tuning (arXiv:2510.23652, Section 3.3) trains only the layer before and the layer after the seam. The
layers below are frozen, so their output is computed once, kept in a memory-mapped file, and every epoch starts there;
backward never goes below it. Head and loss run on labelled positions only, in chunks, so full logits never exist.
Weights in 16 bit keep float32 masters of what is trained. Dropout is off. Learning rate, schedule and batch are our
choice; the paper does not state its own.

Dimensions: N blocks, B blocks at once, T tokens, D hidden size, V vocabulary, M labelled positions.

    train = HEALERS["endpoint"].train
    result = train(student, parent, [13], blocks, validation, HealSettings(), seed=0, scratch=folder)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.hooks import head_logits, hidden_at, resume_from
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import kl_to_parent, log_probabilities, token_chunks, token_nll
from layerscalpel.progress import say, track
from layerscalpel.settings import HealName, HealSettings


@dataclass(frozen=True)
class HealResult:
    """What was trained and how the losses went."""

    method: str
    objective: str
    layers: list[int]
    """Trained layers, as indices of the cut model."""
    trained_parameters: int
    steps: int
    tokens: int
    """Tokens read in training, every epoch counted."""
    labelled_tokens: int
    """Of these, targets of the loss."""
    cached_fraction: float
    """Share of the training blocks whose frozen prefix was computed once."""
    train: list[dict[str, float]]
    """[{step, loss_nats, lr}]"""
    validation: list[dict[str, float]]
    """[{step, loss_nats}], step 0 is the unhealed model."""
    best_step: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return asdict(self)


@dataclass(frozen=True)
class Healer:
    """A row of the table of healing methods."""

    train: Callable[..., HealResult] | None
    """(student, parent, seams, blocks, validation, settings, *, seed, scratch) -> result; None trains nothing."""
    sentence: str
    paper: str


def seam_layers(num_layers: int, seam: int, width: int) -> range:
    """Return the layers within `width` of the seam, as indices of the cut model.

    Args:
        num_layers: of the cut model.
        seam: index of the first layer after the seam, the removed segment's start; 0..num_layers.
        width: layers on each side; at an end of the model only the existing side is trained.
    """
    return range(max(0, seam - width), min(num_layers, seam + width))


def tune_endpoints(
    student: Decoder,
    parent: Decoder | None,
    seams: Sequence[int],
    blocks: TokenBlocks,
    validation: TokenBlocks,
    settings: HealSettings,
    *,
    seed: int,
    scratch: Path,
) -> HealResult:
    """Train the layers at the seam of `student` in place; it ends in its best validated state.

    Args:
        student: the cut model.
        parent: the uncut model; needed for the objectives kl and both.
        seams: for each removed segment the cut model's first layer after it.
        blocks: training blocks [N, T].
        validation: held-out blocks that choose the best state.
        settings: heal section of the recipe.
        seed: fixes the order of the blocks.
        scratch: folder for the prefix cache and the state that an interrupted training goes on from.

    Raises:
        UserError: the loss is not finite; the line says at which step and learning rate.
    """
    chosen = sorted({i for seam in seams for i in seam_layers(len(student), seam, settings.width)})
    first = chosen[0]
    loss = SeamLoss(student, parent if settings.objective != "ce" else None, first, settings.objective)
    cache = PrefixCache(student, blocks, first, settings, scratch / "prefix.bin")
    held_out = PrefixCache(student, validation, first, settings, scratch / "prefix-validation.bin")
    training = Training(student, chosen, settings, num_blocks=len(blocks), seed=seed, state_file=scratch / "state.pt")
    try:
        training.run(loss, cache, held_out)
    finally:
        cache.close()
        held_out.close()
    (scratch / "state.pt").unlink(missing_ok=True)
    return HealResult(
        method="endpoint",
        objective=settings.objective,
        layers=chosen,
        trained_parameters=sum(parameter.numel() for parameter in training.parameters),
        steps=training.steps,
        tokens=settings.epochs * blocks.tokens.numel(),
        labelled_tokens=settings.epochs * int(blocks.labelled.sum()),
        cached_fraction=cache.cached / max(1, len(blocks)),
        train=training.progress.train,
        validation=training.progress.validation,
        best_step=training.progress.best_step,
    )


@dataclass(frozen=True)
class SeamLoss:
    """The loss of a batch whose hidden states enter at the first trained layer."""

    student: Decoder
    parent: Decoder | None
    boundary: int
    """Where hidden states enter; the layers below it are the same in student and parent."""
    objective: str

    def __call__(self, tokens_BT: Tensor, labelled_BT: Tensor, hidden_BTD: Tensor, denominator: float) -> float:
        """Return the batch's loss sum over `denominator`; where gradients are on, add its gradient to the weights."""
        predicts_BT = torch.zeros_like(labelled_BT)
        predicts_BT[:, :-1] = labelled_BT[:, 1:]
        targets_M = tokens_BT[:, 1:][labelled_BT[:, 1:]]
        final_MD = resume_from(self.student, tokens_BT, self.boundary, hidden_BTD)[predicts_BT]
        parent_MD = self._parent_hidden(tokens_BT, hidden_BTD, predicts_BT)
        leaf_MD = final_MD.detach().requires_grad_(final_MD.requires_grad)
        total, vocab = 0.0, self.student.vocab_size
        context = tokens_BT.shape[1]  # a longer chunk may have no positions in the model
        for part in token_chunks(1, len(leaf_MD), vocab, leaf_MD.device, most=context):
            chunk = self._sum(leaf_MD[part], targets_M[part], None if parent_MD is None else parent_MD[part])
            chunk = chunk / denominator
            if leaf_MD.requires_grad:
                chunk.backward()  # frees the chunk's logits at once
            total += chunk.item()
        if leaf_MD.requires_grad and leaf_MD.grad is not None:
            final_MD.backward(leaf_MD.grad)
        return total

    @torch.no_grad()
    def _parent_hidden(self, tokens_BT: Tensor, hidden_BTD: Tensor, predicts_BT: Tensor) -> Tensor | None:
        if self.parent is None:
            return None
        return resume_from(self.parent, tokens_BT, self.boundary, hidden_BTD)[predicts_BT]

    def _sum(self, hidden_MD: Tensor, targets_M: Tensor, parent_MD: Tensor | None) -> Tensor:
        log_probs = log_probabilities(head_logits(self.student, hidden_MD[None]))
        loss = log_probs.new_zeros(())
        if self.objective in ("ce", "both"):
            loss = loss + token_nll(log_probs, targets_M[None]).sum()
        if self.parent is not None and parent_MD is not None:
            with torch.no_grad():
                parent = log_probabilities(head_logits(self.parent, parent_MD[None]))
            loss = loss + kl_to_parent(parent, log_probs).sum()
        return loss


class PrefixCache:
    """The frozen layers' output for every block, computed once and memory-mapped; past the bound it is recomputed."""

    def __init__(
        self, decoder: Decoder, blocks: TokenBlocks, boundary: int, settings: HealSettings, path: Path
    ) -> None:
        self.decoder, self.blocks, self.boundary, self.path = decoder, blocks, boundary, path
        weight = next(decoder.model.parameters())
        width = decoder.hidden_size
        shape = (blocks.tokens.shape[1], width)
        fits = int(settings.cache_gib * 2**30 // (math.prod(shape) * weight.element_size()))
        self.cached = min(len(blocks), fits)
        self.rows = torch.empty(0)
        if self.cached < len(blocks):
            say(
                f"prefix cache: {self.cached} of {len(blocks)} blocks fit {settings.cache_gib} GiB,"
                " the rest is recomputed"
            )
        if self.cached:
            path.parent.mkdir(parents=True, exist_ok=True)
            size = self.cached * math.prod(shape)
            self.rows = torch.from_file(str(path), shared=True, size=size, dtype=weight.dtype).view(self.cached, *shape)
            self._fill(settings.micro_batch_size)

    @torch.no_grad()
    def _fill(self, batch_size: int) -> None:
        begins = range(0, self.cached, batch_size)
        for low in track(begins, "frozen prefix, once", len(begins)):
            high = min(low + batch_size, self.cached)
            self.rows[low:high] = self._compute(torch.arange(low, high)).cpu()

    def _compute(self, index: Tensor) -> Tensor:
        tokens = self.blocks.tokens[index].to(device_of(self.decoder.model))
        return hidden_at(self.decoder, tokens, self.boundary)

    @torch.no_grad()
    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (tokens [B, T], labelled [B, T], hidden [B, T, D]) of blocks on the model's device."""
        device = device_of(self.decoder.model)
        whole = bool((index < self.cached).all())
        hidden = self.rows[index].to(device) if whole else self._compute(index)
        return self.blocks.tokens[index].to(device), self.blocks.labelled[index].to(device), hidden

    def close(self) -> None:
        """Free the memory map and remove its file."""
        self.rows = torch.empty(0)
        self.path.unlink(missing_ok=True)


@dataclass
class Progress:
    """The part of a training that a resumed one goes on from, beside weights and optimiser."""

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


class Training:
    """The one training loop: AdamW on float32 masters, warm-up and cosine, validation, best state, resume."""

    def __init__(
        self,
        student: Decoder,
        chosen: Sequence[int],
        settings: HealSettings,
        *,
        num_blocks: int,
        seed: int,
        state_file: Path,
    ) -> None:
        self.settings, self.num_blocks, self.seed, self.state_file = settings, num_blocks, seed, state_file
        self.parameters = [p for i in chosen for p in student.layers[i].parameters()]
        student.model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        fused = self.masters[0].device.type == "cuda"
        self.adam = torch.optim.AdamW(self.masters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
        self.steps_per_epoch = math.ceil(num_blocks / settings.batch_size)
        self.steps = settings.epochs * self.steps_per_epoch
        self.progress = Progress()
        self.best = [master.detach().clone() for master in self.masters]

    def run(self, loss: SeamLoss, cache: PrefixCache, held_out: PrefixCache) -> None:
        """Train to the end, or from where the state file left off, and load the best state."""
        self._restore()
        if not self.progress.validation:
            self._validate(loss, held_out)
        remaining = range(self.progress.step, self.steps)
        due = {round(self.steps * i / self.settings.validations) for i in range(1, self.settings.validations + 1)}
        for step in track(remaining, "healing", len(remaining)):
            self._step(step, loss, cache)
            self.progress.step = step + 1
            if step + 1 in due:
                self._validate(loss, held_out)
                self._store()
        self._write(self.best)
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def _step(self, step: int, loss: SeamLoss, cache: PrefixCache) -> None:
        index = self._batch_index(step)
        denominator = max(1.0, float(cache.blocks.labelled[index].sum()))
        lr = learning_rate(step, self.steps, self.settings)
        total = 0.0
        with torch.enable_grad():
            for part in index.split(self.settings.micro_batch_size):
                total += loss(*cache.batch(part), denominator)
                self._collect_gradients()
        _require_finite("loss", total, step + 1, lr)
        torch.nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        self._write(self.masters)
        self.progress.train.append({"step": step + 1, "loss_nats": total, "lr": lr})

    def _batch_index(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
        size = self.settings.batch_size
        return order[position * size : (position + 1) * size]

    def _collect_gradients(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            if parameter is not value:
                parameter.copy_(value)

    @torch.no_grad()
    def _validate(self, loss: SeamLoss, held_out: PrefixCache) -> None:
        denominator = max(1.0, float(held_out.blocks.labelled.sum()))
        parts = torch.arange(len(held_out.blocks)).split(self.settings.micro_batch_size)
        value = sum(loss(*held_out.batch(part), denominator) for part in parts)
        done = self.progress.step
        _require_finite("held-out loss", value, done, learning_rate(max(0, done - 1), self.steps, self.settings))
        self.progress.validation.append({"step": done, "loss_nats": value})
        if value < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = value, self.progress.step
            self.best = [master.detach().clone() for master in self.masters]

    def _store(self) -> None:
        state = {
            "progress": asdict(self.progress),
            "masters": [master.detach() for master in self.masters],
            "best": self.best,
            "adam": self.adam.state_dict(),
        }
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        draft = self.state_file.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, self.state_file)

    @torch.no_grad()
    def _restore(self) -> None:
        if not self.state_file.exists():
            return
        state = torch.load(self.state_file, map_location=self.masters[0].device, weights_only=True)
        self.progress = Progress(**state["progress"])
        self.adam.load_state_dict(state["adam"])
        self.best = state["best"]
        for master, stored in zip(self.masters, state["masters"], strict=True):
            master.copy_(stored)
        self._write(self.masters)
        say(f"healing goes on from step {self.progress.step} of {self.steps}")


def _require_finite(name: str, value: float, step: int, lr: float) -> None:
    if not math.isfinite(value):
        raise UserError(
            f"healing diverged: the {name} is {value} at step {step} with learning rate {lr:.2g}"
            " - lower heal.lr; the state of the last validation is kept"
        )


def learning_rate(step: int, steps: int, settings: HealSettings) -> float:
    """Return the learning rate of a step, 0-based: linear warm-up, then a cosine down to 0."""
    warmup = round(steps * settings.warmup_fraction)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


HEALERS: dict[HealName, Healer] = {
    "endpoint": Healer(tune_endpoints, "cutoff endpoint tuning: only the layers at the seam", "2510.23652"),
    "none": Healer(None, "no healing: the cut is the result", "none"),
}
