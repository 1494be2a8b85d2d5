"""A checkpoint becomes a GGUF: converters found, refusals, files that are whole or not there; engines' answers judged.

The converter and llama.cpp are played by stand-ins here; tests/test_engines_real.py runs the real ones.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from families import tiny
from tqdm import tqdm
from world import byte_tokenizer, write_model

from layerscalpel import checkalone, checkengine, cli, converter, enginecli, engines, enginework, export
from layerscalpel.checkengine import common, compared, questions, reference_of, require_close
from layerscalpel.chosen import HEALED, checkpoint_of, held_out_text
from layerscalpel.converter import command_of, convert, find_converter, unpack
from layerscalpel.enginewords import check_lines
from layerscalpel.errors import UserError
from layerscalpel.export import Ways, export_gguf
from layerscalpel.ggufs import TYPES, type_named

NOTHING = sys.executable
"""An interpreter in which llama-cpp-python is not looked for: the tests say whether it is there."""


def clone_of(folder: Path, script: str = "") -> Path:
    """Make what looks like a clone of llama.cpp whose converter is `script`."""
    (folder / "conversion").mkdir(parents=True)
    (folder / converter.SCRIPT).write_text(script, encoding="utf-8")
    return folder


def write_gguf(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.zeros(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def without_engine(monkeypatch) -> None:
    monkeypatch.setattr(export, "installed", lambda *_: False)


@pytest.fixture
def converting(monkeypatch) -> list[str]:
    """A stand-in converter; returns the types it was asked for."""
    asked: list[str] = []

    def write(_script: Path, _checkpoint: Path, out: Path, outtype: str) -> None:
        asked.append(outtype)
        write_gguf(out)

    monkeypatch.setattr(export, "convert", write)
    monkeypatch.setattr(export, "find_converter", lambda _: Path("convert_hf_to_gguf.py"))
    return asked


def test_every_type_is_one_of_llama_cpps() -> None:
    for name, row in TYPES.items():
        known = gguf.LlamaFileType(row.ftype).name
        assert name == known.lower().removeprefix("mostly_").removeprefix("all_")
    assert {name for name, row in TYPES.items() if row.by_converter} == {"f32", "f16", "bf16", "q8_0"}
    bars = [TYPES[name].most_ratio for name in ("f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")]
    assert bars[0] == 1.002
    assert bars == sorted(set(bars))  # fewer bits may cost more
    assert type_named("Q4_K_M").ftype == 15
    with pytest.raises(UserError, match="there is no GGUF type 'q4km' - did you mean 'q4_k_m'"):
        type_named("q4km")


def test_the_converter_is_looked_for_where_it_was_fetched_to(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=r"converter is not here .* --get-converter, or name a clone .* --converter FOLD"
    ):
        find_converter(None)
    clone_of(converter.home())
    assert find_converter(None) == converter.home() / converter.SCRIPT
    other = clone_of(tmp_path / "clone")
    assert find_converter(str(other)) == find_converter(str(other / converter.SCRIPT)) == other / converter.SCRIPT
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no convert_hf_to_gguf.py with its folder conversion"):
        find_converter(str(tmp_path / "empty"))
    (other / "conversion").rmdir()
    with pytest.raises(UserError, match=r"holds no convert_hf_to_gguf.py"):
        find_converter(str(other))


def test_only_the_converter_is_taken_of_the_known_archive(tmp_path) -> None:
    archive, names = tmp_path / "package.tar.gz", ("convert_hf_to_gguf.py", "conversion/llama.py", "gguf-py/gguf/x.py")
    with tarfile.open(archive, "w:gz") as packed:
        for name in (
            *[f"p-1/vendor/llama.cpp/{n}" for n in (*names, "src/llama.cpp")],
            "p-1/setup.py",
            "p-1/../../evil",
        ):
            packed.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UserError, match=r"has the hash .* - what it holds would be run, so it is not used"):
        unpack(archive, tmp_path / "out", "0" * 64)
    assert not (tmp_path / "out").exists()
    unpack(archive, tmp_path / "out", hashlib.sha256(archive.read_bytes()).hexdigest())
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == set(names)
    assert not (tmp_path / "evil").exists()


def test_the_converter_is_called_and_what_it_says_is_told(tmp_path) -> None:
    out = tmp_path / "m.gguf"
    script = (
        clone_of(tmp_path / "c", "import sys; open(sys.argv[5], 'w').write(' '.join(sys.argv[1:]))") / converter.SCRIPT
    )
    convert(script, tmp_path / "model", out, "bf16")
    assert out.read_text() == f"{tmp_path / 'model'} --outtype bf16 --outfile {out}"
    assert command_of(script, tmp_path, out, "f16")[:2] == [sys.executable, str(script)]
    for said, sentence in (
        ("ERROR:hf-to-gguf:Model OddForCausalLM is not supported", "does not know the architecture OddForCausalLM:"),
        (
            "NotImplementedError: BPE pre-tokenizer was not recognized - update",
            "does not know how this tokenizer splits",
        ),
        ("KeyError: 'x'", r"failed on .*m \(KeyError: 'x'\) - try a newer clone"),
    ):
        script.write_text(f"import sys; sys.exit({said!r})")
        with pytest.raises(UserError, match=sentence):
            convert(script, tmp_path / "m", tmp_path / "none.gguf", "f16")


def test_a_file_without_the_engine_is_called_not_verified(tmp_path, without_engine, converting, capsys) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "far" / "m.gguf"
    found = export_gguf(str(model), "f16", out, Ways(python=NOTHING))
    assert converting == ["f16"]
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
    assert found["bytes"] == out.stat().st_size
    assert found["source_bytes"] == sum(path.stat().st_size for path in model.iterdir())
    assert found["tensors"] == {"f16": 1, "f32": 1}
    assert found["verified"] is None
    assert "pip install llama-cpp-python" in found["not_verified"]
    assert "written, not verified: llama.cpp is not installed" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=r"m.gguf is there already - choose another --out or remove it"):
        export_gguf(str(model), "f16", out, Ways(python=NOTHING))


def test_what_cannot_be_exported_leaves_nothing(tmp_path, without_engine, converting, monkeypatch) -> None:
    model = write_model(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    ways = Ways(python=NOTHING)
    with pytest.raises(UserError, match=r"type q4_k_m is made by llama.cpp: .* - without it: f32, f16, bf16, q8_0"):
        export_gguf(str(model), "q4_k_m", None, ways)
    with pytest.raises(UserError, match=r"another ending than .gguf"):
        export_gguf(str(model), "f16", tmp_path / "m.bin", ways)

    def fails(_script: Path, _checkpoint: Path, out: Path, _type: str) -> None:
        out.write_text("half")
        raise UserError("torn")

    monkeypatch.setattr(export, "convert", fails)
    for out in (None, tmp_path / "new" / "deep" / "m.gguf"):
        with pytest.raises(UserError, match="torn"):
            export_gguf(str(model), "f16", out, ways)
        assert sorted(tmp_path.rglob("*")) == before
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(
        UserError, match=r"is quantised \(gptq\).* - export the unquantised checkpoint .* --type q4_k_m"
    ):
        export_gguf(str(model), "f16", None, ways)
    write_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match=r"a.gguf is a GGUF already"):
        export_gguf(str(tmp_path / "a.gguf"), "f16", None, ways)


def test_other_types_are_quantised_from_plain_numbers_and_judged_before_they_have_their_name(
    tmp_path, converting, monkeypatch
) -> None:
    model, out = write_model(tmp_path / "model"), tmp_path / "m-q4_k_m.gguf"
    asked: dict[str, Any] = {}

    def quantise(_name: str, place: Path, job: dict[str, Any], _python: str) -> dict[str, Any]:
        asked.update(job, source=place.read_bytes())
        write_gguf(Path(job["quantised"]))
        return {}

    verdict: dict[str, Any] = {"ppl_ratio": {"value": 1.6, "se": 0.1, "n": 60}}

    def check(_name: str, file: Path, *_: Any, **__: Any) -> dict[str, Any]:
        assert file.exists()
        assert not out.exists()
        return verdict

    monkeypatch.setattr(export, "installed", lambda *_: True)
    monkeypatch.setattr(export, "ask", quantise)
    monkeypatch.setattr(export, "check_engine", check)
    ways = Ways(text=str(write_texts_of(tmp_path)), num_blocks=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"its perplexity is 1.6000 times .* allowed are 50 %"):
        export_gguf(str(model), "q4_k_m", out, ways)
    assert sorted(tmp_path.rglob("*")) == before
    assert (converting, asked["ftype"]) == (["f32"], 15)
    verdict["ppl_ratio"]["value"] = 1.06
    assert export_gguf(str(model), "q4_k_m", out, ways)["verified"] == verdict
    assert {path.name for path in tmp_path.glob("*gguf*")} == {"m-q4_k_m.gguf"}


def write_texts_of(folder: Path) -> Path:
    """Write held-out text that fills blocks of 256 bytes."""
    path = folder / "held-out.txt"
    draw = np.random.default_rng(0)
    lines = [" ".join(map(str, draw.integers(0, 10**6, 60))) for _ in range(12)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def test_a_name_means_the_last_plain_checkpoint_of_a_run(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("data:\n  evaluation: mine.txt\n")
    with pytest.raises(UserError, match="holds no model of heal or stitch or cut yet"):
        checkpoint_of(str(run), HEALED)
    (run / "cut" / "model").mkdir(parents=True)
    assert checkpoint_of(str(run), HEALED) == run / "cut" / "model"
    (run / "heal" / "model").mkdir(parents=True)
    assert checkpoint_of(str(run), HEALED) == run / "heal" / "model"
    assert (held_out_text(str(run)), held_out_text("demo")) == ("mine.txt", "passages")


@pytest.fixture
def answering(monkeypatch) -> None:
    """Let an engine answer in this process, which has imported transformers already."""

    def answer(name: str, place: Path, job: Any, _python: str) -> Any:
        return enginework.answered({"engine": name, "place": str(place), "threads": 1, **job})

    monkeypatch.setattr(checkengine, "ask", answer)


def test_transformers_computes_what_the_reference_does(tmp_path, answering, capsys) -> None:
    model, out = write_model(tmp_path / "model", max_position_embeddings=512), tmp_path / "checked"
    texts = write_texts_of(tmp_path)
    assert (
        cli.main(
            ["check", str(model), "--engine", "transformers", "--text", str(texts), "--blocks", "2", "--out", str(out)]
        )
        == 0
    )
    results = json.loads((out / "results.json").read_text())
    found = results["check"]["transformers"]
    assert results["model"]["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    assert found["ppl_ratio"]["value"] == pytest.approx(1, abs=1e-5)  # both in float32, other batches
    assert (found["top1_agreement_fraction"]["value"], found["ppl_ratio"]["n"]) == (1, 2 * 255)
    assert found["common_tokens"] == {"value": 32, "se": 0, "n": 16}
    assert found["decode_tokens_per_s"]["n"] == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "ratio 1.0000 ± 0.0000 over 510 tokens" in said
    assert "in blocks of 256 tokens; timed: 128 tokens read, 64 written" in said
    with pytest.raises(UserError, match="has checks of"):
        enginecli._require_same_model(results, {"model": {"name": "other"}}, out)


def test_nothing_that_is_asked_is_longer_than_the_context(tmp_path, answering, capsys) -> None:
    """Positions of this family are a table: one more is an error."""
    model, texts = write_model(tmp_path / "model", "opt"), write_texts_of(tmp_path)
    flags = ["--engine", "transformers", "--text", str(texts), "--blocks", "2"]
    assert cli.main(["check", str(model), *flags]) == 0
    said = capsys.readouterr()
    assert "texts of 127 tokens, not 256: the model's context is 128" in " ".join(said.err.split())
    assert "in blocks of 127 tokens; timed: 85 tokens read, 42 written" in " ".join(said.out.split())
    asked = questions(byte_tokenizer(), text=str(texts), num_blocks=2, context=100)
    assert max(map(len, asked.prompts)) + checkengine.NEW_TOKENS == asked.tokens_NT.shape[1] == 99
    with pytest.raises(UserError, match="context of 63 tokens is too short to be checked - allowed: 64 or more"):
        questions(byte_tokenizer(), text=str(texts), num_blocks=2, context=63)


def test_what_has_no_gguf_is_told_with_what_has_one(tmp_path, without_engine, converting) -> None:
    run, alone = tmp_path / "run", write_model(tmp_path / "alone")
    told = json.loads((alone / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (alone / "config.json").write_text(json.dumps(told))
    for stage in ("quantize", "heal"):
        shutil.copytree(alone, run / stage / "model")
    (run / "config.yaml").write_text("seed: 0\n")
    healed = f"export the run's healed model and .*: scalpel export gguf {run}$"
    with pytest.raises(UserError, match=healed):
        engines.file_for("llama.cpp", run / "quantize" / "model")
    for work in (
        lambda: engines.file_for("llama.cpp", run / "heal" / "model"),
        lambda: export_gguf(str(run), "f16", None, Ways(python=NOTHING)),
    ):
        with pytest.raises(UserError, match="no GGUF of it: the run's parent was quantised - start from the unquantis"):
            work()
    with pytest.raises(UserError, match="no GGUF of it - export the unquantised checkpoint that it was made from"):
        engines.file_for("llama.cpp", alone)
    (run / "heal" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"write it: scalpel export gguf {run}$"):
        engines.file_for("llama.cpp", run / "heal" / "model")


def test_a_bar_that_the_first_forward_draws_is_kept_off_the_terminal(tmp_path, capsys) -> None:
    model = tiny("llama", vocab_size=260).eval()
    model.register_forward_pre_hook(lambda *_: list(tqdm([1], desc="Dispatching model", disable=False)) and None)
    reference_of(model, questions(byte_tokenizer(), text=str(write_texts_of(tmp_path)), num_blocks=2))
    assert "Dispatching model" not in capsys.readouterr().err


def test_an_engine_that_computes_something_else_is_told(tmp_path) -> None:
    tokenizer = byte_tokenizer()
    asked = questions(tokenizer, text=str(write_texts_of(tmp_path)), num_blocks=3)
    reference = reference_of(tiny("llama", vocab_size=260).eval(), asked)
    said = {
        "losses": (reference.nll_NT + 0.1).tolist(),
        "likeliest": reference.likeliest_NT.tolist(),
        "continued": [[*row[:4], -1, *row[5:]] for row in reference.continued],
        "tokens": [[0, *ids] for ids in asked.own_ids],
    }
    found = compared(said, asked, reference)
    assert found["ppl_ratio"] == {"value": pytest.approx(np.exp(0.1)), "se": pytest.approx(0, abs=1e-9), "n": 765}
    assert found["common_tokens"]["value"] == 4
    assert found["tokenizer"] == {"texts": 16 + 3, "alike": 0}
    with pytest.raises(UserError, match="vllm cuts all of 19 texts into other tokens"):
        require_close("vllm", found)
    del found["tokenizer"]
    with pytest.raises(UserError, match=r"vllm computes something else .* 1.1052 times .* allowed are 3 % - do not"):
        require_close("vllm", found)
    require_close("vllm", found, 1.2)
    found["top1_agreement_fraction"]["value"] = 0.81
    with pytest.raises(UserError, match=r"that of transformers in 81.0 % of the places, at least 88 % are wanted"):
        require_close("vllm", found, 1.2, alike=0.88)
    found |= {"version": "1", "text": "t", "device": "cpu"}
    assert "greedy continuations have 4.0 of 32 tokens in common, 0 % of 16" in " ".join(check_lines("vllm", found))
    said["losses"][0][0] = float("nan")
    with pytest.raises(UserError, match="losses are not finite"):
        compared(said, asked, reference)


def test_common_beginnings_are_counted() -> None:
    assert [common([1, 2], [1, 2]), common([1, 2, 3], [1, 5, 3]), common([], [1]), common([1], [1, 2])] == [2, 1, 0, 1]


def test_the_command_line_says_what_is_missing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = str(write_model(tmp_path / "model"))
    for command, said in (
        (["check", model, "--engine", "vllm"], "vllm is not installed - pip install vllm"),
        (["check", model, "--engine", "vlm"], "there is no engine 'vlm' - did you mean 'vllm'?"),
        (["check", model, "--engine", "vllm", "--blocks", "1"], "--blocks 1 is too few for a standard error"),
        (["check", model, "--engine", "vllm", "--out", model], "already holds other files - choose another --out"),
        (["export", "gguf", model, "--type", "q9"], "there is no GGUF type 'q9'"),
        (["export", "gguf", model], "llama.cpp's converter is not here"),
        (["export", "onnx", model], "invalid choice: 'onnx'"),
    ):
        assert cli.main(command) == 2, command
        assert said in " ".join(capsys.readouterr().err.split()), command


def test_a_run_with_several_exported_files_asks_which(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "a.gguf").touch()
    assert checkalone._place(str(tmp_path), "llama.cpp", False).name == "a.gguf"
    (tmp_path / "export" / "b.gguf").touch()
    with pytest.raises(UserError, match=r"several exported files \(a.gguf, b.gguf\) - name one"):
        checkalone._place(str(tmp_path), "llama.cpp", False)


def test_losses_are_those_of_the_model(tmp_path, answering) -> None:
    model = tiny("llama", vocab_size=260).eval()
    asked = questions(byte_tokenizer(), text=str(write_texts_of(tmp_path)), num_blocks=2)
    with torch.no_grad():
        logits = model(asked.tokens_NT).logits[:, :-1]
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), asked.tokens_NT[:, 1:], reduction="none")
    assert torch.allclose(reference_of(model, asked).nll_NT.float(), wanted, atol=1e-5)
