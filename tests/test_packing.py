"""Samples are packed whole and once, every token knows its place, and nothing is labelled that nobody said."""

from __future__ import annotations

import random

import pytest
import torch
from families import tiny, tokens

from layerscalpel.packing import Document, Sample, lay_out, pack_whole, pieces

END = 0


def sample(ids: list[int], labelled: list[bool] | None = None) -> Sample:
    return Sample(ids, labelled or [False] + [True] * (len(ids) - 1), Document("text"))


def random_samples(seed: int, count: int = 300) -> list[Sample]:
    """Return samples of 1 to 20 tokens; the i-th consists of the token i + 1."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 20) for _ in range(count)]
    marks = [[False] + [draw.random() < 0.5 for _ in range(size - 1)] for size in sizes]
    return [sample([i + 1] * size, mark) for i, (size, mark) in enumerate(zip(sizes, marks, strict=True))]


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_samples_whole_and_once(seed):
    samples = random_samples(seed)
    blocks, labelled, positions = lay_out(pack_whole(samples, 20), 20, filler=END)
    packed = {}
    for ids, marks, places in zip(blocks.tolist(), labelled.tolist(), positions.tolist(), strict=True):
        assert len(ids) == len(marks) == 20
        assert not any(mark for token, mark in zip(ids, marks, strict=True) if token == END)
        for number in set(ids):
            assert number not in packed or number == END, "split over two blocks"
            at = [j for j, token in enumerate(ids) if token == number]
            assert at == list(range(at[0], at[0] + len(at))), "split within a block"
            assert [places[j] for j in at] == list(range(len(at))), "places that do not count from its beginning"
            packed[number] = ([number] * len(at), [marks[j] for j in at])
    assert [packed[i + 1] for i in range(300)] == [(given.ids, given.labelled) for given in samples]


def test_packing_wastes_little():
    samples = [sample([1] * size) for size in [5, 10, 5, 15, 10, 5, 10] * 20]
    assert len(pack_whole(samples, 20)) <= 65  # 60 when perfect


@pytest.mark.parametrize(("filler", "token"), [(7, 7), (None, 0)])
def test_what_fills_a_block_up_counts_for_itself(filler, token):
    blocks, labelled, positions = lay_out([[sample([5, 6]), sample([8])]], 6, filler)
    assert blocks.tolist() == [[5, 6, 8, token, token, token]]
    assert labelled.tolist() == [[False, True, False, False, False, False]]
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert (blocks.dtype, labelled.dtype, positions.dtype) == (torch.int64, torch.bool, torch.int64)


def test_nothing_predicts_the_first_token_of_a_block():
    _, labelled, _ = lay_out([[sample([5, 6], [True, True])]], 2, None)
    assert labelled.tolist() == [[False, True]]


def test_a_text_is_cut_and_a_conversation_is_shortened():
    ids, labelled = list(range(1, 11)), [True] * 10
    assert list(pieces(ids, labelled, 4, whole=False)) == [
        ([1, 2, 3, 4], [False, True, True, True]),
        ([5, 6, 7, 8], [False, True, True, True]),
        ([9, 10], [False, True]),
    ]
    assert list(pieces(ids, labelled, 4, whole=True)) == [([1, 2, 3, 4], [False, True, True, True])]
    assert list(pieces(ids[:4], labelled[:4], 4, whole=False)) == [([1, 2, 3, 4], [False, True, True, True])]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@torch.no_grad()
def test_a_model_keeps_packed_samples_apart_by_their_places(family):
    """What the places are for: each sample's logits are those that it has alone."""
    model = tiny(family)
    samples = [sample(tokens(1, length, seed=length)[0].tolist()) for length in (9, 5, 7)]
    packed = pack_whole(samples, 24)
    block, _, positions = lay_out(packed, 24, filler=END)
    assert block.shape == (1, 24)
    together = model(input_ids=block, position_ids=positions, use_cache=False).logits[0]
    joined = model(input_ids=block, use_cache=False).logits[0]
    begin = 0
    for one in samples:
        alone = model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0]
        here = slice(begin, begin + len(one.ids))
        assert torch.allclose(together[here], alone, atol=1e-5)  # another mask's kernel may round differently
        assert begin == 0 or not torch.allclose(joined[here], alone, atol=1e-2)
        begin += len(one.ids)
