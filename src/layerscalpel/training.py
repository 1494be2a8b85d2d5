"""The one training loop: AdamW on float32 masters, warm-up and cosine, validation, best state, resume.

Every step is one batch of blocks in micro-batches whose gradients add up, so the result does not depend on their size;
when the device's memory runs out they are halved, and the step begins again. At each validation the best state and all
that is needed to go on are stored, by rename. A loss or gradient that is not finite ends the training: the student gets
its best state back, and the message names the step and the learning rate.

Several processes take the same steps on the same batches: each goes through its share of the micro-batches, gradients
and terms of the loss are added up. All hold the same numbers at the end of a step, so all take the same decisions;
memory that runs out for one makes all halve. Rank 0 writes the state, and any number of processes goes on from it.

    training = Training(parameters, settings, num_blocks=len(blocks), seed=0, state=StateFile(path, key))
    training.run(loss, frozen, held_out)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from layerscalpel.errors import DivergedError, UserError
from layerscalpel.frozen import Frozen
from layerscalpel.gradients import add_up, clipped
from layerscalpel.memory import halved
from layerscalpel.objectives import SeamLoss
from layerscalpel.parallel import ALONE, Team
from layerscalpel.progress import say, track
from layerscalpel.resume import StateFile, turned
from layerscalpel.schedule import learning_rate, total_steps
from layerscalpel.settings import HealSettings
from layerscalpel.spread import local, part_of, whole

UNITS = {"ce": "ce_nats", "kl": "kl_nats", "seam": "seam_error", "end": "end_error"}
"""{term of the loss: its name in results.json}."""


@dataclass
class Progress:
    """The part of a training that a resumed one goes on from, beside weights and optimiser."""

    micro_batch_size: int
    halvings: int = 0
    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


class Training:
    """The training of some parameters."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        settings: HealSettings,
        *,
        num_blocks: int,
        seed: int,
        state: StateFile,
        team: Team = ALONE,
    ) -> None:
        self.settings, self.num_blocks, self.seed, self.state = settings, num_blocks, seed, state
        self.parameters, self.team = list(parameters), team
        self.spread = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        self.masters = [_master(parameter) for parameter in self.parameters]
        team.copy_from_first(() if self.spread else self.masters)
        self._write(self.masters)
        fused = self.masters[0].device.type == "cuda"
        self.adam = torch.optim.AdamW(self.masters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)
        self.steps = total_steps(settings, num_blocks)
        self.progress = Progress(settings.micro_batch_size)
        self.best = [torch.empty_like(local(parameter), device="cpu") for parameter in self.parameters]
        self._keep()
        self._restore()

    def run(self, loss: SeamLoss, frozen: Frozen, held_out: Frozen) -> None:
        """Train to the end, from where a kept state left off if there is one, and load the best state.

        Raises:
            UserError: the training diverged, or a single block does not fit the device's memory.
        """
        holds_best = False
        try:
            if not self.progress.validation:
                self._validate(loss, held_out)
            remaining = range(self.progress.step, self.steps)
            due = {round(self.steps * i / self.settings.validations) for i in range(1, self.settings.validations + 1)}
            for step in track(remaining, "healing", len(remaining)):
                self._step(step, loss, frozen)
                self.progress.step = step + 1
                if step + 1 in due:
                    self._validate(loss, held_out)
                    self._store()
            holds_best = self.progress.best_step == self.progress.step
        finally:
            if not holds_best:
                self._write(self.best)

    def _step(self, step: int, loss: SeamLoss, frozen: Frozen) -> None:
        lr = learning_rate(step, self.steps, self.settings)
        index = self._batch_index(step)
        following = self._batch_index(step + 1) if step + 1 < self.steps else None
        terms = self._within_memory(lambda: self._gradients(index, following, loss, frozen))
        add_up(self.masters, self.parameters, self.team)
        self.team.add_up(terms.values())
        norm = clipped(self.masters, self.parameters, self.settings.max_grad_norm, self.team)
        total, norm = torch.stack([loss.total(terms), norm.to(loss.total(terms))]).tolist()  # waits for the device once
        _require_finite({"loss": total, "gradient": norm}, step + 1, lr)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        self._write(self.masters)
        self.progress.train.append({"step": step + 1, loss.name: total, "lr": lr})

    def _gradients(
        self, index: Tensor, following: Tensor | None, loss: SeamLoss, frozen: Frozen
    ) -> Mapping[str, Tensor]:
        """Add up the gradients of this process's share of a batch in the masters and return its terms."""
        with torch.enable_grad():
            return self._terms(index, following, loss, frozen)

    def _terms(self, index: Tensor, following: Tensor | None, loss: SeamLoss, frozen: Frozen) -> dict[str, Tensor]:
        """Return the terms of this process's share of a batch, as shares of those of the whole."""
        blocks, team, size = frozen.blocks, self.team, self.progress.micro_batch_size
        counts = max(1.0, float(blocks.labelled[index].sum())), float(blocks.tokens[index].numel())
        parts = team.deal(index, size)
        coming = [part for part, _ in parts[1:]]
        coming += [None if following is None else team.deal(following, size)[0][0]]
        terms: dict[str, Tensor] = {}
        for (part, counted), later in zip(parts, coming, strict=True):
            batch = frozen.batch(part)
            frozen.expect(later)
            terms = _added(terms, loss(batch, *(counts if counted else (math.inf, math.inf))))
            self._collect_gradients()
        return terms

    def _within_memory(self, work: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return what the work gives; where memory runs out for any process, all take smaller micro-batches, anew."""
        while True:
            error, terms = None, {}
            try:
                terms = work()
            except torch.OutOfMemoryError as caught:
                error = caught
            if error and self.spread:
                raise UserError(
                    "out of memory: with heal.shard a step cannot begin again, for others wait for its layers"
                    f" - lower heal.micro_batch_size (it is {self.settings.micro_batch_size}), or set"
                    " heal.checkpointing=true"
                ) from error
            if not self.team.most(error is not None):
                return terms
            self._halve(error or torch.OutOfMemoryError("another process ran out of memory"))

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        """Forget a step that ran out of memory, and make the micro-batches half as large; batches stay as they are."""
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None
        self.progress.micro_batch_size = halved(self.progress.micro_batch_size, error, "a step of healing")
        self.progress.halvings += 1

    def _batch_index(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps // self.settings.epochs)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.seed * 1000 + epoch))
        size = self.settings.batch_size
        return order[position * size : (position + 1) * size]

    def _collect_gradients(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:
                gradient = local(parameter.grad).float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    @torch.no_grad()
    def _keep(self) -> None:
        """Keep the weights as they are now, in host memory."""
        for kept, parameter in zip(self.best, self.parameters, strict=True):
            kept.copy_(local(parameter))

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            if parameter is not value:
                local(parameter).copy_(value)

    @torch.no_grad()
    def _validate(self, loss: SeamLoss, held_out: Frozen) -> None:
        done, index = self.progress.step, torch.arange(len(held_out.blocks))
        terms = self._within_memory(lambda: self._terms(index, None, loss, held_out))
        self.team.add_up(terms.values())
        value = float(loss.total(terms))
        _require_finite({"held-out loss": value}, done, learning_rate(max(0, done - 1), self.steps, self.settings))
        row = {"step": done, loss.name: value}
        if len(terms) > 1:
            row |= {UNITS[name]: float(term) for name, term in terms.items()}
        self.progress.validation.append(row)
        if value < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = value, done
            if done:  # before the first step they are kept
                self._keep()

    def _store(self) -> None:
        """Write what a later call needs to go on; of a training that is at its end only what it came to."""
        if self.team.rank and not self.spread:
            return
        collect = partial(whole, keep=not self.team.rank)
        state = {
            "progress": asdict(self.progress),
            "best": list(map(collect, self.best, self.parameters)),
        }
        if self.progress.step < self.steps:
            state["masters"] = list(map(collect, self.masters, self.parameters))
            state["adam"] = turned(self.adam.state_dict(), self.parameters, collect)
        if not self.team.rank:
            self.state.write(state)

    @torch.no_grad()
    def _restore(self) -> None:
        state = self.state.read(mapped=self.spread)
        if state is None:
            return
        self.progress = Progress(**state["progress"])
        self.best = [part_of(*both).cpu() for both in zip(state["best"], self.parameters, strict=True)]
        if self.progress.step == self.steps:
            self._write(self.best)
            return
        self.adam.load_state_dict(turned(state["adam"], self.parameters, part_of))
        for master, stored, parameter in zip(self.masters, state["masters"], self.parameters, strict=True):
            master.copy_(part_of(stored, parameter))
        self._write(self.masters)
        say(f"healing goes on from step {self.progress.step} of {self.steps}")


def _master(parameter: nn.Parameter) -> Tensor:
    """Return what the optimiser works on: the weight, or this process's part of it, in float32."""
    plain = parameter.dtype == torch.float32 and not isinstance(parameter, DTensor)
    return parameter if plain else local(parameter.detach()).float()


def _added(terms: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: terms[name] + value if terms else value for name, value in more.items()}


def _require_finite(values: Mapping[str, float], step: int, lr: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            at = f"at step {step} with learning rate {lr:.2g}" if step else "before the first step"
            cure = (
                "lower heal.lr (heal.second_lr in the second phase)"
                if step
                else "the weights of the loss, heal.cache_dtype or the number format do not hold its numbers"
            )
            raise DivergedError(f"healing diverged: the {name} is {value} {at} - {cure}")
