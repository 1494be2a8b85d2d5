"""Round to nearest: every weight to the closest point of its group's grid, without any text. The floor to beat.

The grid is that of compressed-tensors, which also packs the numbers, in its standard form `pack-quantized`, and which
transformers and vLLM read. Scales are stored in the number format of the checkpoint and rounded to it before the
weights are, so that a weight is the closest to what will be read back. Tensors that stay are copied byte by byte.

Dimensions: R rows, C columns, G groups of a row.

    write(Path("healed"), Path("small"), tokens_NT, scheme)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from layerscalpel.quantfolder import grid_of, packed, require_form, write_packed
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings


def needs(settings: QuantizeSettings) -> None:
    """Refuse what cannot be written here, before anything is loaded.

    Raises:
        UserError: the library is missing, or what would be written could not be read.
    """
    require_form(settings)


def write(source: Path, out: Path, tokens_NT: Tensor, scheme: Scheme) -> None:
    """Write a plain checkpoint with its linear layers rounded.

    Args:
        source: folder of the plain checkpoint.
        out: an empty folder, or none yet.
        tokens_NT: not read.
        scheme: what is rounded, and how finely.

    Raises:
        UserError: a linear layer that the scheme names is not stored under its own name.
    """
    write_packed(source, out, scheme, lambda name, weight_RC: rounded(weight_RC, grid_of(scheme, name)))


def rounded(weight_RC: Tensor, arguments: Any) -> dict[str, Tensor]:
    """Return a weight's packed numbers, scales, zeros where they have any, and shape, as stored."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups_RGS = weight_RC.float().unflatten(1, (-1, arguments.group_size))
    scale_RG, zero_RG = calculate_qparams(groups_RGS.amin(2), groups_RGS.amax(2), arguments)
    return packed(weight_RC.float(), scale_RG.to(weight_RC.dtype), zero_RG, arguments)
