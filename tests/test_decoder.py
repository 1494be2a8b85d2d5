"""What is saved loads back as the same model, what is saved is whole or absent, and what is no decoder is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_gguf
from families import tiny, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from layerscalpel.decoder import (
    choose_device,
    choose_dtype,
    load_decoder,
    num_parameters,
    save_decoder,
    weight_bytes,
)
from layerscalpel.errors import UserError

UNTIED, TIED = ["llama", "gpt_neox", "qwen2"], ["gemma3_text", "gpt2", "opt", "bloom"]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def tokenizer() -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.WordLevel({"<end>": 0, "one": 1, "two": 2}, unk_token="<end>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")


# ---------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("family", UNTIED + TIED)
def test_a_saved_model_loads_back_the_same(tmp_path, family):
    model = tiny(family)
    assert model.config.tie_word_embeddings == (family in TIED)
    saved = save_decoder(model, None, tmp_path / "deep" / "model")
    loaded = load_decoder(str(saved))
    assert torch.equal(logits(loaded.model), logits(model))
    assert not loaded.model.training
    assert num_parameters(loaded.model) == num_parameters(model)
    assert loaded.tokenizer is None
    assert (loaded.origin.kind, loaded.origin.num_layers, loaded.origin.dtype) == ("folder", 8, "float32")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_saving_in_bfloat16_leaves_the_model_alone(tmp_path, family):
    model = tiny(family)
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    stated = model.config.dtype
    save_decoder(model, None, tmp_path / "m", dtype="bfloat16")
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert model.config.dtype == stated
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in stored.values()) == num_parameters(model)
    assert weight_bytes(model, "bfloat16") == 2 * num_parameters(model)
    again = load_decoder(str(tmp_path / "m"))
    assert again.origin.dtype == "bfloat16"
    assert next(again.model.parameters()).dtype == torch.float32
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, before[name][1].bfloat16().float())


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_tied_weights_stay_tied(tmp_path, family):
    model = tiny(family)
    save_decoder(model, None, tmp_path / "m", dtype="bfloat16")
    for one in (model, load_decoder(str(tmp_path / "m")).model):
        assert one.get_input_embeddings().weight is one.get_output_embeddings().weight


def test_a_tokenizer_is_saved_beside_the_model(tmp_path):
    save_decoder(tiny("llama"), tokenizer(), tmp_path / "m")
    loaded = load_decoder(str(tmp_path / "m")).tokenizer
    assert loaded("two one two").input_ids == [2, 1, 2]
    assert loaded.eos_token == "<end>"


def test_sampling_flags_of_a_published_checkpoint_survive(tmp_path):
    """A generation config that transformers would refuse from us, as vicuna's: temperature without do_sample."""
    save_decoder(tiny("llama"), None, tmp_path / "m")
    flags = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(flags))
    save_decoder(load_decoder(str(tmp_path / "m")).model, None, tmp_path / "again")
    assert flags.items() <= json.loads((tmp_path / "again" / "generation_config.json").read_text()).items()


def test_a_folder_with_files_is_not_written_to(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for taken in ("m", "file"):
        with pytest.raises(UserError, match=f"{taken} already holds files, or is a link - choose another or remove it"):
            save_decoder(tiny("llama"), None, tmp_path / taken)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "m", "precious"]


def test_an_empty_folder_is_written_to(tmp_path):
    (tmp_path / "m").mkdir()
    save_decoder(tiny("llama"), None, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "no space left while writing .*m - free some"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output error"),
        (ValueError("odd"), ValueError, "odd"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch, error, raised, said):
    model = tiny("llama")
    dtypes = {parameter.dtype for parameter in model.parameters()}

    def fail(folder: Path) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(raised, match=said):
        save_decoder(model, None, tmp_path / "m", dtype="bfloat16")
    assert list(tmp_path.iterdir()) == []
    assert {parameter.dtype for parameter in model.parameters()} == dtypes


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"no space left for the checkpoint in .* GiB needed, 0\.0 free"):
        save_decoder(tiny("llama"), None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- refusing


def test_a_missing_tensor_is_not_made_up(tmp_path):
    """Transformers would fill it with random numbers and go on."""
    save_decoder(tiny("llama"), None, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    stored = load_file(weights)
    del stored["model.layers.3.mlp.up_proj.weight"]
    save_file(stored, weights, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 tensors of the right shape \(model\.layers\.3\.mlp\.up_proj\.weight\) - fetch"
    ):
        load_decoder(str(tmp_path / "m"))


def test_weights_of_another_shape_are_refused(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    with pytest.raises(
        UserError, match=r"lacks 24 tensors of the right shape \(model\.layers\.0\.mlp\.down_proj\.weight, .* \.\.\.\)"
    ):
        load_decoder(str(tmp_path / "m"))


# ---------------------------------------------------------------------------------------------- choosing


def test_auto_takes_the_fastest_device_that_is_there(monkeypatch):
    there = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="device cuda is not there - present: cpu - choose with --device"):
        choose_device("cuda")
    there["mps"] = True
    assert choose_device("auto").type == "mps"
    there["cuda"] = True
    assert choose_device("auto").type == "cuda"
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device tpu is not there - present: cuda, mps, cpu"):
        choose_device("tpu")


@pytest.mark.parametrize(
    ("dtype", "device", "stored", "chosen"),
    [
        ("auto", "cpu", "bfloat16", torch.float32),
        ("auto", "mps", "float16", torch.float32),
        ("auto", "cuda", "float16", torch.float16),
        ("auto", "cuda", "bfloat16", torch.bfloat16),
        ("auto", "cuda", "float32", torch.bfloat16),
        ("float16", "cpu", "bfloat16", torch.float16),
        ("float32", "cuda", "bfloat16", torch.float32),
    ],
)
def test_the_format_to_compute_in(dtype, device, stored, chosen):
    assert choose_dtype(dtype, torch.device(device), stored) == chosen


def test_a_named_format_is_computed_in(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    loaded = load_decoder(str(tmp_path / "m"), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.origin.dtype == "float32"


# ---------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_loads_as_the_model_it_was_made_from(tmp_path):
    model = tiny("llama", num_hidden_layers=3, rms_norm_eps=2**-20)  # a GGUF holds a float32 epsilon
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_decoder(str(tmp_path / "tiny.gguf"))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.tokenizer.decode(loaded.tokenizer("one on").input_ids) == "one on"
    size = (tmp_path / "tiny.gguf").stat().st_size
    origin = loaded.origin
    assert (origin.kind, origin.num_layers, origin.max_tokens, origin.file_bytes) == ("gguf", 3, 128, size)
    save_decoder(loaded.model, loaded.tokenizer, tmp_path / "plain", dtype=origin.dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(logits(plain), logits(model))
    assert not hasattr(plain.config, "quantization_config")
