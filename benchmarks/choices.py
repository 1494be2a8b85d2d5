"""Which segment is chosen, by which text, and as one run of layers or two; judged on held-out C4 blocks.

    python benchmarks/choices.py --c4 c4.jsonl.gz --wiki wiki.test.raw --alpaca alpaca.jsonl.gz \
        --out docs/benchmarks/choices.json --minutes 4
    python benchmarks/choices.py --out docs/benchmarks/choices.json --table

self  The exact optimum on C4, on encyclopedic text, on instructions, and on text that the model wrote itself; then the
      KL of each choice on the same held-out C4 blocks, and its paired difference to that of C4's own choice.
runs  The best pair of runs of layers beside the best single run of the same total, both chosen on calibration blocks;
      then the KL of both on the same held-out blocks, and their paired difference.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import Row, Rows, arguments, blocks_of, paired, seconds, table, with_error
from torch import Tensor

from layerscalpel.data import Parts
from layerscalpel.decoder import load_decoder
from layerscalpel.exact import score, score_windows
from layerscalpel.layers import Decoder
from layerscalpel.losses import block_mean
from layerscalpel.probe import find_layers
from layerscalpel.progress import set_quiet
from layerscalpel.selftext import sample_blocks
from layerscalpel.settings import SearchSettings
from layerscalpel.streams import Removal, window
from layerscalpel.task import Raced, SearchResult, Task, race_windows
from layerscalpel.tworuns import better_of_one_and_two

TEXTS = {"c4": "C4", "wiki": "encyclopedic text", "alpaca": "instructions", "self": "the model's own text"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    depths: tuple[int, ...] = (3, 6, 9, 12)
    seeds: int = 1
    blocks: int = 64
    held_out: int = 64
    block_tokens: int = 256


TINY = Sizes(depths=(2,), blocks=8, held_out=2, block_tokens=16)
"""To see whether it runs at all."""


class Bench:
    """The real model, its texts, and what it scores on held-out C4."""

    def __init__(self, given: argparse.Namespace, sizes: Sizes, scratch: Path) -> None:
        self.model, self.tokenizer, _ = load_decoder(given.model, device=given.device, dtype="float32")
        self.decoder: Decoder = find_layers(self.model)
        self.sizes, self.batch_size, self.c4 = sizes, given.batch_size, given.c4
        self.files = {"c4": given.c4, "wiki": paragraphs(Path(given.wiki), scratch), "alpaca": given.alpaca}
        self.blocks = functools.cache(self._blocks)
        self.calibration = functools.cache(self._calibration)
        self.raced = functools.cache(self._raced)

    def _blocks(self, text: str, seed: int) -> Parts:
        sizes = {"block_tokens": self.sizes.block_tokens, "evaluation_blocks": self.sizes.held_out}
        sizes["num_calibration"] = self.sizes.blocks
        return blocks_of(self.tokenizer, str(self.files[text]), self.c4, sizes=sizes, seed=seed)

    def _calibration(self, text: str, seed: int) -> Tensor:
        """Return the blocks [N, T] that choose."""
        if text != "self":
            return self.blocks(text, seed).calibration.tokens
        sizes = {"num_blocks": self.sizes.blocks, "block_tokens": self.sizes.block_tokens}
        return sample_blocks(self.model, self.tokenizer, seed=seed, batch_size=64, **sizes).tokens

    def held_out(self, removals: list[Removal], seed: int) -> Tensor:
        """Return the KL [R, N] of cuts on held-out C4 blocks, none of which is in the C4 that chooses."""
        tokens = self.blocks("c4", seed).evaluation.tokens
        return score(self.decoder, tokens, removals, batch_size=self.batch_size)

    def choose_by_texts(self, n: int, seed: int) -> Row:
        """Choose by every text, and judge the choices on C4."""
        choices = {}
        for text in TEXTS:
            tokens = self.calibration(text, seed)
            choices[text] = score_windows(self.decoder, tokens, num_removed=n, batch_size=self.batch_size).best()
        kl = dict(zip(choices, self.held_out([window(start, n) for start in choices.values()], seed), strict=True))
        return {
            "starts": choices,
            "kl_nats": {text: mean_of(kl_N) for text, kl_N in kl.items()},
            "less_c4_kl_nats": {text: paired(kl_N, kl["c4"]).to_dict() for text, kl_N in kl.items() if text != "c4"},
            **self._counts(),
        }

    def _task(self, n: int, seed: int) -> Task:
        settings = SearchSettings(num_blocks=self.sizes.blocks, batch_size=self.batch_size)
        return Task(self.decoder, self.calibration("c4", seed), n, settings, seed)

    def _raced(self, seed: int) -> dict[int, Raced]:
        return race_windows(self._task(1, seed), range(1, max(self.sizes.depths) + 1))

    def choose_runs(self, n: int, seed: int) -> Row:
        """Choose one run and two, and judge both on held-out blocks."""
        task = self._task(n, seed)
        raced = self.raced(seed)
        single = raced[n].winner
        task = Task(task.decoder, task.tokens, n, task.settings, seed, raced=raced)
        result = SearchResult("exact", (task.segment(single),), raced[n].scores.to_dict())
        found, wall_s = seconds(lambda: better_of_one_and_two(result, task))
        two = found.details["two_runs"]
        pair = tuple(i for start, stop in two["segments"] for i in range(start, stop))
        one_N, two_N = self.held_out([window(single, n), pair], seed)
        return {
            "single": [single, single + n],
            "pair": two["segments"],
            "pair_wins_race": two["wins"],
            "num_pairs": two["num_pairs"],
            "single_less_pair_calibration_kl_nats": two["single_less_two_kl_nats"],
            "single_kl_nats": mean_of(one_N),
            "pair_kl_nats": mean_of(two_N),
            "single_less_pair_kl_nats": paired(one_N, two_N).to_dict(),
            "pairs_wall_s": wall_s,
            **self._counts(),
        }

    def _counts(self) -> Row:
        return {"blocks": self.sizes.blocks, "held_out_blocks": self.sizes.held_out}


def paragraphs(path: Path, scratch: Path) -> Path:
    """Return a file with a record for each long line of a text, which WikiText's paragraphs are."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    file = scratch / "paragraphs.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if len(line) > 100), encoding="utf-8")
    return file


