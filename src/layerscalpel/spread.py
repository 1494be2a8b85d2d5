"""Layers whose weights are spread over processes: FSDP2, torch's fully_shard, which gathers a layer while it computes.

fully_shard hangs its hooks on a module's call, and a layer of ours is called while it is bypassed, too, on each process
another number of times. So the hooks hang on a module in between, which only the layer's own forward goes through: a
bypassed layer gathers nothing. Embedding, norm and head are whole on every process, so that the head needs no others.

Trained weights become DTensors. Their optimiser works on this process's part, a plain tensor: AdamW takes every number
by itself. `part_of` and `whole` go from whole tensors to parts and back.

    with spread([student.layers[12], student.layers[13]], device) as live: ...  # live[parameter] is its DTensor
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from layerscalpel.errors import UserError
from layerscalpel.layers import all_tensors, put_tensor


class _Way(nn.Module):
    """What a layer's own forward goes through; its call gathers the layer's weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.compute = layer, layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the layer does."""
        return self.compute(*args, **kwargs)


class _Ways(nn.Module):
    """All of them, which share streams and take turns."""

    def __init__(self, ways: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, _nothing: Tensor) -> None:
        """Nothing: its first call makes fully_shard see which modules belong together; it wants a tensor to move."""


@contextlib.contextmanager
def spread(layers: Sequence[nn.Module], device: torch.device) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Within, each process holds its share of these layers' weights on the device; all of them run the same layers.

    Gives {parameter: what stands in its place}. At the end the layers are whole again where they were, those that are
    trained as they have become; after an exception, which others may not have met, all as they were before.

    Raises:
        UserError: layers share weights.
    """
    tensors = [all_tensors(layer) for layer in layers]
    _require_own_weights(tensors)
    before = [{name: tensor.data for name, tensor in of_layer.items()} for of_layer in tensors]
    forwards = [vars(layer).get("forward") for layer in layers]
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    try:
        _take_apart(layers, mesh)
        now = [all_tensors(layer) for layer in layers]
        live = {old: new[name] for of_layer, new in zip(tensors, now, strict=True) for name, old in of_layer.items()}
        yield live  # pyright: ignore[reportReturnType] buffers stand for themselves
        for tensor, data in zip(_each(tensors), _each(before), strict=True):
            if tensor.requires_grad:
                data.copy_(whole(local(live[tensor]), live[tensor]))
    finally:
        for layer, own, of_layer, data in zip(layers, forwards, tensors, before, strict=True):
            _put_back(layer, own, of_layer, data)


def _each(of_layers: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
    for of_layer in of_layers:
        yield from of_layer.values()


def _require_own_weights(tensors: Sequence[dict[str, Tensor]]) -> None:
    holders = [{id(tensor) for tensor in of_layer.values()} for of_layer in tensors]
    if sum(map(len, holders)) > len(set().union(*holders)):
        raise UserError("layers of this model share weights, so heal.shard cannot spread them - leave it out")


def _take_apart(layers: Sequence[nn.Module], mesh: Any) -> None:
    """Leave every process its share; gradients are summed, in float32, as if one process had seen all blocks."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    ways: list[Any] = [_Way(layer) for layer in layers]
    for way in ways:
        fully_shard(way, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        way.set_gradient_divide_factor(1.0)
        way.set_force_sum_reduction_for_comms(True)  # a sum with a factor is NCCL's alone
        way.layer.forward = partial(way)  # a module itself would become a part of the layer
    for way, following in pairwise(ways):
        way.set_modules_to_forward_prefetch([following])
    root = _Ways(ways)
    fully_shard(root, mesh=mesh)
    root(torch.empty(0))


def _put_back(layer: nn.Module, own: Any, tensors: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    if isinstance(vars(layer).get("forward"), partial):
        del layer.forward
    if own is not None:
        layer.forward = own
    for name, tensor in tensors.items():
        tensor.data = before[name]
        put_tensor(layer, name, tensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, which shares its memory; the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(part: Tensor, like: Tensor, *, keep: bool = True) -> Tensor:
    """Return the whole tensor, in host memory, of which each process gives its part, spread as `like` is.

    All processes call this together; those that do not keep it get an empty one.
    """
    if not isinstance(like, DTensor):
        return part.detach().to("cpu")
    whole_tensor = DTensor.from_local(
        part.detach().to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()
    return whole_tensor.to("cpu") if keep else torch.empty(0)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor that is spread as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements).to_local()
