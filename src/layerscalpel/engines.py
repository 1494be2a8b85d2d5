"""Time checkpoints in other inference engines, where these are installed: vLLM and llama.cpp.

The same quantities as in benchmark.py, on the same prompt where the engine takes one. An engine holds its memory to
itself, so the models come one after the other, not in turns, and their ratio carries both errors. Peak memory is left
out: vLLM takes what it may have, whatever it needs. Neither engine was at hand when this was written: it was tested
against stand-ins only (docs/methods.md#engines).

    measure_engines(["vllm"], {"parent": folder, "healed": other}, prompt_BT, job, repeats=5)
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel.benchmark import figures, median
from layerscalpel.errors import UserError
from layerscalpel.losses import Measured
from layerscalpel.progress import say, waiting
from layerscalpel.speedwords import no_difference, tells
from layerscalpel.turns import Job, Turn

BENCH = "llama-bench"
MOST_MEMORY = 0.9
"""Share of the device's free memory that vLLM may take."""
Measure = Callable[[Path, Tensor, Job, int], dict[str, Any]]


@dataclass(frozen=True)
class Engine:
    """An inference engine."""

    installed: Callable[[], bool]
    install: str
    """What to do where it is missing."""
    measure: Measure
    """(checkpoint, prompt [B, T], job, rounds) -> figures, or {"missing": why}."""


def measure_engines(
    names: Sequence[str], places: Mapping[str, Path], prompt_BT: Tensor, job: Job, *, repeats: int
) -> dict[str, Any]:
    """Return {engine: {model: figures, "speedup": ...}}; `missing` says why there is nothing.

    Args:
        names: of ENGINES.
        places: {model: its checkpoint folder or file}; the last is compared with the first.
        prompt_BT: token ids.
        job: how much is read and written.
        repeats: rounds, after one that warms up.
    """
    found: dict[str, Any] = {}
    for name in names:
        engine = ENGINES[name]
        if engine.installed():
            found[name] = {model: _measured(name, place, prompt_BT, job, repeats) for model, place in places.items()}
            found[name] |= _speed_up(list(found[name].values()))
        else:
            found[name] = {"missing": f"{name} is not installed - {engine.install}"}
            say(f"{found[name]['missing']}; the benchmark goes on without it")
    return found


def _measured(name: str, place: Path, prompt_BT: Tensor, job: Job, repeats: int) -> dict[str, Any]:
    with waiting(f"{name}: {place}"):
        found = ENGINES[name].measure(place, prompt_BT, job, repeats)
    if "missing" in found:
        say(f"{name}: {found['missing']}")
    return found


