"""The real model: the search finds the known optimum, and the cut computes what the bypassed parent does."""

from __future__ import annotations

import pytest
import torch

from layerscalpel.cut import cut_model, proof_tokens, reference_logits
from layerscalpel.data import prepare_blocks
from layerscalpel.decoder import load_decoder
from layerscalpel.exact import score_windows
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment
from layerscalpel.settings import DataSettings

pytestmark = pytest.mark.slow


def test_the_optimum_for_six_layers_is_13_and_its_cut_is_sound() -> None:
    model, tokenizer, origin = load_decoder("demo", device="cpu")
    assert (origin.num_layers, origin.dtype) == (30, "bfloat16")
    decoder = find_layers(model)
    settings = DataSettings("passages", "passages", "passages", block_tokens=64, evaluation_blocks=2)
    parts = prepare_blocks(tokenizer, settings, num_calibration=4, seed=0, heal=False)
    assert score_windows(decoder, parts.calibration.tokens, num_removed=6).best() == 13
    segment = Segment(13, 19, 30)
    cut, changes = cut_model(decoder, segment)
    assert set(changes) == {"num_hidden_layers"}
    tokens = proof_tokens(decoder)
    with torch.no_grad():
        logits = cut(input_ids=tokens, use_cache=False).logits
    assert torch.equal(logits, reference_logits(decoder, segment, tokens))
