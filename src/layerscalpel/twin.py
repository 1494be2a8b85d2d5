"""A tiny random twin of any config: the same class and the same per-layer rules, a few hundred thousand numbers.

What a cut can break is decided by rules: which layers slide, which are dense, which skip the rotary. Sizes do not enter
them. So whatever a cut does to a model too large to compare, it does to its twin, which is compared in a second. The
number of layers, every per-layer list, every period and every flag stay. Sizes shrink by the kind that their field's
name tells: widths by one factor, so that twice the hidden size is twice the hidden size still; counts of heads and
experts, ranks and windows by their order, so that what was equal is equal and what differed from layer to layer
differs. The smallest window becomes 6: a text of 24 tokens reaches past it.

Source: this project, docs/methods.md#proof.

    twin = twin_model(AutoConfig.from_pretrained(folder))
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from layerscalpel import layers
from layerscalpel.decoder import num_parameters
from layerscalpel.errors import UserError, one_line
from layerscalpel.origin import auto_class

KINDS: dict[str, str] = {
    "token": r".*token_(id|index)s?|.*suppress_tokens",
    "vocabulary": r".*vocab.*|codebook_size|num_centroids",
    "position": r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|model_max_length"
    r"|context_length|max_(source|target)_positions|mem_len",
    "window": r".*window(_size|_len)?|attention_chunk_size|local_attention|floor_scale|log_scaling_n_floor"
    r"|rel_extent|.*compressed.*",
    "chunk": r"(mamba_|lsh_attn_|local_attn_)?chunk_(size|length)|(index_)?block_size|index_topk_blocks|.*multiple_of",
    "state": r".*state(_size)?|(mamba_)?dt_rank|time_step_rank",
    "rank": r".*rank|d_rel|hidden_size_per_layer_input",
    "head_dim": r".*head_?dim|.*head_size|(mamba_)?d_(head|kv)|dim_head|kv_channels|rotary_dim",
    "scorer": r"index(er)?_n_heads",
    "head": r".*heads?(_kv|_per_layer)?|multi_query_group_num|num_query_groups|o_groups|(mamba_)?n_?groups",
    "choice": r".*experts_per_tok(en)?|moe_?(topk|k|top_k)|top_k(_experts)?|num_selected_experts",
    "group": r"n_group|num_expert_group|heads_per_ngram|split_ngram_parts",
    "expert": r"(?!.*shared)(num|n|moe_num)_(local_|routed_|moe_)?experts|zero_expert_num",
    "parts": r"mrope_section|axial_pos_embds_dim",
    "factors": r"(short|long)_factor",
    "turned": r"partial_rotary_factor|rotary_pct",
    "width": r"(?!.*(image|patch|kernel|stride|filter|crop|batch|merge|group|feat|feature|final|ngram|chunk|multiple"
    r"|conv1d)_?(size|dim|width))(.*_(sizes?|dims?|width|channels?|dimension)|n_embd|d_model|dim_model.*|dim|n_inner|dff"
    r"|d_ff|dim_ff|d_inner|mamba_d_ssm|intermediate_size_mlp|hidden_size_global)",
}
"""{kind of size: pattern of the whole field name}; the first match counts, and a field without one keeps its value."""
RANKED: dict[str, tuple[int, ...]] = {
    "window": tuple(range(6, 100)),
    "rank": tuple(range(8, 400, 4)),
    "head": (2, 4, 8, 16),
    "expert": tuple(range(4, 100, 2)),
    "choice": (2, 3, 4),
}
"""{kind: what its smallest, second smallest, ... number becomes}; numbers below the first stay."""
LARGEST = {"vocabulary": 128, "chunk": 8, "state": 8, "group": 2}
"""{kind: its largest tiny number}."""
EXACT: dict[str, Any] = {
    "topk_group": 1,  # of two groups of two experts
    "index_topk": 6,
    "index_kpool": 2,  # a pool is a whole part of the above
    "indexer_budget": 6,
    "indexer_compress_ratio": 2,  # here too
    "axial_pos_shape": [8, 16],  # Reformer: as many places as positions
}
"""{field: its tiny value}, where its kind does not tell it."""
HIDDEN = {"xlstm": 128}
"""{model type: hidden size}; xLSTM's cache holds multiples of 64 alone. Others: heads times their width, or 40."""
HEAD_DIMS = ("head_dim", "d_head", "dim_head", "d_kv", "kv_channels", "attention_head_size", "qk_rope_head_dim")
"""Fields that state the width of a head; the first present counts, else it is the hidden size over the heads."""
INNER = (("mamba_n_heads", "mamba_d_head"), ("mamba_num_heads", "mamba_head_dim"), ("n_mamba_heads", "mamba_headdim"))
"""(heads, their width) whose product is a width."""
MOST_NUMBERS = 20_000_000
"""What a twin may hold; all but a few hold less than two million."""
DROPPED = ("quantization_config", "transformers_version", "auto_map", "dtype")
"""Fields that a float32 model of random weights has no use for."""
REFUSALS = (*layers.REFUSALS, ImportError)
"""What config and model classes raise when they refuse their sizes, or lack a package."""


