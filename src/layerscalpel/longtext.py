"""Does a cut model still work far into a long text? Perplexity by position, up to the context limit.

Healing trains on short blocks, so nothing that it sees tells how the result does at position 4,000. The same long
blocks go through the parent and all that was made of it. The loss at every position is averaged within bins that double
in length. What shows damage is the ratio child / parent of a bin, paired over the blocks, and whether it is larger far
into the text than near its beginning (docs/methods.md#long-context).

One block at a time, and the head in chunks of positions: no full logits exist. A text that does not fit the memory, or
on which a model's output is not finite, is noted and ends no run.

Dimensions: N blocks, B = 1 block at once, T tokens, D hidden size. A position is the number of tokens before a token.

    check = prepare_check(parts, asked=None, stated=8192, num_blocks=4)
    check.measure("parent", parent)  # the first is what the others are compared with
    check.measure("healed", healed)["by_position"][-1]["ppl_ratio"]  # {"value": 1.9, "se": 0.1, "n": 8192}
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from layerscalpel.data import Parts, TokenBlocks
from layerscalpel.errors import UserError
from layerscalpel.hooks import head_logits, require_finite
from layerscalpel.layers import Decoder
from layerscalpel.losses import Measured, block_mean, exp_of, log_probabilities, token_chunks, token_nll
from layerscalpel.passes import pass_blocks
from layerscalpel.progress import say

Store = MutableMapping[Hashable, Tensor]
MOST_TOKENS = 4096
"""Longest text that is taken without being asked for."""
LOOKED_AT = 2000
"""Documents among which long ones are looked for before shorter ones are joined."""
FIRST_BIN = 64
"""Where the first bin ends, and the least positions of any other."""
NEAR_ENDS = 512
"""Where the positions end that the far ones are compared with, as the blocks that healing trains on do by default."""


class LongCheck:
    """Measures models on the same long blocks, one model after the other; all are compared with the first."""

    def __init__(self, blocks: TokenBlocks | None, notes: Iterable[str] = (), *, store: Store | None = None) -> None:
        """Take the blocks, None for no check; what was left out and why; and the store of passes.pass_blocks."""
        self._blocks, self._notes, self._store = blocks, list(notes), store
        self._first: Tensor | None = None

    def measure(self, name: str, decoder: Decoder) -> dict[str, Any]:
        """Return what `by_position` does, of the first model without ratios; nothing without blocks.

        What cannot be measured is noted. If that is the first model, the check ends.
        """
        if self._blocks is None:
            return {}
        tokens, first = self._blocks.tokens, self._first
        try:
            nll_NT = position_nll(decoder, tokens, label=f"long texts, {name}", store=self._store)
        except torch.OutOfMemoryError:
            reason = f"no memory for a text of {tokens.shape[1]:,} tokens - lower evaluate.context_tokens"
            return self._leave_out(name, reason)
        except UserError as error:
            return self._leave_out(name, str(error).partition(" - ")[0])
        if first is None:
            self._first = nll_NT
        return by_position(nll_NT, first)

    def _leave_out(self, name: str, reason: str) -> dict[str, Any]:
        self._notes.append(f"{name}: {reason}")
        say(f"long context: {self._notes[-1]}")
        if self._first is None:
            self._blocks = None
        return {}

    def note(self) -> dict[str, str]:
        """Return {long_note}, what was left out and why, for results.json; nothing where nothing was left out."""
        return {"long_note": "; ".join(self._notes)} if self._notes else {}

    def summary(self) -> dict[str, Any]:
        """Return {long}, plain values of the texts for provenance; nothing without texts."""
        if self._blocks is None:
            return {}
        found = self._blocks.summary()
        return {"long": found | {"joined": found["num_documents"] > found["num_blocks"]}}


def prepare_check(
    parts: Parts, *, asked: int | None, stated: int | None, num_blocks: int, store: Store | None = None
) -> LongCheck:
    """Draw the long texts and return the check on them; one that measures nothing, with a note, where there are none.

    Args:
        parts: of the run.
        asked: tokens of a text; None for the model's context limit, at most MOST_TOKENS.
        stated: the context limit that the model states, if it states one.
        num_blocks: texts; 0 for no check.
        store: as passes.pass_blocks.
    """
    if not num_blocks:
        return LongCheck(None)
    length = asked or min(stated or 0, MOST_TOKENS)
    blocks, notes = None, []
    if length:
        try:
            blocks = long_blocks(parts, length, num_blocks)
        except UserError as error:  # the source, read this far without one, can go away
            notes.append(str(error))
    else:
        notes.append("the model states no context limit - name evaluate.context_tokens")
    found = 0 if blocks is None else len(blocks)
    if found < num_blocks and not notes:
        texts = f"{found} of {num_blocks} texts of {length:,} tokens"
        notes.append(f"beside the other parts, the source {parts.rest.name} has enough for {texts}")
    for note in notes:
        say(f"long context: {note}")
    return LongCheck(blocks, notes, store=store)


def long_blocks(parts: Parts, length: int, num_blocks: int) -> TokenBlocks | None:
    """Return at most `num_blocks` long texts from what no other part took of the evaluation source; None for none.

    They are drawn last, so that no setting of this check changes what is searched, healed or measured on.
    """
    rest = parts.rest
    rows, used, too_short = long_rows((ids for _, ids, _ in rest.encoded()), length, num_blocks)
    if not rows:
        return None
    tokens_NT = torch.tensor(rows)
    labelled_NT = torch.ones_like(tokens_NT, dtype=torch.bool)
    labelled_NT[:, 0] = False  # nothing stands before it
    dropped = dict(rest.dropped) | ({"too short": too_short} if too_short else {})
    return TokenBlocks(tokens_NT, labelled_NT, rest.name, used, dropped)


def long_rows(documents: Iterable[list[int]], length: int, count: int) -> tuple[list[list[int]], int, int]:
    """Return (at most `count` rows of `length` token ids, documents in them, documents left out as too short).

    A row is the beginning of one document. If there are too few such long ones among the first LOOKED_AT documents, the
    other rows are shorter ones joined, each row of its own documents.
    """
    whole: list[list[int]] = []
    joined: list[tuple[list[int], int]] = []
    pending: list[int] = []
    seen = members = 0
    for seen, ids in enumerate(documents, 1):
        if len(ids) >= length:
            whole.append(ids[:length])
        else:
            pending, members = pending + ids, members + 1
        if len(pending) >= length:
            joined.append((pending[:length], members))
            pending, members = [], 0
        if len(whole) == count or (seen >= LOOKED_AT and len(whole) + len(joined) >= count):
            break
    filled = joined[: count - len(whole)]
    used = len(whole) + sum(number for _, number in filled)
    return whole + [row for row, _ in filled], used, seen - used


@torch.no_grad()
def position_nll(decoder: Decoder, tokens: Tensor, *, label: str = "long texts", store: Store | None = None) -> Tensor:
    """Return the negative log likelihood [N, T - 1] in nats of the tokens at positions 1 .. T - 1, float64.

    Args:
        decoder: the model.
        tokens: long blocks [N, T].
        label: what the progress line says.
        store: as passes.pass_blocks.

    Raises:
        UserError: the model's output is not finite.
    """
    rows = []
    for number, hidden_BTD in pass_blocks(decoder, tokens.split(1), store=store, label=label):
        require_finite(len(decoder), hidden_BTD)
        rows.append(_block_nll(decoder, hidden_BTD[:, :-1], tokens[number, 1:]))
    return torch.stack(rows)


def _block_nll(decoder: Decoder, hidden_BTD: Tensor, targets_T: Tensor) -> Tensor:
    targets_BT = targets_T[None].to(hidden_BTD.device)
    parts = []
    for part in token_chunks(1, len(targets_T), decoder.vocab_size, hidden_BTD.device):
        log_probs = log_probabilities(head_logits(decoder, hidden_BTD[:, part]))
        parts.append(token_nll(log_probs, targets_BT[:, part])[0].double().cpu())
    return torch.cat(parts)


def doubling_bins(length: int, first: int = FIRST_BIN) -> list[tuple[int, int]]:
    """Return bins (from, to) of the positions 1 .. length - 1, `to` excluded: 1, 64, 128, 256, ... up to the length."""
    edges = [1]
    edge = first
    while edge + first <= length:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], length], strict=True))


def near_and_far(length: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the (from, to) that are compared: positions 64 .. 511 at most, and the last bin; None if there is one bin.

    The first 63 are left out where there are more: with little before them every cut costs more, whatever comes after.
    """
    bins = doubling_bins(length)
    if len(bins) < 2:
        return None
    far = bins[-1]
    return (FIRST_BIN, min(NEAR_ENDS, far[0])) if len(bins) > 2 else bins[0], far


