"""The losses equal torch's own, and a standard error covers what it should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from layerscalpel import losses
from layerscalpel.losses import Measured, block_mean, kl_to_parent, log_probabilities, token_chunks, token_nll

CPU = torch.device("cpu")


def logits(seed: int, *, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(3, 7, 31, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_to_itself_is_exactly_zero(scale, dtype):
    same = log_probabilities(logits(0, scale=scale, dtype=dtype))
    assert torch.count_nonzero(kl_to_parent(same, same.clone())) == 0


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_kl_is_not_negative(scale):
    for seed in range(10):
        parent, other = log_probabilities(logits(seed, scale=scale)), log_probabilities(logits(seed + 99, scale=scale))
        near = log_probabilities(logits(seed, scale=scale) * (1 + 1e-5))
        assert kl_to_parent(parent, other).min() > 0
        assert kl_to_parent(parent, near).min() > -1e-5  # terms of either sign cancel, in float32


def test_kl_equals_torch():
    parent, other = log_probabilities(logits(1)), log_probabilities(logits(2))
    expected = F.kl_div(other.double(), parent.double(), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_to_parent(parent, other).double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_is_from_the_parent():
    sure, unsure = torch.tensor([[[8.0, 0.0]]]), torch.tensor([[[0.0, 0.0]]])
    forth = kl_to_parent(log_probabilities(sure), log_probabilities(unsure)).item()
    back = kl_to_parent(log_probabilities(unsure), log_probabilities(sure)).item()
    assert forth == pytest.approx(math.log(2), abs=0.01)  # nats
    assert back > 3


def test_given_probabilities_change_nothing():
    parent, other = log_probabilities(logits(1)), log_probabilities(logits(2))
    assert torch.equal(kl_to_parent(parent, other, parent.exp()), kl_to_parent(parent, other))


def test_kl_of_a_certain_parent_is_finite():
    certain = logits(3)
    certain[..., 0] = 1e4
    assert torch.isfinite(kl_to_parent(log_probabilities(certain), log_probabilities(logits(4)))).all()


def test_log_probabilities_are_float32_and_normal():
    found = log_probabilities(logits(0, dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 7))


def test_token_nll_equals_cross_entropy():
    targets = torch.randint(31, (3, 7), generator=torch.Generator().manual_seed(5))
    expected = F.cross_entropy(logits(1).flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    torch.testing.assert_close(token_nll(log_probabilities(logits(1)), targets), expected)


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("num_tokens", [1, 2, 255, 256])
@pytest.mark.parametrize("vocab", [10, 50_000, 10_000_000])
def test_chunks_cover_each_token_once_within_the_limit(batch, num_tokens, vocab):
    chunks = list(token_chunks(batch, num_tokens, vocab, CPU))
    assert [i for part in chunks for i in range(num_tokens)[part]] == list(range(num_tokens))
    assert chunks[-1].stop == num_tokens
    longest = max(part.stop - part.start for part in chunks)
    assert longest == 1 or 4 * batch * vocab * longest <= losses.LOGITS_BYTES["cpu"]


def test_block_mean_is_the_plain_mean_of_equal_blocks():
    values = torch.rand(12, generator=torch.Generator().manual_seed(0))
    found = block_mean(values, torch.full((12,), 256))
    assert found.value == pytest.approx(values.double().mean().item(), rel=1e-12)
    assert found.se == pytest.approx(values.double().std().item() / math.sqrt(12), rel=1e-12)
    assert found.n == 12 * 256


def test_block_mean_weighs_by_tokens():
    values, counts = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([10, 20, 70])
    found = block_mean(values, counts)
    assert found.value == pytest.approx((10 + 40 + 350) / 100)
    assert found.n == 100
    assert block_mean(values, counts * 7).se == pytest.approx(found.se)


def test_an_empty_block_weighs_nothing():
    with_empty = block_mean(torch.tensor([1.0, 2.0, 99.0]), torch.tensor([10, 20, 0]))
    assert with_empty.value == pytest.approx(50 / 30)
    assert with_empty.n == 30


def test_one_block_has_no_standard_error():
    found = block_mean(torch.tensor([1.5]), torch.tensor([8]))
    assert found.value == 1.5
    assert math.isnan(found.se)


@pytest.mark.parametrize("equal", [True, False])
def test_the_standard_error_covers(equal):
    """Of intervals of 1.96 standard errors around 64 blocks, 95 % hold the true ratio of sums.

    Longer blocks have larger values here, so a formula that forgets the weights or their correlation fails.
    """
    generator = torch.Generator().manual_seed(3)
    draws, blocks = 2000, 64
    counts = torch.full((draws, blocks), 50) if equal else torch.randint(10, 200, (draws, blocks), generator=generator)
    values = counts / 100 + torch.randn(draws, blocks, generator=generator) * 0.5
    population = torch.arange(10, 200).double() / 100
    truth = 0.5 if equal else (population.square().sum() / population.sum()).item()
    found = [block_mean(values[i], counts[i]) for i in range(draws)]
    covered = sum(abs(each.value - truth) < 1.96 * each.se for each in found) / draws
    assert 0.925 < covered < 0.965  # 2,000 draws: +-0.01 about 0.95, a little less for 64 blocks
    spread = torch.tensor([each.value for each in found]).std().item()
    typical = torch.tensor([each.se for each in found]).mean().item()
    assert typical == pytest.approx(spread, rel=0.05)


def test_measured_is_written_with_its_three_fields():
    assert Measured(0.5, 0.1, 20).to_dict() == {"value": 0.5, "se": 0.1, "n": 20}
    assert Measured(0.5, math.nan, 1).to_dict() == {"value": 0.5, "se": None, "n": 1}
