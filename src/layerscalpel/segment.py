"""The run of layers that is removed, and how it is spoken of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerscalpel.errors import UserError


@dataclass(frozen=True)
class Segment:
    """The layers [start, stop) of a decoder with num_layers layers; 0-based, stop excluded."""

    start: int
    stop: int
    num_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= self.num_layers:
            raise UserError(
                f"segment {self.start}:{self.stop} does not lie in this model's layers"
                f" - allowed: START:STOP with 0 <= START < STOP <= {self.num_layers}"
            )
        if self.num_layers - len(self) < 2:
            raise UserError(
                f"segment {self.start}:{self.stop} leaves {self.num_layers - len(self)} of {self.num_layers} layers"
                f" - at least 2 must stay, so remove at most {self.num_layers - 2}"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        first, last = self.start, self.stop - 1
        spoken = f"layer {first}" if len(self) == 1 else f"layers {first}..{last}"
        return f"{spoken} (segment [{self.start}, {self.stop}), {len(self)} of {self.num_layers})"

    def kept(self) -> list[int]:
        """Return the old indices of the layers that stay, in order."""
        return [i for i in range(self.num_layers) if not self.start <= i < self.stop]


def segments_of(removal: Iterable[int], num_layers: int) -> list[Segment]:
    """Return the runs of layers that a removal, the indices of the removed layers, is made of, in order."""
    removed = set(removal)
    starts = [i for i in sorted(removed) if i - 1 not in removed]
    stops = [i + 1 for i in sorted(removed) if i + 1 not in removed]
    return [Segment(start, stop, num_layers) for start, stop in zip(starts, stops, strict=True)]


def seams_of(segments: Sequence[Segment]) -> list[int]:
    """Return for each segment, in order, the cut model's first layer after its seam."""
    return [run.start - sum(map(len, segments[:i])) for i, run in enumerate(segments)]


def spoken(segments: Sequence[Segment]) -> str:
    """Return how removed segments are spoken of, whether one or several."""
    if len(segments) == 1:
        return str(segments[0])
    runs = " and ".join(str(segment).rpartition(", ")[0] + ")" for segment in segments)
    return f"{runs}, {sum(map(len, segments))} of {segments[0].num_layers}"


def parse_segment(text: str, num_layers: int) -> Segment:
    """Read START:STOP."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", text, re.ASCII)
    if not found:
        raise UserError(f"segment '{text[:40]}' is no START:STOP - write 13:19 for layers 13..18")
    return Segment(int(found[1]), int(found[2]), num_layers)