def by_position(nll_NT: Tensor, parent_NT: Tensor | None = None) -> dict[str, Any]:
    """Return {by_position, near_and_far, ppl_ratio_growth}: rows {from, to, ppl, ppl_ratio}, and far over near.

    The ratio is exp of the mean difference to the parent's loss, paired over the blocks. A growth of 1 means that the
    damage does not depend on the position.

    Args:
        nll_NT: of a model, [N, T - 1], as position_nll returns it.
        parent_NT: the same of the parent on the same blocks; without it there are no ratios.
    """
    length = nll_NT.shape[1] + 1
    found: dict[str, Any] = {"by_position": [_row(ends, nll_NT, parent_NT) for ends in doubling_bins(length)]}
    compared = near_and_far(length)
    if parent_NT is None or compared is None:
        return found
    near_NT, far_NT = ((nll_NT - parent_NT)[:, low - 1 : high - 1] for low, high in compared)
    more_N = far_NT.mean(1) - near_NT.mean(1)
    grown = exp_of(block_mean(more_N, torch.full_like(more_N, near_NT.shape[1] + far_NT.shape[1])))
    found["near_and_far"] = [_row(ends, nll_NT, parent_NT) for ends in compared]
    return found | {"ppl_ratio_growth": grown.to_dict()}


def _row(ends: tuple[int, int], nll_NT: Tensor, parent_NT: Tensor | None) -> dict[str, Any]:
    low, high = ends
    row = {"from": low, "to": high, "ppl": exp_of(_mean(nll_NT[:, low - 1 : high - 1])).to_dict()}
    if parent_NT is not None:
        row["ppl_ratio"] = exp_of(_mean((nll_NT - parent_NT)[:, low - 1 : high - 1])).to_dict()
    return row


def _mean(values_NT: Tensor) -> Measured:
    per_block = values_NT.mean(1)
    return block_mean(per_block, torch.full_like(per_block, values_NT.shape[1]))
