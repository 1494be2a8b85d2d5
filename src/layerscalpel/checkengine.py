"""Does an engine compute what the checkpoint says? Perplexity, likeliest tokens and continuations beside transformers.

The reference is transformers in float32 on the same checkpoint. Both are given the same token ids: held-out blocks,
whose every token's loss is compared (the ratio of perplexities is paired, so it is known far better than either), and
the fixed prompts of writing.py, continued by the likeliest token. An engine with a tokenizer of its own cuts the same
texts, too.
Continuations part where two tokens are nearly as likely as each other; the ratio is the judge.

    asked = questions(loaded.tokenizer, text="passages", num_blocks=32, context=loaded.origin.max_tokens)
    found = check_engine("vllm", folder, asked, reference_of(loaded.model, asked), python="/envs/vllm/bin/python")
    found["ppl_ratio"]  # {"value": 1.0004, "se": 0.0002, "n": 8160}

Dimensions: N blocks, T tokens a block, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerscalpel.benchmark import figures
from layerscalpel.continuations import Prompt, batches_of, continued
from layerscalpel.data import prepare_blocks
from layerscalpel.engines import ask, turns_of
from layerscalpel.errors import UserError
from layerscalpel.layers import device_of
from layerscalpel.losses import block_mean, exp_of, log_probabilities, token_nll
from layerscalpel.progress import say, track, waiting
from layerscalpel.quiet import without_bars
from layerscalpel.settings import DataSettings
from layerscalpel.turns import Job
from layerscalpel.writing import PROMPTS, ids_of

BLOCK_TOKENS = 256
"""Of each held-out block, where the model's context allows."""
SHORTEST = 64
"""Context of fewer tokens holds no question."""
NEW_TOKENS = 32
"""Of each continuation."""
TIMED = Job(batch_size=1, prompt_tokens=128, new_tokens=64)
ROUNDS = 3
MOST_RATIO = 1.03
"""How far an engine that has the reference's weights may be from its perplexity, either way: 16 bits move it by 0.2 %,
llama.cpp's activations, of 8 bits beside quantised weights, by 1 %."""

LEAST_ALIKE = 0.88
"""Share of places in which such an engine must have the reference's likeliest token: 16 bits keep 97 %, activations
of 8 bits 95 %, a wrong rotary base 81 %, though that may move the perplexity by 3 % only."""


@dataclass(frozen=True)
class Asked:
    """What engine and reference are asked."""

    tokens_NT: Tensor
    labelled_NT: Tensor
    prompts: list[list[int]]
    texts: list[str]
    own_ids: list[list[int]]
    """The texts as the checkpoint's tokenizer cuts them."""
    source: str


@dataclass(frozen=True)
class Reference:
    """What transformers says in float32."""

    nll_NT: Tensor
    """[N, T - 1]."""
    likeliest_NT: Tensor
    continued: list[list[int]]


def questions(tokenizer: Any, *, text: str, num_blocks: int, context: int | None = None) -> Asked:
    """Return held-out blocks and the fixed prompts in a checkpoint's own tokens.

    Args:
        tokenizer: of the checkpoint.
        text: a named source or a file.
        num_blocks: held-out blocks.
        context: the most tokens that the checkpoint reads, where that is known; nothing that is asked is longer.

    Raises:
        UserError: there is no such text, or too little, or the context holds no question.
    """
    block_tokens = _block_tokens(context)
    settings = DataSettings(evaluation=text, evaluation_blocks=num_blocks, block_tokens=block_tokens)
    blocks = prepare_blocks(tokenizer, settings, num_calibration=0, seed=0, heal=False).evaluation
    texts = [prompt for _, prompt in PROMPTS]
    texts += [tokenizer.decode(row, skip_special_tokens=True) for row in blocks.tokens.tolist()]
    own = [list(tokenizer(each, add_special_tokens=False).input_ids) for each in texts]
    prompts = [ids_of(tokenizer, *prompt)[NEW_TOKENS - block_tokens :] for prompt in PROMPTS]
    return Asked(blocks.tokens, blocks.labelled, prompts, texts, own, text)


def _block_tokens(context: int | None) -> int:
    """Return the length of the held-out blocks; one place is left for the token that vLLM writes after them."""
    if context is None or context > BLOCK_TOKENS:
        return BLOCK_TOKENS
    if context < SHORTEST:
        raise UserError(
            f"the model's context of {context} tokens is too short to be checked - allowed: {SHORTEST} or more"
        )
    say(f"texts of {context - 1} tokens, not {BLOCK_TOKENS}: the model's context is {context}")
    return context - 1


