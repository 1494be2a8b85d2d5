"""Sampled text is the model's own distribution, whatever its checkpoint asks for, and stays out of held-out parts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from families import VOCAB, tiny
from healing import by_tier
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from world import byte_tokenizer, write_texts

from layerscalpel import checks, workbench
from layerscalpel.alone import measure_alone
from layerscalpel.cli import main
from layerscalpel.config import build_config
from layerscalpel.data import prepare_blocks
from layerscalpel.errors import UserError
from layerscalpel.records import find_source
from layerscalpel.selftext import first_tokens, sample_blocks
from layerscalpel.settings import DataSettings

MOST_DEVIATION = 4.5
"""Standard errors; by chance once in 150,000 draws, and the draws are seeded."""
WRONG = {"top_k": {"top_k": 50}, "temperature": {"temperature": 0.7}, "top_p": {"top_p": 0.95}}


@dataclasses.dataclass
class Names:
    """All of a tokenizer that sampling reads."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    all_special_ids: tuple[int, ...] = (0, 1, 2)

    def get_vocab(self) -> dict[str, int]:
        return {f"w{i}": i for i in range(VOCAB)}


def sampled(model: PreTrainedModel, count: int = 32, length: int = 12, seed: int = 0, **changes: int) -> Tensor:
    return sample_blocks(model, Names(), num_blocks=count, block_tokens=length, seed=seed, **changes).tokens


def sampled_wrongly(model: PreTrainedModel, count: int, length: int, **settings: float) -> Tensor:
    """Return blocks as a sampler with other settings draws them."""
    torch.manual_seed(0)
    start = torch.ones(count, 1, dtype=torch.long)
    wrong = GenerationConfig(**({"do_sample": True, "top_k": 0, "max_new_tokens": length - 1} | settings))
    return model.generate(start, attention_mask=torch.ones_like(start), generation_config=wrong, eos_token_id=-1)


@torch.no_grad()
def log_probs_of(model: PreTrainedModel, tokens_NT: Tensor) -> Tensor:
    """Return log p [N, T - 1, V] of the tokens after each prefix, in whole forwards without a cache."""
    return model(input_ids=tokens_NT, use_cache=False).logits[:, :-1].double().log_softmax(-1)


def chi_square_deviation(tokens_N: Tensor, log_probs_V: Tensor) -> float:
    """Return by how many standard errors the frequencies' chi-square exceeds its expectation."""
    expected_V = log_probs_V.exp() * len(tokens_N)
    found_V = torch.bincount(tokens_N, minlength=VOCAB).double()
    chi_square = ((found_V - expected_V) ** 2 / expected_V).sum().item()
    freedom = VOCAB - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def surprise_deviation(tokens_NT: Tensor, log_probs_NTV: Tensor) -> float:
    """Return by how many standard errors the mean surprise differs from the mean entropy, over all positions.

    Each token's -log p minus the entropy of its distribution has mean 0 given the prefix, if the sampler is right.
    """
    entropy_NT = -(log_probs_NTV.exp() * log_probs_NTV).sum(-1)
    surprise_NT = -log_probs_NTV.gather(-1, tokens_NT[:, 1:, None])[..., 0]
    excess = (surprise_NT - entropy_NT).flatten()
    return (excess.mean() / excess.std() * math.sqrt(len(excess))).item()


# ---------------------------------------------------------------------------------------------- the distribution


def test_frequencies_after_a_prefix_are_the_models() -> None:
    model = tiny("llama")
    log_probs_V = log_probs_of(model, torch.ones(1, 2, dtype=torch.long))[0, 0]
    found = sampled(model, count=6000, length=2, batch_size=2000)
    assert abs(chi_square_deviation(found[:, 1], log_probs_V)) < MOST_DEVIATION


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_bound_on_frequencies_tells_a_wrong_sampler(wrong: dict) -> None:
    model = tiny("llama")
    log_probs_V = log_probs_of(model, torch.ones(1, 2, dtype=torch.long))[0, 0]
    found = sampled_wrongly(model, 6000, 2, **wrong)
    assert chi_square_deviation(found[:, 1], log_probs_V) > 2 * MOST_DEVIATION


@pytest.mark.parametrize("family", by_tier(["llama", "gemma2", "gpt2", "bloom"], everyday=["gemma2", "gpt2"]))
def test_every_later_token_follows_the_models_distribution(family: str) -> None:
    """With caches, windows shorter than the block (gemma2) and text that goes on past its end."""
    model = tiny(family)
    found = sampled(model, count=512, length=16, batch_size=512)
    assert abs(surprise_deviation(found, log_probs_of(model, found))) < MOST_DEVIATION


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_bound_on_surprise_tells_a_wrong_sampler(wrong: dict) -> None:
    model = tiny("llama")
    found = sampled_wrongly(model, 512, 16, **wrong)
    assert surprise_deviation(found, log_probs_of(model, found)) < -2 * MOST_DEVIATION


