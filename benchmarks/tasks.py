"""Zero-shot accuracy on PIQA, ARC-easy and HellaSwag, item by item, and what a child retains of its parent's.

    python benchmarks/tasks.py --models demo runs/demo/heal/model --data ../shared/data/tasks --limit 1000 \
        --out docs/benchmarks/tasks.json

Prompts, continuations and length normalisation are those of lm-evaluation-harness (0.4): `acc_norm` takes the choice
with the highest log likelihood per character. The first model is the parent. Retention is chance-adjusted, (accuracy -
chance) / (parent's - chance), over the tasks where the parent is three standard errors above chance; its standard error
is that of a bootstrap over items, parent and child drawn together. For our own measurements; a user has the harness.

Dimensions: I items, C choices of all items, B sequences at once, T tokens, D hidden size, M tokens of continuations.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Row, Rows, arguments, seconds, table, with_error
from torch import Tensor

from layerscalpel.decoder import load_decoder
from layerscalpel.hooks import hidden_at
from layerscalpel.layers import Decoder, device_of
from layerscalpel.losses import Measured, block_mean, token_chunks, token_nll
from layerscalpel.probe import find_layers
from layerscalpel.rows import log_probs_at

DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Item:
    """A question."""

    context: str
    choices: tuple[str, ...]
    gold: int


def piqa(record: Row) -> Item:
    return Item(f"Question: {record['goal']}\nAnswer:", (record["sol1"], record["sol2"]), record["label"])


def arc(record: Row) -> Item:
    choices = record["choices"]
    gold = choices["label"].index(record["answerKey"])
    return Item(f"Question: {record['question']}\nAnswer:", tuple(choices["text"]), gold)


def hellaswag(record: Row) -> Item:
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return Item(_plain(context), tuple(map(_plain, record["endings"])), int(record["label"]))


def _plain(text: str) -> str:
    """Drop the marks of WikiHow, as the harness does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


TASKS = {
    "piqa": ("piqa_val.jsonl.gz", piqa),
    "arc_easy": ("arc_easy_test.jsonl.gz", arc),
    "hellaswag": ("hellaswag_val.jsonl.gz", hellaswag),
}
Items = Mapping[str, list[Item]]


def read_items(folder: Path, limit: int | None) -> Items:
    """Return items of every task: all, or so many, evenly spaced, as HellaSwag begins with its easier half."""
    found = {}
    for name, (file, to_item) in TASKS.items():
        with gzip.open(folder / file, "rt", encoding="utf-8") as lines:
            items = [to_item(json.loads(line)) for line in lines if line.strip()]
        count = len(items) if limit is None else min(limit, len(items))
        found[name] = [items[i * len(items) // count] for i in range(count)]
    return found


def chance(items: list[Item]) -> float:
    """Return the accuracy of guessing."""
    return sum(1 / len(item.choices) for item in items) / len(items)


def encoded(tokenizer: Any, item: Item) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, how many of them are the context) of every choice; spaces belong to what follows them."""
    context = item.context.rstrip()
    spaces = item.context[len(context) :]
    length = len(tokenizer(context, add_special_tokens=False).input_ids)
    for choice in item.choices:
        yield list(tokenizer(f"{context}{spaces} {choice}", add_special_tokens=False).input_ids), length


@torch.no_grad()
def answer(decoder: Decoder, tokenizer: Any, items: list[Item], *, tokens_at_once: int = 1 << 14) -> Tensor:
    """Return whether each item is answered right [2, I]: by log likelihood (acc), and per character (acc_norm)."""
    sequences = [pair for item in items for pair in encoded(tokenizer, item)]
    likelihood_C = torch.zeros(len(sequences), dtype=torch.float64)
    for batch in _batches([len(ids) for ids, _ in sequences], tokens_at_once):
        likelihood_C[batch] = _log_likelihoods(decoder, [sequences[i] for i in batch])
    right, at = torch.zeros(2, len(items), dtype=torch.bool), 0
    for i, item in enumerate(items):
        own = likelihood_C[at : at + len(item.choices)]
        per_character = own / torch.tensor([len(choice) for choice in item.choices])
        right[:, i] = torch.tensor([int(own.argmax()) == item.gold, int(per_character.argmax()) == item.gold])
        at += len(item.choices)
    return right


def _batches(lengths: list[int], most: int) -> Iterator[list[int]]:
    """Yield the sequences, longest first, as many at once as have that many tokens when padded."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    at = 0
    while at < len(order):
        count = max(1, most // lengths[order[at]])
        yield order[at : at + count]
        at += count


def _log_likelihoods(decoder: Decoder, batch: list[tuple[list[int], int]]) -> Tensor:
    """Return the log likelihood [B] of each continuation; padding stands to the right, where nobody looks."""
    device, longest = device_of(decoder.model), max(len(ids) for ids, _ in batch)
    tokens_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in batch], device=device)
    at_T = torch.arange(longest)
    bounds_B2 = torch.tensor([(context - 1, len(ids) - 1) for ids, context in batch])
    counted_BT = (at_T >= bounds_B2[:, :1]) & (at_T < bounds_B2[:, 1:])
    row_M = counted_BT.nonzero()[:, 0]
    targets_M = tokens_BT.roll(-1, dims=1)[counted_BT.to(device)]
    hidden_MD = hidden_at(decoder, tokens_BT, len(decoder))[counted_BT.to(device)]
    sums_B = torch.zeros(len(batch), dtype=torch.float64)
    for part in token_chunks(1, len(hidden_MD), decoder.vocab_size, device):
        nll = token_nll(log_probs_at(decoder, hidden_MD[part]), targets_M[part])
        sums_B.index_add_(0, row_M[part], -nll.double().cpu())
    return sums_B


