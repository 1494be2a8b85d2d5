"""What a healing came to: measured on the checkpoint that was written, and undone where the cut model is better.

before = measured_before(bench, judge, child)
...                                             # heal, save
verdict = keep_better(bench, judge, result, before, folder / "model")
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from layerscalpel.errors import DivergedError, UserError
from layerscalpel.heal import HealResult
from layerscalpel.judge import Judge, ruined
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured
from layerscalpel.overwrite import copy_checkpoint, save_changed
from layerscalpel.places import spares_device
from layerscalpel.progress import say
from layerscalpel.unpacked import save_unpacked
from layerscalpel.workbench import Workbench

BEGUN_WITH = ("stitch", "cut")
"""Stages by whose checkpoint healing begins, the first that is there."""


def measured_before(bench: Workbench, judge: Judge, child: Decoder) -> dict[str, Measured]:
    """Return the KL of the model that healing begins with, and of the cut one where a stitch came between."""
    measured = {"before": judge.kl(child, "before healing")}
    if bench.child_folder(*BEGUN_WITH).parent.name == "stitch":
        bare = bench.child("cut", in_host_memory=spares_device(bench.config.heal))
        measured = {"cut": judge.kl(bare, "of the cut model"), **measured}
    return measured


def save_healed(bench: Workbench, result: HealResult, child: Decoder, folder: Path) -> None:
    """Write the healed model; where no step was better than the weights it began with, a copy of these."""
    begun = bench.child_folder(*BEGUN_WITH)
    if changed_anything(result):
        _save(bench, child, folder)
        return
    say("healing never beat the unhealed model on the validation blocks: the unhealed weights are kept")
    copy_checkpoint(begun, folder)


def _save(bench: Workbench, child: Decoder, folder: Path) -> list[str] | None:
    """Write a trained model over a copy of what it came from; return what is written anew, None if that is all."""
    save = save_unpacked if bench.parent.origin.quantised else save_changed
    return save(child.model, bench.child_folder(*BEGUN_WITH), folder, bench.parent.origin.dtype)


def keep_good(bench: Workbench, child: Decoder, error: DivergedError) -> UserError:
    """Save the state of a healing before it diverged, if anything was learnt, and return the error that says where."""
    folder = bench.path / "diverged"
    shutil.rmtree(folder, ignore_errors=True)
    if _save(bench, child, folder) != []:
        return UserError(f"{error}; the best state before that is kept in {folder}")
    shutil.rmtree(folder)
    return error


def changed_anything(result: HealResult) -> bool:
    """Tell whether any step of any phase was better than the weights it began with."""
    return any(phase.best_step for phase in (result, result.second) if phase)


def keep_better(
    bench: Workbench, judge: Judge, result: HealResult, before: dict[str, Measured], folder: Path
) -> dict[str, Any]:
    """Return what healing did to the KL; a checkpoint worse than the cut one gives way to what it began with."""
    after, unhealed = before["before"], before.get("cut", before["before"])
    if changed_anything(result):
        healed = bench.child("heal", in_host_memory=spares_device(bench.config.heal))
        after = judge.kl(healed, "after healing")
    measured = {name: kl.to_dict() for name, kl in (before | {"after": after}).items()}
    verdict = {"kl_nats": {**measured, "text": bench.judged_by}, "failed": ruined(unhealed, after)}
    if verdict["failed"]:
        change = f"{unhealed.value:.3g} to {after.value:.3g} nats per token on {bench.judged_by} text"
        say(
            f"healing failed: it took the KL to the parent from {change}, so the weights it began with are kept"
            " - try another heal.lr, objective or text"
        )
        shutil.rmtree(folder)
        copy_checkpoint(bench.child_folder(*BEGUN_WITH), folder)
    return verdict
