"""GPTQ: the columns of a weight are rounded one after the other, and those that follow make up for the error.

The method is llm-compressor's. Here are only: the model and the text that it is given, which linear layers it shall
take, and what becomes of its result, which quantfolder.py stores. Layers are done in order; each sees the text as the
quantised layers below it pass it on.

Source: arXiv:2210.17323. With `act_order` the columns that see the largest inputs come first, while groups stay as they
lie in memory, so that nothing is looked up when the model runs.

Dimensions: N blocks, T tokens, R rows, C columns, G groups of a row.

    write(Path("healed"), Path("small"), tokens_NT, scheme)
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import tqdm.std
from torch import Tensor, dtype
from torch.utils.data import DataLoader

from layerscalpel.decoder import load_origin
from layerscalpel.errors import UserError
from layerscalpel.layers import find_layer_list
from layerscalpel.origin import DTYPES, peek
from layerscalpel.progress import PLAIN_LINE_S, say
from layerscalpel.quantfolder import grid_of, packed, require_form, write_packed
from layerscalpel.scheme import Scheme
from layerscalpel.settings import QuantizeSettings

LIBRARY = "llmcompressor==0.14.0.1"
INSTALL = f"pip install layerscalpel[quant] && pip install --no-deps {LIBRARY}"
OBSERVER = "imatrix_mse"
"""How the library finds the range of a group before it rounds: of several the one of the least error, where a column
counts by the mean square of what it sees."""
BATCH = 4
"""Blocks that go through a layer at once."""
OFF_GRID = 0.3
"""Steps of the grid. A weight that was rounded lies closer to a point of it; of weights that were not, the farthest
lies half a step away. In bfloat16 8 bits come as far off as that, so models are solved in float32."""
Solved = dict[str, tuple[Tensor, Tensor, Tensor]]
"""{linear layer: its weight on the grid [R, C], scales [R, G], zeros [R, G]}."""


def needs(settings: QuantizeSettings) -> None:
    """Refuse what cannot be done here, before anything is loaded.

    Raises:
        UserError: the library is missing, or what would be written could not be read.
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise UserError(f"gptq needs llmcompressor, which is not installed - {INSTALL} - or take --quantize rtn")
    require_form(settings)


def write(source: Path, out: Path, tokens_NT: Tensor, scheme: Scheme) -> None:
    """Write a plain checkpoint with its linear layers quantised.

    Args:
        source: folder of the plain checkpoint.
        out: an empty folder, or none yet.
        tokens_NT: the text that it is calibrated on.
        scheme: which linear layers are quantised, and how finely.

    Raises:
        UserError: a model that the library cannot take apart, or a linear layer that the text never reaches.
    """
    origin = peek(str(source))
    loaded = load_origin(origin, device="cpu", dtype="float32")  # in bfloat16 a weight of 8 bits falls between the grid
    solved = solve(loaded.model, tokens_NT, scheme, DTYPES[origin.dtype])

    def pack(name: str, weight_RC: Tensor) -> dict[str, Tensor]:
        solved_RC, scale_RG, zero_RG = solved.pop(name)
        return packed(solved_RC.float(), scale_RG.to(weight_RC.dtype), zero_RG, grid_of(scheme, name))

    write_packed(source, out, scheme, pack)


def solve(model: Any, tokens_NT: Tensor, scheme: Scheme, stored: dtype) -> Solved:
    """Quantise a model in place.

    Args:
        model: on the CPU; the library takes one layer after the other to the accelerator where there is one.
        tokens_NT: the text.
        scheme: which linear layers, and how finely.
        stored: number format of the scales in files, to which they are rounded before the weights are.

    Raises:
        UserError: as `write`.
    """
    with _quiet_library(), _told(model):
        from llmcompressor import oneshot  # type: ignore[import-not-found]
        from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

        order = "static" if scheme.act_order else None
        groups = _groups(scheme, stored)
        modifier: Any = GPTQModifier(config_groups=groups, dampening_frac=scheme.damping, actorder=order)  # type: ignore[arg-type]
        text = DataLoader([{"input_ids": block_T} for block_T in tokens_NT], batch_size=BATCH)  # type: ignore[arg-type]
        no_tokenizer: Any = object()  # the text is tokens already; without any it would look for one
        plain: list[str] = modifier._rtn_fallback_module_names  # it takes another list when it has finished
        try:
            oneshot(model=model, dataset=text, recipe=modifier, processor=no_tokenizer, pipeline="sequential")
        except torch.linalg.LinAlgError as error:
            raise UserError(
                f"gptq cannot solve for the linear layers: {len(tokens_NT)} calibration blocks tell too little of them"
                f" at a damping of {scheme.damping:g} - raise quantize.damping, or quantize.num_blocks"
            ) from error
    if plain:
        say(_told_plain(plain, scheme))
    return {name: _solved(name, model.get_submodule(name), scheme) for name in scheme.converted}


