"""How often does the gate reach the exact optimum, and what does that hang on?

    python benchmarks/gate_study.py --model demo --c4 c4.jsonl.gz --wiki wiki.test.raw.txt --alpaca alpaca.jsonl.gz \
        --out docs/benchmarks/gate.json --minutes 5 --worker 0/4
    python benchmarks/gate_study.py --out docs/benchmarks/gate.json --merge
    python benchmarks/gate_study.py --out docs/benchmarks/gate.json --table

One factor at a time around the default (steepness 1 to 5, lr 0.3, 128 blocks of C4), for n = 3, 6, 9, 12, three seeds.
Every row learns all whole starts 0 .. L - n and the evenly spaced ones of k = 1, 3, 5 in one batch. Streams do not see
each other, so single starts and the best of k are all read off one run. As in the search itself, an end is the better
of the two whole neighbours on the calibration blocks, and so is the best of k; the optimum is the exact one on held-out
blocks: of C4, and of the row's own domain.

Rows are written as they are measured and not measured again. Workers share a GPU; each writes FILE.i. Their seconds are
those of a shared GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gate_tables import BEST_OF, DEFAULT, FACTORS, VARIATIONS, Row, key_of, parts_of, rows_in, tables, write

from layerscalpel.clp import better_neighbours
from layerscalpel.config import build_config
from layerscalpel.data import prepare_blocks
from layerscalpel.decoder import load_decoder
from layerscalpel.exact import WindowScores, score_windows
from layerscalpel.gate import learn_starts, spread_starts
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet
from layerscalpel.selftext import sample_blocks


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    depths: tuple[int, ...] = (3, 6, 9, 12)
    seeds: int = 3
    block_tokens: int = 256
    held_out: int = 64
    most_blocks: int = 512
    every_start: bool = True

    def plan(self) -> list[Row]:
        """Return the factors of all rows, the default of all seeds first, the long ones last."""
        rows: dict[str, Row] = {}
        for seed in range(self.seeds):
            for turn, change in enumerate(VARIATIONS.values()):
                for i in range(len(self.depths)):  # turned, so that each of a few workers gets all depths
                    row = {"n": self.depths[(seed + turn + i) % len(self.depths)], "seed": seed, **DEFAULT, **change}
                    row["blocks"] = min(row["blocks"], self.most_blocks)
                    rows[key_of(row)] = row
        changed = {key: sum(row[name] != value for name, value in DEFAULT.items()) for key, row in rows.items()}
        return [rows[key] for key in sorted(rows, key=lambda key: (rows[key]["blocks"] > 128, changed[key]))]

    def starts(self, last: int) -> list[float]:
        """Return every whole start and the evenly spaced ones."""
        if not self.every_start:
            return spread_starts(3, last)
        return sorted({*map(float, range(last + 1)), *(a for k in BEST_OF.values() for a in spread_starts(k, last))})


TINY = Sizes(depths=(6,), seeds=1, block_tokens=32, held_out=3, most_blocks=2, every_start=False)
"""To see whether it runs at all."""


class Study:
    """The model, and what its rows share: blocks and the exact scores on them."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes, scratch: Path) -> None:
        self.model, self.tokenizer, _ = load_decoder(given.model, device=given.device, dtype="float32")
        self.decoder: Decoder = find_layers(self.model)
        self.sizes = sizes
        self.files = {"c4": (given.c4, given.c4), "alpaca": (given.alpaca, given.alpaca)}
        self.files["wiki"] = halves(given.wiki, scratch)
        self.blocks = functools.cache(self._blocks)
        self.scores = functools.cache(self._scores)

    def _blocks(self, domain: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return calibration and held-out blocks of a domain."""
        most = min(self.sizes.most_blocks, 512 if domain == "c4" else DEFAULT["blocks"])
        if domain == "self":
            how = {"block_tokens": self.sizes.block_tokens, "batch_size": 64}
            counts = enumerate((most, self.sizes.held_out))
            drawn = [
                sample_blocks(self.model, self.tokenizer, num_blocks=count, seed=2 * seed + part, **how)
                for part, count in counts
            ]
            return drawn[0].tokens, drawn[1].tokens
        calibration, held_out = self.files[domain]
        settings = {
            "data.calibration": str(calibration),
            "data.evaluation": str(held_out),
            "data.block_tokens": self.sizes.block_tokens,
            "data.evaluation_blocks": self.sizes.held_out,
        }
        config = build_config([settings])
        parts = prepare_blocks(self.tokenizer, config.data, num_calibration=most, seed=seed, heal=False)
        return parts.calibration.tokens, parts.evaluation.tokens

    def _scores(self, domain: str, seed: int, n: int, calibration_blocks: int) -> WindowScores:
        """Return the exact scores on so many calibration blocks, or at 0 on the held-out ones."""
        calibration, held_out = self.blocks(domain, seed)
        tokens = calibration[:calibration_blocks] if calibration_blocks else held_out
        return score_windows(self.decoder, tokens, num_removed=n, batch_size=16)

    def measure(self, row: Row) -> Row:
        """Learn the starts of a row and judge where they end."""
        n, seed, domain = row["n"], row["seed"], row["domain"]
        last = len(self.decoder) - n
        initial = self.sizes.starts(last)
        tokens = self.blocks(domain, seed)[0][: row["blocks"]]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        path = learn_starts(
            self.decoder, tokens, num_removed=n, initial=initial, steepness=tuple(row["steepness"]), lr=row["lr"]
        )
        took = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        chosen_by = self.scores(domain, seed, n, min(64, len(tokens)))
        ends = better_neighbours(chosen_by, path.neighbours(last))
        judges = {"c4": self.scores("c4", seed, n, 0)}
        if domain != "c4":
            judges["own"] = self.scores(domain, seed, n, 0)
        return {
            **row,
            "initial": initial,
            "learned": [round(a, 2) for a in path.starts[-1]],
            "ends": ends,
            **{name: judged(held_out, chosen_by, initial, ends) for name, held_out in judges.items()},
            "steps": len(path.losses),
            "wall_s": took,
            "peak_memory_bytes": peak,
        }


def halves(path: Path, scratch: Path) -> tuple[Path, Path]:
    """Return files of calibration and held-out paragraphs of a .txt: the last two thirds of it, and the first."""
    if path.suffix != ".txt":
        return path, path
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    records = [json.dumps({"text": line}) for line in lines if len(line) > 100]  # no headings
    files = scratch / "calibration.jsonl", scratch / "held_out.jsonl"
    for file, part in zip(files, (slice(len(records) // 3, None), slice(0, len(records) // 3)), strict=True):
        file.write_text("\n".join(records[part]) + "\n", encoding="utf-8")
    return files


def judged(held_out: WindowScores, chosen_by: WindowScores, initial: list[float], ends: list[int]) -> Row:
    """Compare where starts ended with the optimum on held-out blocks.

    Of k ends the one with the lowest KL on the calibration blocks is taken, as the search does.
    """
    optimum, last = held_out.best(), held_out.starts[-1]
    groups = {name: set(spread_starts(k, last)) for name, k in BEST_OF.items()}
    groups["all"] = {a for a in initial if a == int(a)}
    best_of = {}
    for name, group in groups.items():
        mine = [end for start, end in zip(initial, ends, strict=True) if start in group]
        if len(mine) == len(group):
            chosen = min(mine, key=lambda start: chosen_by.mean(start).value)
            loss = held_out.margin(optimum, chosen).to_dict()
            best_of[name] = {"start": chosen, "reached": chosen == optimum, "loss_kl_nats": loss}
    single = [end for start, end in zip(initial, ends, strict=True) if start in groups["all"]]
    return {
        "optimum": optimum,
        "exact_on_calibration": chosen_by.best(),
        "optimum_kl_nats": held_out.mean(optimum).to_dict(),
        "num_single_starts": len(single),
        "num_single_starts_there": single.count(optimum),
        "best_of": best_of,
    }


def run(given: argparse.Namespace, scratch: Path) -> None:
    set_quiet(True)
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU: some thirty streams a step
    began, slowest = time.monotonic(), 0.0
    study = Study(given, TINY if given.tiny else Sizes(), scratch)
    number, workers = map(int, given.worker.split("/"))
    mine = Path(f"{given.out}.{number}") if workers > 1 else given.out
    plan, rows = study.sizes.plan()[number::workers], list(rows_in(mine).values())
    done = rows_in(given.out, *parts_of(given.out))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {
        "model": given.model,
        "device": device,
        "torch": torch.__version__,
        "workers": workers,
        "matmul": torch.get_float32_matmul_precision(),
    }
    left = [row for row in plan if key_of(row) not in done]
    for at, row in enumerate(left):
        if time.monotonic() - began + slowest * row["blocks"] > 60 * given.minutes:
            print(f"time is over with {len(left) - at} rows left - run again", flush=True)
            return
        rows.append(study.measure(row) | about)
        slowest = max(slowest, rows[-1]["wall_s"] / row["blocks"])
        write(mine, rows)
        print(json.dumps({name: rows[-1][name] for name in (*FACTORS, "ends", "wall_s")}), flush=True)
    print("all rows are measured", flush=True)


def merge(out: Path) -> None:
    """Join the workers' files into one, in the order of the plan, and remove them."""
    order = {key_of(row): place for place, row in enumerate(Sizes().plan())}
    rows = rows_in(out, *parts_of(out))
    write(out, [rows[key] for key in sorted(rows, key=lambda key: order.get(key, len(order)))])
    for part in parts_of(out):
        part.unlink()
    print(f"{len(rows)} of {len(order)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    for name in ("--c4", "--wiki", "--alpaca"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--worker", default="0/1", help="i/k measures every k-th row, from the i-th on, into FILE.i")
    parser.add_argument("--tiny", action="store_true", help="two short blocks, three starts, n = 6: does it run?")
    parser.add_argument("--merge", action="store_true", help="join the workers' files")
    parser.add_argument("--table", action="store_true", help="print the tables")
    given = parser.parse_args()
    if given.merge:
        merge(given.out)
    if given.table:
        print(tables(list(rows_in(given.out, *parts_of(given.out)).values())))
    if given.merge or given.table:
        return
    if None in (given.c4, given.wiki, given.alpaca):
        parser.error("give --c4, --wiki and --alpaca")
    with tempfile.TemporaryDirectory() as scratch:
        run(given, Path(scratch))


if __name__ == "__main__":
    main()
