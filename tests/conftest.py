"""Every test runs offline and on one thread: tiny matrices gain nothing from a second, and wait for it when it is busy.

Measured on two busy cores: tests/test_layers.py takes 11 s on one thread and 177 s on two.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from layerscalpel.witness import Witness

os.environ["OMP_NUM_THREADS"] = "1"  # of the fresh processes too
if "gpu" not in sys.argv:  # as in pytest -m gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the default tier is the CPU's, wherever it runs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="layerscalpel-")  # for code that comes with checkpoints
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Look for garbage only among what the tests make: what was imported stays, and a search through it takes 0.3 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint, texts and a recipe, for one file of tests."""
    from world import write_model, write_recipe, write_texts  # after the settings above, which torch reads on import

    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_recipe(folder / "recipe.yaml", write_texts(folder / "texts.jsonl"))
    return folder


@pytest.fixture(scope="session")
def mined(tmp_path_factory) -> Path:
    """A folder whose code, were it run, would leave a marker there."""
    folder = tmp_path_factory.mktemp("mined")
    (folder / "tempfile.py").write_text(f"open({str(folder / 'marker')!r}, 'w').close()\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def living(mined: Path) -> Iterator[Callable[[], Witness]]:
    """The fresh process of all files that ask for one; after one that died, the next. Each starts in that folder."""
    from layerscalpel.witness import Witness

    started: list[Witness] = []
    with contextlib.ExitStack() as stack:

        def one() -> Witness:
            if not started or started[-1]._process.poll() is not None:
                with contextlib.chdir(mined):
                    started.append(stack.enter_context(Witness()))
            return started[-1]

        yield one


@pytest.fixture
def fresh(living: Callable[[], Witness]) -> Witness:
    """A fresh process that lives; it takes five seconds to start."""
    return living()


@pytest.fixture
def without_drawings(monkeypatch) -> None:
    """For properties of anything but a page's drawings, which take most of its time."""
    monkeypatch.setattr("layerscalpel.report._figures", lambda results: {})


@pytest.fixture(autouse=True)
def _speaks() -> None:
    """Let every test hear what is said, whatever an earlier one switched off."""
    from layerscalpel.progress import set_quiet

    set_quiet(False)
