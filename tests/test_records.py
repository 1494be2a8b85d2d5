"""Every known form of a record is read, mixes are taken apart, and unreadable input says where it is."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from texts import TURNS, write_jsonl

from layerscalpel.config import build_config
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import fingerprints
from layerscalpel.forms import COMPLETIONS, FORMS, checked_record, record_text
from layerscalpel.records import SOURCES, find_source, sources_in


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------------------------------------- forms

SYSTEM = {"role": "system", "content": "s"}
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
EXAMPLES = [
    ({"text": "t"}, None),
    ({"instruction": "q", "output": "a"}, [user("q"), assistant("a")]),
    ({"instruction": "q", "input": "i", "output": "a"}, [user("q\n\ni"), assistant("a")]),
    ({"instruction": "", "input": "i", "output": "a"}, [user("i"), assistant("a")]),
    ({"messages": TURNS}, TURNS),
    *(({"prompt": "q", name: "a"}, [user("q"), assistant("a")]) for name in COMPLETIONS),
    *(({"prompt": [SYSTEM, user("q")], name: [assistant("a")]}, [SYSTEM, user("q"), assistant("a")])
      for name in COMPLETIONS),
    ({"prompt": "q", "completion": None, "response": "a"}, [user("q"), assistant("a")]),
    ({"question": "q", "answer": "a"}, [user("q"), assistant("a")]),
    ({"conversations": SHARED}, [SYSTEM, user("q"), assistant("a")]),
    ({"conversations": SHARED[1:] * 2}, [user("q"), assistant("a")] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("record", "messages"), EXAMPLES)
def test_every_form_is_read(tmp_path, record, messages):
    source = write_jsonl(tmp_path / "a.jsonl", [record | {"id": 7}])
    expected = {"messages": messages} if messages else record
    assert list(find_source(source).read(0)) == [expected]
    assert record_text(expected) == ("\n".join(m["content"] for m in messages) if messages else "t")


def test_every_form_has_an_example():
    found = {next(form for form, read in FORMS.items() if read(record)) for record, _ in EXAMPLES}
    assert found == set(FORMS)


def test_a_text_comes_after_what_it_was_made_from():
    """Beside the fields of a conversation it is prompt and answer in the template of another model."""
    for record, messages in EXAMPLES[1:]:
        assert checked_record({"text": "### Instruction: q ### Response: a"} | record, "") == {"messages": messages}
    others = dict.fromkeys(("instruction", "output", "messages", "conversations", "prompt", "question", "answer"))
    assert checked_record({"text": "t"} | others, "") == {"text": "t"}, "columns of other rows of a table"


# ---------------------------------------------------------------------------------------------- mixes


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("alpaca", [("alpaca", 1.0)]),
        ("alpaca,c4", [("alpaca", 1.0), ("c4", 1.0)]),
        ("alpaca=2,c4=1", [("alpaca", 2.0), ("c4", 1.0)]),
        (" alpaca = 0.5 , c4 ", [("alpaca", 0.5), ("c4", 1.0)]),
        ("alpaca=3", [("alpaca", 3.0)]),
        ("nowhere", [("nowhere", 1.0)]),  # which find_source refuses
        (f"alpaca=1,{'n' * 300}=1e-2", [("alpaca", 1.0), ("n" * 300, 0.01)]),  # longer than a file's name may be
    ],
)
def test_a_mix_is_taken_apart(spec, expected):
    assert sources_in(spec) == expected


def test_a_file_of_just_that_name_is_no_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=1,b=2", "c=3"):
        (tmp_path / name).write_text("words", encoding="utf-8")
        assert sources_in(name) == [(name, 1.0)]
    assert sources_in("c=3,alpaca=2") == [("c=3", 1.0), ("alpaca", 2.0)]
    assert sources_in("c=3=4") == [("c=3", 4.0)]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("alpaca=0,c4", "gives alpaca the weight '0' - allowed: a number above 0, as alpaca=2,c4=1"),
        ("alpaca=-1,c4", "gives alpaca the weight '-1' - allowed"),
        ("alpaca,c4=much", "gives c4 the weight 'much' - allowed"),
        ("alpaca,c4=", "gives c4 the weight '' - allowed"),
        ("alpaca=nan,c4", "gives alpaca the weight 'nan' - allowed"),
        ("alpaca=inf,c4", "gives alpaca the weight 'inf' - allowed"),
        ("alpaca,,c4", "has a part without name"),
        ("alpaca,", "has a part without name"),
        ("=2,c4", "has a part without name"),
        ("alpaca=1,c4,alpaca=2", "names alpaca twice - give each source one weight"),
    ],
)
def test_a_bad_mix_ends_with_one_line(spec, said):
    with pytest.raises(UserError) as refused:
        sources_in(spec)
    assert str(refused.value).startswith(f"the mix '{spec}' {said}")
    assert len(str(refused.value).splitlines()) == 1


def test_every_file_of_a_mix_is_part_of_what_a_run_is_made_of(tmp_path):
    names = [write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}]) for name in "ab"]
    config = build_config([{"data.healing": f"{names[0]}=2,{names[1]}"}])
    before = fingerprints(config)
    assert fingerprints(config) == before
    for name in names:
        write_jsonl(Path(name), [{"text": "other words"}])
        after = fingerprints(config)
        assert after["heal"] != before["heal"], name
        assert after["search"] == before["search"], "which reads none of it"
        before = after


# ---------------------------------------------------------------------------------------------- files


def test_separators_within_a_text_do_not_end_a_line(tmp_path):
    """JSON may hold these unescaped, as web text does; str.splitlines would cut there."""
    wanted = [{"text": f"one{mark}two"} for mark in "\u2028\u2029\x85\x0b\x0c\x1c"]
    source = write_jsonl(tmp_path / "a.jsonl", wanted)
    found = list(find_source(source).read(0))
    assert sorted(r["text"] for r in found) == sorted(r["text"] for r in wanted)


def test_a_line_of_spaces_parts_paragraphs(tmp_path):
    """WikiText's blank lines hold a space; a line break alone parts nothing."""
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = Title = \n \n First \n line \n \n\t\n\n Second \n", encoding="utf-8")
    found = sorted(record["text"] for record in find_source(str(path)).read(0))
    assert found == [" = Title = ", " First \n line ", " Second \n"]


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


