"""Set aside what is to be done again, until its replacement is there: an attempt that fails costs nothing.

An attempt that was interrupted is kept beside it, and goes on when it is asked for again.

set_aside(run, ["cut", "report.html"])
...                # done again
drop(run)          # or restore(run, ["heal"]), also after a crash
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

MARK = ".before-"
"""Begins the name of what was set aside."""
UNFINISHED = ".unfinished-"
"""Begins the name of an attempt that was interrupted."""
STARTED = "started.json"
"""In the folder of an attempt that has begun and is not finished."""


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename files and folders, so that nothing of them looks finished; config.yaml is copied."""
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, folder / f"{MARK}{name}")
        if (folder / f"{UNFINISHED}{name}").exists():
            os.replace(folder / f"{UNFINISHED}{name}", folder / name)
    if (folder / "config.yaml").exists():
        shutil.copy2(folder / "config.yaml", folder / f"{MARK}config.yaml")


def restore(folder: Path, resumable: Collection[str] = ()) -> bool:
    """Put everything back that was set aside, in the place of what has come since; tell whether there was anything.

    An attempt at one of `resumable` that has begun and is not finished is kept, to go on another time.
    """
    kept = list(folder.glob(f"{MARK}*"))
    for path in kept:
        target = folder / path.name.removeprefix(MARK)
        if target.name in resumable and (target / STARTED).exists():
            _remove(folder / f"{UNFINISHED}{target.name}")
            os.replace(target, folder / f"{UNFINISHED}{target.name}")
        _remove(target)
        os.replace(path, target)
    return bool(kept)


def drop(folder: Path) -> None:
    """Remove what was set aside, and attempts that were interrupted."""
    for path in [*folder.glob(f"{MARK}*"), *folder.glob(f"{UNFINISHED}*")]:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
