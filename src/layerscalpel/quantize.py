"""Quantise a checkpoint, keep the best of what was tried, and prove that it loads.

A back end is one function that writes a folder (BACKENDS). What all share is here: of several values of damping the one
is kept that is nearest to the source on held-out text, by the KL between the two; then the folder is proven
(quantproof.py). Healing comes before: its gradients want weights that are free to move, and what healing learnt is
rounded with all else.

    found = quantize_checkpoint(Path("healed"), Path("small"), calibration, held_out, config.quantize, seams=[13])
    found.to_dict()
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerscalpel import gptq, rtn
from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import fresh_folder
from layerscalpel.errors import UserError
from layerscalpel.footprint import folder_bytes
from layerscalpel.losses import Measured
from layerscalpel.progress import say, waiting
from layerscalpel.proof import LogitsProof
from layerscalpel.quantproof import Computing, Seen, check_tensors, look, prove_loading, reference_of
from layerscalpel.scheme import Scheme, bare_model
from layerscalpel.settings import QuantizeSettings

FEWEST_TOKENS = 2048
"""Calibration text of fewer tokens tells too little of what a layer is given."""


@dataclass(frozen=True)
class Backend:
    """One way to quantise."""

    sentence: str
    paper: str
    write: Callable[[Path, Path, Tensor, Scheme], None]
    """`write(source, out, tokens_NT, scheme)` writes the folder `out` from the plain checkpoint `source`."""
    needs: Callable[[QuantizeSettings], None]
    """Raises a UserError where its library is missing, or it cannot do what the settings ask for."""
    learns: bool
    """Whether it reads text, and so has an order of columns and a damping."""


BACKENDS = {
    "gptq": Backend(
        "column by column; those that follow make up for the rounding of those before",
        "2210.17323",
        gptq.write,
        gptq.needs,
        learns=True,
    ),
    "rtn": Backend(
        "each weight to the nearest point of its group's grid, without text: the floor to beat",
        "",
        rtn.write,
        rtn.needs,
        learns=False,
    ),
}


@dataclass(frozen=True)
class Tried:
    """One attempt."""

    damping: float
    kl_nats: Measured | None
    """To the source, per held-out token."""


@dataclass(frozen=True)
class Quantized:
    """What became of a checkpoint."""

    method: str
    scheme: Scheme
    """With the damping that was kept."""
    tried: tuple[Tried, ...]
    kl_nats: Measured | None
    """Of the one that was kept, to the source, per held-out token; None where no text was given."""
    proofs: tuple[LogitsProof, ...]
    runs_packed: bool
    """Whether transformers computes with the packed weights; otherwise it unpacks them first, and the model is as slow,
    and as large in memory, as its source."""
    num_bytes: int
    """Of the whole folder."""
    source_bytes: int
    """Of the whole folder that it was made from."""
    write_s: float
    """Seconds of the back end, over all attempts."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        scheme, learns = self.scheme, BACKENDS[self.method].learns
        names = ["bits", "group_size", "symmetric", *(["act_order", "damping"] if learns else [])]
        found: dict[str, Any] = {"method": self.method} | {name: getattr(scheme, name) for name in names}
        found |= {"wider": dict(scheme.wider)} if scheme.wider else {}
        found |= scheme.counts() | {"bytes": self.num_bytes, "source_bytes": self.source_bytes}
        if self.kl_nats:
            found["kl_to_source_nats"] = self.kl_nats.to_dict()
        if len(self.tried) > 1:
            found["tried"] = [
                {"damping": one.damping, "kl_to_source_nats": one.kl_nats.to_dict()}
                for one in self.tried
                if one.kl_nats
            ]
        found["proof"] = [asdict(proof) | {"tokens": list(proof.tokens)} for proof in self.proofs]
        return found | {"runs_packed": self.runs_packed, "write_s": round(self.write_s, 2)}


def require_quantizable(
    settings: QuantizeSettings, num_tokens: int | None = None, binding: str = "quantize.num_blocks"
) -> None:
    """Refuse, before anything is loaded, settings that no model could be quantised with.

    Args:
        settings: how.
        num_tokens: of the calibration text; None where it is not known yet.
        binding: the setting that says how much text there is.

    Raises:
        UserError: a missing library, something that the method cannot do, or too little text.
    """
    backend = BACKENDS[settings.method]
    backend.needs(settings)
    if backend.learns and num_tokens is not None and num_tokens < FEWEST_TOKENS:
        raise UserError(
            f"{num_tokens:,} tokens of calibration text are too few for {settings.method}"
            f" - allowed: {FEWEST_TOKENS:,} or more - raise {binding}, or take --quantize rtn, which reads"
            " none"
        )


