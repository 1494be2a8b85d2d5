"""A cut model computes what the parent computes without the segment, in memory and through its files, or is refused."""

from __future__ import annotations

import functools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, SINGLE, edit_json, edit_weights, names
from families import multimodal, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerscalpel.cut import cut_folder, cut_model, old_name, proof_tokens
from layerscalpel.decoder import load_decoder, num_parameters, save_decoder
from layerscalpel.errors import UserError
from layerscalpel.hooks import bypass
from layerscalpel.layers import Decoder
from layerscalpel.origin import skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.probe import find_layers
from layerscalpel.quiet import quiet_transformers
from layerscalpel.segment import Segment
from layerscalpel.shards import Weights, digest, read_weights

PLAIN = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "bloom", "opt", "gemma2"]
TYPED = ["olmo3", "cohere2", "exaone4", "gpt_oss", "gpt_neo", "llama4_text"]
RULED = ["smollm3", "lfm2", "bamba", "qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe"]
ALL = PLAIN + TYPED + RULED
EVERYWHERE = ("llama", "gemma3_text", "bamba", "deepseek_v3")
"""Cut at all places in the default tier; of the others one each, in turn."""
slow = partial(pytest.param, marks=pytest.mark.slow)
BOUNDS = [(0, 2), (2, 5), (6, 8)]
cases = pytest.mark.parametrize(
    ("family", "bounds"),
    [
        *[
            (pytest.param if family in EVERYWHERE or j == i % 3 else slow)(family, bounds)
            for i, family in enumerate(ALL)
            for j, bounds in enumerate(BOUNDS)
        ],
        *[("llama", bounds) for bounds in [(0, 1), (7, 8), (0, 6), (2, 8)]],
        *[slow("llama", bounds) for bounds in [(3, 4), (2, 6)]],
        *[("jamba", bounds) for bounds in [(0, 2), (1, 5), (6, 8)]],
        *[("recurrent_gemma", bounds) for bounds in [(0, 1), (2, 5)]],
        ("minicpm3", (6, 8)),
    ],
)


@functools.cache
def decoder_of(family: str) -> Decoder:
    return find_layers(tiny(family))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), use_cache=False).logits


def without(decoder: Decoder, segment: Segment) -> torch.Tensor:
    with bypass(decoder, segment):
        return logits(decoder.model)


@functools.cache
def cut_of(family: str, start: int, stop: int) -> PreTrainedModel:
    return cut_model(decoder_of(family), Segment(start, stop, 8))[0]


# ---------------------------------------------------------------------------------------------- in memory


@cases
def test_a_cut_computes_what_the_parent_does_without_the_segment(family, bounds):
    decoder, segment = decoder_of(family), Segment(*bounds, 8)
    before, config = logits(decoder.model), decoder.model.config.to_dict()
    stored = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    cut, _ = cut_model(decoder, segment)
    assert torch.equal(logits(cut), without(decoder, segment))
    assert not torch.equal(logits(cut), before)
    removed = sum(num_parameters(decoder.layers[i]) for i in range(*bounds))
    assert num_parameters(cut) == num_parameters(decoder.model) - removed
    assert not cut.training
    # the parent is untouched
    assert torch.equal(logits(decoder.model), before)
    assert decoder.model.config.to_dict() == config
    assert all(torch.equal(tensor, stored[name]) for name, tensor in decoder.model.state_dict().items())


@pytest.mark.parametrize("family", ALL)
def test_a_cut_shares_every_tensor_with_its_parent(family):
    decoder, cut = decoder_of(family), cut_of(family, 2, 5)
    layers = cut.get_submodule(decoder.path)
    for new, old in enumerate(Segment(2, 5, 8).kept()):
        pairs = zip(layers[new].parameters(), decoder.layers[old].parameters(), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)
    theirs = {tensor.data_ptr() for tensor in decoder.model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in cut.state_dict().values()} <= theirs


@pytest.mark.parametrize("family", [(slow if i % 2 else pytest.param)(family) for i, family in enumerate(ALL)])
def test_a_cut_saves_loads_and_generates(family, tmp_path):
    """With a cache, too: every layer must know its new number. The default tier proves the others in test_proof.py."""
    cut = cut_of(family, 2, 5)
    loaded = load_decoder(str(save_decoder(cut, None, tmp_path / "m"))).model
    assert torch.equal(logits(loaded), logits(cut))
    mask = torch.ones_like(tokens())
    settings = {"attention_mask": mask, "do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    for model in (cut, loaded):
        cached, uncached = (model.generate(tokens(), use_cache=flag, **settings) for flag in (True, False))
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "qwen2", "bamba"])
def test_layers_get_their_new_numbers(family):
    cut = cut_of(family, 2, 5)
    for i, layer in enumerate(cut.get_submodule(decoder_of(family).path)):
        numbers = [m.layer_idx for m in layer.modules() if getattr(m, "layer_idx", None) is not None]
        assert numbers
        assert set(numbers) == {i}


