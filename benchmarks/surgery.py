"""Cut a synthetic sharded checkpoint of several GB: copy bandwidth against cp, and peak memory of the whole command.

    python benchmarks/surgery.py --folder /tmp/surgery --layers 32 --gib 6

Writes docs/benchmarks/surgery.json. The checkpoint has LLaMA's shapes and random bfloat16 weights. In every round, in
turns: `cp` of the whole checkpoint, and our copy of what is kept of it, in bytes a second; the source is out of the
page cache before and the copy on disk after. Memory is what the process and all it starts hold at once, sampled every
20 ms: anonymous, and resident with mapped pages of files, which the system takes back when it needs room. That it can
is shown by running all of it under a hard limit (a control group; needs root).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from layerscalpel.cut import cut_folder
from layerscalpel.origin import skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.segment import Segment
from layerscalpel.shards import read_weights

ROOT = Path(__file__).parents[1]


def write_checkpoint(folder: Path, gib: float, num_layers: int) -> LlamaConfig:
    """Write a LLaMA of about that size in shards of at most 1 GiB, unless it is there."""
    per_layer = gib * 2**30 / 2 / (num_layers + 1)
    hidden = int((per_layer / 12.25) ** 0.5) // 128 * 128
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.75) // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 128,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    if (folder / "config.json").exists():
        return config
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in skeleton(config).named_parameters()}
    groups: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(s.numel() for s in groups[-1].values()) * 2 > 2**30:
            groups.append({})
        groups[-1][name] = shape
    index = {}
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file({n: (torch.randn(s) * 0.02).bfloat16() for n, s in group.items()}, folder / shard, {"format": "pt"})
        index |= dict.fromkeys(group, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.save_pretrained(folder)
    return config


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(action: Any, source: Path) -> float:
    """Return the seconds of an action that reads a folder not in the page cache and has its copy on disk at the end."""
    forget(source)
    began = time.perf_counter()
    action()
    os.sync()
    return time.perf_counter() - began


def bandwidth(folder: Path, config: LlamaConfig, segment: Segment, rounds: int) -> dict[str, Any]:
    """Copy out of the same cold files with cp (all of them) and with our own copy (what is kept), in turns."""
    source, ours, theirs = folder / "model", folder / "ours", folder / "theirs"
    plan, weights = plan_cut(skeleton(config), segment), read_weights(source)
    for used in (ours, theirs):
        shutil.rmtree(used, ignore_errors=True)
    found: dict[str, list[float]] = {"cp_bytes_per_s": [], "cut_bytes_per_s": []}
    kept = 0
    for _ in range(rounds):
        took = timed(lambda: subprocess.run(["cp", "-r", str(source), str(theirs)], check=True), source)
        found["cp_bytes_per_s"].append(weights.num_bytes() / took)
        shutil.rmtree(theirs)
        took = timed(lambda: cut_folder(weights, plan, ours), source)
        kept = read_weights(ours).num_bytes()
        found["cut_bytes_per_s"].append(kept / took)
        shutil.rmtree(ours)
        print(found, flush=True)
    ratios = [cut / cp for cp, cut in zip(*found.values(), strict=True)]
    ratio = {"value": statistics.median(ratios), "least": min(ratios), "n": rounds}
    return found | {"kept_bytes": kept, "cut_bandwidth_over_cp": ratio}


def control_group(limit: int) -> Path | None:
    """Make a control group with a memory limit in bytes; None where the system does not let us."""
    for root, name in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / "layerscalpel-benchmark"
        try:
            group.mkdir(exist_ok=True)
            (group / name).write_text(str(limit))
        except OSError:
            continue
        return group
    return None


def peak_memory(folder: Path, segment: Segment, limit: int, *flags: str) -> dict[str, Any]:
    """Run the whole command under a limit and return the most memory that it and its children held at once."""
    group = control_group(limit)
    out = folder / "cut"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("scalpel")), "cut", str(folder / "model")]
    command += ["--segment", f"{segment.start}:{segment.stop}", "--out", str(out), "--json", *flags]
    forget(folder / "model")
    began = time.perf_counter()
    enter = (lambda: (group / "cgroup.procs").write_text(str(os.getpid()))) if group else None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    peak = {"resident_bytes": 0, "anonymous_bytes": 0}

    def watch() -> None:
        while process.poll() is None:
            resident = anonymous = 0
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    memory = one.memory_info()
                except psutil.Error:
                    continue
                resident, anonymous = resident + memory.rss, anonymous + memory.rss - memory.shared
            peak["resident_bytes"] = max(peak["resident_bytes"], resident)
            peak["anonymous_bytes"] = max(peak["anonymous_bytes"], anonymous)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = process.communicate()[0]
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    shutil.rmtree(out)
    wall_s = time.perf_counter() - began
    held = {"limit_bytes": limit if group else None, "wall_s": wall_s, "flags": list(flags)}
    return peak | held | {"proof": json.loads(answer)["proof"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit-gib", type=float, default=4.0)
    arguments = parser.parse_args()
    config = write_checkpoint(arguments.folder / "model", arguments.gib, arguments.layers)
    start = arguments.layers // 2
    segment = Segment(start, start + arguments.layers // 5, arguments.layers)
    results: dict[str, Any] = {
        "checkpoint_bytes": read_weights(arguments.folder / "model").num_bytes(),
        "segment": str(segment),
        "bandwidth": bandwidth(arguments.folder, config, segment, arguments.rounds),
    }
    path = ROOT / "docs/benchmarks/surgery.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, flags in {
        "unproven": ["--no-verify"],
        "parts_without_logits": ["--set", "cut.proof=parts", "--set", "cut.proof_minutes=0"],
        "parts": ["--set", "cut.proof=parts"],
    }.items():
        results[name] = peak_memory(arguments.folder, segment, int(arguments.limit_gib * 2**30), *flags)
        print(name, {k: v for k, v in results[name].items() if k != "proof"}, flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
