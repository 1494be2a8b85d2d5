"""The fewest floating-point operations that a healing needs: the floor that its seconds are compared with.

A linear layer costs as much forward as backward to its inputs and as backward to its weights: twice its parameters a
token. Attention costs two products forward and four backward over the tokens that each token sees. Norms, rotary
tables, softmax and the optimiser are left out. LoRA's first layer needs no gradient of what enters it, so its queries,
keys and values pass none on. The head is applied at labelled places, forward and backward.

    costs, amount = LayerCosts.of(model, rank=8), Amount.of(blocks, apart=True)
    layer_flops(costs, amount, depth=26, boundary=21, trained=2, epochs=2, cached=True)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from layerscalpel.data import TokenBlocks

QUERIES_KEYS_VALUES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Amount:
    """How much is read once."""

    tokens: int
    visible: int
    """Tokens that each token sees, itself among them, summed over all."""
    labelled: int

    @classmethod
    def of(cls, blocks: TokenBlocks, *, apart: bool) -> Amount:
        """Count blocks whose packed documents see each other or not."""
        count, length = blocks.tokens.shape
        visible = count * length * (length + 1) // 2
        if apart and blocks.positions is not None:
            visible = int((blocks.positions + 1).sum())
        return cls(count * length, visible, int(blocks.labelled.sum()))


@dataclass(frozen=True)
class LayerCosts:
    """Parameters of a LLaMA's linear layers."""

    layer: int
    queries_keys_values: int
    adapters: int
    """Of LoRA, in a layer."""
    width: int
    """Of all heads together."""
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel, *, rank: int) -> LayerCosts:
        """Count the first layer's."""
        linears = {name: part for name, part in model.model.layers[0].named_modules() if isinstance(part, nn.Linear)}
        sizes = {name.rpartition(".")[2]: part.weight.numel() for name, part in linears.items()}
        return cls(
            layer=sum(sizes.values()),
            queries_keys_values=sum(sizes[name] for name in QUERIES_KEYS_VALUES),
            adapters=sum(rank * (part.in_features + part.out_features) for part in linears.values()),
            width=model.config.num_attention_heads * model.config.head_dim,
            head=model.get_output_embeddings().weight.numel(),
        )

    def forward(self, amount: Amount) -> int:
        """Return the FLOPs of a layer."""
        return 2 * self.layer * amount.tokens + 4 * self.width * amount.visible

    def backward(self, amount: Amount) -> int:
        """Return the FLOPs from a layer's output back to its input."""
        return 2 * self.layer * amount.tokens + 8 * self.width * amount.visible

    def saved(self, amount: Amount) -> int:
        """Return what the first layer need not do of that where the gain of its norm is not trained."""
        return 2 * self.queries_keys_values * amount.tokens

    def both_of_head(self, amount: Amount) -> int:
        """Return the FLOPs of the head, forward and back to its input."""
        return 4 * self.head * amount.labelled


def layer_flops(
    costs: LayerCosts, amount: Amount, *, depth: int, boundary: int, trained: int, epochs: int, cached: bool
) -> int:
    """Return the FLOPs of training whole layers.

    Args:
        costs: of the model.
        amount: what an epoch reads.
        depth: layers of the cut model.
        boundary: the first trained layer.
        trained: how many there are.
        epochs: passes.
        cached: whether what lies below the boundary is computed once, or in each epoch.
    """
    above = depth - boundary
    weights = trained * 2 * costs.layer * amount.tokens
    epoch = above * (costs.forward(amount) + costs.backward(amount)) + weights + costs.both_of_head(amount)
    return (1 if cached else epochs) * boundary * costs.forward(amount) + epochs * epoch


def lora_flops(costs: LayerCosts, amount: Amount, *, depth: int, epochs: int) -> int:
    """Return the FLOPs of training adapters on all linear layers; these go forward, and back to both."""
    layer = costs.forward(amount) + costs.backward(amount) + 3 * 2 * costs.adapters * amount.tokens
    return epochs * (depth * layer - costs.saved(amount) + costs.both_of_head(amount))
