"""Samples are packed whole and once, every token knows its place, and nothing is labelled that nobody said."""

from __future__ import annotations

import random

import pytest
import torch
from families import tiny, tokens

from layerscalpel.packing import Document, Sample, lay_out, num_tokens, pack_whole, pieces, set_aside

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


def test_the_first_blocks_hold_the_first_samples():
    """Full blocks and half empty ones by turns: all stay in the order in which they were begun."""
    samples = [sample([i + 1] * (20 if i % 2 else 11)) for i in range(400)]
    first = [block[0].ids[0] for block in pack_whole(samples, 20)]
    assert first == [*range(1, 401)]


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


# ---------------------------------------------------------------------------------------------- kept aside


def drawn(*sources: list[int], length: int = 10) -> list[Sample]:
    """Return samples of documents of so many tokens, one source after the other; the i-th document says i."""
    samples = []
    for name, sizes in zip("abc", sources, strict=False):
        for size in sizes:
            document = Document(name)
            said = [len({sample.document for sample in samples})] * size
            samples += [Sample(*piece, document) for piece in pieces(said, [True] * size, length, whole=False)]
    return samples


def of_source(samples: list[Sample], name: str) -> int:
    return num_tokens([sample for sample in samples if sample.document.source == name])


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.2, 0.5])
def test_validation_has_its_fraction_of_every_source(seed, fraction):
    draw = random.Random(seed)
    longest = [draw.choice([3, 30, 90]) for _ in range(3)]
    samples = drawn(*([draw.randint(2, size) for _ in range(draw.randint(30, 60))] for size in longest))
    draw.shuffle(samples)
    training, validation, shares = set_aside(samples, 10, fraction)
    assert not {s.document for s in training} & {s.document for s in validation}
    order = {id(sample): i for i, sample in enumerate(samples)}
    for part in (training, validation):
        places = [order[id(sample)] for sample in part]
        assert places == sorted(places), "another order than that of the draw"
    wanted = max(fraction, 10 / num_tokens(samples))
    assert [share.source for share in shares] == [*dict.fromkeys(sample.document.source for sample in samples)]
    for share in shares:
        of_all, aside = of_source(samples, share.source), of_source(validation, share.source)
        assert share.tokens == aside
        assert share.wanted == pytest.approx(wanted * of_all)
        assert wanted * of_all / 2 <= aside < wanted * of_all + 10, "a piece more at most"
        assert not share.left_out or share.is_short
    num_left_out = len(samples) - len(training) - len(validation)
    assert num_left_out == sum(share.left_out for share in shares)
    assert num_left_out == 0 or fraction * min(of_source(samples, name) for name in "abc") < 90


def test_of_long_documents_one_is_begun():
    """The shortest; the rest of it is for nobody."""
    training, validation, (share,) = set_aside(drawn([200, 40, 50, 60]), 10, 0.05)
    assert [sample.ids for sample in validation] == [[1] * 10] * 2
    assert num_tokens(training) == 310
    assert (share.wanted, share.tokens, share.left_out, share.is_short) == (17.5, 20, 2, True)


def test_validation_has_a_block_at_least_and_half_at_most():
    assert num_tokens(set_aside(drawn([2] * 50), 10, 0.001)[1]) == 10
    training, validation, _ = set_aside(drawn([2] * 6), 10, 0.001)
    assert num_tokens(training) == num_tokens(validation) == 6


def test_a_source_of_one_document_trains():
    training, validation, shares = set_aside(drawn([90], [5] * 40), 10, 0.05)
    assert of_source(training, "a") == 90
    assert of_source(validation, "b") == 10
    assert [(share.num_documents, share.tokens, share.is_short) for share in shares] == [(1, 0, True), (40, 10, False)]
    assert set_aside(drawn([90]), 10, 0.5)[1] == []


def test_training_keeps_the_only_long_document():
    training, validation, (share,) = set_aside(drawn([4, 4, 900]), 10, 0.2)
    assert (num_tokens(training), num_tokens(validation)) == (900, 8)
    assert share.is_short


# ---------------------------------------------------------------------------------------------- what blocks are for


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
