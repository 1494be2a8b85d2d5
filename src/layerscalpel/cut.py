"""Remove a segment: its weights and every per-layer trace in the config, and prove that nothing else changed.

The cut model is built by the family's own constructor from the cut config, without weights, and is then handed the
parent's tensors under their new names. So every attribute that a layer derives from its index or from a per-layer rule
is derived anew, and can be compared with what the same layer was in the parent: a rule whose phase the cut would shift
shows as a differing attribute and is refused by name. Finally the logits must equal the parent's with the segment
bypassed, in this process and, from the saved checkpoint, in a fresh one.

Source: this project, docs/methods.md#cut.

    cut, traces = cut_model(decoder, Segment(13, 19, 30))
    proof = prove(folder, decoder, segment)
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder, bypass, device_of
from layerscalpel.segment import Segment

COUNTED_BELOW = ("max_window_layers", "first_k_dense_replace")
"""Config fields that hold a depth: the rule applies below (or from) that layer."""
INDEX_LISTS = ("full_attn_idxs", "mlp_only_layers", "moe_layers")
"""Config fields that list layer indices."""
LAYER_NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""Attributes that hold a layer's own number, which a cut changes rightly."""
PROOF_BLOCKS, PROOF_TOKENS = 2, 24
"""Random token ids that the proof compares logits on."""


@dataclass(frozen=True)
class Proof:
    """What was compared, and how close it came."""

    kind: str
    """`fresh process`: the saved checkpoint, reloaded elsewhere; `none`: --no-verify."""
    logits_equal: bool
    """torch.equal."""
    max_difference: float
    """Largest absolute difference of two logits."""
    tolerance: float
    """Allowed difference; 0 for float32 on a CPU, where the same arithmetic gives the same bits."""
    generation_equal: bool
    """Greedy tokens with a cache equal those without."""
    dtype: str
    device: str


def cut_config(config: Any, segment: Segment) -> tuple[Any, dict[str, str]]:
    """Return a config without the segment's layers, and what was changed as {field: how}.

    Raises:
        UserError: the family's own config class refuses the result.
    """
    outer = copy.deepcopy(config)
    text = outer.get_text_config(decoder=True)
    values = text.to_dict()
    count_name = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed: dict[str, Any] = {count_name: len(segment.kept())}
    for name, value in values.items():
        new = _cut_value(name, value, segment)
        if new is not None and new != value:
            changed[name] = new
    try:
        fresh = type(text)(**{**_constructor_values(text, values), **changed})
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{type(text).__name__} refuses the cut config: {reason} - this segment cannot be cut"
        ) from error
    fresh._attn_implementation = text._attn_implementation
    if text is outer:
        outer = fresh
    else:
        name = next(key for key, item in vars(outer).items() if item is text)
        setattr(outer, name, fresh)
    return outer, {name: f"{_short(values.get(name))} -> {_short(new)}" for name, new in changed.items()}


def _constructor_values(text: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("transformers_version", "model_type")}


def _cut_value(name: str, value: Any, segment: Segment) -> Any:
    if name in COUNTED_BELOW and isinstance(value, int):
        return sum(i < value for i in segment.kept())
    if not isinstance(value, (list, tuple)):
        return None
    if name in INDEX_LISTS:
        return [new for new, old in enumerate(segment.kept()) if old in value]
    if len(value) == segment.num_layers:
        return type(value)(value[i] for i in segment.kept())
    return None


def _short(value: Any) -> str:
    return f"{len(value)} items" if isinstance(value, (list, tuple)) else str(value)


def cut_model(decoder: Decoder, segment: Segment) -> tuple[PreTrainedModel, dict[str, str]]:
    """Return the model without the segment, its tensors shared with the parent, and the changed config fields.

    Raises:
        UserError: the family cannot be cut soundly there; the line names the reason.
    """
    model = decoder.model
    config, traces = cut_config(model.config, segment)
    try:
        with torch.device("meta"):
            cut = type(model)(config)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{type(model).__name__} refuses the cut config: {reason} - it cannot be cut there") from error
    renamed = dict(_renamed(cut, decoder, segment))
    _hand_over(cut, model, renamed)
    cut.generation_config = copy.deepcopy(model.generation_config)
    cut.eval()
    _refuse_changed_layers(decoder, cut, segment)
    _refuse_unequal_logits(decoder, cut, segment)
    return cut, traces


def _renamed(cut: nn.Module, decoder: Decoder, segment: Segment) -> list[tuple[str, str]]:
    """Return (new, old) names of all parameters and buffers of the cut model."""
    prefix, kept = f"{decoder.path}.", segment.kept()
    pairs = []
    tensors = [*cut.named_parameters(remove_duplicate=False), *cut.named_buffers(remove_duplicate=False)]
    for name, _ in tensors:
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            pairs.append((name, f"{prefix}{kept[int(index)]}.{rest}"))
        else:
            pairs.append((name, name))
    return pairs


