"""Safetensors files as they lie on disk: read their headers, check them, copy tensors into new ones.

A tensor's bytes never pass through a number format: headers are read and written anew, the bytes between are copied in
pieces of BUFFER_BYTES. So memory does not grow with the checkpoint, and every encoding (bf16, fp8, packed 4 bit) comes
through unchanged. Shards keep their order; one that loses all its tensors is left out.

    weights = read_weights(folder)
    copy_weights(weights, {"model.layers.19.mlp.down_proj.weight": "model.layers.13.mlp.down_proj.weight"}, out)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from layerscalpel.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
BUFFER_BYTES = 1 << 19
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
"""What systems and file systems answer that cannot copy between two files by themselves."""
HEADER_ALIGNMENT = 8
"""Safetensors pads its header with spaces so that the tensors begin at a multiple of this."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    name: str
    dtype: str
    """As the file spells it: BF16, F32, U8, ..."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """First byte, counted from the start of the file."""
    num_bytes: int


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint folder."""

    folder: Path
    tensors: dict[str, Stored]
    metadata: dict[str, dict[str, str]]
    """Shard name to the words in its header; its keys are all shards in order."""

    def num_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the safetensors files that transformers would read, each checked to be whole, and {tensor: shard}.

    The latter is what an index says, and empty where a single file needs none.

    Raises:
        UserError: none, pickles only, a damaged file, or an index that is damaged or names shards that are not there.
    """
    _refuse_other_names(folder)
    weight_map: dict[str, str] = {}
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = _weight_map(folder)
        files = [folder / shard for shard in sorted(set(weight_map.values()))]
    else:
        pickled = any((folder / name).is_file() for name in PICKLES)
        found = (
            "only pickled weights (.bin), which can run code - pass --allow-pickle to load their tensors"
            if pickled
            else f"no {SINGLE} and no {INDEX} - give a Hugging Face checkpoint folder"
        )
        raise UserError(f"folder {folder} holds {found}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"file {file} is truncated or damaged ({error}) - fetch it again") from error
    return files, weight_map


def _refuse_other_names(folder: Path) -> None:
    """Refuse a config that has transformers read its weights from elsewhere."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said where the config is read
        return
    if isinstance(config, dict) and (other := config.get("transformers_weights")):
        raise UserError(
            f"config.json of {folder} has its weights in {other!r} (transformers_weights) - name that file {SINGLE} and"
            " remove the field"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Return {tensor: shard} of an index whose shards all lie in the folder."""
    path = folder / INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        shards = set(weight_map.values())
        if not shards:
            raise ValueError("it names no tensor")
        plain = all(
            isinstance(shard, str) and Path(shard).name == shard and shard not in ("", "..") for shard in shards
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"index {path} cannot be read: {error} - fetch it again") from error
    if not plain:
        outside = sorted(str(shard) for shard in shards if Path(str(shard)).name != shard or shard in ("", ".."))
        raise UserError(f"index {path} names a shard outside its folder: {outside[0]!r} - do not use this checkpoint")
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise UserError(f"shard {shard} named in {INDEX} is missing in {folder} - fetch the checkpoint again")
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in it twice")
    return found


def read_weights(folder: str | Path) -> Weights:
    """Read every header of a checkpoint folder; no tensor is read.

    Raises:
        UserError: none, pickles only, a damaged file, an index that is damaged, names shards that are not there or
            disagrees with those that are, or a tensor that is stored twice.
    """
    folder = Path(folder)
    files, weight_map = _weight_files(folder)
    tensors: dict[str, Stored] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in files:
        words, found = _read_header(file)
        metadata[file.name] = words
        for tensor in found:
            if twin := tensors.get(tensor.name):
                raise UserError(f"tensor {tensor.name} is in {twin.file.name} and in {file.name} - keep one of them")
            tensors[tensor.name] = tensor
    if weight_map:
        stored = {name: tensor.file.name for name, tensor in tensors.items()}
        if wrong := sorted({name for name, _ in weight_map.items() ^ stored.items()}):
            raise UserError(
                f"index {folder / INDEX} disagrees with its shards about {len(wrong)} tensors ({wrong[0]}, ...)"
                " - fetch the checkpoint again"
            )
    return Weights(folder, tensors, metadata)


def _read_header(file: Path) -> tuple[dict[str, str], list[Stored]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        except ValueError as error:
            raise UserError(f"file {file} has a damaged header: {error} - fetch it again") from error
    words = header.pop("__metadata__", {})
    found = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found.append(Stored(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + begin, end - begin))
    return words, found


def copy_weights(weights: Weights, renamed: dict[str, str], out: Path) -> Weights:
    """Write the tensors named in `renamed` (old name to new) into a folder, and return them as read back from there.

    Memory: one buffer of BUFFER_BYTES, whatever the size of a tensor.
    """
    shards: dict[str, list[Stored]] = {name: [] for name in weights.metadata}
    for tensor in sorted(weights.tensors.values(), key=lambda tensor: tensor.begin):
        if tensor.name in renamed:
            shards[tensor.file.name].append(tensor)
    shards = {name: tensors for name, tensors in shards.items() if tensors}
    index: dict[str, str] = {}
    for number, (name, tensors) in enumerate(shards.items(), start=1):
        target = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(out / target, tensors, renamed, weights.metadata[name])
        index |= {renamed[tensor.name]: target for tensor in tensors}
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensors in shards.values() for tensor in tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
        (out / INDEX).write_text(text + "\n", encoding="utf-8")
    return read_weights(out)


def _write_shard(path: Path, tensors: list[Stored], renamed: dict[str, str], words: dict[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | words}
    offset = 0
    for tensor in tensors:
        ends = [offset, offset + tensor.num_bytes]
        header[renamed[tensor.name]] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with tensors[0].file.open("rb", buffering=0) as source, path.open("wb", buffering=0) as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for begin, num_bytes in _runs(tensors):
            _copy(source, target, begin, num_bytes)


def _runs(tensors: list[Stored]) -> Iterator[tuple[int, int]]:
    """Join tensors that lie side by side into (begin, num_bytes)."""
    begin, end = tensors[0].begin, tensors[0].begin
    for tensor in tensors:
        if tensor.begin != end:
            yield begin, end - begin
            begin = tensor.begin
        end = tensor.begin + tensor.num_bytes
    yield begin, end - begin


def _copy(source: Any, target: Any, begin: int, num_bytes: int) -> None:
    """Append a stretch of a file to another: within the kernel where the system can, else through a buffer."""
    while num_bytes and hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source.fileno(), target.fileno(), num_bytes, offset_src=begin)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            break
        if not done:
            break
        begin, num_bytes = begin + done, num_bytes - done
    for piece in _pieces(source, begin, num_bytes):
        while piece:  # a raw write may stop short, as where a disk gets full; the next one says why
            piece = piece[target.write(piece) :]


def _pieces(stream: Any, begin: int, num_bytes: int) -> Iterator[memoryview]:
    """Read a stretch of a file through one buffer."""
    buffer = memoryview(bytearray(min(BUFFER_BYTES, num_bytes)))
    stream.seek(begin)
    while num_bytes:
        got = stream.readinto(buffer[: min(len(buffer), num_bytes)])
        if not got:
            raise UserError(f"file {stream.name} ends too early - it was changed while it was read")
        yield buffer[:got]
        num_bytes -= got


def digest(tensor: Stored) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode())
    with tensor.file.open("rb", buffering=0) as stream:
        for piece in _pieces(stream, tensor.begin, tensor.num_bytes):
            found.update(piece)
    return found.hexdigest()


def digests(tensors: Iterable[Stored]) -> list[str]:
    """Return the sha256 of many tensors, in their order; hashing leaves the interpreter, so threads help."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(digest, tensors))
