"""Several processes that share one search and one healing, started by `torchrun` or `accelerate launch`.

Each process takes its share of the blocks; sums are all-reduced and rank 0 writes. Without a launcher there is one
process and everything here is the identity. accelerate's PartialState sets the process group up.

A `Team` is who does one piece of work together. It is handed on, never looked up: a search that heals its candidates
is done by all, while each of them is healed by one process alone.

    torchrun --nproc-per-node 2 -m layerscalpel run MODEL
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from layerscalpel.errors import UserError

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others, as while one of them heals more pilots."""
BUCKET_NUMBERS = 1 << 26
"""Numbers that are added up over processes at once: the copy of a large gradient that this takes stays small."""


def world() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, 0 for the one that writes."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def join(device: str) -> None:
    """Meet the other processes, if there are any; on CUDA each takes the device of its local rank.

    Args:
        device: as the setting model.device; with `cpu` processes talk through gloo.

    Raises:
        UserError: the environment tells of several processes, but not how to meet them.
    """
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world() > 1 and missing:
        raise UserError(f"WORLD_SIZE={world()} is set without {', '.join(missing)} - launch with torchrun, or unset it")
    if world() > 1 and not torch.distributed.is_initialized():
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        PartialState(cpu=on_cpu, timeout=PATIENCE)
        atexit.register(_leave)


def _leave() -> None:
    """Part from the others in order: a process that ends with its threads still talking is killed by them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def add_up(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on the CPU."""
    if world() == 1:
        return tensor
    summed = tensor.to(PartialState().device)
    torch.distributed.all_reduce(summed)
    return summed.cpu()


def gather(value: Any) -> list[Any]:
    """Return what every process gave, in the order of their ranks; values are pickled."""
    return [value] if world() == 1 else gather_object([value])


def first_says(value: Any) -> Any:
    """Return what rank 0 gave."""
    return value if world() == 1 else broadcast_object_list([value])[0]


@dataclass(frozen=True)
class Team:
    """Processes that do one piece of work together, and this one's place among them; without arguments one alone."""

    rank: int = 0
    hosts: tuple[str, ...] = ("",)
    """The host that each process runs on."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.hosts)

    @property
    def host(self) -> int:
        """Number of this process's host, in the order of the ranks."""
        return list(dict.fromkeys(self.hosts)).index(self.hosts[self.rank])

    @property
    def mates(self) -> list[int]:
        """Ranks of the processes on this host."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    @property
    def seat(self) -> int:
        """Place of this process among those on its host."""
        return self.mates.index(self.rank)

    def deal(self, index: Tensor, most: int) -> list[tuple[Tensor, bool]]:
        """Return this process's share of blocks, in parts of at most so many: [(blocks, whether they count)].

        All processes get as many parts, for some computations only go together: where there are none left, one that
        another process has stands again, and does not count.
        """
        if self.size > 1:
            turns = -(-len(index) // (most * self.size))
            most = -(-len(index) // (turns * self.size))
        parts = index.split(most)
        places = range(self.rank, -(-len(parts) // self.size) * self.size, self.size)
        return [(parts[min(place, len(parts) - 1)], place < len(parts)) for place in places]

    def most(self, value: float) -> float:
        """Return the largest of what the processes give; all of them wait for the last one."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.float64, device=PartialState().device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest.item()

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one number format by their sums over the processes."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            _put(flat, bucket)

    @torch.no_grad()
    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one number format by those of rank 0."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.broadcast(flat, 0)
            _put(flat, bucket)


ALONE = Team()
"""One process by itself, whether others are there or not."""


def team() -> Team:
    """Return the team of all processes; all of them call this together."""
    node = os.environ.get("GROUP_RANK", "")  # hosts may bear one name, as containers do
    return Team(rank(), tuple(gather(f"{node} {socket.gethostname()}"))) if world() > 1 else ALONE


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(other.numel() for other in bucket) + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _put(flat: Tensor, bucket: list[Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([other.numel() for other in bucket]), strict=True):
        tensor.copy_(part.view_as(tensor))
