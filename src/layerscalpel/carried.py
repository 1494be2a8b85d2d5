"""What travels with a checkpoint beside its weights and config: tokenizer, templates, processors, code, licence.

Everything travels but what is known to be about other weights: weights in other formats and their indexes, the parent's
model card and measurements, the state of its training. What is left behind is told.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from layerscalpel.progress import say

WEIGHTS = r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|npz|npy|pkl|pickle|tflite|ot|mlmodel)"
INDEXES = r".*\.index(\..*)?\.json"
WRITTEN_ANEW = r"config\.json|layerscalpel\.json"
ABOUT_THE_PARENT = (
    r"readme.*|params\.json|hf_quant_config\.json|(all|eval|train|test|predict)_results\..*|trainer_state\.json"
    r"|training_args\..*|optimizer.*|scheduler.*|rng_state.*|events\.out.*|.*\.log"
)
LEFT_BEHIND = re.compile(f"{WEIGHTS}|{INDEXES}|{WRITTEN_ANEW}|{ABOUT_THE_PARENT}", re.IGNORECASE)
"""Names of files that stay."""
OTHER_FOLDERS = re.compile(
    r"\..*|original|onnx|openvino|coreml|runs|logs|wandb|checkpoint-.*|__pycache__", re.IGNORECASE
)
"""Names of folders that stay, with all that is in them."""


def carry_files(source: Path, folder: Path) -> list[str]:
    """Copy what travels with a checkpoint and is not there yet; return the names, with their folders.

    Args:
        source: the parent's folder.
        folder: of the new checkpoint; an `out` inside the source is not carried into itself.
    """
    carried, about_the_parent = [], []
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if any(OTHER_FOLDERS.fullmatch(part) for part in inside.parts[:-1]) or not path.is_file():
            continue
        if path.resolve().is_relative_to(folder.resolve()) or _is_a_checkpoint(source, inside):
            continue
        if LEFT_BEHIND.fullmatch(path.name) or inside.name.startswith("."):
            if re.fullmatch(ABOUT_THE_PARENT, path.name, re.IGNORECASE):
                about_the_parent.append(str(inside))
        elif not (folder / inside).exists():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / inside)
            carried.append(str(inside))
    if about_the_parent:
        say(f"left behind, as they speak of the parent: {', '.join(about_the_parent)}")
    return carried


def _is_a_checkpoint(source: Path, inside: Path) -> bool:
    """Whether a file lies in a folder of the source that is a model of its own."""
    return any((source / above / "config.json").is_file() for above in inside.parents if above != Path("."))


def holds_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter (LoRA) beside its weights, which transformers would load on top of them."""
    return (folder / "adapter_config.json").is_file()
