"""One training of a healing: choose what is trained, compute once what stays the same, train, tell how it went.

Where memory is spared (places.py), its three times follow one another with other layers on the device each time.

    Phase(seam_endpoints, student, parent, (13,), settings, scratch, place, "", 24, 0).train(blocks, validation)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.forwards import dressed
from layerscalpel.frozen import Frozen, Plan
from layerscalpel.layers import Decoder
from layerscalpel.objectives import SeamLoss, weights_of
from layerscalpel.places import Live, Place
from layerscalpel.probe import keeps_documents_apart
from layerscalpel.resume import StateFile, training_key
from layerscalpel.schedule import total_steps
from layerscalpel.settings import HealSettings
from layerscalpel.trained import Trained
from layerscalpel.training import Training

Choose = Callable[[Decoder, Sequence[int], HealSettings], AbstractContextManager[Trained]]
"""(student, seams, settings) -> what is trained; leaving it merges what was added."""


@dataclass(frozen=True)
class HealResult:
    """What was trained and how the losses went."""

    method: str
    objective: str
    weights: dict[str, float]
    """{term of the loss: its weight}."""
    lr: float
    expand: int
    """Times its rank that every trained linear layer was taken apart by; 0 where they were trained as they are."""
    layers: list[int]
    """Trained layers, as indices of the cut model."""
    trained_parameters: int
    steps: int
    tokens: int
    """Tokens read in training, every epoch counted."""
    labelled_tokens: int
    """Of these, targets of the loss."""
    cached_fraction: float
    """Share of the training blocks whose frozen part was computed once."""
    cache_bytes: int
    cache_dtype: str
    documents: str
    """Whether packed documents were kept `apart` in attention, or are `joined`, or stand `one` to a block."""
    micro_batch_size: int
    """At the end."""
    micro_batch_halvings: int
    """How often it was halved because memory ran out."""
    train: list[dict[str, float]]
    """[{step, loss_nats, lr}]; `loss` where some of its terms are not in nats."""
    validation: list[dict[str, float]]
    """[{step, loss_nats, and each term of the loss where there are several}], step 0 is the model before."""
    best_step: int
    second: HealResult | None = None
    """The second phase."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json; a second phase that was not asked for is absent."""
        found = asdict(self)
        if self.second is None:
            del found["second"]
        return found


