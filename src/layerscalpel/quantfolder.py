"""The form in which quantised weights are stored: `pack-quantized` of compressed-tensors, in a folder as it was before.

A back end says what becomes of each linear layer: whole numbers, scales, zeros. All else is copied byte by byte, shard
by shard. transformers and vLLM read the form.

Dimensions: R rows, C columns, G groups of a row.

    write_packed(source, out, scheme, pack)
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerscalpel.carried import carry_files
from layerscalpel.errors import UserError
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings
from layerscalpel.shards import INDEX, SINGLE, Weights, read_weights

FORM: Any = "pack-quantized"
Pack = Callable[[str, Tensor], dict[str, Tensor]]
"""(name of a linear layer, its weight [R, C]) -> the tensors stored in its place, by the last part of their names."""


def require_form(settings: QuantizeSettings) -> None:
    """Refuse what cannot be written here, before anything is loaded.

    Raises:
        UserError: the library is missing, or what would be written could not be read.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UserError("quantising needs compressed-tensors - pip install layerscalpel[quant]")
    if settings.seam_bits == 8 > settings.bits and not settings.symmetric:
        raise UserError(
            "transformers reads groups with zeros of their own in one number of bits only, so quantize.symmetric=false"
            " cannot go with quantize.seam_bits=8 - allowed: seam_bits 0 or 16"
        )


def write_packed(source: Path, out: Path, scheme: Scheme, pack: Pack) -> None:
    """Write a checkpoint whose linear layers are stored packed.

    Args:
        source: folder of the plain checkpoint.
        out: an empty folder, or none yet.
        scheme: which are.
        pack: says what each becomes.

    Raises:
        UserError: a linear layer that the scheme names is not stored under its own name.
    """
    weights = read_weights(source)
    if absent := [name for name in scheme.converted if f"{name}.weight" not in weights.tensors]:
        raise UserError(
            f"{len(absent)} linear layers of {source} are not stored under their own names ({absent[0]}, ...)"
            " - save the model with the transformers in use, then quantise that"
        )
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _settings(scheme)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_shards(weights, out, scheme, pack)
    carry_files(source, out)


def _write_shards(weights: Weights, out: Path, scheme: Scheme, pack: Pack) -> None:
    """Write the shards of a checkpoint one after the other."""
    index: dict[str, str] = {}
    total = 0
    for shard, words in weights.metadata.items():
        target = SINGLE if len(weights.metadata) == 1 else shard
        found: dict[str, Tensor] = {}
        with safe_open(weights.folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module in scheme.converted:
                    parts = pack(module, file.get_tensor(name))
                    found |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
                else:
                    found[name] = file.get_tensor(name)
        save_file(found, out / target, metadata={"format": "pt"} | words)
        index |= dict.fromkeys(found, target)
        total += sum(tensor.nbytes for tensor in found.values())
    if len(weights.metadata) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
        (out / INDEX).write_text(text + "\n", encoding="utf-8")


def packed(weight_RC: Tensor, scale_RG: Tensor, zero_RG: Tensor, grid: Any) -> dict[str, Tensor]:
    """Return what is stored of a weight that lies on its grid: packed numbers, scales, zeros where it has any, shape.

    Args:
        weight_RC: float32.
        scale_RG: as it is stored.
        zero_RG: whole numbers.
        grid: of `grid_of`.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    plain = {"weight": weight_RC, "weight_scale": scale_RG.float(), "weight_zero_point": zero_RG}
    packer: Any = BaseCompressor.get_value_from_registry(FORM)
    found: Mapping[str, Tensor] = packer.compress(plain, QuantizationScheme(targets=["Linear"], weights=grid))
    return {name: tensor.contiguous() for name, tensor in ({**found} | {"weight_scale": scale_RG}).items()}


def grid_of(scheme: Scheme, module: str | None = None) -> Any:
    """Return the library's own form of how finely a module is rounded, or the modules without bits of their own."""
    from compressed_tensors.quantization import QuantizationArgs

    bits = scheme.bits if module is None else scheme.bits_of(module)
    how: dict[str, Any] = {"num_bits": bits, "type": "int", "strategy": "group"}
    return QuantizationArgs(symmetric=scheme.symmetric, group_size=scheme.group_size, **how)


def _settings(scheme: Scheme) -> dict[str, Any]:
    """Return what stands in config.json."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    by_bits = {bits: [name for name, own in scheme.wider.items() if own == bits] for bits in scheme.wider.values()}
    chosen = [*((names, names[0]) for names in by_bits.values()), (["Linear"], None)]  # the first that fits is taken
    groups: dict[str, Any] = {
        f"group_{number}": QuantizationScheme(targets=targets, weights=grid_of(scheme, one), format=FORM)
        for number, (targets, one) in enumerate(chosen)
    }
    found = QuantizationConfig(
        config_groups=groups,
        ignore=list(scheme.left),
        quantization_status=QuantizationStatus.COMPRESSED,
        format=FORM,
    )
    plain = json.loads(found.model_dump_json(exclude={"quant_method"}))
    head = {"quant_method": "compressed-tensors", "version": compressed_tensors.__version__}
    # Where groups have zeros of their own transformers makes room for unpacked ones, which then do not fit, unless it
    # unpacks while it reads.
    return head | plain | ({} if scheme.symmetric else {"dequantize": True})
