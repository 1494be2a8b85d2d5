"""Find any decoder's layers without an adapter per family.

A decoder is the one outermost list of as many layers as the config states, and what is known of how these are called.
hooks.py works with it; probe.py learns it from tiny forwards.

    path, layers = find_layer_list(model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscalpel.errors import UserError

REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError),
    StrictDataclassError,
)
"""What config and model classes raise when they refuse their values."""
MOST_LAYERS = 10_000
"""More are a mistake in a config, which nothing should wait for."""


@dataclass(frozen=True)
class Decoder:
    """A causal language model and the place of its layers."""

    model: PreTrainedModel
    layers: nn.ModuleList
    path: str
    """Dotted name of the ModuleList, as `model.layers`."""
    returns: tuple[tuple[type, int] | None, ...]
    """For each layer None when it returns a tensor, else class and length of what it returns, hidden states first."""
    hidden_dims: int
    """Dimensions of the hidden states: 3 for [B, T, D]; families with several residual streams have 4."""
    per_row: frozenset[tuple[Any, ...]]
    """Places of the layer arguments whose leading size grows with the batch (as BLOOM's alibi)."""
    seen: frozenset[tuple[Any, ...]]
    """Places of all tensor arguments that a layer was seen to get."""
    resident: Callable[[], Iterator[int]] | None = None
    """None where all weights are in memory; else each call yields 0..L-1, and layer i's weights are there until the
    next number is asked for."""
    entangled: str = ""
    """What binds its layers together beside the hidden states [B, T, D] that each hands to the next; mostly nothing."""

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width D of the residual stream."""
        return self.model.config.get_text_config(decoder=True).hidden_size

    @property
    def vocab_size(self) -> int:
        """Number V of logits."""
        return self.model.config.get_text_config(decoder=True).vocab_size

    def as_output(self, i: int, hidden: Tensor) -> Any:
        """Dress hidden states as layer i returns them."""
        dress = self.returns[i]
        if dress is None:
            return hidden
        container, length = dress
        return getattr(container, "_make", container)([hidden, *[None] * (length - 1)])


def count_field(text_config: Any) -> str:
    """Return the name of the config field that holds the number of decoder layers."""
    if hasattr(text_config, "decoder_layers"):  # beside an encoder of its own count
        return "decoder_layers"
    return text_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def num_layers_of(config: Any) -> int:
    """Return the decoder's layer count as the config states it, whatever the family calls it."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, count_field(text), None)
    if not isinstance(count, int):
        raise UserError(f"config of type '{config.model_type}' states no number of decoder layers - is it a decoder?")
    if not 0 < count <= MOST_LAYERS:
        raise UserError(f"config of type '{config.model_type}' states {count} layers - allowed: 1 to {MOST_LAYERS}")
    return count


def find_layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the one outermost ModuleList of config-many items: of one class, else of several decoder layer classes.

    Raises:
        UserError: none or several fit; the message lists every ModuleList there is.
    """
    count = num_layers_of(model.config)
    lists = [(name, item) for name, item in model.named_modules() if isinstance(item, nn.ModuleList) and len(item)]
    outermost = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    fitting = [(name, item) for name, item in outermost if len(item) == count]
    uniform = [(name, item) for name, item in fitting if len({type(layer) for layer in item}) == 1]
    for choice in (uniform, fitting):
        if len(choice) == 1:
            return choice[0]
    found = ", ".join(f"{n} ({len(m)} x {'/'.join(sorted({type(x).__name__ for x in m}))})" for n, m in lists)
    raise UserError(
        f"{'several' if fitting else 'no'} lists of {count} decoder layers in {type(model).__name__}"
        f" - found: {found or 'no ModuleList at all'} - this model cannot be cut"
    )


def refuse_shared_keys(model: PreTrainedModel) -> None:
    """Refuse a model whose layers read keys and values of layers that a cut may remove."""
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0) or "reuse" in (getattr(text, "kv_sharing_modes", None) or ()):
        raise UserError(
            f"layers of {type(model).__name__} read the keys and values of other layers - this model cannot be cut"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device that token ids must be on; where weights are left on disk, the one they are brought to."""
    hook = getattr(model, "_hf_hook", None)  # accelerate's
    devices = [parameter.device for parameter in model.parameters()]
    there = next((device for device in devices if device.type != "meta"), devices[0])
    return torch.device(hook.execution_device) if hook and devices[0].type == "meta" else there


def body_of(model: PreTrainedModel) -> nn.Module:
    """Return the model without its head, where the family has such a part (else the model itself)."""
    return model.base_model


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of that dotted name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    holders: Any = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    holders[leaf] = tensor


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return {name: tensor} of all parameters and buffers; a shared one stands under each of its names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
