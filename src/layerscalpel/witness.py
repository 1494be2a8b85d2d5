"""The fresh process of a proof: load a checkpoint as any user would and compare it with reference logits.

Run by `cut.prove` with one JSON argument; prints one JSON line. It uses transformers alone, nothing of this package, so
that it sees just what a user will see.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main(task: dict[str, Any]) -> dict[str, Any]:
    """Return {logits_equal, max_difference, generation_equal} of the checkpoint in task['folder']."""
    torch.set_num_threads(task["threads"])
    reference = load_file(task["reference"])
    model: Any = AutoModelForCausalLM.from_pretrained(
        task["folder"],
        dtype=getattr(torch, task["dtype"]),
        attn_implementation=task["attention"],
        trust_remote_code=task["trust_remote_code"],
    )
    model = model.to(task["device"]).eval()
    tokens = reference["tokens"].to(task["device"])
    logits = model(input_ids=tokens, use_cache=False).logits.float().cpu()
    difference = (logits - reference["logits"]).abs().max().item()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    cached, uncached = (model.generate(tokens, use_cache=flag, **settings) for flag in (True, False))
    return {
        "logits_equal": torch.equal(logits, reference["logits"]),
        "max_difference": difference,
        "generation_equal": torch.equal(cached, uncached),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
