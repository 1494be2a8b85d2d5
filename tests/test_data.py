"""Documents go to one part and one block only, answers alone are labelled, and unreadable input says where it is."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from layerscalpel.data import (
    SOURCES,
    Parts,
    TokenBlocks,
    checked_record,
    encode,
    encode_conversation,
    find_source,
    pack_whole,
    prepare_blocks,
    to_messages,
)
from layerscalpel.errors import UserError
from layerscalpel.settings import DataSettings

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m['role'] + ':' + m['content'] }}{% endif %}{% endfor %}"
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
NUM_DOCUMENTS, END = 120, 0
"""Documents of the fixtures; id of the end-of-text token of `word_tokenizer`."""
SMALL = DataSettings(block_tokens=16, healing_block_tokens=24, evaluation_blocks=6, validation_fraction=0.2)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token id names the document: `d7` has the id 8."""
    vocabulary = {"<end>": END} | {f"d{i}": i + 1 for i in range(NUM_DOCUMENTS)}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a few merges, so that tokens span several characters."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(["the answer is in the question, and the user and the assistant know it"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>", extra_special_tokens=special[1:])
    made.chat_template = template
    return made


def documents(lengths: range = range(3, 20), seed: int = 0) -> list[str]:
    """Return texts that repeat their own word, of several lengths."""
    draw = random.Random(seed)
    return [" ".join([f"d{i}"] * draw.choice(lengths)) for i in range(NUM_DOCUMENTS)]


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return str(path)


def texts(path: Path, **kwargs: object) -> str:
    return write_jsonl(path, [{"text": text} for text in documents(**kwargs)])


def parts_of(source: str, *, seed: int = 0, num_calibration: int = 8, heal: bool = True, **changes: object) -> Parts:
    same = {"calibration": source, "evaluation": source, "healing": source} | changes
    settings = dataclasses.replace(SMALL, **same)
    return prepare_blocks(word_tokenizer(), settings, num_calibration=num_calibration, seed=seed, heal=heal)


def seen_in(tokens: torch.Tensor) -> set[int]:
    """Return the documents that tokens come from."""
    return set(tokens.flatten().tolist()) - {END}


def all_parts(parts: Parts) -> list[TokenBlocks]:
    return [parts.calibration, parts.evaluation, parts.healing, parts.validation]


# ---------------------------------------------------------------------------------------------- parts and blocks


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
    with pytest.raises(UserError, match=r"healing source .*short.jsonl gives 1 documents .* give more text"):
        parts_of(texts(tmp_path / "a.jsonl"), healing=short)


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
        prepare_blocks(None, SMALL, num_calibration=2, seed=0)


# ---------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_samples_whole_and_once(seed):
    draw = random.Random(seed)
    samples = []
    for i in range(300):
        size = draw.randint(1, 20)
        samples.append(([i + 1] * size, [False] + [draw.random() < 0.5 for _ in range(size - 1)]))
    blocks = pack_whole(samples, 20, filler=END)
    packed = {}
    for ids, labelled in blocks:
        assert len(ids) == len(labelled) == 20
        assert not any(mark for token, mark in zip(ids, labelled, strict=True) if token == END)
        for number in set(ids) - {END}:
            assert number not in packed, "split over two blocks"
            at = [j for j, token in enumerate(ids) if token == number]
            assert at == list(range(at[0], at[0] + len(at))), "split within a block"
            packed[number] = ([number] * len(at), [labelled[j] for j in at])
    assert [packed[i + 1] for i in range(300)] == samples


def test_packing_wastes_little():
    samples = [([1] * size, [True] * size) for size in [5, 10, 5, 15, 10, 5, 10] * 20]
    assert len(pack_whole(samples, 20, filler=END)) <= 65  # 60 when perfect


def test_filling_needs_no_end_token():
    assert pack_whole([([5, 6], [False, True])], 4, filler=None) == [([5, 6, 0, 0], [False, True, False, False])]


# ---------------------------------------------------------------------------------------------- conversations

TURNS = [
    {"role": "system", "content": "You know the answer."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "the answer is 2 - naïve, 日本語 🙂"},
    {"role": "user", "content": "the answer is 2, the user said"},
    {"role": "assistant", "content": " and the answer\nis 3"},
]


def labelled_runs(tokenizer: PreTrainedTokenizerFast, ids: list[int], labelled: list[bool]) -> list[str]:
    """Return the text of every unbroken run of labelled tokens."""
    runs, before = [], False
    for token, mark in zip(ids, labelled, strict=True):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
        before = mark
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("messages", [TURNS, TURNS[1:], TURNS[:3], TURNS[1:3]], ids=["system+2", "2", "system+1", "1"])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>\n"), (None, "<|end|>\n\n")], ids=["chatml", "plain"]
)
def test_labels_are_the_assistants_words(messages, template, end):
    tokenizer = chat_tokenizer(template)
    ids, labelled = encode_conversation(tokenizer, messages)
    answers = [message["content"] + end for message in messages if message["role"] == "assistant"]
    assert labelled_runs(tokenizer, ids, labelled) == answers
    whole = tokenizer.decode(ids)
    assert all(message["content"] in whole for message in messages)


def test_a_templates_own_tokens_are_used():
    tokenizer = chat_tokenizer()
    ids, _ = encode_conversation(tokenizer, TURNS)
    assert ids == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)


def test_a_conversation_without_answer_has_no_label():
    _, labelled = encode_conversation(chat_tokenizer(), TURNS[:2])
    assert not any(labelled)


def test_a_template_that_rewrites_turns_is_refused():
    with pytest.raises(UserError, match=r"chat template rewrites earlier turns, .* heal on plain text"):
        encode_conversation(chat_tokenizer(FORGETFUL), TURNS)


