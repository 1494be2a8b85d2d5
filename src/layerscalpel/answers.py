"""The parent answers the prompts of healing conversations itself: `data.answers=greedy` or `sampled`.

Each conversation keeps its turns up to the last answer of the assistant; that answer the parent writes anew, in its own
chat template, and what came after is left out. Earlier answers stay as they are. So the cut model learns to say what
its parent would have said, in the parent's own words (sequence-level distillation, arXiv:1606.07947).

`greedy` takes the likeliest token each time. `sampled` draws from the parent's own distribution, temperature 1, nothing
cut off, for the reason that selftext.py has: then cross-entropy on the answers is, in expectation and up to a constant,
the KL from parent to cut model over whole answers. The checkpoint's own generation settings are off for both.

Prompts of a batch need not be equally long, and nothing is padded: all go in up to the length of the shortest, and what
the longer ones have left is put in step by step while the shorter ones are answered already. So every row is computed
as if it were alone, whatever the family does with positions, masks and recurrent states. Batches hold neighbours in
length, so few steps are spent that way.

Dimensions: B prompts at once, T tokens, V vocabulary.

    kept = AnswerFile(Path("answers.jsonl"))
    records = write_answers(model, tokenizer, records, Answering("greedy", 256, 512, seed=0), kept)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from layerscalpel.answerfile import AnswerFile
from layerscalpel.encode import Render, UnusableError, template_of
from layerscalpel.errors import UserError
from layerscalpel.forms import Messages, Record
from layerscalpel.layers import device_of
from layerscalpel.selftext import RequireFinite, seeded, without_own_settings
from layerscalpel.settings import AnswersName

MOST_SPREAD = 32
"""Tokens by which the prompts of a batch differ in length, at most; each costs a step that some rows do not need."""


@dataclass(frozen=True)
class Answering:
    """How answers are written."""

    how: AnswersName
    """greedy or sampled."""
    max_tokens: int
    """Most tokens of an answer."""
    block_tokens: int
    """Length of a healing block; what stands past it would not be seen, so it is not written."""
    seed: int
    batch_size: int = 16


@dataclass(frozen=True)
class _Prompt:
    key: str
    ids: list[int]
    most: int
    """Tokens that an answer may have."""


def write_answers(
    model: Any, tokenizer: Any, records: list[Record], answering: Answering, kept: AnswerFile
) -> list[Record]:
    """Return the records, the last answer of each conversation as the model writes it.

    Source: this project, docs/methods.md#healing-data.

    Args:
        model: a causal language model with all its weights in memory, in evaluation mode.
        tokenizer: its tokenizer.
        records: conversations and texts. Texts, and conversations whose prompt the chat template refuses or that leaves
            no room in a block, come back as they are.
        answering: how to write.
        kept: where answers wait; those that it has are not written again.

    Returns:
        For each record a record. An answered one has `by_parent`, and `cut_off` where its answer has no end.

    Raises:
        UserError: the model's logits are not finite.
    """
    render = template_of(tokenizer)
    asked = [_asked(tokenizer, render, record, answering) for record in records]
    prompts = {prompt.key: prompt for prompt in asked if prompt}
    ends = end_tokens(model, tokenizer, render)
    for batch in _batches(list(prompts.values()), answering.batch_size):
        new = {prompt.key for prompt in batch if prompt.key not in kept.answers}
        if not new:
            continue
        written = _generate(
            model, batch, ends, answering
        )  # all of them, so that what is drawn does not depend on `new`
        rows = [
            {"key": prompt.key, "answer": _words(tokenizer, ids, cut_off), "cut_off": cut_off}
            for prompt, (ids, cut_off) in zip(batch, written, strict=True)
        ]
        kept.add([row for row in rows if row["key"] in new])
    return [
        _answered(record, kept.answers[prompt.key]) if prompt else record
        for record, prompt in zip(records, asked, strict=True)
    ]


def require_memory_for_answers(how: AnswersName, offload: str) -> None:
    """Refuse to let a model answer whose layers come in one by one.

    Raises:
        UserError: answers are to be written, and the layers are elsewhere while they are not in use.
    """
    if how != "given" and offload != "none":
        raise UserError(
            f"data.answers={how} writes token by token, which takes days with model.offload={offload}"
            " - allowed: a model in memory, or data.answers=given"
        )


def prompt_of(messages: Messages) -> Messages:
    """Return the turns before the last answer; all of them where nothing has been answered yet."""
    answers = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages


def end_tokens(model: Any, tokenizer: Any, render: Render) -> list[int]:
    """Return the tokens that end an answer: those that tokenizer and checkpoint name, and the template's own."""
    own = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    question, word = [{"role": "user", "content": "Yes?"}], "Indeed."
    try:
        whole = render([*question, {"role": "assistant", "content": word}], False)
    except UnusableError:
        whole = ""
    closing = tokenizer(whole.rpartition(word)[2], add_special_tokens=False).input_ids[:1]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return sorted((found | (set(closing) & special)) - {None})


