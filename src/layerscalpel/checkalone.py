"""One checkpoint in one engine: what `scalpel check` does.

results = check_alone("runs/demo", Check("vllm", python="/envs/vllm/bin/python"))
results["check"]["vllm"]["ppl_ratio"]
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscalpel.checkengine import Asked, Reference, check_engine, questions, reference_of
from layerscalpel.chosen import LAST, checkpoint_of, held_out_text, is_run
from layerscalpel.decoder import load_origin
from layerscalpel.engines import file_for, installed, missing
from layerscalpel.errors import UserError
from layerscalpel.footprint import folder_bytes
from layerscalpel.origin import peek
from layerscalpel.progress import waiting


@dataclass(frozen=True)
class Check:
    """What is checked, and how."""

    engine: str
    """Of engines.ENGINES."""
    python: str = sys.executable
    """The interpreter it is installed in."""
    text: str | None = None
    """Held-out text; None takes the run's own, or the packaged one."""
    num_blocks: int = 32
    reference: str | None = None
    """Another checkpoint to compare with, as the one that a GGUF was made from."""
    trust_remote_code: bool = False


def check_alone(target: str, check: Check) -> dict[str, Any]:
    """Return {"model": what it is, "check": {engine: findings}}, the form of results.json.

    Args:
        target: run directory, whose last checkpoint is taken, checkpoint folder, hub id, or .gguf file.
        check: how.

    Raises:
        UserError: an engine that is missing or fails, or a checkpoint it cannot read.
    """
    name, remote = check.engine, check.trust_remote_code
    if not installed(name, check.python):
        raise UserError(missing(name, check.python))
    place = _place(target, name, remote)
    file = file_for(name, place)
    source = checkpoint_of(check.reference, LAST, trust_remote_code=remote) if check.reference else place
    asked, said = _reference(source, check.text or held_out_text(target), check.num_blocks, remote)
    found = check_engine(name, file, asked, said, python=check.python, trust_remote_code=remote)
    size = file.stat().st_size if file.is_file() else folder_bytes(file)
    return {"model": {"name": str(file), "bytes": size}, "check": {name: found | {"reference": str(source)}}}


def _place(target: str, name: str, trust_remote_code: bool) -> Path:
    """Return the checkpoint that is meant; for llama.cpp a run's exported file comes first."""
    exported = sorted((Path(target).expanduser() / "export").glob("*.gguf")) if is_run(target) else []
    if name == "llama.cpp" and len(exported) > 1:
        files = ", ".join(path.name for path in exported)
        raise UserError(f"{target} has several exported files ({files}) - name one: scalpel check {exported[0]} ...")
    if name == "llama.cpp" and exported:
        return exported[0]
    return checkpoint_of(target, LAST, trust_remote_code=trust_remote_code)


def _reference(source: Path, text: str, num_blocks: int, trust_remote_code: bool) -> tuple[Asked, Reference]:
    with waiting(f"transformers, float32: loading {source}"):
        origin = peek(str(source), allow_quantised=True, trust_remote_code=trust_remote_code)
        loaded = load_origin(origin, dtype="float32")
    if loaded.tokenizer is None:
        raise UserError(f"{source} has no tokenizer, so no text can be read - add its tokenizer files")
    asked = questions(loaded.tokenizer, text=text, num_blocks=num_blocks, context=origin.max_tokens)
    said = reference_of(loaded.model, asked)
    del loaded
    gc.collect()  # the engine wants the memory
    return asked, said
