"""Several processes that share one search, started by `torchrun` or `accelerate launch`.

Each process scores its share of the blocks; sums are all-reduced and rank 0 writes. Without a launcher there is one
process and everything here is the identity. accelerate's PartialState sets the process group up.

    torchrun --nproc-per-node 2 -m layerscalpel search MODEL
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from layerscalpel.errors import UserError

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others, as while one of them heals more pilots."""


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
