"""The parent answers beside others as it does alone, each prompt once, and stops where an answer ends."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from families import tiny
from texts import STRICT, TURNS, chat_tokenizer, write_jsonl
from transformers import GenerationConfig, PreTrainedModel

from layerscalpel import answers, checks, parallel, workbench
from layerscalpel.answerfile import AnswerFile
from layerscalpel.answers import Answering, end_tokens, prompt_of, write_answers
from layerscalpel.cli import main
from layerscalpel.config import build_config
from layerscalpel.continuations import Prompt, batches_of
from layerscalpel.decoder import load_decoder
from layerscalpel.encode import encode, template_of
from layerscalpel.errors import UserError
from layerscalpel.forms import Record

VOCABULARY = 320
"""More than `chat_tokenizer` knows, so that some tokens have no words."""
END, TURN_END = 0, 2
"""Ids of <|end|> and <|im_end|>."""
MOST = 8
GREEDY = Answering("greedy", MOST, 200, seed=0, batch_size=3)


def small(family: str = "llama") -> PreTrainedModel:
    return tiny(family, vocab_size=VOCABULARY, **({"max_position_embeddings": 400} if family == "llama" else {}))


def asked(question: str, answer: str = "the data's own words") -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def several(count: int = 7) -> list[Record]:
    """Return conversations whose prompts have several lengths."""
    return [asked("the question " + "x" * (7 * i % 23) + f"{i}") for i in range(count)]


def written(model: PreTrainedModel, records: list[Record], folder: Path, **changes: object) -> list[Record]:
    how = dataclasses.replace(GREEDY, **changes)
    return write_answers(model, chat_tokenizer(), records, how, AnswerFile(folder / "answers.jsonl"))


def last_words(records: list[Record]) -> list[str]:
    return [record["messages"][-1]["content"] for record in records]


@torch.no_grad()
def alone(model: PreTrainedModel, record: Record, most: int) -> tuple[list[int], bool]:
    """Return (ids, cut off) of a greedy answer, in whole forwards without a cache, one prompt at a time."""
    tokenizer = chat_tokenizer()
    text = template_of(tokenizer)(prompt_of(record["messages"]), True)
    ids, begin = tokenizer(text, add_special_tokens=False).input_ids, None
    begin = len(ids)
    while len(ids) - begin < most:
        token = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in (END, TURN_END):
            return ids[begin:], False
        ids.append(token)
    return ids[begin:], True


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2", "jamba"])
def test_answers_beside_others_are_those_alone(family, tmp_path):
    """Absolute positions, alibi, windows and recurrent states know nothing of a batch's other rows."""
    model, records = small(family), several()
    found = written(model, records, tmp_path)
    tokenizer = chat_tokenizer()
    for record, before in zip(found, records, strict=True):
        ids, cut_off = alone(model, before, MOST)
        words = tokenizer.decode(ids, skip_special_tokens=True)
        assert record["messages"] == [before["messages"][0], {"role": "assistant", "content": words.rstrip("\ufffd")}]
        assert (record["by_parent"], record["cut_off"]) == (True, cut_off)
    assert len(set(last_words(found))) > 3, "answers that depend on the prompt"


def test_answers_do_not_depend_on_how_many_are_written_at_once(tmp_path):
    model = small()
    found = [written(model, several(), tmp_path / f"{size}", batch_size=size) for size in (1, 3, 16)]
    assert found[0] == found[1] == found[2]


def test_rows_of_very_different_length_are_not_put_together():
    prompts = [Prompt(f"{size}", [5] * size, 4) for size in (90, 3, 35, 4, 36, 5, 6)]
    assert [[len(prompt.ids) for prompt in batch] for batch in batches_of(prompts, 3)] == [
        [3, 4, 5],
        [6, 35, 36],
        [90],
    ]


def test_an_answer_ends_where_the_model_ends_it(tmp_path):
    """Every prompt holds the token that ends a turn; only one that the model writes ends its answer."""
    model = small()
    with torch.no_grad():  # <|im_end|> is likely, so that many answers end
        model.get_output_embeddings().weight[TURN_END] *= 3
    records = several(16)
    found = written(model, records, tmp_path)
    ended = [record for record in found if not record["cut_off"]]
    assert 2 < len(ended) < 16
    for record, before in zip(found, records, strict=True):
        assert record["cut_off"] == alone(model, before, MOST)[1]
    tokenizer = chat_tokenizer()
    assert all(tokenizer.decode(encode(tokenizer, record)[0]).endswith("<|im_end|>\n") for record in ended)
    cut = next(record for record in found if record["cut_off"])
    assert not tokenizer.decode(encode(tokenizer, cut)[0]).endswith("<|im_end|>\n")