@dataclass(frozen=True)
class Phase:
    """One training, and the files it goes on from."""

    choose: Choose

    student: Decoder
    parent: Decoder | None
    seams: tuple[int, ...]
    settings: HealSettings
    scratch: Path
    place: Place
    suffix: str
    """Of the names of its files."""
    touched: int
    """The lowest layer that an earlier phase has changed."""
    seed: int
    """Of the order of the blocks."""

    def train(self, blocks: TokenBlocks, validation: TokenBlocks) -> HealResult:
        """Train, and return how it went."""
        student, place = self.student, self.place
        key = training_key(student, self.seams, blocks, self.settings, self.seed)
        state = StateFile(self.scratch / f"state{self.suffix}.pt", key)
        with self._whole(), self.choose(student, self.seams, self.settings) as trained:
            plan = self._plan(trained, blocks)
            with place.at_work(student, ()):
                return self._train(trained, plan, blocks, validation, state)

    def _whole(self) -> AbstractContextManager[object]:
        """Within, what the choice takes apart and merges is on the device."""
        merges = self.settings.expand or self.settings.method == "lora"
        return self.place.whole(self.student) if merges else nullcontext()

    def _train(
        self, trained: Trained, plan: Plan, blocks: TokenBlocks, validation: TokenBlocks, state: StateFile
    ) -> HealResult:
        settings, weights, keep = self.settings, weights_of(self.settings), True
        held_out, frozen = self._frozen(plan, validation, blocks)
        loss = SeamLoss(self.student, self.parent if plan.kl else None, plan, weights)
        try:
            if not state.is_finished(total_steps(settings, len(blocks))):
                self._fill(plan, held_out, frozen)
            with self._arranged(trained, loss) as live:
                parameters = [live.get(parameter, parameter) for parameter in trained.parameters]
                how = {"num_blocks": len(blocks), "seed": self.seed, "state": state, "team": self.place.team}
                training = Training(parameters, settings, **how)
                training.run(loss, frozen, held_out)
            keep = False
        except UserError:
            keep = False
            raise
        finally:
            for part in (frozen, held_out):
                part.close(keep=keep)
        return self._result(trained, training, (frozen, held_out), plan)

    def _fill(self, plan: Plan, held_out: Frozen, frozen: Frozen) -> None:
        """Compute once what stays the same; where memory is spared, first the student's share of it, then the parent's.

        Raises:
            UserError: memory is to be spared, but not all of it can be kept.
        """
        labels = {held_out: "frozen layers on validation blocks", frozen: "frozen layers, once"}
        if not self.place.sparing:
            for part, label in labels.items():
                part.fill(label)
            return
        self._require_room(held_out, frozen)
        with self.place.at_work(self.student, range(plan.boundary)):
            for part, label in labels.items():
                part.fill(label, of="student")
        if self.parent is not None and plan.asks_parent:
            own = range(plan.boundary if plan.same_prefix else 0, len(self.parent))
            with self.place.at_work(self.parent, own):
                for part, label in labels.items():
                    part.fill(label.replace("frozen layers", "the parent"), of="parent")

    def _require_room(self, *sets: Frozen) -> None:
        if any(part.cached_fraction < 1 for part in sets):
            needed = sum(part.file.whole_bytes for part in sets) / 2**30
            raise UserError(
                f"layers can only be set aside once all they compute is kept, which takes {needed:.2g} GiB of disk"
                f" - raise heal.cache_gib (it is {self.settings.cache_gib:.2g}), or leave out heal.frozen and"
                " heal.shard"
            )

    @contextmanager
    def _arranged(self, trained: Trained, loss: SeamLoss) -> Iterator[Live]:
        """Within, the layers that training runs through are prepared and at work; of the parent at most its head."""
        settings, student = self.settings, self.student
        layers = range(trained.boundary, len(student))
        with ExitStack() as stack:
            stack.enter_context(dressed(student, layers, compiled=settings.compile, recomputed=settings.checkpointing))
            if loss.parent is not None and settings.teacher == "hidden":
                stack.enter_context(self.place.at_work(loss.parent, ()))
            yield stack.enter_context(self.place.at_work(student, layers, four_bit=True))

    def _plan(self, trained: Trained, blocks: TokenBlocks) -> Plan:
        terms, removed = weights_of(self.settings), 0 if self.parent is None else len(self.parent) - len(self.student)
        return Plan(
            boundary=trained.boundary,
            seam=min(len(self.student), self.seams[-1] + self.settings.width),
            removed=removed,
            kl="kl" in terms,
            seam_error="seam" in terms,
            end_error="end" in terms,
            # a stitch may have changed the layer before the seam, an earlier phase its own layers
            same_prefix=trained.boundary < max(1, self.seams[0]) and trained.boundary <= self.touched,
            apart=self.settings.separate_documents and blocks.positions is not None and self._keeps_apart(),
        )

    def _keeps_apart(self) -> bool:
        with self.place.at_work(self.student, range(len(self.student))):
            return keeps_documents_apart(self.student)

    def _frozen(self, plan: Plan, validation: TokenBlocks, blocks: TokenBlocks) -> tuple[Frozen, Frozen]:
        """Return what stays the same about validation and training blocks; the former have room first."""
        room, parts, team = int(self.settings.cache_gib * 2**30), [], self.place.team
        parent = self.parent if plan.asks_parent else None
        own = self.suffix + (f"-host{team.host}" if team.host else "")  # hosts may share a file system
        for name, part in (("validation", validation), ("training", blocks)):
            path = self.scratch / f"frozen-{name}{own}.bin"
            parts.append(Frozen(self.student, parent, part, plan, self.settings, path, room=room, team=team))
            room -= parts[-1].file.num_bytes
        return parts[0], parts[1]

    def _result(self, trained: Trained, training: Training, sets: tuple[Frozen, Frozen], plan: Plan) -> HealResult:
        settings, frozen, weights = self.settings, sets[0], weights_of(self.settings)
        blocks = frozen.blocks
        packed = blocks.positions is not None
        return HealResult(
            method=settings.method,
            objective=settings.objective,
            weights=weights,
            lr=settings.lr,
            expand=0 if settings.method == "lora" else settings.expand,
            layers=[i for i in trained.layers if i < plan.seam] if set(weights) == {"seam"} else trained.layers,
            trained_parameters=sum(parameter.numel() for parameter in trained.parameters),
            steps=training.steps,
            tokens=settings.epochs * blocks.tokens.numel(),
            labelled_tokens=settings.epochs * int(blocks.labelled.sum()),
            cached_fraction=frozen.cached_fraction,
            cache_bytes=sum(part.file.num_bytes for part in sets),
            cache_dtype=str(frozen.dtype).removeprefix("torch."),
            documents=("apart" if plan.apart else "joined") if packed else "one",
            micro_batch_size=training.progress.micro_batch_size,
            micro_batch_halvings=training.progress.halvings,
            train=training.progress.train,
            validation=training.progress.validation,
            best_step=training.progress.best_step,
        )
