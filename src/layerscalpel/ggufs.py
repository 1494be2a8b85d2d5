"""The types of GGUF files, and how far the perplexity of each may be from the checkpoint's before we call it broken.

`f32`, `f16`, `bf16` and `q8_0` come from llama.cpp's converter, the others from its quantising function on a file of
type f32. Blocks of 256 numbers (`*_k*`) do not fit layers whose width they do not divide: llama.cpp gives these another
type, which `stored_as` counts. Types below 3 bits that want an importance matrix are left to llama.cpp's own tools.

    type_named("q4_k_m").ftype
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gguf

from layerscalpel.errors import UserError, suggest


@dataclass(frozen=True)
class GgufType:
    """A type of file."""

    ftype: int
    """llama.cpp's number for it."""
    bits: float
    """Of a weight, about."""
    most_ratio: float
    """Perplexity over the checkpoint's that is still accepted: rounding of 16 bits, or what such a type may cost."""
    by_converter: bool = False
    """Whether the converter writes it; llama.cpp's library is needed for the others."""


TYPES: dict[str, GgufType] = {
    "f32": GgufType(0, 32, 1.002, by_converter=True),
    "f16": GgufType(1, 16, 1.002, by_converter=True),
    "bf16": GgufType(32, 16, 1.01, by_converter=True),
    "q8_0": GgufType(7, 8.5, 1.03, by_converter=True),
    "q6_k": GgufType(18, 6.6, 1.1),
    "q5_k_m": GgufType(17, 5.7, 1.2),
    "q5_k_s": GgufType(16, 5.5, 1.2),
    "q5_0": GgufType(8, 5.5, 1.2),
    "q4_k_m": GgufType(15, 4.9, 1.5),
    "q4_k_s": GgufType(14, 4.6, 1.5),
    "q4_0": GgufType(2, 4.5, 1.5),
    "q4_1": GgufType(3, 5.0, 1.5),
    "iq4_nl": GgufType(25, 4.5, 1.5),
    "iq4_xs": GgufType(30, 4.3, 1.5),
    "q3_k_l": GgufType(13, 4.3, 3.0),
    "q3_k_m": GgufType(12, 3.9, 3.0),
    "q3_k_s": GgufType(11, 3.5, 3.0),
    "q2_k": GgufType(10, 3.0, 10.0),
}
PLAIN = "f32"
"""What a file is quantised from: nothing of the checkpoint is lost in it."""


def type_named(name: str) -> GgufType:
    """Return a type.

    Raises:
        UserError: there is none of that name.
    """
    if name.lower() not in TYPES:
        raise UserError(f"there is no GGUF type '{name}'{suggest(name.lower(), TYPES)}")
    return TYPES[name.lower()]


def stored_as(file: Path) -> dict[str, int]:
    """Return {type of a tensor: how many tensors of a file have it}."""
    return dict(Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(file).tensors))


def no_gguf_of(place: Path, method: str) -> str:
    """Return why there is no GGUF of a quantised checkpoint folder, and what to do.

    Of a run that quantised its result there is one of what it was made from.
    """
    why = f"{place} is quantised ({method}), which llama.cpp's types do not keep, so there is no GGUF of it"
    run = run_of(place)
    if run and place.parent.name != "quantize":
        return f"{why}: the run's parent was quantised - start from the unquantised parent: scalpel run PARENT"
    ways = "let llama.cpp quantise it: --type q4_k_m"
    if run:
        return f"{why} - export the run's healed model and {ways}: scalpel export gguf {run}"
    return f"{why} - export the unquantised checkpoint that it was made from, and {ways}"


def run_of(place: Path) -> Path | None:
    """Return the run directory that a checkpoint folder is a stage's model of."""
    run = place.parent.parent
    return run if place.name == "model" and (run / "config.yaml").is_file() else None


def quantised_by(place: Path) -> str | None:
    """Return the method by which a checkpoint folder's weights are quantised."""
    file = place / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return (settings.get("quantization_config") or {}).get("quant_method")
