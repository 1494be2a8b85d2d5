"""How much faster fewer layers are: prefill and decoding of LLaMA2-7B's shape by depth, and of the real model on a CPU.

    python benchmarks/speed.py --parts gpu latency --out docs/benchmarks/speed.json --minutes 2.6
    python benchmarks/speed.py --parts cpu tasks --threads 2 --out docs/benchmarks/speed.json
    python benchmarks/speed.py --out docs/benchmarks/speed.json --table --doc docs/benchmarks/speed.md

gpu      Random weights of LLaMA2-7B's shape, whole and with 10, 20 and 30 % of the layers cut from the middle, sharing
         tensors. All four take turns in every round. Speed-ups stand beside the ideal L / (L - n) and beside the floor:
         bytes and operations on paper, at the rates that a copy and a matrix product reach in the same run. Decoding by
         a CUDA graph over a static cache, and plainly.
latency  The fit of milliseconds a token to the number of layers, on the whole model with layers bypassed, and what it
         predicts of the cut models beside what part gpu measured.
cpu      The real model, whole and without a fifth of its layers, in turns on so many threads.
tasks    Items a second of `scalpel evaluate` and of the harness's own `hf` model, in turns on the same items.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from heal_tables import insert
from measuring import Row, Rows, arguments, reset_peak
from speed_floor import Floor, Rates
from speed_sizes import TINY, WHOLE, SpeedSizes, cut, depths, num_layers_of, random_decoder, removed_counts
from speed_tables import TABLES, seconds_of, tables
from transformers import PreTrainedModel

from layerscalpel.benchmark import timing
from layerscalpel.decoder import choose_device, load_decoder
from layerscalpel.graphs import NoGraphError
from layerscalpel.latency import measure_latency
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet
from layerscalpel.settings import BenchmarkSettings
from layerscalpel.turns import GRAPH, GROWING, Job

Opened = Callable[[], tuple[Decoder, Rates]]


def key_of(mode: str, job: Job) -> Row:
    return {"mode": mode, **vars(job)}


def timed_row(models: Mapping[str, PreTrainedModel], mode: str, job: Job, repeats: int, rates: Rates) -> Row:
    """Time all depths in turns; a way of decoding that does not work leaves its reason."""
    reset_peak()
    try:
        found = timing(models, job, mode, repeats=repeats)
    except NoGraphError as error:
        return {"failed": str(error)}
    layers = num_layers_of(models)
    floors = {name: Floor.of(model) for name, model in models.items()}
    return {
        "models": {name: found[name] for name in models},
        "speedups": found.get("speedups") or {found["speedup"]["of"]: found["speedup"]},
        "layers": layers,
        "ideal": {name: layers[WHOLE] / count for name, count in layers.items()},
        "floor_prefill_s": {name: floor.prefill_s(job, rates) for name, floor in floors.items()},
        "floor_step_s": {name: floor.step_s(job, rates) for name, floor in floors.items()},
        "rates": rates.to_dict(),
        "rounds": repeats,
        "plain_prefill": found.get("plain_prefill"),
    }


def gpu(rows: Rows, opened: Opened, sizes: SpeedSizes) -> None:
    """Time four depths of the large shape."""

    @functools.cache
    def models() -> dict[str, PreTrainedModel]:
        return depths(opened()[0], sizes.rates)

    for mode, job, repeats in sizes.plan():
        if mode == GRAPH and not torch.cuda.is_available():
            print(f"not measured: {mode}, {job}: there is no CUDA device")
            continue
        work = functools.partial(measured_row, models, mode, job, repeats, lambda: opened()[1])
        rows.measure(work, part="gpu", **key_of(mode, job))


def measured_row(
    models: Callable[[], Mapping[str, PreTrainedModel]], mode: str, job: Job, repeats: int, rates: Callable[[], Rates]
) -> Row:
    """Open the models, and time them."""
    return timed_row(models(), mode, job, repeats, rates())


def latency(rows: Rows, opened: Opened, sizes: SpeedSizes) -> None:
    """Fit milliseconds to depth, and compare the predictions with the cut models of part gpu."""
    batch, prompt = sizes.batches[0], sizes.prompts[0]
    mode, new = (GRAPH, sizes.graph_tokens) if torch.cuda.is_available() else (GROWING, sizes.eager_tokens)
    job = Job(batch, prompt, new)

    def measured() -> Row:
        decoder, _ = opened()
        reset_peak()
        settings = BenchmarkSettings(
            prompt_tokens=prompt, new_tokens=new, batch_size=batch, batch_sizes=(), repeats=sizes.repeats
        )
        fit = measure_latency(decoder, settings)
        counts = [len(decoder) - n for n in (0, *removed_counts(sizes.rates, len(decoder)))]
        other = rows.find(part="gpu", **key_of(mode, job)) or {}
        steps = {
            str(layers): 1000 * seconds_of(other, name)["decode"] for name, layers in other.get("layers", {}).items()
        }
        predicted = {str(count): fit.of(count).to_dict() for count in counts}
        return {"fit": fit.to_dict(), "predicted_ms": predicted, "measured_ms": steps}

    rows.measure(measured, part="latency", **key_of(mode, job))


def cpu(rows: Rows, given: argparse.Namespace, sizes: SpeedSizes) -> None:
    """Time the real model and its cut on a CPU."""
    threads = torch.get_num_threads()

    def measured() -> Row:
        torch.set_num_threads(given.threads)
        try:
            device = torch.device("cpu")
            whole = find_layers(load_decoder(given.model, device="cpu", dtype="float32").model)
            (n,) = removed_counts([sizes.real_rate], len(whole))
            models = {WHOLE: whole.model, str(n): cut(whole, n)}
            rates = Rates.of(device, matmul=min(sizes.matmul, 2048), copied=min(sizes.copied, 1 << 28))
            return timed_row(models, GROWING, sizes.real, sizes.repeats, rates)
        finally:
            torch.set_num_threads(threads)

    rows.measure(measured, part="cpu", model=given.model, threads=given.threads, **key_of(GROWING, sizes.real))


def tasks(rows: Rows, given: argparse.Namespace, sizes: SpeedSizes) -> None:
    """Compare with the harness, which is needed for this part alone."""
    from speed_tasks import evaluation

    evaluation(rows, given, sizes)


PARTS = ("gpu", "latency", "cpu", "tasks")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--model", default="demo", help="the real model")
    parser.add_argument("--threads", type=int, default=2, help="of the real model")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and few rounds: does it run?")
    parser.add_argument("--doc", type=Path, help="a document to insert the tables into")
    given = parser.parse_args(argv)
    set_quiet(True)
    rows, sizes = Rows(given.out, given.minutes, again=given.again), TINY if given.tiny else SpeedSizes()

    @functools.cache
    def opened() -> tuple[Decoder, Rates]:
        device = choose_device(given.device)
        return random_decoder(sizes, device), Rates.of(device, matmul=sizes.matmul, copied=sizes.copied)

    parts: dict[str, Callable[[], Any]] = {
        "gpu": lambda: gpu(rows, opened, sizes),
        "latency": lambda: latency(rows, opened, sizes),
        "cpu": lambda: cpu(rows, given, sizes),
        "tasks": lambda: tasks(rows, given, sizes),
    }
    for part in () if given.table else given.parts:
        parts[part]()
    print(tables(rows.all))
    if given.doc:
        insert(given.doc, TABLES, rows.all)


if __name__ == "__main__":
    main()
