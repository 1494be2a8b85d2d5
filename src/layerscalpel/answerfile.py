"""Answers that the parent wrote, kept line by line: a call that was interrupted, or another one, goes on with them.

Each line is `{"key", "answer", "cut_off"}`; the key tells the prompt and how it was answered. A line that cannot be
read, as the last one of a process that was killed, counts as not written.

    kept = AnswerFile(Path("answers.jsonl"))
    kept.add([{"key": "5f3a", "answer": "2", "cut_off": False}])
    kept.answers["5f3a"]
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from layerscalpel.progress import PLAIN_LINE_S, say


class AnswerFile:
    """A JSONL file of answers, read once and then appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        self.said = time.monotonic()
        text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
        self.torn = bool(text) and not text.endswith("\n")
        for line in text.split("\n"):
            try:
                self._remember(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue

    def _remember(self, row: dict[str, Any]) -> None:
        self.answers[str(row["key"])] = {"answer": str(row["answer"]), "cut_off": bool(row["cut_off"])}

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append answers, and tell a person from time to time how many there are."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("\n" if self.torn else "")
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
        self.torn = False
        for row in rows:
            self._remember(row)
        if time.monotonic() - self.said >= PLAIN_LINE_S:
            self.said = time.monotonic()
            say(f"the parent has answered {len(self.answers):,} prompts")