def _speed_up(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ratios of the last model's speed to the first's."""
    first, last = rows[0], rows[-1]
    if len(rows) < 2 or "missing" in first or "missing" in last:
        return {}
    ratios = {
        "prefill": _ratio(first["prefill_s"], last["prefill_s"]),
        "decode": _ratio(last["decode_tokens_per_s"], first["decode_tokens_per_s"]),
    }
    undecided = {kind: no_difference(ratio) for kind, ratio in ratios.items() if not tells(ratio)}
    return {"speedup": ratios | ({"undecided": undecided} if undecided else {})}


def _ratio(above: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ratio of two quantities whose rounds are not paired."""
    value = above["value"] / below["value"]
    error = value * math.hypot(*(each["se"] / each["value"] for each in (above, below)))
    return Measured(value, error, min(above["n"], below["n"])).to_dict()


def _importable(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _in_vllm(place: Path, prompt_BT: Tensor, job: Job, repeats: int) -> dict[str, Any]:
    """Time vLLM's offline engine: one token, then all of them; the difference is the decoding's."""
    if not place.is_dir():
        return {"missing": f"{place.name} is no checkpoint folder, which vLLM reads - save one: scalpel cut"}
    import vllm  # type: ignore[import-not-found]

    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (1, 1)
    engine = vllm.LLM(
        model=str(place),
        max_model_len=job.prompt_tokens + job.new_tokens,
        max_num_seqs=job.batch_size,
        enable_prefix_caching=False,  # the same prompt comes again and again
        gpu_memory_utilization=MOST_MEMORY * free / total,
    )
    one, all_of_them = (
        vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (1, job.new_tokens)
    )
    prompts, turns = [{"prompt_token_ids": row} for row in prompt_BT.tolist()], []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        engine.generate(prompts, one, use_tqdm=False)
        read = time.perf_counter()
        engine.generate(prompts, all_of_them, use_tqdm=False)
        first, whole = read - began, time.perf_counter() - read
        turns.append(Turn(prefill_s=first, first_token_s=first, decode_s=whole - first))
    del engine  # the next one wants its memory
    gc.collect()
    return figures(turns[1:], job)


def _in_llama_cpp(place: Path, prompt_BT: Tensor, job: Job, repeats: int) -> dict[str, Any]:
    """Time a GGUF by the program llama-bench, or through llama-cpp-python."""
    files = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    if len(files) != 1:
        return {
            "missing": f"{place} holds {len(files)} .gguf files, llama.cpp reads one - convert the checkpoint into its"
            " folder with llama.cpp's convert_hf_to_gguf.py"
        }
    if job.batch_size > 1:
        return {"missing": f"{job.batch_size} sequences at once are not timed in llama.cpp - benchmark.batch_size=1"}
    if shutil.which(BENCH):
        return _by_program(files[0], job, repeats)
    return _by_package(files[0], prompt_BT, job, repeats)


def _by_program(file: Path, job: Job, repeats: int) -> dict[str, Any]:
    """Ask llama-bench, which warms up by itself and decodes from an empty context."""
    sizes = {"-p": job.prompt_tokens, "-n": job.new_tokens - 1, "-r": repeats, "-t": torch.get_num_threads()}
    options = [str(word) for pair in sizes.items() for word in pair]
    done = subprocess.run([BENCH, "-m", str(file), *options, "-o", "json"], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{BENCH} failed on {file} ({last}) - leave llama.cpp out of benchmark.engines")
    rows = json.loads(done.stdout)
    read, written = (next(row["samples_ns"] for row in rows if row[kind]) for kind in ("n_prompt", "n_gen"))
    return {
        "prefill_s": median([ns / 1e9 for ns in read]).to_dict(),
        "decode_tokens_per_s": median([1e9 * (job.new_tokens - 1) / ns for ns in written]).to_dict(),
        "by": BENCH,
    }


def _by_package(file: Path, prompt_BT: Tensor, job: Job, repeats: int) -> dict[str, Any]:
    """Call llama-cpp-python."""
    import llama_cpp  # type: ignore[import-not-found]

    length, layers = job.prompt_tokens + job.new_tokens, -1 if torch.cuda.is_available() else 0
    how = {"n_ctx": length, "n_batch": job.prompt_tokens, "n_threads": torch.get_num_threads(), "n_gpu_layers": layers}
    model, turns = llama_cpp.Llama(model_path=str(file), verbose=False, **how), []
    for _ in range(repeats + 1):
        model.reset()
        began = time.perf_counter()
        model.eval(prompt_BT[0].tolist())
        token = model.sample(temp=0.0)
        read = time.perf_counter()
        for _ in range(job.new_tokens - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        turns.append(Turn(read - began, read - began, time.perf_counter() - read))
    return figures(turns[1:], job) | {"by": "llama-cpp-python"}


ENGINES: dict[str, Engine] = {
    "vllm": Engine(lambda: _importable("vllm"), "pip install vllm", _in_vllm),
    "llama.cpp": Engine(
        lambda: bool(shutil.which(BENCH)) or _importable("llama_cpp"),
        f"pip install llama-cpp-python, or put {BENCH} on the PATH",
        _in_llama_cpp,
    ),
}
"""{name: engine}, as settings name them."""
