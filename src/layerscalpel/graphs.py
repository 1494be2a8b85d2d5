"""Decode by a CUDA graph: one step is recorded once and replayed for every token, so launches cost the host nothing.

A step of a small batch has hundreds of short kernels. Launched one by one, the host's time for each hides how long the
device works, and with it what removed layers save. The keys and values lie in transformers' StaticCache, whose tensors
keep their place and which counts its own length on the device.

Recording with `torch.cuda.CUDAGraph` rather than `torch.compile(mode="reduce-overhead")`: the kernels stay those of
plain decoding, so both ways compare; no compiler, which takes minutes for each depth and batch, has to know the family;
and what cannot be recorded (a step that asks the device for a number, a window that slides) fails at once and by name.
The static cache is checked against the growing one, and every recording must give the logits that the same steps give
unrecorded, but for rounding: other kernels may run while a graph is recorded. The prefill is recorded as well, where
that works; else it is launched plainly, which is said.

    decoding = captured(model, Job(batch_size=1, prompt_tokens=128, new_tokens=32))
    take_turn(decoding, job)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from layerscalpel.errors import one_line
from layerscalpel.layers import REFUSALS, device_of
from layerscalpel.turns import Growing, Job, last_logits_only, random_prompt

CHECKED_TOKENS = 8
"""Most tokens after which the logits of a recording are compared with those of the same steps unrecorded."""
ROUNDING = {torch.float32: 1e-3}
"""Largest difference of the logits of a recording, as a share of their norm; the same kernels give none."""
COARSE_ROUNDING = 0.05
"""The same of formats with fewer bits."""
COMPARED_STEPS = 2
ALIKE = 0.99
"""Least cosine of the logits with a static and with a growing cache; bfloat16 leaves 0.999 and more."""
ROUND_TO = 64
"""The cache's length is a multiple: kernels of masked attention want aligned rows."""
UNMASKED = "layerscalpel_unmasked"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)  # a name for which transformers makes no mask


class NoGraphError(Exception):
    """A model's decoding cannot be recorded; the message says why."""


class Static:
    """Decoding into a cache of a fixed size; on any device, which makes it comparable with a recording."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        """Make the cache.

        Raises:
            NoGraphError: the family has no static cache, or one that is shorter than the text.
        """
        self.model: Any = model
        self.last_only = last_logits_only(model)
        self.logits = torch.empty(0)
        self.token = torch.zeros(job.batch_size, 1, dtype=torch.int64, device=device_of(model))
        total = job.prompt_tokens + job.new_tokens
        try:
            self.cache = StaticCache(config=self.model.config, max_cache_len=-(-total // ROUND_TO) * ROUND_TO)
        except REFUSALS as error:
            raise NoGraphError(f"its cache cannot be static ({one_line(error)})") from error
        lengths = [getattr(layer, "max_cache_len", total) for layer in self.cache.layers]
        if min(lengths) < total:
            raise NoGraphError(f"a window of {min(lengths)} tokens slides over the {total} of prompt and answer")

    def reset(self) -> None:
        """Forget what was read; the cache keeps its place in memory."""
        self.cache.reset()

    def prefill(self, ids_BT: Tensor) -> None:
        """Read a prompt and choose the first token."""
        self._read(ids_BT, **self.last_only)

    def step(self) -> None:
        """Read the last token and choose the next."""
        self._read(self.token)

    def _read(self, ids_BT: Tensor, **how: Any) -> None:
        output = self.model(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, **how)
        self.logits = output.logits[:, -1]
        self.token.copy_(output.logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def tokens(self, ids_BT: Tensor, count: int) -> Tensor:
        """Return the first tokens [B, count] after a prompt."""
        self.reset()
        self.prefill(ids_BT)
        found = [self.token.clone()]
        for _ in range(count - 1):
            self.step()
            found.append(self.token.clone())
        return torch.cat(found, dim=1)

    @torch.no_grad()
    def logits_after(self, ids_BT: Tensor, tokens_BK: Tensor) -> Tensor:
        """Return the logits [K, B, V] after a prompt and each of the tokens that follow it but the last."""
        self.reset()
        self.prefill(ids_BT)
        found = [self.logits.clone()]
        for k in range(tokens_BK.shape[1] - 1):
            self.token.copy_(tokens_BK[:, k : k + 1])
            self.step()
            found.append(self.logits.clone())
        return torch.stack(found)


@torch.no_grad()
def refuse_other_logits(decoding: Static, ids_BT: Tensor) -> None:
    """Compare a prompt's logits, and those of a few steps, with plain decoding's.

    Other shapes are added up in another order, so they are not equal; a cache that a family does not use as it is meant
    shows as another direction.

    Raises:
        NoGraphError: they differ.
    """
    plain = Growing(decoding.model)
    decoding.reset()
    for number in range(COMPARED_STEPS + 1):
        for each in (plain, decoding):
            each.step() if number else each.prefill(ids_BT)
        own, other = (each.logits.double() for each in (decoding, plain))
        likeness_B = torch.cosine_similarity(own - own.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True))
        if not likeness_B.min() >= ALIKE:
            raise NoGraphError("with a static cache it computes other logits than with a growing one")
        decoding.token.copy_(plain.token)


def apart(found_KBV: Tensor, expected_KBV: Tensor) -> float:
    """Return the largest difference of two sets of logits, as a share of the norm of the expected ones."""
    found, expected = found_KBV.double(), expected_KBV.double()
    return ((found - expected).norm(dim=-1) / (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)).max().item()


def is_rounding(share: float, dtype: torch.dtype) -> bool:
    """Tell whether logits so far apart are the same but for rounding; no number is not."""
    return share <= ROUNDING.get(dtype, COARSE_ROUNDING)


@contextlib.contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """Within, fused attention gets no mask and is causal by itself.

    Of a prompt without padding that is all the same, and it lets the fastest kernels run: transformers makes a mask
    whenever a graph is recorded.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    if own == "sdpa":
        config._attn_implementation = UNMASKED
    try:
        yield
    finally:
        config._attn_implementation = own


