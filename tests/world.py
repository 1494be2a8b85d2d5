"""A whole offline world for the command line: a tiny checkpoint with a byte tokenizer, a text file, a short recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from families import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerscalpel.decoder import save_decoder

WORDS = (
    "old",
    "mill",
    "by",
    "river",
    "slowly",
    "gulls",
    "cried",
    "over",
    "quiet",
    "water",
    "boats",
    "home",
    "at",
    "dusk",
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id a byte and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, **names)


def write_model(folder: Path, family: str = "llama", **changes: object) -> Path:
    """Save a tiny model of a family with the byte tokenizer."""
    save_decoder(tiny(family, vocab_size=260, **changes), byte_tokenizer(), folder)
    return folder


def write_texts(path: Path, count: int = 120, seed: int = 0) -> Path:
    """Write documents of random words as JSON lines."""
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=30))}) for _ in range(count)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_recipe(path: Path, texts: Path, **changes: object) -> Path:
    """Write a recipe whose every stage takes a moment."""
    settings = {
        "target": {"layers": 2},
        "data": {
            "calibration": str(texts),
            "healing": str(texts),
            "evaluation": str(texts),
            "block_tokens": 16,
            "healing_block_tokens": 32,
            "evaluation_blocks": 4,
            "healing_blocks": 8,
        },
        "search": {"num_blocks": 4, "gate_blocks": 4, "num_starts": 2},
        "heal": {"epochs": 1, "batch_size": 4, "validations": 2, "objective": "both", "lr": 1e-3},
        "evaluate": {"sample_tokens": 4, "context_tokens": 128, "long_blocks": 2},
        "benchmark": {"prompt_tokens": 4, "new_tokens": 3, "repeats": 2},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        settings[section][name] = value
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path
