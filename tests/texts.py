"""Small tokenizers, chat templates and files of records, for the tests of everything that reads text."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from layerscalpel.data import Parts, TokenBlocks, prepare_blocks
from layerscalpel.settings import DataSettings

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = "{% for m in messages %}{% if loop.last %}{{ m['role'] + ':' + m['content'] }}{% endif %}{% endfor %}"
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
NUM_DOCUMENTS, END = 120, 0
"""Documents of the fixtures; id of the end-of-text token of `word_tokenizer`."""
TURNS = [
    {"role": "system", "content": "You know the answer."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "the answer is 2 - naïve, 日本語 🙂"},
    {"role": "user", "content": "the answer is 2, the user said"},
    {"role": "assistant", "content": " and the answer\nis 3"},
]
"""A conversation with everything in it."""

SMALL = DataSettings(block_tokens=16, healing_block_tokens=24, evaluation_blocks=6, validation_fraction=0.2)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token id names the document: `d7` has the id 8."""
    vocabulary = {"<end>": END} | {f"d{i}": i + 1 for i in range(NUM_DOCUMENTS)}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a few merges, so that tokens span several characters."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator(["the answer is in the question, and the user and the assistant know it"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>", extra_special_tokens=special[1:])
    made.chat_template = template
    return made


def documents(lengths: range = range(3, 20), seed: int = 0) -> list[str]:
    """Return texts that repeat their own word, of several lengths."""
    draw = random.Random(seed)
    return [" ".join([f"d{i}"] * draw.choice(lengths)) for i in range(NUM_DOCUMENTS)]


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return str(path)


def texts(path: Path, **kwargs: object) -> str:
    return write_jsonl(path, [{"text": text} for text in documents(**kwargs)])


def parts_of(source: str, *, seed: int = 0, num_calibration: int = 8, heal: bool = True, **changes: object) -> Parts:
    same = {"calibration": source, "evaluation": source, "healing": source} | changes
    settings = dataclasses.replace(SMALL, **same)
    return prepare_blocks(word_tokenizer(), settings, num_calibration=num_calibration, seed=seed, heal=heal)


def seen_in(tokens: torch.Tensor) -> set[int]:
    """Return the documents that tokens come from."""
    return set(tokens.flatten().tolist()) - {END}


def all_parts(parts: Parts) -> list[TokenBlocks]:
    return [parts.calibration, parts.evaluation, parts.healing, parts.validation]
