"""The figures are those of the full logits, and the parent against itself loses nothing."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from families import VOCAB, tiny
from planted import mean_kl, random_blocks

from layerscalpel import losses
from layerscalpel.distances import distances
from layerscalpel.errors import UserError
from layerscalpel.evaluate import Quality, Reference, evaluate, final_hidden, token_figures
from layerscalpel.probe import find_layers

BLOCKS = random_blocks(5, labelled_fraction=0.4)


def measured(student: Any, parent: Any, batch_size: int = 4) -> Quality:
    decoder = find_layers(parent)
    hidden = final_hidden(decoder, BLOCKS.tokens, batch_size=batch_size, label="parent")
    return evaluate(find_layers(student), BLOCKS, Reference(decoder, hidden), batch_size=batch_size)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt", "granite"])
def test_parent_against_itself_loses_nothing(family: str) -> None:
    model = tiny(family)
    quality = measured(model, model)
    assert quality.kl_nats is not None
    assert quality.top1_agreement_fraction is not None
    assert (quality.kl_nats.value, quality.kl_nats.se) == (0, 0)
    assert (quality.top1_agreement_fraction.value, quality.top1_agreement_fraction.se) == (1, 0)
    assert quality.ppl_ratio is not None
    assert (quality.ppl_ratio.value, quality.ppl_ratio.se) == (1, 0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom", "opt", "granite"])
def test_figures_equal_those_of_the_full_logits(family: str) -> None:
    student, parent = tiny(family, seed=1), tiny(family, seed=0)
    quality, logits, wanted = measured(student, parent), student(BLOCKS.tokens).logits, parent(BLOCKS.tokens).logits
    assert quality.kl_nats is not None
    assert quality.top1_agreement_fraction is not None
    assert quality.kl_nats.value == pytest.approx(mean_kl(wanted, logits).mean().item(), abs=1e-5)
    agreement = (wanted.argmax(-1) == logits.argmax(-1)).float().mean().item()
    assert quality.top1_agreement_fraction.value == pytest.approx(agreement)
    counted = BLOCKS.labelled[:, 1:]
    nll = F.cross_entropy(logits[:, :-1][counted].double(), BLOCKS.tokens[:, 1:][counted])
    assert quality.ppl.value == pytest.approx(nll.exp().item(), rel=1e-5)
    assert (quality.kl_nats.n, quality.ppl.n) == (BLOCKS.tokens.numel(), int(counted.sum()))


@torch.no_grad()
def test_perplexity_weighs_tokens_and_not_blocks() -> None:
    blocks, model = random_blocks(2), tiny("llama")
    blocks.labelled[1, 3:] = False  # 15 targets in one block, 2 in the other
    found = evaluate(find_layers(model), blocks, None).ppl
    log_probs = model(blocks.tokens).logits.log_softmax(-1)[:, :-1]
    nll_NT = -log_probs.gather(-1, blocks.tokens[:, 1:, None])[..., 0]
    long, short = nll_NT[0], nll_NT[1, :2]
    assert found.value == pytest.approx(math.exp((long.sum() + short.sum()) / 17), rel=1e-5)
    assert found.value != pytest.approx(math.exp((long.mean() + short.mean()) / 2), rel=1e-3)
    assert found.n == 17


@torch.no_grad()
def test_the_ratio_of_perplexities_is_paired_over_blocks():
    student, parent = tiny("llama", seed=1), tiny("llama")
    found, counted = measured(student, parent), BLOCKS.labelled[:, 1:]
    own_NT, parent_NT = (
        F.cross_entropy(m(BLOCKS.tokens).logits[:, :-1].mT.double(), BLOCKS.tokens[:, 1:], reduction="none")
        for m in (student, parent)
    )
    sums_N, counts_N = ((own_NT - parent_NT) * counted).sum(1), counted.sum(1)
    mean = sums_N.sum() / counts_N.sum()
    error = (sums_N - mean * counts_N).square().sum().div(4).sqrt() / math.sqrt(5) / counts_N.double().mean()
    assert found.ppl_ratio is not None
    assert found.ppl_ratio.value == pytest.approx(mean.exp().item(), rel=1e-5)
    assert found.ppl_ratio.se == pytest.approx((mean.exp() * error).item(), rel=1e-4)
    assert found.ppl_ratio.value == pytest.approx(
        found.ppl.value / evaluate(find_layers(parent), BLOCKS, None).ppl.value
    )
    assert found.ppl_ratio.n == found.ppl.n


def test_figures_do_not_depend_on_batches_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    student, parent = tiny("llama", seed=1), tiny("llama")
    whole = measured(student, parent, batch_size=5).to_dict()
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * 2 * 3 * VOCAB)  # three tokens of two blocks at once
    parts = measured(student, parent, batch_size=2).to_dict()
    for name, item in whole.items():
        assert parts[name] == pytest.approx(item, rel=1e-4)


def test_without_a_parent_only_perplexity_is_measured() -> None:
    found = evaluate(find_layers(tiny("llama")), BLOCKS, None).to_dict()
    assert list(found) == ["ppl"]
    assert found["ppl"]["se"] > 0


def test_one_block_gives_json_without_nan() -> None:
    found = evaluate(find_layers(tiny("llama")), random_blocks(1), None).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["ppl"]["se"] is None


def test_model_that_computes_nan_is_a_user_error() -> None:
    decoder = find_layers(tiny("llama"))
    decoder.layers[3].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="output is not finite"):
        evaluate(decoder, BLOCKS, None)
    with pytest.raises(UserError, match="output is not finite"):
        final_hidden(decoder, BLOCKS.tokens, batch_size=4, label="parent")


@pytest.mark.parametrize("times", [1e5, 1e38])
def test_a_ruined_model_is_named_in_one_line(times: float) -> None:
    model = tiny("llama")
    model.lm_head.weight.data.mul_(times)
    figures = token_figures(find_layers(model), BLOCKS, None, label="evaluating healed")
    with pytest.raises(UserError, match=r"evaluating healed: the perplexity is exp of .* nats, no finite number"):
        distances(figures)
