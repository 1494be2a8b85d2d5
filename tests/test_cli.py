"""Bad input: one clear line, exit code 2, and nothing half-written that looks finished."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from checkpoints import SameProcess, names

from layerscalpel import checkpoint, shards
from layerscalpel.cli import build_parser, main, settings_of


def refused(capsys, *argv: object) -> str:
    """Run a command that must end with 2 and no traceback; return what it said."""
    assert main([str(item) for item in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--search", "exakt"), "did you mean 'exact'?"),
        (("--set", "serach.method=exact"), "unknown setting 'serach.method' - did you mean"),
        (("--set", "heal.objective=mse"), "heal.objective=mse is unknown"),
        (("--set", "cut.proof=part"), "cut.proof=part is unknown - did you mean 'parts'?"),
        (("--target-latency-ms", "0"), "target.latency_ms=0 is out of range - allowed: 0.001 or more"),
        (("--set", "cut.proof_minutes=-1"), "cut.proof_minutes=-1 is out of range - allowed: 0.0 or more"),
        (("--rate", "1.2"), "rate 1.2 is not between 0 and 1"),
        (("--rate", "much"), "target.rate='much' is not a number"),
        (("--rate", "0.95"), "at least 2 must stay, so remove at most 6"),
        (("--layers", "7"), "--layers 7 removes 7 of 8 layers"),
        (("--segment", "3:12"), "does not lie in this model's layers"),
        (("--segment", "3-5"), "is no START:STOP"),
        (("--until", "heel"), "there is no stage 'heel' - did you mean 'heal'?"),
        (("--calibration", "alpacca"), "there is no text source 'alpacca' - did you mean 'alpaca'?"),
        (("--healing", "passages=2,alpacca"), "there is no text source 'alpacca' - did you mean 'alpaca'?"),
        (("--healing", "passages=0,c4"), "the mix 'passages=0,c4' gives passages the weight '0' - allowed: a number"),
        (("--healing", "passages=2,self"), "data.healing=self is refused: held-out text must not come"),
        (("--recipe", "nothing.yaml"), "recipe nothing.yaml cannot be read"),
        (("--set", "data.block_tokens=4096"), "longer than the model's context of 128"),
        (("--device", "cuda"), "device cuda is not there"),
        (("--frobnicate",), "unrecognized arguments"),
    ],
)
def test_bad_flags_end_with_one_line(world: Path, capsys, flags: tuple, expected: str) -> None:
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("this machine has cuda")
    out = world / "never"
    said = refused(capsys, "run", world / "model", "--recipe", world / "recipe.yaml", "--out", out, *flags)
    assert expected in said
    assert sum(line.startswith("scalpel: ") for line in said.splitlines()) == 1
    assert not (out / "results.json").exists()


@pytest.mark.parametrize("name", ["no/such/folder/here", "./nothing", "missing.gguf", ""])
def test_a_model_that_is_not_there(capsys, tmp_path: Path, name: str) -> None:
    assert "there is no model at" in refused(capsys, "run", name, "--out", tmp_path / "out")


def test_several_mistakes_are_told_at_once(world: Path, capsys) -> None:
    said = refused(
        capsys, "run", world / "model", "--recipe", world / "recipe.yaml", "--out", world / "never",
        "--healing", "alpacca", "--calibration", "c5", "--layers", "7",
    )  # fmt: skip
    assert len(said.strip().splitlines()) == 3


def test_a_folder_of_other_files_is_not_written_into(world: Path, capsys, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me", encoding="utf-8")
    said = refused(capsys, "run", world / "model", "--recipe", world / "recipe.yaml", "--out", tmp_path)
    assert "is no run directory" in said
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_cut_needs_segment_and_out(world: Path, capsys) -> None:
    assert "needs --segment START:STOP and --out DIR" in refused(capsys, "cut", world / "model")


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        ("3:12", "segment 3:12 does not lie in this model's layers"),
        ("5:3", "segment 5:3 does not lie in this model's layers"),
        ("2:2", "segment 2:2 does not lie in this model's layers"),
        ("0:8", "segment 0:8 leaves 0 of 8 layers"),
        ("1:8", "segment 1:8 leaves 1 of 8 layers - at least 2 must stay, so remove at most 6"),
        ("-1:3", "segment '-1:3' is no START:STOP"),
        ("3", "segment '3' is no START:STOP"),
        ("2:4,5:6", "segment '2:4,5:6' is no START:STOP"),
    ],
)
def test_segments_that_cannot_be_cut(world: Path, capsys, segment: str, expected: str) -> None:
    before = names(world)
    said = refused(capsys, "cut", world / "model", f"--segment={segment}", "--out", world / "nowhere")
    assert expected in said
    assert len(said.splitlines()) == 1
    assert names(world) == before


def test_cut_does_not_overwrite(world: Path, capsys) -> None:
    said = refused(capsys, "cut", world / "model", "--segment", "1:2", "--out", world / "model")
    assert "already holds files" in said


def test_a_full_disk_ends_with_one_line(world: Path, capsys, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_write_shard", full)
    monkeypatch.setattr(checkpoint, "Witness", SameProcess)
    out, before = world / "full", names(world)
    said = refused(capsys, "cut", world / "model", "--segment", "1:2", "--out", out, "--no-verify", "--quiet")
    assert said == f"scalpel: no space left while writing {out} - free some or choose another --out\n"
    assert names(world) == before


def test_another_process_in_the_folder_is_noticed(world: Path, capsys) -> None:
    from layerscalpel.config import build_config, recipe
    from layerscalpel.rundir import RunDir

    settings = [{"model.name": str(world / "model")}, recipe(world / "recipe.yaml")]
    holder = RunDir(world / "busy", build_config(settings))
    said = refused(capsys, "run", world / "model", "--recipe", world / "recipe.yaml", "--out", world / "busy")
    holder.close()
    assert "another scalpel is at work" in said


def test_report_of_no_run_directory(capsys, tmp_path: Path) -> None:
    assert "is no run directory" in refused(capsys, "report", tmp_path)


def test_compare_of_no_run_directory(capsys, tmp_path: Path) -> None:
    assert "is this a run directory" in refused(capsys, "compare", tmp_path)


def test_a_defect_is_not_dressed_up_as_a_mistake(world: Path, monkeypatch) -> None:
    from layerscalpel import run

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run, "check_before_loading", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", str(world / "model"), "--out", str(world / "never")])


def test_methods_lists_every_table(capsys) -> None:
    assert main(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("clp", "angular", "endpoint", "passages", "2510.23652"))


def test_all_rates_is_a_flag_of_its_own() -> None:
    arguments = build_parser().parse_args(["search", "model", "--all-rates"])
    assert settings_of(arguments).search.all_rates
    assert not settings_of(build_parser().parse_args(["search", "model"])).search.all_rates
