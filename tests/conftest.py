"""Every test runs offline and on one thread: tiny matrices gain nothing from a second, and wait for it when it is busy.

Measured on two busy cores: tests/test_layers.py takes 11 s on one thread and 177 s on two.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of the fresh processes too
if "gpu" not in sys.argv:  # as in pytest -m gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the default tier is the CPU's, wherever it runs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="layerscalpel-")  # for code that comes with checkpoints
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny checkpoint, texts and a recipe, for one file of tests."""
    from world import write_model, write_recipe, write_texts  # after the settings above, which torch reads on import

    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_recipe(folder / "recipe.yaml", write_texts(folder / "texts.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def _speaks() -> None:
    """Let every test hear what is said, whatever an earlier one switched off."""
    from layerscalpel.progress import set_quiet

    set_quiet(False)
