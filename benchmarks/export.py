"""What a pruned checkpoint becomes in other engines: bytes, perplexity beside transformers in float32, speed.

    python benchmarks/export.py --models parent=parent/ healed=runs/demo --types f16 q8_0 q4_k_m \
        --pythons llama.cpp=/envs/llama/bin/python vllm=/envs/vllm/bin/python --engines transformers vllm \
        --out docs/benchmarks/export.json --doc docs/benchmarks/export.md --minutes 30

gguf     Each model in each type of GGUF, written as `scalpel export gguf` writes it, run by llama-cpp-python.
engines  Each model's checkpoint in each engine, as `scalpel check` runs it.

A model is a run directory or a checkpoint folder; one that is a .gguf itself, as the demo's, is made a folder first.
Text, blocks and prompts are the same for all; the reference of a model is computed once.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heal_tables import insert, parts_of
from measuring import Row, Rows, arguments, table, with_error

from layerscalpel.checkengine import Asked, Reference, check_engine, questions, reference_of
from layerscalpel.chosen import HEALED, TEXT, checkpoint_of
from layerscalpel.decoder import load_decoder, load_origin, save_decoder
from layerscalpel.engines import file_for
from layerscalpel.export import ENGINE, Ways, export_gguf
from layerscalpel.footprint import folder_bytes
from layerscalpel.origin import peek
from layerscalpel.progress import set_quiet

Opened = Callable[[Path], tuple[Asked, Reference]]


def folder_of(name: str, scratch: Path) -> Path:
    """Return a model's checkpoint folder; of a .gguf, one with the same numbers in bfloat16, as it was before."""
    place = checkpoint_of(name, HEALED)
    if place.is_dir():
        return place
    loaded = load_decoder(name, device="cpu", dtype="bfloat16")
    return save_decoder(loaded.model, loaded.tokenizer, scratch / f"{place.stem}-folder")


def reader(text: str, num_blocks: int) -> Opened:
    """Return what gives the questions to a checkpoint and the reference's answers."""

    @functools.cache
    def opened(folder: Path) -> tuple[Asked, Reference]:
        loaded = load_origin(peek(str(folder)), dtype="float32")
        asked = questions(loaded.tokenizer, text=text, num_blocks=num_blocks, context=loaded.origin.max_tokens)
        return asked, reference_of(loaded.model, asked)

    return opened


def gguf_row(folder: Path, kind: str, python: str, opened: Opened) -> Row:
    """Write, run and remove one file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / f"model-{kind}.gguf"
        made = export_gguf(str(folder), kind, file, Ways(get_converter=True, python=python, verify=False))
        found = check_engine(ENGINE, file, *opened(folder), python=python)
    return {key: made[key] for key in ("bytes", "source_bytes", "tensors")} | found


def engine_row(folder: Path, engine: str, python: str, opened: Opened) -> Row:
    """Run a checkpoint in an engine."""
    found = check_engine(engine, file_for(engine, folder), *opened(folder), python=python)
    return {"bytes": folder_bytes(folder), **found}


def _ratio(row: Row) -> list[str]:
    shared = f"{row['common_tokens']['value']:.1f} of {row['continued_tokens']}"
    top = f"{100 * row['top1_agreement_fraction']['value']:.1f} %"
    return [
        f"{row['ppl']['value']:.3f}",
        with_error(row["ppl_ratio"], 4),
        top,
        shared,
        with_error(row["decode_tokens_per_s"], 1),
    ]


HEAD = ["perplexity", "over float32's", "likeliest token alike", "tokens in common", "tokens/s"]


def _gguf(rows: list[Row]) -> str:
    lines = [
        [row["model"], row["type"], f"{row['bytes'] / 1e6:.1f}", f"{row['source_bytes'] / 1e6:.1f}", *_ratio(row)]
        for row in rows
    ]
    return table(["model", "type", "MB of the file", "MB of the checkpoint's folder", *HEAD], lines)


def _engines(rows: list[Row]) -> str:
    lines = [
        [
            row["model"],
            f"{row['engine']} {row['version']}",
            row.get("dtype", "as stored"),
            f"{row['bytes'] / 1e6:.1f}",
            *_ratio(row),
        ]
        for row in rows
    ]
    return table(["model", "engine", "numbers", "MB of the folder", *HEAD], lines)


TABLES: Mapping[str, tuple[str, Callable[[list[Row]], str]]] = {
    "gguf": ("GGUF, run by llama.cpp", _gguf),
    "engines": ("Checkpoint folders", _engines),
}


def pairs(items: list[str]) -> dict[str, str]:
    return dict(item.split("=", 1) for item in items)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=MODEL")
    parser.add_argument("--types", nargs="*", default=[], help="of GGUF")
    parser.add_argument("--engines", nargs="*", default=[])
    parser.add_argument("--pythons", nargs="*", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--doc", type=Path, help="a document to insert the tables into")
    given = parser.parse_args(argv)
    set_quiet(True)
    rows, opened = Rows(given.out, given.minutes, again=given.again), reader(given.text, given.blocks)
    pythons: dict[str, str] = pairs(given.pythons)
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in () if given.table else pairs(given.models).items():
            folder = folder_of(model, Path(scratch))
            same: dict[str, Any] = {"model": name, "text": given.text, "blocks": given.blocks}
            for kind in given.types:
                work = functools.partial(gguf_row, folder, kind, pythons.get(ENGINE, sys.executable), opened)
                rows.measure(work, part="gguf", type=kind, **same)
            for engine in given.engines:
                work = functools.partial(engine_row, folder, engine, pythons.get(engine, sys.executable), opened)
                rows.measure(work, part="engines", engine=engine, **same)
    print("\n\n".join(parts_of(TABLES, rows.all).values()))
    if given.doc:
        insert(given.doc, TABLES, rows.all)


if __name__ == "__main__":
    main()
