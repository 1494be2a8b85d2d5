"""What the trials of benchmarks/recipes.py share, made once in a folder: texts, checkpoints, answers, token blocks.

Texts are parted by their own hash before anything is drawn, so no seed, mix or trial can heal on text that chooses or
reports. Several processes may ask at once: a lock lets the first one make what the others then find.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from recipe_trials import SEGMENTS, Trial

from layerscalpel.answerfile import AnswerFile
from layerscalpel.answers import Answering, write_answers
from layerscalpel.config import build_config
from layerscalpel.cut import cut_model
from layerscalpel.data import TokenBlocks, prepare_blocks
from layerscalpel.decoder import load_decoder, save_decoder
from layerscalpel.forms import Record
from layerscalpel.layers import Decoder
from layerscalpel.origin import DTYPES
from layerscalpel.probe import find_layers
from layerscalpel.records import find_source
from layerscalpel.segment import Segment
from layerscalpel.settings import StitchSettings
from layerscalpel.stitch import stitch_model

FILES = {
    "alpaca": "instruct/alpaca_union.jsonl.gz",
    "c4": "calib/c4_mixed.jsonl.gz",
    "passages": "tasks/boolq_val.jsonl.gz",
}
HELD_OUT = {"alpaca": {"select": 0.05}, "c4": {"select": 0.08, "report": 0.08}, "passages": {}}
"""{source: {part: share of its records}}; the rest heals."""
STORED = "bfloat16"
"""What children are saved in."""
CORPUS = "lm/wikitext2_raw_test.txt"


@dataclass(frozen=True)
class Prepared:
    """The folder."""

    root: Path
    data: Path
    """Where the files of FILES are."""
    records: int | None
    """At most so many of each; None takes all."""

    def text(self, source: str, part: str = "heal") -> str:
        """Return the file of a part of a source."""
        return str(self.made(f"texts-{source}", lambda folder: self._part_texts(source, folder)) / f"{part}.jsonl")

    def _part_texts(self, source: str, folder: Path) -> None:
        folder.mkdir()
        parts: dict[str, list[str]] = {"heal": [], **{part: [] for part in HELD_OUT[source]}}
        with gzip.open(self.data / FILES[source], "rt", encoding="utf-8") as lines:
            for line in islice(lines, self.records):
                record = json.loads(line)
                fields = {"text": record["passage"]} if source == "passages" else record
                words = " ".join(json.dumps([fields.get(name) for name in ("text", "instruction", "input")]).split())
                place = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) / 2**64
                part = "heal"
                for name, share in HELD_OUT[source].items():
                    place -= share
                    if place < 0:
                        part = name
                        break
                parts[part].append(json.dumps(fields))
        for part, found in parts.items():
            (folder / f"{part}.jsonl").write_text("\n".join(found), encoding="utf-8")

    def checkpoint(self, model: str) -> Path:
        """Return the parent as a plain checkpoint, which loads faster than a GGUF."""

        def make(folder: Path) -> None:
            loaded = load_decoder(model, device="cpu", dtype="float32")
            save_decoder(loaded.model, loaded.tokenizer, folder, dtype=loaded.origin.dtype)

        return self.made("parent", make)

    def child(self, parent: Decoder, tokenizer: Any, trial: Trial, more: dict[str, Any]) -> Path:
        """Return the checkpoint that a trial heals: the cut one, or the stitched one."""
        start, stop = SEGMENTS[trial.n]
        segment, config = Segment(start, stop, len(parent)), trial.config(self.sources(), more)

        def cut(folder: Path) -> None:
            save_decoder(cut_model(parent, segment)[0], tokenizer, folder, dtype=STORED)

        plain, method = self.made(f"cut-{trial.n}", cut), config.stitch.method
        if method == "none":
            return plain

        def stitch(folder: Path) -> None:
            device = str(next(parent.model.parameters()).device.type)
            child = find_layers(load_decoder(str(plain), device=device).model)
            settings = StitchSettings(method, config.stitch.ridge)
            blocks = self.calibration(tokenizer, config.search.num_blocks)
            found = stitch_model(child, parent, segment, blocks, settings, DTYPES[STORED])
            save_decoder(child.model, tokenizer, folder, dtype=STORED)
            (folder / "stitch.json").write_text(json.dumps(found), encoding="utf-8")

        return self.made(f"stitched-{trial.n}-{method}-{config.stitch.ridge:g}-{config.search.num_blocks}", stitch)

    def sources(self) -> dict[str, str]:
        """Return {source: its file for healing}."""
        return {source: self.text(source) for source in FILES}

    def calibration(self, tokenizer: Any, count: int) -> TokenBlocks:
        """Return blocks of C4 that stitches are fitted on: of the text that heals."""
        settings = build_config([{"data.evaluation": self.text("c4"), "data.evaluation_blocks": count}]).data
        return prepare_blocks(tokenizer, settings, num_calibration=0, seed=0, heal=False).evaluation

    def held_out(self, tokenizer: Any, part: str, count: int, length: int) -> TokenBlocks:
        """Return blocks of C4 that choose (`select`) or report."""
        settings = {"data.evaluation": self.text("c4", part), "data.evaluation_blocks": count}
        data = build_config([settings, {"data.block_tokens": length}]).data
        return prepare_blocks(tokenizer, data, num_calibration=0, seed=0, heal=False).evaluation

    def instructions(self, tokenizer: Any, length: int) -> TokenBlocks:
        """Return blocks of Alpaca's held-out conversations."""
        settings = {"data.healing": self.text("alpaca", "select"), "data.healing_block_tokens": length}
        settings |= {"data.evaluation": self.text("c4", "select"), "data.evaluation_blocks": 2}
        data = build_config([settings, {"data.validation_fraction": 0.001}]).data
        healing = prepare_blocks(tokenizer, data, num_calibration=0, seed=0).healing
        assert healing is not None
        return healing

    def corpus(self, tokenizer: Any, length: int, most: int | None) -> TokenBlocks:
        """Return WikiText-2's raw test text in windows that do not overlap; a window's first token is no target."""
        text = (self.data / CORPUS).read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: most and most * length]
        tokens = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        labelled = torch.ones_like(tokens, dtype=torch.bool)
        labelled[:, 0] = False
        return TokenBlocks(tokens, labelled, "wikitext2 raw test", len(tokens), {})

    def answers(self, how: str) -> AnswerFile:
        """Return the parent's answers, those that are written."""
        return AnswerFile(self.root / f"answers-{how}.jsonl")

    def write_answers(self, model: Any, tokenizer: Any, answering: Answering) -> None:
        """Let the parent answer all prompts that heal."""
        records = list(find_source(self.text("alpaca")).read(0))
        write_answers(model, tokenizer, records, answering, self.answers(answering.how))

    def blocks(
        self, model: Any, tokenizer: Any, trial: Trial, seed: int, more: dict[str, Any]
    ) -> tuple[TokenBlocks, TokenBlocks]:
        """Return (healing, validation) of a trial; seeds shuffle the text anew."""
        unread = {"data.evaluation": self.text("c4", "report"), "data.evaluation_blocks": 2}
        data = trial.config(self.sources(), more, unread).data
        said = json.dumps([vars(data), seed])
        answering = Answering(data.answers, data.answer_tokens, data.healing_block_tokens, seed=0)

        def answer(records: list[Record]) -> list[Record]:
            return write_answers(model, tokenizer, records, answering, self.answers(data.answers))

        def make(folder: Path) -> None:
            given = None if data.answers == "given" else answer
            parts = prepare_blocks(tokenizer, data, num_calibration=0, seed=seed, answer=given)
            folder.mkdir()
            torch.save((vars(parts.healing), vars(parts.validation)), folder / "blocks.pt")

        folder = self.made(f"blocks-{hashlib.sha256(said.encode()).hexdigest()[:16]}", make)
        healing, validation = torch.load(folder / "blocks.pt", weights_only=True)
        return TokenBlocks(**healing), TokenBlocks(**validation)

    def made(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return a folder of this name, made by the first that asks."""
        target, draft = self.root / name, self.root / f"{name}.draft"
        with locked(self.root / f"{name}.lock"):
            if not target.exists():
                shutil.rmtree(draft, ignore_errors=True)
                make(draft)
                os.replace(draft, target)
        return target


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process is within."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
