"""The whole path on a tiny model: the contract of results.json, resuming, redoing, and what an interruption leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import write_texts

from layerscalpel import aside, checkpoint, stages, training
from layerscalpel.cli import main
from layerscalpel.fingerprint import STAGES


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, without_drawings) -> None:
    """Only `finished`, which is made before this is set, is cut beside a fresh process and has a page with drawings."""
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """A finished run, read by many tests and changed by none."""
    assert scalpel(world, "run", "finished", verify=True) == 0
    return world / "finished"


@pytest.fixture(scope="module")
def last_layers(world: Path) -> Path:
    """A run of another search, evaluated without long texts; read by tests and changed by none."""
    off = ["--set", "evaluate.long_blocks=0", "--search", "last", "--until", "evaluate"]
    assert scalpel(world, "run", "last", *off) == 0
    return world / "last"


def scalpel(world: Path, command: str, out: str, *more: str, verify: bool = False) -> int:
    """Run a command; only where `verify` is on is the cut proven, which takes a fresh process."""
    shared = ["--recipe", str(world / "recipe.yaml"), "--out", str(world / out), "--quiet", *more]
    skip = ["--no-verify"] if command == "run" and not verify else []
    return main([command, str(world / "model"), *shared, *skip])


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_results_have_the_agreed_form(finished: Path) -> None:
    results = results_of(finished)
    assert {"parent", "segment", "search", "cut", "heal", "evaluate", "benchmark"} <= set(results)
    assert {"name", "num_layers", "parameters", "bytes"} <= set(results["parent"])
    start, stop = results["segment"]
    assert stop - start == 2
    assert results["search"]["method"] == "clp"
    assert set(results["search"]["scores"]) == {str(start) for start in range(7)}
    assert all(set(score) == {"kl_nats", "se", "num_blocks"} for score in results["search"]["scores"].values())
    assert set(results["evaluate"]) >= {"parent", "cut", "healed"}
    for name in ("cut", "healed"):
        for measure in ("kl_nats", "top1_agreement_fraction", "ppl", "ppl_ratio", "ppl_ratio_growth"):
            assert set(results["evaluate"][name][measure]) == {"value", "se", "n"}


def test_long_texts_are_measured_by_position(finished: Path) -> None:
    results = results_of(finished)
    rows = {name: results["evaluate"][name]["by_position"] for name in ("parent", "cut", "healed")}
    assert all([(row["from"], row["to"]) for row in bins] == [(1, 64), (64, 128)] for bins in rows.values())
    assert not any("ppl_ratio" in row for row in rows["parent"])
    assert all(set(row["ppl_ratio"]) == {"value", "se", "n"} for row in rows["cut"] + rows["healed"])
    assert (results["data"]["long"]["num_blocks"], results["data"]["long"]["joined"]) == (2, False)
    assert "long_note" not in results["evaluate"]
    assert "Far into a text" in (finished / "report.html").read_text(encoding="utf-8")


def test_too_little_text_for_a_long_one_ends_no_run(world: Path, capsys) -> None:
    text = write_texts(world / "few.jsonl", count=30, seed=1)
    few = ["--set", "evaluate.long_blocks=999", "--set", f"data.evaluation={text}", "--search", "last"]
    assert scalpel(world, "run", "few-long", *few, "--until", "evaluate") == 0
    results = results_of(world / "few-long")
    assert 0 < results["data"]["long"]["num_blocks"] < 999
    assert "of 999 texts of 128 tokens" in results["evaluate"]["long_note"]
    assert "of 999 texts of 128 tokens" in " ".join(capsys.readouterr().out.split())


def test_a_long_text_past_the_context_is_refused_before_anything_is_read(world: Path, capsys) -> None:
    assert scalpel(world, "run", "too-long", "--set", "evaluate.context_tokens=129") == 2
    assert "129 tokens are longer than the model's context of 128 - lower evaluate.context" in capsys.readouterr().err


def test_the_long_check_changes_no_other_text(finished: Path, last_layers: Path) -> None:
    results = results_of(last_layers)
    assert "by_position" not in results["evaluate"]["healed"]
    assert "long" not in results["data"]
    hashes = {part: found["sha256"] for part, found in results_of(finished)["data"].items() if part != "long"}
    assert {part: found["sha256"] for part, found in results["data"].items()} == hashes


def test_stages_that_did_not_run_are_absent(finished: Path) -> None:
    assert "stitch" not in results_of(finished)
    assert "quantize" not in results_of(finished)


def test_every_stage_ends_with_done_json_and_no_drafts_stay(finished: Path) -> None:
    assert all((finished / stage / "done.json").is_file() for stage in STAGES)
    assert not [path for path in finished.rglob("*") if "draft" in path.name or path.name == "started.json"]


def test_the_run_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "provenance.json", "events.jsonl", "results.json", "report.html", "README.md"} <= names
    assert (finished / "heal" / "model" / "README.md").is_file()


@pytest.mark.parametrize("stage", ["cut", "heal"])
def test_checkpoints_load_as_any_user_loads_them(finished: Path, stage: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / stage / "model")
    assert model.config.num_hidden_layers == 6
    assert AutoTokenizer.from_pretrained(finished / stage / "model")("dusk").input_ids


def test_healed_differs_from_cut_at_the_seam_only(finished: Path) -> None:
    cut, healed = (AutoModelForCausalLM.from_pretrained(finished / s / "model").state_dict() for s in ("cut", "heal"))
    changed = {name.split(".")[2] for name in cut if not torch.equal(cut[name], healed[name])}
    start = results_of(finished)["segment"][0]
    assert changed == {str(i) for i in (start - 1, start) if 0 <= i < 6}


def test_parts_do_not_overlap(finished: Path) -> None:
    data = results_of(finished)["data"]
    assert len({part["sha256"] for part in data.values()}) == 5


def test_a_finished_run_prints_its_table_without_torch(finished: Path, world: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from layerscalpel.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["run", str(world / "model"), "--recipe", str(world / "recipe.yaml"), "--out", str(finished)]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "healed" in done.stdout


def test_json_output_is_results_json(finished: Path, world: Path, capsys) -> None:
    assert scalpel(world, "run", "finished", "--json", verify=True) == 0
    assert json.loads(capsys.readouterr().out) == results_of(finished)


def test_until_stops_and_the_rest_goes_on_later(world: Path, monkeypatch) -> None:
    assert scalpel(world, "run", "later", "--until", "cut") == 0
    assert "heal" not in results_of(world / "later")
    monkeypatch.setattr(stages, "search", lambda *_: pytest.fail("a finished stage ran again"))
    monkeypatch.setattr(stages, "cut", lambda *_, **__: pytest.fail("a finished stage ran again"))
    assert scalpel(world, "run", "later", "--until", "heal") == 0
    assert "heal" in results_of(world / "later")


def test_the_same_settings_give_the_same_results(finished: Path, world: Path) -> None:
    assert scalpel(world, "run", "again", "--until", "heal") == 0
    first, second = results_of(finished), results_of(world / "again")
    assert first["search"]["scores"] == second["search"]["scores"]
    assert first["heal"]["train"] == second["heal"]["train"]


def test_other_settings_in_the_same_folder_are_refused_and_named(world: Path, capsys) -> None:
    assert scalpel(world, "run", "settings", "--until", "cut") == 0
    before = results_of(world / "settings")
    assert scalpel(world, "run", "settings", "--until", "cut", "--seed", "5") == 2
    message = capsys.readouterr().err
    assert "seed: 0 -> 5" in message
    assert "--redo search" in message
    assert results_of(world / "settings") == before


def test_redo_takes_other_settings_and_drops_what_followed(world: Path) -> None:
    assert scalpel(world, "run", "redo", "--until", "heal") == 0
    assert scalpel(world, "run", "redo", "--until", "cut", "--redo", "search", "--search", "last") == 0
    results = results_of(world / "redo")
    assert results["search"]["method"] == "last"
    assert results["segment"] == [6, 8]
    assert "heal" not in results


def test_a_refused_redo_leaves_what_is_finished(world: Path) -> None:
    assert scalpel(world, "run", "kept", "--until", "heal") == 0
    before = results_of(world / "kept")
    assert scalpel(world, "run", "kept", "--until", "heal", "--redo", "heal", "--layers", "3") == 2
    assert results_of(world / "kept") == before
    assert (world / "kept" / "heal" / "done.json").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder but the log of events."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "events.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_redo_that_fails_leaves_all_as_it_was(world: Path, capsys) -> None:
    assert scalpel(world, "run", "lost", "--until", "cut") == 0
    before = contents(world / "lost")
    assert main(["search", str(world / "lost"), "--target-params", "100"]) == 2
    assert "no cut that leaves 2 layers comes to 100 parameters" in capsys.readouterr().err
    assert contents(world / "lost") == before


def test_what_a_killed_redo_had_set_aside_is_there_again(world: Path) -> None:
    assert scalpel(world, "run", "killed", "--until", "cut") == 0
    before = contents(world / "killed")
    aside.set_aside(world / "killed", ["search", "cut"])
    assert scalpel(world, "run", "killed", "--until", "cut") == 0
    assert contents(world / "killed") == before


def test_an_unproven_cut_is_not_taken_for_a_proven_one(world: Path, capsys) -> None:
    assert scalpel(world, "run", "unproven", "--until", "cut") == 0
    assert "not proven" in capsys.readouterr().out
    assert scalpel(world, "run", "unproven", "--until", "cut", verify=True) == 2
    assert "cut.proof: none -> auto" in capsys.readouterr().err


def test_evaluation_text_does_not_depend_on_the_search(world: Path, last_layers: Path) -> None:
    assert scalpel(world, "run", "many", "--until", "evaluate", "--set", "search.gate_blocks=20") == 0
    texts = {results_of(folder)["data"]["evaluation"]["sha256"] for folder in (last_layers, world / "many")}
    assert len(texts) == 1


def test_a_given_segment_skips_the_search(world: Path) -> None:
    assert scalpel(world, "run", "given", "--until", "cut", "--segment", "3:5") == 0
    assert results_of(world / "given")["segment"] == [3, 5]
    assert "search" not in results_of(world / "given")


def test_an_interruption_ends_with_130_and_goes_on(finished: Path, world: Path, monkeypatch) -> None:
    own = training.Training._step
    calls = []

    def once(self, *given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, *given)

    monkeypatch.setattr(training.Training, "_step", once)
    assert scalpel(world, "run", "broken", "--until", "heal") == 130
    assert "heal" not in results_of(world / "broken")
    assert (world / "broken" / "heal" / "state.pt").is_file()
    assert scalpel(world, "run", "broken", "--until", "heal") == 0
    broken, whole = (
        AutoModelForCausalLM.from_pretrained(folder / "heal" / "model").state_dict()
        for folder in (world / "broken", finished)
    )
    assert all(torch.equal(broken[name], whole[name]) for name in whole)


def test_stage_commands_work_on_a_run_directory(world: Path) -> None:
    assert scalpel(world, "run", "stages", "--until", "cut") == 0
    folder = str(world / "stages")
    assert main(["evaluate", folder, "--quiet"]) == 0
    assert "healed" in results_of(world / "stages")["evaluate"]
    assert main(["report", folder, "--quiet"]) == 0
    assert (world / "stages" / "report.html").is_file()


def test_cut_writes_a_plain_checkpoint_with_its_history(world: Path, capsys) -> None:
    assert main(["cut", str(world / "model"), "--segment", "1:3", "--out", str(world / "plain"), "--quiet"]) == 0
    assert "proven (fresh process)" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(world / "plain").config.num_hidden_layers == 6
    history = json.loads((world / "plain" / "layerscalpel.json").read_text(encoding="utf-8"))
    assert history["segment"] == [1, 3]


def test_one_model_alone_is_evaluated_without_kl(world: Path) -> None:
    assert scalpel(world, "evaluate", "alone") == 0
    found = results_of(world / "alone")["evaluate"]["model"]
    assert "kl_nats" not in found
    assert set(found["ppl"]) == {"value", "se", "n"}


def test_compare_lists_final_models(finished: Path, capsys) -> None:
    assert main(["compare", str(finished), str(finished), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["rows"]] == ["cut", "healed"]
    assert found["notes"] == [f"{finished} is named twice: it counts once"]
    assert main(["compare", str(finished)]) == 0


def test_inspect_reads_no_weights(world: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["inspect", str(world / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_layers"] == 8
    assert found["config_fields_a_cut_changes"] == ["num_hidden_layers"]
