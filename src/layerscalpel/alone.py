"""One stage on one model, without a run: cut, quantise, measure."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerscalpel import evaluate as quality
from layerscalpel.aside import STARTED
from layerscalpel.card import model_card
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.checks import require_lengths
from layerscalpel.config import to_dict
from layerscalpel.data import prepare_blocks
from layerscalpel.decoder import Loaded, load_decoder, num_parameters, save_decoder, stored_bytes
from layerscalpel.distances import distances
from layerscalpel.errors import UserError
from layerscalpel.exam import prepare_exam, require_tasks
from layerscalpel.footprint import folder_bytes
from layerscalpel.inputs import file_identity
from layerscalpel.longtext import prepare_check
from layerscalpel.origin import Origin, checkpoint_folder, peek, read_config, skeleton
from layerscalpel.probe import find_layers
from layerscalpel.progress import waiting
from layerscalpel.quantchecks import require_fit_for_quantised
from layerscalpel.quantize import BACKENDS, quantize_checkpoint, require_quantizable
from layerscalpel.quantizing import split
from layerscalpel.quantproof import Computing
from layerscalpel.records import find_source, require_place_for_self, sources_in
from layerscalpel.rundir import software, write_json
from layerscalpel.scheme import Scheme, refuse_quantised
from layerscalpel.segment import parse_segment
from layerscalpel.settings import Config
from layerscalpel.speed import measure_speed, require_context
from layerscalpel.writing import probe


def cut_alone(config: Config, out: Path) -> dict[str, Any]:
    """Write MODEL without the segment as a plain checkpoint into `out`; return sizes, changes and proof."""
    model = config.model
    origin = peek(
        model.name,
        trust_remote_code=model.trust_remote_code,
        allow_pickle=model.allow_pickle,
        allow_quantised=True,
    )
    segment = parse_segment(config.target.segment or "", origin.num_layers)

    def card(parent: PreTrainedModel, found: dict[str, Any]) -> str:
        results = {"parent": _sizes(parent, origin), "segment": [segment.start, segment.stop], "cut": found}
        return model_card(results, to_dict(config), software())

    found = cut_checkpoint(
        origin,
        segment,
        out,
        device=model.device,
        dtype=model.dtype,
        proof=config.cut.proof,
        minutes=config.cut.proof_minutes,
        card=card,
    )
    return {"parent": model.name, "segment": [segment.start, segment.stop], "removed": str(segment), **found}


def quantize_alone(config: Config, out: Path) -> dict[str, Any]:
    """Write a quantised copy of a model as a plain checkpoint into `out`; return what was converted, sizes and proof.

    Methods that read text draw it as a run does: three quarters of it calibrate, the last one judges.
    """
    _require_no_run(config)
    model, settings, data = config.model, config.quantize, config.data
    origin = peek(model.name, **model.permissions())
    refuse_quantised(origin)
    learns, num_blocks = BACKENDS[settings.method].learns, -(-4 * settings.num_blocks // 3)
    require_quantizable(settings, settings.num_blocks * data.block_tokens)
    require_lengths(config, origin, [], {"calibration": [data.calibration]} if learns else {})
    if learns:
        _require_sources(data.calibration, *(name for name, _ in sources_in(data.evaluation)))
    code = {"trust_remote_code": model.trust_remote_code}
    bare = skeleton(read_config(origin), **code)
    Scheme.of(bare, settings)
    computing = Computing.of(config)
    texts: tuple[Any, Any] = (None, None)
    with tempfile.TemporaryDirectory() as scratch:
        source = checkpoint_folder(origin)
        if learns or source is None:
            with waiting(f"loading {model.name}"):
                loaded = load_decoder(model.name, device="cpu", dtype=origin.dtype, **model.permissions())
            if learns:
                parts = prepare_blocks(loaded.tokenizer, data, num_calibration=num_blocks, seed=config.seed, heal=False)
                texts = split(parts.calibration, None, settings.num_blocks)
            if source is None:
                source = save_decoder(loaded.model, loaded.tokenizer, Path(scratch) / "plain", dtype=origin.dtype)
            del loaded
        found = quantize_checkpoint(source, out, *texts, settings, seed=config.seed, computing=computing)
    quantized = found.to_dict() | {"folder_bytes": {"parent": found.source_bytes}}
    results = {"parent": _sizes(bare, origin), "quantize": quantized}
    for _ in range(2):  # the card tells the bytes of the folder, and is in it
        (out / "README.md").write_text(model_card(results, to_dict(config), software()), "utf-8")
        quantized["bytes"] = folder_bytes(out)
    return results


def _require_sources(*names: str) -> None:
    """Refuse text that is not there, or that only a search can read."""
    for name in names:
        find_source(name)
        require_place_for_self("evaluation", name)


def _require_no_run(config: Config) -> None:
    """Refuse settings that have a meaning in a run alone."""
    settings = config.quantize
    keys = [f"target.{key}" for key, value in vars(config.target).items() if value is not None]
    keys += [f"quantize.{key}" for key in ("seam_bits", "beside", "keep_beside") if getattr(settings, key)]
    if keys:
        raise UserError(
            f"{', '.join(keys)} needs a run, scalpel quantize MODEL removes nothing - leave it out, or scalpel run"
            f" {config.model.name} --segment START:STOP --quantize {settings.method}:{settings.bits}"
        )


def measure_alone(stage: str, config: Config, out: Path) -> dict[str, Any]:
    """Evaluate or benchmark one model that has no parent; write OUT/results.json and return it.

    One that was interrupted goes on: the tasks that it finished are kept.
    """
    mark = out / stage / STARTED
    if not mark.exists() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files - choose another --out")
    model = config.model
    origin = peek(model.name, **model.permissions())
    require_fit_for_quantised(config, origin, ())
    if stage == "benchmark":
        require_context(config.benchmark, origin.max_tokens)
    if stage == "evaluate":
        _require_sources(*(name for name, _ in sources_in(config.data.evaluation)))
        require_lengths(config, origin, [stage], {"evaluation": [config.data.evaluation]})
        require_tasks(config.evaluate, origin.max_tokens)
    mark.parent.mkdir(parents=True, exist_ok=True)
    write_json(mark, {})
    with waiting(f"loading {config.model.name}"):
        loaded = load_decoder(
            model.name, device=model.device, dtype=model.dtype, packed=model.packed, **model.permissions()
        )
    if stage == "benchmark":
        found = measure_speed({"model": loaded}, config.benchmark, seed=config.seed)
    else:
        found = _evaluated(loaded, config, out / stage)
    results = {"model": _sizes(loaded.model, loaded.origin), stage: found}
    write_json(out / "results.json", results)
    write_json(out / stage / "done.json", {"result": found})
    mark.unlink()
    return results


def _evaluated(loaded: Loaded, config: Config, folder: Path) -> dict[str, Any]:
    settings, stated = config.evaluate, loaded.origin.max_tokens
    exam = prepare_exam(settings, loaded.tokenizer, folder, device=loaded.model.device)
    parts = prepare_blocks(loaded.tokenizer, config.data, num_calibration=0, seed=config.seed, heal=False)
    decoder = find_layers(loaded.model)
    figures = quality.token_figures(
        decoder, parts.evaluation, None, batch_size=settings.batch_size, label=f"evaluating {loaded.origin.name}"
    )
    how = {"num_tokens": settings.sample_tokens, "num_prompts": settings.sample_prompts, "context": stated}
    long = prepare_check(parts, asked=settings.context_tokens, stated=stated, num_blocks=settings.long_blocks)
    found = distances(figures, parts.evaluation.domains) | long.measure("model", decoder)
    found |= probe(loaded.model, loaded.tokenizer, seed=config.seed, **how)
    found |= exam.measure("model", loaded.model, file_identity(loaded.origin.place))
    return {"model": found} | long.note() | exam.summary()


def _sizes(model: torch.nn.Module, origin: Origin) -> dict[str, Any]:
    return {
        "name": origin.name,
        "num_layers": origin.num_layers,
        "parameters": num_parameters(model),
        "bytes": stored_bytes(model, origin),
    }
