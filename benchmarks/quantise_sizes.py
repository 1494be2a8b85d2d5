"""How much benchmarks/quantise.py measures: sizes, and the trials on the real model in their order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from shapes import Shape

from layerscalpel.settings import QuantizeName

Base = Literal["parent", "cut", "healed", "quantised parent"]


@dataclass(frozen=True)
class QuantiseSizes:
    """Sizes of every part."""

    calibration: tuple[int, int] = (64, 256)
    """Blocks of C4, and tokens of each."""
    held_out_blocks: int = 32
    """Of C4, as long as those of the calibration."""
    windows: int = 6
    """Of WikiText-2."""
    window_tokens: int = 2048
    error_blocks: int = 4
    """Held-out blocks on which each layer's error is measured."""
    shape: Shape = field(default_factory=lambda: Shape(4096, 32, 32, 32, 11008))
    vocab: int = 32000
    group_size: Any = 128
    tokens: tuple[int, int] = (32, 512)
    depths: tuple[tuple[int, int, int], ...] = ((4, 3, 2), (8, 6, 1))
    """Layers of the whole model and of the pruned one, and rounds."""


TINY = QuantiseSizes(
    calibration=(8, 256),
    held_out_blocks=2,
    windows=1,
    window_tokens=64,
    error_blocks=1,
    shape=Shape(64, 4, 4, 4, 128),
    vocab=320,
    group_size=32,
    tokens=(8, 64),
    depths=((4, 3, 1),),
)
"""To see whether it runs at all."""


@dataclass(frozen=True)
class Trial:
    """A model of the table."""

    name: str
    base: Base
    """What is quantised; of `quantised parent`, the layers are cut out afterwards."""
    method: QuantizeName = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of quantize, beside the method; damping is 0.01 where it is not named."""


WIDTHS: dict[str, dict[str, Any]] = {
    "4 bit, groups of 64": {"bits": 4, "group_size": 64},
    "4 bit, groups of 32": {"bits": 4, "group_size": 32},
    "8 bit, groups of 64": {"bits": 8, "group_size": 64},
    "4 bit, groups of 32 with zeros": {"bits": 4, "group_size": 32, "symmetric": False},
    "3 bit, groups of 64": {"bits": 3, "group_size": 64},
}
FOUR: dict[str, Any] = WIDTHS["4 bit, groups of 64"]
VARIANTS: dict[str, dict[str, Any]] = {
    "4 bit, groups of 64, columns in their order": FOUR | {"act_order": False},
    "4 bit, groups of 64, damping 0.05": FOUR | {"damping": (0.05,)},
    "4 bit, groups of 64, damping 0.1": FOUR | {"damping": (0.1,)},
    "4 bit, groups of 64, seam in 8": FOUR | {"seam_bits": 8},
}


def _plan() -> list[Trial]:
    """Return the trials, the most telling first."""
    found = [Trial("parent", "parent"), Trial("healed", "healed"), Trial("cut", "cut")]
    for width, settings in WIDTHS.items():
        found += [Trial(f"healed, {method}, {width}", "healed", method, settings) for method in ("rtn", "gptq")]
    found += [Trial(f"parent, gptq, {width}", "parent", "gptq", WIDTHS[width]) for width in list(WIDTHS)[:3]]
    found += [Trial(f"parent, rtn, {width}", "parent", "rtn", WIDTHS[width]) for width in list(WIDTHS)[:3]]
    found += [Trial(f"healed, gptq, {words}", "healed", "gptq", settings) for words, settings in VARIANTS.items()]
    for width in ("4 bit, groups of 64", "8 bit, groups of 64"):
        found += [Trial(f"cut, gptq, {width}", "cut", "gptq", WIDTHS[width])]
        found += [Trial(f"parent, gptq, {width}, then cut", "quantised parent", "gptq", WIDTHS[width])]
    return found


PLAN = _plan()
