"""What travels with a checkpoint, and what speaks of other weights and stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import names

from layerscalpel import progress
from layerscalpel.carried import carry_files

TRAVELS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "bpe.codes", "prophetnet.tokenizer", "vocab.txt"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "custom_generate/generate.py"),
    *("generation_config.json", "preprocessor_config.json", "modeling_odd.py", "code/part.py"),
    *("LICENSE", "license.md", "COPYING", "NOTICE", "USE_POLICY.md"),
)
STAYS = (
    *("config.json", "layerscalpel.json", "model.safetensors", "model.safetensors.index.json", "README.md"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json", "params.json"),
    *("model.safetensors.index.fp16.json", "flax_model.msgpack", "hf_quant_config.json", "all_results.json"),
    *("eval_results.txt", "trainer_state.json", "training_args.bin", "original/params.txt", "onnx/model.txt"),
    *(".git/config", "__pycache__/a.pyc", "checkpoint-12/tokenizer.json", ".hidden"),
)


def write(folder: Path, *inside: str) -> None:
    for name in inside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs", encoding="utf-8")


def test_tokenizers_templates_code_and_licence_travel(tmp_path):
    write(tmp_path / "source", *TRAVELS, *STAYS)
    (tmp_path / "out").mkdir()
    assert carry_files(tmp_path / "source", tmp_path / "out") == sorted(TRAVELS)
    assert [name for name in names(tmp_path / "out") if (tmp_path / "out" / name).is_file()] == sorted(TRAVELS)


def test_what_is_there_already_stays(tmp_path):
    write(tmp_path / "source", "generation_config.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "generation_config.json").write_text("ours", encoding="utf-8")
    assert carry_files(tmp_path / "source", tmp_path / "out") == []
    assert (tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8") == "ours"


def test_neither_the_copy_itself_nor_another_model_is_carried(tmp_path):
    write(tmp_path / "source", "vocab.txt", "other/config.json", "other/vocab.txt", "out/early.txt")
    assert carry_files(tmp_path / "source", tmp_path / "source" / "out") == ["vocab.txt"]


def test_what_speaks_of_the_parent_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress.console, "quiet", False)
    write(tmp_path / "source", "params.json", "README.md", "vocab.txt")
    (tmp_path / "out").mkdir()
    carry_files(tmp_path / "source", tmp_path / "out")
    said = capsys.readouterr().err
    assert "left behind" in said
    assert "params.json" in said
    assert "vocab" not in said


@pytest.mark.parametrize("name", ["config.json", "Model.SAFETENSORS", "Optimizer.pt"])
def test_case_does_not_matter_for_what_stays(name, tmp_path):
    write(tmp_path / "source", name)
    (tmp_path / "out").mkdir()
    assert carry_files(tmp_path / "source", tmp_path / "out") == []
