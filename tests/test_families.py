"""Every family of the matrix is cut and proven, or refused with its reason, as docs/families.md says.

One fresh process loads all the checkpoints. The default tier cuts five families in the middle; the slow one five more,
and the whole matrix at all five places (make test-slow).
"""

from __future__ import annotations

import json

import pytest
import sweep
from families import tiny

from layerscalpel.probe import find_layers

ALWAYS = ("llama", "mixtral", "gemma3_text", "gpt2", "mamba2")
"""Plain, experts, sliding windows, learned positions (Conv1D), no attention."""
SLOW = ("smollm3", "bloom", "deepseek_v3", "lfm2", "qwen3_next")
"""No-rotary layers, ALiBi, dense-first, index lists, hybrid."""
COMMITTED = json.loads((sweep.ROOT / "docs/benchmarks/families.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", [*ALWAYS, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_a_family_is_cut_in_the_middle(family, fresh):
    found = sweep.try_family(family, fresh, ["middle"])
    assert found["status"] == "proven", found["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("family", sweep.NAMED)
def test_the_whole_matrix(family, fresh):
    found = sweep.try_family(family, fresh)
    assert found["status"] == COMMITTED["families"][family]["status"], found["reason"]
    proven = {place for place, answer in found["positions"].items() if answer == "proven"}
    assert proven == {p for p, answer in COMMITTED["families"][family]["positions"].items() if answer == "proven"}


def test_the_table_is_what_was_measured():
    assert (sweep.ROOT / "docs/families.md").read_text(encoding="utf-8") == sweep.render(COMMITTED)


def test_no_family_ended_with_a_defect():
    statuses = {row["status"] for row in COMMITTED["families"].values()}
    assert statuses <= {"proven", "proven in part", "refused", "not buildable"}
    assert all(row["reason"] for row in COMMITTED["families"].values() if row["status"] != "proven")


def test_places_cover_both_ends():
    places = sweep.segments(30)
    assert (places["front"].start, places["back"].stop) == (0, 30)
    assert len(places["one layer"]) == 1
    assert len(places["half"]) == 15


def test_a_family_that_computes_with_its_layer_numbers_is_refused(fresh):
    """The oracle of the sweep can fail: a family whose cut would compute something else is not proven."""
    from layerscalpel.errors import UserError
    from layerscalpel.proof import prove_twin

    twin = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    places = sweep.segments(len(find_layers(twin)))
    with pytest.raises(UserError, match=r"attn\.scaling goes from"):
        prove_twin(fresh, twin, places["middle"])