def test_the_last_answer_alone_is_written(tmp_path):
    """Texts pass; earlier answers and the system prompt stay; what came after the last answer is left out."""
    after = [*TURNS, {"role": "user", "content": "thanks"}]
    open_question = {"messages": TURNS[:2]}
    text = {"text": "the answer"}
    found = written(small(), [{"messages": after}, text, open_question], tmp_path)
    assert found[0]["messages"][:4] == TURNS[:4]
    assert len(found[0]["messages"]) == 5
    assert found[0]["messages"][4]["content"] != TURNS[4]["content"]
    assert found[1] is text
    assert found[2]["messages"][:2] == TURNS[:2]
    assert found[2]["messages"][2]["role"] == "assistant"


def test_a_prompt_that_leaves_no_room_is_not_answered(tmp_path):
    tokenizer = chat_tokenizer()
    record = asked("the question " * 9)
    size = len(tokenizer(template_of(tokenizer)(record["messages"][:1], True), add_special_tokens=False).input_ids)
    assert written(small(), [record], tmp_path, block_tokens=size) == [record]
    (found,) = written(small(), [record], tmp_path, block_tokens=size + 2)
    assert found["cut_off"]
    assert len(encode(tokenizer, found)[0]) <= size + 2


def test_what_the_template_refuses_comes_back(tmp_path):
    kept = AnswerFile(tmp_path / "answers.jsonl")
    records = [{"messages": TURNS}, {"messages": TURNS[1:]}]
    found = write_answers(small(), chat_tokenizer(STRICT), records, GREEDY, kept)
    assert found[0] is records[0]
    assert found[1]["by_parent"]


def test_the_checkpoints_own_settings_change_nothing(tmp_path):
    model = small()
    expected = written(model, several(3), tmp_path / "a")
    own = GenerationConfig(
        do_sample=True, temperature=0.3, repetition_penalty=1.8, max_length=5, num_beams=2, suppress_tokens=[5, 6]
    )
    model.generation_config = own
    assert written(model, several(3), tmp_path / "b") == expected
    assert model.generation_config is own


def test_logits_that_overflow_are_refused(tmp_path):
    model = small()
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = math.nan
    with pytest.raises(UserError, match=r"logits are not finite"):
        written(model, several(2), tmp_path)
    assert not (tmp_path / "answers.jsonl").exists()


# ---------------------------------------------------------------------------------------------- what ends an answer


def test_ends_are_those_of_tokenizer_checkpoint_and_template():
    model, tokenizer = small(), chat_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    assert end_tokens(model, tokenizer, template_of(tokenizer)) == [END, TURN_END, 7, 9]
    model.generation_config.eos_token_id = 8
    bare = chat_tokenizer(None)
    assert end_tokens(model, bare, template_of(bare)) == [END, 8]
    model.generation_config.eos_token_id = None
    plain = chat_tokenizer("{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}")
    assert end_tokens(model, plain, template_of(plain)) == [END], "a line break is not special"
    refusing = chat_tokenizer("{{ raise_exception('no') }}")
    assert end_tokens(model, refusing, template_of(refusing)) == [END]


@pytest.mark.slow
def test_the_demo_model_answers(tmp_path):
    model, tokenizer, _ = load_decoder("demo", device="cpu")
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end in end_tokens(model, tokenizer, template_of(tokenizer))
    records = [asked("What is the capital of France? Answer with one word."), asked("Say yes."), {"messages": TURNS}]
    kept = AnswerFile(tmp_path / "answers.jsonl")
    found = write_answers(model, tokenizer, records, Answering("greedy", 48, 512, 0), kept)
    assert "Paris" in last_words(found)[0]
    assert not found[0]["cut_off"]


# ---------------------------------------------------------------------------------------------- sampling


def test_samples_follow_the_models_distribution(tmp_path):
    """First tokens of many answers to one prompt, by chi-square; a likelier choice is far off."""
    model, tokenizer = small(), chat_tokenizer()
    prompt = Prompt("one", tokenizer("the question").input_ids, 1)
    how = Answering("sampled", 1, 200, seed=3)
    drawn = [ids for ids, _ in answers._generate(model, [prompt] * 4000, [], how)]
    found_V = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCABULARY).double()
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double()

    def deviation(logits_V: torch.Tensor) -> float:
        expected_V = logits_V.softmax(-1) * 4000
        chi_square = ((found_V - expected_V) ** 2 / expected_V).sum().item()
        return (chi_square - VOCABULARY + 1) / math.sqrt(2 * (VOCABULARY - 1))

    assert abs(deviation(logits_V)) < 4.5
    assert deviation(logits_V / 0.7) > 9


