"""Models larger than memory: all but the layers is in memory, and the layers come in from their files one by one.

The model is the family's own class, built on no memory. Two layers are there at most, the one that computes and the
next. What layers are given and return is seen on a tiny twin, since the model's own cannot run when it is looked at.

    loaded, decoder = offloaded_decoder(peek("folder"))
    for i in decoder.resident():
        decoder.layers[i]  # its weights are there until the next number is asked for
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from layerscalpel.decoder import Loaded, choose_device, choose_dtype, load_tokenizer, require_all_weights
from layerscalpel.errors import UserError
from layerscalpel.feed import LayerFeed, Loader
from layerscalpel.layers import Decoder, find_layer_list
from layerscalpel.origin import Origin, checkpoint_folder, read_config, skeleton
from layerscalpel.probe import find_layers
from layerscalpel.quiet import quiet_transformers, readable
from layerscalpel.reader import Reader
from layerscalpel.shards import Weights, read_weights
from layerscalpel.twin import twin_model


def offloaded_decoder(
    origin: Origin,
    *,
    device: str = "auto",
    dtype: str = "auto",
    keep: Literal["cpu", "disk"] = "disk",
    weights: Weights | None = None,
) -> tuple[Loaded, Decoder]:
    """Load a model without its layers, which `Decoder.resident` (a LayerFeed) brings in one by one.

    Args:
        origin: a safetensors checkpoint that is not quantised.
        device: as load_decoder.
        dtype: as load_decoder.
        keep: `cpu` reads the files in the first pass only and keeps what it read in host memory, `disk` in every pass.
        weights: other tensors under the checkpoint's names; None for those in its files.

    Raises:
        UserError: another kind of model, or files that lack a tensor, or a device that is not there.
    """
    place_to = choose_device(device)
    if place_to.type == "cuda":
        place_to = torch.device("cuda", torch.cuda.current_device())  # threads have a current device of their own
    compute = choose_dtype(dtype, place_to, origin.dtype)
    weights = weights or _weights_of(origin)
    config = read_config(origin)
    config.dtype = compute
    model = skeleton(config, trust_remote_code=origin.trust_remote_code)
    path, _ = find_layer_list(model)
    _refuse_shared(model, path)
    like = _rehearsed(origin, config)
    loader = Loader(model, compute, Reader(place_to))
    outside, *inside = loader.parts(path, weights)
    feed = LayerFeed(loader, path, inside, keep)
    loader.load_outside(path, outside)
    decoder = dataclasses.replace(find_layers(model, like=like), resident=feed)
    with quiet_transformers(), readable(f"model {origin.name}"):
        tokenizer = load_tokenizer(origin.place, {"trust_remote_code": origin.trust_remote_code})
    return Loaded(model, tokenizer, origin), decoder


def _weights_of(origin: Origin) -> Weights:
    """Return the tensors of a checkpoint whose layers can be read from its files, which hold all of them."""
    folder = checkpoint_folder(origin)
    if folder is None or origin.quantised:
        what = "quantised" if origin.quantised else "a GGUF" if folder is None and not origin.pickled else "pickled"
        raise UserError(
            f"model {origin.name} is {what}: its layers cannot be left on disk - allowed: a safetensors checkpoint that"
            " is not quantised - save it as one with transformers, or do without --offload"
        )
    weights = read_weights(folder)
    require_all_weights(origin)
    return weights


def _rehearsed(origin: Origin, config: Any) -> Decoder:
    """Return a tiny decoder of the same layers, which shows what they are given and return."""
    try:
        return find_layers(twin_model(config))
    except UserError as error:
        reason = str(error).partition(" - ")[0]
        raise UserError(
            f"the layers of model {origin.name} cannot be left on disk: {reason} - do without --offload"
        ) from error


def _refuse_shared(model: PreTrainedModel, path: str) -> None:
    pairs = model.all_tied_weights_keys.items()
    if shared := next((pair for pair in pairs if any(name.startswith(f"{path}.") for name in pair)), None):
        raise UserError(
            f"layers of {type(model).__name__} share weights ({' and '.join(shared)}), so that none can be left on disk"
            " by itself - do without --offload"
        )
