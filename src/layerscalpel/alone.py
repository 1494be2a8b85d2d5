"""One stage on one model, without a run: cut, measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerscalpel import evaluate as quality
from layerscalpel.benchmark import benchmark
from layerscalpel.card import model_card
from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.config import to_dict
from layerscalpel.data import prepare_blocks
from layerscalpel.decoder import load_decoder, num_parameters, weight_bytes
from layerscalpel.errors import UserError
from layerscalpel.longtext import prepare_check
from layerscalpel.origin import Origin, peek
from layerscalpel.probe import find_layers
from layerscalpel.progress import waiting
from layerscalpel.records import find_source, require_place_for_self
from layerscalpel.rundir import software, write_json
from layerscalpel.segment import parse_segment
from layerscalpel.settings import Config


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


def measure_alone(stage: str, config: Config, out: Path) -> dict[str, Any]:
    """Evaluate or benchmark one model that has no parent; write OUT/results.json and return it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files - choose another --out")
    (out / stage).mkdir(parents=True, exist_ok=True)
    model = config.model
    allowed = {"trust_remote_code": model.trust_remote_code, "allow_pickle": model.allow_pickle}
    peek(model.name, **allowed)
    find_source(config.data.evaluation)
    require_place_for_self("evaluation", config.data.evaluation)
    with waiting(f"loading {config.model.name}"):
        loaded = load_decoder(model.name, device=model.device, dtype=model.dtype, **allowed)
    if stage == "benchmark":
        found = benchmark({"model": loaded.model}, config.benchmark, seed=config.seed)
    else:
        parts = prepare_blocks(loaded.tokenizer, config.data, num_calibration=0, seed=config.seed, heal=False)
        decoder = find_layers(loaded.model)
        figures = quality.evaluate(decoder, parts.evaluation, None, batch_size=config.evaluate.batch_size)
        samples = quality.write_samples(
            loaded.model, loaded.tokenizer, num_tokens=config.evaluate.sample_tokens, label="samples"
        )
        settings, stated = config.evaluate, loaded.origin.max_tokens
        long = prepare_check(parts, asked=settings.context_tokens, stated=stated, num_blocks=settings.long_blocks)
        found = {"model": figures.to_dict() | long.measure("model", decoder) | {"samples": samples}} | long.note()
    results = {"model": _sizes(loaded.model, loaded.origin), stage: found}
    write_json(out / "results.json", results)
    write_json(out / stage / "done.json", {"result": found})
    return results


def _sizes(model: torch.nn.Module, origin: Origin) -> dict[str, Any]:
    return {
        "name": origin.name,
        "num_layers": origin.num_layers,
        "parameters": num_parameters(model),
        "bytes": weight_bytes(model, origin.dtype),
    }
