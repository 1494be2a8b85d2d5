"""The forms that a record may have in a file, and the two that the rest of the package knows.

A record is `{"text": ...}` or `{"messages": [{"role", "content"}, ...]}`; every other form becomes the second.

    checked_record({"question": "1 + 1?", "answer": "2"}, "sums.jsonl:1")["messages"][0]["role"]  # "user"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from layerscalpel.errors import UserError

Record = dict[str, Any]
Messages = list[dict[str, Any]]
Found = Record | str | None
"""A record, or what is wrong with a value, or None where the fields are of another form."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Who may speak in `messages`."""
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
"""{who speaks in a ShareGPT record: their role}."""
COMPLETIONS = ("completion", "response", "answer", "output")
"""What the answer to a `prompt` may be called."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""One half of a pair that only together is a character; JSON can write it, UTF-8 and tokenizers cannot."""


def _wrong(name: str, value: Any, allowed: str) -> str:
    names: dict[type, str] = {type(None): "null or missing", list: "a list", dict: "an object"}
    return f"`{name}` is {names.get(type(value)) or repr(value)[:40]} - allowed: {allowed}"


def _asked(fields: Record, questions: tuple[str, ...], answer: str) -> Found:
    """Return question and answer; null is an empty text, so that a missing answer is counted and not refused."""
    for name in (*questions, answer):
        if not isinstance(fields.get(name), str | None):
            return _wrong(name, fields[name], "a string")
    question = "\n\n".join(part for name in questions if (part := fields.get(name)))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": fields[answer] or ""}]}


def _instruction(fields: Record) -> Found:
    is_one = fields.get("instruction") is not None and "output" in fields
    return _asked(fields, ("instruction", "input"), "output") if is_one else None


def _wrong_turns(name: str, turns: Any, keys: tuple[str, str], speakers: Iterable[str]) -> str | None:
    """Return what is wrong with the turns of a conversation, each of them who speaks and the words."""
    who, words = keys
    if not isinstance(turns, list):
        return _wrong(name, turns, f"a list of `{who}` and `{words}`")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return _wrong(f"{name}[{i}]", turn, f"an object with `{who}` and `{words}`")
        if turn.get(who) not in tuple(speakers):
            return _wrong(f"{name}[{i}].{who}", turn.get(who), ", ".join(speakers))
        is_silent = turn.get(words) is None and turn[who] in ("assistant", "gpt")  # as where it calls a tool
        if not is_silent and not isinstance(turn.get(words), str):
            return _wrong(f"{name}[{i}].{words}", turn.get(words), "a string")
    return None


def _spoken(fields: Record, *names: str) -> Found:
    """Return the conversation of one field or of several, one after the other."""
    turns: Messages = []
    for name in names:
        if wrong := _wrong_turns(name, fields[name], ("role", "content"), ROLES):
            return wrong
        turns += fields[name]
    return {"messages": [turn if turn.get("content") is not None else turn | {"content": ""} for turn in turns]}


def _messages(fields: Record) -> Found:
    return _spoken(fields, "messages") if fields.get("messages") is not None else None


def _conversations(fields: Record) -> Found:
    if (turns := fields.get("conversations")) is None:
        return None
    if wrong := _wrong_turns("conversations", turns, ("from", "value"), SPEAKERS):
        return wrong
    return {"messages": [{"role": SPEAKERS[turn["from"]], "content": turn.get("value") or ""} for turn in turns]}


def _prompt(fields: Record) -> Found:
    there = [name for name in COMPLETIONS if name in fields]
    if fields.get("prompt") is None or not there:
        return None
    answer = next((name for name in there if fields[name] is not None), there[0])
    if not isinstance(fields["prompt"], list):
        return _asked(fields, ("prompt",), answer)
    return _spoken(fields, "prompt", *([answer] if fields[answer] is not None else []))


def _question(fields: Record) -> Found:
    is_one = fields.get("question") is not None and "answer" in fields
    return _asked(fields, ("question",), "answer") if is_one else None


def _text(fields: Record) -> Found:
    if "text" not in fields:
        return None
    text = fields["text"] if fields["text"] is not None else ""
    return {"text": text} if isinstance(text, str) else _wrong("text", text, "a string")


FORMS: dict[str, Callable[[Record], Found]] = {
    "instruction/input/output": _instruction,
    "messages of role and content": _messages,
    "conversations of from (human, gpt, system) and value": _conversations,
    f"prompt and one of {'/'.join(COMPLETIONS)}, both text or both messages": _prompt,
    "question/answer": _question,
    "text": _text,
}
"""{form of a record: fields -> the record}; the first whose fields are there is taken. `text` is last: beside another
form it holds the same words once more, in a template of another model."""


def checked_record(record: Any, where: str) -> Record:
    """Return a record of any known form as `{"text"}` or `{"messages"}`.

    Args:
        record: fields as they were read.
        where: file and line, for the complaint.

    Raises:
        UserError: it has none of them, and the line names the keys it has; or a value is wrong, and the line names it.
    """
    fields = record if isinstance(record, dict) else {}
    found = next((made for read in FORMS.values() if (made := read(fields)) is not None), None)
    if found is None:
        has = sorted(map(str, fields)) or type(record).__name__
        raise UserError(f"{where} has the fields {has} - allowed: {', or '.join(FORMS)}")
    if isinstance(found, str):
        raise UserError(f"{where}: {found} - mend the record or leave it out")
    if half := HALF_CHARACTER.search(record_text(found)):
        raise UserError(
            f"{where} holds half a character (U+{ord(half[0]):04X} alone) - allowed: whole ones"
            " - mend the record or leave it out"
        )
    return found


def record_text(record: Record) -> str:
    """Return all words of a record, for comparing and counting."""
    if "text" in record:
        return record["text"]
    return "\n".join(message["content"] for message in record["messages"])
