"""Answers alone are labelled, and what a chat template does not take is told."""

from __future__ import annotations

import pytest
from texts import CHATML, FORGETFUL, STRICT, TURNS, chat_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from layerscalpel.decoder import load_decoder
from layerscalpel.encode import UnusableError, encode, encode_conversation


def labelled_runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], labelled: list[bool]) -> list[str]:
    """Return the text of every unbroken run of labelled tokens."""
    runs, before = [], False
    for token, mark in zip(ids, labelled, strict=True):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
        before = mark
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("messages", [TURNS, TURNS[1:], TURNS[:3], TURNS[1:3]], ids=["system+2", "2", "system+1", "1"])
@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>\n"), (None, "<|end|>\n\n")], ids=["chatml", "plain"]
)
def test_labels_are_the_assistants_words(messages, template, end):
    tokenizer = chat_tokenizer(template)
    ids, labelled = encode_conversation(tokenizer, messages)
    answers = [message["content"] + end for message in messages if message["role"] == "assistant"]
    assert labelled_runs(tokenizer, ids, labelled) == answers
    whole = tokenizer.decode(ids)
    assert all(message["content"] in whole for message in messages)


def test_a_templates_own_tokens_are_used():
    tokenizer = chat_tokenizer()
    ids, _ = encode_conversation(tokenizer, TURNS)
    assert ids == tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)


def test_a_conversation_without_answer_has_no_label():
    _, labelled = encode_conversation(chat_tokenizer(), TURNS[:2])
    assert not any(labelled)


def test_a_template_that_rewrites_turns_is_refused():
    with pytest.raises(UnusableError, match=r"chat template rewrites earlier turns, .* heal on plain text") as caught:
        encode_conversation(chat_tokenizer(FORGETFUL), TURNS)
    assert caught.value.reason == "rewritten by the chat template"


def test_a_template_that_refuses_a_role_is_told():
    said = r"chat template refuses a conversation .*System role not supported - leave"
    with pytest.raises(UnusableError, match=said) as caught:
        encode_conversation(chat_tokenizer(STRICT), TURNS)
    assert caught.value.reason == "refused by the chat template"


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("m['content'] + 1", "TypeError: can only concatenate str"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("m.content.nosuch()", ".* has no attribute 'nosuch'"),
        ("raise_exception('no\\nroom')", "no room"),
    ],
)
def test_a_template_that_fails_says_how_in_one_line(expression, said):
    template = "{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    with pytest.raises(UnusableError, match=rf"chat template refuses a conversation of the data: {said}") as caught:
        encode_conversation(chat_tokenizer(template), TURNS)
    assert caught.value.reason == "refused by the chat template"
    assert len(str(caught.value).splitlines()) == 1


def test_named_templates_without_a_default_are_told():
    tokenizer = chat_tokenizer({"tool_use": CHATML, "rag": CHATML})
    with pytest.raises(UnusableError, match=r"multiple chat templates with no default .*\['rag', 'tool_use'\]"):
        encode_conversation(tokenizer, TURNS)
    named = chat_tokenizer({"rag": FORGETFUL, "default": CHATML})
    assert encode_conversation(named, TURNS) == encode_conversation(chat_tokenizer(), TURNS)


@pytest.mark.parametrize(
    "template", ["hello", "{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>{% endfor %}"]
)
def test_a_template_that_drops_what_was_said_is_told(template):
    with pytest.raises(UnusableError, match=r"chat template drops the conversation: an answer's last word") as caught:
        encode_conversation(chat_tokenizer(template), TURNS)
    assert caught.value.reason == "dropped by the chat template"