def test_the_seed_names_the_samples(tmp_path):
    model = small()
    found = [
        last_words(written(model, several(), tmp_path / name, how="sampled", seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert found[0] == found[1] != found[2]
    assert found[0] != last_words(written(model, several(), tmp_path / "d"))


# ---------------------------------------------------------------------------------------------- the file


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def never(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("written again")


def test_a_prompt_is_answered_once(tmp_path, monkeypatch):
    """Also where several records hold it, in one call or in the next; a new prompt is added."""
    model, records = small(), several(3)
    found = written(model, [*records, *records, asked(records[0]["messages"][0]["content"], "other words")], tmp_path)
    assert found[:3] == found[3:6]
    assert found[6] == found[0]
    assert len(lines_of(tmp_path)) == 3
    assert written(model, several(5), tmp_path)[:3] == found[:3]
    assert len(lines_of(tmp_path)) == 5
    monkeypatch.setattr(answers, "_generate", never)
    assert written(model, records, tmp_path) == found[:3]


@pytest.mark.parametrize("changes", [{"how": "sampled"}, {"max_tokens": 5}, {"seed": 1}, {"block_tokens": 16}])
def test_answers_written_otherwise_are_others(tmp_path, changes):
    model = small()
    written(model, several(1), tmp_path)
    written(model, several(1), tmp_path, **changes)
    assert len({line["key"] for line in lines_of(tmp_path)}) == 2


@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("left", [0, 4])
def test_an_interrupted_call_goes_on_to_the_same_answers(tmp_path, how, left):
    """A process was killed within a line; what it had not written is written as if it had gone on."""
    model = small()
    whole = written(model, several(), tmp_path / "whole", how=how)
    file = tmp_path / "whole" / "answers.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    torn = tmp_path / "cut" / "answers.jsonl"
    torn.write_text("".join(lines[:left]) + lines[left][:20], encoding="utf-8")
    assert written(model, several(), tmp_path / "cut", how=how) == whole
    kept = AnswerFile(torn)
    assert kept.answers == AnswerFile(file).answers
    assert not kept.torn
    assert written(model, several(), tmp_path / "cut", how=how) == whole


def test_half_a_character_is_no_damage(tmp_path):
    path = tmp_path / "answers.jsonl"
    row = {"key": "a", "answer": "naïve", "cut_off": False}
    path.write_bytes(json.dumps(row).encode() + b'\n{"key": "b", "answer": "\xc3')
    kept = AnswerFile(path)
    assert kept.answers == {"a": {"answer": "naïve", "cut_off": False}}
    kept.add([row | {"key": "c"}])
    assert set(AnswerFile(path).answers) == {"a", "c"}


# ---------------------------------------------------------------------------------------------- runs


def scalpel(world: Path, out: Path, *more: str) -> dict:
    source = write_jsonl(world / "asked.jsonl", several(60))
    given = ["--recipe", str(world / "recipe.yaml"), "--out", str(out), "--quiet", "--until", "heal", "--no-verify"]
    given += ["--segment", "2:4", "--healing", f"{source}=2,{world / 'texts.jsonl'}", "--set", "data.answer_tokens=6"]
    given += ["--set", "data.healing_block_tokens=64", "--set", "data.healing_blocks=12", *more]
    assert main(["run", str(world / "model"), *given]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["data"]


def test_a_run_heals_on_what_the_parent_answers(world, tmp_path, monkeypatch):
    greedy = ("--set", "data.answers=greedy")
    data = scalpel(world, tmp_path / "run", *greedy)
    for part in ("healing", "validation"):
        assert data[part]["answers"]["written"] > 0
        assert data[part]["answers"]["cut_off"] <= data[part]["answers"]["written"]
        assert len(data[part]["sources"]) == 2
    assert (tmp_path / "run" / "search" / "answers.jsonl").stat().st_size > 0
    given = scalpel(world, tmp_path / "given")
    assert given["healing"]["sha256"] != data["healing"]["sha256"]
    assert "answers" not in given["healing"]
    monkeypatch.setattr(answers, "_generate", never)
    assert scalpel(world, tmp_path / "run", *greedy, "--redo", "heal") == data


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_one_answers(world, tmp_path, monkeypatch, rank):
    settings = {"model.name": str(world / "model"), "data.answers": "greedy", "data.answer_tokens": 3}
    bench = workbench.Workbench(build_config([settings]), tmp_path, ["search"])
    bench.together, said = True, []
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "first_says", lambda value: said.append(value) or ["the first one's"])
    answer = bench.answer()
    assert answer is not None
    assert answer(several(2)) == ["the first one's"]
    assert [len(value) for value in said] == [0 if rank else 2]
    assert (tmp_path / "search" / "answers.jsonl").exists() == (rank == 0)


def test_a_model_that_is_not_in_memory_does_not_answer(world):
    source = write_jsonl(world / "asked.jsonl", several(4))
    texts = str(world / "texts.jsonl")
    settings = {"model.name": str(world / "model"), "data.healing": source, "data.answers": "sampled"}
    settings |= {"data.calibration": texts, "data.evaluation": texts, "search.method": "exact", "data.block_tokens": 16}
    settings |= {"data.healing_block_tokens": 64, "model.offload": "disk"}
    said = r"data\.answers=sampled writes token by token, .* model\.offload=disk - allowed: a model in memory, or data"
    with pytest.raises(UserError, match=said):
        checks.check_before_loading(build_config([settings]), ["search", "cut", "heal"])
    checks.check_before_loading(build_config([settings | {"heal.method": "none"}]), ["search", "cut", "heal"])
