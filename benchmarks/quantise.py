"""What quantising costs and saves: the real model, pruned and whole, by method and settings; time by depth at 7B.

    python benchmarks/quantise.py --parts real --healed runs/demo/heal/model --out docs/benchmarks/quantise.json
    python benchmarks/quantise.py --parts gpu --out docs/benchmarks/quantise.json
    python benchmarks/quantise.py --out docs/benchmarks/quantise.json --table --doc docs/benchmarks/quantise.md

real  The parent, the pruned and healed model, and each of them rounded to nearest and by GPTQ, in several widths and
      settings; also layers cut out of the quantised parent. Bytes of whole folders, perplexity on held-out C4 and on
      WikiText-2, KL to the healed model and to the parent, errors of healed and untouched layers apart.
gpu   Random weights of LLaMA2-7B's shape: seconds of GPTQ on the whole model and on one without a fifth of its layers,
      in turns.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heal_tables import insert
from measuring import Row, Rows, arguments, peak_bytes, reset_peak, seconds
from quantise_real import Bench
from quantise_sizes import PLAN, TINY, QuantiseSizes, Trial
from quantise_tables import TABLES, tables
from shapes import random_model, random_tokens

from layerscalpel.decoder import choose_device
from layerscalpel.gptq import solve
from layerscalpel.progress import set_quiet
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings

DATA = Path("../shared/data")


def gpu(rows: Rows, given: argparse.Namespace, sizes: QuantiseSizes) -> None:
    """Time GPTQ on whole and pruned models in turns."""
    device = choose_device(given.device)
    for whole, pruned, rounds in sizes.depths:
        work = functools.partial(timed_row, (whole, pruned), rounds, sizes, device)
        rows.measure(work, part="gpu", layers=whole, pruned_layers=pruned)


def timed_row(depths: tuple[int, int], rounds: int, sizes: QuantiseSizes, device: torch.device) -> Row:
    """Quantise both, each as often as the other, after a small one that warms up."""
    solving_s(2, sizes, device)
    reset_peak()
    took_s = [[solving_s(depth, sizes, device) for depth in depths] for _ in range(rounds)]
    return {
        "whole_s": [turn[0] for turn in took_s],
        "pruned_s": [turn[1] for turn in took_s],
        "peak_bytes": peak_bytes(),
    }


def solving_s(depth: int, sizes: QuantiseSizes, device: torch.device) -> float:
    """Return the seconds of GPTQ on a random model of so many layers."""
    config = sizes.shape.config(vocab=sizes.vocab, layers=depth)
    model: Any = random_model(config, device).cpu()
    scheme = Scheme.of(model, QuantizeSettings(method="gptq", group_size=sizes.group_size))
    tokens_NT = random_tokens(sizes.tokens, sizes.vocab)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model.config._name_or_path = folder  # where the library looks whether the model is quantised already
        return seconds(lambda: solve(model, tokens_NT, scheme, torch.bfloat16))[1]


def real(rows: Rows, given: argparse.Namespace, sizes: QuantiseSizes) -> None:
    """Measure every trial of the plan on the real model."""

    @functools.cache
    def bench() -> Bench:
        return Bench(given.model, given.healed, given.segment, given.data, given.work, sizes)

    plan = [trial for trial in PLAN if not given.only or trial.name in given.only]
    for trial in plan:
        rows.measure(functools.partial(measured_row, bench, trial), part="real", name=trial.name)


def measured_row(bench: Callable[[], Bench], trial: Trial) -> Row:
    """Open the models, and measure one."""
    return bench().row(trial)


PARTS = {"real": real, "gpu": gpu}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--model", default="demo", help="the parent of the real model")
    parser.add_argument("--healed", type=Path, help="folder of the pruned and healed model")
    parser.add_argument("--segment", default="13:19", help="what was cut out of it")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the measuring data")
    parser.add_argument("--work", type=Path, default=Path("runs/quantise"), help="folder for the models that are made")
    parser.add_argument("--only", nargs="+", help="names of the trials to measure")
    parser.add_argument("--threads", type=int, default=2, help="of the real model")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and little text: does it run?")
    parser.add_argument("--doc", type=Path, help="a document to insert the tables into")
    given = parser.parse_args(argv)
    set_quiet(True)
    rows, sizes = Rows(given.out, given.minutes, again=given.again), TINY if given.tiny else QuantiseSizes()
    if "real" in given.parts and given.healed is None:
        parser.error("part real needs --healed: the folder of a pruned and healed model")
    if "real" in given.parts:
        torch.set_num_threads(given.threads)
    for part in () if given.table else given.parts:
        PARTS[part](rows, given, sizes)
    print(tables(rows.all))
    if given.doc:
        insert(given.doc, TABLES, rows.all)


if __name__ == "__main__":
    main()
