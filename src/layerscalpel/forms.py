"""The forms that a record may have in a file, and the two that the rest of the package knows.

A record is `{"text": ...}` or `{"messages": [{"role", "content"}, ...]}`; every other form becomes the second.

    checked_record({"question": "1 + 1?", "answer": "2"}, "sums.jsonl:1")["messages"][0]["role"]  # "user"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

from layerscalpel.errors import UserError

Record = dict[str, Any]
Messages = list[dict[str, Any]]
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
"""{who speaks in a ShareGPT record: their role}."""
COMPLETIONS = ("completion", "response", "answer", "output")
"""What the answer to a `prompt` may be called."""


def _asked(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _text(fields: Record) -> Record | None:
    return {"text": fields["text"]} if isinstance(fields.get("text"), str) else None


def _instruction(fields: Record) -> Record | None:
    task, given, answer = fields.get("instruction"), fields.get("input") or "", fields.get("output")
    if not (isinstance(task, str) and isinstance(given, str) and isinstance(answer, str)):
        return None
    return _asked("\n\n".join(part for part in (task, given) if part), answer)


def _is_conversation(value: Any) -> TypeGuard[Messages]:
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def _messages(fields: Record) -> Record | None:
    return {"messages": fields["messages"]} if _is_conversation(fields.get("messages")) else None


def _prompt(fields: Record) -> Record | None:
    prompt = fields.get("prompt")
    for answer in (fields.get(name) for name in COMPLETIONS):
        if isinstance(prompt, str) and isinstance(answer, str):
            return _asked(prompt, answer)
        if _is_conversation(prompt) and _is_conversation(answer):
            return {"messages": [*prompt, *answer]}
    return None


def _question(fields: Record) -> Record | None:
    question, answer = fields.get("question"), fields.get("answer")
    return _asked(question, answer) if isinstance(question, str) and isinstance(answer, str) else None


def _conversations(fields: Record) -> Record | None:
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and turn.get("from") in SPEAKERS and isinstance(turn.get("value"), str) for turn in turns
    ):
        return None
    return {"messages": [{"role": SPEAKERS[turn["from"]], "content": turn["value"]} for turn in turns]}


FORMS: dict[str, Callable[[Record], Record | None]] = {
    "text": _text,
    "instruction/input/output": _instruction,
    "messages of role and content": _messages,
    "conversations of from (human, gpt, system) and value": _conversations,
    f"prompt and one of {'/'.join(COMPLETIONS)}, both text or both messages": _prompt,
    "question/answer": _question,
}
"""{form of a record: fields -> the record, or None where they are of another form}; the first that fits is taken."""


def checked_record(record: Any, where: str, forms: tuple[str, ...] = tuple(FORMS)) -> Record:
    """Return a record of any known form as `{"text"}` or `{"messages"}`.

    Args:
        record: fields as they were read.
        where: file and line, for the complaint.
        forms: the forms to look for, names of FORMS.

    Raises:
        UserError: it has none of them; the line names the keys it has.
    """
    fields = record if isinstance(record, dict) else {}
    for form in forms:
        if (found := FORMS[form](fields)) is not None:
            return found
    raise UserError(
        f"{where} has the fields {sorted(fields) or type(record).__name__} - allowed: {', or '.join(forms)}"
    )


def record_text(record: Record) -> str:
    """Return all words of a record, for comparing and counting."""
    if "text" in record:
        return record["text"]
    return "\n".join(message["content"] for message in record["messages"])
