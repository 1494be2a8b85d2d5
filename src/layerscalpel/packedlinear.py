"""Linear layers whose weights are packed in the files of a checkpoint: computed with as they are, never trained.

transformers leaves compressed-tensors weights packed until the first forward, and then unpacks all of them for good.
`hold` puts a PackedLinear in the place of each: it holds the unpacked weight, or, with `packed`, the packed one alone,
which it unpacks at every use, forward and backward: less memory, more time. The numbers are those that the library
unpacks. bitsandbytes' layers stay packed by themselves. `unpack` makes plain layers of those that are to be trained.

    hold(model, read_weights(folder), packed=True)
    unpack([decoder.layers[12], decoder.layers[13]])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layerscalpel.errors import UserError
from layerscalpel.shards import Weights

PACKED = re.compile(r"(.+)\.weight(_scale|\.absmax)")
"""A tensor that every packed linear layer has in the files, of compressed-tensors and of bitsandbytes in 4 bit."""


class PackedLinear(nn.Module):
    """What a linear layer of a compressed-tensors checkpoint computes.

    Its scheme is None where the library unpacked it on loading, as a config with `dequantize` has it.
    """

    held: Tensor | None

    def __init__(self, tensors: Mapping[str, Tensor], scheme: Any, *, packed: bool) -> None:
        super().__init__()
        self.scheme = scheme
        self.names = [name for name in tensors if name != "bias"]
        for name, tensor in tensors.items():
            self.register_buffer(_buffer(name), tensor.detach())
        self.register_buffer("held", None)
        weight = self.weight
        self.out_features, self.in_features = weight.shape
        if not packed:
            self.held = weight
            for name in self.names:
                self.register_buffer(_buffer(name), None)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight."""
        if self.held is not None:
            return self.held
        form = {name: getattr(self, _buffer(name)) for name in self.names}
        if self.scheme is None:
            return form["weight"]
        from compressed_tensors.compressors import BaseCompressor

        compressor: Any = BaseCompressor.get_value_from_registry(self.scheme.format.value)
        return compressor.decompress(form, self.scheme)["weight"]

    @property
    def bias(self) -> Tensor | None:
        """The bias, which is never packed."""
        return getattr(self, _buffer("bias"), None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs [..., F] times the weight, and the bias."""
        if self.held is not None or not (torch.is_grad_enabled() and inputs.requires_grad):
            return functional.linear(inputs, self.weight, self.bias)
        return _Unpacking.apply(inputs, self)


class _Unpacking(torch.autograd.Function):
    """A product that keeps no unpacked weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight, None


def _buffer(name: str) -> str:
    return f"packed_{name}"


def _scheme_of(linear: Any) -> Any:
    """Return how a linear layer is packed; None where the library unpacked it on loading."""
    status = getattr(linear, "quantization_status", None)
    return None if getattr(status, "value", status) == "decompressed" else getattr(linear, "quantization_scheme", None)


def hold(model: Any, weights: Weights, *, packed: bool) -> None:
    """Have the packed layers of a model that transformers just loaded hold their weights; no forward has run yet.

    Args:
        model: of compressed-tensors or bitsandbytes.
        weights: its files.
        packed: keep them packed, and unpack at each use; bitsandbytes does so in any case.

    Raises:
        UserError: something else than linear layers is packed.
    """
    modules = dict(model.named_modules())
    for name in packed_names(weights):
        linear = modules.get(name)
        if isinstance(linear, nn.Linear) and not is_packed(linear):
            tensors = {key: tensor for key, tensor in _tensors(linear) if not key.startswith("input_")}
            scheme = _scheme_of(linear)
            model.set_submodule(name, PackedLinear(tensors, scheme, packed=packed))
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.remove_decompression_hook(model)
    for module in filter(is_packed, model.modules()):
        # of bitsandbytes: on some CPUs its first forward repacks a layer for a kernel that passes on no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    there = {name for name, module in model.named_modules() if is_packed(module)}
    if different := sorted(there ^ packed_names(weights)):
        raise UserError(
            f"{weights.folder} packs {different[0]}, which is no linear layer of its own in {type(model).__name__}"
            " - it can be cut at a given segment (scalpel cut), not searched or healed"
        )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def packed_names(weights: Weights) -> set[str]:
    """Return the layers that are packed in the files of a checkpoint."""
    return {found[1] for name in weights.tensors if (found := PACKED.fullmatch(name))}


def is_packed(module: nn.Module) -> bool:
    """Tell whether a module is a packed linear layer, of either library."""
    return isinstance(module, PackedLinear) or type(module).__name__ == "Linear4bit"


def packed_parameters(module: nn.Module) -> int:
    """Return the weights and biases of the packed layers in a module that its parameters do not count."""
    packed: list[Any] = [part for part in module.modules() if is_packed(part)]
    told = sum(parameter.numel() for part in packed for parameter in part.parameters())
    biases = sum(part.bias.numel() for part in packed if part.bias is not None)
    return sum(part.in_features * part.out_features for part in packed) + biases - told


def unpack(modules: Iterable[nn.Module]) -> None:
    """Put plain layers in the place of the packed ones in these modules, and mark them as such."""
    for module in modules:
        kept = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        dtype = next(kept, torch.float32)  # of a norm, as all that is computed there
        owned = [(owner, name, child) for owner in module.modules() for name, child in owner.named_children()]
        for holder, place, child in owned:
            if is_packed(child):
                setattr(holder, place, _plain(child, dtype))


@torch.no_grad()
def _plain(packed: Any, dtype: torch.dtype) -> nn.Linear:
    if isinstance(packed, PackedLinear):
        weight = packed.weight
    else:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
    if packed.bias is not None:
        plain.bias = nn.Parameter(packed.bias.detach().to(dtype, copy=True), requires_grad=False)
    plain.was_packed = True  # type: ignore[assignment]
    return plain.train(packed.training)


def unpacked_names(model: nn.Module) -> list[str]:
    """Return the layers that `unpack` made plain."""
    return [name for name, module in model.named_modules() if getattr(module, "was_packed", False)]
