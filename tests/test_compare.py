"""Runs beside each other: grouped over seeds, told apart by paired tests, what does not compare left out and said."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from comparing import NUM_BLOCKS, best_of, blocks_of, group_of, printed, run_of
from findings import EVIL, full_results, old_results, quantity, two_run_results
from taskfiles import write_tasks
from test_cli import refused
from tokenizers import Tokenizer
from world import byte_tokenizer, write_model

from layerscalpel import exam, sweep, yardstick
from layerscalpel.byblock import load_blocks, save_blocks, token_identity
from layerscalpel.cli import main
from layerscalpel.compare import Comparison, compare
from layerscalpel.comparepage import render_comparison
from layerscalpel.comparewords import markdown
from layerscalpel.config import build_config, to_dict
from layerscalpel.errors import UserError
from layerscalpel.gather import BASELINE, Group, Run, grouped, read_run
from layerscalpel.items import TaskResult
from layerscalpel.paired import DRAWS


def test_blocks_are_read_as_they_were_written(tmp_path: Path) -> None:
    for written in (blocks_of(0.4), blocks_of(0.4, kl_N=None, agreement_N=None)):
        path = save_blocks(tmp_path, "healed", written)
        read = load_blocks(tmp_path, "healed")
        assert (read.text, read.tokenizer) == (written.text, written.tokenizer)
        assert torch.equal(read.nll_N, written.nll_N)
        assert read.kl_N is written.kl_N or torch.equal(read.kl_N, written.kl_N)  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"):
        load_blocks(tmp_path, "healed")


def other_tokenizer() -> Any:
    """Return the byte tokenizer with two ids swapped: as many tokens, other meanings."""
    changed = byte_tokenizer()
    plain = json.loads(changed.backend_tokenizer.to_str())
    vocab = plain["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    changed._tokenizer = Tokenizer.from_str(json.dumps(plain))
    return changed


def test_tokenizers_are_told_apart_by_what_they_give() -> None:
    assert token_identity(byte_tokenizer()) == token_identity(byte_tokenizer())
    assert token_identity(byte_tokenizer()) != token_identity(other_tokenizer())


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    runs = [run_of("a"), run_of("a", seed=1), run_of("b"), run_of("a", seed=1)]
    elsewhere = run_of("a", seed=2)
    elsewhere.settings["model"] = {"name": "demo", "device": "cuda"}  # type: ignore[index]
    groups, notes = grouped([*runs, elsewhere])
    assert [(group.name, sorted(group.runs)) for group in groups] == [("a and 2 more", [0, 1, 2]), ("b", [0])]
    assert notes == ["a is named twice: it counts once"]


def test_seeds_have_a_mean_and_a_spread() -> None:
    group = group_of(run_of("a", 0.4), run_of("a", 0.5, seed=1, text="other"))
    row = next(row for row in compare([group]).rows if row.model == "healed")
    found = row.figure("kl_nats")
    assert found == pytest.approx({"value": 0.45, "se": 0.05, "n": 128, "num_seeds": 2, "sd": 0.05 * 2**0.5})
    ratio = row.figure("ppl_ratio")
    assert ratio is not None
    assert (ratio["sd"], ratio["se"]) == (0, group.first.results["evaluate"]["healed"]["ppl_ratio"]["se"])
    assert "sd 0.071" in printed(compare([group]))


@pytest.mark.parametrize("turned", [False, True])
def test_the_best_is_marked_where_the_test_tells_it(turned: bool) -> None:
    groups = [group_of(run_of("good", 0.44)), group_of(run_of("worse", 0.48)), group_of(run_of("bad", 0.7))]
    found = compare(groups[::-1] if turned else groups)
    assert sorted(best_of(found)) == ["good cut", "good healed"]
    one = next(item for item in found.to_dict()["differences"] if item["other"] == "worse healed")
    assert (one["best"], one["n"]) == ("good healed", NUM_BLOCKS)
    assert one["value"] == pytest.approx(-0.04)
    assert one["p_value"] == 2 / (1 + DRAWS)
    assert "0.44 ± 0.02 *" in printed(found)


@pytest.mark.parametrize(
    ("why", "good", "worse"),
    [
        ("noise", {"spread": 0.4}, {"spread": 0.4}),
        ("the same", {}, {"kl": 0.44}),
        ("few blocks", {"num_blocks": 4}, {"num_blocks": 4}),
    ],
)
def test_no_best_is_marked_where_none_can_be_told(why: str, good: dict[str, Any], worse: dict[str, Any]) -> None:
    worse = {"kl": 0.48} | worse
    found = compare([group_of(run_of("good", 0.44, **good)), group_of(run_of("worse", **worse))])
    assert best_of(found) == [], why
    assert found.contests


def test_every_seed_must_agree() -> None:
    def pair(*kls: float) -> Comparison:
        runs = [run_of("good", 0.44 if kl else 0.6, seed=seed, text=f"{seed}") for seed, kl in enumerate(kls)]
        others = [run_of("worse", kl or 0.55, seed=seed, text=f"{seed}") for seed, kl in enumerate(kls)]
        return compare([group_of(*runs), group_of(*others)])

    assert best_of(pair(0.6, 0.6)) == ["good cut", "good healed"]
    found = pair(0.6, 0.6, 0.0)
    assert found.contests[0].differences[0][1].p_value < 0.05  # type: ignore[union-attr]
    assert best_of(found) == []


def test_unequal_budgets_and_healing_do_not_compete() -> None:
    less = full_results()
    less["segment"], less["segments"] = [13, 15], [[13, 15]]
    found = compare([group_of(run_of("six")), group_of(run_of("two", 0.1, results=less))])
    assert found.contests == ()


def test_what_was_measured_on_other_text_is_left_out() -> None:
    found = compare([group_of(run_of("a")), group_of(run_of("b", text="other"))])
    assert found.notes == (
        "b was measured on other held-out text than a: its KL, agreement and perplexity are left out",
    )
    assert [row.figure("kl_nats") is None for row in found.rows] == [False, False, True, True]
    assert found.contests == ()


def test_what_was_timed_in_another_way_is_left_out() -> None:
    other = full_results()
    other["benchmark"]["device"] = "cuda"
    found = compare([group_of(run_of("a")), group_of(run_of("b", results=other))])
    assert found.notes == ("b was timed with another device than a: its speed-ups are left out",)
    assert [bool(row.figure("decode_speedup")) for row in found.rows if row.model == "healed"] == [True, False]


def test_other_seeds_are_shown_and_not_tested() -> None:
    found = compare([group_of(run_of("a")), group_of(run_of("b", 0.5, seed=1, text="other"))])
    assert all(row.figure("kl_nats") for row in found.rows)
    assert found.notes[0] == "seeds differ (a: 0; b: 1): tests take those that both have"
    assert any("b healed is not tested: they have no seed in common" in note for note in found.notes)
    assert best_of(found) == []


def test_figures_by_block_that_are_not_there_are_missed() -> None:
    old = run_of("old", 0.5)
    old.read.update({(load_blocks, model): None for model in ("parent", "cut", "healed")})
    found = compare([group_of(run_of("new")), group_of(old)])
    assert any("old healed is not tested: no figures by block were kept" in note for note in found.notes)


def test_tokens_of_other_tokenizers_do_not_compare() -> None:
    with pytest.raises(UserError, match="the tokenizers of a and b differ"):
        compare([group_of(run_of("a")), group_of(run_of("b", tokenizer="two"))])


def test_several_parents_are_said_and_their_models_do_not_compete() -> None:
    other = full_results()
    other["parent"]["name"] = "another"
    found = compare([group_of(run_of("a")), group_of(run_of("b", 0.7, results=other))])
    assert found.notes[0].startswith("the parents differ (demo, another)")
    assert (len(found.parents), found.contests) == (2, ())


def test_a_baseline_is_tested_and_does_not_compete() -> None:
    small = run_of("small", 0.2)
    evaluated = {BASELINE: {"kl_nats": quantity(0.2, 0.01)}}
    baseline = Run(Path("small"), small.results | {"evaluate": evaluated, "model": {"parameters": 7}}, small.settings)
    baseline.read[load_blocks, BASELINE] = blocks_of(0.2)
    groups = [group_of(run_of("a")), group_of(run_of("b", 0.6))]
    found = compare(groups, [Group("small", BASELINE, {0: baseline})])
    assert best_of(found) == ["a cut", "a healed"]
    against = [(one["best"], one["value"]) for one in found.to_dict()["differences"] if one["other"] == "small"]
    assert against == [("a cut", pytest.approx(0.24)), ("a healed", pytest.approx(0.24))]


def test_the_table_tells_segments_failures_and_speed() -> None:
    failed = full_results()
    failed["heal"]["failed"] = True
    failed["benchmark"]["speedup"]["decode"] = quantity(1.2345, 0.2, 5)
    results = {"one": failed, "two": two_run_results(), "old": old_results()}
    found = compare([group_of(run_of(name, results=item)) for name, item in results.items()])
    said = printed(found)
    assert said.count("endpoint, both (failed)") == 1
    assert "[10, 12) + [17, 21)" in said
    assert "1.23" not in said
    assert "No difference in speed is told where a ratio is no further from 1 than Student's t" in said


def test_pages_are_whole_and_escaped() -> None:
    found = compare([group_of(run_of(EVIL)), group_of(run_of("b|c", 0.7))], notes=[EVIL])
    page = render_comparison(found)
    assert "<script>" not in page
    assert not any(word in page for word in ("http:", "https:", "src=", "@import"))
    assert page.count('class="number best"') == 2
    lines = markdown(found).splitlines()
    table = [line for line in lines if line.startswith("|")][: 2 + 1 + 4]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["best"] == ["kl_nats"]


# The command line, on one folder of finished runs.

SHARED, APART = (
    next(seed for seed in range(99) if (random.Random(seed).randint(0, 6) == 6) is same) for same in (True, False)
)
"""Seeds with which the search `random` takes the last two of eight layers, and others."""
SHORT = ["evaluate.sample_tokens=0", "evaluate.long_blocks=0", "benchmark.enabled=false", "cut.proof=none"]
SHORT += ["search.gate_blocks=4", "data.healing_blocks=4", "data.evaluation_blocks=8"]


def methods(world: Path, *more: str, names: str = "last,random", seeds: str = f"{SHARED},{APART}") -> int:
    command = ["compare", str(world / "model"), "--methods", names, "--seeds", seeds, "--out", str(world / "all")]
    settings = [word for text in SHORT for word in ("--set", text)]
    return main([*command, "--recipe", str(world / "recipe.yaml"), *settings, "--quiet", *more])


@pytest.fixture(scope="module")
def swept(world: Path) -> Iterator[Path]:
    """The folder of a finished comparison of methods; read by tests and changed by none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerscalpel.report._figures", lambda results: {})
        assert methods(world) == 0
        yield world / "all"