def test_a_cut_can_be_cut_again():
    once = find_layers(cut_of("qwen2", 2, 5))
    twice, _ = cut_model(once, Segment(1, 3, 5))
    assert torch.equal(logits(twice), without(once, Segment(1, 3, 5)))
    kinds = decoder_of("qwen2").model.config.layer_types
    assert twice.config.layer_types == [kinds[i] for i in (0, 6, 7)]


def test_tied_weights_stay_tied():
    for family in ("gemma3_text", "gpt2"):
        cut = cut_of(family, 2, 5)
        assert cut.get_input_embeddings().weight is cut.get_output_embeddings().weight


def test_generation_settings_are_copied():
    decoder = find_layers(tiny("llama"))
    decoder.model.generation_config.repetition_penalty = 1.25
    cut, _ = cut_model(decoder, Segment(2, 5, 8))
    assert cut.generation_config.repetition_penalty == 1.25
    assert cut.generation_config is not decoder.model.generation_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cut(dtype):
    decoder, segment = find_layers(tiny("llama").to(dtype)), Segment(2, 5, 8)
    cut, _ = cut_model(decoder, segment)
    assert torch.equal(logits(cut), without(decoder, segment))
    assert next(cut.parameters()).dtype == dtype


def test_the_text_part_of_a_larger_model_is_cut(tmp_path):
    decoder, segment = find_layers(multimodal()), Segment(2, 5, 8)
    assert decoder.path == "model.language_model.layers"
    cut, _ = cut_model(decoder, segment)
    assert torch.equal(logits(cut), without(decoder, segment))
    assert cut.config.text_config.num_hidden_layers == 5
    assert cut.config.vision_config.num_hidden_layers == 2
    loaded = load_decoder(str(save_decoder(cut, None, tmp_path / "m"))).model
    assert torch.equal(logits(loaded), logits(cut))


def test_a_rule_that_shows_in_the_logits_alone_is_refused():
    decoder = find_layers(tiny("llama"))
    for i, layer in enumerate(decoder.layers):
        layer.register_forward_hook(lambda _m, _a, output, i=i: output * (1 + 0.1 * i))
    with pytest.raises(
        UserError, match=r"computes other logits than the parent without layers 2\.\.4 \(segment \[2, 5"
    ):
        cut_model(decoder, Segment(2, 5, 8))


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, IndexError, RuntimeError, AssertionError])
def test_a_model_that_refuses_the_cut_config_is_told(monkeypatch, error):
    decoder = find_layers(tiny("llama"))

    def fail(_self: object, _config: object) -> None:
        raise error("a rule\nof its own")

    monkeypatch.setattr(type(decoder.model), "__init__", fail)
    with pytest.raises(UserError, match=r"LlamaForCausalLM refuses the cut config: .*a rule.*of its own"):
        cut_model(decoder, Segment(2, 5, 8))


def test_the_tokens_of_a_proof_are_always_the_same_and_of_the_vocabulary():
    decoder = decoder_of("llama")
    assert torch.equal(proof_tokens(decoder), proof_tokens(decoder))
    assert proof_tokens(decoder).shape == (2, 24)
    assert proof_tokens(decoder, blocks=1, length=8).shape == (1, 8)
    assert proof_tokens(decoder, blocks=9, length=999).max() == decoder.vocab_size - 1


# ---------------------------------------------------------------------------------------------- through files


def saved(model: PreTrainedModel, folder: Path, **options: object) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder, **options)
    return folder


def cut_files(source: Path, out: Path, *bounds: int, num_layers: int = 8) -> tuple[Weights, dict[str, str]]:
    """Cut a checkpoint folder without loading it."""
    plan = plan_cut(skeleton(AutoConfig.from_pretrained(source)), Segment(*bounds, num_layers))
    return cut_folder(read_weights(source), plan, out)


def digests_of(folder: Path) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in read_weights(folder).tensors.items()}


FILED = [*PLAIN, "gpt_oss", "llama4_text", "lfm2", "bamba", "qwen2_moe", "deepseek_v3", "jamba"]


