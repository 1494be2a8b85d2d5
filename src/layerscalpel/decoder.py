"""Load any decoder-only language model and save it as a plain Hugging Face checkpoint.

A GGUF is dequantised and rounded to bfloat16: that is the number format its checkpoints are saved in, so what is
computed and what is saved are the same numbers.

    model, tokenizer, origin = load_decoder("demo")
    save_decoder(model, tokenizer, "runs/copy", dtype=origin.dtype)
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.origin import DTYPES, Origin, auto_class, checkpoint_folder, peek, read_config
from layerscalpel.packedlinear import hold, packed_parameters
from layerscalpel.quantised import not_loaded, require_runnable
from layerscalpel.quiet import quiet_transformers, readable
from layerscalpel.shards import read_weights


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer (None if the checkpoint has none) and its origin."""

    model: PreTrainedModel
    tokenizer: Any
    origin: Origin


def load_decoder(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    allow_quantised: bool = False,
    packed: bool = False,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: hub id, checkpoint folder, .gguf file, or `demo`.
        device: auto, cpu, cuda or mps.
        dtype: number format to compute in; auto is float32 on cpu and mps, the stored one on cuda.
        trust_remote_code: run code that comes with the checkpoint.
        allow_pickle: accept weights in .bin files; torch loads their tensors only.
        allow_quantised: accept a checkpoint that is quantised already, where its layers can be computed with here.
        packed: of such a one, keep packed weights packed and unpack them at each use (packedlinear.py).

    Raises:
        UserError: as `peek`; also a device that is not there.
    """
    choose_device(device)
    allowed = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    origin = peek(name, **allowed, allow_quantised=allow_quantised)
    if not origin.quantised:
        return load_origin(origin, device=device, dtype=dtype)
    require_runnable(origin.config, name)
    loaded = load_origin(origin, device=device, dtype=dtype)
    hold(loaded.model, read_weights(checkpoint_folder(origin) or name), packed=packed)
    return loaded


def load_origin(origin: Origin, *, device: str = "auto", dtype: str = "auto", **options: Any) -> Loaded:
    """Load a model that `peek` has seen; `options` go to from_pretrained."""
    place_to = choose_device(device)
    compute = choose_dtype(dtype, place_to, origin.dtype)
    with quiet_transformers(), readable(f"model {origin.name}"):
        if origin.kind == "gguf":
            model, tokenizer = _load_gguf(origin, compute)
        else:
            options |= {"dtype": compute, "trust_remote_code": origin.trust_remote_code}
            options["use_safetensors"] = not origin.pickled
            model = _with_all_weights(origin, origin.place, **options)
            tokenizer = load_tokenizer(origin.place, {"trust_remote_code": origin.trust_remote_code})
    if "device_map" not in options:
        model.to(device=place_to)
    return Loaded(model.eval(), tokenizer, origin)


def _load_gguf(origin: Origin, compute: torch.dtype) -> tuple[Any, Any]:
    place = Path(origin.place)
    options: dict[str, Any] = {"gguf_file": place.name}
    dequantised = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = _with_all_weights(origin, str(place.parent), **dequantised, **options)
    _forget_quantisation(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[origin.dtype]).to(compute)
    return model, load_tokenizer(str(place.parent), options)


def _with_all_weights(origin: Origin, where: str, **options: Any) -> Any:
    """Load a model whose every tensor comes from its files: transformers itself would fill gaps with random numbers."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = auto_class(read_config(origin)).from_pretrained(where, **options)
    except ImportError as error:
        if not origin.quantised:
            raise
        raise UserError(not_loaded(origin.config, origin.name, error)) from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if origin.pickled:
            reason = "its pickled weights are damaged or hold more than tensors - do not use them"
        elif "conversion of the weights" in str(error):  # as of a stack of experts that lacks one
            reason = "its tensors cannot be put together - fetch it again"
        else:
            raise
        raise UserError(f"model {origin.name} cannot be loaded: {reason}") from error
    model, seen = loaded
    refuse_gaps(origin.name, seen["missing_keys"], seen["mismatched_keys"])
    return model


def refuse_gaps(name: str, missing: Iterable[str], mismatched: Iterable[tuple[Any, ...]]) -> None:
    """Refuse a model whose files lack a tensor, or hold one of another shape: what transformers tells of a loading."""
    if bad := sorted({*missing, *(key for key, *_shapes in mismatched)}):
        if all(key.endswith("weight_zero_point") for key in bad):
            raise UserError(
                f"model {name} packs its zero points, which this transformers does not load packed - add"
                ' "dequantize": true to the quantization_config of its config.json'
            )
        shown = ", ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
        raise UserError(f"model {name} lacks {len(bad)} tensors of the right shape ({shown}) - fetch it again")


def require_all_weights(origin: Origin) -> None:
    """Refuse files that lack a tensor, or hold one of another shape than the config states; none is read.

    Raises:
        UserError: as `load_origin`.
    """
    options = {"device_map": {"": "meta"}, "trust_remote_code": origin.trust_remote_code, "use_safetensors": True}
    with quiet_transformers(), readable(f"model {origin.name}"):
        _with_all_weights(origin, origin.place, **options)


def _forget_quantisation(model: Any) -> None:
    """Drop the mark of the file's format: the weights are plain numbers now and are saved as such."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.name_or_path = ""


def load_tokenizer(where: str, options: dict[str, Any]) -> Any:
    """Return the tokenizer of a folder or hub model; None if a folder has none."""
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


def num_parameters(model: torch.nn.Module) -> int:
    """Return the number of parameters, tied ones counted once, packed ones as if they were not."""
    return sum(parameter.numel() for parameter in model.parameters()) + packed_parameters(model)


def stored_bytes(model: torch.nn.Module, origin: Origin) -> int:
    """Return the bytes of a model's weights: of a quantised one those in its files, else as `weight_bytes`."""
    if not origin.quantised:
        return weight_bytes(model, origin.dtype)
    return read_weights(checkpoint_folder(origin) or origin.place).num_bytes()


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
        dtype: number format of the saved weights; None keeps those that the model computes in.

    Raises:
        UserError: the folder exists already, or there is not enough room.
    """
    stored = DTYPES[dtype] if dtype else None
    with fresh_folder(Path(folder)) as draft:
        widest = stored or max((p.dtype for p in model.parameters()), key=lambda own: own.itemsize)
        require_room(draft.parent, num_parameters(model) * widest.itemsize)
        with quiet_transformers():
            _write_checkpoint(model, tokenizer, draft, stored)
    return Path(folder)


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Give a folder beside `folder` to write into, and move it there if all went well; else nothing stays.

    Raises:
        UserError: the folder exists already, or there is not enough room.
    """
    folder = folder.absolute()
    if folder.is_file() or folder.is_symlink() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"folder {folder} already holds files, or is a link - choose another or remove it")
    if not folder.name or ".." in folder.parts or folder == Path.cwd():
        raise UserError(f"{folder} can be no new folder - name one that does not exist, as --out smaller")
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)  # so that a name that cannot be written is told before the work
        yield draft
        if folder.exists():
            folder.rmdir()
        os.replace(draft, folder)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UserError(f"no space left while writing {folder} - free some or choose another --out") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_checkpoint(model: PreTrainedModel, tokenizer: Any, folder: Path, stored: torch.dtype | None) -> None:
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # some releases refuse to save flags that published models have
    try:
        with _parameters_as(model, stored) if stored else contextlib.nullcontext():
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


def require_room(folder: Path, needed: int) -> None:
    """Refuse to write `needed` bytes where they do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left for the checkpoint in {folder}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} free"
            " - free some or choose another --out"
        )