def test_the_checkpoints_own_settings_change_nothing() -> None:
    model = tiny("llama")
    expected = sampled(model)
    own = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=3,
        top_p=0.5,
        min_p=0.2,
        typical_p=0.5,
        repetition_penalty=1.8,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(3, 60)),
        begin_suppress_tokens=list(range(60, 90)),
        bad_words_ids=[[91]],
        forced_eos_token_id=2,
        eos_token_id=list(range(40)),
        pad_token_id=0,
        max_length=5,
        num_beams=2,
        num_return_sequences=2,
        renormalize_logits=True,
    )
    model.generation_config = own
    before = own.to_dict()
    assert torch.equal(sampled(model), expected)
    assert model.generation_config is own
    assert own.to_dict() == before


# ---------------------------------------------------------------------------------------------- blocks


def test_blocks_have_the_form_of_text() -> None:
    blocks = sample_blocks(tiny("llama"), Names(), num_blocks=21, block_tokens=9, seed=3, batch_size=8)
    assert blocks.tokens.shape == blocks.labelled.shape == (21, 9)
    assert blocks.tokens.dtype == torch.int64
    assert not blocks.labelled[:, 0].any()
    assert blocks.labelled[:, 1:].all()
    assert (blocks.tokens[:, 0] == 1).all()
    assert len(blocks.tokens.unique(dim=0)) == 21, "every block is a sample of its own"
    summary = blocks.summary()
    assert {key: summary[key] for key in ("source", "num_blocks", "block_tokens", "num_documents", "dropped")} == {
        "source": "self",
        "num_blocks": 21,
        "block_tokens": 9,
        "num_documents": 21,
        "dropped": {},
    }


def test_text_goes_on_past_its_end() -> None:
    found = sampled(tiny("llama"), count=64, length=20)
    ended = (found[:, :-2] == 2).any(1)
    assert ended.any()
    after = torch.cat([row[row.tolist().index(2) + 1 :] for row in found[ended]])
    assert len(after.unique()) > 20, "not filled up with one token"


def test_what_a_block_begins_with() -> None:
    torch.manual_seed(0)
    assert first_tokens(Names(), 3).tolist() == [[1]] * 3
    assert first_tokens(Names(bos_token_id=None), 3).tolist() == [[2]] * 3
    assert first_tokens(Names(bos_token_id=0), 2).tolist() == [[0]] * 2
    drawn = first_tokens(Names(None, None, all_special_ids=(5, 6)), 4000)
    assert drawn.shape == (4000, 1)
    assert set(drawn.flatten().tolist()) == set(range(VOCAB)) - {5, 6}


def test_a_seed_names_the_blocks() -> None:
    model = tiny("llama")
    assert torch.equal(sampled(model, seed=5), sampled(model, seed=5))
    assert not torch.equal(sampled(model, seed=5), sampled(model, seed=6))
    nameless = {"num_blocks": 6, "block_tokens": 8}
    drawn = [sample_blocks(model, Names(None, None), seed=seed, **nameless).tokens for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][:, 0], drawn[2][:, 0])


def test_the_callers_random_numbers_are_as_if_nothing_was_sampled() -> None:
    model = tiny("llama")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    found = sampled(model)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(12)
    assert torch.equal(sampled(model), found), "nor do they change what is sampled"