def accuracies(decoder: Decoder, tokenizer: Any, tasks: Items, **how: Any) -> Row:
    """Return {task: {acc, acc_norm, chance, right}}; `right` has a 1 for every item that acc_norm gets right."""
    found = {}
    for name, items in tasks.items():
        acc, acc_norm = answer(decoder, tokenizer, items, **how).double()
        found[name] = {
            "acc": _mean(acc).to_dict(),
            "acc_norm": _mean(acc_norm).to_dict(),
            "chance": chance(items),
            "right": "".join(str(int(value)) for value in acc_norm.tolist()),
        }
    return found


def _mean(right_I: Tensor) -> Measured:
    return block_mean(right_I, torch.ones_like(right_I))


def counting(parent: Row) -> list[str]:
    """Return the tasks where the parent is three standard errors above chance."""
    means = {name: (found["acc_norm"], found["chance"]) for name, found in parent.items()}
    return [name for name, (mean, floor) in means.items() if mean["value"] >= floor + 3 * (mean["se"] or math.inf)]


def drawn_retention(parent: Row, child: Row, *, plain: bool = False) -> Tensor:
    """Return the retention of the measured items, and after it that of every draw [1 + DRAWS].

    Two children of the same parent are drawn alike, so that their draws can be subtracted. It is chance-adjusted, or
    `plain`: accuracy over the parent's.
    """
    ratios = []
    for name in counting(parent):
        generator = torch.Generator().manual_seed(0)
        right_2I = torch.tensor([[c == "1" for c in found[name]["right"]] for found in (parent, child)]).double()
        count = right_2I.shape[1]
        draws = torch.cat([torch.arange(count)[None], torch.randint(count, (DRAWS, count), generator=generator)])
        above_parent, above_child = right_2I[:, draws].mean(-1) - (0.0 if plain else parent[name]["chance"])
        ratios.append(above_child / above_parent)
    return torch.stack(ratios).mean(0)


def spread(drawn: Tensor) -> Row | None:
    """Return {value, se, n} of a figure and its draws; None where no task counts."""
    return {"value": drawn[0].item(), "se": drawn[1:].std().item(), "n": len(drawn) - 1}


def retention(parent: Row, child: Row) -> Row | None:
    """Return the chance-adjusted retention of a child {value, se, n draws}; None where no task counts."""
    return spread(drawn_retention(parent, child)) if counting(parent) else None


def tables(rows: list[Row]) -> str:
    parent = rows[0]["tasks"]
    lines = []
    for row in rows:
        cells = [with_error(row["tasks"][name]["acc_norm"], 1, 100) for name in TASKS]
        lines.append([row["model"], *cells, with_error(retention(parent, row["tasks"]), 1, 100)])
    return table(("model", *(f"{name}, %" for name in TASKS), "adjusted retention, %"), lines)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=["demo"], help="the parent first")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens-at-once", type=int, default=1 << 14)
    given = parser.parse_args()
    rows = Rows(given.out, given.minutes, again=given.again)
    items = None if given.table else read_items(given.data, given.limit)

    def measured(name: str) -> Row:
        model, tokenizer, _ = load_decoder(name, device=given.device, dtype=given.dtype)
        decoder = find_layers(model)
        found, wall_s = seconds(
            lambda: accuracies(decoder, tokenizer, items or {}, tokens_at_once=given.tokens_at_once)
        )
        return {"tasks": found, "wall_s": wall_s}

    for name in () if given.table else given.models:
        rows.measure(lambda n=name: measured(n), part="tasks", model=name, limit=given.limit, dtype=given.dtype)
    print(tables(rows.all))


if __name__ == "__main__":
    main()
