"""Over-parameterised linear layers: train each weight as a product of two, multiply them out at the end.

A weight W [O, I] of rank R at most becomes A B with A [O, k R] and B [k R, I], from its singular value decomposition:
both get the root of the singular values, so the model computes what it did. With k > 1 the further columns of A are 0.
What a linear layer can compute stays the same; what gradient descent finds does not (arXiv:2609.06974 uses it for the
layers beside a cut). The product is taken in float32, also where the weight is in 16 bit. A weight that several parts
of the model share stays as it is: as a product it would be shared no more.

Dimensions: O outputs, I inputs, R = min(O, I), H = k R inner size.

    with expanded(model, [student.layers[12], student.layers[13]], 1): ...
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from layerscalpel.progress import say


class Product(nn.Module):
    """A weight as the product of two float32 matrices, in the weight's own number format."""

    def __init__(self, times: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.times, self.dtype = times, dtype

    def forward(self, left_OH: Tensor, right_HI: Tensor) -> Tensor:
        """Return the weight [O, I]."""
        return (left_OH @ right_HI).to(self.dtype)

    def right_inverse(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return two matrices whose product is the weight."""
        left, values, right = torch.linalg.svd(weight_OI.float(), full_matrices=False)
        root = values.sqrt()
        left_OH, right_HI = left * root, root[:, None] * right
        if self.times > 1:
            more = (self.times - 1) * len(values)
            drawn = torch.randn(more, right_HI.shape[1], generator=torch.Generator().manual_seed(0))
            left_OH = torch.cat([left_OH, left_OH.new_zeros(len(left_OH), more)], dim=1)
            right_HI = torch.cat([right_HI, drawn.to(right_HI) * right_HI.std()])
        return left_OH.contiguous(), right_HI.contiguous()


@contextlib.contextmanager
def expanded(model: nn.Module, modules: Iterable[nn.Module], times: int) -> Iterator[None]:
    """Within, every linear layer in these modules of a model has its weight as a product; 0 times leaves them as is."""
    parts = [part for module in modules for part in module.modules() if isinstance(part, (nn.Linear, Conv1D))]
    linears = list(dict.fromkeys(parts)) if times else []
    holders = Counter(id(tensor) for part in model.modules() for tensor in part.parameters(recurse=False))
    chosen = [linear for linear in linears if holders[id(linear.weight)] == 1]
    if len(chosen) < len(linears):
        say(f"{len(linears) - len(chosen)} linear layers share their weight, which heal.expand leaves as it is")
    weights: list[Any] = [linear.weight for linear in chosen]
    for linear, weight in zip(chosen, weights, strict=True):
        parametrize.register_parametrization(linear, "weight", Product(times, weight.dtype), unsafe=True)
    try:
        yield
    finally:
        for linear, weight in zip(chosen, weights, strict=True):
            _multiply_out(linear, weight)


@torch.no_grad()
def _multiply_out(linear: Any, weight: nn.Parameter) -> None:
    """Write the product into the weight that was there before, and put that back in its place."""
    weight.copy_(linear.weight)
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    del linear.weight  # what torch left: no parameter, as nothing asks for gradients any more
    later = dict(linear.named_parameters(recurse=False))
    linear.weight = weight.requires_grad_(False)
    for name in later:
        linear._parameters[name] = linear._parameters.pop(name)  # a weight stands before its bias
