"""The parent answers the prompts of healing conversations itself: `data.answers=greedy` or `sampled`.

Each conversation keeps its turns up to the last answer of the assistant; that answer the parent writes anew, in its own
chat template, and what came after is left out. Earlier answers stay as they are. So the cut model learns to say what
its parent would have said, in the parent's own words (sequence-level distillation, arXiv:1606.07947).

`greedy` takes the likeliest token each time. `sampled` draws from the parent's own distribution, temperature 1, nothing
cut off, for the reason that selftext.py has: then cross-entropy on the answers is, in expectation and up to a constant,
the KL from parent to cut model over whole answers. The checkpoint's own generation settings are off for both.

Prompts of a batch need not be equally long: continuations.py computes every row as if it were alone.

    kept = AnswerFile(Path("answers.jsonl"))
    records = write_answers(model, tokenizer, records, Answering("greedy", 256, 512, seed=0), kept)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layerscalpel.answerfile import AnswerFile
from layerscalpel.continuations import Drawing, Prompt, batches_of, continued
from layerscalpel.encode import Render, UnusableError, template_of
from layerscalpel.errors import UserError
from layerscalpel.forms import Messages, Record
from layerscalpel.settings import AnswersName

AS_IT_IS = Drawing(temperature=1.0, top_p=1.0)
"""Draws from the model's own distribution."""


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
    for batch in batches_of(list(prompts.values()), answering.batch_size):
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


def _asked(tokenizer: Any, render: Render, record: Record, answering: Answering) -> Prompt | None:
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
    return Prompt(hashlib.sha256(said.encode()).hexdigest()[:32], ids, most)


def _answered(record: Record, found: dict[str, Any]) -> Record:
    messages = [*prompt_of(record["messages"]), {"role": "assistant", "content": found["answer"]}]
    return {"messages": messages, "by_parent": True, "cut_off": found["cut_off"]}


def _words(tokenizer: Any, ids: Sequence[int], cut_off: bool) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if cut_off else text  # half a character is none


def _generate(model: Any, batch: list[Prompt], ends: list[int], answering: Answering) -> list[tuple[list[int], bool]]:
    drawing = AS_IT_IS if answering.how == "sampled" else None
    return continued(model, batch, ends=ends, drawing=drawing, seed=answering.seed)
