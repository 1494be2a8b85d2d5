"""What training does not change about a block, computed once: hidden states below the trained layers, and the parent's.

The layers below the first trained one are frozen, so what leaves them is the same in every epoch; so is what the parent
says of the labelled tokens. Both are kept in a memory-mapped file (blockfile.py), up to a bound; blocks past it are
computed anew each time. A thread reads the next batch while the present one is trained on.

Of the parent, `hidden` keeps the last hidden states at labelled places, from which its head makes the exact
distribution again; `topk` its k largest log probabilities there, after which the parent is not needed any more.

Dimensions: N blocks, B blocks at once, T tokens, D hidden size, M labelled places, K kept probabilities.

    frozen = Frozen(student, parent, blocks, Plan(boundary=12, seam=14, removed=6, kl=True), settings, path, room=2**34)
    frozen.fill("frozen layers, once")
    frozen.batch(torch.tensor([0, 3])).hidden_BTD  # [2, T, D]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from layerscalpel.blockfile import BlockFile, Part
from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.memory import halved
from layerscalpel.parallel import ALONE, Team
from layerscalpel.progress import say, track
from layerscalpel.rows import Plan, Rows
from layerscalpel.settings import HealSettings
from layerscalpel.transfer import Departures, Sent

FILL_TOKENS = {"cpu": 0, "cuda": 1 << 14, "mps": 1 << 12}
"""Tokens that go through frozen layers at once, at least: without gradients a GPU has room for many."""
NOTE_EVERY = 32
"""Batches after which an interrupted filling can go on."""
Side = Literal["both", "student", "parent"]
"""Whose part of the records is computed."""


@dataclass(frozen=True)
class Batch:
    """Blocks, and what is known of them before a student is trained."""

    sent: Sent
    hidden_BTD: Tensor | None
    """At the plan's boundary; None where training begins at the tokens."""
    parent: Mapping[str, Tensor]
    """Rows of the parent: final [M, D], or top_log_probs and top_ids [M, K]; seam [B * T, D]."""


