"""Shared runs of words are found exactly, and no text that a model was made with is text that it is measured on."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import pytest
from texts import SMALL, word_tokenizer, write_jsonl
from world import WORDS

from layerscalpel.checks import text_needed
from layerscalpel.config import build_config
from layerscalpel.data import Parts, prepare_blocks
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import fingerprints
from layerscalpel.overlap import RUN, Grams, overlaps, words_of


def naive(seen: list[str], text: str, run: int) -> bool:
    def runs(one: str) -> set[tuple[str, ...]]:
        words = words_of(one)
        return {tuple(words[i : i + run]) for i in range(len(words) - run + 1)}

    return bool(runs(text) & set().union(*map(runs, seen)))


def drawn(draw: random.Random, letters: str, most: int = 40) -> str:
    return " ".join(draw.choices(letters, k=draw.randint(0, most)))


@pytest.mark.parametrize("run", [2, 3, 5, 8, 13])
def test_runs_are_found_as_by_looking_at_each(run):
    draw, met = random.Random(run), 0
    for _ in range(250):
        letters = "abcdefgh"[: draw.choice([2, 3, 6])]
        seen = [drawn(draw, letters) for _ in range(draw.randint(0, 6))]
        grams = Grams("text", run)
        for text in seen:
            grams.add(text)
        quoted = draw.choice(seen).split()[: draw.choice([0, run - 1, run])] if seen else []
        text = " ".join([drawn(draw, letters), *quoted, drawn(draw, letters)])
        assert grams.meet(text) == naive(seen, text, run)
        met += grams.meet(text)
    assert 20 < met < 240


def test_a_run_of_thirteen_words_is_needed_and_enough():
    words = [f"w{i}" for i in range(40)]
    grams = Grams("text")
    grams.add(" ".join(words))
    for start in (0, 7, 27):
        assert grams.meet("other " + " ".join(words[start : start + RUN]) + " words")
        assert not grams.meet("other " + " ".join(words[start : start + RUN - 1]) + " words")
    assert not grams.meet(" ".join([*words[:12], "new", *words[13:25]]))
    assert not grams.meet("")


def test_case_and_punctuation_do_not_hide_an_overlap():
    grams = Grams("text")
    grams.add("The cat, which had slept all day, got up; it didn't look at the bird - nor at me.")
    assert grams.meet("THE CAT which had slept  all day got up:\nit didn’t look at THE bird")
    assert words_of("It didn't - snake_case, (1,000)!") == ["it", "didnt", "snakecase", "1000"]


def test_runs_stand_within_one_text_and_later_texts_count():
    words = [f"w{i}" for i in range(20)]
    grams = Grams("text")
    grams.add(" ".join(words[:10]))
    grams.add(" ".join(words[10:]))
    assert not grams.meet(" ".join(words))
    grams.add(" ".join(words))
    assert grams.meet(" ".join(words))


def test_items_that_overlap_are_counted_by_task():
    long = " ".join(f"w{i}" for i in range(30))
    grams = Grams("text")
    grams.add(long)
    found = overlaps({"piqa": [long, "short", f"q {long}"], "arc": ["n " * 20]}, grams)
    assert found == {
        "piqa": {"num_items": 3, "overlapping": 2, "too_short": 1},
        "arc": {"num_items": 1, "overlapping": 0, "too_short": 0},
    }


# ---------------------------------------------------------------------------------------------- the parts of a run


def sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=30)) for _ in range(count)]


def parts_of(path, evaluation: list | str, calibration: list, healing: list) -> Parts:
    """Return the parts of texts or records; evaluation may be named by its files."""
    given = {"evaluation": evaluation, "calibration": calibration, "healing": healing}
    for name, rows in given.items():
        if not isinstance(rows, str):
            records = [{"text": text} if isinstance(text, str) else text for text in rows]
            given[name] = write_jsonl(path / f"{name}.jsonl", records)
    settings = replace(SMALL, **given)
    return prepare_blocks(word_tokenizer(), settings, num_calibration=6, seed=0)


def test_text_that_shares_a_run_with_held_out_text_makes_no_model(tmp_path):
    held, own, other = sentences(6, 0), sentences(40, 1), sentences(40, 2)
    clean = parts_of(tmp_path, held, own, other)
    assert clean.evaluation.dropped == clean.calibration.dropped == clean.healing.dropped == {}
    quoted = [f"new start {text} new end" for text in held]
    asked = [{"instruction": "continue", "output": f"so {text}"} for text in held]
    found = parts_of(tmp_path, held, own + quoted[:3], other + quoted[3:] + asked)
    assert found.healing.dropped == {"overlapping held-out text": 9}
    assert found.calibration.dropped.keys() <= {"overlapping held-out text"}
    assert found.healing.num_documents + found.validation.num_documents == 40
    assert (found.evaluation.tokens == clean.evaluation.tokens).all(), "held-out text depends on nothing else"


def test_long_texts_share_no_run_with_what_made_the_model(tmp_path):
    held, other = sentences(60, 0), sentences(40, 2)
    quoted = [f"so {text}" for text in held]
    found = parts_of(tmp_path, held, sentences(40, 1), other + quoted)
    left = [record["text"] for record, _, _ in found.rest.encoded()]
    assert found.rest.dropped == {"overlapping text that healed or calibrated": 60 - found.evaluation.num_documents}
    assert left == []


def test_other_processes_are_told_what_was_drawn(tmp_path):
    """Sources that stream cannot be sent, and need not be: only the first process draws."""
    found = parts_of(tmp_path, sentences(20, 0), sentences(40, 1), sentences(40, 2))
    found.rest.drawer.readers["stream"] = (x for x in ())
    again = pickle.loads(pickle.dumps(found))
    assert (again.healing.tokens == found.healing.tokens).all()


# ---------------------------------------------------------------------------------------------- mixes


def test_evaluation_mixes_have_blocks_of_one_source_each_in_their_share(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text} for text in sentences(60, i)]) for i in (5, 6)]
    mix = f"{files[0]}=2,{files[1]}=1"
    found = parts_of(tmp_path, mix, sentences(40, 1), sentences(40, 2)).evaluation
    assert found.domains == tuple(files[i] for i in (0, 1, 0, 0, 1, 0))
    assert found.first(2).domains == found.domains[:2]
    assert found.sources == {files[0]: 4 * 16, files[1]: 2 * 16}
    assert found.source == mix
    alone = parts_of(tmp_path, files[0], sentences(40, 1), sentences(40, 2)).evaluation
    assert alone.domains == ()
    assert (alone.tokens[:4] == found.tokens[[0, 2, 3, 5]]).all()


def test_a_mix_whose_source_ends_is_refused_by_its_name(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text} for text in sentences(n, i)]) for i, n in ((5, 60), (6, 1))
    ]
    with pytest.raises(UserError, match=r"6\.jsonl has text for 1 of its share of 6 blocks of 16 tokens"):
        parts_of(tmp_path, ",".join(files), sentences(40, 1), sentences(40, 2))


def test_every_source_of_a_mix_is_checked_and_part_of_the_fingerprint(tmp_path):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": "a"}]) for i in (5, 6)]
    config = build_config([{"model.name": "demo", "data.evaluation": f"{files[0]}=2,{files[1]}"}])
    assert text_needed(config, ["evaluate"])["evaluation"] == files
    before = fingerprints(config)
    write_jsonl(tmp_path / "6.jsonl", [{"text": "b"}])
    assert fingerprints(config)["search"] != before["search"]
