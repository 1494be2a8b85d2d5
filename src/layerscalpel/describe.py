"""Describe a model without reading its weights: where its layers are, what can be cut, what memory each stage needs.

found = describe("model/", num_removed=6)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from torch import nn

from layerscalpel.decoder import num_parameters, weight_bytes
from layerscalpel.errors import UserError
from layerscalpel.layers import find_layer_list
from layerscalpel.needs import memory_needed
from layerscalpel.origin import DTYPES, auto_class, checkpoint_folder, peek, read_config, skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.quantised import why_not_run
from layerscalpel.segment import Segment
from layerscalpel.settings import TargetSettings
from layerscalpel.shards import read_weights
from layerscalpel.targets import num_removed_of
from layerscalpel.traces import text_part


def describe(
    name: str, num_removed: int | None = None, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> dict[str, Any]:
    """Return what can be told of a model without its weights.

    Args:
        name: hub id, checkpoint folder, .gguf file, or `demo`.
        num_removed: n, for which every place of a cut is tried; None for a fifth of the layers.
        trust_remote_code: run code that comes with the checkpoint.
        allow_pickle: accept weights in .bin files.

    Raises:
        UserError: as `peek`; also when fewer than two layers would stay.
    """
    origin = peek(name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, allow_quantised=True)
    config = read_config(origin)
    model = skeleton(config, trust_remote_code=trust_remote_code)
    path, layers = find_layer_list(model)
    sizes = [num_parameters(layer) for layer in layers]
    kinds = Counter(type(layer).__name__ for layer in layers)
    found = {
        "name": name,
        "class": type(model).__name__,
        "loaded_by": auto_class(config).__name__,
        "layers": f"{len(layers)} at {path}: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}",
        "num_layers": len(layers),
        "parameters": num_parameters(model),
        "parameters_per_layer": sizes[0] if len(set(sizes)) == 1 else sizes,
        "dtype": origin.dtype,
        "quantised": origin.quantised,
        "quantised_limit": why_not_run(config),
        "bytes": weight_bytes(model, origin.dtype),
        "bytes_per_layer": max(sizes) * DTYPES[origin.dtype].itemsize,
        "max_tokens": origin.max_tokens,
        "other_parts": _other_parts(model, path, config),
    }
    if origin.kind == "folder" and not origin.pickled:
        weights = read_weights(checkpoint_folder(origin) or name)
        found |= {"file_bytes": weights.num_bytes(), "shards": len(weights.metadata)}
    n = num_removed_of(TargetSettings(layers=num_removed), len(layers))
    return found | _places(model, n, len(layers)) | {"memory_bytes": memory_needed(model, sizes, origin.dtype)}


def _other_parts(model: nn.Module, path: str, config: Any) -> list[str]:
    """Return the parts of a multimodal model that a cut carries along."""
    if text_part(config) is config:
        return []
    above = path.split(".")[:2]
    return [name for name, part in model.get_submodule(above[0]).named_children() if name != above[1]]


def _places(model: Any, num_removed: int, num_layers: int) -> dict[str, Any]:
    """Try a cut of n layers at every start: which config fields change, and which starts are refused and why."""
    changes: dict[str, str] = {}
    refused: dict[str, list[int]] = defaultdict(list)
    starts = range(num_layers - num_removed + 1)
    for start in starts:
        try:
            changes |= plan_cut(model, Segment(start, start + num_removed, num_layers)).traces
        except UserError as error:
            refused[str(error)].append(start)
    gone = {start for group in refused.values() for start in group}
    return {
        "tried_layers": num_removed,
        "config_fields_a_cut_changes": sorted(changes),
        "sound_starts": [start for start in starts if start not in gone],
        "refused_starts": [{"starts": group, "reason": reason} for reason, group in refused.items()],
    }
