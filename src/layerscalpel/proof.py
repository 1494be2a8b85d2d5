"""Prove that a cut checkpoint is the parent without the segment.

Up to three parts, each as strong as memory and time allow, and each named in the result:

twin     the same cut on a tiny random twin of the config, before any weight is touched: full logits, generation with a
         cache equal to without, parameter count, tied weights, config accepted by its own validators.
tensors  every kept tensor has in the copy the dtype, shape and bytes, by sha256, that it has in the source.
logits   the checkpoint itself, loaded in a fresh process that knows transformers alone, against the parent with the
         segment bypassed: in memory where both fit one after the other, else a short block with the weights left on
         disk, layer by layer, where time allows.

On a CPU in float32 the same arithmetic gives the same bits, so logits must be equal, not close.

Source: this project, docs/methods.md#proof.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from layerscalpel.carried import carry_files
from layerscalpel.cut import cut_folder, layer_in, proof_tokens, reference_logits
from layerscalpel.errors import UserError, one_line
from layerscalpel.layers import REFUSALS, Decoder
from layerscalpel.origin import auto_class, skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.probe import find_layers
from layerscalpel.quiet import quiet_transformers, readable
from layerscalpel.segment import Segment
from layerscalpel.shards import Weights, digests, read_weights
from layerscalpel.traces import text_part
from layerscalpel.witness import Witness, generates_alike, is_tied

TOLERANCE_FRACTION = 0.02
"""Off float32 on a CPU other kernels may round differently: allowed share of the largest logit."""


@dataclass(frozen=True)
class LogitsProof:
    """A checkpoint against the parent with the segment bypassed."""

    loaded: str
    """`fresh process`, or `fresh process, weights on disk`."""
    logits_equal: bool
    """torch.equal."""
    max_difference: float
    """Largest absolute difference of two logits."""
    tolerance: float
    """Allowed difference; 0 for float32 on a CPU."""
    generation_equal: bool | None
    """Greedy tokens with a cache equal those without; None where generating from disk would take too long."""
    tokens: tuple[int, ...]
    """Blocks and tokens compared."""
    dtype: str
    device: str


@dataclass(frozen=True)
class TensorsProof:
    """Kept tensors against their source."""

    num_tensors: int
    num_bytes: int
    sha256: str
    """Of the tensors' own sha256, in the order of their new names."""


@dataclass(frozen=True)
class Expected:
    """What the fresh process must find."""

    tokens: torch.Tensor
    logits: torch.Tensor
    parameters: int
    tied: bool
    dtype: str
    device: str
    attention: str | None
    auto_class: str
    trust_remote_code: bool


def expect(
    decoder: Decoder, segment: Segment, *, length: int | None = None, trust_remote_code: bool = False
) -> Expected:
    """Return what the cut checkpoint must compute, from the parent with the segment bypassed.

    Args:
        decoder: the parent.
        segment: the layers to leave out.
        length: tokens of one block; None for the usual two blocks.
        trust_remote_code: whether the fresh process may run code of the checkpoint.
    """
    model = decoder.model
    tokens = proof_tokens(decoder) if length is None else proof_tokens(decoder, blocks=1, length=length)
    logits = reference_logits(decoder, segment, tokens).float().cpu().contiguous()
    named = model.named_parameters(remove_duplicate=False)
    kept = {id(parameter): parameter.numel() for name, parameter in named if not _inside(name, decoder, segment)}
    return Expected(
        tokens.cpu(),
        logits,
        sum(kept.values()),
        is_tied(model),
        str(next(model.parameters()).dtype).removeprefix("torch."),
        tokens.device.type,
        _attention_of(model.config),
        auto_class(model.config).__name__,
        trust_remote_code,
    )


def _attention_of(config: Any) -> str | None:
    """Return the way attention is computed, if it is the same in all parts of the model."""
    ways = {part._attn_implementation for part in (config, text_part(config))}
    return ways.pop() if len(ways) == 1 else None


def _inside(name: str, decoder: Decoder, segment: Segment) -> bool:
    index, _ = layer_in(name, f"{decoder.path}.")
    return bool(index) and segment.start <= int(index) < segment.stop


