"""Read many tensors from files into one buffer, with threads, and bring them to the device as they come.

Files are read, never mapped: mapped pages would count as memory of the process. On CUDA the buffer is page-locked and
each piece goes on to the device, on a stream of its own, while the next is read.

    part, reader = Part(stored), Reader(device)
    sent = reader.send_for(part, lambda: reader.buffer(part.buffer_bytes))
    tensors = part.views(reader.received(sent).place)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from layerscalpel.errors import UserError
from layerscalpel.memory import host_buffer
from layerscalpel.shards import Stored

READERS = 8
"""Threads: one alone copies 5 GB a second out of the system's cache, less than a fast disk gives."""
PIECE_BYTES = 1 << 24
ALIGNMENT = 256
"""Of every tensor in a buffer, at least what torch gives its own: kernels may choose by it."""
FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls them."""


class Part:
    """Some tensors in files, under the names that the model's files give them, and their places in a buffer."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        """Lay them out.

        Raises:
            UserError: one is stored in a format that is none of ours.
        """
        if other := next((tensor for tensor in tensors.values() if tensor.dtype not in FORMATS), None):
            raise UserError(
                f"tensor {other.name} of {other.file} is stored as {other.dtype} - allowed: {', '.join(FORMATS)}"
                " - load and save the model with transformers first"
            )
        self.tensors = tensors
        sizes = [-(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
        *begins, self.buffer_bytes = accumulate(sizes, initial=0)
        self.begins = dict(zip(tensors, begins, strict=True))

    def num_bytes(self) -> int:
        """Return the bytes of the tensors in their files."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors in a buffer that holds their bytes."""
        found = {}
        for name, tensor in self.tensors.items():
            raw = buffer[self.begins[name] : self.begins[name] + tensor.num_bytes]
            found[name] = raw.view(FORMATS[tensor.dtype]).reshape(tensor.shape)
        return found

    def pieces(self) -> Iterator[tuple[Path, int, slice]]:
        """Yield (file, first byte in it, place in the buffer) of stretches that threads read by themselves."""
        for name, tensor in self.tensors.items():
            for low in range(0, tensor.num_bytes, PIECE_BYTES):
                high = min(low + PIECE_BYTES, tensor.num_bytes)
                yield tensor.file, tensor.begin + low, slice(self.begins[name] + low, self.begins[name] + high)


class Arriving(NamedTuple):
    """A part on its way."""

    host: Tensor
    """Its bytes, when they were read."""
    place: Tensor
    """Its bytes on the device, later still."""
    reads: list[Future[None]]


class Reader:
    """Threads that read parts, and the stream by which these go to the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.threads = ThreadPoolExecutor(READERS, thread_name_prefix="layer-reader")

    def buffer(self, num_bytes: int) -> Tensor:
        """Return host memory that the device copies from fast."""
        return host_buffer(num_bytes, self.device)

    def send_for(self, part: Part, host: Callable[[], Tensor], *, is_read: bool = False) -> Future[Arriving]:
        """Start to bring a part to the device; on a CPU it stays in the host buffer.

        Args:
            part: what to bring.
            host: gives a buffer of part.buffer_bytes or more, left alone until the part is received; a thread asks,
                since memory takes time to make.
            is_read: whether that buffer holds the part already.
        """
        return self.threads.submit(self._start, part, host, is_read)

    def _start(self, part: Part, host: Callable[[], Tensor], is_read: bool) -> Arriving:
        source = host()[: part.buffer_bytes]
        with self._on_stream():
            place = source if self.device.type == "cpu" else torch.empty_like(source, device=self.device)
        pieces = () if is_read else part.pieces()
        if is_read and place is not source:
            self._copy(source, place)
        return Arriving(source, place, [self.threads.submit(self._bring, source, place, *piece) for piece in pieces])

    def _bring(self, source: Tensor, place: Tensor, file: Path, begin: int, within: slice) -> None:
        read_into(source[within], file, begin)
        if place is not source:
            self._copy(source[within], place[within])

    def _copy(self, source: Tensor, place: Tensor) -> None:
        with self._on_stream():
            place.copy_(source, non_blocking=self.stream is not None)

    def received(self, sent: Future[Arriving]) -> Arriving:
        """Wait until a part is there.

        Raises:
            UserError: a file cannot be read, or ends too early.
        """
        try:
            for read in sent.result().reads:
                read.result()
        except BaseException:
            self.call_off(sent)
            raise
        if self.stream is not None:
            self.stream.synchronize()
        return sent.result()

    def call_off(self, sent: Future[Arriving]) -> None:
        """Forget a part that is on its way; afterwards nobody writes into its buffers."""
        if sent.exception() is None:
            reads = sent.result().reads
            for read in reads:
                read.cancel()
            wait(reads)
            if self.stream is not None:
                self.stream.synchronize()

    def wait_for_compute(self) -> None:
        """Wait until the device has computed what it was told to on this thread's stream."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def wait_for_device(self) -> None:
        """Wait for all that the device was told."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


def read_into(buffer: Tensor, file: Path, begin: int) -> None:
    """Fill a buffer of bytes with those of a file that start at `begin`.

    Raises:
        UserError: the file cannot be read, or ends too early.
    """
    rest = buffer.numpy().data
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while rest:
                num_read = stream.readinto(rest)
                if not num_read:
                    raise UserError(f"file {file} ends too early - it was changed while it was read")
                rest = rest[num_read:]
    except OSError as error:
        raise UserError(
            f"file {file} cannot be read: {error.strerror} - it was there before; check the disk"
        ) from error
