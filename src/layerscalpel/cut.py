"""Remove a segment as planned, from a model in memory or from the files of a checkpoint.

Tensors are never computed with: they get new names.

Source: this project, docs/methods.md#cut.

    cut, traces = cut_model(decoder, Segment(13, 19, 30))
    cut_folder(read_weights(folder), plan_cut(skeleton(config), Segment(13, 19, 30)), out)
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from layerscalpel.errors import UserError
from layerscalpel.hooks import bypass
from layerscalpel.layers import Decoder, all_tensors, device_of, put_tensor
from layerscalpel.plan import Plan, plan_cut
from layerscalpel.segment import Segment
from layerscalpel.shards import Stored, Weights, copy_weights

PROOF_BLOCKS, PROOF_TOKENS = 2, 24
"""Random token ids that logits are compared on."""


def cut_model(decoder: Decoder, segment: Segment) -> tuple[PreTrainedModel, dict[str, str]]:
    """Return the model without the segment, its tensors shared with the parent, and the changed config fields.

    Raises:
        UserError: as `plan_cut`; also logits that are not the parent's without the segment.
    """
    parent = decoder.model
    plan = plan_cut(parent, segment)
    source = all_tensors(parent)
    for new in all_tensors(plan.cut):
        put_tensor(plan.cut, new, source[old_name(new, plan.path, segment)])
    plan.cut.generation_config = copy.deepcopy(parent.generation_config)
    _refuse_unequal_logits(decoder, plan.cut, segment)
    return plan.cut, plan.traces


def old_name(new: str, path: str, segment: Segment) -> str:
    """Return the parent's name of a tensor of the cut model."""
    index, rest = layer_in(new, f"{path}.")
    return f"{path}.{segment.kept()[int(index)]}.{rest}" if index else new


def layer_in(name: str, prefix: str) -> tuple[str, str]:
    """Part a tensor's name, as `model.layers.13.mlp.weight`, into the layer's number as spelt and what follows it.

    Args:
        name: of the tensor.
        prefix: of all layers' names, with its dot.

    Returns:
        ("13", "mlp.weight"); ("", "") where the name is not that of a layer's tensor.
    """
    index, _, rest = name.removeprefix(prefix).partition(".")
    return (index, rest) if name.startswith(prefix) and index.isdecimal() else ("", "")


@torch.no_grad()
def _refuse_unequal_logits(decoder: Decoder, cut: PreTrainedModel, segment: Segment) -> None:
    tokens = proof_tokens(decoder)
    expected = reference_logits(decoder, segment, tokens)
    actual = cut(input_ids=tokens, use_cache=False).logits
    if not torch.equal(actual, expected):
        difference = (actual - expected).abs().max().item()
        raise UserError(
            f"the cut {type(cut).__name__} computes other logits than the parent without {segment}"
            f" (largest difference {difference:.2g}) - its layers depend on their number, so this segment cannot be cut"
        )


def proof_tokens(decoder: Decoder, *, blocks: int = PROOF_BLOCKS, length: int = PROOF_TOKENS) -> torch.Tensor:
    """Return random token ids [blocks, length], always the same for a model."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(decoder.vocab_size, (blocks, length), generator=generator)
    return drawn.to(device_of(decoder.model))


@torch.no_grad()
def reference_logits(decoder: Decoder, segment: Segment, tokens: torch.Tensor) -> torch.Tensor:
    """Return the parent's logits [B, T, V] with the segment's layers bypassed."""
    with bypass(decoder, segment):
        return decoder.model(input_ids=tokens, use_cache=False).logits


def cut_folder(weights: Weights, plan: Plan, out: Path) -> tuple[Weights, dict[str, str]]:
    """Copy the tensors that stay into a folder, shard by shard, and write the cut config; return them and their names.

    Returns:
        The copied weights, and {name in the parent: name in the copy} of every tensor kept.

    Raises:
        UserError: the files do not hold exactly the layers that the config names.
    """
    renamed = renamed_tensors(weights, plan)
    out.mkdir(parents=True, exist_ok=True)
    copied = copy_weights(weights, renamed, out)
    plan.config.save_pretrained(out)
    return copied, renamed


def renamed_tensors(weights: Weights, plan: Plan) -> dict[str, str]:
    """Return {name: new name} of the tensors in files that stay after a cut.

    Raises:
        UserError: layers that the config does not name (a multi-token-prediction head, leftovers), or missing ones.
    """
    prefix, found = _layers_in(weights, plan)
    segment, kept = plan.segment, plan.segment.kept()
    beyond = sorted(index for index in found if index >= segment.num_layers)
    if beyond:
        raise UserError(
            f"the files hold {prefix}{beyond[0]} beyond the {segment.num_layers} layers that the config names (a"
            " multi-token-prediction head, or left over from another cut): it would take the place of no layer"
            " - load and save the model with transformers, which leaves it out"
        )
    if missing := sorted(set(range(segment.num_layers)) - found):
        raise UserError(f"the files hold no {prefix}{missing[0]} - fetch the checkpoint again")
    renamed = {}
    for name in weights.tensors:
        index, rest = layer_in(name, prefix)
        if not index:
            renamed[name] = name
        elif index != str(int(index)):
            raise UserError(f"tensor {name} spells its layer's number oddly - rename it in the files")
        elif int(index) in kept:
            renamed[name] = f"{prefix}{kept.index(int(index))}.{rest}"
    return renamed


def _layers_in(weights: Weights, plan: Plan) -> tuple[str, set[int]]:
    """Find the names' prefix, with its dot, under which the files keep the decoder's layers, and the layers there."""
    layer = next(plan.parent.get_submodule(plan.path).children())
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    numbered: dict[str, dict[int, list[Stored]]] = defaultdict(lambda: defaultdict(list))
    for name, tensor in weights.tensors.items():
        if found := re.match(r"((?:[^.]+\.)*?)(\d+)\.", name):  # the first number in it: the outermost list
            numbered[found[1]][int(found[2])].append(tensor)
    plan_tail = plan.path.rpartition(".")[2] + "."
    scores = {}
    for prefix, layers in numbered.items():
        rests = {t.name.removeprefix(f"{prefix}0."): t.shape for t in layers.get(0, [])}
        alike = sum(name in rests and rests[name] in (shape, shape[::-1]) for name, shape in shapes.items())
        enough = len(layers) >= plan.segment.num_layers
        scores[prefix] = (prefix == f"{plan.path}.", enough, alike, prefix.endswith(plan_tail))
    best = [prefix for prefix, score in scores.items() if score == max(scores.values())]
    if len(best) != 1:
        places = ", ".join(sorted(best or numbered)) or "none"
        raise UserError(
            f"the files of {weights.folder} name their layers unlike {plan.path} - found lists: {places}"
            " - load and save the model with transformers first"
        )
    return best[0], set(numbered[best[0]])
