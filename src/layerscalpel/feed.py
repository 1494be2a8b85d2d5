"""Take the tensors of files into a model, one layer after the other.

They go through transformers' own conversion, as if the model were loaded whole: experts stored one by one are stacked,
names are mapped. While layer i computes, layer i + 1 is read into a second buffer, and on CUDA brought to the device;
so two layers are held at most, here and there.

    loader = Loader(model, torch.bfloat16, Reader(device))      # all of the model is on the meta device
    outside, *inside = loader.parts("model.layers", weights)
    feed = LayerFeed(loader, "model.layers", inside, "disk")
    loader.load_outside("model.layers", outside)
    for i in feed(): ...
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from layerscalpel.cut import layer_in
from layerscalpel.decoder import refuse_gaps
from layerscalpel.errors import UserError
from layerscalpel.layers import put_tensor
from layerscalpel.quiet import quiet_transformers
from layerscalpel.reader import Arriving, Part, Reader
from layerscalpel.shards import Stored, Weights


class Loader:
    """Takes tensors from files into a model as transformers itself would."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, reader: Reader) -> None:
        self.model, self.reader = model, reader
        mapping: Any = get_model_conversion_mapping(model)
        self.settings = LoadStateDictConfig(
            device_map={"": reader.device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=mapping,
            ignore_mismatched_sizes=True,  # they are told with those that lack
        )

    def parts(self, path: str, weights: Weights) -> list[Part]:
        """Return the tensors that the model takes: those outside of its layers, then those of each layer."""
        mapping = self.settings.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        wanted, prefix = self.model.state_dict(), self.model.base_model_prefix
        outside: dict[str, Stored] = {}
        inside: list[dict[str, Stored]] = [{} for _ in self.model.get_submodule(path).children()]
        for name, tensor in weights.tensors.items():
            new, _ = rename_source_key(name, renamings, converters, prefix, wanted)
            if new not in wanted and name in wanted:  # as transformers does
                new, _ = rename_source_key(name, [], [], prefix, wanted)
            if new in wanted:
                index, _ = layer_in(new, f"{path}.")
                (inside[int(index)] if index else outside)[name] = tensor
        return [Part(outside), *map(Part, inside)]

    def load_outside(self, path: str, part: Part) -> None:
        """Load all but the layers, and finish the model: buffers that no file holds, tied weights.

        Raises:
            UserError: a tensor is missing, or has another shape.
        """
        sent = self.reader.send_for(part, partial(self.reader.buffer, part.buffer_bytes))
        place = self.reader.received(sent).place
        info = self.load(part, place, {name for name in self.model.state_dict() if not name.startswith(f"{path}.")})
        layers: Any = self.model.get_submodule(path)
        for parameter in layers.parameters():
            parameter._is_hf_initialized = True  # else numbers are made up for it
        with quiet_transformers():
            PreTrainedModel._finalize_model_loading(self.model, self.settings, info)
        self.refuse_gaps(info)

    def load(self, part: Part, place: Tensor, names: set[str]) -> Any:
        """Give the model the tensors of a part; return what transformers says of it.

        Args:
            part: the tensors.
            place: their bytes.
            names: the parameters and buffers that should come of them; others that are not there are no matter.
        """
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, part.views(place), self.settings)
        info.missing_keys &= names
        if info.conversion_errors:  # as of a stack of experts that lacks one
            reason = "its tensors cannot be put together - fetch it again"
            raise UserError(f"model {self.model.name_or_path} cannot be loaded: {reason}")
        return info

    def refuse_gaps(self, info: Any) -> None:
        """Refuse files that lack a tensor, or hold one of another shape."""
        refuse_gaps(str(self.model.name_or_path), info.missing_keys, info.mismatched_keys)


class LayerFeed:
    """Brings the layers' weights in, one layer after the other: `Decoder.resident` of such a model."""

    def __init__(self, loader: Loader, path: str, parts: list[Part], keep: Literal["cpu", "disk"]) -> None:
        """Note what is absent while a layer is not there: all that files hold of it; other buffers stay.

        Args:
            loader: of the model, whose layers are on the meta device.
            path: of the list of layers.
            parts: the tensors in files that each layer takes.
            keep: `cpu` to read them in the first pass only.
        """
        self.seconds_waited = 0.0
        """Time that the last pass had to wait for weights."""
        self.num_passes = 0
        """Passes begun."""
        self._loader, self._reader, self._keep = loader, loader.reader, keep
        self._parts = [*parts, Part({})]  # after the last layer nothing comes
        held = {name: _on_meta(tensor) for name, tensor in loader.model.state_dict(keep_vars=True).items()}
        self._absent = [{n: t for n, t in held.items() if n.startswith(f"{path}.{i}.")} for i in range(len(parts))]
        for i in range(len(parts)):
            self._put_away(i)  # some families take memory for parameters even where they need not
        self._kept: dict[int, Tensor] = {}
        self._buffers: list[Tensor] = []
        self._coming: list[Future[Arriving]] = []
        self._present: int | None = None
        self._latest = object()

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that come in per pass, as their files hold them."""
        return sum(part.num_bytes() for part in self._parts)

    def __call__(self) -> Iterator[int]:
        """Yield 0..L-1; layer i's weights are there until the next number is asked for, or the iterator is closed.

        Raises:
            RuntimeError: in a pass that goes on after another began; that one has the layers.
        """
        self._release()
        self._latest = object()
        return self._turns(self._latest)

    def _turns(self, number: object) -> Iterator[int]:
        self.seconds_waited = 0.0
        self.num_passes += 1
        try:
            self._send_for(0)
            for i in range(len(self._absent)):
                self._reader.wait_for_compute()
                start = time.perf_counter()
                self._take_in(i, self._reader.received(self._coming.pop()))
                self._send_for(i + 1)
                self.seconds_waited += time.perf_counter() - start
                yield i
                if self._latest is not number:
                    raise RuntimeError("another pass over the layers began before this one ended")
                self._put_away(i)
        finally:
            if self._latest is number:
                self._release()

    def _release(self) -> None:
        """Let go of all that a pass holds, wherever it was left."""
        self._reader.wait_for_compute()  # with memory that is taken for the next layer
        for sent in self._coming:
            self._reader.call_off(sent)
        self._coming.clear()
        self._buffers.clear()
        if self._present is not None:
            self._put_away(self._present)

    def _send_for(self, i: int) -> None:
        sent = self._reader.send_for(self._parts[i], partial(self._host, i), is_read=i in self._kept)
        self._coming.append(sent)

    def _host(self, i: int) -> Tensor:
        """Return host memory for a layer: its own if it is kept, else that of layer i - 2."""
        if self._keep == "cpu":
            kept = self._kept.get(i)
            return self._reader.buffer(self._parts[i].buffer_bytes) if kept is None else kept
        if len(self._buffers) < 2:
            self._buffers.append(self._reader.buffer(max(part.buffer_bytes for part in self._parts)))
        return self._buffers[i % 2]

    def _take_in(self, i: int, arrived: Arriving) -> None:
        if self._keep == "cpu":
            self._kept[i] = arrived.host
        self._present = i
        info = self._loader.load(self._parts[i], arrived.place, set(self._absent[i]))
        self._loader.refuse_gaps(info)
        self._reader.wait_for_device()  # for what converts: the memory that it reads is the next layer's

    def _put_away(self, i: int) -> None:
        for name, tensor in self._absent[i].items():
            put_tensor(self._loader.model, name, tensor)
        self._present = None


def _on_meta(tensor: Tensor) -> Tensor:
    there = tensor.detach().to("meta")
    return nn.Parameter(there, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
