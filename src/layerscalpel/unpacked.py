"""Save a healed model over a copy of the quantised checkpoint that it came from.

Frozen layers keep their packed tensors, byte for byte. Trained ones are stored plain: `weight` in the place of what was
packed, and their names on the list of those that the library leaves alone, so that it loads the folder as it would load
any other. Other tensors that changed, as norms, are replaced.

    save_unpacked(child.model, cut_folder, healed_folder, "bfloat16")  # ["model.layers.12.mlp.down_proj", ...]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from layerscalpel.decoder import fresh_folder, require_room
from layerscalpel.errors import UserError
from layerscalpel.origin import DTYPES
from layerscalpel.overwrite import copy_checkpoint
from layerscalpel.packedlinear import is_packed, unpacked_names
from layerscalpel.rundir import write_json
from layerscalpel.shards import INDEX, Stored, Weights, read_weights

LEFT_ALONE = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules"}
"""{method: the list of its config that names the modules that stay plain}."""


def save_unpacked(model: Any, before: Path, folder: Path, dtype: str) -> list[str]:
    """Write a checkpoint in which the layers that were unpacked are plain; return their names.

    Args:
        model: loaded from `before`, layers of it unpacked (packedlinear.py) and trained.
        before: the quantised checkpoint; its tokenizer and what else is there are the new one's, too.
        folder: must not exist, or be empty.
        dtype: number format of the layers that were packed.

    Raises:
        UserError: there is not enough room, or a trained tensor is not in the files under its name.
    """
    names, weights = unpacked_names(model), read_weights(before)
    plain = {f"{name}.weight": model.get_submodule(name).weight.detach().to(DTYPES[dtype]) for name in names}
    with fresh_folder(folder) as draft:
        require_room(draft.parent, weights.num_bytes() + sum(tensor.nbytes for tensor in plain.values()))
        copy_checkpoint(before, draft)
        _rewrite(read_weights(draft), names, plain | _changed(model, weights, names))
        _leave_alone(draft / "config.json", model, names)
    return names


def _changed(model: Any, weights: Weights, unpacked: list[str]) -> dict[str, Tensor]:
    """Return {name: value as the files keep it} of the plain tensors that are not what the files hold."""
    packed = [f"{name}." for name, module in model.named_modules() if is_packed(module)]
    own = {f"{name}.weight" for name in unpacked}
    changed = {}
    for name, parameter in model.named_parameters():
        if name in own or name.startswith(tuple(packed)):
            continue
        if name not in weights.tensors:
            raise UserError(
                f"transformers names {name} of {type(model).__name__} otherwise than {weights.folder}"
                " - load and save the unquantised model with transformers, and quantise that"
            )
        before = _read(weights.tensors[name])
        if not torch.equal(before.to(parameter), parameter):
            changed[name] = parameter.detach().to("cpu", before.dtype)
    return changed


def _read(stored: Stored) -> Tensor:
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name)


def _rewrite(weights: Weights, unpacked: list[str], new: dict[str, Tensor]) -> None:
    """Write the shards of a folder anew, each with what is new in the place of what it had."""
    gone = {f"{name}." for name in unpacked}
    index: dict[str, str] = {}
    total = 0
    for shard, words in weights.metadata.items():
        held = [tensor for tensor in weights.tensors.values() if tensor.file.name == shard]
        tensors = {}
        for stored in held:
            owner = f"{_layer_of(stored.name)}."
            if owner in gone and not stored.name.endswith(".bias"):
                tensors[f"{owner}weight"] = new[f"{owner}weight"].cpu().contiguous()
            else:
                tensors[stored.name] = new[stored.name] if stored.name in new else _read(stored)
        draft = weights.folder / f".{shard}"
        save_file(tensors, draft, metadata={"format": "pt"} | words)
        draft.replace(weights.folder / shard)
        index |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (weights.folder / INDEX).exists():
        write_json(
            weights.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        )


def _layer_of(name: str) -> str:
    """Return the module that a tensor belongs to; bitsandbytes' names go on behind `weight`."""
    return name.partition(".weight")[0] if ".weight" in name else name.rpartition(".")[0]


def _leave_alone(path: Path, model: Any, names: list[str]) -> None:
    """Have a config say that these layers are plain."""
    config = json.loads(path.read_text(encoding="utf-8"))
    settings = next(c["quantization_config"] for c in (config, *config.values()) if "quantization_config" in (c or ()))
    listed = LEFT_ALONE[settings["quant_method"]]
    others: list[str] = settings.get(listed) or []
    if listed == "llm_int8_skip_modules" and not others:  # without a list the library leaves the head alone
        others = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in names]
    settings[listed] = [*others, *names]
    write_json(path, config)
