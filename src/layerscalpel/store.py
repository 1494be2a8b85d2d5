"""Hidden states under keys, in as much memory as they may take: on the device, in host memory, then in a file.

A state is put where room is left, in that order, and stays there until it is replaced or deleted, which frees its
place. It comes back bit for bit. The file is written and read, never mapped: mapped pages would count as memory of the
process. It has no name, so it is gone when the store is closed, and also when the process is killed.

A tensor must not be changed in place once it was put, nor one that was got: where a state lies in the memory that it
came from, the very tensor is kept and given back, not a copy. (A view of something larger is copied, so that it does
not keep that alive.) On a CPU there is no device tier: that memory is the host's.

    with StreamStore(device, device_bytes=2**30, host_bytes=2**33, folder=Path("scratch")) as store:
        store["parent", 0] = hidden_BTD
        hidden_BTD = store.pop(("parent", 0))
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerscalpel.blockfile import FULL, reserve
from layerscalpel.errors import UserError
from layerscalpel.memory import host_buffer


class _Place(NamedTuple):
    """Where a tensor is kept, and what its bytes mean."""

    tier: _Kept | _Copied | _Filed
    slot: Any
    shape: torch.Size
    dtype: torch.dtype
    num_bytes: int


class StreamStore(MutableMapping[Hashable, Tensor]):
    """A dict of tensors on one device that spills into host memory and a file.

    On CUDA all puts and gets must be on one stream: what a place is reused for waits there for what was in it.
    """

    def __init__(self, device: torch.device, *, device_bytes: int, host_bytes: int, folder: Path) -> None:
        """Open an empty store; nothing is taken before it is needed.

        Args:
            device: where tensors are when they are put, and when they come back.
            device_bytes: most bytes on the device; without meaning on a CPU.
            host_bytes: most bytes in host memory.
            folder: on the disk that holds the rest, made if it is not there.
        """
        self._device = _Kept(device_bytes if _has_own_memory(device) else 0)
        self._host = _Copied(host_bytes, device) if _has_own_memory(device) else _Kept(host_bytes)
        self._file = _Filed(folder, device)
        self._places: dict[Hashable, _Place] = {}

    def __setitem__(self, key: Hashable, tensor: Tensor) -> None:
        if key in self._places:
            self._free(self._places[key])
        try:
            tier = next(tier for tier in (self._device, self._host, self._file) if tier.has_room(tensor.nbytes))
            slot = tier.put(tensor.detach())
        except BaseException:
            self._places.pop(key, None)
            raise
        tier.used += tensor.nbytes
        self._places[key] = _Place(tier, slot, tensor.shape, tensor.dtype, tensor.nbytes)

    def __getitem__(self, key: Hashable) -> Tensor:
        place = self._places[key]
        return place.tier.get(place)

    def __delitem__(self, key: Hashable) -> None:
        self._free(self._places.pop(key))

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> StreamStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget all tensors, give the memory back and remove the file."""
        self.clear()
        for tier in (self._device, self._host, self._file):
            tier.close()

    @property
    def device_used(self) -> int:
        """Bytes of the tensors on the device."""
        return self._device.used

    @property
    def host_used(self) -> int:
        """Bytes of the tensors in host memory."""
        return self._host.used

    @property
    def file_used(self) -> int:
        """Bytes of the tensors in the file."""
        return self._file.used

    @property
    def file_peak(self) -> int:
        """Largest size that the file had."""
        return self._file.peak

    def _free(self, place: _Place) -> None:
        place.tier.free(place)
        place.tier.used -= place.num_bytes


def _has_own_memory(device: torch.device) -> bool:
    return device.type != "cpu"


