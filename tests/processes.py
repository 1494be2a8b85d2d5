"""Several processes for a test, forked from this one, which has imported all they need: a launch takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from layerscalpel import parallel


def start(num_processes: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """Start processes that call `work(*given)`, as a launcher would; what each returns is saved in RANK.pt."""
    context = multiprocessing.get_context("fork")
    folder = Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [(rank, num_processes, port, folder / f"{rank}.pt") for rank in range(num_processes)]
    children: list[Any] = [context.Process(target=_be_one, args=(*place, work, *given)) for place in places]
    for child, place in zip(children, places, strict=True):
        child.start()
        child.file = place[-1]
    return children


def forked(num_processes: int, work: Callable[..., Any], *given: Any, timeout_s: int = 300) -> list[Any]:
    """Return what each of several processes found."""
    children = start(num_processes, work, *given)
    for child in children:
        child.join(timeout=timeout_s)
    assert [child.exitcode for child in children] == [0] * num_processes
    return [torch.load(child.file, weights_only=False) for child in children]


def _be_one(rank: int, size: int, port: int, file: Path, work: Callable[..., Any], *given: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    PartialState._reset_state()  # of the process that this one was forked from
    parallel.join("cpu")
    torch.save(work(*given), file)
