"""What a quantised folder must pass: its tensors are those of the scheme, and it loads as any user would load it.

tensors   every linear layer that the scheme converts is stored packed, in as many numbers as its bits take, no other
          is, and whatever stays has the very bytes of the source.
loading   a fresh process that knows transformers alone computes from it what was judged here: in float32 on the CPU
          bit by bit, also with a cache as without; in bfloat16 up to a stated tolerance.

    check_tensors(source, folder, scheme)
    seen = look(folder, reference, held_out, Computing())
    proofs = prove_loading(folder, seen, Computing())
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from layerscalpel.cut import proof_tokens
from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import Loaded, choose_device, load_origin
from layerscalpel.errors import UserError, kind_and_line
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.layers import device_of
from layerscalpel.losses import Measured
from layerscalpel.origin import auto_class, peek
from layerscalpel.probe import find_layers
from layerscalpel.progress import waiting
from layerscalpel.proof import Expected, LogitsProof, prove_logits
from layerscalpel.quiet import without_bars
from layerscalpel.scheme import Scheme
from layerscalpel.settings import Config
from layerscalpel.shards import digests, read_weights
from layerscalpel.witness import Witness, is_tied

PACKED = ".weight_packed"
"""Ends the name of a linear layer's packed numbers."""
WORD_BITS = 32


@dataclass(frozen=True)
class Computing:
    """Where and how finely models compute, as the settings of a model say."""

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 4
    trust_remote_code: bool = False

    @classmethod
    def of(cls, config: Config) -> Computing:
        """Take what the settings of a run, or of one model, say."""
        model = config.model
        return cls(model.device, model.dtype, config.evaluate.batch_size, model.trust_remote_code)


@dataclass(frozen=True)
class Seen:
    """A quantised folder as it computes in this process."""

    kl_nats: Measured | None
    """To the source on held-out text; None where none was given."""
    expected: Expected
    """What a fresh process must compute."""
    runs_packed: bool
    """Whether transformers computes with the packed weights; otherwise it unpacks them first."""


def load_any(folder: Path, computing: Computing) -> Loaded:
    """Load a checkpoint folder as transformers does, also one that is quantised."""
    origin = peek(str(folder), trust_remote_code=computing.trust_remote_code, allow_quantised=True)
    with waiting(f"loading {folder}"):
        loaded = load_origin(origin, device=computing.device, dtype=computing.dtype)
    if origin.quantised:
        with torch.no_grad(), without_bars():  # its first forward unpacks what is unpacked
            loaded.model(input_ids=torch.ones(1, 1, dtype=torch.long, device=device_of(loaded.model)), use_cache=False)
    return loaded


def _load_draft(folder: Path, computing: Computing) -> Loaded:
    """Load a folder that was just written, whose packed layers this kind of model may not take."""
    try:
        return load_any(folder, computing)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a kind of model does with layers that it does not know
        kind = (json.loads((folder / "config.json").read_text("utf-8")).get("architectures") or ["this model"])[0]
        # A UserError of the draft would send the user after a folder that is not theirs.
        reason = kind_and_line(error.__cause__ or error)
        raise UserError(
            f"transformers does not load {kind} with packed layers: {reason} - allowed: quantize.method=none"
        ) from error


def reference_of(source: Path, held_out: TokenBlocks, computing: Computing) -> Reference:
    """Load the source and run it over the held-out text."""
    decoder = find_layers(load_any(source, computing).model)
    size = computing.batch_size
    return Reference(decoder, final_hidden(decoder, held_out.tokens, batch_size=size, label="to be quantised"))


def look(
    folder: Path,
    reference: Reference | None,
    held_out: TokenBlocks | None,
    computing: Computing,
    converted: tuple[str, ...] = (),
) -> Seen:
    """Load a quantised folder, measure it, and note what it computes.

    Raises:
        UserError: transformers does not load it.
    """
    decoder = find_layers(_load_draft(folder, computing).model)
    tokens = proof_tokens(decoder)
    with torch.no_grad():
        logits = decoder.model(input_ids=tokens, use_cache=False).logits.float().cpu().contiguous()
    expected = Expected(
        tokens.cpu(),
        logits,
        sum(parameter.numel() for parameter in decoder.model.parameters()),
        is_tied(decoder.model),
        str(decoder.model.dtype).removeprefix("torch."),
        tokens.device.type,
        None,
        auto_class(decoder.model.config).__name__,
        computing.trust_remote_code,
    )
    kl = None
    if reference is not None and held_out is not None:
        size = computing.batch_size
        kl = evaluate(decoder, held_out, reference, batch_size=size, label="KL after quantising").kl_nats
    parts = [decoder.model.get_submodule(name) for name in converted]
    packed = any(type(part) is not nn.Linear or not part.weight.is_floating_point() for part in parts)
    return Seen(kl, expected, packed)


def prove_loading(folder: Path, seen: Seen, computing: Computing) -> list[LogitsProof]:
    """Have a fresh process load the folder: as it was judged, and in float32 on the CPU and in bfloat16.

    Raises:
        UserError: it does not load, or computes something else; it must not be used.
    """
    device = choose_device(computing.device).type
    judged = (seen.expected.device, seen.expected.dtype)
    others = [("cpu", "float32"), (device, "bfloat16")]
    expected = [seen.expected]
    for place, dtype in others:
        if (place, dtype) != judged:
            expected.append(look(folder, None, None, replace(computing, device=place, dtype=dtype)).expected)
    with Witness() as witness:
        # In bfloat16 two tokens may be equally likely, and a cache tip the scales.
        return [prove_logits(witness, folder, item, generate=item.dtype == "float32") for item in expected]


def check_tensors(source: Path, folder: Path, scheme: Scheme) -> None:
    """Check that what is stored packed is what the scheme converts, in its bits, and that all else stayed.

    Raises:
        UserError: something else was written; it must not be used.
    """
    before, after = read_weights(source), read_weights(folder)
    packed = {name.removesuffix(PACKED): tensor for name, tensor in after.tensors.items() if name.endswith(PACKED)}
    if wrong := sorted(packed.keys() ^ set(scheme.converted)):
        raise UserError(
            f"the checkpoint {folder} has other linear layers quantised than it should: {len(wrong)} differ"
            f" ({wrong[0]}, ...) - do not use it"
        )
    for name, tensor in packed.items():
        bits, (rows, columns) = scheme.bits_of(name), before.tensors[f"{name}.weight"].shape
        if tensor.shape != (rows, math.ceil(columns * bits / WORD_BITS)):
            raise UserError(f"the checkpoint {folder} does not hold {name} in {bits} bits - do not use it")
    of_packed = tuple(f"{name}." for name in packed)
    kept = sorted(name for name in before.tensors if not name.startswith(of_packed) or name.endswith(".bias"))
    absent = [name for name in kept if name not in after.tensors]
    old, new = (digests(w.tensors[name] for name in kept if name not in absent) for w in (before, after))
    changed = [
        name for name, one, other in zip([n for n in kept if n not in absent], old, new, strict=True) if one != other
    ]
    if absent or changed:
        raise UserError(
            f"the checkpoint {folder} lacks {len(absent)} tensors that stay, and {len(changed)} have other bytes than"
            f" before ({(absent + changed)[0]}) - do not use it"
        )
