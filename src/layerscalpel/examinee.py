"""A model as lm-evaluation-harness sees it: the harness's own `hf` model, which also shows progress and counts.

What is computed is left to the harness. Added is what it does in silence: an item longer than the model's context loses
its beginning, and log likelihoods that are no numbers still choose an answer. Only what needs the harness imports this.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.progress import track

_Own: Any = HFLM  # its decorator hides its type


def _all(items: range, label: str) -> Generator[int]:
    yield from track(items, label, len(items))


class Examinee(_Own):
    """A loaded model that answers the harness's requests."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, batch_size: int, max_length: int | None, label: str
    ) -> None:
        """Take a model as it is, where it is.

        Args:
            model: a decoder.
            tokenizer: its own, or its parent's; a copy is used, for the harness may give it a padding token.
            batch_size: sequences at once.
            max_length: longest sequence in tokens; None for the model's context limit.
            label: what the progress line says.
        """
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
        )
        self.cut_short = 0
        """Sequences that lost their beginning."""
        self._label = label
        self._steps: Iterator[int] = iter(())

    @contextlib.contextmanager
    def _watched(self, total: int) -> Iterator[None]:
        """Show how many of the sequences are done."""
        with contextlib.closing(_all(range(total), self._label)) as self._steps:
            yield
            self._advance(total)

    def _advance(self, count: int) -> None:
        for _ in islice(self._steps, count):
            pass

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log likelihood, whether greedy) of each continuation."""
        with self._watched(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log likelihood of each text, window by window."""
        windows = [math.ceil(len(self.tok_encode(text)) / self.max_length) for (text,) in (r.args for r in requests)]
        with self._watched(sum(windows)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what the model writes after each prompt."""
        room = self.max_length - max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
        if room < 1:
            raise UserError(
                f"the answers of a task may have as many tokens as the model's context, {self.max_length:,}, so no room"
                " is left for its prompts - leave the task out"
            )
        with self._watched(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max(len(continuation) for _, _, continuation in requests)
        if longest > self.max_length:
            raise UserError(
                f"an answer of a task has {longest:,} tokens, the model's context {self.max_length:,}"
                " - leave the task out, or raise evaluate.task_tokens if the model allows it"
            )
        self.cut_short += sum(len(context) + len(own) > self.max_length + 1 for _, context, own in requests)
        found = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        if not all(math.isfinite(log_likelihood) for log_likelihood, _ in found):
            raise UserError(
                "the model's output on the items of a task is not finite - try --dtype float32 or another checkpoint"
            )
        return found

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = super()._model_call(inps, attn_mask, labels)
        self._advance(len(inps))
        return logits

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool | None = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids, mask) of prompts that are to be continued."""
        if left_truncate_len is not None:
            self.cut_short += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, bool(truncation))

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **how: Any) -> torch.Tensor:
        written = super()._model_generate(context, max_length, stop, **how)
        self._advance(len(context))
        return written