def timed_in(block_tokens: int) -> Job:
    """Return what is timed: TIMED, or where that is longer than a block, as much of it as the block holds."""
    new_tokens = min(TIMED.new_tokens, block_tokens // 3)
    return replace(TIMED, prompt_tokens=min(TIMED.prompt_tokens, block_tokens - new_tokens), new_tokens=new_tokens)


@without_bars()  # the first forward of packed weights draws one
@torch.no_grad()
def reference_of(model: Any, asked: Asked) -> Reference:
    """Return what a model in memory says."""
    device, losses, likeliest = device_of(model), [], []
    for row_T in track(asked.tokens_NT, "transformers, float32", len(asked.tokens_NT)):
        ids_BT = row_T[None].to(device)
        log_probs = log_probabilities(model(input_ids=ids_BT, use_cache=False).logits[:, :-1])
        losses.append(token_nll(log_probs, ids_BT[:, 1:]).double().cpu())
        likeliest.append(log_probs.argmax(-1).cpu())
    written: dict[str, list[int]] = {}
    prompts = [Prompt(str(place), ids, NEW_TOKENS) for place, ids in enumerate(asked.prompts)]
    for batch in batches_of(prompts, len(prompts)):
        rows = continued(model, batch, ends=[], drawing=None, seed=0)
        written |= {prompt.key: ids for prompt, (ids, _) in zip(batch, rows, strict=True)}
    return Reference(torch.cat(losses), torch.cat(likeliest), [written[prompt.key] for prompt in prompts])


def check_engine(
    name: str,
    file: Path,
    asked: Asked,
    reference: Reference,
    *,
    python: str = sys.executable,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return what an engine makes of a checkpoint, beside the reference.

    Args:
        name: of engines.ENGINES.
        file: what it reads, as `engines.file_for` returns it.
        asked: the questions.
        reference: the answers of transformers.
        python: the interpreter the engine is installed in.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        UserError: the engine fails.
    """
    timed = timed_in(asked.tokens_NT.shape[1])
    longest = max(asked.tokens_NT.shape[1], *(len(prompt) + NEW_TOKENS for prompt in asked.prompts))
    job: dict[str, Any] = {"length": longest + 1, "blocks": asked.tokens_NT.tolist(), "texts": asked.texts}
    job |= {"prompts": asked.prompts, "new_tokens": NEW_TOKENS, "trust_remote_code": trust_remote_code}
    prompt = asked.tokens_NT.flatten()[: timed.prompt_tokens].tolist()
    job |= {"timed": {"prompts": [prompt], "new_tokens": timed.new_tokens, "rounds": ROUNDS}}
    with waiting(f"{name}: {file}"):
        said = ask(name, file, job, python)
    found = {"version": said["version"], "text": asked.source, "block_tokens": asked.tokens_NT.shape[1], **_how(said)}
    found |= compared(said, asked, reference)
    found["timed"] = {"prompt_tokens": len(prompt), "new_tokens": timed.new_tokens}
    return found | figures(turns_of(said), replace(timed, prompt_tokens=len(prompt)))


def _how(said: dict[str, Any]) -> dict[str, Any]:
    return {key: said[key] for key in ("device", "dtype") if key in said}


def compared(said: dict[str, Any], asked: Asked, reference: Reference) -> dict[str, Any]:
    """Return the figures of an engine's answer beside the reference's, for results.json."""
    counted_NT = asked.labelled_NT[:, 1:].double()
    targets_N = counted_NT.sum(1)
    nll_NT = torch.tensor(said["losses"], dtype=torch.float64)
    if not bool(nll_NT.isfinite().all()):
        raise UserError("the engine's losses are not finite - it cannot compute with this file")
    same_NT = (torch.tensor(said["likeliest"]) == reference.likeliest_NT).double()

    def mean(values_NT: Tensor) -> Any:
        return block_mean((values_NT * counted_NT).sum(1) / targets_N.clamp(min=1), targets_N)

    found: dict[str, Any] = {
        "ppl": exp_of(mean(nll_NT)).to_dict(),
        "reference_ppl": exp_of(mean(reference.nll_NT)).to_dict(),
        "ppl_ratio": exp_of(mean(nll_NT - reference.nll_NT)).to_dict(),
        "top1_agreement_fraction": mean(same_NT).to_dict(),
        **_continuations(said["continued"], reference.continued),
    }
    if "tokens" in said:
        alike = sum(ours == theirs for ours, theirs in zip(asked.own_ids, said["tokens"], strict=True))
        found["tokenizer"] = {"texts": len(asked.texts), "alike": alike}
    return found


def _continuations(theirs: Sequence[Sequence[int]], ours: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return how many tokens two greedy continuations begin with in common, and how many are the same to the end."""
    shared = [common(list(one), list(other)) for one, other in zip(theirs, ours, strict=True)]
    lengths = torch.tensor(shared).double()
    ones = torch.ones(len(shared))
    return {
        "continued_tokens": NEW_TOKENS,
        "common_tokens": block_mean(lengths, ones).to_dict(),
        "equal_fraction": block_mean((lengths >= NEW_TOKENS).double(), ones).to_dict(),
    }


def common(one: list[int], other: list[int]) -> int:
    """Return how many tokens two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def require_close(name: str, found: dict[str, Any], most: float = MOST_RATIO, alike: float = 0.0) -> None:
    """Refuse an engine, or a file, that computes something else than the checkpoint.

    Args:
        name: of the engine.
        found: as `compared` returns it.
        most: ratio of perplexities that is still accepted, either way.
        alike: share of places whose likeliest token must be the same.

    Raises:
        UserError: it is further away than that, or texts are cut into other tokens.
    """
    ratio, cut = found["ppl_ratio"]["value"], found.get("tokenizer")
    same = found.get("top1_agreement_fraction", {"value": 1.0})["value"]
    if cut and not cut["alike"]:
        raise UserError(
            f"{name} cuts all of {cut['texts']} texts into other tokens than the checkpoint's tokenizer"
            " - do not use it there: the converter took it for another tokenizer"
        )
    if not 1 / most <= ratio <= most:
        raise UserError(
            f"{name} computes something else than the checkpoint: its perplexity is {ratio:.4f} times that of"
            f" transformers in float32, allowed are {100 * (most - 1):.3g} % - do not use it there"
        )
    if same < alike:
        raise UserError(
            f"{name} computes something else than the checkpoint: the likeliest token is that of transformers in"
            f" {100 * same:.1f} % of the places, at least {100 * alike:.0f} % are wanted - do not use it there"
        )
