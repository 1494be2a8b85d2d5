"""What is quantised and what stays: every module with weights is told; groups divide, or the user hears where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from layerscalpel.config import build_config
from layerscalpel.errors import UserError
from layerscalpel.scheme import Scheme, bare_model
from layerscalpel.settings import QuantizeSettings

WIDE = {"hidden_size": 64, "intermediate_size": 128}
SETTINGS = QuantizeSettings(method="rtn")


def weights_of(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "bloom", "gpt_oss", "bamba", "gemma3_text"])
def test_every_module_with_weights_is_converted_or_left_with_a_reason(family: str) -> None:
    model = tiny(family)
    scheme = Scheme.of(model, SETTINGS)
    assert set(scheme.converted) | set(scheme.reasons) == weights_of(model)
    assert not set(scheme.converted) & set(scheme.reasons)
    counts = scheme.counts()
    assert counts["converted"] + sum(counts["left"].values()) == counts["modules"] == len(weights_of(model))
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(scheme.left) == linears - set(scheme.converted)


@pytest.mark.parametrize(("widths", "size"), [((256, 512), 128), ((64, 128), 64), ((96, 128), 32), ((192, 320), 64)])
def test_the_group_is_the_largest_that_divides_all(widths: tuple[int, int], size: int) -> None:
    model = tiny("llama", hidden_size=widths[0], intermediate_size=widths[1], num_hidden_layers=6)
    scheme = Scheme.of(model, SETTINGS)
    assert scheme.group_size == size
    assert len(scheme.converted) == 6 * 7


def test_a_width_that_no_group_divides_is_left_and_said() -> None:
    scheme = Scheme.of(tiny("llama"), SETTINGS)  # the mlp is 48 wide
    odd = [name for name, why in scheme.reasons.items() if why == "its input is no multiple of 32"]
    assert odd == [f"model.layers.{i}.mlp.down_proj" for i in range(8)]


def test_a_group_that_does_not_divide_is_refused_by_name() -> None:
    said = r"groups of 32 do not divide the input of model\.layers\.0\.mlp\.down_proj, 48 wide; so do not 7 others"
    with pytest.raises(UserError, match=said + r" - allowed: 16 - quantize\.group_size=0 takes what fits"):
        Scheme.of(tiny("llama"), replace(SETTINGS, group_size=32))
    assert Scheme.of(tiny("llama"), replace(SETTINGS, group_size=16)).group_size == 16


def test_the_head_is_quantised_only_if_asked_for() -> None:
    model = tiny("llama", **WIDE)
    assert "lm_head" in Scheme.of(model, SETTINGS).left
    assert "lm_head" in Scheme.of(model, replace(SETTINGS, head="quantize")).converted


def test_a_tied_head_cannot_be_quantised() -> None:
    with pytest.raises(UserError, match=r"is tied to its input embedding, which stays as it is - allowed"):
        Scheme.of(tiny("llama", tie_word_embeddings=True, **WIDE), replace(SETTINGS, head="quantize"))


def test_seam_layers_are_wider_or_left() -> None:
    model = tiny("llama", **WIDE)
    wide = Scheme.of(model, replace(SETTINGS, seam_bits=8), [3])
    assert set(wide.wider.values()) == {8}
    assert {name.split(".")[2] for name in wide.wider} == {"2", "3"}
    assert [wide.bits_of(f"model.layers.{i}.mlp.up_proj") for i in (1, 2, 3, 4)] == [4, 8, 8, 4]
    left = Scheme.of(model, replace(SETTINGS, seam_bits=16), [3])
    assert {name.split(".")[2] for name in left.left if name != "lm_head"} == {"2", "3"}
    assert Scheme.of(model, replace(SETTINGS, seam_bits=8, bits=8), [3]).wider == {}


def test_a_seam_at_the_end_has_one_layer() -> None:
    scheme = Scheme.of(tiny("llama", **WIDE), replace(SETTINGS, seam_bits=8), [8])
    assert {name.split(".")[2] for name in scheme.wider} == {"7"}


def test_a_model_without_linear_layers_is_refused_with_what_it_has() -> None:
    with pytest.raises(UserError, match=r"no linear layer that could be quantised: 32 x no linear layer \(Conv1D\)"):
        Scheme.of(tiny("gpt2"), SETTINGS)


def test_a_router_stays() -> None:
    model = tiny("llama", **WIDE)
    model.model.layers[0].mlp.gate = torch.nn.Linear(64, 4)
    assert Scheme.of(model, SETTINGS).reasons["model.layers.0.mlp.gate"] == "a router"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "jamba"])
def test_experts_that_are_put_together_on_loading_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"the experts of \w+ForCausalLM are stored one by one .* - allowed"):
        Scheme.of(tiny(family), SETTINGS)


def test_a_model_of_that_kind_without_experts_is_not_refused() -> None:
    assert Scheme.of(tiny("deepseek_v3", first_k_dense_replace=8), replace(SETTINGS, group_size=0)).converted


def test_linear_layers_of_a_kind_of_their_own_stay() -> None:
    class Own(torch.nn.Linear):
        pass

    model = tiny("llama", **WIDE)
    model.model.layers[0].mlp.up_proj = Own(64, 128)
    scheme = Scheme.of(model, SETTINGS)
    assert scheme.reasons["model.layers.0.mlp.up_proj"] == "a linear layer of its own kind (Own)"
    assert "model.layers.0.mlp.up_proj" in scheme.left  # else its packed form would be looked for


def test_a_model_of_such_layers_alone_is_refused() -> None:
    config = AutoConfig.for_model("falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    with pytest.raises(UserError, match=r"8 x a linear layer of its own kind \(FalconLinear\)"):
        Scheme.of(AutoModelForCausalLM.from_config(config), SETTINGS)


@pytest.mark.parametrize(
    ("width", "said"),
    [(48, r"- allowed: --group-size 16, which divides them$"), (40, r"multiples of 32, or all of 16$")],
)
def test_a_model_of_odd_widths_is_told_the_group_that_would_do(width: int, said: str) -> None:
    model = tiny("llama", hidden_size=width, intermediate_size=width)
    with pytest.raises(UserError, match=said):
        Scheme.of(model, SETTINGS)
    if width % 16 == 0:
        assert Scheme.of(model, replace(SETTINGS, group_size=16)).converted


def test_a_folder_is_read_without_its_weights(tmp_path) -> None:
    tiny("llama", **WIDE).save_pretrained(tmp_path)
    bare = bare_model(tmp_path)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert Scheme.of(tmp_path, SETTINGS).converted == Scheme.of(bare, SETTINGS).converted


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bits", 5, r"quantize\.bits=5 is unknown - allowed: 3, 4, 8"),
        ("bits", True, r"quantize\.bits=True is unknown - allowed: 3, 4, 8"),
        ("group_size", 48, r"quantize\.group_size=48 is unknown - allowed: 0, 16, 32, 64, 128, 256"),
        ("seam_bits", False, r"quantize\.seam_bits=False is unknown - allowed: 0, 8, 16"),
        ("method", "gtpq", r"quantize\.method=gtpq is unknown - did you mean 'gptq'\?"),
        ("method", "awq", r"quantize\.method=awq is unknown - (allowed: gptq, none, rtn|did you mean)"),
        ("damping", "0.1,-1", r"quantize\.damping=-1 is out of range"),
        ("beside", "parent4,child", r"quantize\.beside=child is unknown"),
    ],
)
def test_settings_out_of_range(key: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_config([{f"quantize.{key}": value}])