def mean_of(kl_N: Tensor) -> Row:
    return block_mean(kl_N, torch.ones_like(kl_N)).to_dict()


def tables(rows: list[Row]) -> str:
    """Return both tables."""
    by_text, by_runs = ([row for row in rows if row["part"] == part] for part in ("self", "runs"))
    heads = ("n", "seed", *(f"start by {name}" for name in TEXTS.values()), "KL of C4's choice, nats")
    heads += tuple(f"that of {name} less C4's" for text, name in TEXTS.items() if text != "c4")
    lines = []
    for row in by_text:
        differences = [with_error(row["less_c4_kl_nats"][text], 4) for text in TEXTS if text != "c4"]
        own = with_error(row["kl_nats"]["c4"])
        lines.append([row["n"], row["seed"], *(row["starts"][text] for text in TEXTS), own, *differences])
    text = "Text that chooses; KL on held-out C4:\n\n" + table(heads, lines)
    heads = ("n", "seed", "one run", "KL, nats", "two runs", "KL, nats", "one less two, paired", "two win the race")
    lines = []
    for row in by_runs:
        kl = [with_error(row[name]) for name in ("single_kl_nats", "pair_kl_nats")]
        names = [f"[{row['single'][0]}, {row['single'][1]})", " ".join(f"[{a}, {b})" for a, b in row["pair"])]
        wins = "yes" if row["pair_wins_race"] else "no"
        difference = with_error(row["single_less_pair_kl_nats"], 4)
        lines.append([row["n"], row["seed"], names[0], kl[0], names[1], kl[1], difference, wins])
    return text + "\n\nOne run and two; KL on held-out C4:\n\n" + table(heads, lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo")
    for name in ("--c4", "--wiki", "--alpaca"):
        parser.add_argument(name, default="")
    parser.add_argument("--parts", nargs="+", choices=("self", "runs"), default=["self", "runs"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="a few short blocks, n = 2: does it run?")
    given = parser.parse_args()
    rows, sizes = Rows(given.out, given.minutes, again=given.again), TINY if given.tiny else Sizes()
    if not given.table:
        if not (given.c4 and given.wiki and given.alpaca):
            parser.error("give --c4, --wiki and --alpaca")
        set_quiet(True)
        with tempfile.TemporaryDirectory() as scratch:
            measure(rows, given, sizes, Path(scratch))
    print(tables(rows.all))


def measure(rows: Rows, given: argparse.Namespace, sizes: Sizes, scratch: Path) -> None:
    bench = Bench(given, sizes, scratch)
    work = {"self": bench.choose_by_texts, "runs": bench.choose_runs}
    for seed in range(sizes.seeds):
        for part in given.parts:
            for n in sizes.depths:
                rows.measure(functools.partial(work[part], n, seed), part=part, n=n, seed=seed)


if __name__ == "__main__":
    main()
