"""A checkpoint becomes a file that llama.cpp, Ollama and LM Studio run, and the file is run before it is handed over.

llama.cpp's own converter writes it (converter.py), its own function quantises it, and the engine then reads held-out
text: perplexity, likeliest tokens, continuations and the tokenizer beside transformers on the checkpoint
(checkengine.py). The file has its name only after that; one that computes something else is not handed over at all.
Without the engine the file is written and called not verified.

    export_gguf("runs/demo", "q4_k_m", None, Ways())["verified"]["ppl_ratio"]
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerscalpel.checkengine import check_engine, questions, reference_of, require_close
from layerscalpel.chosen import HEALED, checkpoint_of, held_out_text, is_run
from layerscalpel.converter import convert, fetch, find_converter
from layerscalpel.decoder import load_origin, require_room
from layerscalpel.engines import ask, installed, missing
from layerscalpel.errors import UserError
from layerscalpel.footprint import bytes_on_disk, folder_bytes
from layerscalpel.ggufs import PLAIN, TYPES, GgufType, no_gguf_of, stored_as, type_named
from layerscalpel.origin import Origin, peek
from layerscalpel.progress import say, waiting

ENGINE = "llama.cpp"


@dataclass(frozen=True)
class Ways:
    """How a file is made and verified."""

    converter: str | None = None
    """llama.cpp's converter, or a folder that holds it; None takes the one that was fetched."""
    get_converter: bool = False
    """Fetch the converter where it is not here."""
    python: str = sys.executable
    """The interpreter that llama-cpp-python is installed in."""
    text: str | None = None
    """Held-out text; None takes the run's own, or the packaged one."""
    num_blocks: int = 32
    verify: bool = True


def export_gguf(target: str, kind: str, out: Path | None, ways: Ways) -> dict[str, Any]:
    """Write a GGUF of a checkpoint, run it, and return what is known of it.

    Args:
        target: run directory, whose healed or cut model is taken, checkpoint folder, or hub id.
        kind: of ggufs.TYPES.
        out: the file; None puts it beside the checkpoint, into the folder export/ of a run, or here for one of the hub.
        ways: how.

    Raises:
        UserError: what cannot be exported, or did not pass.
    """
    wanted = type_named(kind)
    source = checkpoint_of(target, HEALED)
    origin = _exportable(source)
    able = installed(ENGINE, ways.python)
    if not able and not wanted.by_converter:
        kinds = ", ".join(name for name, row in TYPES.items() if row.by_converter)
        raise UserError(f"type {kind} is made by llama.cpp: {missing(ENGINE, ways.python)} - without it: {kinds}")
    script = fetch() if ways.get_converter and not ways.converter else find_converter(ways.converter)
    out = (out or _default_out(target, source, kind)).expanduser()
    if out.exists():
        raise UserError(f"{out} is there already - choose another --out or remove it")
    with _draft(out, bytes_on_disk(source), wanted) as draft:
        _write(script, source, draft, kind.lower(), wanted, ways.python)
        found = {"format": "gguf", "type": kind.lower(), "file": str(out), "bytes": draft.stat().st_size}
        found |= {"source": str(source), "source_bytes": folder_bytes(source), "tensors": stored_as(draft)}
        why = missing(ENGINE, ways.python) if not able else "" if ways.verify else "--no-verify"
        found["verified"] = None if why else _verified(draft, origin, wanted, target, ways)
    if why:
        say(f"written, not verified: {why}")
    return found | ({"not_verified": why} if why else {})


def _exportable(source: Path) -> Origin:
    if source.is_file():
        raise UserError(f"{source} is a GGUF already - give the checkpoint folder it was made from")
    origin = peek(str(source), allow_quantised=True)
    if origin.quantised:
        raise UserError(no_gguf_of(source, origin.quantised))
    return origin


def _default_out(target: str, source: Path, kind: str) -> Path:
    if is_run(target):
        run = Path(target).expanduser()
        return run / "export" / f"{run.resolve().name}-{kind.lower()}.gguf"
    folder = source.parent if Path(target).expanduser().is_dir() else Path()  # one of the hub lies in a cache
    return folder / f"{Path(target).resolve().name}-{kind.lower()}.gguf"


@contextlib.contextmanager
def _draft(out: Path, source_bytes: int, wanted: GgufType) -> Iterator[Path]:
    """Give a name beside `out` to write to, and move it there if all went well; else nothing stays."""
    if out.suffix != ".gguf":
        raise UserError(f"{out} has another ending than .gguf, by which it is known - name it --out {out}.gguf")
    new = [folder for folder in out.parents if not folder.exists()]
    widest = source_bytes if wanted.by_converter else source_bytes * 3  # the plain file of type f32 and the result
    draft = out.with_name(f".{out.name}.draft.gguf")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        require_room(out.parent, widest)
        yield draft
        os.replace(draft, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"no space left while writing {out} - free some or choose another --out") from error
        raise
    finally:
        for part in (draft, _plain(draft)):
            with contextlib.suppress(NotADirectoryError):
                part.unlink(missing_ok=True)
        for folder in new:
            with contextlib.suppress(OSError):  # one that holds the file stays
                folder.rmdir()


def _plain(draft: Path) -> Path:
    return draft.with_name(f"{draft.stem}.{PLAIN}.gguf")


def _write(script: Path, source: Path, draft: Path, kind: str, wanted: GgufType, python: str) -> None:
    if wanted.by_converter:
        with waiting(f"converting to {kind}"):
            convert(script, source, draft, kind)
        return
    plain = _plain(draft)
    with waiting(f"converting to {PLAIN}, from which llama.cpp quantises"):
        convert(script, source, plain, PLAIN)
    with waiting(f"quantising to {kind}"):
        ask(ENGINE, plain, {"quantised": str(draft), "ftype": wanted.ftype}, python)
    plain.unlink()


def _verified(draft: Path, origin: Origin, wanted: GgufType, target: str, ways: Ways) -> dict[str, Any]:
    """Return what the engine makes of the file.

    Raises:
        UserError: it computes something else than the checkpoint.
    """
    with waiting("transformers, float32: loading the checkpoint"):
        loaded = load_origin(origin, dtype="float32")
    if loaded.tokenizer is None:
        raise UserError(
            f"{origin.name} has no tokenizer, so no text can verify its GGUF - add its files, or --no-verify"
        )
    text = ways.text or held_out_text(target)
    asked = questions(loaded.tokenizer, text=text, num_blocks=ways.num_blocks, context=origin.max_tokens)
    found = check_engine(ENGINE, draft, asked, reference_of(loaded.model, asked), python=ways.python)
    require_close(ENGINE, found, wanted.most_ratio)
    return found
