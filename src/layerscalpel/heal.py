"""Heal the seam: train the few layers beside it so that the cut model speaks like its parent again.

Cutoff endpoint tuning (arXiv:2510.23652, Section 3.3) trains only the layer before and the layer after the seam. What
the frozen layers below compute is computed once (frozen.py), backward never goes below it, head and loss run on
labelled positions only (objectives.py), and weights in 16 bit keep float32 masters of what is trained (training.py).
Dropout is off. Learning rate, schedule and batch are our choice; the paper does not state its own.

Every method is a choice of what is trained; a second phase may train something else after the first. Several processes
may share the work, and layers that are not at work may wait elsewhere (places.py).

    result = heal_model(student, parent, [13], blocks, validation, HealSettings(), seed=0, scratch=folder)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from layerscalpel.data import TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder, device_of
from layerscalpel.objectives import asks_parent, weights_of
from layerscalpel.parallel import ALONE, Team
from layerscalpel.phase import Choose, HealResult, Phase
from layerscalpel.places import Place, require_place
from layerscalpel.settings import HealName, HealSettings
from layerscalpel.trained import adapters, every_layer, last_layers, seam_endpoints


@dataclass(frozen=True)
class Healer:
    """A row of the table of healing methods."""

    choose: Choose | None
    """None trains nothing."""
    sentence: str
    paper: str


HEALERS: dict[HealName, Healer] = {
    "endpoint": Healer(seam_endpoints, "cutoff endpoint tuning: only the layers at the seam", "2510.23652"),
    "lora": Healer(adapters, "low-rank adapters on all linear layers, merged at the end", "2106.09685"),
    "last": Healer(last_layers, "the last layers, the final norm and the head", "2411.15558"),
    "all": Healer(every_layer, "all layers", "none"),
    "none": Healer(None, "no healing: the cut is the result", "none"),
}


def heal_model(
    student: Decoder,
    parent: Decoder | None,
    seams: Sequence[int],
    blocks: TokenBlocks,
    validation: TokenBlocks,
    settings: HealSettings,
    *,
    seed: int,
    scratch: Path,
    team: Team = ALONE,
    device: torch.device | None = None,
) -> HealResult:
    """Train `student` in place; it ends in its best validated state, with nothing added to it.

    Args:
        student: the cut model. With heal.frozen=cpu or 4bit, or heal.shard, it may lie in host memory, and does so
            again at the end.
        parent: the uncut model; needed for every objective but ce. It may lie in host memory likewise.
        seams: for each removed segment the cut model's first layer after it.
        blocks: training blocks [N, T].
        validation: held-out blocks that choose the best state.
        settings: heal section of the recipe.
        seed: fixes the order of the blocks.
        scratch: folder for what is computed once, and for the state that an interrupted training goes on from.
        team: the processes that do this together, with the same arguments; each ends with the same student.
        device: where to compute; None is where the student is.

    Raises:
        UserError: settings contradict each other. The loss is not finite; the line says at which step and learning
            rate (a DivergedError), and the student is in its best state then (with heal.shard, in the one before).
            Or a single block does not fit into memory.
    """
    refuse_contradictions(settings)
    if settings.method == "none":
        raise UserError("heal.method=none trains nothing - choose endpoint, lora, last or all")
    require_place(settings, team.size)
    place = Place(device or device_of(student.model), team, settings.frozen, settings.shard)
    phases = [settings]
    if settings.second != "none":
        how = {"method": settings.second, "lr": settings.second_lr, "epochs": settings.second_epochs}
        phases.append(replace(settings, **how))
    results: list[HealResult] = []
    for number, phase in enumerate(phases, start=1):
        choose, suffix = HEALERS[phase.method].choose, "" if number == 1 else f"-{number}"
        assert choose is not None, "a recipe that trains nothing is not healed"
        touched = min((i for result in results for i in result.layers), default=len(student))
        work = Phase(choose, student, parent, tuple(seams), phase, scratch, place, suffix, touched, seed)
        results.append(work.train(blocks, validation))
    team.most(0)  # all have read what is there
    for left in scratch.glob("state*.pt") if team.rank == 0 else ():
        left.unlink()
    return replace(results[0], second=results[1]) if len(results) > 1 else results[0]


def refuse_contradictions(settings: HealSettings) -> None:
    """Refuse settings of which one leaves another without effect.

    Raises:
        UserError: all findings at once.
    """
    methods, findings = [settings.method, settings.second], []
    if settings.method == "none" and settings.second != "none":
        findings.append(
            f"heal.second={settings.second} follows no first phase - set heal.method={settings.second} instead"
        )
    if settings.expand and not {"endpoint", "all", "last"} & set(methods):
        findings.append(
            f"heal.expand={settings.expand} has no effect with heal.method={settings.method}"
            " - allowed with endpoint, last and all; set heal.expand=0"
        )
    if settings.kl_weight != 1 and settings.objective != "both":
        findings.append(
            f"heal.kl_weight={settings.kl_weight:g} weighs the KL beside cross-entropy, and has no effect with"
            f" heal.objective={settings.objective} - set heal.objective=both, or leave it out"
        )
    if settings.teacher != "hidden" and not asks_parent(settings):
        findings.append(
            f"heal.teacher={settings.teacher} has no effect with heal.objective={settings.objective}, which asks"
            " nothing of the parent - heal by kl or both, or leave it out"
        )
    if settings.method == "last" and "seam" in weights_of(settings):
        findings.append(
            "heal.method=last trains no layer at the seam, so the hidden states after it stay what they are"
            " - heal by ce, kl, both or end, with heal.seam_weight=0"
        )
    if findings:
        raise UserError("\n".join(findings))
