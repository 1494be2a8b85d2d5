"""The stages that measure: every model of a run on the same held-out text and tasks, and its speed.

What a run makes to compare with (beside.py) goes through the same code as its own models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerscalpel import evaluate as quality
from layerscalpel.beside import make, rows_of, tidy
from layerscalpel.byblock import by_block, save_blocks, token_identity
from layerscalpel.distances import distances
from layerscalpel.layers import Decoder
from layerscalpel.overlap import overlaps
from layerscalpel.probe import find_layers
from layerscalpel.progress import say
from layerscalpel.quantproof import Computing, load_any
from layerscalpel.retention import retentions
from layerscalpel.rundir import SKIPPED
from layerscalpel.segment import Segment
from layerscalpel.speed import measure_speed
from layerscalpel.workbench import Workbench
from layerscalpel.writing import probe

MEASURED = {"cut": "cut", "stitch": "stitched", "heal": "healed", "quantize": "quantized"}
"""{stage: the name of the model that it writes}."""
UNPACKED = (
    "transformers unpacks these weights before it computes with them, so the quantised model would take the time of the"
    " one that it was made from; engines with kernels of their own compute with packed weights"
)


def evaluate(bench: Workbench, segments: Sequence[Segment], folder: Path) -> dict[str, Any]:
    """Measure the parent and what became of it on the same held-out blocks, and let each write."""
    exam = _Examining(bench, folder)
    measured: dict[str, Any] = {"data": {"evaluation": exam.blocks.summary()}}
    measured["parent"] = exam.look("parent", bench.decoder, bench.identity())
    for stage, name in MEASURED.items():
        if (bench.path / stage / "model").is_dir():
            measured[name] = exam.look(name, _child(bench, stage), bench.identity(stage))
    for row in rows_of(bench.config.quantize):
        with make(bench, segments, row, folder) as (place, made):
            decoder = find_layers(load_any(place, Computing.of(bench.config)).model)
            found = exam.look(f"beside-{row}", decoder, bench.identity_of(place), writes=False)
            measured.setdefault("beside", {})[row] = made | found
            del decoder
    tidy(folder, keep=bench.config.quantize.keep_beside)
    return measured | exam.notes(measured)


def _child(bench: Workbench, stage: str) -> Decoder:
    if stage != "quantize":
        return bench.child(stage)
    return find_layers(load_any(bench.child_folder(stage), Computing.of(bench.config)).model)


class _Examining:
    """Measures one model after the other against the parent."""

    def __init__(self, bench: Workbench, folder: Path) -> None:
        self.bench, self.folder, self.blocks = bench, folder, bench.parts.evaluation
        size = bench.config.evaluate.batch_size
        self._final = quality.final_hidden(
            bench.decoder, self.blocks.tokens, batch_size=size, label="parent", store=bench.store
        )
        self._reference = quality.Reference(bench.decoder, self._final)
        self._long, self._exam = bench.long_check(), bench.exam(folder)

    def look(self, name: str, model: Decoder, identity: str, *, writes: bool = True) -> dict[str, Any]:
        """Return all figures of one model; `identity` tells it from another of that name."""
        settings, is_parent = self.bench.config.evaluate, model is self.bench.decoder
        tokenizer = self.bench.parent.tokenizer
        found = quality.token_figures(
            model,
            self.blocks,
            None if is_parent else self._reference,
            self._final if is_parent else None,
            batch_size=settings.batch_size,
            label=f"evaluating {name}",
        )
        same = {"text": self.blocks.sha256, "tokenizer": token_identity(tokenizer)}
        save_blocks(self.folder, name, by_block(found, **same))
        measured = distances(found, self.blocks.domains)
        if writes:
            measured |= self._long.measure(name, model)
        if writes and model.resident is None:  # token by token from disk takes too long
            how: dict[str, Any] = {"num_tokens": settings.sample_tokens, "num_prompts": settings.sample_prompts}
            how |= {"context": self.bench.origin.max_tokens, "seed": self.bench.config.seed}
            measured |= probe(model.model, tokenizer, label=f"samples of {name}", **how)
        measured |= self._exam.measure(name, model.model, identity)
        if not is_parent and self._exam.results:
            pair = (self._exam.results["parent"], self._exam.results[name])
            measured["retention"] = retentions(*pair, seed=self.bench.config.seed).to_dict()
        return measured

    def notes(self, measured: dict[str, Any]) -> dict[str, Any]:
        """Return what is said of all models together."""
        measured["data"] |= self._long.summary()
        texts = {"overlap": overlaps(self._exam.texts(), self.bench.parts.used)} if self._exam.results else {}
        return self._long.note() | self._exam.summary() | texts


def benchmark(bench: Workbench, segments: Sequence[Segment], _folder: Path) -> dict[str, Any]:
    """Time the parent and the final model in turns; the quantised one too, where that is another arithmetic."""
    if not bench.config.benchmark.enabled:
        return SKIPPED
    final = bench.child_folder("heal", "stitch", "cut")
    models = {"parent": bench.parent, MEASURED[final.parent.name]: bench.load(str(final))}
    small, untimed = bench.path / "quantize" / "model", {}
    if small.is_dir() and bench.result_of("quantize")["runs_packed"]:
        models["quantized"] = load_any(small, Computing.of(bench.config))
    elif small.is_dir():
        untimed = {"not_timed": {"quantized": UNPACKED}}
    if bench.decoder.resident is not None:
        say("the parent does not fit into memory, so the cut model is timed alone")
        del models["parent"]
    ideal = segments[0].num_layers / (segments[0].num_layers - sum(map(len, segments)))
    return measure_speed(models, bench.config.benchmark, seed=bench.config.seed) | {"ideal_speedup": ideal} | untimed