class Frozen(Rows):
    """All that stays the same about a set of blocks while a student is trained."""

    def __init__(
        self,
        student: Decoder,
        parent: Decoder | None,
        blocks: TokenBlocks,
        plan: Plan,
        settings: HealSettings,
        path: Path,
        *,
        room: int,
        team: Team = ALONE,
    ) -> None:
        super().__init__(student, parent, blocks, plan, settings)
        self.team = team
        self.file = BlockFile(path, self._parts(), room=room, key=self._key())
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._departures = Departures(self.device)
        self._ahead: tuple[Tensor, Future[dict[str, Tensor]]] | None = None
        self.per_fill = max(settings.micro_batch_size, FILL_TOKENS[self.device.type] // blocks.tokens.shape[1])

    @property
    def cached_fraction(self) -> float:
        """Share of the blocks that are computed once; 1 where there is nothing to compute."""
        return self.file.num_blocks / max(1, len(self.blocks)) if self.file.parts else 1.0

    def _parts(self) -> dict[str, Part]:
        plan, (count, length) = self.plan, self.blocks.tokens.shape
        whole, places = (length,) * count, tuple(self.blocks.labelled[:, 1:].sum(1).tolist())
        width, parts = self.student.hidden_size, {}
        if plan.boundary:
            parts["prefix"] = Part(whole, width, self.dtype)
        if plan.asks_parent and not self.online:
            if plan.kl and self.top_k:
                parts["top_log_probs"] = Part(places, self.top_k, torch.float32)
                parts["top_ids"] = Part(places, self.top_k, torch.int32)
            if plan.end_error or (plan.kl and not self.top_k):
                parts["final"] = Part(places, width, self.dtype)
            if plan.seam_error:
                parts["seam"] = Part(whole, width, self.dtype)
        return parts

    def _key(self) -> str:
        return repr((self.plan, self.dtype, self.top_k, self.online, self.blocks.sha256))

    @torch.no_grad()
    def fill(self, label: str, of: Side = "both") -> None:
        """Compute what the file holds, or what is missing of it after an interruption.

        The processes of a host share the work and the file. Of the two models the `student` may come first and the
        `parent` after it, so that neither needs the other beside it; an interrupted first half is computed anew.
        """
        kept, total = self.file.num_blocks, len(self.blocks)
        if kept < total and self.file.parts:
            say(f"{label}: {kept} of {total} blocks fit heal.cache_gib, the rest is computed at every step")
        self._open()
        names = [name for name in self.file.parts if of == "both" or (name == "prefix") == (of == "student")]
        if not names:
            return
        if self.file.filled and self.team.most(not self._still_holds(names, of)):
            self.file.filled = 0
        try:
            self._fill(label, of)
        finally:
            if self.team.seat == 0:
                self._reader.submit(self.file.note).result()  # after what is still being written

    def _open(self) -> None:
        """Open the file: one process of the host takes the room, the others find it there."""
        error, team = None, self.team
        if team.seat == 0:
            try:
                self.file.open()
            except UserError as caught:
                error = caught
        if team.most(error is not None):
            raise error or UserError("another process finds no room for heal.cache_gib - it says more")
        self.file.open(take=False)
        self.file.filled = int(-team.most(-self.file.filled))

    def _fill(self, label: str, of: Side) -> None:
        file, mates, step = self.file, len(self.team.mates), self.per_fill
        begins, written = range(file.filled, file.num_blocks, step), None
        turns = -(-len(begins) // mates)
        for turn in track(range(turns), label, turns):
            place = turn * mates + self.team.seat
            low = begins[min(place, len(begins) - 1)]  # all take as many turns: what is spread only runs together
            index = torch.arange(low, min(low + step, file.num_blocks))
            rows = self._within_memory(index, of)
            if written is not None:
                written.result()
            if turn and turn % NOTE_EVERY == 0:
                self._agree(begins.start + turn * mates * step, of)
            if place < len(begins):
                written = self._reader.submit(self._write, low, self._departures.begin(rows), len(index))
        if written is not None:
            written.result()
        self._agree(file.num_blocks, of)

    def _write(self, low: int, fetch: Callable[[], Mapping[str, Tensor]], count: int) -> None:
        """Write records while the device goes on with the next."""
        before = self.file.filled
        self.file.write(low, fetch(), count)
        if self.team.size > 1:
            self.file.filled = before  # others have not written theirs

    def _agree(self, filled: int, of: Side) -> None:
        """Note how many blocks are there, once all processes have written theirs."""
        self.team.most(0)
        if of != "student" or set(self.file.parts) == {"prefix"}:
            self.file.filled = filled
        if self.team.seat == 0:
            self.file.note()

    def _within_memory(self, index: Tensor, of: Side = "both") -> dict[str, Tensor]:
        """Return the parts of blocks' records, computed in as many turns as memory takes."""
        compute = {"both": self._computed, "student": self._prefix, "parent": self._parents_rows}[of]
        while True:
            try:
                turns = [compute(part) for part in index.split(self.per_fill)]
                return turns[0] if len(turns) == 1 else {n: torch.cat([t[n].cpu() for t in turns]) for n in turns[0]}
            except torch.OutOfMemoryError as error:
                if any(isinstance(p, DTensor) for m in (self.student, self.parent) if m for p in m.model.parameters()):
                    raise UserError(
                        "out of memory: with heal.shard the frozen layers cannot begin a batch again, for others wait"
                        " for them - shorten data.healing_block_tokens, or start more processes"
                    ) from error
                self.per_fill = halved(self.per_fill, error, "running the frozen layers")

    def _still_holds(self, names: Sequence[str], of: Side) -> bool:
        """Tell whether the file's first block is what the model computes now: the key does not name the weights."""
        index = torch.arange(min(self.per_fill, self.file.num_blocks))
        now, first = self._within_memory(index, of), self.file.read(torch.tensor([0]), names=names)
        return all(torch.equal(now[name][: len(rows)].to("cpu", rows.dtype), rows) for name, rows in first.items())

    def expect(self, index: Tensor | None) -> None:
        """Begin to read the blocks [B] that the next `batch` will ask for, while the device is at work."""
        self._ahead = None if index is None else (index, self._reader.submit(self._read, index))

    def batch(self, index: Tensor) -> Batch:
        """Return blocks [B] on the device."""
        expected, self._ahead = self._ahead, None
        known = expected is not None and torch.equal(expected[0], index)
        rows = expected[1].result() if expected is not None and known else self._read(index)
        rows = {name: part.to(self.device, non_blocking=True) for name, part in rows.items()}
        missing = index >= self.file.num_blocks
        if self.file.parts and missing.any():
            rows = self._joined(index, rows, self._computed(index[missing]))
        sent, prefix = self._sent(index), rows.pop("prefix", None)
        hidden = None if prefix is None else self._shaped(prefix, sent)
        if self.plan.asks_parent and self.online:
            rows |= self._of_parent(sent, hidden)
        return Batch(sent, hidden, rows)

    def _shaped(self, prefix: Tensor, sent: Sent) -> Tensor:
        """Return the hidden states [B, T, D] that a part of the file holds."""
        return prefix.view(*sent.tokens_BT.shape, -1).to(self.compute_dtype)

    def close(self, *, keep: bool) -> None:
        """End the reader; remove the file unless a later call goes on with it."""
        self._reader.shutdown()
        self._ahead = None
        if not keep:
            self.file.remove()

    def _read(self, index: Tensor) -> dict[str, Tensor]:
        return self.file.read(index[index < self.file.num_blocks], pinned=self.device.type == "cuda")

    def _joined(self, index: Tensor, read: Mapping[str, Tensor], computed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring rows that were read and rows that were computed into the order of the index."""
        there = index < self.file.num_blocks
        order = torch.cat([there.nonzero()[:, 0], (~there).nonzero()[:, 0]]).argsort()
        found = {}
        for name, part in self.file.parts.items():
            matrices: list[Tensor] = []
            for rows, blocks in ((read[name], index[there]), (computed[name].to(part.dtype), index[~there])):
                matrices += rows.split([part.rows[int(block)] for block in blocks])
            found[name] = torch.cat([matrices[int(i)] for i in order])
        return found

    def _parents_rows(self, index: Tensor) -> dict[str, Tensor]:
        """Return the parent's part of blocks' records, whose student's part is there."""
        sent, hidden = self._sent(index), None
        if self.plan.boundary:
            hidden = self._shaped(self.file.read(index, names=["prefix"])["prefix"].to(self.device), sent)
        return self._of_parent(sent, hidden)