def twin_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random float32 model of a tiny config whose layers all matter.

    Raises:
        UserError: the family refuses its tiny config, or is no causal language model.
    """
    tiny = twin_config(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        try:
            with torch.device("meta"):  # count before memory is taken: a size of no known kind stayed as it was
                count = num_parameters(auto_class(tiny).from_config(tiny))
            if count > MOST_NUMBERS:
                raise ValueError(f"it would hold {count:,} numbers, and {MOST_NUMBERS:,} are allowed")
            model = auto_class(tiny).from_config(tiny).float().eval()
        except REFUSALS as error:
            raise _refusal(config, error) from error
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def twin_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny config of the same class with the same per-layer rules; the given one stays as it is.

    Raises:
        UserError: the config's own class refuses the tiny sizes.
    """
    try:
        values = _Shrink(config, _Shrink(_decoder_of(config))).values()
        return type(config)(**{name: value for name, value in values.items() if name != "model_type"})
    except REFUSALS as error:
        raise _refusal(config, error) from error


def _refusal(config: PreTrainedConfig, error: Exception) -> UserError:
    reason = one_line(f"{type(error).__name__}: {error}")
    return UserError(
        f"a tiny twin of {type(config).__name__} cannot be built: {reason} - prove the cut on the model itself"
    )


