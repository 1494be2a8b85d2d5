"""Perplexity by position is that of the full logits, damage shows where it is, and too little text ends no run."""

from __future__ import annotations

import copy
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows it by
from families import VOCAB, tiny, tokens
from findings import PROVENANCE, full_results, long_results
from planted import one_by_one, random_blocks, silence
from test_tables import printed
from world import byte_tokenizer, write_texts

from layerscalpel import longtext, losses
from layerscalpel.card import model_card, warnings
from layerscalpel.config import to_dict
from layerscalpel.data import TokenBlocks, prepare_blocks
from layerscalpel.errors import UserError
from layerscalpel.longplots import ratio_by_position
from layerscalpel.longtext import (
    LongCheck,
    by_position,
    doubling_bins,
    long_rows,
    near_and_far,
    position_nll,
    prepare_check,
)
from layerscalpel.longwords import compared, long_lines, long_text
from layerscalpel.probe import find_layers
from layerscalpel.report import render_report
from layerscalpel.settings import Config, DataSettings
from layerscalpel.summary import measured

LENGTH = 256


@pytest.fixture(scope="module")
def parent() -> Any:
    """A model with room for long texts, to which it matters where a token stands."""
    model = tiny("llama", max_position_embeddings=LENGTH)
    for layer in model.model.layers:
        for projection in layer.self_attn.children():
            projection.weight.data *= 3
    model.lm_head.weight.data *= 2
    return model


@pytest.fixture(scope="module")
def text(parent) -> TokenBlocks:
    """Texts that the parent wrote, so that it knows them better than any damaged copy can."""
    with torch.no_grad():
        torch.manual_seed(0)
        written = parent.generate(
            tokens(3, 4), max_new_tokens=LENGTH - 4, min_new_tokens=LENGTH - 4, do_sample=True, top_k=0
        )
    return TokenBlocks(written, torch.ones_like(written, dtype=torch.bool), "written", 3, {})


def forgetful(parent: Any, beyond: int) -> Any:
    """Return a copy that takes every position from `beyond` on for the same."""
    child = copy.deepcopy(parent)
    rotary = child.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, position_ids.clamp(max=beyond))
    return child


def rows_of(check: LongCheck, name: str, model: Any) -> dict[str, Any]:
    found = check.measure(name, find_layers(model))
    assert json.dumps(found, allow_nan=False)
    return found


# ---------------------------------------------------------------------------------------------- bins


@pytest.mark.parametrize("length", [2, 8, 64, 65, 127, 128, 129, 191, 192, 1000, 1024, 4095, 4096, 4100])
def test_bins_cover_every_position_once(length):
    bins = doubling_bins(length)
    assert [p for low, high in bins for p in range(low, high)] == list(range(1, length))
    assert all(high - low >= longtext.FIRST_BIN for low, high in bins[1:])