def _hand_over(cut: nn.Module, parent: nn.Module, renamed: dict[str, str]) -> None:
    source = dict(parent.named_parameters(remove_duplicate=False)) | dict(parent.named_buffers(remove_duplicate=False))
    for new, old in renamed.items():
        owner, _, leaf = new.rpartition(".")
        module = cut.get_submodule(owner)
        there = source.get(old)
        expected = getattr(module, leaf)
        if there is None or there.shape != expected.shape:
            found = "is missing" if there is None else f"has shape {tuple(there.shape)}, not {tuple(expected.shape)}"
            raise UserError(
                f"tensor {old} {found} where the cut config expects it"
                f" - a per-layer rule of {type(parent).__name__} does not survive this cut"
            )
        if isinstance(there, nn.Parameter):
            module._parameters[leaf] = there
        else:
            module._buffers[leaf] = there


def _refuse_changed_layers(decoder: Decoder, cut: PreTrainedModel, segment: Segment) -> None:
    cut_layers = list(cut.get_submodule(decoder.path).children())
    for new, old in enumerate(segment.kept()):
        before, after = _plain_attributes(decoder.layers[old]), _plain_attributes(cut_layers[new])
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                raise UserError(
                    f"layer {old} would change as layer {new}: {name} goes from {before.get(name)} to {after.get(name)}"
                    f" - a per-layer rule of {type(decoder.model).__name__} would shift - choose another segment"
                )


def _plain_attributes(layer: nn.Module) -> dict[str, Any]:
    """Return every attribute of a layer that is a plain value, but its number."""
    found = {}
    for path, module in layer.named_modules():
        found[f"{path}.<class>"] = type(module).__name__
        for name, value in vars(module).items():
            of_the_family = not name.startswith("_") and name not in ("training", *LAYER_NUMBERS)
            if of_the_family and isinstance(value, (bool, int, float, str)):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


@torch.no_grad()
def _refuse_unequal_logits(decoder: Decoder, cut: PreTrainedModel, segment: Segment) -> None:
    tokens = proof_tokens(decoder)
    expected = reference_logits(decoder, segment, tokens)
    actual = cut(input_ids=tokens, use_cache=False).logits
    if not torch.equal(actual, expected):
        difference = (actual - expected).abs().max().item()
        raise UserError(
            f"the cut {type(cut).__name__} computes other logits than the parent without {segment}"
            f" (largest difference {difference:.2g}) - its layers depend on their number, so this segment cannot be cut"
        )


def proof_tokens(decoder: Decoder, seed: int = 0) -> Tensor:
    """Return random token ids [PROOF_BLOCKS, PROOF_TOKENS]."""
    vocab = decoder.vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (PROOF_BLOCKS, PROOF_TOKENS), generator=generator).to(device_of(decoder.model))


@torch.no_grad()
def reference_logits(decoder: Decoder, segment: Segment, tokens: Tensor) -> Tensor:
    """Return the parent's logits [B, T, V] with the segment's layers bypassed."""
    with bypass(decoder, segment):
        return decoder.model(input_ids=tokens, use_cache=False).logits


def prove(folder: str | Path, decoder: Decoder, segment: Segment, *, trust_remote_code: bool = False) -> Proof:
    """Reload a saved checkpoint in a fresh process and compare it with the parent without the segment.

    Raises:
        UserError: the checkpoint does not load, or computes something else; it must not be used.
    """
    model, tokens = decoder.model, proof_tokens(decoder)
    device, dtype = device_of(model).type, str(next(model.parameters()).dtype).removeprefix("torch.")
    exact = device == "cpu" and dtype == "float32"
    expected = reference_logits(decoder, segment, tokens)
    tolerance = 0.0 if exact else 0.02 * expected.float().abs().max().item()  # other kernels may round differently
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.safetensors"
        save_file({"tokens": tokens.cpu(), "logits": expected.float().cpu().contiguous()}, reference)
        task = {
            "folder": str(Path(folder).resolve()),
            "reference": str(reference),
            "device": device,
            "dtype": dtype,
            "attention": model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "trust_remote_code": trust_remote_code,
        }
        done = subprocess.run(
            [sys.executable, "-m", "layerscalpel.witness", json.dumps(task)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the checkpoint {folder} does not load in a fresh process: {last} - do not use it")
    seen = json.loads(done.stdout.splitlines()[-1])
    proof = Proof("fresh process", tolerance=tolerance, dtype=dtype, device=device, **seen)
    if not (proof.max_difference <= tolerance and proof.generation_equal):
        raise UserError(f"the checkpoint {folder} failed its proof: {asdict(proof)} - do not use it")
    return proof
