"""Documents go to one part and one block only, blocks know what fills them, and a seed names them."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
from pathlib import Path

import pytest
import torch
from texts import END, NUM_DOCUMENTS, SMALL, all_parts, chat_tokenizer, documents, parts_of, seen_in, texts, write_jsonl

from layerscalpel.data import prepare_blocks
from layerscalpel.encode import encode
from layerscalpel.errors import UserError
from layerscalpel.forms import checked_record
from layerscalpel.settings import DataSettings


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [range(3, 20), range(60, 90)])
def test_no_document_is_in_two_parts(tmp_path, seed, lengths):
    parts = all_parts(parts_of(texts(tmp_path / "a.jsonl", lengths=lengths), seed=seed))
    for i, part in enumerate(parts):
        assert len(part) > 0
        for other in parts[i + 1 :]:
            assert not seen_in(part.tokens) & seen_in(other.tokens)


def test_no_document_is_in_two_parts_when_two_sources_hold_it(tmp_path):
    first = texts(tmp_path / "a.jsonl")
    spaced = write_jsonl(tmp_path / "b.jsonl", [{"text": f" {text}\n".replace(" ", "  ")} for text in documents()])
    parts = parts_of(first, evaluation=spaced, healing=spaced)
    assert not seen_in(parts.calibration.tokens) & seen_in(parts.evaluation.tokens)
    assert not seen_in(parts.calibration.tokens) & seen_in(parts.healing.tokens)
    repeated = sum(part.dropped.get("repeated", 0) for part in (parts.evaluation, parts.healing))
    assert repeated == len(seen_in(parts.calibration.tokens))


def test_a_document_repeated_within_a_source_is_read_once(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents() for _ in range(2)])
    blocks = parts_of(source, heal=False, num_calibration=30).calibration
    assert blocks.dropped["repeated"] > 0
    assert blocks.num_documents == len(seen_in(blocks.tokens))


def test_text_blocks_share_no_document(tmp_path):
    for lengths in (range(3, 20), range(40, 60)):
        parts = parts_of(texts(tmp_path / "a.jsonl", lengths=lengths))
        for part in (parts.calibration, parts.evaluation):
            owners = [seen_in(row) for row in part.tokens]
            assert sum(map(len, owners)) == len(set().union(*owners))


def test_text_is_all_labelled_but_the_first_token_of_a_document(tmp_path):
    blocks = parts_of(texts(tmp_path / "a.jsonl"), heal=False).calibration
    begins = torch.cat([torch.full((len(blocks), 1), True), blocks.tokens[:, :-1] == END], dim=1)
    assert torch.equal(blocks.labelled, ~begins)
    assert begins.sum() > len(blocks)


def test_a_seed_names_the_blocks(tmp_path):
    source = texts(tmp_path / "a.jsonl")
    first, again, other = (parts_of(source, seed=seed) for seed in (3, 3, 4))
    for one, same, different in zip(all_parts(first), all_parts(again), all_parts(other), strict=True):
        assert one.summary() == same.summary()
        assert one.summary()["sha256"] != different.summary()["sha256"]


def test_evaluation_does_not_depend_on_healing(tmp_path):
    source, other = texts(tmp_path / "a.jsonl"), texts(tmp_path / "b.jsonl", seed=1)
    expected = parts_of(source).evaluation.summary()
    changes = [
        {"heal": False},
        {"healing": other},
        {"healing_blocks": 2},
        {"healing_block_tokens": 48},
        {"validation_fraction": 0.5},
    ]
    for change in changes:
        assert parts_of(source, **change).evaluation.summary() == expected, change


def test_no_healing_parts_without_healing(tmp_path):
    parts = parts_of(texts(tmp_path / "a.jsonl"), heal=False)
    assert parts.healing is None
    assert parts.validation is None


def test_sizes_are_those_asked_for(tmp_path):
    parts = parts_of(texts(tmp_path / "a.jsonl"), num_calibration=5, healing_blocks=4)
    assert parts.calibration.tokens.shape == (5, 16)
    assert parts.evaluation.tokens.shape == (6, 16)
    assert parts.healing.tokens.shape == (4, 24)
    assert parts.validation.tokens.shape[1] == 24
    assert len(parts.calibration.first(2)) == 2


def test_healing_takes_all_of_a_text(tmp_path):
    """Every token that no other part took is healed on or validated on, long documents in pieces."""
    lengths = range(60, 90)
    parts = parts_of(texts(tmp_path / "a.jsonl", lengths=lengths))
    left = set(range(1, NUM_DOCUMENTS + 1)) - seen_in(parts.calibration.tokens) - seen_in(parts.evaluation.tokens)
    kept = torch.cat([parts.healing.tokens, parts.validation.tokens])
    for part in (parts.healing, parts.validation):
        assert part.num_documents == len(seen_in(part.tokens))
    for document in left:
        written = documents(lengths)[document - 1].count("d")
        assert (kept == document).sum() in (written, written - 1)  # a last piece of one token predicts nothing


def test_all_kinds_of_file_hold_the_same(tmp_path):
    plain = texts(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(Path(plain).read_text(encoding="utf-8"))
    (tmp_path / "a.txt").write_text("\n\n".join(documents()), encoding="utf-8")
    expected = parts_of(plain).calibration.summary()["sha256"]
    for name in ("a.jsonl.gz", "a.txt"):
        assert parts_of(str(tmp_path / name)).calibration.summary()["sha256"] == expected, name


def test_dropped_documents_are_counted(tmp_path):
    blank = [{"text": ""}, {"text": " \n\t"}] * 30
    source = write_jsonl(tmp_path / "a.jsonl", [*blank, *({"text": text} for text in documents())])
    parts = parts_of(source)
    assert sum(part.dropped.get("empty", 0) for part in all_parts(parts)[:3]) == len(blank)


@pytest.mark.parametrize("part", ["calibration", "evaluation"])
def test_too_little_text_says_how_many_blocks_there_are(tmp_path, part):
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "d1 " * 20}, {"text": "d2 " * 20}, {"text": "d3"}])
    changes = {part: short, "num_calibration": 6}
    with pytest.raises(UserError, match=f"{part} source .*short.jsonl has text for 2 of 6 blocks of 16 tokens - give"):
        parts_of(texts(tmp_path / "a.jsonl"), **changes)


def test_too_little_to_heal_on_is_refused(tmp_path):
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "d1 d1 d1"}])
    with pytest.raises(UserError, match=r"healing source .*short.jsonl gives 1 document, .* - give more documents"):
        parts_of(texts(tmp_path / "a.jsonl"), healing=short)
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": "d1 d1 d1"}] * 9)
    with pytest.raises(UserError, match=r"same.jsonl gives 1 document \(left out: 8 repeated\), .* - give more"):
        parts_of(texts(tmp_path / "a.jsonl"), healing=same)


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
        prepare_blocks(None, SMALL, num_calibration=2, seed=0)


def test_a_long_conversation_keeps_its_beginning(tmp_path):
    def asked(words: int, answer: int) -> dict:
        return {"instruction": "the " * words + "question", "output": "answer " * answer}

    fits, cut, hopeless = [asked(1, 2)] * 3, [asked(3, 300)] * 3, [asked(200, 3)] * 5
    records = [record | {"input": f"{i}"} for i, record in enumerate(fits + cut + hopeless)]
    source, plain = write_jsonl(tmp_path / "chat.jsonl", records), tmp_path / "plain.txt"
    plain.write_text("\n\n".join(f"question {i} and the answer" for i in range(99)), encoding="utf-8")
    tokenizer, length = chat_tokenizer(), 96
    settings = DataSettings(str(plain), source, str(plain), 16, length, 2, None, 0.1)
    parts = prepare_blocks(tokenizer, settings, num_calibration=2, seed=0)
    assert parts.healing.dropped == {"no labelled token within a block": len(hopeless)}
    whole = {tuple(encode(tokenizer, checked_record(record, ""))[0]) for record in records}
    rows = [tuple(row) for row in torch.cat([parts.healing.tokens, parts.validation.tokens]).tolist()]
    long = [ids[:length] for ids in whole if len(ids) > length]
    assert sum(row in long for row in rows) == len(cut)


# ---------------------------------------------------------------------------------------------- packed samples


def test_packed_samples_know_their_places(tmp_path):
    parts = parts_of(texts(tmp_path / "a.jsonl", lengths=range(3, 60)))
    for part in (parts.healing, parts.validation):
        assert part.positions.shape == part.tokens.shape
        begins = part.positions == 0
        assert begins[:, 0].all()
        assert not (begins & part.labelled).any(), "a first token that is predicted"
        later = part.positions[:, 1:]
        assert ((later == part.positions[:, :-1] + 1) | (later == 0)).all()
        for row, starts in zip(part.tokens.tolist(), begins.tolist(), strict=True):
            edges = [i for i, start in enumerate(starts) if start] + [len(row)]
            samples = [row[low:high] for low, high in itertools.pairwise(edges)]
            assert all(len(seen_in(torch.tensor(sample))) <= 1 for sample in samples), "two documents, one count"
    assert parts.calibration.positions is None
    assert parts.evaluation.positions is None


def test_a_summary_tells_how_full_blocks_are(tmp_path):
    parts = parts_of(texts(tmp_path / "a.jsonl"))
    assert parts.evaluation.summary()["filled_fraction"] == 1.0
    for part in (parts.healing, parts.validation, parts.healing.first(3)):
        said = [(row != END) | (row == END) & mark for row, mark in zip(part.tokens, part.labelled, strict=True)]
        expected = torch.stack(said).sum().item() / part.tokens.numel()  # every text ends with a labelled end token
        assert part.summary()["filled_fraction"] == pytest.approx(expected)
        assert 0.5 < expected < 1


def test_the_hash_tells_the_places(tmp_path):
    part = parts_of(texts(tmp_path / "a.jsonl")).healing
    whole = dataclasses.replace(part, positions=None)
    moved = dataclasses.replace(part, positions=part.positions + 1)
    assert len({blocks.summary()["sha256"] for blocks in (part, whole, moved)}) == 3


def test_the_first_blocks_keep_what_belongs_to_them(tmp_path):
    part = parts_of(texts(tmp_path / "a.jsonl")).healing
    first = part.first(2)
    for name in ("tokens", "labelled", "positions", "filled"):
        assert torch.equal(getattr(first, name), getattr(part, name)[:2]), name
    assert parts_of(texts(tmp_path / "a.jsonl"), heal=False).calibration.first(2).positions is None


def test_counts_are_of_the_blocks_that_are_healed_on(tmp_path):
    """More is drawn than fits the blocks asked for; what is left over is counted nowhere."""
    for lengths in (range(3, 20), range(60, 90)):
        healing = parts_of(texts(tmp_path / "a.jsonl", lengths=lengths), healing_blocks=5).healing
        assert healing.num_documents == len(seen_in(healing.tokens))
        assert sum(healing.sources.values()) == int(healing.filled.sum())