@pytest.mark.parametrize("messages", [TURNS, TURNS[1:3], TURNS[:2]])
@pytest.mark.parametrize("cut_off", [False, True])
def test_tokens_without_places_are_labelled_exactly(messages, cut_off):
    """This tokenizer has one token a byte and does not tell where they stand."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ids, labelled = encode_conversation(tokenizer, messages, cut_off=cut_off)
    answers = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"]
    if cut_off and answers:
        answers[-1] = answers[-1].removesuffix("</s>")
    assert labelled_runs(tokenizer, ids, labelled) == answers


@pytest.mark.parametrize("template", [CHATML, None])
def test_both_ways_to_find_answers_agree(monkeypatch, template):
    tokenizer = chat_tokenizer(template)
    told = encode_conversation(tokenizer, TURNS)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    assert encode_conversation(tokenizer, TURNS) == told


def test_tokens_over_an_edge_are_refused_where_places_are_not_told(monkeypatch):
    """`the` is one token of this tokenizer, here half of it in the prompt."""
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    turns = [{"role": "user", "content": "what is t"}, {"role": "assistant", "content": "he answer"}]
    assert any(encode_conversation(tokenizer, turns)[1])
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(
        UnusableError, match=r"tokenizer joins prompts and answers, .* - use a fast tokenizer"
    ) as caught:
        encode_conversation(tokenizer, turns)
    assert caught.value.reason == "joined by the tokenizer"


@pytest.mark.parametrize("template", [CHATML, None])
def test_an_opening_of_the_assistant_answers_nothing(template):
    tokenizer = chat_tokenizer(template)
    opened = [{"role": "assistant", "content": "the user may ask"}, *TURNS[1:3]]
    assert labelled_runs(tokenizer, *encode_conversation(tokenizer, opened)) == labelled_runs(
        tokenizer, *encode_conversation(tokenizer, TURNS[1:3])
    )


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_answer_is_no_target(blank):
    tokenizer = chat_tokenizer()
    first, last = [*TURNS], [*TURNS]
    first[2], last[4] = TURNS[2] | {"content": blank}, TURNS[4] | {"content": blank}
    assert labelled_runs(tokenizer, *encode_conversation(tokenizer, first)) == [TURNS[4]["content"] + "<|im_end|>\n"]
    assert labelled_runs(tokenizer, *encode_conversation(tokenizer, last)) == [TURNS[2]["content"] + "<|im_end|>\n"]
    assert not any(encode_conversation(tokenizer, last[3:])[1])


@pytest.mark.parametrize("template", [CHATML, None])
def test_an_answer_that_was_cut_off_has_no_end(template):
    tokenizer = chat_tokenizer(template)
    whole, marks = encode(tokenizer, {"messages": TURNS})
    ids, labelled = encode(tokenizer, {"messages": TURNS, "cut_off": True})
    assert labelled_runs(tokenizer, ids, labelled)[1] == TURNS[4]["content"]
    assert tokenizer.decode(ids).endswith(TURNS[4]["content"])
    assert (ids, labelled) == (whole[: len(ids)], marks[: len(ids)])
    assert len(ids) < len(whole)


@pytest.mark.slow
def test_the_labels_of_the_demo_model():
    """Its template puts a system prompt of its own in front and ends a turn with a token and a line break."""
    tokenizer = load_decoder("demo", device="cpu")[1]
    end = "<|im_end|>\n"
    for messages in (TURNS, TURNS[1:], TURNS[1:3]):
        ids, labelled = encode_conversation(tokenizer, messages)
        answers = [message["content"] + end for message in messages if message["role"] == "assistant"]
        assert labelled_runs(tokenizer, ids, labelled) == answers
        assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == len(messages) + (messages[0] != TURNS[0])
        cut_ids, cut_marks = encode_conversation(tokenizer, messages, cut_off=True)
        assert labelled_runs(tokenizer, cut_ids, cut_marks)[-1] == messages[-1]["content"]


def test_a_text_ends_with_one_end_token():
    tokenizer = chat_tokenizer()
    ids, labelled = encode(tokenizer, {"text": "the answer"})
    assert tokenizer.decode(ids) == "the answer<|end|>"
    assert labelled == [False] + [True] * (len(ids) - 1)
    assert encode(tokenizer, {"text": "the answer<|end|>"})[0] == ids
