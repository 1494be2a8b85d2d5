"""Save a trained model over a copy of the checkpoint that it came from: only the tensors that changed are written.

All others keep their bytes: a tensor that was rounded when the model was loaded, as float32 weights are on a GPU, and
was not trained, stays what it was. What changed is stored in the number format that the file has for it.

    save_changed(child.model, cut_folder, healed_folder, "bfloat16")  # ["model.layers.12.mlp.down_proj.weight", ...]
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from layerscalpel.decoder import fresh_folder, require_room, save_decoder
from layerscalpel.history import PROVENANCE_FILE
from layerscalpel.progress import say
from layerscalpel.shards import Stored, read_weights


def save_changed(model: PreTrainedModel, before: Path, folder: Path, dtype: str) -> list[str] | None:
    """Write a checkpoint that differs from another in the tensors that changed; return their names.

    Where transformers writes this family's tensors under other names than the checkpoint has, all are written anew,
    that is said, and None returned.

    Args:
        model: loaded from `before`, in whatever number format, and trained.
        before: the checkpoint folder; its config and tokenizer are the new one's, too.
        folder: must not exist, or be empty.
        dtype: number format of tensors that are all written anew.

    Raises:
        UserError: there is not enough room.
    """
    with fresh_folder(folder) as draft:
        own = draft.with_name(f"{draft.name}.weights")
        require_room(draft.parent, read_weights(before).num_bytes())
        copy_checkpoint(before, draft)
        try:
            save_decoder(model, None, own)
            if _same_names(own, draft):
                return _overwrite(own, draft)
        finally:
            shutil.rmtree(own, ignore_errors=True)
    say(
        f"transformers names the tensors of {type(model).__name__} otherwise than this checkpoint: all are written anew"
    )
    _write_anew(model, folder, dtype)
    return None


def _same_names(own: Path, folder: Path) -> bool:
    """Tell whether a checkpoint has all tensors of a saved model, in their shapes; it may have tied ones twice."""
    there, now = read_weights(folder).tensors, read_weights(own).tensors
    return all(name in there and there[name].shape == tensor.shape for name, tensor in now.items())


def _write_anew(model: PreTrainedModel, folder: Path, dtype: str) -> None:
    """Replace the weights of a folder."""
    own = folder.with_name(f".{folder.name}.weights")
    save_decoder(model, None, own, dtype=dtype)
    for passed in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        passed.unlink()
    for path in own.iterdir():
        path.replace(folder / path.name)
    own.rmdir()


def copy_checkpoint(before: Path, folder: Path) -> None:
    """Copy a checkpoint, but not what it says of its own cut."""
    shutil.copytree(before, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PROVENANCE_FILE))


def _overwrite(own: Path, folder: Path) -> list[str]:
    """Write what a saved model has otherwise into the files of a folder."""
    there, changed = read_weights(folder).tensors, []
    for name, now in _tensors(own):
        stored = there[name]
        with safe_open(stored.file, framework="pt") as file:
            before = file.get_tensor(name)
        if not torch.equal(before.to(now.dtype), now):
            _write(stored, now.to(before.dtype))
            changed.append(name)
    return changed


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted({stored.file for stored in read_weights(folder).tensors.values()}):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                yield name, opened.get_tensor(name)


def _write(stored: Stored, tensor: Tensor) -> None:
    """Write a tensor over the bytes of the one that is there."""
    data: Any = tensor.flatten().view(torch.uint8).numpy()
    assert data.nbytes == stored.num_bytes, f"{stored.name} keeps its size"
    with stored.file.open("r+b") as file:
        file.seek(stored.begin)
        file.write(data)
