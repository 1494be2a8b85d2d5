"""The least seconds of a prompt and of a decoded token on paper: operations and bytes at the rates of the device.

A prompt is arithmetic: twice the weights of a layer a token, attention over the tokens before it, the head once a
sequence. A step of decoding is bytes: every weight of the layers and the head once, and all keys and values. What the
rest takes (norms, rotary tables, softmax, the choice of a token) is left out, and so is the table of embeddings, of
which few rows are read. The rates are measured in the same run, by a square product of matrices and by a plain copy.

    rates = Rates.of(device, matmul=8192, copied=1 << 30)
    Floor.of(model).prefill_s(job, rates), Floor.of(model).step_s(job, rates)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from heal_flops import Amount, LayerCosts
from measuring import median_s
from transformers import PreTrainedModel

from layerscalpel.turns import Job


@dataclass(frozen=True)
class Rates:
    """What a device reaches."""

    flops_per_s: float
    bytes_per_s: float

    @classmethod
    def of(cls, device: torch.device, *, matmul: int, copied: int) -> Rates:
        """Measure a product of matrices of that size, and a copy of so many bytes, which are read and written."""
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        left, right = (torch.randn(matmul, matmul, device=device, dtype=kind) for _ in range(2))
        source = torch.zeros(copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        product_s = median_s(lambda: torch.mm(left, right), 5)
        return cls(2 * matmul**3 / product_s, 2 * copied / median_s(lambda: target.copy_(source), 5))

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return asdict(self)

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Return how long the slower of the two takes."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Floor:
    """What a LLaMA computes and reads."""

    layers: int
    costs: LayerCosts
    key_width: int
    """Of the keys of a token in a layer."""
    item_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Floor:
        """Count a model's first layer."""
        config = model.config
        width = config.num_key_value_heads * config.head_dim
        return cls(config.num_hidden_layers, LayerCosts.of(model, rank=1), width, model.dtype.itemsize)

    def weight_bytes(self) -> int:
        """Return the bytes of the layers' linear weights and of the head."""
        return self.item_bytes * (self.layers * self.costs.layer + self.costs.head)

    def prefill_s(self, job: Job, rates: Rates) -> float:
        """Return the least seconds of a prompt."""
        batch, length = job.batch_size, job.prompt_tokens
        amount = Amount(tokens=batch * length, visible=batch * length * (length + 1) // 2, labelled=batch)
        flops = self.layers * self.costs.forward(amount) + 2 * self.costs.head * batch
        return rates.seconds(flops, self.weight_bytes())

    def step_s(self, job: Job, rates: Rates) -> float:
        """Return the least seconds of a decoding step, halfway through the answer."""
        seen = job.batch_size * (job.prompt_tokens + job.new_tokens / 2)
        amount = Amount(tokens=job.batch_size, visible=int(seen), labelled=job.batch_size)
        flops = self.layers * self.costs.forward(amount) + 2 * self.costs.head * job.batch_size
        keys_and_values = 2 * self.layers * self.key_width * self.item_bytes * seen
        return rates.seconds(flops, self.weight_bytes() + keys_and_values)