# ---------------------------------------------------------------------------------------------- refusals


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="no tokenizer, so its text has no first token - add its tokenizer files"):
        sample_blocks(tiny("llama"), None, num_blocks=2, block_tokens=8, seed=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_overflow_are_refused_and_leave_all_as_it_was(bad: float) -> None:
    model = tiny("llama")
    own, state = model.generation_config, torch.get_rng_state()
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = bad
    with pytest.raises(UserError, match=r"logits are not finite .*, so no text can be sampled - try another --dtype"):
        sampled(model)
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


def test_a_token_that_the_model_rules_out_is_no_overflow() -> None:
    model = tiny("llama")

    def without_seven(_module: object, _args: object, output: Tensor) -> Tensor:
        return output.index_fill(-1, torch.tensor([7]), -math.inf)

    model.get_output_embeddings().register_forward_hook(without_seven)
    assert not (sampled(model, count=64) == 7).any()


def test_held_out_text_is_never_sampled(tmp_path: Path) -> None:
    texts = str(write_texts(tmp_path / "texts.jsonl"))
    for part in ("evaluation", "healing"):
        sources = {"calibration": texts, "healing": texts, "evaluation": texts} | {part: "self"}
        settings = DataSettings(**sources, block_tokens=16, evaluation_blocks=4)
        with pytest.raises(UserError, match="held-out text must not come from the model it measures"):
            prepare_blocks(byte_tokenizer(), settings, num_calibration=2, seed=0)
    with pytest.raises(UserError, match=r"self has no text to read: held-out .* allowed: data\.calibration=self"):
        find_source("self").read(0)


def settings_of(world: Path, **changes: object) -> dict:
    texts, model = str(world / "texts.jsonl"), str(world / "model")
    shared = {"model.name": model, "data.evaluation": texts, "data.healing": texts, "data.calibration": "self"}
    return shared | {"data.block_tokens": 16, "data.evaluation_blocks": 4, "search.method": "exact"} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.evaluation": "self"}, [r"data\.evaluation=self is refused: held-out text must not"]),
        ({"data.evaluation": "self", "data.healing": "self"}, [r"data\.evaluation=self", r"data\.healing=self"]),
        ({"model.offload": "disk"}, [r"data\.calibration=self .* days with model\.offload=disk - allowed: a model in"]),
        ({"model.offload": "cpu", "data.healing": "self"}, [r"model\.offload=cpu", r"data\.healing=self"]),
    ],
)
def test_places_are_checked_before_loading(world: Path, changes: dict, said: list[str]) -> None:
    config = build_config([settings_of(world) | changes])
    with pytest.raises(UserError) as refused:
        checks.check_before_loading(config, ["search", "cut", "stitch", "heal", "evaluate"])
    for line in said:
        refused.match(line)


def test_places_that_nothing_reads_are_not_checked(world: Path) -> None:
    config = build_config([settings_of(world, **{"data.healing": "self", "heal.method": "none"})])
    checks.check_before_loading(config, ["search", "cut", "stitch", "heal", "evaluate"])


# ---------------------------------------------------------------------------------------------- runs


def scalpel(world: Path, command: str, out: Path, *more: str) -> dict:
    shared = ["--recipe", str(world / "recipe.yaml"), "--out", str(out), "--quiet", "--set", "data.calibration=self"]
    assert main([command, str(world / "model"), *shared, *more]) == 0
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_a_search_on_the_models_own_text(world: Path, tmp_path: Path) -> None:
    first = scalpel(world, "search", tmp_path / "first")
    data = first["data"]["calibration"]
    assert data["source"] == "self"
    assert (data["num_blocks"], data["block_tokens"], data["labelled_tokens"]) == (4, 16, 4 * 15)
    assert first["segment"][1] - first["segment"][0] == 2
    again = scalpel(world, "search", tmp_path / "again")
    assert again["data"]["calibration"] == data
    assert again["search"]["scores"] == first["search"]["scores"]
    other = scalpel(world, "search", tmp_path / "other", "--seed", "1")
    assert other["data"]["calibration"]["sha256"] != data["sha256"]


def test_nothing_is_sampled_that_nothing_reads(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("sampled without need")

    monkeypatch.setattr(workbench, "sample_blocks", never)
    given = (
        "--segment",
        "2:4",
        "--until",
        "evaluate",
        "--set",
        "heal.method=none",
        "--set",
        "evaluate.sample_tokens=0",
    )
    found = scalpel(world, "run", tmp_path / "run", *given, "--no-verify")
    assert found["evaluate"]["cut"]["kl_nats"]["value"] > 0


def test_evaluation_text_is_the_same_whatever_calibrates(world: Path, tmp_path: Path) -> None:
    texts, tokenizer = str(world / "texts.jsonl"), byte_tokenizer()
    settings = DataSettings(texts, texts, texts, block_tokens=16, evaluation_blocks=4)
    with_text = prepare_blocks(tokenizer, settings, num_calibration=8, seed=0, heal=False)
    own = dataclasses.replace(settings, calibration="self")
    without = prepare_blocks(tokenizer, own, num_calibration=0, seed=0, heal=False)
    assert without.evaluation.summary() == with_text.evaluation.summary()
    assert without.calibration.tokens.shape == without.calibration.labelled.shape == (0, 16)
    changes = {"evaluate.sample_tokens": 0, "benchmark.enabled": False}
    figures = []
    for source in (texts, "self"):
        config = build_config([settings_of(world, **{"data.calibration": source}) | changes])
        figures.append(measure_alone("evaluate", config, tmp_path / f"{len(figures)}")["evaluate"]["model"]["ppl"])
    assert figures[0] == figures[1]


def test_one_model_is_not_measured_on_its_own_text(world: Path, tmp_path: Path) -> None:
    config = build_config([settings_of(world, **{"data.evaluation": "self"})])
    with pytest.raises(UserError, match=r"data\.evaluation=self is refused: held-out"):
        measure_alone("evaluate", config, tmp_path / "out")
