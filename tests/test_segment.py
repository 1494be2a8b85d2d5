"""A segment lies in the layers, leaves two of them, and is spoken of in both ways."""

from __future__ import annotations

import pytest

from layerscalpel.errors import UserError
from layerscalpel.segment import Segment, parse_segment


@pytest.mark.parametrize(
    ("bounds", "spoken"),
    [
        ((13, 19, 30), "layers 13..18 (segment [13, 19), 6 of 30)"),
        ((0, 1, 8), "layer 0 (segment [0, 1), 1 of 8)"),
        ((6, 8, 8), "layers 6..7 (segment [6, 8), 2 of 8)"),
    ],
)
def test_a_segment_is_spoken_both_ways(bounds, spoken):
    assert str(Segment(*bounds)) == spoken


def test_kept_are_all_but_the_removed():
    segment = Segment(2, 5, 8)
    assert segment.kept() == [0, 1, 5, 6, 7]
    assert len(segment) == 3


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (5, 3), (6, 9), (8, 9)])
def test_a_segment_outside_the_layers_is_refused(start, stop):
    with pytest.raises(UserError, match=rf"segment {start}:{stop} does not lie .* 0 <= START < STOP <= 8"):
        Segment(start, stop, 8)


@pytest.mark.parametrize(("start", "stop", "left"), [(0, 7, 1), (1, 8, 1), (0, 8, 0)])
def test_two_layers_must_stay(start, stop, left):
    with pytest.raises(UserError, match=f"leaves {left} of 8 layers - at least 2 must stay, so remove at most 6"):
        Segment(start, stop, 8)


def test_a_segment_is_parsed():
    assert parse_segment("3:5", 8) == Segment(3, 5, 8)
    assert parse_segment(" 3 : 5 ", 8) == Segment(3, 5, 8)


@pytest.mark.parametrize("text", ["3", "3-5", "", ":", "3:", ":5", "a:b", "3:5:7", "-1:3", "1.5:3", "²:3"])
def test_other_forms_of_a_segment_are_refused(text):
    with pytest.raises(UserError, match=r"is no START:STOP - write 13:19 for layers 13\.\.18"):
        parse_segment(text, 8)