@pytest.mark.parametrize(
    ("family", "bounds", "max_shard_size"),
    [
        (pytest.param if j == i % 2 else slow)(family, (0, 2) if family == "jamba" else (2, 5), size)
        for i, family in enumerate(FILED)
        for j, size in enumerate(["5GB", "40KB"])
    ],
)
def test_files_are_cut_as_the_model_in_memory(family, bounds, max_shard_size, tmp_path):
    source = saved(tiny(family), tmp_path / "source", max_shard_size=max_shard_size)
    copy, renamed = cut_files(source, tmp_path / "files", *bounds)
    save_decoder(cut_of(family, *bounds), None, tmp_path / "memory")
    assert digests_of(tmp_path / "files") == digests_of(tmp_path / "memory")
    assert copy.tensors.keys() == set(renamed.values())
    assert (INDEX in names(tmp_path / "files")) == (max_shard_size == "40KB")
    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "files").eval()
    assert torch.equal(logits(loaded), logits(cut_of(family, *bounds)))
    assert num_parameters(loaded) == num_parameters(cut_of(family, *bounds))
    stated = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("files", "memory")]
    assert stated[0] == stated[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_files_keep_their_format(dtype, tmp_path):
    source = saved(tiny("qwen2").to(dtype), tmp_path / "source")
    copy, _ = cut_files(source, tmp_path / "out", 2, 5)
    assert {tensor.dtype for tensor in copy.tensors.values()} == {"BF16" if dtype is torch.bfloat16 else "F16"}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype


def test_the_text_part_of_larger_files_is_cut(tmp_path):
    model = multimodal()
    cut_files(saved(model, tmp_path / "source"), tmp_path / "out", 2, 5)
    loaded = load_decoder(str(tmp_path / "out")).model
    assert torch.equal(logits(loaded), without(find_layers(model), Segment(2, 5, 8)))
    vision = {name: tensor for name, tensor in model.state_dict().items() if "vision" in name}
    assert vision
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in vision.items())


def test_files_that_name_the_body_alone_are_cut(tmp_path):
    """As the first gpt2 on the hub: `h.0.ln_1.weight` without `transformer.`."""
    source = saved(tiny("gpt2"), tmp_path / "source")
    stored = load_file(source / SINGLE)
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in stored.items()},
        source / SINGLE,
        metadata={"format": "pt"},
    )
    copy, renamed = cut_files(source, tmp_path / "out", 2, 5)
    assert renamed["h.5.ln_1.weight"] == "h.2.ln_1.weight"
    assert not any(name.startswith("h.5.") for name in copy.tensors)
    assert torch.equal(logits(load_decoder(str(tmp_path / "out")).model), logits(cut_of("gpt2", 2, 5)))


def test_cutting_twice_is_cutting_once(tmp_path):
    source = saved(tiny("qwen2"), tmp_path / "source", max_shard_size="40KB")
    cut_files(source, tmp_path / "whole", 2, 6)
    cut_files(source, tmp_path / "first", 3, 5)
    cut_files(tmp_path / "first", tmp_path / "second", 2, 4, num_layers=6)
    assert digests_of(tmp_path / "second") == digests_of(tmp_path / "whole")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("second", "whole")]
    assert configs[0] == configs[1]


def test_the_old_name_of_a_tensor_is_found_back():
    segment = Segment(2, 5, 8)
    assert (
        old_name("model.layers.1.mlp.down_proj.weight", "model.layers", segment)
        == "model.layers.1.mlp.down_proj.weight"
    )
    assert (
        old_name("model.layers.2.mlp.down_proj.weight", "model.layers", segment)
        == "model.layers.5.mlp.down_proj.weight"
    )
    assert old_name("lm_head.weight", "model.layers", segment) == "lm_head.weight"


# ---------------------------------------------------------------------------------------------- files that do not fit


def refuse(source: Path, said: str, *bounds: int, num_layers: int = 8) -> None:
    """Assert that files are refused before anything is written."""
    before = names(source.parent)
    with pytest.raises(UserError, match=said) as caught:
        cut_files(source, source.parent / "out", *(bounds or (2, 5)), num_layers=num_layers)
    assert "\n" not in str(caught.value)
    assert names(source.parent) == before


def test_layers_beyond_the_count_are_refused(tmp_path):
    source = saved(tiny("llama"), tmp_path / "source")
    edit_json(source / "config.json", num_hidden_layers=6)
    said = r"the files hold model\.layers\.6 beyond the 6 layers that the config names \(a multi-token-prediction head"
    refuse(source, said, 2, 4, num_layers=6)


def test_a_layer_that_is_not_there_is_refused(tmp_path):
    source = saved(tiny("llama"), tmp_path / "source")
    edit_weights(source, lambda stored: [stored.pop(name) for name in list(stored) if ".layers.3." in name])
    refuse(source, r"the files hold no model\.layers\.3 - fetch the checkpoint again")


def test_layers_under_another_name_are_refused(tmp_path):
    source = saved(tiny("llama"), tmp_path / "source")
    stored = load_file(source / SINGLE)
    odd = {name.replace("model.layers.", "model.stack.part"): tensor for name, tensor in stored.items()}
    save_file(odd, source / SINGLE, metadata={"format": "pt"})
    refuse(
        source, r"the files of .* name their layers unlike model\.layers - found lists: none - load and save the model"
    )
