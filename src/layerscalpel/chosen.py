"""Which checkpoint a command means by a name: a model's own, or the last one that a run directory has.

place = checkpoint_of("runs/demo", ("heal", "cut"))  # runs/demo/heal/model
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerscalpel.config import recipe
from layerscalpel.errors import UserError
from layerscalpel.origin import checkpoint_folder, peek

HEALED = ("heal", "stitch", "cut")
"""Stages of a run, the last first, that write a checkpoint in plain numbers."""
LAST = ("quantize", *HEALED)
TEXT = "passages"
"""Held-out text that is at hand where the data package is installed, without a network."""


def is_run(target: str) -> bool:
    """Tell whether a name is that of a run directory."""
    return (Path(target).expanduser() / "config.yaml").is_file()


def checkpoint_of(target: str, stages: Sequence[str], *, trust_remote_code: bool = False) -> Path:
    """Return the folder, or the .gguf file, that a name means.

    Args:
        target: run directory, checkpoint folder, hub id, .gguf file, or demo.
        stages: of a run directory, those whose checkpoint is meant; the first one that is there is taken.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        UserError: there is no such model, or the run has none yet.
    """
    run = Path(target).expanduser()
    if is_run(target):
        folder = next((run / stage / "model" for stage in stages if (run / stage / "model").is_dir()), None)
        if folder is None:
            raise UserError(
                f"run directory {target} holds no model of {' or '.join(stages)} yet - finish its cut first:"
                f" scalpel run MODEL --until cut --out {target}"
            )
        return folder
    if run.is_dir() and not (run / "config.json").is_file() and len(files := sorted(run.glob("*.gguf"))) == 1:
        return files[0]
    origin = peek(target, allow_quantised=True, trust_remote_code=trust_remote_code)
    return checkpoint_folder(origin) or Path(origin.place)


def held_out_text(target: str) -> str:
    """Return the text that a run directory was measured on; of anything else, TEXT."""
    if not is_run(target):
        return TEXT
    return str(recipe(Path(target).expanduser() / "config.yaml").get("data.evaluation", TEXT))
