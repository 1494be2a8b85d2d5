"""What a worker of benchmarks/recipes.py does: let the parent answer, heal by a recipe, measure.

bench = Bench(given, sizes)
bench.do(part="trial", name="paper", seed=0)
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measuring import Row, peak_bytes, reset_peak, seconds
from recipe_data import STORED, Prepared
from recipe_measures import Measures, MeasureSizes
from recipe_tables import loss_of
from recipe_trials import SEGMENTS, TRIALS, Trial

from layerscalpel.answers import Answering
from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import load_decoder
from layerscalpel.heal import heal_model
from layerscalpel.layers import Decoder
from layerscalpel.objectives import asks_parent
from layerscalpel.origin import DTYPES
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet

BY_NAME = {trial.name: trial for trial in TRIALS}
assert len(BY_NAME) == len(TRIALS), "every trial has a name of its own"


@dataclass(frozen=True)
class Sizes:
    """How much is healed on and measured."""

    measures: MeasureSizes = MeasureSizes()  # noqa: RUF009, it is frozen
    settings: Row = field(default_factory=dict)
    """That overrule every trial's."""
    records: int | None = None
    """Of each source of text."""
    answered_at_once: int = 4096


FEW = Sizes(
    MeasureSizes(held_out=4, block_tokens=64, items=8, window=128, windows=2, batch_size=4, tokens_at_once=1024),
    {
        "data.healing_blocks": 8,
        "data.healing_block_tokens": 256,
        "data.answer_tokens": 8,
        "search.num_blocks": 8,
        "heal.batch_size": 4,
        "heal.micro_batch_size": 4,
        "heal.epochs": 1,
        "heal.second_epochs": 1,
        "heal.validations": 1,
    },
    records=120,
    answered_at_once=64,
)
"""To see what it does with a real model on a CPU."""
TINY = replace(FEW, settings=FEW.settings | {"data.healing_block_tokens": 512, "data.answer_tokens": 24}, records=300)
"""To see whether it runs at all, with a tiny model, whose tokens are bytes."""


class Bench:
    """The parent to heal by, the same in float32 to measure with, and what is prepared."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes) -> None:
        set_quiet(True)
        self.given, self.sizes = given, sizes
        self.prepared = Prepared(given.cache, given.data, sizes.records)
        place = str(self.prepared.checkpoint(given.model))
        model, self.tokenizer, self.origin = load_decoder(place, device=given.device)
        self.parent = find_layers(model)
        exact = self.parent
        if model.dtype != torch.float32:
            exact = find_layers(load_decoder(place, device=given.device, dtype="float32").model)
        measures = replace(sizes.measures, healing_block_tokens=self._healing_block_tokens())
        self.measures = Measures(exact, self.tokenizer, self.prepared, given.chosen_by, measures)

    def _healing_block_tokens(self) -> int:
        return self.sizes.settings.get("data.healing_block_tokens", self.sizes.measures.healing_block_tokens)

    def do(self, part: str, name: str = "", seed: int = 0, how: str = "") -> Row:
        """Do a unit of work."""
        if part == "answers":
            return self.answer(how)
        if part == "parent":
            parent = self.measures.parent
            return {"selection": self.measures.select(parent), "reported": self.measures.report(parent)}
        return self.heal(BY_NAME[name], seed, final=part == "final")

    def answer(self, how: Any) -> Row:
        """Let the parent answer every prompt that heals, many at once."""
        data = self._config(BY_NAME["paper"]).data
        answering = Answering(how, data.answer_tokens, data.healing_block_tokens, 0, self.sizes.answered_at_once)
        work = functools.partial(self.prepared.write_answers, self.parent.model, self.tokenizer, answering)
        wall_s = seconds(work)[1]
        written = self.prepared.answers(how).answers.values()
        return {"answers": len(written), "cut_off": sum(row["cut_off"] for row in written), "wall_s": wall_s}

    def heal(self, trial: Trial, seed: int, *, final: bool) -> Row:
        """Heal by a recipe, and measure what comes of it in the format that it would be saved in."""
        config = self._config(trial)
        folder = self.prepared.child(self.parent, self.tokenizer, trial, self.sizes.settings)
        child = find_layers(load_decoder(str(folder), device=self.given.device).model)
        found: Row = {"n": trial.n, "segment": SEGMENTS[trial.n], "mix": trial.mix, "settings": trial.settings}
        if (folder / "stitch.json").exists():
            found["stitch"] = json.loads((folder / "stitch.json").read_text(encoding="utf-8"))
        if config.heal.method != "none":
            found |= self._healed(trial, child, seed)
        measured = self.as_stored(child)
        selected, select_s = seconds(lambda: self.measures.select(measured))
        found |= {"selection": selected, "select_s": select_s}
        if final:
            found["reported"], found["report_s"] = seconds(lambda: self.measures.report(measured))
        return found

    def as_stored(self, child: Decoder) -> Decoder:
        """Return a model as it would be saved, to be measured in float32."""
        return find_layers(copy.deepcopy(child.model).to(DTYPES[STORED]).float())

    def _healed(self, trial: Trial, child: Decoder, seed: int) -> Row:
        settings = self._config(trial).heal
        args = (self.parent.model, self.tokenizer, trial, seed, self.sizes.settings)
        blocks, data_s = seconds(lambda: self.prepared.blocks(*args))
        start, scratch = SEGMENTS[trial.n][0], self.prepared.root / f"scratch-{trial.name}-{seed}"
        parent = self.parent if asks_parent(settings) else None
        reset_peak()
        try:
            work = functools.partial(heal_model, child, parent, [start], *blocks, settings, seed=seed, scratch=scratch)
            result, wall_s = seconds(work)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        row = result.to_dict() | {"heal_s": wall_s, "data_s": data_s, "peak_bytes": peak_bytes()}
        for phase in filter(None, (row, row.get("second"))):
            phase["last_train_loss"] = _last(phase.pop("train"))
        return row | {"data": _summary(blocks[0])}

    def _config(self, trial: Trial) -> Any:
        return trial.config(self.prepared.sources(), self.sizes.settings)


def _last(train: list[dict[str, float]], share: float = 0.05) -> float:
    """Return the mean loss of the last steps."""
    losses = [loss_of(row) for row in train[-max(1, round(share * len(train))) :]]
    return sum(losses) / len(losses)


def _summary(blocks: TokenBlocks) -> Row:
    """Return what a row needs to know of the text that healed."""
    found = blocks.summary()
    names = ("num_blocks", "labelled_tokens", "filled_fraction", "num_documents", "dropped", "answers")
    tokens = {Path(file).parent.name.removeprefix("texts-"): count for file, count in found["sources"].items()}
    return {name: found[name] for name in names if name in found} | {"tokens": tokens}


def tiny_model(folder: Path) -> str:
    """Return a tiny random model of 30 layers, made by the tests' own code."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from world import write_model

    if not folder.exists():
        write_model(folder, num_hidden_layers=30, max_position_embeddings=4096)
    return str(folder)


held: list[Bench] = []
"""A worker process's own."""


def open_bench(given: argparse.Namespace, sizes: Sizes) -> None:
    held.append(Bench(given, sizes))


def work(key: Row) -> tuple[Row, float]:
    """Return a unit's row and seconds, in a worker."""
    return seconds(lambda: held[0].do(**key))