def _asked(tokenizer: Any, render: Render, record: Record, answering: Answering) -> _Prompt | None:
    if "text" in record:
        return None
    try:
        text = render(prompt_of(record["messages"]), True)
    except UnusableError:  # is counted where the record is encoded
        return None
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    most = min(answering.max_tokens, answering.block_tokens - len(ids))
    if not ids or most < 1:
        return None
    said = json.dumps([text, answering.how == "sampled", most, answering.seed])
    return _Prompt(hashlib.sha256(said.encode()).hexdigest()[:32], ids, most)


def _answered(record: Record, found: dict[str, Any]) -> Record:
    messages = [*prompt_of(record["messages"]), {"role": "assistant", "content": found["answer"]}]
    return {"messages": messages, "by_parent": True, "cut_off": found["cut_off"]}


def _words(tokenizer: Any, ids: Sequence[int], cut_off: bool) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if cut_off else text  # half a character is none


def _batches(prompts: list[_Prompt], size: int) -> Iterator[list[_Prompt]]:
    batch: list[_Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids)):
        if batch and (len(batch) == size or len(prompt.ids) - len(batch[0].ids) > MOST_SPREAD):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _generate(model: Any, batch: list[_Prompt], ends: list[int], answering: Answering) -> list[tuple[list[int], bool]]:
    """Return (ids without the end, whether there is no end) of the answer to each prompt."""
    shortest = len(batch[0].ids)
    device = device_of(model)
    first_BT = torch.tensor([prompt.ids[:shortest] for prompt in batch], device=device)
    steps = max(len(prompt.ids) + prompt.most for prompt in batch) - shortest
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if answering.how == "sampled" else {}
    with seeded(_seed_of(answering.seed, batch)), without_own_settings(model):
        rows = model.generate(
            first_BT,
            attention_mask=torch.ones_like(first_BT),
            generation_config=GenerationConfig(max_new_tokens=steps, eos_token_id=None, **plain),
            logits_processor=LogitsProcessorList([RequireFinite(), _RestOfPrompts(batch, device)]),
            stopping_criteria=StoppingCriteriaList([_AllAnswered(batch, ends, device)]),
        ).tolist()
    answers = []
    for prompt, row in zip(batch, rows, strict=True):
        ids = row[len(prompt.ids) : len(prompt.ids) + prompt.most]
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        answers.append((ids[:end], end is None))
    return answers


def _seed_of(seed: int, batch: list[_Prompt]) -> int:
    """Return a seed of the batch's own, so that what is drawn does not depend on the batches before it."""
    said = "|".join([str(seed), *(prompt.key for prompt in batch)])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:7])


class _RestOfPrompts(LogitsProcessor):
    """Lets a row go on with its own prompt as long as there is some left."""

    def __init__(self, batch: list[_Prompt], device: torch.device) -> None:
        self.length_B = torch.tensor([len(prompt.ids) for prompt in batch], device=device)
        longest = max(len(prompt.ids) for prompt in batch)
        rows = [prompt.ids + [0] * (longest - len(prompt.ids)) for prompt in batch]
        self.prompt_BT = torch.tensor(rows, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # the names are those of the base class
        at = input_ids.shape[1]
        if at >= self.prompt_BT.shape[1]:
            return scores
        wanted_BV = torch.full_like(scores, -torch.inf).scatter(1, self.prompt_BT[:, at, None], 0.0)
        return torch.where((self.length_B > at)[:, None], wanted_BV, scores)


class _AllAnswered(StoppingCriteria):
    """Tells which rows have come to their end; the tokens of a prompt are none."""

    def __init__(self, batch: list[_Prompt], ends: list[int], device: torch.device) -> None:
        self.length_B = torch.tensor([len(prompt.ids) for prompt in batch], device=device)
        self.most_B = torch.tensor([prompt.most for prompt in batch], device=device)
        self.ends = torch.tensor(ends, device=device, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:  # as above
        answered_B = input_ids.shape[1] - self.length_B
        return (answered_B >= self.most_B) | ((answered_B > 0) & torch.isin(input_ids[:, -1], self.ends))