def test_a_file_of_an_array_holds_the_same(tmp_path):
    records = [{"instruction": f"q{i}", "input": "", "output": f"a{i}", "text": f"q{i} a{i}"} for i in range(9)]
    lines = write_jsonl(tmp_path / "a.jsonl", records)
    expected = list(find_source(lines).read(3))
    array = json.dumps(records, indent=1).encode("utf-8-sig")
    written = {"a.json": array, "a.json.gz": gzip.compress(array), "A.JSON": array, "A.JSON.GZ": gzip.compress(array)}
    written |= {"B.JSONL": (content := Path(lines).read_bytes()), "b.Jsonl.gz": gzip.compress(content)}
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
        assert list(find_source(str(tmp_path / name)).read(3)) == expected, name


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a.md.gz", "a.txt.GZ"])
def test_paragraphs_are_records(tmp_path, name):
    content = b"# first\n\nsecond"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert sorted(r["text"] for r in find_source(str(tmp_path / name)).read(0)) == ["# first", "second"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl.zip", "a", "a.gz", "jsonl"])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("instruction,output\nq,a\n", encoding="utf-8")
    said = (
        rf"file .*{name} is of no known kind - allowed: \.jsonl, \.json, \.txt, \.md \(or \.gz of it\) - rename or conv"
    )
    with pytest.raises(UserError, match=said):
        find_source(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"text": "a"}\n{"text": "b"}\n',
            r"a\.json:2 is no JSON \(Extra data\) - allowed: an array of records; a file w",
        ),
        (
            '{"data": []}',
            r"file .*a\.json holds no array - allowed: an array of records; a file with one record a line is",
        ),
        ('[{"text": "a"},\n{"text": }]', r"a\.json:2 is no JSON \(Expecting value\)"),
        ('[{"text": "a"}, {"txt": "b"}]', r"a\.json record 2 has the fields \['txt'\]"),
        ("", r"a\.json:1 is no JSON"),
    ],
)
def test_an_array_that_is_none_is_refused(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        find_source(str(tmp_path / "a.json")).read(0)


@pytest.mark.parametrize("line", ["[" * 200_000 + "]" * 200_000, '{"text": "a", "number": ' + "1" * 5000 + "}"])
def test_json_that_cannot_be_read_is_named(tmp_path, line):
    """Nested too deep; a number of more digits than Python reads."""
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl:2 cannot be read as JSON \(.*\) - one record a line") as refused:
        find_source(str(tmp_path / "a.jsonl")).read(0)
    assert len(str(refused.value).splitlines()) == 1


HALF = "bad \\ud83d half"


@pytest.mark.parametrize("record", ['{"text": "%s"}', '{"instruction": "a", "output": "%s"}'])
def test_half_a_character_is_named(tmp_path, record):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42 whole"}\n' + record % HALF, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"a\.jsonl:2 holds half a character \(U\+D83D alone\) - allowed: whole ones - mend"
    ):
        find_source(str(tmp_path / "a.jsonl")).read(0)