class _Kept:
    """Tensors as they are."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    def has_room(self, num_bytes: int) -> bool:
        return self.used + num_bytes <= self.limit

    def put(self, tensor: Tensor) -> Tensor:
        is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)

    def get(self, place: _Place) -> Tensor:
        return place.slot

    def free(self, place: _Place) -> None: ...

    def close(self) -> None: ...


class _Slots:
    """Free places by their size, for the next tensor of that size."""

    def __init__(self) -> None:
        self.used = 0
        self.free_slots: dict[int, list[Any]] = defaultdict(list)

    def free(self, place: _Place) -> None:
        self.free_slots[place.num_bytes].append(place.slot)

    def slot(self, num_bytes: int, make: Callable[[int], Any]) -> Any:
        """Return a free place, or make one."""
        same = self.free_slots[num_bytes]
        return same.pop() if same else make(num_bytes)


class _Copied(_Slots):
    """Copies in host memory, which is page-locked for CUDA: once for each place, however often it is reused."""

    def __init__(self, limit: int, device: torch.device) -> None:
        super().__init__()
        self.limit, self.device, self.taken = limit, device, 0
        self.queued = device.type == "cuda"  # copies wait for each other in the stream, not here

    def has_room(self, num_bytes: int) -> bool:
        return self.used + num_bytes <= self.limit

    def put(self, tensor: Tensor) -> Tensor:
        buffer = self.slot(tensor.nbytes, self._take)
        buffer.copy_(_bytes_of(tensor), non_blocking=self.queued)
        return buffer

    def get(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype, device=self.device)
        _bytes_of(tensor).copy_(place.slot, non_blocking=self.queued)
        return tensor

    def close(self) -> None:
        self.free_slots.clear()
        self.taken = 0

    def _take(self, num_bytes: int) -> Tensor:
        while self.taken + num_bytes > self.limit:  # by places of other sizes, some of them free
            size = next(size for size, slots in self.free_slots.items() if slots and size)
            self.free_slots[size].pop()
            self.taken -= size
        self.taken += num_bytes
        return host_buffer(num_bytes, self.device)


class _Filed(_Slots):
    """Bytes in a file without a name."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__()
        self.folder, self.device = folder, device
        self.file: Any = None
        self.size = self.peak = 0

    def has_room(self, _num_bytes: int) -> bool:
        return True

    def put(self, tensor: Tensor) -> int:
        begin = self.slot(tensor.nbytes, self._grow)
        rest = _bytes_of(tensor.cpu()).numpy().data
        try:
            self.file.seek(begin)
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.free_slots[tensor.nbytes].append(begin)
            raise self._refusal(error, tensor.nbytes) from error
        return begin

    def get(self, place: _Place) -> Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        rest = _bytes_of(tensor).numpy().data
        self.file.seek(place.slot)
        while rest:
            num_read = self.file.readinto(rest)
            assert num_read, "the file has no name, so nobody else can shorten it"
            rest = rest[num_read:]
        return tensor.to(self.device)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file, self.size = None, 0
        self.free_slots.clear()

    def _grow(self, num_bytes: int) -> int:
        try:
            if self.file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115, open for many calls
            if self.used == 0:  # all places are free, and of other sizes
                self.free_slots.clear()
                self.file.truncate(0)
                self.size = 0
            if num_bytes:
                reserve(self.file.fileno(), self.size, num_bytes)
        except OSError as error:
            raise self._refusal(error, num_bytes) from error
        begin = self.size
        self.size += num_bytes
        self.peak = max(self.peak, self.size)
        return begin

    def _refusal(self, error: OSError, num_bytes: int) -> Exception:
        if error.errno not in FULL:
            return error
        free = shutil.disk_usage(self.folder).free
        return UserError(
            f"no space left for hidden states in {self.folder}: {num_bytes / 2**20:.1f} MiB needed beside"
            f" {self.used / 2**20:.1f} in its file, {free / 2**20:.1f} free"
            " - free some, choose another --out, or allow them more memory (search.stream_gib)"
        )


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: a view, where its numbers lie side by side."""
    return tensor.reshape(-1).view(torch.uint8)
