"""Sources get their shares, what cannot be used is left out and counted, and answers may come from elsewhere."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from texts import (
    CHATML,
    END,
    FORGETFUL,
    SMALL,
    STRICT,
    all_parts,
    chat_tokenizer,
    documents,
    parts_of,
    seen_in,
    texts,
    word_tokenizer,
    write_jsonl,
)

from layerscalpel.data import Parts, TokenBlocks, prepare_blocks
from layerscalpel.draw import ANSWERED_AT_ONCE
from layerscalpel.errors import UserError
from layerscalpel.settings import DataSettings

# ---------------------------------------------------------------------------------------------- what is left out

CALM = "\n\n".join(f"question {i} and the answer" for i in range(99))
ASKED = {"instruction": "the question", "output": "the answer"}
SYSTEM = [{"role": "system", "content": "the user"}]


def talks(count: int, *, system: bool = False, answer: str = "the answer {}") -> list[dict]:
    """Return conversations that all differ."""
    return [
        {"messages": SYSTEM * system + [{"role": "user", "content": f"the question {i} {system}"}]
         + [{"role": "assistant", "content": answer.format(i)}]}
        for i in range(count)
    ]  # fmt: skip


def healed_on(folder: Path, records: list, *, template: str = CHATML, **changes: object) -> Parts:
    """Return the parts where records heal and plain text does the rest."""
    plain = folder / "plain.txt"
    plain.write_text(CALM, encoding="utf-8")
    source = write_jsonl(folder / "chat.jsonl", records)
    settings = DataSettings(str(plain), source, str(plain), 16, 96, 2, None, 0.2)
    settings = dataclasses.replace(settings, **changes)
    return prepare_blocks(chat_tokenizer(template), settings, num_calibration=2, seed=0)


def test_all_that_is_left_out_is_counted(tmp_path):
    long = [{"instruction": "the " * 200 + f"{i}", "output": "a"} for i in range(2)]
    records = [*talks(20), *talks(3, system=True), *talks(5, answer=" ")[:4], *long, ASKED, ASKED]
    parts = healed_on(tmp_path, records, template=STRICT)
    expected = {
        "refused by the chat template": 3,
        "no answer": 4,
        "no labelled token within a block": 2,
        "repeated": 1,
    }
    assert parts.healing.dropped == parts.validation.dropped == expected
    assert parts.healing.num_documents + parts.validation.num_documents == 21


def test_what_is_left_out_is_told(tmp_path, capsys):
    healed_on(tmp_path, [*talks(20), *talks(3, system=True)], template=STRICT)
    assert "chat.jsonl: left out 3 refused by the chat template" in capsys.readouterr().err
    healed_on(tmp_path, talks(20))
    assert "left out" not in capsys.readouterr().err


def test_a_template_that_takes_no_conversation_ends_with_its_words(tmp_path):
    with pytest.raises(UserError, match=r"chat template refuses a conversation .*: System role not supported - leave"):
        healed_on(tmp_path, talks(9, system=True), template=STRICT)
    with pytest.raises(UserError, match=r"chat template rewrites earlier turns"):
        healed_on(tmp_path, talks(9), template=FORGETFUL)
    texts_too = [*talks(9, system=True), *({"text": f"the answer {i}"} for i in range(20))]
    with pytest.raises(UserError, match=r"System role not supported"):
        healed_on(tmp_path, texts_too, template=STRICT)


def test_conversations_that_a_template_rewrites_are_counted(tmp_path):
    """This template drops all turns but the last one of longer conversations."""
    last = (
        "{% for m in messages %}{% if loop.last or loop.length < 3 %}" + CHATML.split("%}", 1)[1].split("{% endfor")[0]
    )
    template = last + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    two = [{"messages": talk["messages"] * 2} for talk in talks(4)]
    parts = healed_on(tmp_path, [*talks(20), *two], template=template)
    assert parts.healing.dropped == {"rewritten by the chat template": 4}


def test_refused_conversations_are_left_out_of_other_parts_too(tmp_path):
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*talks(60), *talks(60, system=True)])
    settings = DataSettings(mixed, mixed, mixed, 64, 96, 3, None, 0.2)
    parts = prepare_blocks(chat_tokenizer(STRICT), settings, num_calibration=3, seed=0)
    for part in all_parts(parts):
        assert part.dropped["refused by the chat template"] > 0
    alone = write_jsonl(tmp_path / "alone.jsonl", talks(60, system=True))
    settings = dataclasses.replace(settings, evaluation=alone)
    with pytest.raises(UserError, match=r"System role not supported"):
        prepare_blocks(chat_tokenizer(STRICT), settings, num_calibration=3, seed=0)


@pytest.mark.parametrize(
    ("records", "reasons"),
    [
        (talks(5, answer=""), "5 no answer"),
        ([*talks(3, answer=""), *({"instruction": f"{i}", "output": None} for i in range(2))], "5 no answer"),
        ([{"text": " "}] * 2, "2 empty"),
        ([], "nothing is left to read"),
    ],
)  # fmt: skip
def test_a_source_without_any_target_is_refused_with_its_reasons(tmp_path, records, reasons):
    said = (
        rf"healing source .*chat\.jsonl has no labelled token: {reasons}.* - give text, or conversations with answers"
    )
    with pytest.raises(UserError, match=said):
        healed_on(tmp_path, records)


def test_prompts_that_fill_every_block_ask_for_longer_ones(tmp_path):
    records = [*talks(3, answer=""), *({"instruction": "the " * 200 + f"{i}", "output": "a"} for i in range(4))]
    said = r"4 no labelled token within a block.* - raise data\.healing_block_tokens \(96\), or give text"
    with pytest.raises(UserError, match=said):
        healed_on(tmp_path, records)


# ---------------------------------------------------------------------------------------------- mixes


def halves(folder: Path, lengths: range = range(3, 20), other: range = range(20, 40)) -> tuple[str, str]:
    """Return two sources: documents of an even number, and longer ones of an odd number."""
    short, long = documents(lengths), documents(other)
    names = [
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in given[i::2]])
        for i, (name, given) in enumerate((("even", short), ("odd", long)))
    ]
    return names[0], names[1]


def even_tokens(part: TokenBlocks) -> int:
    """Return the tokens of documents of an even number, end tokens left out."""
    return int(((part.tokens % 2 == 1) & (part.tokens != END)).sum())  # document i has the id i + 1


@pytest.mark.parametrize(("weights", "share"), [(("2", "1"), 2 / 3), (("", ""), 1 / 2), (("0.2", "0.6"), 1 / 4)])
def test_weights_are_shares_of_tokens(tmp_path, weights, share):
    even, odd = halves(tmp_path)
    spec = ",".join(f"{name}={weight}" if weight else name for name, weight in zip((even, odd), weights, strict=True))
    plain = texts(tmp_path / "plain.jsonl", seed=1)
    settings = dataclasses.replace(SMALL, healing=spec, evaluation=plain, calibration=plain, evaluation_blocks=2)
    settings = dataclasses.replace(settings, healing_blocks=16, healing_block_tokens=48)
    parts = prepare_blocks(word_tokenizer(), settings, num_calibration=2, seed=0)
    assert parts.healing.source == spec
    assert len(parts.healing) == 16
    assert parts.healing.sources[even] / sum(parts.healing.sources.values()) == pytest.approx(share, abs=0.06)
    assert even_tokens(parts.healing) / (parts.healing.tokens != END).sum() == pytest.approx(share, abs=0.12)
    in_validation = parts.validation.sources
    assert in_validation[even] / sum(in_validation.values()) == pytest.approx(share, abs=0.15)
    assert parts.healing.summary()["sources"] == parts.healing.sources


def test_a_mix_ends_with_its_first_source(tmp_path, capsys):
    even, odd = halves(tmp_path)
    plain = texts(tmp_path / "plain.jsonl", seed=1)
    settings = dataclasses.replace(SMALL, healing=f"{even},{odd}=3", evaluation=plain, calibration=plain)
    settings = dataclasses.replace(settings, evaluation_blocks=2, healing_block_tokens=48)
    parts = prepare_blocks(word_tokenizer(), settings, num_calibration=0, seed=0)
    totals = Counter(parts.healing.sources) + Counter(parts.validation.sources)
    longest = 41  # a document of the other source, with its end
    assert abs(totals[odd] / 3 - totals[even]) <= longest
    said = f"healing mix: {odd} ends first; tokens taken: {even} {totals[even]:,}, {odd} {totals[odd]:,}"
    assert said in capsys.readouterr().err


def test_a_mix_of_one_is_that_source(tmp_path):
    source = texts(tmp_path / "a.jsonl")
    plain, weighted = parts_of(source).healing, parts_of(source, healing=f"{source}=3").healing
    assert torch.equal(plain.tokens, weighted.tokens)
    assert plain.sources == weighted.sources == {source: int(plain.filled.sum())}


def test_a_source_of_a_mix_that_gives_nothing_is_named(tmp_path):
    source, empty = texts(tmp_path / "a.jsonl"), tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"healing source .*empty\.txt has no labelled token: nothing is left to read"):
        parts_of(source, healing=f"{source},{empty}")


def with_books(folder: Path, **changes: object) -> Parts:
    """Return parts where six long documents (sources `books`) are healed on beside many short ones, one to one."""
    given = documents(range(3, 20))
    books = write_jsonl(folder / "books.jsonl", [{"text": " ".join([f"d{i}"] * 600)} for i in range(6)])
    short = write_jsonl(folder / "short.jsonl", [{"text": text} for text in given[30:]])
    plain = write_jsonl(folder / "plain.jsonl", [{"text": text} for text in given[6:30]])
    settings = dataclasses.replace(SMALL, healing=f"{books}=1,{short}=1", evaluation=plain, calibration=plain)
    settings = dataclasses.replace(settings, evaluation_blocks=2, validation_fraction=0.05, **changes)
    return prepare_blocks(word_tokenizer(), settings, num_calibration=2, seed=0)


@pytest.mark.parametrize("blocks", [None, 10, 20, 40])
def test_a_long_document_takes_neither_part_over(tmp_path, blocks):
    """A book fills more blocks than all that is wanted; both parts still have one token of it for one of the rest."""
    parts = with_books(tmp_path, healing_blocks=blocks)
    (books, short), length = parts.healing.sources, SMALL.healing_block_tokens
    total = sum(parts.healing.sources.values())
    assert parts.healing.sources[books] / total == pytest.approx(0.5, abs=0.08)
    held_out = parts.validation.sources
    assert min(held_out.values()) > 0
    assert abs(held_out[books] - held_out[short]) <= 2 * length
    assert sum(held_out.values()) <= 0.05 * total + 2 * length
    assert not seen_in(parts.healing.tokens) & seen_in(parts.validation.tokens)
    assert blocks is None or len(parts.healing) == blocks


def test_a_source_of_one_book_is_told_and_trained_on(tmp_path, capsys):
    """Its beginning is no longer drawn than its share; nothing of it validates."""
    book = write_jsonl(tmp_path / "book.jsonl", [{"text": "d0 " * 300}])
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": text} for text in documents()[30:]])
    parts = parts_of(texts(tmp_path / "plain.jsonl", lengths=range(3, 5)), healing=f"{book},{short}", num_calibration=0)
    assert parts.healing.sources[book] == 301
    assert parts.validation.sources[book] == 0
    assert parts.validation.sources[short] > 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"validation has 0 tokens of {book}, of 60 that are its share: of 1 document none may be in training" in said
    assert "0 pieces are left out - give more documents" in said


def test_few_blocks_of_many_long_documents_are_filled(tmp_path):
    """The first document alone would fill them all; another one is begun for validation."""
    for blocks in (2, 3, 10):
        parts = parts_of(texts(tmp_path / "a.jsonl", lengths=range(100, 120)), healing_blocks=blocks)
        assert len(parts.healing) == blocks
        assert 1 <= len(parts.validation) <= max(1, 0.5 * blocks)
        assert not seen_in(parts.healing.tokens) & seen_in(parts.validation.tokens)


def test_pieces_that_neither_part_has_are_counted(tmp_path, capsys):
    source = texts(tmp_path / "a.jsonl", lengths=range(3, 5))
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": " ".join([f"d{i}"] * 239)} for i in range(4)])
    parts = parts_of(source, healing=few, num_calibration=0, validation_fraction=0.1)
    assert parts.healing.dropped == parts.validation.dropped == {"pieces of a document that validation begins": 6}
    assert parts.healing.sources == {few: 3 * 240}
    assert parts.validation.sources == {few: 4 * 24}
    said = " ".join(capsys.readouterr().err.split())
    assert f"validation has 96 tokens of {few}, of 96 that are its share: of 4 documents none may be in" in said


def test_too_few_blocks_for_every_source_are_told(tmp_path):
    lengths = range(60, 61)
    names = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text} for text in documents(lengths)[i * 20 : i * 20 + 20]])
        for i in range(4)
    ]
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in documents()[90:]])
    with pytest.raises(
        UserError, match=r"healing source .*3\.jsonl gets no place in 2 blocks .* - raise data\.healing_bl"
    ):
        parts_of(plain, healing=",".join(names), healing_blocks=2, num_calibration=0)


def test_no_document_is_in_two_parts_of_a_mix(tmp_path):
    even, odd = halves(tmp_path)
    parts = all_parts(parts_of(even, healing=f"{even}=2,{odd}", evaluation=odd, num_calibration=4))
    for i, part in enumerate(parts):
        for other in parts[i + 1 :]:
            assert not seen_in(part.tokens) & seen_in(other.tokens)


# ---------------------------------------------------------------------------------------------- answers


def echo(records: list[dict]) -> list[dict]:
    """Answer every question with itself in capitals; every third answer is cut off and every fifth is blank."""
    answered = []
    for record in records:
        if "text" in record:
            answered.append(record)
            continue
        *before, question, _ = record["messages"]
        number = int(question["content"].split()[2])
        words = " " if number % 5 == 0 else question["content"].upper()
        turns = [*before, question, {"role": "assistant", "content": words}]
        answered.append({"messages": turns, "by_parent": True, "cut_off": number % 3 == 0})
    return answered


def answered_parts(folder: Path, records: list, answer: object = echo, **changes: object) -> Parts:
    plain = folder / "plain.txt"
    plain.write_text(CALM, encoding="utf-8")
    source = write_jsonl(folder / "chat.jsonl", records)
    settings = dataclasses.replace(DataSettings(str(plain), source, str(plain), 16, 96, 2, None, 0.2), **changes)
    return prepare_blocks(chat_tokenizer(), settings, num_calibration=2, seed=0, answer=answer)


def test_answers_are_written_for_healing_and_validation(tmp_path):
    texts_too = [{"text": f"the answer {i} stays"} for i in range(4)]
    parts = answered_parts(tmp_path, [*talks(30, answer="the user {}"), *texts_too])
    tokenizer = chat_tokenizer()
    said = "".join(tokenizer.decode(row) for part in all_parts(parts)[2:] for row in part.tokens)
    assert "the user" not in said, "an answer of the data"
    assert said.count("THE QUESTION") == said.count("the question") == 24
    assert said.count("THE QUESTION 1 FALSE<|im_end|>") == 1
    assert "THE QUESTION 3 FALSE<|im_end|>" not in said, "an end that nobody wrote"
    assert said.count("stays<|end|>") == 4
    assert parts.healing.dropped == {"no answer": 6}
    answers = [part.summary()["answers"] for part in (parts.healing, parts.validation)]
    assert sum(Counter(found)["written"] for found in answers) == 24
    assert sum(Counter(found)["cut_off"] for found in answers) == 8
    assert "answers" not in healed_on(tmp_path, talks(30)).healing.summary()


def test_answers_are_asked_for_in_groups(tmp_path):
    """Many at once, so that they can be written beside each other; few more than are needed."""
    asked = []

    def counted(records: list[dict]) -> list[dict]:
        asked.append(len(records))
        return echo(records)

    records = talks(300)
    answered_parts(tmp_path, records, counted)
    assert asked == [ANSWERED_AT_ONCE, ANSWERED_AT_ONCE, 300 - 2 * ANSWERED_AT_ONCE]
    asked.clear()
    answered_parts(tmp_path, records, counted, healing_blocks=4)
    assert asked == [ANSWERED_AT_ONCE]


def test_an_answer_that_others_got_too_is_healed_on_once(tmp_path):
    """The data has two answers to a question, the parent one."""
    twice = [*talks(30), *talks(30, answer="the other {}")]
    parts = answered_parts(tmp_path, twice)
    assert parts.healing.dropped == {"repeated": 30, "no answer": 6}
    assert parts.healing.num_documents + parts.validation.num_documents == 24


def test_an_answer_like_that_of_the_data_is_no_repetition(tmp_path):
    def same(records: list[dict]) -> list[dict]:
        return [record | {"by_parent": True} for record in records]

    given, written = healed_on(tmp_path, talks(30)), answered_parts(tmp_path, talks(30), same)
    assert torch.equal(given.healing.tokens, written.healing.tokens)
    assert written.healing.dropped == {}
