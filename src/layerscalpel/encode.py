"""A record becomes token ids and marks: which tokens are targets.

A text is all targets but its first token. Of a conversation the assistant's words are, and what the model's own chat
template puts after them, which is how an answer ends; a tokenizer without a template gets a plain form.

    ids, labelled = encode(tokenizer, {"messages": [{"role": "user", "content": "1 + 1?"}, ...]})
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError

from layerscalpel.errors import UserError, one_line
from layerscalpel.forms import Messages, Record

Render = Callable[[Messages, bool], str]
"""(messages, whether an answer is to follow) -> text."""
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What running a chat template can raise: it is a program, with all that its expressions may do."""


class UnusableError(UserError):
    """A conversation that this model's template cannot be trained on, and the reason that it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def encode(tokenizer: Any, record: Record) -> tuple[list[int], list[bool]]:
    """Return (ids, labelled) of a record.

    Raises:
        UnusableError: the chat template refuses the conversation, or does not let answers be told from prompts.
    """
    if "text" not in record:
        return encode_conversation(tokenizer, record["messages"], cut_off=record.get("cut_off", False))
    ids = list(tokenizer(record["text"], verbose=False).input_ids)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids, [False] + [True] * (len(ids) - 1)


def encode_conversation(tokenizer: Any, messages: Messages, *, cut_off: bool = False) -> tuple[list[int], list[bool]]:
    """Return (ids, labelled) of a conversation in the model's own chat template; the assistant's words are targets.

    Args:
        tokenizer: of the parent.
        messages: turns; a blank answer is none.
        cut_off: whether the last turn is an answer that has no end, so that nothing is put after it.

    Raises:
        UnusableError: as `encode`.
    """
    render = template_of(tokenizer)
    last = len(messages) - 1
    text, spans = render(messages, False), []
    if cut_off:
        text = render(messages[:last], True) + messages[last]["content"]
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0 or not message["content"].strip():
            continue  # what opens a conversation answers nothing
        prompt = render(messages[:i], True)
        upto = text if cut_off and i == last else render(messages[: i + 1], False)
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise UnusableError(
                "rewritten by the chat template",
                "the model's chat template rewrites earlier turns, so answers cannot be told from prompts"
                " - heal on plain text (records with `text`) instead",
            )
        if message["content"].split()[-1] not in upto[len(prompt) :]:  # the end: templates may leave out the thinking
            raise UnusableError(
                "dropped by the chat template",
                "the model's chat template drops the conversation: an answer's last word is not in what it writes"
                " - mend the template or heal on plain text (records with `text`) instead",
            )
        spans.append((len(prompt), len(upto)))
    return _marked(tokenizer, text, spans)


def _marked(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Return (ids, whether a token begins within one of the spans of characters)."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        marks = [any(low <= start < high for low, high in spans) for start, _ in encoded["offset_mapping"]]
        return list(encoded["input_ids"]), marks
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    marks = [False] * len(ids)
    for low, high in spans:
        first, after = (_tokens_before(tokenizer, text[:at], ids) for at in (low, high))
        marks[first:after] = [True] * (after - first)
    return ids, marks


def _tokens_before(tokenizer: Any, begin: str, ids: list[int]) -> int:
    """Return how many of the ids of a text are those of its beginning, for tokenizers that do not tell their places."""
    before = list(tokenizer(begin, add_special_tokens=False, verbose=False).input_ids)
    if ids[: len(before)] != before:
        raise UnusableError(
            "joined by the tokenizer",
            "the tokenizer joins prompts and answers, and does not tell where its tokens begin"
            " - use a fast tokenizer or heal on plain text (records with `text`) instead",
        )
    return len(before)


def template_of(tokenizer: Any) -> Render:
    """Return what writes a conversation as the model reads it; it raises UnusableError where the template refuses."""
    if tokenizer.chat_template:

        def own(messages: Messages, prompt: bool) -> str:
            try:
                return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except TEMPLATE_ERRORS as error:
                said = (
                    one_line(error)
                    if isinstance(error, TemplateError)
                    else f"{type(error).__name__}: {one_line(error)}"
                )
                reason = f"the model's chat template refuses a conversation of the data: {said}"
                raise UnusableError(
                    "refused by the chat template", f"{reason} - leave it out or heal on plain text"
                ) from error

        return own
    end = tokenizer.eos_token or ""

    def plain(messages: Messages, prompt: bool) -> str:
        turns = [f"### {m['role'].capitalize()}:\n{m['content']}{end}\n\n" for m in messages]
        return "".join(turns) + ("### Assistant:\n" if prompt else "")

    return plain
