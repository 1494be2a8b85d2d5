"""From a model's name to a cut, proven checkpoint: plan, prove on a twin, write, prove, and only then give it its name.

Safetensors checkpoints are cut file by file, without loading the model. A GGUF or pickled weights are loaded, cut in
memory and saved. Either way everything is written beside the folder and moved there when its proof has passed.

    found = cut_checkpoint(peek("model/"), Segment(13, 19, 30), Path("smaller"))
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from layerscalpel.carried import carry_files
from layerscalpel.cut import cut_folder, cut_model
from layerscalpel.decoder import (
    Loaded,
    choose_device,
    choose_dtype,
    fresh_folder,
    load_origin,
    num_parameters,
    require_all_weights,
    require_room,
    save_decoder,
    weight_bytes,
)
from layerscalpel.errors import UserError
from layerscalpel.history import PROVENANCE_FILE, cut_history
from layerscalpel.memory import free_bytes
from layerscalpel.origin import Origin, auto_class, checkpoint_folder, read_config, skeleton
from layerscalpel.plan import Plan, plan_cut
from layerscalpel.probe import find_layers
from layerscalpel.progress import say, waiting
from layerscalpel.proof import LogitsProof, TensorsProof, expect, prove_logits, prove_tensors, prove_twin
from layerscalpel.quantised import require_back_end
from layerscalpel.quiet import without_bars
from layerscalpel.renumber import Modules, renumber_files
from layerscalpel.rundir import write_json
from layerscalpel.segment import Segment
from layerscalpel.shards import Weights, read_weights
from layerscalpel.traces import text_part
from layerscalpel.twin import twin_model
from layerscalpel.witness import Witness

MEMORY_SHARE = 0.9
"""Of the free memory, what a model may take to be proven in memory."""
LOADED_TENSORS = 6
"""Peak memory of a forward from disk, in sizes of the largest tensor in float32 (measured: 5.4)."""
STREAMED_TOKENS = 8
"""One block of this length goes through checkpoints that stay on disk."""


@dataclass(frozen=True)
class Proof:
    """What was compared; see proof.py for the three parts."""

    kind: str
    """`fresh process`: all logits, in memory; `three parts`: logits of a short block, from disk; `two parts`: none."""
    logits: LogitsProof | None
    twin: LogitsProof | None
    tensors: TensorsProof | None
    left_out: dict[str, str]
    """{part: why it was not done}."""
    text_only: bool
    """Whether the model takes other inputs too, which were not compared."""


@dataclass(frozen=True)
class Written:
    """A cut checkpoint before its proof."""

    plan: Plan
    folder: Path
    parent: Loaded | None
    """The parent, where it is in memory already."""
    source: Weights | None
    """Files it was cut from; None if it was cut in memory."""
    copy: Weights | None
    renamed: dict[str, str]


def cut_checkpoint(
    origin: Origin,
    segment: Segment,
    folder: Path,
    *,
    parent: Loaded | None = None,
    device: str = "auto",
    dtype: str = "auto",
    proof: str = "auto",
    minutes: float = 30.0,
    card: Callable[[PreTrainedModel, dict[str, Any]], str] | None = None,
) -> dict[str, Any]:
    """Write a model without a segment as a plain checkpoint, proven.

    Args:
        origin: the parent, as `peek` describes it.
        segment: the layers to remove.
        folder: must not exist, or be empty; it appears only when everything in it is proven.
        parent: the parent, if it is loaded already.
        device: where to compute for the proof.
        dtype: number format to compute in for the proof.
        proof: `auto`, `memory` or `parts` (see config.CutSettings), or `none`.
        minutes: how long logits may take with weights left on disk.
        card: (parent's skeleton, what is returned) -> text of README.md.

    Returns:
        parameters, bytes, config_changes, history and proof (None if there was none), as plain values.

    Raises:
        UserError: the cut is refused, or its proof failed; nothing is left behind.
    """
    with fresh_folder(folder) as draft, contextlib.ExitStack() as stack:
        config = read_config(origin)
        if origin.quantised and proof != "none":
            require_back_end(config, origin.name)
        history = cut_history(origin, segment, folder)
        plan = plan_cut(skeleton(config, trust_remote_code=origin.trust_remote_code), segment)
        found: dict[str, Any] = {
            "parameters": num_parameters(plan.cut),
            "bytes": weight_bytes(plan.cut, origin.dtype),
            "config_changes": plan.traces,
            "loaded_by": auto_class(plan.config).__name__,
            "history": history,
            "proof": None,
        }
        if proof == "none":
            written = _write(origin, plan, draft, parent, device, dtype)
        else:
            witness = stack.enter_context(Witness())
            twin, no_twin = _prove_twin(witness, origin, plan)
            written = _write(origin, plan, draft, parent, device, dtype)
            settings = {"device": device, "dtype": dtype, "proof": proof, "minutes": minutes}
            found["proof"] = asdict(_prove(witness, origin, written, twin, no_twin, **settings))
        if written.copy and origin.quantised:
            found["bytes"] = written.copy.num_bytes()
        write_json(draft / PROVENANCE_FILE, history)
        if card:
            (draft / "README.md").write_text(card(plan.parent, found), encoding="utf-8")
    return found


def _prove_twin(witness: Witness, origin: Origin, plan: Plan) -> tuple[LogitsProof | None, str]:
    try:
        twin = twin_model(plan.parent.config)
    except UserError as error:
        say(str(error))
        return None, str(error)
    with waiting("rehearsing the cut on a tiny twin"):
        return prove_twin(witness, twin, plan.segment, trust_remote_code=origin.trust_remote_code), ""


def _write(origin: Origin, plan: Plan, draft: Path, parent: Loaded | None, device: str, dtype: str) -> Written:
    source = checkpoint_folder(origin)
    if source is None:
        if parent is None:
            with waiting(f"loading {origin.name}"):
                parent = load_origin(origin, device=device, dtype=dtype)
        model, _ = cut_model(find_layers(parent.model), plan.segment)
        save_decoder(model, parent.tokenizer, draft, dtype=origin.dtype)
        return Written(plan, draft, parent, None, None, {})
    if parent is None and not origin.quantised:
        require_all_weights(origin)
    weights = read_weights(source)
    require_room(draft.parent, weights.num_bytes() * num_parameters(plan.cut) // num_parameters(plan.parent))
    copy, renamed = cut_folder(weights, plan, draft)
    carry_files(source, draft)
    if origin.quantised:
        renumber_files(draft, Modules.of(plan.parent, plan.path, plan.segment))
    if not (draft / "generation_config.json").exists():
        _generation_settings(source).to_json_file(draft / "generation_config.json")
    return Written(plan, draft, parent, weights, copy, renamed)


def _generation_settings(source: Path) -> GenerationConfig:
    """Return the settings that older checkpoints keep in config.json, and that a new config leaves out."""
    stated = json.loads((source / "config.json").read_text(encoding="utf-8"))
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    return GenerationConfig(**{name: stated[name] for name in known if stated.get(name) is not None})


def _prove(
    witness: Witness,
    origin: Origin,
    written: Written,
    twin: LogitsProof | None,
    no_twin: str,
    *,
    device: str,
    dtype: str,
    proof: str,
    minutes: float,
) -> Proof:
    left_out = {"twin": no_twin} if no_twin else {}
    tensors, rate = _compare_tensors(written)
    if tensors is None:
        left_out["tensors"] = "the parent's numbers were converted on loading, so its files hold other bytes"
    text_only = text_part(written.plan.config) is not written.plan.config
    if proof == "memory" or (proof == "auto" and _fits(origin, written, device, dtype)):
        with waiting("proving the checkpoint in a fresh process"), without_bars():
            loaded = written.parent or load_origin(origin, device=device, dtype=dtype)
            remote = origin.trust_remote_code
            expected = expect(find_layers(loaded.model), written.plan.segment, trust_remote_code=remote)
            del loaded
            logits = prove_logits(witness, written.folder, expected)
        return Proof("fresh process", logits, twin, tensors, left_out, text_only)
    if twin is None or tensors is None:
        raise UserError(
            f"{origin.name} is too large to be compared in memory, and {' and '.join(left_out.values())}"
            " - use a machine with more memory, or --no-verify"
        )
    if reason := _too_much(written, rate, minutes):
        return Proof("two parts", None, twin, tensors, left_out | {"logits": reason}, text_only)
    with waiting("proving the checkpoint with its weights on disk"):
        logits = _prove_from_disk(witness, origin, written)
    return Proof("three parts", logits, twin, tensors, left_out, text_only)


def _too_much(written: Written, rate: float, minutes: float) -> str:
    """Return why logits cannot be computed from disk; empty if they can.

    Args:
        written: the checkpoint.
        rate: bytes a second that the comparison of the tensors read.
        minutes: how long it may take.
    """
    needed = 2 * written.source.num_bytes() / rate / 60 if written.source else 0.0
    if needed > minutes:
        return f"reading both checkpoints would take about {needed:.2g} minutes, over cut.proof_minutes={minutes:g}"
    largest = LOADED_TENSORS * 4 * max(parameter.numel() for parameter in written.plan.parent.parameters())
    if largest > MEMORY_SHARE * free_bytes(torch.device("cpu")):
        return f"to load its largest tensor takes {largest / 2**30:.1f} GiB"
    return ""


def _compare_tensors(written: Written) -> tuple[TensorsProof | None, float]:
    """Return the proof, and the bytes a second that it read."""
    if written.source is None or written.copy is None:
        return None, 0.0
    began = time.monotonic()
    found = prove_tensors(written.source, written.copy, written.renamed)
    return found, 2 * found.num_bytes / max(time.monotonic() - began, 1e-3)


def _fits(origin: Origin, written: Written, device: str, dtype: str) -> bool:
    """Whether the parent, or beside a loaded parent the checkpoint, can be loaded whole."""
    place = choose_device(device)
    model = written.plan.cut if written.parent else written.plan.parent
    needed = num_parameters(model) * choose_dtype(dtype, place, origin.dtype).itemsize
    return needed <= MEMORY_SHARE * free_bytes(place)


def _prove_from_disk(witness: Witness, origin: Origin, written: Written) -> LogitsProof:
    with tempfile.TemporaryDirectory() as scratch:
        on_disk = {"device_map": {"": "disk"}, "offload_folder": scratch}
        loaded = load_origin(origin, device="cpu", dtype="float32", **on_disk)
        expected = expect(
            find_layers(loaded.model),
            written.plan.segment,
            length=STREAMED_TOKENS,
            trust_remote_code=origin.trust_remote_code,
        )
        del loaded
    return prove_logits(witness, written.folder, expected, generate=False, from_disk=True)
