"""Memory that stages need, counted without weights, and healings that cannot fit, refused before anything is loaded.

memory_needed(skeleton(config), layer_sizes, "bfloat16")["cuda"]["search"]  # bytes
"""

from __future__ import annotations

from typing import Any

import torch

from layerscalpel.decoder import choose_device, choose_dtype, num_parameters
from layerscalpel.errors import UserError
from layerscalpel.layers import find_layer_list
from layerscalpel.memory import free_bytes
from layerscalpel.objectives import asks_parent
from layerscalpel.origin import Origin, read_config, skeleton
from layerscalpel.segment import parse_segment
from layerscalpel.settings import Config
from layerscalpel.targets import num_removed_of

MASTER_BYTES = 16
"""Of one trained number: float32 master, gradient, and Adam's two moments."""
MOMENTS_BYTES, FLOAT_BYTES = 8, 4
"""Of one trained number: Adam's two moments; the master of one that computes in fewer bits."""
LIBRARIES_BYTES = 600_000_000
"""What the process and that of a proof take without weights (measured: docs/benchmarks/surgery.json)."""
GIB = 1 << 30


def memory_needed(model: Any, layer_sizes: list[int], stored: str) -> dict[str, dict[str, int]]:
    """Return bytes by device and stage: weights, optimiser state and libraries, without activations.

    Of an offloaded model two layers are there at once; the hidden states have a bound of their own (search.stream_gib).
    """
    parameters = num_parameters(model)
    trained = 2 * max(layer_sizes)
    found = {}
    for kind in ("cpu", "cuda"):
        itemsize = choose_dtype("auto", torch.device(kind), stored).itemsize
        whole = parameters * itemsize
        stages = {
            "search": whole,
            "search --offload disk": whole - (sum(layer_sizes) - 2 * max(layer_sizes)) * itemsize,
            "cut": 0,
            "cut, proven in memory": whole,
            "heal (ce)": whole + trained * MASTER_BYTES,
            "heal (kl, both)": 2 * whole + trained * MASTER_BYTES,
            "heal (all layers, kl, both)": 2 * whole + sum(layer_sizes) * MASTER_BYTES,
            "evaluate, benchmark": 2 * whole,
        }
        found[kind] = {stage: LIBRARIES_BYTES + needed for stage, needed in stages.items()}
    return found


def require_memory_to_heal(config: Config, origin: Origin) -> None:
    """Refuse to train all layers where weights, gradients and moments alone are more than the device has free.

    Raises:
        UserError: with what is needed at least, and what needs less.
    """
    heal = config.heal
    if "all" not in (heal.method, heal.second) or heal.shard:
        return
    device = choose_device(config.model.device)
    model = skeleton(read_config(origin), trust_remote_code=config.model.trust_remote_code)
    needed = _bytes_of_all(model, config, choose_dtype(config.model.dtype, device, origin.dtype).itemsize)
    if needed > (free := free_bytes(device)):
        raise UserError(
            f"training all layers takes at least {_gib(needed)} GiB for weights, gradients and moments, and"
            f" {device.type} has {_gib(free)} GiB free - train the two layers at the seam (--recipe paper, or --set"
            " heal.second=none), adapters (--set heal.second=lora), or spread the weights (heal.shard)"
        )


def _gib(num_bytes: int) -> str:
    """Return GiB with a decimal, of less than 1 with 2 significant digits, so that no need is told as nothing."""
    gib = num_bytes / GIB
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.2g}"


def _bytes_of_all(model: Any, config: Config, itemsize: int) -> int:
    """Return the least bytes of training all layers that are left; activations are not counted."""
    target, sizes = config.target, [num_parameters(layer) for layer in find_layer_list(model)[1]]
    if target.segment:
        removed = len(parse_segment(target.segment, len(sizes)))
    elif target.max_kl is None and target.params is None and target.latency_ms is None:
        removed = num_removed_of(target, len(sizes))
    else:
        removed = len(sizes) // 2  # as many as a search goes to
    whole, trained = num_parameters(model), sum(sorted(sizes)[: len(sizes) - removed])
    child = whole - sum(sizes) + trained
    parent = whole if asks_parent(config.heal) and config.heal.frozen == "device" else 0
    masters = trained * FLOAT_BYTES if itemsize < FLOAT_BYTES else 0
    return (parent + child + trained) * itemsize + masters + trained * MOMENTS_BYTES