def _told_plain(names: list[str], scheme: Scheme) -> str:
    return (
        f"gptq: {len(names)} linear layers are rounded to nearest, as the calibration text tells too little of them"
        f" ({', '.join(names[:3])}, ...) - raise quantize.damping, now {scheme.damping:g}, or quantize.num_blocks"
    )


def _groups(scheme: Scheme, stored: dtype) -> dict[str, Any]:
    """Return the library's own form of which linear layers are quantised how finely."""
    from compressed_tensors.quantization import QuantizationScheme

    names: dict[int, list[str]] = {}
    for name in scheme.converted:
        names.setdefault(scheme.bits_of(name), []).append(name)
    found = {"observer": OBSERVER, "scale_dtype": stored}
    grids = {bits: grid_of(scheme, of_bits[0]).model_copy(update=found) for bits, of_bits in names.items()}
    return {f"bits_{bits}": QuantizationScheme(targets=names[bits], weights=grids[bits]) for bits in names}


def _solved(name: str, module: Any, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Return what became of a linear layer.

    Raises:
        UserError: nothing did, as happens to an expert that no token was sent to.
    """
    weight_RC, scale_RG, zero_RG = (
        tensor.detach().cpu() for tensor in (module.weight, module.weight_scale, module.weight_zero_point)
    )
    steps_RGS = weight_RC.float().unflatten(1, (-1, scheme.group_size)) / scale_RG.float().unsqueeze(2)
    if not (steps_RGS - steps_RGS.round()).abs().amax() < OFF_GRID:
        raise UserError(
            f"gptq did not quantise {name}, which the calibration text does not reach"
            " - raise quantize.num_blocks, or take --quantize rtn, which reads none"
        )
    return weight_RC, scale_RG, zero_RG


@contextlib.contextmanager
def _told(model: Any) -> Iterator[None]:
    """Within, say now and then which layer is being done."""
    layers, seen, last = find_layer_list(model)[1], set[int](), time.monotonic()

    def tell(number: int, *_: Any) -> None:
        nonlocal last
        if number not in seen and time.monotonic() - last >= PLAIN_LINE_S:
            say(f"gptq: layer {number} of {len(layers)}")
            last = time.monotonic()
        seen.add(number)

    hooks = [
        layer.register_forward_pre_hook(functools.partial(tell, number)) for number, layer in enumerate(layers, start=1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Within, the library writes no log, draws no bars, and afterwards the environment is as it was."""
    own, bar, tracer = dict(os.environ), tqdm.std.tqdm.__init__, logging.getLogger("torch.fx")
    # The second it would set, and say so; the first it reads when it is imported, and sets loguru up anew.
    os.environ |= {"LLM_COMPRESSOR_LOG_LEVEL": "CRITICAL", "TOKENIZERS_PARALLELISM": "false"}
    import llmcompressor  # type: ignore[import-not-found]  # noqa: F401
    from loguru import logger

    logger.remove()
    tqdm.std.tqdm.__init__ = lambda *items, **options: bar(*items, **(options | {"disable": True}))  # type: ignore[method-assign]
    level = tracer.level
    tracer.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tracer.setLevel(level)
        logger.add(sys.stderr)
        tqdm.std.tqdm.__init__ = bar  # type: ignore[method-assign]
        for name in set(os.environ) - set(own):
            del os.environ[name]
        os.environ |= own
