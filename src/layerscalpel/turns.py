"""One turn of a benchmark: a prompt is read, tokens are decoded, and the clock is looked at in between.

What decodes is told apart from what times it: `Growing` is plain decoding, graphs.py decodes by a CUDA graph.

    turn = take_turn(Growing(model), Job(batch_size=1, prompt_tokens=128, new_tokens=32))
    turn.prefill_s, turn.first_token_s, turn.decode_s

Dimensions: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerscalpel.errors import UserError
from layerscalpel.layers import device_of

Clock = Callable[[], float]
GROWING = "eager, growing cache"
GRAPH = "CUDA graph, static cache"


@dataclass(frozen=True)
class Job:
    """How much is read and written."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    @property
    def decoded(self) -> int:
        """Tokens of all sequences that decoding steps write; the prefill writes the first of each."""
        return self.batch_size * (self.new_tokens - 1)


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn."""

    prefill_s: float
    """The forward over the prompt, which is on the device, and the choice of the next token."""
    first_token_s: float
    """From token ids in host memory to the first new token in host memory."""
    decode_s: float
    """The steps after that, one for each further token."""


class Decoding(Protocol):
    """A model that decodes greedily, in a way of its own."""

    model: Any
    token: Tensor
    """The last token of each sequence [B, 1]."""
    logits: Tensor
    """Those it was chosen by [B, V]."""

    def reset(self) -> None:
        """Forget what was read."""
        ...

    def prefill(self, ids_BT: Tensor) -> None:
        """Read a prompt and choose the first token."""
        ...

    def step(self) -> None:
        """Read the last token and choose the next."""
        ...


class Growing:
    """Plain decoding: the host launches kernel by kernel, the cache grows with every token."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.token = self.logits = torch.empty(0)
        self.cache: Any = None
        self.last_only = last_logits_only(model)

    def reset(self) -> None:
        """Forget what was read."""
        self.cache = None

    def prefill(self, ids_BT: Tensor) -> None:
        """Read a prompt and choose the first token.

        Raises:
            UserError: the model hands on no keys and values.
        """
        output = self.model(input_ids=ids_BT, use_cache=True, **self.last_only)
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise UserError(
                f"{type(self.model).__name__} keeps no keys and values, which decoding is timed with"
                " - leave the benchmark out (--set benchmark.enabled=false)"
            )
        self._choose(output.logits)

    def step(self) -> None:
        """Read the last token and choose the next."""
        output = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        self._choose(output.logits)

    def _choose(self, logits_BTV: Tensor) -> None:
        self.logits = logits_BTV[:, -1]
        self.token = logits_BTV[:, -1:].argmax(-1)


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Return the argument that has a model make the logits of the last token alone, as generation does."""
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


def random_prompt(model: Any, job: Job, seed: int) -> Tensor:
    """Return token ids [B, T] in host memory."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (job.batch_size, job.prompt_tokens), generator=generator)


@torch.no_grad()
def take_turn(decoding: Decoding, job: Job, *, seed: int = 0, clock: Clock = time.perf_counter) -> Turn:
    """Let a model read a random prompt and write new tokens, and return how long each took.

    Args:
        decoding: the model.
        job: how much it reads and writes.
        seed: of the prompt.
        clock: seconds that never go back; it is read five times.
    """
    device = device_of(decoding.model)
    prompt_BT = random_prompt(decoding.model, job, seed)
    decoding.reset()
    synchronise(device)
    began = clock()
    ids_BT = prompt_BT.to(device)
    synchronise(device)
    given = clock()
    decoding.prefill(ids_BT)
    synchronise(device)
    read = clock()
    decoding.token.tolist()
    told = clock()
    for _ in range(job.new_tokens - 1):
        decoding.step()
    synchronise(device)
    return Turn(prefill_s=read - given, first_token_s=told - began, decode_s=clock() - told)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