def test_a_template_that_refuses_a_role_is_told():
    with pytest.raises(UserError, match=r"chat template refuses a conversation .*System role not supported - leave"):
        encode_conversation(chat_tokenizer(STRICT), TURNS)


@pytest.mark.parametrize("template", [CHATML, None])
def test_an_opening_of_the_assistant_answers_nothing(template):
    tokenizer = chat_tokenizer(template)
    opened = [{"role": "assistant", "content": "the user may ask"}, *TURNS[1:3]]
    assert labelled_runs(tokenizer, *encode_conversation(tokenizer, opened)) == labelled_runs(
        tokenizer, *encode_conversation(tokenizer, TURNS[1:3])
    )


def test_an_instruction_is_a_conversation():
    record = {"instruction": "Add.", "input": "1 and 1", "output": "2"}
    expected = [{"role": "user", "content": "Add.\n\n1 and 1"}, {"role": "assistant", "content": "2"}]
    assert to_messages(record) == expected
    assert to_messages(record | {"input": ""})[0]["content"] == "Add."
    assert encode(chat_tokenizer(), record) == encode_conversation(chat_tokenizer(), expected)


def test_a_text_ends_with_one_end_token():
    tokenizer = chat_tokenizer()
    ids, labelled = encode(tokenizer, {"text": "the answer"})
    assert tokenizer.decode(ids) == "the answer<|end|>"
    assert labelled == [False] + [True] * (len(ids) - 1)
    assert encode(tokenizer, {"text": "the answer<|end|>"})[0] == ids


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
    whole = {tuple(encode(tokenizer, record)[0]) for record in records}
    rows = [tuple(row) for row in torch.cat([parts.healing.tokens, parts.validation.tokens]).tolist()]
    long = [ids[:length] for ids in whole if len(ids) > length]
    assert sum(row in long for row in rows) == len(cut)


# ---------------------------------------------------------------------------------------------- sources


def test_all_kinds_of_file_hold_the_same(tmp_path):
    plain = texts(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(Path(plain).read_text(encoding="utf-8"))
    (tmp_path / "a.txt").write_text("\n\n".join(documents()), encoding="utf-8")
    expected = parts_of(plain).calibration.summary()["sha256"]
    for name in ("a.jsonl.gz", "a.txt"):
        assert parts_of(str(tmp_path / name)).calibration.summary()["sha256"] == expected, name


def test_separators_within_a_text_do_not_end_a_line(tmp_path):
    """JSON may hold these unescaped, as web text does; str.splitlines would cut there."""
    wanted = [{"text": f"one{mark}two"} for mark in "\u2028\u2029\x85\x0b\x0c\x1c"]
    source = write_jsonl(tmp_path / "a.jsonl", wanted)
    found = list(find_source(source).read(0))
    assert sorted(r["text"] for r in found) == sorted(r["text"] for r in wanted)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\n\n'),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}'),
        ("a.txt", b"\xef\xbb\xbfa\r\n\r\nb\r\n\r\n"),
    ],
)
def test_files_written_elsewhere_are_read(tmp_path, name, content):
    """Blank lines, Windows line ends, a byte order mark."""
    path = tmp_path / name
    path.write_bytes(content)
    assert sorted(r["text"] for r in find_source(str(path)).read(0)) == ["a", "b"]


def test_every_source_is_described():
    assert all(source.sentence for source in SOURCES.values())


def test_an_unknown_source_is_answered_with_a_near_one():
    with pytest.raises(UserError, match=r"no text source 'alpacca' - did you mean 'alpaca'\? - or a \.jsonl"):
        find_source("alpacca")
    with pytest.raises(UserError, match="no text source 'zzz' - allowed: alpaca, c4, "):
        find_source("zzz")


def test_a_source_of_the_hub_says_that_it_cannot_be_fetched():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"data set allenai/c4 cannot be fetched: .* - give a \.jsonl or \.txt file"):
        next(find_source("c4").read(0))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good " + "für".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is no UTF-8 text \(byte 6\) - convert it first"):
        find_source(str(path)).read(0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    noise = random.Random(0).randbytes(4000).hex()
    content = gzip.compress(json.dumps({"text": noise}).encode())
    middle = len(content) // 2
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        {
            "cut": content[:middle],
            "flipped": content[:10] + b"\xff" * 20 + content[30:],
            "plain": b'{"text": "a"}\n',
        }[damage]
    )
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read: .* - check the file"):
        find_source(str(path)).read(0)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:3 is no JSON \(.*\) - one record a line"):
        find_source(str(path)).read(0)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"txt": "a"}, r"\['txt'\]"),
        ({"text": 3}, r"\['text'\]"),
        ({"text": None}, r"\['text'\]"),
        ({"instruction": "a"}, r"\['instruction'\]"),
        ({"messages": "a"}, r"\['messages'\]"),
        ({"messages": [{"role": "user"}]}, r"\['messages'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"\['messages'\]"),
        ([1], "list"),
        ("a", "str"),
        ({}, "dict"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, record, said):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, record])
    with pytest.raises(UserError, match=rf"a\.jsonl:2 has the fields {said} - allowed: text, or instruction/input"):
        find_source(source).read(0)


def test_other_fields_of_a_record_are_left_out():
    assert checked_record({"text": "a", "url": 1}, "") == {"text": "a"}
    alpaca = {"instruction": "a", "input": None, "output": "b"}
    assert checked_record(alpaca, "") == {"instruction": "a", "input": "", "output": "b"}
    assert checked_record({"messages": TURNS, "id": 1}, "") == {"messages": TURNS}