def test_methods_share_what_they_choose_alike(swept: Path) -> None:
    found = json.loads((swept / "compare.json").read_text(encoding="utf-8"))
    assert len(list((swept / "segments").iterdir())) == 3
    assert len(list((swept / "searches").iterdir())) == 4
    assert [(row["method"], row["model"]) for row in found["rows"]] == [
        (method, model) for method in ("last", "random") for model in ("cut", "healed")
    ]
    assert all(row["seeds"] == [SHARED, APART] for row in found["rows"])
    assert any(note.startswith(f"last and random chose the same with seed {SHARED}") for note in found["notes"])
    paths = [row["runs"] for row in found["rows"]]
    assert paths[0][0] == paths[2][0]
    assert paths[0][1] != paths[2][1]
    measured = [read_run(path).results["evaluate"]["healed"]["kl_nats"]["value"] for path in paths[1]]
    assert found["rows"][1]["kl_nats"]["value"] == pytest.approx(sum(measured) / 2)


def test_finished_runs_are_not_run_again(world: Path, swept: Path, monkeypatch, capsys) -> None:
    before = (swept / "compare.json").read_text(encoding="utf-8")
    monkeypatch.setattr(sweep, "run", lambda *_, **__: pytest.fail("a finished run ran again"))
    assert methods(world, "--json") == 0
    assert capsys.readouterr().out == before
    assert methods(world) == 0
    assert "random" in capsys.readouterr().out


