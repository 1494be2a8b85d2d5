"""What transformers says: its advice is kept off the terminal, its errors of unreadable input become one line.

Both are context managers around a call.

    with quiet_transformers(), readable("model x"):
        AutoConfig.from_pretrained("x")
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import tqdm.std
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from layerscalpel.errors import UserError, one_line

UNREADABLE = (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers raises of files that it cannot read."""


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what transformers says of unreadable input into one line."""
    try:
        yield
    except UNREADABLE as error:
        if "trust_remote_code=True" in str(error):
            raise UserError(
                f"{what} comes with code of its own, which is not run without permission"
                " - read the code, then allow it with --trust-remote-code"
            ) from error
        first = one_line(error)[:300]
        raise UserError(f"{what} cannot be read: {first} - check the name, the files and the network") from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep bars off the terminal that a library draws whatever its environment says."""
    draw = tqdm.std.tqdm.__init__
    tqdm.std.tqdm.__init__ = lambda *items, **options: draw(*items, **(options | {"disable": True}))  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.std.tqdm.__init__ = draw  # type: ignore[method-assign]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and advice off the terminal while we load or save."""
    accelerate = logging.getLogger("accelerate.big_modeling")  # tells of every parameter left on disk
    said = accelerate.level
    accelerate.setLevel(logging.ERROR)
    level, bars = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        accelerate.setLevel(said)
        transformers.utils.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
