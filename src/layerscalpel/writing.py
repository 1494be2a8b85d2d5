"""What a model writes: greedy and sampled continuations of fixed prompts, and how many of them are broken.

KL and tasks look at one token at a time; a model that gets stuck in a loop once it reads its own words shows here.
Every prompt is continued twice: by the likeliest token each time, and by lot, at temperature 0.8 from the likeliest
tokens that make up 95 % (top-p, arXiv:1904.09751), with a fixed seed. What is counted:

- a *loop*: the text ends in three or more copies in a row of one phrase of at least two tokens, the last copy perhaps
  unfinished (after arXiv:1904.09751, section 5). A phrase longer than a third of the text cannot be seen to repeat;
- *empty*: no visible character;
- *cut off*: no end within the tokens that were allowed;
- *distinct-n*: distinct n-grams of tokens over all n-grams of a text (arXiv:1510.03055), the mean over texts weighted
  by their n-grams. Longer texts repeat more, so compare models that were allowed equally many tokens.

Source: this project, docs/methods.md#writing.

Dimensions: P prompts.

    found = probe(model, tokenizer, num_tokens=64)
    found["writing"]["greedy"]["loop_fraction"]  # {"value": 0.25, "se": 0.11, "n": 16}
    found["samples"][0]["text"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerscalpel.answers import end_tokens
from layerscalpel.continuations import Drawing, Prompt, batches_of, continued
from layerscalpel.encode import UnusableError, template_of
from layerscalpel.losses import block_mean
from layerscalpel.progress import track

PROMPTS = (
    ("chat", "What causes the seasons on Earth?"),
    ("plain", "The harbour was quiet that morning. Nobody had seen the ferry since"),
    ("chat", "Give me three tips for learning a new language."),
    ("plain", "To plant a young tree, first dig a hole that is"),
    ("chat", "Write two sentences about a lighthouse."),
    ("plain", "Copper has been used by people for thousands of years because"),
    ("chat", "How do I cook rice so that it does not stick?"),
    ("plain", "def is_leap_year(year):\n"),
    ("chat", "Why is the sky blue, but red in the evening?"),
    ("plain", "Dear Ms Alder,\n\nthank you for your letter about the broken bridge."),
    ("chat", "Name four animals that sleep through the winter."),
    ("plain", "The three largest oceans are"),
    ("chat", "A train leaves at 9:40 and arrives at 13:05. How long does it take?"),
    ("plain", "Once the last guest had left, the old innkeeper"),
    ("chat", "Explain to a child what a bank does."),
    ("plain", "Opinions on the new tram line differ. Its supporters say"),
)
"""(kind, text): a question goes into the model's own chat template where it has one, a beginning stands as it is."""
DRAWING = Drawing(temperature=0.8, top_p=0.95)
COPIES, LEAST_PHRASE = 3, 2
"""What makes a loop."""
NGRAMS = (1, 2, 3)
AT_ONCE = 16
"""Prompts of a batch."""


@dataclass(frozen=True)
class Written:
    """A continuation."""

    ids: list[int]
    text: str
    cut_off: bool
    """Whether it has no end."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for results.json."""
        return {"text": self.text, "cut_off": self.cut_off, "loops": loops(self.ids)}


@torch.no_grad()
def probe(
    model: Any,
    tokenizer: Any,
    *,
    num_tokens: int,
    num_prompts: int = len(PROMPTS),
    context: int | None = None,
    seed: int = 0,
    label: str = "samples",
) -> dict[str, Any]:
    """Let a model write, and return {samples, writing} for results.json; nothing where no tokens or prompts are asked.

    Args:
        model: a causal language model with all its weights in memory, in evaluation mode.
        tokenizer: of the model.
        num_tokens: most tokens of a continuation.
        num_prompts: how many of PROMPTS are continued.
        context: the model's context limit; prompts that leave no room for `num_tokens` are left out and counted.
        seed: of what is drawn.
        label: what the progress line says.

    Raises:
        UserError: the model's logits are not finite.
    """
    asked = PROMPTS[:num_prompts] if num_tokens else ()
    prompts = {
        place: Prompt(text, ids_of(tokenizer, *asked[place]), num_tokens) for place, (_, text) in enumerate(asked)
    }
    room = {place: prompt for place, prompt in prompts.items() if len(prompt.ids) + num_tokens <= (context or 1 << 62)}
    if not room:
        return {}
    ends = end_tokens(model, tokenizer, template_of(tokenizer))
    ways = {"greedy": None, "sampled": DRAWING}
    found: dict[str, list[Written]] = {}
    for name in track(ways, label, len(ways)):
        found[name] = _written(model, tokenizer, list(room.values()), ends, ways[name], seed)
    samples = [
        {"kind": PROMPTS[place][0], "prompt": prompt.key, **greedy.to_dict(), "sampled": sampled.to_dict()}
        for (place, prompt), greedy, sampled in zip(room.items(), found["greedy"], found["sampled"], strict=True)
    ]
    how = {"new_tokens": num_tokens, "num_prompts": len(room), "seed": seed, **vars(DRAWING)}
    how |= {"left_out": len(asked) - len(room)} if len(asked) > len(room) else {}
    return {"samples": samples, "writing": how | {name: measured(texts) for name, texts in found.items()}}


def ids_of(tokenizer: Any, kind: str, text: str) -> list[int]:
    """Return the token ids of a prompt; a question stands as it is where there is no template that takes it."""
    if kind == "chat" and tokenizer.chat_template:
        try:
            rendered = template_of(tokenizer)([{"role": "user", "content": text}], True)
        except UnusableError:
            rendered = ""
        if rendered:
            return list(tokenizer(rendered, add_special_tokens=False).input_ids)
    return list(tokenizer(text).input_ids)


def _written(
    model: Any, tokenizer: Any, prompts: list[Prompt], ends: list[int], drawing: Drawing | None, seed: int
) -> list[Written]:
    """Return the continuations in the order of the prompts."""
    found: dict[str, Written] = {}
    for batch in batches_of(prompts, AT_ONCE):
        rows = continued(model, batch, ends=ends, drawing=drawing, seed=seed)
        for prompt, (ids, cut_off) in zip(batch, rows, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found[prompt.key] = Written(ids, text, cut_off)
    return [found[prompt.key] for prompt in prompts]


def loops(ids: Sequence[int]) -> bool:
    """Tell whether a text ends in three copies in a row of one phrase of two tokens or more."""
    for size in range(LEAST_PHRASE, len(ids) // COPIES + 1):
        tail = ids[len(ids) - COPIES * size :]
        if tail[size:] == tail[:-size]:
            return True
    return False


def measured(texts: Sequence[Written]) -> dict[str, Any]:
    """Return what is counted, {loop, empty, cut_off, distinct_1 .. 3}_fraction, each with its error over prompts."""
    ones_P = torch.ones(len(texts))
    flags = {
        "loop_fraction": [loops(text.ids) for text in texts],
        "empty_fraction": [not text.text.strip() for text in texts],
        "cut_off_fraction": [text.cut_off for text in texts],
    }
    found = {name: block_mean(torch.tensor(flag).double(), ones_P).to_dict() for name, flag in flags.items()}
    for n in NGRAMS:
        grams = [list(zip(*(text.ids[i:] for i in range(n)), strict=False)) for text in texts]
        counts_P = torch.tensor([len(own) for own in grams]).double()
        if counts_P.sum():
            distinct_P = torch.tensor([len(set(own)) for own in grams]) / counts_P.clamp(min=1)
            found[f"distinct_{n}_fraction"] = block_mean(distinct_P, counts_P).to_dict()
    return found
