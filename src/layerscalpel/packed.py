"""Numbers of a model, item by item or block by block, in one compressed file: JSON in gzip, written by rename.

write_packed(path, {"tasks": {...}})
read_packed(path, unpack, "the items", "scalpel evaluate DIR --tasks ...")
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from layerscalpel.errors import UserError

Content = TypeVar("Content")
FORM = 1
"""Of the files."""


def write_packed(path: Path, content: dict[str, Any]) -> Path:
    """Write a file, so that a reader sees the old one or the new one; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(gzip.compress(json.dumps({"form": FORM, **content}).encode(), mtime=0))
    os.replace(draft, path)
    return path


def read_packed(path: Path, unpack: Callable[[dict[str, Any]], Content], what: str, anew: str) -> Content:
    """Return `unpack(content)` of a file.

    Args:
        path: what `write_packed` wrote.
        unpack: makes something of the content.
        what: is in the file, for messages.
        anew: the command that writes it anew, for messages.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        if (form := content.pop("form")) != FORM:
            raise ValueError(f"form {form}")
        return unpack(content)
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{what} in {path} cannot be read ({error}) - measure anew: {anew}") from error