def quantize_checkpoint(
    source: Path,
    out: Path,
    calibration: TokenBlocks | None,
    held_out: TokenBlocks | None,
    settings: QuantizeSettings,
    *,
    seams: Sequence[int] = (),
    seed: int = 0,
    computing: Computing = Computing(),  # noqa: B008 - it cannot change
) -> Quantized:
    """Write a quantised copy of a checkpoint; of several values of damping the one nearest to the source is kept.

    Args:
        source: folder of a plain checkpoint.
        out: folder of the new one; must not exist, or be empty.
        calibration: text for methods that read some.
        held_out: text that attempts are judged by; None judges none, and takes the first value of damping.
        settings: how.
        seams: for each seam the first layer after it.
        seed: of whatever a back end draws.
        computing: of the models that are compared.

    Raises:
        UserError: settings that do not fit the model, too little text, a missing library, or a folder that failed its
            proof; nothing is left of it then.
    """
    tokens_NT = torch.zeros((0, 1), dtype=torch.long)
    if calibration is not None and BACKENDS[settings.method].learns:
        tokens_NT = calibration.first(settings.num_blocks).tokens
    fewer = calibration is not None and len(calibration) < settings.num_blocks
    require_quantizable(settings, tokens_NT.numel(), "search.num_blocks" if fewer else "quantize.num_blocks")
    scheme = Scheme.of(bare_model(source, trust_remote_code=computing.trust_remote_code), settings, seams)
    _tell(settings.method, scheme)
    source_bytes = folder_bytes(source)  # before anything is written, which may be inside it
    tried, best, write_s = [], None, 0.0
    with fresh_folder(out) as draft:
        reference = reference_of(source, held_out, computing) if held_out is not None else None
        for damping in _dampings(settings, judged=held_out is not None):
            folder, attempt = draft / f"attempt-{len(tried)}", replace(scheme, damping=damping)
            torch.manual_seed(seed)
            began = time.monotonic()
            with waiting(f"quantising by {settings.method}"):
                BACKENDS[settings.method].write(source, folder, tokens_NT, attempt)
            write_s += time.monotonic() - began
            check_tensors(source, folder, attempt)
            seen = look(folder, reference, held_out, computing, scheme.converted)
            tried.append(Tried(damping, seen.kl_nats))
            best = _nearer(best, _Attempt(folder, attempt, seen))
        del reference
        assert best is not None, "one value of damping is tried at least"
        proofs = prove_loading(best.folder, best.seen, computing)
        for path in best.folder.iterdir():
            shutil.move(path, draft / path.name)
        best.folder.rmdir()
        num_bytes = folder_bytes(draft)
    return Quantized(
        method=settings.method,
        scheme=best.scheme,
        tried=tuple(tried),
        kl_nats=best.seen.kl_nats,
        proofs=tuple(proofs),
        runs_packed=best.seen.runs_packed,
        num_bytes=num_bytes,
        source_bytes=source_bytes,
        write_s=write_s,
    )


def _dampings(settings: QuantizeSettings, *, judged: bool) -> tuple[float, ...]:
    """Return the values to try: all where they can be judged, and matter."""
    several = judged and BACKENDS[settings.method].learns
    return tuple(dict.fromkeys(settings.damping)) if several else settings.damping[:1]


def _tell(method: str, scheme: Scheme) -> None:
    counts = scheme.counts()
    left = ", ".join(f"{number} x {reason}" for reason, number in counts["left"].items())
    say(
        f"{method}, {scheme.bits} bits, groups of {scheme.group_size}: {counts['converted']} of {counts['modules']}"
        f" modules are quantised; left: {left}"
    )


class _Attempt(NamedTuple):
    """A folder that was tried."""

    folder: Path
    scheme: Scheme
    seen: Seen


def _nearer(old: _Attempt | None, new: _Attempt) -> _Attempt:
    """Return the attempt that is nearer to the source, the first of equals, and remove the other."""
    if old is None:
        return new
    was, now = old.seen.kl_nats, new.seen.kl_nats
    assert was is not None
    assert now is not None, "several are tried only where they can be judged"
    best, other = (new, old) if now.value < was.value else (old, new)
    shutil.rmtree(other.folder)
    return best
