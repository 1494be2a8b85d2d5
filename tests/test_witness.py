"""The fresh process answers for many checkpoints, sees what a user sees, and ends with its last words."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import SINGLE, edit_json, edit_weights, write_remote
from families import tiny
from transformers import LlamaForCausalLM

from layerscalpel.cut import cut_model
from layerscalpel.decoder import save_decoder
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.proof import Expected, expect, prove_logits
from layerscalpel.segment import Segment
from layerscalpel.witness import Witness

SEGMENT = Segment(2, 5, 8)


@functools.cache
def decoder_of(family: str) -> Decoder:
    return find_layers(tiny(family))


@functools.cache
def expected_of(family: str) -> Expected:
    return expect(decoder_of(family), SEGMENT)


def save_cut(folder: Path, family: str) -> Path:
    return save_decoder(cut_model(decoder_of(family), SEGMENT)[0], None, folder / "m")


@pytest.mark.parametrize("family", ["gemma3_text", "qwen2", "bamba"])
def test_one_fresh_process_proves_many_checkpoints(fresh, family, tmp_path):
    found = prove_logits(fresh, save_cut(tmp_path, family), expected_of(family))
    assert (found.loaded, found.logits_equal, found.generation_equal) == ("fresh process", True, True)


def test_weights_may_stay_on_disk(fresh, tmp_path):
    expected = expect(decoder_of("qwen2"), SEGMENT, length=8)
    found = prove_logits(fresh, save_cut(tmp_path, "qwen2"), expected, generate=False, from_disk=True)
    assert (found.loaded, found.logits_equal) == ("fresh process, weights on disk", True)
    assert (found.tokens, found.generation_equal) == ((1, 8), None)


def test_a_checkpoint_that_does_not_load_is_told_with_its_reason_and_the_next_one_is_answered(fresh, tmp_path):
    folder = save_cut(tmp_path, "llama")
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).unlink()
    said = r"does not load in a fresh process: OSError: .*model\.safetensors.* - do not use it"
    with pytest.raises(UserError, match=said) as caught:
        prove_logits(fresh, folder, expected_of("llama"))
    assert "\n" not in str(caught.value)
    (folder / SINGLE).write_bytes(whole)
    assert prove_logits(fresh, folder, expected_of("llama")).logits_equal
    edit_weights(folder, lambda stored: stored["lm_head.weight"].add_(0.5))
    refuse_in(fresh, folder, "failed its proof: logits that differ by")


def refuse_in(process: Witness, folder: Path, said: str) -> None:
    expected = replace(expected_of("llama"), trust_remote_code=True)
    with pytest.raises(UserError, match=said):
        prove_logits(process, folder, expected)


CHATTER = """
import os, sys
print("{'neither': 'JSON'}")
print('{"logits_equal": true}')
os.write(1, b"{}")
print("no end of the line", end="", flush=True)
with open(__file__.rpartition("/")[0] + "/own_modules", "w") as stream:
    stream.write(" ".join(name for name in sys.modules if name.startswith("layerscalpel")))
"""


def test_what_a_models_code_prints_is_not_taken_for_an_answer(fresh, tmp_path):
    folder = write_remote(tmp_path / "odd", CHATTER, num_hidden_layers=5)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    expected = replace(expected_of("llama"), trust_remote_code=True)
    with torch.no_grad():
        expected = replace(expected, logits=model(expected.tokens).logits)
    assert prove_logits(fresh, folder, expected).logits_equal
    (seen,) = Path(os.environ["HF_MODULES_CACHE"]).rglob("own_modules")
    assert seen.read_text(encoding="utf-8") == "layerscalpel"  # it sees what a user sees: nothing of this package
    edit_json(folder / "config.json", rms_norm_eps=0.5)
    with pytest.raises(UserError, match="failed its proof"):
        prove_logits(fresh, folder, expected)


def test_code_in_the_current_folder_is_not_run(fresh, mined):
    assert "error" in fresh.ask({})  # it answers, so it has imported all that it needs
    assert not (mined / "marker").exists()


def test_a_process_that_dies_is_an_error_with_its_last_words(fresh, tmp_path):
    """The last of this file: the process is that of the others, and what comes after it starts another."""
    last_words = "import os, sys\nprint('\\nout of luck', file=sys.stderr, flush=True)\nos._exit(7)"
    folder = write_remote(tmp_path / "odd", last_words, num_hidden_layers=5)
    for _ in range(2):  # it stays dead
        refuse_in(fresh, folder, r"does not load in a fresh process: out of luck \(exit code 7\) - do not use it")
