"""What the tests of the report and of the model card share: the results of a sound run with every stage."""

from __future__ import annotations

import math
from typing import Any

import yaml

from layerscalpel.card import measured

STAGES = ("data", "search", "cut", "stitch", "heal", "evaluate", "benchmark")
PROVENANCE = {
    "layerscalpel": "0.1.0",
    "torch": "2.9.1",
    "transformers": "5.23.0",
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "device": "cpu",
    "started": "2026-11-22T02:00:00Z",
    "wall_s": 213.4,
    "seed": 0,
    "settings": {"name": "demo"},
}
EVIL = "Once <script>alert('x')</script> & \"so on\""


RESULTS = """
parent: {name: demo, num_layers: 30, parameters: 134515008, bytes: 269030016, dtype: bfloat16, file_bytes: 98362432}
segment: [13, 19]
data:
  calibration: &blocks {source: c4, num_blocks: 128, block_tokens: 256, labelled_tokens: 32640, num_documents: 384,
    dropped: {}, sha256: 00c4}
  evaluation: {<<: *blocks, num_blocks: 64, dropped: {repeated: 3}, sha256: 01c4}
  healing: {<<: *blocks, source: alpaca, num_blocks: 400, dropped: {empty: 2, repeated: 17}, sha256: 02a1}
  validation: {<<: *blocks, source: alpaca, num_blocks: 21, sha256: 03a1}
search:
  method: clp
  certificate: {gate_start: 13, exact_start: 13, difference_kl_nats: {value: 0.0, se: 0.0, n: 8192},
    num_starts_at_optimum: 2, num_starts: 5}
  wall_s: 60.1
  peak_memory_bytes: 812000000
cut:
  parameters: 113274432
  bytes: 226548864
  config_changes: {num_hidden_layers: 30 -> 24}
  proof:
    kind: fresh process
    logits: {loaded: fresh process, logits_equal: true, max_difference: 0.0, tolerance: 0.0, generation_equal: true,
      tokens: [2, 24], dtype: float32, device: cpu}
    twin: {loaded: fresh process, logits_equal: true, max_difference: 0.0, tolerance: 0.0, generation_equal: true,
      tokens: [2, 24], dtype: float32, device: cpu}
    tensors: {num_tensors: 218, num_bytes: 226548864,
      sha256: 0f3a5c7e9b1d2f4a6c8e0a1b2c3d4e5f60718293a4b5c6d7e8f9a0b1c2d3e4f5}
    left_out: {}
stitch: {method: linear, kl_nats: {none: {value: 0.69, se: 0.02, n: 512}, linear: {value: 0.47, se: 0.01, n: 512}}}
heal: {method: endpoint, objective: both, layers: [12, 13], trained_parameters: 7080192, steps: 100, tokens: 51200,
  best_step: 90, parameters: 113274432, bytes: 226548864, wall_s: 311.7, peak_memory_bytes: 1913000000}
evaluate:
  parent: {ppl: {value: 17.21, se: 0.31, n: 16320}}
  cut: {kl_nats: {value: 0.7213, se: 0.018, n: 16384}, top1_agreement_fraction: {value: 0.6114, se: 0.0052, n: 16384},
    ppl: {value: 33.84, se: 0.77, n: 16320}}
  healed: {kl_nats: {value: 0.4418, se: 0.021, n: 16384}, ppl: {value: 25.13, se: 0.42, n: 16320},
    top1_agreement_fraction: {value: 0.7012, se: 0.0047, n: 16384}}
  wall_s: 40.2
benchmark:
  device: cpu
  threads: 2
  prompt_tokens: 128
  new_tokens: 32
  batch_size: 1
  parent: {prefill_s: {value: 0.512, se: 0.011, n: 5}, decode_tokens_per_s: {value: 14.2, se: 0.3, n: 5}}
  healed: {prefill_s: {value: 0.421, se: 0.009, n: 5}, decode_tokens_per_s: {value: 16.9, se: 0.4, n: 5}}
  speedup: {of: healed, prefill: {value: 1.216, se: 0.034, n: 5}, decode: {value: 1.19, se: 0.038, n: 5}}
  ideal_speedup: 1.25
"""


def full_results() -> dict[str, Any]:
    """Return a sound run with every stage."""
    results = yaml.safe_load(RESULTS)
    kl = {s: 0.72 + 0.045 * abs(s - 13) ** 1.25 + (7.4 if s == 0 else 0) for s in range(25)}
    began, ends = [0, 6, 12, 18, 24], [3, 13, 13, 16, 22]
    results["search"] |= {
        "scores": {str(s): {"kl_nats": value, "se": 0.02 + 0.03 * value} for s, value in kl.items()},
        "gate": {
            "starts": [[a + (b - a) * t / 32 for a, b in zip(began, ends, strict=True)] for t in range(33)],
            "losses": [[1.0] * 5] * 32,
            "steepness": [5 ** (t / 31) for t in range(32)],
            "ends": ends,
        },
        "similarity": [[math.exp(-abs(i - j) / (6 + i)) for j in range(31)] for i in range(31)],
    }
    loss = {t: 1.9 + 0.8 * math.exp(-t / 20) + 0.05 * (t == 100) for t in range(101)}
    results["heal"] |= {
        "train": [{"step": t, "loss_nats": loss[t] + 0.05 * math.sin(7 * t), "lr": 1e-4} for t in range(1, 101)],
        "validation": [{"step": t, "loss_nats": loss[t]} for t in range(0, 101, 10)],
    }
    for model in ("parent", "cut", "healed"):
        results["evaluate"][model]["samples"] = [
            {"prompt": "The river", "text": EVIL},
            {"prompt": "Why?", "text": model},
        ]
    return results


def quantities(node: Any, name: str = "") -> list[str]:
    """Return every measured quantity below a node as the page should print it."""
    if not isinstance(node, dict):
        return []
    if set(node) == {"value", "se", "n"}:
        return [measured(node, 100 if name.endswith("_fraction") else 1)]
    return [text for key, item in node.items() for text in quantities(item, key)]
