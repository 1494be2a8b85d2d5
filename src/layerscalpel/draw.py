"""Records are drawn one by one, each document once; several sources at once get their shares of the tokens.

What cannot be used is left out and counted by its reason: a document seen before, one that shares 13 words in a row
with text of another kind (overlap.py), a conversation without an answer or one that the model's chat template refuses.

    drawer = Drawer(seed=0)
    mix = [Stream(drawer, name, tokenizer, weight) for name, weight in sources_in("alpaca=2,c4=1")]
    samples = Drawing(mix, 512).until(1e6)
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from layerscalpel.encode import UnusableError, encode
from layerscalpel.errors import UserError
from layerscalpel.forms import Record, record_text
from layerscalpel.overlap import Grams
from layerscalpel.packing import Document, Sample, num_tokens, pieces, set_aside
from layerscalpel.progress import say
from layerscalpel.records import find_source

Answer = Callable[[list[Record]], list[Record]]
"""Conversations and texts -> the same, in this order, the last answer of each conversation written anew."""
TOO_LONG = "no labelled token within a block"
"""Why a conversation is left out whose prompt fills a block."""
ANSWERED_AT_ONCE = 128
"""Records that are handed to `Answer` together; most of the last ones may turn out not to be needed."""


class Drawer:
    """Hands out each document once, whichever part or source asks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.readers: dict[str, Iterator[Record]] = {}
        self.handed_out: set[bytes] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what reads: another process is told what was drawn, and draws nothing."""
        return vars(self) | {"readers": {}}

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
    avoids: Grams | None = None
    """Texts that no document may overlap with."""
    fills: Grams | None = None
    """Where the texts of the documents are remembered."""
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    """Tokens that were taken for healing so far."""

    def encoded(self) -> Iterator[tuple[Record, list[int], list[bool]]]:
        """Yield (record, ids, labelled).

        Raises:
            UserError: at the end, if the chat template could be used for none of the conversations.
        """
        conversations, unusable = 0, None
        for record in self._apart():
            try:
                ids, labelled = encode(self.tokenizer, record)
            except UnusableError as error:
                self.dropped[error.reason] += 1
                unusable = error
                continue
            conversations += "messages" in record
            if self.fills is not None:
                self.fills.add(record_text(record))
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
            self.dropped[TOO_LONG] += len(cut) - len(usable)
            if usable:
                yield usable
        if not self.tokens:
            longer = f"raise data.healing_block_tokens ({length}), or " if self.dropped[TOO_LONG] else ""
            raise UserError(
                f"healing source {self.name} has no labelled token: {spoken(self.dropped) or 'nothing is left to read'}"
                f" - {longer}give text, or conversations with answers"
            )

    def _apart(self) -> Iterator[Record]:
        for record in self._answered():
            if self.avoids is not None and self.avoids.meet(record_text(record)):
                self.dropped[f"overlapping {self.avoids.of}"] += 1
            else:
                yield record

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


class Drawing:
    """Samples of a mix, one by one of the source furthest behind its share; it goes on where it stopped."""

    def __init__(self, mix: Sequence[Stream], length: int) -> None:
        """Take sources with their weights, and the most tokens of a sample."""
        self.mix = mix
        self.length = length
        self.samples: list[Sample] = []
        self.ended = False
        """Whether a source has no more."""
        self.readers = {stream.name: stream.samples(length) for stream in mix}
        self.rest: dict[str, deque[Sample]] = {stream.name: deque() for stream in mix}

    @property
    def tokens(self) -> int:
        """Tokens that were drawn so far."""
        return sum(stream.tokens for stream in self.mix)

    def until(self, most: float | None) -> list[Sample]:
        """Return all samples drawn so far, with new ones until there are enough or a source ends.

        Args:
            most: tokens after which there are enough; None goes on until a source ends.

        Raises:
            UserError: a source has no labelled token.
        """
        while not self.ended and (most is None or self.tokens < most):
            stream = min(self.mix, key=lambda stream: stream.tokens / stream.weight)
            if not self.rest[stream.name]:
                self.rest[stream.name].extend(next(self.readers[stream.name], []))
            self.ended = not self.rest[stream.name]
            if not self.ended:
                self._take(stream, self.rest[stream.name].popleft())
            elif len(self.mix) > 1:
                given = ", ".join(f"{stream.name} {stream.tokens:,}" for stream in self.mix)
                say(f"healing mix: {stream.name} ends first; tokens taken: {given}")
        return self.samples

    def begin(self, source: str, tokens: float) -> bool:
        """Add so many tokens of new documents of a source, the rest of the last one passed over; tell if there are any.

        What is left of a document that is being drawn waits.
        """
        stream = next(stream for stream in self.mix if stream.name == source)
        before = stream.tokens
        while stream.tokens - before < tokens and (found := next(self.readers[source], None)):
            for sample in found:
                if stream.tokens - before < tokens:
                    self._take(stream, sample)
        return stream.tokens > before

    def _take(self, stream: Stream, sample: Sample) -> None:
        self.samples.append(sample)
        stream.tokens += len(sample.ids)


def shared_out(
    drawing: Drawing, num_blocks: int | None, fraction: float
) -> tuple[list[Sample], list[Sample], Counter[str]]:
    """Return (training, validation, pieces of documents that neither has); no document is in both.

    Where the documents of a source are too few or too long to share out, it begins another one for validation.

    Args:
        drawing: what has drawn nothing so far.
        num_blocks: blocks that training is to fill if there is text for them; None takes all.
        fraction: of the tokens, for validation.

    Raises:
        UserError: no source has a second document, or a source has no labelled token.
    """
    wanted = (num_blocks or 0) * drawing.length
    most = wanted / (1 - fraction) or None
    begun: set[str] = set()
    while True:
        training, validation, shares = set_aside(drawing.until(most), drawing.length, fraction)
        missing = wanted - num_tokens(training)
        short = [share for share in shares if share.is_short and share.source not in begun]
        added = [drawing.begin(share.source, share.wanted - share.whole) for share in short]
        if not any(added) and (drawing.ended or missing <= 0):
            break
        begun |= {share.source for share in short}
        most = drawing.tokens + max(0, missing) if wanted else None
    if not validation:
        others = spoken(sum((stream.dropped for stream in drawing.mix), Counter()))
        raise UserError(
            f"healing source {', '.join(share.source for share in shares)} gives 1 document"
            f"{f' (left out: {others})' if others else ''}, and none may be in both training and validation"
            " - give more documents: records, or paragraphs with blank lines between them"
        )
    for share in shares:
        if share.is_short:
            say(f"{share.sentence} - {'give more documents' if drawing.ended else 'raise data.healing_blocks'}")
    left_out = sum(share.left_out for share in shares)
    return training, validation, Counter({"pieces of a document that validation begins": left_out})
