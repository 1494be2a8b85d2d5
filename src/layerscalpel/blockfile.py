"""Tensors of token blocks in one memory-mapped file, within a bound, kept over interruptions.

Each block has a record: several named parts, each a matrix of so many rows. Blocks are written in order; a note beside
the file says how many are there, and of what. The system's page cache holds as much of it as memory allows.

    file = BlockFile(path, {"prefix": Part((512,) * 40, 576, torch.float32)}, room=16 << 30, key="...")
    file.open()
    file.write(0, {"prefix": hidden_BTD.flatten(0, 1)}, 4)
    file.read(torch.tensor([3, 1]))["prefix"]  # [2 * 512, 576]
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from layerscalpel.errors import UserError

ALIGNED = 64
"""Bytes; every part begins at a multiple, so that it can be viewed in its own number format."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a disk without room answers."""


def reserve(descriptor: int, begin: int, num_bytes: int) -> bool:
    """Have room set aside in a file, so that a full disk is told before anything is written.

    Returns:
        Whether the system can do that; where it cannot the write tells.

    Raises:
        OSError: its errno is in FULL.
    """
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(descriptor, begin, num_bytes)
    except OSError as error:
        if error.errno in FULL:
            raise
        return False
    return True


@dataclass(frozen=True)
class Part:
    """One matrix of every block."""

    rows: Sequence[int]
    """Its rows in each block."""
    width: int
    dtype: torch.dtype

    def nbytes(self, block: int) -> int:
        """Return its bytes in a block's record, filled up to the next aligned place."""
        return -(-self.rows[block] * self.width * self.dtype.itemsize // ALIGNED) * ALIGNED


class BlockFile:
    """Records of the first blocks of a set, as many as there is room for."""

    def __init__(self, path: Path, parts: Mapping[str, Part], *, room: int, key: str) -> None:
        """Find out how many blocks there is room for; nothing is taken from the disk before `open`.

        Args:
            path: of the file; its note stands beside it.
            parts: of every block's record.
            room: most bytes.
            key: names what is written, so that another set's records are not taken for this one's.
        """
        self.path, self.parts, self.key = path, parts, key
        num_blocks = len(next(iter(parts.values())).rows) if parts else 0
        sizes = [sum(part.nbytes(i) for part in parts.values()) for i in range(num_blocks)]
        self._begins = [0, *accumulate(sizes)]
        self.num_blocks = bisect_right(self._begins, room) - 1
        self.num_bytes = self._begins[self.num_blocks]
        self.whole_bytes = self._begins[-1]
        """What all blocks would take."""
        self.filled = 0
        """Blocks that are there."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def _note(self) -> Path:
        return self.path.with_suffix(".json")

    def _noted(self) -> int:
        """Return how many blocks an earlier call has written."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            ours = note["key"] == self.key and self.path.stat().st_size == self.num_bytes
            return int(note["filled"]) if ours else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def open(self, *, take: bool = True) -> None:
        """Take the room; what a call with the same key has written is still there.

        Args:
            take: whether to take it; False where another process has, which shares the file.

        Raises:
            UserError: the disk is full. Nothing is left behind.
        """
        if not self.num_bytes or len(self._bytes):
            return
        self.filled = self._noted()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if take:
                self._take_room()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.remove()
            raise UserError(
                f"no space left for {self.num_bytes / 2**30:.1f} GiB of hidden states in {self.path.parent}"
                " - free some, choose another --out, or lower heal.cache_gib"
            ) from error
        self._bytes = torch.from_file(str(self.path), shared=True, size=self.num_bytes, dtype=torch.uint8)

    def _take_room(self) -> None:
        """Have the disk give all bytes: where none is left, writing through the map would end in a signal."""
        with self.path.open("ab") as file:
            if not self.filled:
                file.seek(file.truncate(0))
            if not reserve(file.fileno(), 0, self.num_bytes):
                zeros = bytes(1 << 20)
                for begin in range(file.tell(), self.num_bytes, len(zeros)):
                    file.write(zeros[: self.num_bytes - begin])

    def _view(self, name: str, block: int) -> Tensor:
        begin = self._begins[block]
        for other, part in self.parts.items():
            if other == name:
                size = part.rows[block] * part.width * part.dtype.itemsize
                return self._bytes[begin : begin + size].view(part.dtype).view(part.rows[block], part.width)
            begin += part.nbytes(block)
        raise KeyError(name)

    def write(self, first: int, rows: Mapping[str, Tensor], count: int) -> None:
        """Write the records of `count` blocks from `first` on, or some of their parts.

        `rows` holds the matrices of a part, one below the other. Blocks count as filled once all parts are given.
        """
        for name in rows:
            part = self.parts[name]
            lengths = [part.rows[block] for block in range(first, first + count)]
            matrices = rows[name].to("cpu", part.dtype).split(lengths)
            for block, matrix in enumerate(matrices, start=first):
                self._view(name, block).copy_(matrix)
        if len(rows) == len(self.parts):
            self.filled = first + count

    def note(self) -> None:
        """Write down how many blocks are there, for a call that goes on."""
        if not self.num_bytes:
            return
        draft = self._note.with_suffix(".draft")
        draft.write_text(json.dumps({"key": self.key, "filled": self.filled}), encoding="utf-8")
        os.replace(draft, self._note)

    def read(self, blocks: Tensor, *, pinned: bool = False, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the parts' matrices of these blocks, one below the other; page-locked where wanted.

        `names` are the parts; None for all of them.
        """
        found = {}
        for name in self.parts if names is None else names:
            part = self.parts[name]
            views = [self._view(name, int(block)) for block in blocks]
            total = sum(len(view) for view in views)
            out = torch.empty(total, part.width, dtype=part.dtype, pin_memory=pinned)
            found[name] = torch.cat(views, out=out) if views else out
        return found

    def remove(self) -> None:
        """Free the memory map and remove the files."""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
