"""One stage on one model, without a run: cut, measure, describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerscalpel import evaluate as quality
from layerscalpel.benchmark import benchmark
from layerscalpel.config import Config
from layerscalpel.cut import cut_config
from layerscalpel.data import find_source, prepare_blocks
from layerscalpel.decoder import DTYPES, Origin, load_decoder, num_parameters, peek, weight_bytes
from layerscalpel.errors import UserError
from layerscalpel.layers import find_layer_list, find_layers
from layerscalpel.progress import waiting
from layerscalpel.rundir import write_json
from layerscalpel.segment import Segment, parse_segment
from layerscalpel.stages import cut_checkpoint


def cut_alone(config: Config, out: Path, *, verify: bool) -> dict[str, Any]:
    """Write MODEL without the segment as a plain checkpoint into `out`; return sizes, changes and proof."""
    model = config.model
    origin = peek(model.name, trust_remote_code=model.trust_remote_code)
    segment = parse_segment(config.target.segment or "", origin.num_layers)
    with waiting(f"loading {model.name}"):
        parent = load_decoder(
            model.name, device=model.device, dtype=model.dtype, trust_remote_code=model.trust_remote_code
        )
    found = cut_checkpoint(
        parent, find_layers(parent.model), segment, out, verify=verify, trust_remote_code=model.trust_remote_code
    )
    return {"parent": model.name, "segment": [segment.start, segment.stop], "removed": str(segment), **found}


def measure_alone(stage: str, config: Config, out: Path) -> dict[str, Any]:
    """Evaluate or benchmark one model that has no parent; write OUT/results.json and return it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files - choose another --out")
    (out / stage).mkdir(parents=True, exist_ok=True)
    peek(config.model.name, trust_remote_code=config.model.trust_remote_code)
    for source in (config.data.calibration, config.data.evaluation):
        find_source(source)
    with waiting(f"loading {config.model.name}"):
        loaded = load_decoder(
            config.model.name,
            device=config.model.device,
            dtype=config.model.dtype,
            trust_remote_code=config.model.trust_remote_code,
        )
    if stage == "benchmark":
        found = benchmark({"model": loaded.model}, config.benchmark, seed=config.seed)
    else:
        parts = prepare_blocks(
            loaded.tokenizer, config.data, num_calibration=config.search.num_blocks, seed=config.seed, heal=False
        )
        decoder = find_layers(loaded.model)
        figures = quality.evaluate(decoder, parts.evaluation, None, batch_size=config.evaluate.batch_size)
        samples = quality.write_samples(
            loaded.model, loaded.tokenizer, num_tokens=config.evaluate.sample_tokens, label="samples"
        )
        found = {"model": figures.to_dict() | {"samples": samples}}
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


def describe(name: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return what can be told of a model without its weights: layers, sizes, config fields that a cut would change."""
    origin = peek(name, trust_remote_code=trust_remote_code)
    place = Path(origin.place)
    options = {"gguf_file": place.name} if origin.kind == "gguf" else {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(place.parent if origin.kind == "gguf" else origin.place, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    path, layers = find_layer_list(model)
    middle = origin.num_layers // 2
    _, changes = cut_config(config, Segment(middle, middle + 1, origin.num_layers))
    per_layer = num_parameters(layers[middle])
    size = DTYPES[origin.dtype].itemsize
    return {
        "name": name,
        "class": type(model).__name__,
        "layers": f"{len(layers)} x {type(layers[0]).__name__} at {path}",
        "num_layers": len(layers),
        "parameters": num_parameters(model),
        "parameters_per_layer": per_layer,
        "dtype": origin.dtype,
        "bytes": weight_bytes(model, origin.dtype),
        "bytes_per_layer": per_layer * size,
        "max_tokens": origin.max_tokens,
        "config_fields_a_cut_changes": sorted(changes),
    }
