"""Set aside what is to be done again, until its replacement is there: an attempt that fails costs nothing.

set_aside(run, ["cut", "report.html"])
...                # done again
drop(run)          # or restore(run), also after a crash
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

MARK = ".before-"
"""Begins the name of what was set aside."""


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename files and folders, so that nothing of them looks finished; config.yaml is copied."""
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, folder / f"{MARK}{name}")
    if (folder / "config.yaml").exists():
        shutil.copy2(folder / "config.yaml", folder / f"{MARK}config.yaml")


def restore(folder: Path) -> bool:
    """Put everything back that was set aside, in the place of what has come since; tell whether there was anything."""
    kept = list(folder.glob(f"{MARK}*"))
    for path in kept:
        target = folder / path.name.removeprefix(MARK)
        _remove(target)
        os.replace(path, target)
    return bool(kept)


def drop(folder: Path) -> None:
    """Remove what was set aside."""
    for path in folder.glob(f"{MARK}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
