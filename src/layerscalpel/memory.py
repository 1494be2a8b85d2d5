"""Memory: how much is free within the limit of a container if there is one, buffers of it, and what to do without."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.progress import say

CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that can be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *(_room(folder) for folder in _limits())])


def _limits() -> list[Path]:
    """Return the control groups of this process that may limit its memory, and all above them."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").split()
    except OSError:  # no Linux
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds in ("", "memory"):
            root = CGROUPS / kinds
            own = root / path.strip("/")
            found += [own, *(above for above in own.parents if above.is_relative_to(root))]
    return found


def _room(group: Path) -> int:
    """Return what a control group may still take; its cached files can be dropped, so they count as free."""
    for limit, used, caches in (
        ("memory.max", "memory.current", ("inactive_file", "active_file")),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ):
        try:
            free = int((group / limit).read_text()) - int((group / used).read_text())
            lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there, or "max"
            continue
        return free + sum(int(lines.get(name, 0)) for name in caches)
    return 1 << 62


def halved(size: int, error: torch.OutOfMemoryError, what: str) -> int:
    """Return half as many blocks for a step that ran out of memory with `size` of them, and say so.

    Raises:
        UserError: a single block does not fit.
    """
    error.with_traceback(None)  # its frames hold the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if size == 1:
        raise UserError(
            f"out of memory: {what} does not fit with a single block - shorten data.healing_block_tokens, or use"
            " --set heal.checkpointing=true, or --set heal.frozen=cpu"
        ) from None
    say(f"out of memory: {what} takes {size // 2} blocks at once instead of {size} from now on")
    return size // 2


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """Return bytes of host memory that are given back with the last view of them.

    For CUDA they are page-locked, which makes copies several times as fast and lets them run beside other work. torch's
    own page-locked memory comes in powers of two, up to twice of what is asked for; this comes in pages.
    """
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes)
    buffer = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type == "cuda":
        buffer.zero_()  # all cores take the pages; one alone does while it locks them, in twice the time
        begin = buffer.data_ptr()
        with torch.cuda.device(device):
            torch.cuda.check_error(int(_runtime().cudaHostRegister(begin, num_bytes, 0)))
        weakref.finalize(pages, _unlock, begin, device)
    return buffer


def _unlock(begin: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be on its way
    torch.cuda.check_error(int(_runtime().cudaHostUnregister(begin)))


def _runtime() -> Any:
    return torch.cuda.cudart()