def prove_logits(
    witness: Witness, folder: str | Path, expected: Expected, *, generate: bool = True, from_disk: bool = False
) -> LogitsProof:
    """Have a checkpoint loaded in the fresh process and compare it with what is expected.

    Raises:
        UserError: it does not load, or is something else; it must not be used.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.safetensors"
        save_file({"tokens": expected.tokens, "logits": expected.logits}, reference)
        seen = witness.ask(
            {
                "folder": str(Path(folder).resolve()),
                "reference": str(reference),
                "device": expected.device,
                "dtype": expected.dtype,
                "attention": expected.attention,
                "auto_class": expected.auto_class,
                "threads": torch.get_num_threads(),
                "trust_remote_code": expected.trust_remote_code,
                "generate": generate,
                "offload": scratch if from_disk else None,
            }
        )
    if "error" in seen:
        raise UserError(f"the checkpoint {folder} does not load in a fresh process: {seen['error']} - do not use it")
    exact = expected.device == "cpu" and expected.dtype == "float32"
    tolerance = 0.0 if exact else TOLERANCE_FRACTION * expected.logits.abs().max().item()
    if found := _what_is_wrong(expected, seen, tolerance):
        raise UserError(f"the checkpoint {folder} failed its proof: {'; '.join(found)} - do not use it")
    return LogitsProof(
        "fresh process, weights on disk" if from_disk else "fresh process",
        seen["logits_equal"],
        seen["max_difference"],
        tolerance,
        seen["generation_equal"],
        tuple(expected.tokens.shape),
        expected.dtype,
        expected.device,
    )


def _what_is_wrong(expected: Expected, seen: dict[str, Any], tolerance: float) -> list[str]:
    difference, parameters = seen["max_difference"], seen["parameters"]
    close = difference <= tolerance and (tolerance > 0 or seen["logits_equal"])  # NaN is never close
    wrong = {
        f"logits that differ by {difference:.3g} where {tolerance:.3g} is allowed": not close,
        "other tokens with a cache than without": seen["generation_equal"] is False,
        f"{parameters:,} parameters where {expected.parameters:,} must stay": parameters != expected.parameters,
        "tied embeddings that came apart, or were joined": seen["tied"] != expected.tied,
        "a config that its own class does not give back": not seen["config_equal"],
    }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def prove_twin(
    witness: Witness, twin: PreTrainedModel, segment: Segment, *, trust_remote_code: bool = False
) -> LogitsProof:
    """Save a tiny twin, cut its files, and prove that.

    Raises:
        UserError: this family cannot be cut soundly there.
    """
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        source, out = Path(scratch) / "twin", Path(scratch) / "cut"
        twin.save_pretrained(source)
        remote = {"trust_remote_code": trust_remote_code}
        with readable(f"transformers' own copy of a {type(twin).__name__}"):
            parent = auto_class(twin.config).from_pretrained(source, dtype=torch.float32, **remote).eval()
        decoder = find_layers(parent)
        cut_folder(read_weights(source), plan_cut(skeleton(parent.config, **remote), segment), out)
        carry_files(source, out)
        try:
            return prove_logits(witness, out, _expect_or_refuse(decoder, segment, trust_remote_code))
        except UserError as error:
            reason = str(error).replace(f"the checkpoint {out}", f"a tiny twin of this {type(twin).__name__}")
            reason = reason.replace("do not use it", f"{segment} cannot be cut")
            own = "" if _generates_alike(parent) else "; the uncut model itself generates other tokens with a cache"
            raise UserError(reason + own) from error


def _generates_alike(model: Any) -> bool:
    """Whether an uncut model's greedy tokens are the same with a cache as without."""
    tokens = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    try:
        return generates_alike(model, tokens)
    except REFUSALS:
        return False


def _expect_or_refuse(decoder: Decoder, segment: Segment, trust_remote_code: bool) -> Expected:
    try:
        return expect(decoder, segment, trust_remote_code=trust_remote_code)
    except REFUSALS as error:
        raise UserError(
            f"layers of {type(decoder.model).__name__} read what layers before them left ({one_line(error)})"
            f" - {segment} cannot be cut"
        ) from error


def prove_tensors(source: Weights, copy: Weights, renamed: dict[str, str]) -> TensorsProof:
    """Compare every kept tensor with its source by sha256 of dtype, shape and bytes.

    Raises:
        UserError: a tensor differs, is missing or is one too many; the copy must not be used.
    """
    if copy.tensors.keys() != set(renamed.values()):
        raise UserError(f"{copy.folder} does not hold the tensors that stay - do not use it")
    names = sorted(renamed, key=renamed.__getitem__)
    before = digests(source.tensors[name] for name in names)
    after = digests(copy.tensors[renamed[name]] for name in names)
    if wrong := [renamed[name] for name, old, new in zip(names, before, after, strict=True) if old != new]:
        raise UserError(
            f"{len(wrong)} tensors of {copy.folder} are not those of the parent ({wrong[0]}) - do not use it"
        )
    total = hashlib.sha256("".join(after).encode()).hexdigest()
    return TensorsProof(len(names), copy.num_bytes(), total)
