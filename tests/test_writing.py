"""What a model writes is what it would write alone, and loops, silence and repetition are counted as they are."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from families import tiny
from texts import CHATML, STRICT, chat_tokenizer

from layerscalpel import writing
from layerscalpel.errors import UserError
from layerscalpel.writing import PROMPTS, Written, ids_of, loops, measured, probe

VOCABULARY = 320
REFUSING = "{{ raise_exception('no') }}"


def model_of(family: str = "llama", seed: int = 0) -> Any:
    model = tiny(family, vocab_size=VOCABULARY, max_position_embeddings=256, seed=seed)
    model.get_output_embeddings().weight.data *= 4  # so that no two tokens are equally likely
    return model


def greedily(model: Any, ids: list[int], count: int, ends: set[int]) -> list[int]:
    """Append the likeliest token, without a cache and alone, until a text ends."""
    row = torch.tensor([ids])
    for _ in range(count):
        with torch.no_grad():
            token = model(row, use_cache=False).logits[0, -1].argmax().item()
        if token in ends:
            break
        row = torch.cat([row, torch.tensor([[token]])], dim=1)
    return row[0, len(ids) :].tolist()


@pytest.mark.parametrize(("family", "template"), [("llama", CHATML), ("bloom", CHATML), ("gpt2", None)])
def test_greedy_samples_are_those_of_each_prompt_alone(family, template):
    model, tokenizer = model_of(family), chat_tokenizer(template)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")} if template else {0}
    samples = probe(model, tokenizer, num_tokens=6, num_prompts=6)["samples"]
    assert [(sample["kind"], sample["prompt"]) for sample in samples] == list(PROMPTS[:6])
    for sample, (kind, text) in zip(samples, PROMPTS, strict=False):
        asked = text
        if kind == "chat" and template:
            asked = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        alone = greedily(model, tokenizer(asked).input_ids, 6, ends)
        assert sample["text"] == tokenizer.decode(alone, skip_special_tokens=True)
        assert sample["cut_off"] == (len(alone) == 6)
    assert len({sample["text"] for sample in samples}) > 1


def test_the_seed_names_what_is_drawn_and_the_checkpoints_own_settings_do_not():
    model, tokenizer = model_of(), chat_tokenizer()
    state = torch.get_rng_state()
    first = probe(model, tokenizer, num_tokens=8, num_prompts=4)
    assert torch.equal(torch.get_rng_state(), state)
    model.generation_config.update(repetition_penalty=5.0, temperature=0.1, do_sample=True, max_new_tokens=2)
    assert probe(model, tokenizer, num_tokens=8, num_prompts=4) == first
    other = probe(model, tokenizer, num_tokens=8, num_prompts=4, seed=1)
    assert [s["text"] for s in other["samples"]] == [s["text"] for s in first["samples"]]
    assert [s["sampled"] for s in other["samples"]] != [s["sampled"] for s in first["samples"]]
    assert any(s["sampled"]["text"] != s["text"] for s in first["samples"])
    how = {key: first["writing"][key] for key in ("new_tokens", "num_prompts", "seed", "temperature", "top_p")}
    assert how == {"new_tokens": 8, "num_prompts": 4, "seed": 0, "temperature": 0.8, "top_p": 0.95}
    assert json.dumps(first, allow_nan=False)


def test_nothing_is_written_when_switched_off():
    assert probe(model_of(), chat_tokenizer(), num_tokens=0) == {}


def test_prompts_without_room_are_left_out_and_counted():
    tokenizer = chat_tokenizer()
    sizes = [len(ids_of(tokenizer, *prompt)) for prompt in PROMPTS]
    context = sorted(sizes)[10] + 5
    found = probe(model_of(), tokenizer, num_tokens=5, context=context)
    fits = [text for (_, text), size in zip(PROMPTS, sizes, strict=True) if size + 5 <= context]
    assert [sample["prompt"] for sample in found["samples"]] == fits
    assert found["writing"]["left_out"] == 16 - len(fits) > 0
    assert probe(model_of(), tokenizer, num_tokens=5, context=6) == {}


@pytest.mark.parametrize("template", [None, REFUSING])
def test_a_question_stands_as_it_is_where_no_template_takes_it(template):
    tokenizer = chat_tokenizer(template)
    assert ids_of(tokenizer, "chat", "Why?") == tokenizer("Why?").input_ids == ids_of(tokenizer, "plain", "Why?")
    assert ids_of(chat_tokenizer(STRICT), "chat", "Why?") != tokenizer("Why?").input_ids


def test_logits_that_are_not_finite_are_a_user_error():
    model = model_of()
    model.get_output_embeddings().weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        probe(model, chat_tokenizer(), num_tokens=2, num_prompts=2)


def test_the_prompts_are_sixteen_of_two_kinds_in_turns():
    assert len({text for _, text in PROMPTS}) == 16
    assert [kind for kind, _ in PROMPTS] == ["chat", "plain"] * 8


# ---------------------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b a b a b", True),
        ("x y z a b a b a b", True),
        ("a b c a b c a b c a b", True),  # the last copy is not finished
        ("a a a a a a", True),
        ("a a a a a", False),  # three copies of two tokens need six
        ("a b a b", False),
        ("a b a b a b c", False),  # it found out
        ("a b c a b c a b d", False),
        ("", False),
        ("a", False),
    ],
)
def test_a_loop_is_three_copies_in_a_row_at_the_end(words, expected):
    assert loops([ord(word) for word in words.split()]) == expected


def test_no_loop_is_seen_in_random_text_and_any_planted_one_is():
    draw = torch.Generator().manual_seed(0)
    for size in range(2, 21):
        text = torch.randint(1000, (64,), generator=draw).tolist()
        assert not loops(text)
        phrase = torch.randint(1000, (size,), generator=draw).tolist()
        assert loops(text + 3 * phrase)
        assert loops(text + 3 * phrase + phrase[: size // 2])
        assert not loops(text + 2 * phrase)
        assert not loops(text + 2 * phrase + phrase[:-1])  # the third copy must be whole


def texts(*rows: list[int]) -> list[Written]:
    return [Written(row, "words" if row else " \n", cut_off=len(row) == 6) for row in rows]


def test_shares_are_over_prompts_and_distinct_over_ngrams():
    found = measured(texts([1, 2, 1, 2, 1, 2], [1, 2, 3], [], [7]))
    assert found["loop_fraction"] == {"value": 0.25, "se": pytest.approx(0.25), "n": 4}
    assert found["empty_fraction"]["value"] == 0.25
    assert found["cut_off_fraction"]["value"] == 0.25
    assert found["distinct_1_fraction"]["value"] == pytest.approx((2 + 3 + 1) / 10)
    assert found["distinct_2_fraction"]["value"] == pytest.approx((2 + 2) / 7)
    assert found["distinct_3_fraction"]["value"] == pytest.approx((2 + 1) / 5)
    assert found["distinct_3_fraction"]["n"] == 5


def test_texts_without_ngrams_have_no_share_of_distinct_ones():
    assert set(measured(texts([], []))) == {"loop_fraction", "empty_fraction", "cut_off_fraction"}
    assert "distinct_2_fraction" not in measured(texts([1], [2]))


def test_a_model_that_says_the_same_forever_is_caught():
    model, tokenizer = model_of(), chat_tokenizer()
    model.get_output_embeddings().weight.data.zero_()
    if model.get_output_embeddings().bias is None:
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    model.get_output_embeddings().bias.data[70] = 50.0
    found = probe(model, tokenizer, num_tokens=8, num_prompts=4)["writing"]
    for way in ("greedy", "sampled"):
        assert found[way]["loop_fraction"] == {"value": 1.0, "se": 0.0, "n": 4}
        assert found[way]["distinct_1_fraction"]["value"] == pytest.approx(1 / 8)
    assert writing.COPIES * writing.LEAST_PHRASE <= 8
