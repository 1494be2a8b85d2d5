"""Distances by position and by domain are those of the full logits, and add up to the whole."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from families import tiny
from planted import mean_kl, random_blocks

from layerscalpel.distances import distances
from layerscalpel.evaluate import Reference, TokenFigures, evaluate, final_hidden, token_figures
from layerscalpel.probe import find_layers

BLOCKS = random_blocks(6, length=70, labelled_fraction=0.6)
DOMAINS = ("c4", "alpaca", "c4", "c4", "alpaca", "c4")
BINS = [(1, 16), (16, 32), (32, 71)]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tiny("llama", seed=1, max_position_embeddings=128), tiny("llama", max_position_embeddings=128)


@pytest.fixture(scope="module")
def figures(models) -> TokenFigures:
    student, parent = (find_layers(model) for model in models)
    reference = Reference(parent, final_hidden(parent, BLOCKS.tokens, batch_size=4))
    return token_figures(student, BLOCKS, reference)


@torch.no_grad()
def test_every_bin_has_the_kl_and_agreement_of_its_positions(models, figures):
    logits, wanted = (model(BLOCKS.tokens).logits for model in models)
    rows = distances(figures)["kl_by_position"]
    assert [(row["from"], row["to"]) for row in rows] == BINS
    for row in rows:
        place = slice(row["from"] - 1, row["to"] - 1)  # what stands before position 1 predicts it
        per_block = mean_kl(wanted[:, place], logits[:, place])
        assert row["kl_nats"]["value"] == pytest.approx(per_block.mean().item(), abs=1e-5)
        assert row["kl_nats"]["se"] == pytest.approx(per_block.std().item() / math.sqrt(6), abs=1e-5)
        same = (wanted[:, place].argmax(-1) == logits[:, place].argmax(-1)).double()
        assert row["top1_agreement_fraction"]["value"] == pytest.approx(same.mean().item())
        assert row["kl_nats"]["n"] == 6 * (row["to"] - row["from"])


def test_bins_and_domains_add_up_to_the_whole(figures):
    found = distances(figures, DOMAINS)
    for measure in ("kl_nats", "top1_agreement_fraction"):
        for parts in (found["kl_by_position"], found["by_domain"].values()):
            total = sum(row[measure]["value"] * row[measure]["n"] for row in parts)
            assert total / (6 * 70) == pytest.approx(found[measure]["value"])
    assert {name: row["num_blocks"] for name, row in found["by_domain"].items()} == {"c4": 4, "alpaca": 2}
    assert json.dumps(found, allow_nan=False)


def test_a_domain_has_the_figures_of_its_blocks_alone(models, figures):
    student, parent = (find_layers(model) for model in models)
    rows = torch.tensor([1, 4])
    alone = type(BLOCKS)(BLOCKS.tokens[rows], BLOCKS.labelled[rows], "alpaca", 2, {})
    reference = Reference(parent, final_hidden(parent, alone.tokens, batch_size=4))
    wanted = evaluate(student, alone, reference).to_dict()
    found = distances(figures, DOMAINS)["by_domain"]["alpaca"]
    for name, item in wanted.items():
        assert found[name] == pytest.approx(item, rel=1e-4)


def test_without_parent_or_mix_there_is_nothing_to_tell_apart(models):
    alone = distances(token_figures(find_layers(models[1]), BLOCKS, None), DOMAINS)
    assert set(alone) == {"ppl", "by_domain"}
    assert set(alone["by_domain"]["c4"]) == {"num_blocks", "ppl"}
    assert "by_domain" not in distances(token_figures(find_layers(models[1]), BLOCKS, None))


def test_the_parent_against_itself_departs_nowhere(models):
    parent = find_layers(models[1])
    reference = Reference(parent, final_hidden(parent, BLOCKS.tokens, batch_size=4))
    rows = distances(token_figures(parent, BLOCKS, reference))["kl_by_position"]
    assert {(row["kl_nats"]["value"], row["top1_agreement_fraction"]["value"]) for row in rows} == {(0.0, 1.0)}