def _decoder_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part whose hidden size sets the scale: the text decoder, else the widest."""
    text = config.get_text_config(decoder=True)
    widest = max([text, *_held(text).values()], key=lambda part: _stated(part, "hidden_size"))
    if not _stated(widest, "hidden_size"):
        raise ValueError("it states no hidden size")
    return text if _stated(text, "hidden_size") else widest


def _held(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: part for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}


def _stated(config: PreTrainedConfig, name: str) -> int:
    value = vars(config).get(config.attribute_map.get(name, name)) or 0
    return max(value) if isinstance(value, (list, tuple)) else value


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name)), "")


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (field, number) of every positive number; an item of a list has the field of its list."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, name)
    elif type(values) in (int, float) and values > 0:
        yield name, values


class _Shrink:
    """The tiny values of one config; its parts with a hidden size of their own, as a vision tower, have their own."""

    def __init__(self, config: PreTrainedConfig, decoder: _Shrink | None = None):
        held = _held(config).items()
        self.parts = {name: part for name, part in held if _stated(part, "hidden_size") or _held(part)}
        self.decoder = decoder or self
        left_out = {*DROPPED, *self.parts}
        self.original = {name: value for name, value in config.to_dict().items() if name not in left_out}
        self.numbers: dict[str, set[tuple[Any, str]]] = defaultdict(set)
        for name, number in _leaves(self.original):
            self.numbers[_kind(name)].add((number, name))
        self.numbers["head"] |= {pair for pair in self.numbers["scorer"] if pair[0] < 16}
        self.hidden = _stated(config, "hidden_size")
        self.tiny_hidden, self.head_dim = self._shape(config)

    def _shape(self, config: PreTrainedConfig) -> tuple[int, float]:
        """Return the tiny hidden size and the factor of all head widths."""
        heads = _stated(config, "num_attention_heads") or self.original.get("num_heads") or 1
        stated = (self.original[name] for name in HEAD_DIMS if self.original.get(name))
        head_dim = next(stated, self.hidden // heads) or 1
        times = next((times for times in (1, 2) if heads * head_dim == times * self.hidden), 0)
        tiny_heads = self._ranked("head", heads)
        least, step = max(8, 32 // tiny_heads) * max(1, times), max(2, 8 // tiny_heads) * max(1, times)
        halves = [share / 2 for share, _ in self.numbers["turned"]]  # of a head; they must be whole
        whole = (n for n in range(least, 10 * least, step) if all(abs(n * x - round(n * x)) < 1e-6 for x in halves))
        tiny = next(whole, least)
        hidden = HIDDEN.get(config.model_type) or (tiny_heads * tiny // times if times else 40)
        if self is not self.decoder:
            fits = max(8, 2 * tiny_heads)
            same = self.hidden == self.decoder.hidden
            hidden = self.decoder.tiny_hidden if same else fits * max(1, round(self._wide(self.hidden) / fits))
        return hidden, (hidden * times / tiny_heads if times else tiny) / head_dim

    def values(self) -> dict[str, Any]:
        """Return the tiny config as a dict."""
        tiny = {name: self._value(name, value) for name, value in self.original.items()}
        for heads, head_dim in INNER:
            if type(tiny.get(head_dim)) is int:
                product = self.original[heads] * self.original[head_dim]
                tiny[head_dim] = self._wide(product) // tiny[heads]
                if self.original.get("mamba_d_ssm") == product:
                    tiny["mamba_d_ssm"] = tiny[heads] * tiny[head_dim]
        return tiny | {name: _Shrink(part, self.decoder).values() for name, part in self.parts.items()}

    def _value(self, name: str, value: Any) -> Any:
        kind = _kind(name)
        if value and type(value) is type(EXACT.get(name)):
            return EXACT[name]
        if isinstance(value, dict):
            return {key: self._value(str(key), item) for key, item in value.items()}
        if not isinstance(value, list):
            return self._number(kind, name, value) if type(value) is int and value > 0 else value
        if kind == "factors":  # one for two numbers of a head
            return value[: round(len(value) * self.head_dim)]
        if kind == "parts":  # of a head, or of the hidden size
            factor = self.tiny_hidden / self.hidden if name.startswith("axial") else self.head_dim
            ends = [round(sum(value[:i]) * factor) for i in range(len(value) + 1)]
            return [stop - start for start, stop in pairwise(ends)]
        return [self._value(name, item) for item in value]

    def _number(self, kind: str, name: str, number: int) -> int:
        if kind == "scorer":  # with fewer, many tokens score 0, and the choice among these depends on the length
            return 16 if number >= 16 else self._ranked("head", number)
        if kind in RANKED:
            return self._ranked(kind, number)
        if kind == "token":
            return number if number < LARGEST["vocabulary"] else 2
        if kind == "position":  # the smallest limit still holds 128 tokens, the others keep their ratio to it
            return round(number * 128 / max(128, min(self.numbers[kind])[0]))
        if kind == "head_dim":
            return 2 * max(1, round(number * self.head_dim / 2))
        if kind == "width":  # what differs under one name differs still
            tiny = 0
            for other in sorted(other for other, field in self.numbers[kind] if field == name and other <= number):
                tiny = max(self._wide(other), tiny + 8 if tiny else 0)
            return tiny
        return min(number, LARGEST.get(kind, number))

    def _ranked(self, kind: str, number: int) -> int:
        ladder = RANKED[kind]
        if number < ladder[0]:
            return number
        others = sorted({other for other, _ in self.numbers[kind] if other >= ladder[0]})
        rank = others.index(number) + (kind == "head" and len(others) == 1)  # one number of heads is 4 (CodeGen)
        return ladder[min(rank, len(ladder) - 1)]

    def _wide(self, number: int) -> int:
        """Return a tiny width, a multiple of 8 as the tiny hidden size is, so that multiples of that stay such."""
        return min(number, max(8, 8 * round(number * self.decoder.tiny_hidden / self.decoder.hidden / 8)))