PARTS = [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": 3}, "`text` is 3 - allowed: a string"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`input` is 3 - allowed: a string"),
        ({"instruction": "a", "output": 0, "text": "a b"}, "`output` is 0 - allowed: a string"),
        ({"instruction": ["a"], "output": "b"}, "`instruction` is a list - allowed: a string"),
        ({"question": "a", "answer": 2}, "`answer` is 2 - allowed: a string"),
        ({"question": {}, "answer": "b"}, "`question` is an object - allowed: a string"),
        ({"prompt": "a", "completion": [assistant("b")]}, "`completion` is a list - allowed: a string"),
        ({"prompt": [user("a")], "completion": "b"}, "`completion` is 'b' - allowed: a list of `role` and `content`"),
        ({"messages": "a"}, "`messages` is 'a' - allowed: a list of `role` and `content`"),
        ({"messages": ["a"]}, r"`messages\[0\]` is 'a' - allowed: an object with `role` and `content`"),
        ({"messages": [{"content": "a"}]}, r"`messages\[0\]\.role` is null or missing - allowed: system, "),
        ({"messages": [user("a"), {"role": "model", "content": "b"}]},
         r"`messages\[1\]\.role` is 'model' - allowed: system, developer, user, assistant, tool, function"),
        ({"messages": [{"role": ["user"], "content": "b"}]}, r"`messages\[0\]\.role` is a list - allowed: system"),
        ({"messages": [{"role": "user"}]}, r"`messages\[0\]\.content` is null or missing - allowed: a string"),
        ({"messages": [user("a"), {"role": "assistant", "content": PARTS}]}, r"`messages\[1\]\.content` is a list - "),
        ({"conversations": [{"from": "bot", "value": "a"}]}, r"`conversations\[0\]\.from` is 'bot' - allowed: human, "),
        ({"conversations": [{"from": "human"}]}, r"`conversations\[0\]\.value` is null or missing - allowed: a string"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(tmp_path, record, said):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, record])
    with pytest.raises(UserError, match=rf"a\.jsonl:2: {said}.* - mend the record or leave it out$"):
        find_source(source).read(0)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"txt": "a"}, r"\['txt'\]"),
        ({"instruction": "a"}, r"\['instruction'\]"),
        ({"prompt": "a", "chosen": "b"}, r"\['chosen', 'prompt'\]"),
        ([1], "list"),
        ("a", "str"),
        ({}, "dict"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, record, said):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}, record])
    with pytest.raises(
        UserError, match=rf"a\.jsonl:2 has the fields {said} - allowed: instruction/input/output, or messages"
    ):
        find_source(source).read(0)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": None},
        {"instruction": "q", "output": None, "text": "q a"},
        {"prompt": "q", "completion": None},
        {"question": "q", "answer": None},
        {"messages": [user("q"), {"role": "assistant", "content": None}]},
        {"messages": [user("q"), {"role": "assistant"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": None}]},
    ],
)
def test_no_answer_is_a_blank_one(record):
    assert checked_record(record, "") == {"messages": [user("q"), assistant("")]}


def test_what_calls_a_tool_keeps_its_fields():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    turns = [user("q"), call, {"role": "tool", "content": "2"}, assistant("a")]
    assert checked_record({"messages": turns}, "")["messages"] == [user("q"), call | {"content": ""}, *turns[2:]]
    assert call["content"] is None


def test_null_is_an_empty_text():
    assert checked_record({"text": None}, "") == {"text": ""}
    unanswered = {"prompt": [user("q")], "completion": None}
    assert checked_record(unanswered, "") == {"messages": [user("q")]}


def test_other_fields_of_a_record_are_left_out():
    assert checked_record({"text": "a", "url": 1}, "") == {"text": "a"}
    alpaca = {"instruction": "a", "input": None, "output": "b"}
    assert checked_record(alpaca, "") == {"messages": [user("a"), assistant("b")]}
    assert checked_record({"messages": TURNS, "id": 1}, "") == {"messages": TURNS}