def test_run_directories_compare_as_the_methods_did(swept: Path, tmp_path: Path, capsys) -> None:
    folders = sorted(map(str, (swept / "segments").iterdir()))
    assert main(["compare", *folders, "--out", str(tmp_path / "page"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sorted(row["name"] for row in rows if row["model"] == "healed") == sorted(
        [
            next(path for path in folders if "/6-8-" not in path),
            f"{next(p for p in folders if '/6-8-' in p)} and 1 more",
        ]
    )
    assert {path.name for path in (tmp_path / "page").iterdir()} == {"compare.html", "compare.md", "compare.json"}


def test_figures_by_block_agree_with_those_of_the_run(swept: Path) -> None:
    run = read_run(next((swept / "segments").iterdir()))
    blocks, found = run.blocks("healed"), run.results["evaluate"]["healed"]
    assert blocks is not None
    assert blocks.kl_N is not None
    assert blocks.agreement_N is not None
    assert blocks.text == run.text
    assert blocks.kl_N.mean().item() == pytest.approx(found["kl_nats"]["value"])
    assert blocks.agreement_N.mean().item() == pytest.approx(found["top1_agreement_fraction"]["value"])


def test_a_smaller_model_is_a_row(swept: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    small = write_model(tmp_path / "small", num_hidden_layers=2, layer_types=None)
    command = ["compare", *map(str, (swept / "segments").iterdir()), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*command, "--baseline", str(small), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["rows"][-1]
    assert (row["model"], row["name"]) == (BASELINE, "small")
    assert row["kl_nats"]["num_seeds"] == 2
    assert any(one["other"] == "small" and one["measure"] == "kl_nats" for one in found["differences"])
    assert any(
        re.search(r"small has [\d,]{6,} parameters and .* [\d,]{6,}: the sizes", note) for note in found["notes"]
    )
    monkeypatch.setattr(yardstick, "load_decoder", lambda *_, **__: pytest.fail("measured twice"))
    assert main([*command, "--baseline", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_baseline_is_measured_anew_where_anything_differs(swept: Path, tmp_path: Path) -> None:
    model, tasks, run = write_model(tmp_path / "model"), write_tasks(tmp_path / "tasks"), tmp_path / "run"
    run.mkdir()
    results = read_run(next((swept / "segments").iterdir())).results

    def key(**changes: Any) -> list[Any]:
        """Return what the baseline depends on, of a run with these settings."""
        given = {"model.name": str(model), "evaluate.tasks": f"{tasks}/colours.yaml", "model.device": "cpu"} | changes
        settings = to_dict(build_config([given]))
        (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        own = Run(run, results | {"parent": results["parent"] | {"name": str(model)}}, settings)
        return yardstick.key_of(yardstick.Yardstick(str(model), own), own)

    keys = [key()]
    assert key() == keys[0] == json.loads(json.dumps(keys[0]))
    keys += [key(**{"model.dtype": "float16"}), key(**{"evaluate.limit": 3})]
    os.utime(model / "model.safetensors", ns=(1, 1))
    keys.append(key())
    with (tasks / "colours.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n")
    keys.append(key())
    results["evaluate"]["harness"] = {"tasks": {"colours": {"definition": "another"}}}
    keys.append(key())
    assert len(set(map(json.dumps, keys))) == len(keys)


def test_the_parent_as_baseline_is_itself(world: Path, swept: Path, tmp_path: Path, capsys) -> None:
    folder = next((swept / "segments").iterdir())
    command = ["compare", str(folder), "--baseline", str(world / "model"), "--out", str(tmp_path), "--quiet", "--json"]
    assert main(command) == 0
    row = json.loads(capsys.readouterr().out)["rows"][-1]
    assert row["kl_nats"]["value"] == 0
    assert row["ppl_ratio"]["value"] == 1


def test_a_baseline_with_other_tokens_has_nothing_to_compare(swept: Path, tmp_path: Path, capsys) -> None:
    other = write_model(tmp_path / "other")
    other_tokenizer().save_pretrained(other)
    folder = str(next((swept / "segments").iterdir()))
    said = refused(capsys, "compare", folder, "--baseline", other, "--out", tmp_path / "out", "--quiet")
    assert "differs from that of the runs, and they measured no tasks, so nothing compares" in said


def test_tasks_are_asked_of_a_parent_once(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    own, asked = exam.measure, []

    def watched(model: Any, tokenizer: Any, task: Any, how: Any, *, label: str) -> TaskResult:
        asked.append(label.partition(",")[0])
        return own(model, tokenizer, task, how, label=label)

    monkeypatch.setattr(exam, "measure", watched)
    monkeypatch.setattr("layerscalpel.report._figures", lambda results: {})
    tasks, out = write_tasks(tmp_path / "tasks") / "colours.yaml", tmp_path / "out"
    other = write_model(tmp_path / "other")
    other_tokenizer().save_pretrained(other)
    flags = ["--tasks", str(tasks), "--set", "heal.method=none", "--out", str(out), "--baseline", str(other)]
    assert methods(world, *flags, "--json", seeds=f"{APART}") == 0
    assert asked == ["parent", "cut", "cut", BASELINE]
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == ["colours"]
    assert (
        "other has another tokenizer than the runs: KL, agreement and perplexity are by token and left out"
        in (found["notes"])
    )
    row = found["rows"][-1]
    assert row["model"] == BASELINE
    assert "plain_fraction" in row
    assert "kl_nats" not in row
    pairs = [(one["best"], one["other"]) for one in found["differences"] if one["measure"] == "plain_fraction"]
    assert {other for _, other in pairs} >= {"other"}
    assert len(pairs) == 2


def test_bad_methods_end_with_one_line(world: Path, capsys) -> None:
    def said(*flags: str) -> str:
        return refused(capsys, "compare", world / "model", "--out", world / "never", *flags)

    assert "there is no search 'angulr' - did you mean 'angular'?" in said("--methods", "last,angulr")
    assert "names last twice" in said("--methods", "last,last")
    assert "--seeds 0,x is no list of seeds" in said("--methods", "last", "--seeds", "0,x")
    assert "allowed: --layers or --rate" in said("--methods", "last", "--set", "target.max_kl=1")
    assert "at least 2 must stay" in said("--methods", "last", "--layers", "7")
    assert "takes one MODEL, not 2" in refused(capsys, "compare", "a", "b", "--methods", "last", "--out", "c")
    assert "--layers would be settings of new runs - add --methods" in said("--layers", "2")
    assert "--seeds is for --methods" in said("--seeds", "1")
    assert "needs the folder of its runs: --out DIR" in refused(capsys, "compare", "model", "--methods", "last")
    assert not (world / "never").exists()


def test_bad_folders_end_with_one_line(swept: Path, tmp_path: Path, capsys) -> None:
    finished = next((swept / "segments").iterdir())
    assert "is this a run directory" in refused(capsys, "compare", finished, tmp_path)
    searched = next((swept / "searches").iterdir())
    assert f"run directory {searched} holds no models yet" in refused(capsys, "compare", finished, searched)
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    (tmp_path / "results.json").write_text(json.dumps({k: v for k, v in results.items() if k != "evaluate"}))
    assert f"were not evaluated - do it first: scalpel evaluate {tmp_path}" in refused(capsys, "compare", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"model": {}, "evaluate": {"model": {}}}))
    assert "of one model alone - allowed: run directories" in refused(capsys, "compare", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for content, why in (("x", "holds no sections"), ("seed: zero", "seed='zero' is not a whole number")):
        (tmp_path / "config.yaml").write_text(content, encoding="utf-8")
        said = refused(capsys, "compare", tmp_path)
        assert f"the settings in {tmp_path / 'config.yaml'} cannot be read" in said
        assert why in said
    (tmp_path / "config.yaml").write_text("seed: 0", encoding="utf-8")
    assert main(["compare", str(finished), str(tmp_path)]) == 0
    assert "so give the folder that keeps it: --out DIR" in refused(capsys, "compare", finished, "--baseline", "demo")
    said = refused(capsys, "compare", finished, "--baseline", tmp_path / "nothing", "--out", tmp_path / "out")
    assert "there is no model at" in said