def test_bins_double():
    assert doubling_bins(1024) == [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    assert doubling_bins(4100)[-1] == (2048, 4100)


@pytest.mark.parametrize(
    ("length", "near", "far"),
    [
        (128, (1, 64), (64, 128)),
        (256, (64, 128), (128, 256)),
        (1024, (64, 512), (512, 1024)),
        (4096, (64, 512), (2048, 4096)),
    ],
)
def test_the_far_end_is_compared_with_what_healing_saw(length, near, far):
    assert near_and_far(length) == (near, far)
    assert near_and_far(127) is None


# ---------------------------------------------------------------------------------------------- figures


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bloom"])
def test_the_loss_is_that_of_the_full_logits(family):
    model, ids = tiny(family), tokens(2, 100)
    logits = model(ids).logits
    wanted = F.cross_entropy(logits[:, :-1].transpose(1, 2).double(), ids[:, 1:], reduction="none")
    torch.testing.assert_close(position_nll(find_layers(model), ids), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_bin_has_the_perplexity_of_its_tokens(parent, text):
    rows = rows_of(LongCheck(text), "parent", parent)["by_position"]
    logits = parent(text.tokens).logits.double()
    assert [(row["from"], row["to"]) for row in rows] == [(1, 64), (64, 128), (128, 256)]
    for row in rows:
        low, high = row["from"], row["to"]
        nll = F.cross_entropy(logits[:, low - 1 : high - 1].flatten(0, 1), text.tokens[:, low:high].flatten())
        assert row["ppl"]["value"] == pytest.approx(nll.exp().item(), rel=1e-5)
        assert row["ppl"]["n"] == 3 * (high - low)
        assert "ppl_ratio" not in row


def test_errors_are_those_of_the_paired_block_means():
    draw = torch.Generator().manual_seed(0)
    parent_NT = torch.rand(5, 127, generator=draw, dtype=torch.float64) * 9
    child_NT = parent_NT + 0.3 + 0.1 * torch.rand(5, 127, generator=draw, dtype=torch.float64)
    more_NT = (child_NT - parent_NT)[:, 63:]
    expected = more_NT.mean(1)
    found = by_position(child_NT, parent_NT)
    ratio, grown = found["by_position"][1]["ppl_ratio"], found["ppl_ratio_growth"]
    assert ratio["value"] == pytest.approx(expected.mean().exp().item())
    assert ratio["se"] == pytest.approx(ratio["value"] * expected.std().item() / math.sqrt(5))
    assert ratio["se"] < by_position(child_NT)["by_position"][1]["ppl"]["se"] / 100  # hard texts are hard for both
    apart = expected - (child_NT - parent_NT)[:, :63].mean(1)
    assert grown["value"] == pytest.approx(apart.mean().exp().item())
    assert grown["se"] == pytest.approx(grown["value"] * apart.std().item() / math.sqrt(5))
    assert [row["ppl_ratio"] for row in found["near_and_far"]] == [row["ppl_ratio"] for row in found["by_position"]]


def test_the_size_of_a_chunk_changes_nothing(parent, text, monkeypatch):
    decoder = find_layers(parent)
    whole = position_nll(decoder, text.tokens)
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * VOCAB * 7)
    seen = []
    own = longtext.head_logits
    monkeypatch.setattr(longtext, "head_logits", lambda decoder, h: seen.append(h.shape[:2]) or own(decoder, h))
    torch.testing.assert_close(position_nll(decoder, text.tokens), whole, atol=1e-5, rtol=1e-5)
    assert set(seen) == {(1, 7), (1, (LENGTH - 1) % 7)}  # full logits never exist


def test_a_model_whose_layers_come_in_one_by_one_gives_the_same(parent, text):
    decoder, store = find_layers(parent), {}
    there = position_nll(one_by_one(decoder), text.tokens, store=store)
    torch.testing.assert_close(there, position_nll(decoder, text.tokens), atol=1e-5, rtol=1e-5)
    assert store == {}


def test_the_parent_against_itself_is_exactly_one(parent, text):
    check = LongCheck(text)
    rows_of(check, "parent", parent)
    found = rows_of(check, "again", parent)
    assert {(row["ppl_ratio"]["value"], row["ppl_ratio"]["se"]) for row in found["by_position"]} == {(1.0, 0.0)}
    assert (found["ppl_ratio_growth"]["value"], found["ppl_ratio_growth"]["se"]) == (1.0, 0.0)


@pytest.mark.parametrize(("beyond", "hurt"), [(140, [False, False, True]), (70, [False, True, True])])
def test_a_model_that_loses_its_place_shows_it_from_there_on(parent, text, beyond, hurt):
    check = LongCheck(text)
    rows_of(check, "parent", parent)
    found = rows_of(check, "forgetful", forgetful(parent, beyond))
    ratios = [row["ppl_ratio"] for row in found["by_position"]]
    for ratio, is_hurt in zip(ratios, hurt, strict=True):
        if is_hurt:
            assert ratio["value"] - 1 > 2 * ratio["se"] > 0
        else:
            assert ratio["value"] == pytest.approx(1, abs=1e-5)
    grown = found["ppl_ratio_growth"]
    assert grown["value"] == pytest.approx(ratios[2]["value"] / ratios[1]["value"])
    assert (grown["value"] - 1 > 2 * grown["se"]) == (not hurt[1])


def test_a_cut_hurts_near_and_far(parent, text):
    child = copy.deepcopy(parent)
    for layer in child.model.layers[2:4]:
        silence(layer)
    check = LongCheck(text)
    rows_of(check, "parent", parent)
    assert all(row["ppl_ratio"]["value"] > 1.05 for row in rows_of(check, "cut", child)["by_position"])


def test_one_text_has_no_error_and_one_bin_no_growth(parent):
    check = LongCheck(random_blocks(1, 60))
    rows_of(check, "parent", parent)
    found = rows_of(check, "cut", tiny("llama", seed=1))
    assert [row["ppl_ratio"]["se"] for row in found["by_position"]] == [None]
    assert set(found) == {"by_position"}


# ---------------------------------------------------------------------------------------------- what cannot be measured


def test_a_text_without_memory_is_noted_and_ends_nothing(parent, text, monkeypatch):
    check = LongCheck(text)
    rows_of(check, "parent", parent)

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(longtext, "position_nll", no_room)
        assert rows_of(check, "cut", parent) == {}
    assert "by_position" in rows_of(check, "healed", parent)  # the next one is tried
    assert check.note() == {"long_note": "cut: no memory for a text of 256 tokens - lower evaluate.context_tokens"}


def test_a_parent_that_cannot_be_measured_ends_the_check(parent, text):
    broken = copy.deepcopy(parent)
    broken.model.layers[3].mlp.down_proj.weight.data[0, 0] = math.nan
    check = LongCheck(text)
    assert rows_of(check, "parent", broken) == {}
    assert rows_of(check, "cut", parent) == {}
    assert check.summary() == {}
    assert check.note() == {"long_note": "parent: layer 7's output is not finite (NaN or infinity)"}


# ---------------------------------------------------------------------------------------------- texts


def documents(lengths: list[int]) -> list[list[int]]:
    """Return documents whose tokens are their own number."""
    return [[number] * length for number, length in enumerate(lengths, 1)]


def test_long_documents_are_taken_whole():
    rows, used, too_short = long_rows(documents([3, 12, 5, 10, 11]), 10, 2)
    assert rows == [[2] * 10, [4] * 10]
    assert (used, too_short) == (2, 2)


def test_where_too_few_are_long_others_are_joined():
    rows, used, too_short = long_rows(documents([3, 12, 8, 4, 4, 4, 4]), 10, 3)
    assert rows == [[2] * 10, [1] * 3 + [3] * 7, [4] * 4 + [5] * 4 + [6] * 2]
    assert (used, too_short) == (6, 1)


def test_long_documents_are_looked_for_only_so_far(monkeypatch):
    monkeypatch.setattr(longtext, "LOOKED_AT", 6)
    drawn = iter(documents([5] * 6 + [99] * 2))
    rows, *_ = long_rows(drawn, 10, 2)
    assert {len(set(row)) for row in rows} == {2}
    assert len(list(drawn)) == 2


def test_too_little_text_gives_what_there_is():
    assert long_rows(documents([6, 6, 6]), 10, 2) == ([[1] * 6 + [2] * 4], 2, 1)
    assert long_rows(documents([6]), 10, 2) == ([], 0, 1)
    assert long_rows(iter([]), 10, 2) == ([], 0, 0)


def parts_of(source: Any, **changes: Any) -> Any:
    small = {"block_tokens": 16, "healing_block_tokens": 32, "evaluation_blocks": 4, "healing_blocks": 12} | changes
    settings = DataSettings(calibration=str(source), healing=str(source), evaluation=str(source), **small)
    return prepare_blocks(byte_tokenizer(), settings, num_calibration=4, seed=0)


def texts_in(blocks: TokenBlocks) -> str:
    return "\n".join(byte_tokenizer().batch_decode(blocks.tokens))


def test_the_texts_are_those_of_no_other_part(tmp_path):
    draw = random.Random(0)
    numbered = [f"n{i:03d} " + "x" * draw.choice([20, 400]) for i in range(60)]
    (tmp_path / "texts.txt").write_text("\n\n".join(numbered), encoding="utf-8")
    parts = parts_of(tmp_path / "texts.txt", healing_blocks=40)
    check = prepare_check(parts, asked=100, stated=None, num_blocks=5)
    assert check.note() == {}
    assert check.summary()["long"]["num_blocks"] == 5
    assert not check.summary()["long"]["joined"]
    named = [{word for word in texts_in(part).split() if word.startswith("n")} for part in others_and(parts, check)]
    assert all(named)
    assert sum(map(len, named)) == len(set().union(*named))


def others_and(parts: Any, check: LongCheck) -> list[TokenBlocks]:
    assert check._blocks is not None
    return [parts.evaluation, parts.calibration, parts.healing, parts.validation, check._blocks]


@pytest.mark.parametrize(
    ("given", "length", "note"),
    [
        ({"asked": 100, "stated": 5000, "num_blocks": 2}, 100, None),
        ({"asked": None, "stated": 200, "num_blocks": 2}, 200, None),
        ({"asked": None, "stated": 5000, "num_blocks": 1}, 4096, None),
        ({"asked": None, "stated": 5000, "num_blocks": 9}, 4096, "of 9 texts of 4,096 tokens"),
        ({"asked": 99_999, "stated": None, "num_blocks": 2}, None, "has enough for 0 of 2 texts of 99,999 tokens"),
        ({"asked": None, "stated": None, "num_blocks": 2}, None, "states no context limit - name evaluate.context"),
        ({"asked": None, "stated": 5000, "num_blocks": 0}, None, None),
    ],
)
def test_length_and_number_are_as_asked_or_it_is_said_why_not(tmp_path, given, length, note, parent):
    check = prepare_check(parts_of(write_texts(tmp_path / "texts.jsonl")), **given)
    assert check.summary().get("long", {}).get("block_tokens") == length
    assert note in check.note()["long_note"] if note else check.note() == {}
    if length is None:
        assert check.measure("parent", find_layers(parent)) == {}


def test_joined_documents_are_said_to_be_joined(tmp_path):
    check = prepare_check(parts_of(write_texts(tmp_path / "a.jsonl")), asked=1000, stated=None, num_blocks=2)
    assert check.summary()["long"]["joined"]
    assert check.summary()["long"]["num_documents"] > 2


def test_a_source_that_has_gone_away_is_noted():
    def gone() -> Any:
        raise UserError("data set x cannot be fetched")
        yield

    parts: Any = SimpleNamespace(rest=SimpleNamespace(encoded=gone, name="x", dropped={}))
    assert prepare_check(parts, asked=64, stated=None, num_blocks=2).note() == {
        "long_note": "data set x cannot be fetched"
    }


# ---------------------------------------------------------------------------------------------- what a person sees


def test_growing_damage_is_a_warning_everywhere():
    results = long_results()
    said = (
        "The damage grows with position: on 4 texts of 4,096 tokens the healed model's perplexity is 1.48 ± 0.03 times"
        " the parent's at positions 64..511 and 1.90 ± 0.05 times at 2,048..4,095, 1.28 ± 0.04 times as much."
    )
    assert warnings(results) == [said]
    assert said in printed(results)
    assert said in model_card(results, {}, PROVENANCE)
    results["evaluate"]["healed"]["ppl_ratio_growth"]["se"] = 0.2
    assert warnings(results) == []
    assert long_lines(results) == []
    assert "grows with position" not in printed(results)
    far = "The far ratio is 1.3 ± 0.2 times the near one (cut model: 1.14 ± 0.04): these texts do not tell it from 1."
    assert far in long_text(results)


@pytest.mark.parametrize(
    ("texts", "errors", "verdict"),
    [
        (4, 3.4, "the damage grows with position."),
        (4, 3.2, "these texts do not tell it from 1."),
        (2, 13.0, "these texts do not tell it from 1."),
        (1000, 2.1, "the damage grows with position."),
        (1000, 1.9, "these texts do not tell it from 1."),
        (1000, -2.1, "the damage shrinks with position."),
        (1, None, "one text tells no error."),
    ],
)
def test_what_is_called_growth_depends_on_the_number_of_texts(texts, errors, verdict):
    results = long_results()
    results["data"]["long"]["num_blocks"] = texts
    growing = {"value": 1.5, "se": None} if errors is None else {"value": 1 + 0.01 * errors, "se": 0.01}
    results["evaluate"]["healed"]["ppl_ratio_growth"] |= growing
    assert long_text(results).endswith(verdict)
    assert bool(warnings(results)) == (verdict == "the damage grows with position.")


def test_a_result_that_could_not_be_measured_is_a_warning():
    results = long_results()
    del results["evaluate"]["healed"]["by_position"], results["evaluate"]["healed"]["ppl_ratio_growth"]
    results["evaluate"]["long_note"] = "healed: layer 5's output is not finite"
    said = "The healed model could not be measured on long texts: healed: layer 5's output is not finite."
    assert warnings(results) == [said]
    assert "the cut model's perplexity is 2.03 ± 0.03 times" in long_text(results)


def test_page_and_card_hold_the_figures_and_what_the_texts_were(monkeypatch):
    monkeypatch.setattr("layerscalpel.report._figures", lambda results: {})
    results = long_results()
    results["data"]["long"] |= {"joined": True, "num_documents": 37}
    page, card = render_report(results, to_dict(Config()), PROVENANCE), model_card(results, {}, PROVENANCE)
    assert '<section id="long-context">' in page
    assert "these texts join 37:" in page
    assert "these texts join 37:" in card
    assert page.count('scope="row">2,048..4,095') == 1
    for model, key in (("parent", "ppl"), ("cut", "ppl_ratio"), ("healed", "ppl_ratio")):
        for row in results["evaluate"][model]["by_position"]:
            assert f'<td class="number">{measured(row[key])}</td>' in page
    without = render_report(full_results(), to_dict(Config()), PROVENANCE)
    assert "long-context" not in without
    assert "Long context" not in model_card(full_results(), {}, PROVENANCE)


def test_what_was_left_out_is_said(monkeypatch):
    monkeypatch.setattr("layerscalpel.report._figures", lambda results: {})
    results = full_results()
    results["evaluate"]["long_note"] = "the model states no context limit - name evaluate.context_tokens"
    assert long_lines(results) == [f"long context: {results['evaluate']['long_note']}"]
    assert "Left out: the model states no context limit" in model_card(results, {}, PROVENANCE)
    assert "Left out: the model states no context limit" in render_report(results, to_dict(Config()), PROVENANCE)


def test_the_plot_has_a_line_for_each_model_and_ticks_at_the_edges():
    svg = ratio_by_position(compared(long_results()))
    for label in ("cut", "healed", "parent", "64", "128", "2,048", "4,096"):
        assert f">{label}</text>" in svg
    assert ">Healed, perplexity over the parent's: 1.48 at 64..127 and 1.90 at 2,048..4,095</text>" in svg


def test_a_ratio_of_perplexities_has_the_error_of_the_difference():
    found = losses.exp_of(losses.Measured(math.log(1.5), 0.02, 10))
    assert (found.value, found.se, found.n) == (pytest.approx(1.5), pytest.approx(0.03), 10)