class Captured(Static):
    """Decoding whose step is a recorded graph, and whose prefill is one, too, where that works."""

    plain_prefill: str | None = "it is not recorded yet"
    """Why the prefill is launched kernel by kernel; None where it is recorded."""

    def __init__(self, model: nn.Module, job: Job) -> None:
        super().__init__(model, job)
        self.recorded: dict[str, tuple[Any, Tensor]] = {}
        self.prompt = torch.zeros(job.batch_size, job.prompt_tokens, dtype=torch.int64, device=self.token.device)

    def prefill(self, ids_BT: Tensor) -> None:
        """Read a prompt and choose the first token."""
        if "prefill" in self.recorded:
            self.prompt.copy_(ids_BT)
            self._replay("prefill")
        else:
            super().prefill(ids_BT)

    def step(self) -> None:
        """Replay the recorded step; before there is one, compute it."""
        if "step" in self.recorded:
            self._replay("step")
        else:
            super().step()

    def _replay(self, name: str) -> None:
        graph, self.logits = self.recorded[name]
        graph.replay()

    @torch.no_grad()
    def record_step(self, ids_BT: Tensor) -> None:
        """Record a step after the prompt; both must have run before, on a stream of its own."""
        self.reset()
        self.prefill(ids_BT)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            super().step()
        self.recorded["step"] = graph, self.logits

    @torch.no_grad()
    def record_prefill(self, ids_BT: Tensor, tokens_BK: Tensor, expected_KBV: Tensor) -> None:
        """Record the prefill; where it cannot be, or leads to other logits than expected, it stays as it is."""
        self.reset()
        graph = torch.cuda.CUDAGraph()
        try:
            with unmasked(self.model), torch.cuda.graph(graph):
                super().prefill(self.prompt)
            self.recorded["prefill"] = graph, self.logits
            self.plain_prefill = None
            share = apart(self.logits_after(ids_BT, tokens_BK), expected_KBV)
            if not is_rounding(share, expected_KBV.dtype):
                self.plain_prefill = f"recorded, it leads to other logits ({share:.2g} of their norm)"
        except REFUSALS as error:
            self.plain_prefill = f"it cannot be recorded ({one_line(error)})"
        if self.plain_prefill:
            self.recorded.pop("prefill", None)


def captured(model: nn.Module, job: Job, *, seed: int = 0) -> Captured:
    """Return a model's decoding with its step recorded and checked, and its prefill where that works.

    Args:
        model: on a CUDA device.
        job: the sizes that the recording is for.
        seed: of the prompt that it is checked on.

    Raises:
        NoGraphError: it cannot be recorded, or gives other logits than before.
    """
    decoding, count = Captured(model, job), min(job.new_tokens, CHECKED_TOKENS)
    ids_BT = random_prompt(model, job, seed).to(device_of(model))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            refuse_other_logits(decoding, ids_BT)
            tokens_BK = decoding.tokens(ids_BT, count)
            expected_KBV = decoding.logits_after(ids_BT, tokens_BK)
        torch.cuda.current_stream().wait_stream(stream)
        decoding.record_step(ids_BT)
        share = apart(decoding.logits_after(ids_BT, tokens_BK), expected_KBV)
    except REFUSALS as error:
        raise NoGraphError(f"its step cannot be recorded ({one_line(error)})") from error
    if not is_rounding(share, expected_KBV.dtype):
        raise NoGraphError(
            f"its recorded step gives other logits than the same step unrecorded ({share:.2g} of their norm)"
        )
    decoding.record_prefill(ids_BT, tokens_BK, expected_KBV)
    return decoding
