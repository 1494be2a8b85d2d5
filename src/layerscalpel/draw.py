"""Records are drawn one by one, each document once; several sources at once get their shares of the tokens.

What cannot be used is left out and counted by its reason: a document seen before, a conversation without an answer or
one that the model's chat template refuses.

    drawer = Drawer(seed=0)
    mix = [Stream(drawer, name, tokenizer, weight) for name, weight in sources_in("alpaca=2,c4=1")]
    samples = drawn_from(mix, 512, most=1e6)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from layerscalpel.encode import UnusableError, encode
from layerscalpel.errors import UserError
from layerscalpel.forms import Record, record_text
from layerscalpel.packing import Document, Sample, pieces
from layerscalpel.progress import say
from layerscalpel.records import find_source

Answer = Callable[[list[Record]], list[Record]]
"""Conversations and texts -> the same, in this order, the last answer of each conversation written anew."""
ANSWERED_AT_ONCE = 128
"""Records that are handed to `Answer` together; most of the last ones may turn out not to be needed."""


class Drawer:
    """Hands out each document once, whichever part or source asks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.readers: dict[str, Iterator[Record]] = {}
        self.handed_out: set[bytes] = set()

    def draw(self, name: str, dropped: Counter[str]) -> Iterator[Record]:
        """Yield unseen, non-empty records of a source; count the others."""
        if name not in self.readers:
            self.readers[name] = find_source(name).read(self.seed)
        return (record for record in self.readers[name] if self.is_new(record, dropped))

    def is_new(self, record: Record, dropped: Counter[str]) -> bool:
        """Tell whether a record says something that none before it did, and remember it."""
        text = record_text(record)
        digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
        if not text.strip() or digest in self.handed_out:
            dropped["repeated" if text.strip() else "empty"] += 1
            return False
        self.handed_out.add(digest)
        return True


@dataclass
class Stream:
    """What one part reads of one source, and what it leaves out."""

    drawer: Drawer
    name: str
    tokenizer: Any
    weight: float = 1.0
    answer: Answer | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    """Tokens that were taken for healing so far."""

    def encoded(self) -> Iterator[tuple[Record, list[int], list[bool]]]:
        """Yield (record, ids, labelled).

        Raises:
            UserError: at the end, if the chat template could be used for none of the conversations.
        """
        conversations, unusable = 0, None
        for record in self._answered():
            try:
                ids, labelled = encode(self.tokenizer, record)
            except UnusableError as error:
                self.dropped[error.reason] += 1
                unusable = error
                continue
            conversations += "messages" in record
            yield record, ids, labelled
        if unusable and not conversations:
            raise UserError(str(unusable)) from unusable

    def samples(self, length: int) -> Iterator[list[Sample]]:
        """Yield what healing can use of each record: samples of at most `length` tokens that hold a target.

        Raises:
            UserError: at the end, if there was none.
        """
        for record, ids, labelled in self.encoded():
            whole = "messages" in record
            if whole and not any(labelled):
                self.dropped["no answer"] += 1
                continue
            document = Document(self.name, record.get("by_parent", False), record.get("cut_off", False))
            cut = [Sample(*piece, document) for piece in pieces(ids, labelled, length, whole=whole)]
            usable = [sample for sample in cut if any(sample.labelled)]
            self.dropped["no labelled token within a block"] += len(cut) - len(usable)
            if usable:
                yield usable
        if not self.tokens:
            raise UserError(
                f"healing source {self.name} has no labelled token: {spoken(self.dropped) or 'nothing is left to read'}"
                " - give text, or conversations with answers"
            )

    def _answered(self) -> Iterator[Record]:
        records = self.drawer.draw(self.name, self.dropped)
        if self.answer is None:
            yield from records
            return
        while given := list(islice(records, ANSWERED_AT_ONCE)):
            for before, record in zip(given, self.answer(given), strict=True):
                if record_text(record) == record_text(before) or self.drawer.is_new(record, self.dropped):
                    yield record


def spoken(dropped: Counter[str] | dict[str, int]) -> str:
    """Return counts by reason as words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)


def drawn_from(mix: Sequence[Stream], length: int, most: float | None) -> list[Sample]:
    """Return samples, drawn record by record of the source furthest behind its share.

    Args:
        mix: sources with their weights.
        length: most tokens of a sample.
        most: tokens after which there are enough; None goes on until a source ends.

    Raises:
        UserError: a source has no labelled token.
    """
    readers = {stream.name: stream.samples(length) for stream in mix}
    drawn: list[Sample] = []
    while most is None or sum(stream.tokens for stream in mix) < most:
        stream = min(mix, key=lambda stream: stream.tokens / stream.weight)
        found = next(readers[stream.name], None)
        if found is None:
            if len(mix) > 1:
                given = ", ".join(f"{stream.name} {stream.tokens:,}" for stream in mix)
                say(f"healing mix: {stream.name} ends first; tokens taken: {given}")
            break
        drawn += found
        stream.tokens += sum(len(sample.ids) for sample in found)
    return drawn
