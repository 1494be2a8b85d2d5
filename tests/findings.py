"""What the tests of report, model card and terminal share: a sound run with every stage, and others that differ."""

from __future__ import annotations

import itertools
import math
from typing import Any

import yaml

from layerscalpel.summary import measured

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
segments: [[13, 19]]
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
  race: {confidence: 0.99, first_blocks: 8, num_blocks: 32, left: [13],
    margin: {rival: 14, difference_kl_nats: {value: 0.0412, se: 0.0061, n: 32}, standard_errors: 6.754}}
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
    ppl: {value: 33.84, se: 0.77, n: 16320}, ppl_ratio: {value: 1.966, se: 0.031, n: 16320}}
  healed: {kl_nats: {value: 0.4418, se: 0.021, n: 16384}, ppl: {value: 25.13, se: 0.42, n: 16320},
    ppl_ratio: {value: 1.4602, se: 0.0113, n: 16320},
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


def quantity(value: float, se: float, n: int = 64) -> dict[str, Any]:
    """Return a measured quantity."""
    return {"value": value, "se": se, "n": n}


def kl_of(start: int, n: int = 6) -> float:
    """Return a KL as real models have it: lowest in the middle, worst where the first layer goes."""
    return 0.09 * n**1.15 + 0.0075 * n * abs(start - (19 - n)) ** 1.25 + (7.4 if start == 0 else 0)


def scores_of(n: int = 6, left: tuple[int, ...] = (13,), num_blocks: int = 32) -> dict[str, Any]:
    """Return the scores of the windows of n layers after a race; the others saw fewer blocks the worse they are."""
    found = {}
    for start in range(31 - n):
        kl = kl_of(start, n)
        blocks = num_blocks if start in left else 8 if kl > 1.25 * kl_of(19 - n, n) else 16
        found[str(start)] = {"kl_nats": kl, "se": 0.02 + 0.03 * kl, "num_blocks": blocks}
    return found


def full_results() -> dict[str, Any]:
    """Return a sound run with every stage."""
    results = yaml.safe_load(RESULTS)
    began, ends = [0, 6, 12, 18, 24], [3, 13, 13, 16, 22]
    results["search"] |= {
        "scores": scores_of(left=(13, 14)),  # it was decided at the last look
        "layers": {str(i): quantity(0.05 + 0.4 * abs(i / 30 - 0.6) ** 2, 0.004) for i in range(30)},
        "angles": {str(s): quantity(0.16 + 0.004 * abs(s - 15), 0.006) for s in range(25)},
        "gate": {
            "starts": [[a + (b - a) * t / 32 for a, b in zip(began, ends, strict=True)] for t in range(33)],
            "losses": [[1.0, 1.0, 1.0, None, 1.0]] * 32,  # one start settled at once
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


LONG_EDGES = (1, 64, 128, 256, 512, 1024, 2048, 4096)


def long_results() -> dict[str, Any]:
    """Return a run whose healed model is worse far into a text."""
    results = full_results()
    bins = list(itertools.pairwise(LONG_EDGES))
    counts = [4 * (high - low) for low, high in bins]
    for model, near, far in (("parent", 0, 0), ("cut", 1.97, 2.31), ("healed", 1.4, 1.9)):
        rows = []
        for place, (low, high) in enumerate(bins):
            ppl = (21.45 - 1.5 * place) * (near or 1)
            row = {"from": low, "to": high, "ppl": quantity(ppl, 0.41, counts[place])}
            ratio = quantity(near + (far - near) * place / 6, 0.03 + 0.02 * place / 6, counts[place])
            rows.append(row | ({"ppl_ratio": ratio} if near else {}))
        results["evaluate"][model]["by_position"] = rows
        if near:
            results["evaluate"][model]["near_and_far"] = [rows[1] | {"to": 512}, rows[-1]]
    results["evaluate"]["cut"]["ppl_ratio_growth"] = quantity(1.1398, 0.0391, 9984)
    results["evaluate"]["healed"]["ppl_ratio_growth"] = quantity(1.2809, 0.0358, 9984)
    texts = {"num_blocks": 4, "block_tokens": 4096, "num_documents": 4, "joined": False, "dropped": {"too short": 391}}
    results["data"]["long"] = results["data"]["evaluation"] | texts
    return results


def old_results() -> dict[str, Any]:
    """Return a run of before the race: one segment, scores without blocks."""
    results = full_results()
    del results["segments"], results["search"]["race"], results["search"]["layers"], results["search"]["angles"]
    for score in results["search"]["scores"].values():
        del score["num_blocks"]
    return results


RATES = """
target: {kind: max_kl, asked_kl_nats: 0.9, num_removed: 7, kl_nats: {value: 0.844, se: 0.045, n: 64},
  most_layers_tried: 15}
race: &race {confidence: 0.99, first_blocks: 8, num_blocks: 64, left: [11, 12, 13],
  margin: {rival: 13, difference_kl_nats: {value: 0.0117, se: 0.0094, n: 64}, standard_errors: 1.2446}}
refused: {10: "layer 10 writes keys that layer 19 reads - remove both, or none",
  9: "layer 10 writes keys that layer 19 reads - remove both, or none"}
processes: 4
offload: {keep: disk, passes: 4, pass_bytes: 14500000000, file_bytes: 3200000000}
"""


def rates_results() -> dict[str, Any]:
    """Return a run to a KL, of a model larger than memory, whose best windows could not be told apart."""
    results = full_results()
    search = results["search"] | yaml.safe_load(RATES) | {"method": "exact"}
    del search["gate"], search["certificate"]
    search["surface"] = {str(n): scores_of(n, (18 - n, 19 - n, 20 - n), 64) for n in range(1, 16)}
    search["scores"] = search["surface"]["7"]
    search["rates"] = {
        n: {"start": 19 - int(n), **rows[str(19 - int(n))], "race": search["race"] | {"left": [19 - int(n)]}}
        for n, rows in search["surface"].items()
    }
    search["rates"]["7"]["race"] = search["race"]
    results |= {"search": search, "segment": [12, 19], "segments": [[12, 19]]}
    for model in results["evaluate"].values():
        if isinstance(model, dict):
            model.pop("samples", None)
    results["heal"]["layers"] = [11, 12]
    del results["benchmark"]["parent"], results["benchmark"]["speedup"]
    return results


TWO_RUNS = """
two_runs: {segments: [[10, 12], [17, 21]], kl_nats: {value: 0.611, se: 0.021, n: 64}, num_pairs: 133, wins: true,
  single_less_two_kl_nats: {value: 0.0917, se: 0.0123, n: 64}, race: {confidence: 0.99, first_blocks: 8,
  num_blocks: 64, left: ["10:12+17:21"], margin: {rival: "10:12+16:20",
  difference_kl_nats: {value: 0.0301, se: 0.0055, n: 64}, standard_errors: 5.47}}}
target: {kind: latency_ms, asked_ms: 62.0, num_removed: 6, predicted_ms: {value: 60.4, se: 0.8, n: 5},
  latency: {fixed_ms: {value: 9.2, se: 0.5, n: 5}, layer_ms: {value: 2.13, se: 0.04, n: 5}, covariance_ms2: -0.016,
  check: {num_layers: 23, measured_ms: {value: 58.9, se: 0.6, n: 5}, predicted_ms: {value: 58.2, se: 0.7, n: 5},
  error_fraction: {value: -0.0119, se: 0.0061, n: 5}}, device: cpu, dtype: float32, threads: 2, prompt_tokens: 128,
  new_tokens: 32, batch_size: 1}}
"""


def two_run_results() -> dict[str, Any]:
    """Return a run to a latency that removed two runs of layers, cut in two steps, and healed both seams."""
    results = full_results()
    results["search"] |= yaml.safe_load(TWO_RUNS)
    results |= {"segment": [10, 12], "segments": [[10, 12], [17, 21]]}
    cut = results["cut"]
    last = {"parent": "org/model", "segment": [17, 21], "num_layers": 30}
    first = {"parent": "../step-1", "segment": [10, 12], "num_layers": 26, "before": last}
    steps = [
        cut | {"config_changes": {"num_hidden_layers": "30 -> 26"}, "history": last},
        cut | {"config_changes": {"num_hidden_layers": "26 -> 24"}, "history": first},
    ]
    results["cut"] = steps[-1] | {"steps": steps}
    results["heal"]["layers"] = [9, 10, 14, 15]
    return results


PILOTS = """
pilots:
- {start: 2, validation_loss_nats: 2.312, kl_nats: 0.8113, top1_agreement_fraction: 0.5614, steps: 150, wall_s: 31.2}
- {start: 12, validation_loss_nats: 2.201, kl_nats: 0.5241, top1_agreement_fraction: 0.6641, steps: 150, wall_s: 30.9}
- {start: 13, validation_loss_nats: 2.204, kl_nats: 0.5113, top1_agreement_fraction: 0.6602, steps: 150, wall_s: 31.0}
target: {kind: params, asked_parameters: 114000000, num_removed: 6, starts: [0, 1, 2, 3, 12, 13, 14]}
"""


def pilot_results() -> dict[str, Any]:
    """Return a run to a number of parameters whose pilots took another window than the lowest."""
    results = full_results()
    results["search"] |= yaml.safe_load(PILOTS) | {"method": "pilot"}
    results |= {"segment": [12, 18], "segments": [[12, 18]]}
    results["heal"]["layers"] = [11, 12]
    return results


PHASES = """
method: endpoint
objective: both
weights: {ce: 1.0, kl: 0.5, seam: 0.1}
lr: 0.0005
expand: 2
documents: apart
cached_fraction: 0.875
cache_bytes: 1200000000
cache_dtype: bfloat16
micro_batch_size: 1
micro_batch_halvings: 2
labelled_tokens: 24000
processes: 4
kl_nats: {before: {value: 0.7144, se: 0.0191, n: 16384}, after: {value: 0.4409, se: 0.0162, n: 16384},
  text: calibration}
failed: false
second: {method: lora, objective: both, weights: {ce: 1.0, kl: 0.5, seam: 0.1}, lr: 0.00005, expand: 0,
  documents: apart,
  layers: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23],
  trained_parameters: 1953792, steps: 50, tokens: 25600, labelled_tokens: 12000, best_step: 50, cached_fraction: 1.0,
  cache_bytes: 300000000, cache_dtype: bfloat16, micro_batch_size: 1, micro_batch_halvings: 0}
"""


def two_phase_results() -> dict[str, Any]:
    """Return a run that was healed in two phases, by a loss of three terms, with little memory."""
    results = full_results()
    heal = results["heal"] | yaml.safe_load(PHASES)
    loss = {t: 1.95 - 0.004 * t for t in range(51)}
    heal["second"] |= {
        "train": [{"step": t, "loss": loss[t] + 0.05 * math.sin(5 * t), "lr": 5e-5} for t in range(1, 51)],
        "validation": [{"step": t, "loss": loss[t]} for t in range(0, 51, 10)],
    }
    heal["train"] = [{"step": row["step"], "loss": row["loss_nats"], "lr": row["lr"]} for row in heal["train"]]
    heal["validation"] = [{"step": row["step"], "loss": row["loss_nats"]} for row in heal["validation"]]
    for row in [*heal["validation"], *heal["second"]["validation"]]:
        row |= {"ce_nats": 0.7 * row["loss"], "kl_nats": 0.4 * row["loss"], "seam_error": row["loss"]}
    return results | {"heal": heal}


def failed_results() -> dict[str, Any]:
    """Return a run whose healing took it farther from its parent, so that the cut model is the result."""
    results = full_results()
    kl = {"before": quantity(0.7144, 0.0191), "after": quantity(0.9032, 0.0233), "text": "calibration"}
    results["heal"] |= {"kl_nats": kl, "failed": True, "documents": "joined"}
    results["evaluate"]["healed"] = {**results["evaluate"]["healed"], **results["evaluate"]["cut"]}
    return results


TASKS = """
harness: {lm_eval: 0.4.12, limit: 1000, chat_template: false, tasks: {
  piqa: {metric: acc_norm, chance: 0.5, num_items: 1000, source: offline, num_fewshot: 0, batch_size: 16, cut_short: 0},
  boolq: {metric: acc, chance: 0.622, num_items: 1000, source: offline, num_fewshot: 0, batch_size: 16, cut_short: 3},
  wikitext: {metric: word_perplexity, chance: null, num_items: 62, source: hub, num_fewshot: 0, batch_size: 16,
    cut_short: 0}}}
overlap: {piqa: {num_items: 1000, overlapping: 0, too_short: 181}, boolq: {num_items: 1000, overlapping: 7,
  too_short: 0}}
scores:
  parent: {piqa: {acc_norm: {value: 0.683, se: 0.0147, n: 1000}}, boolq: {acc: {value: 0.412, se: 0.0156, n: 1000}},
    wikitext: {word_perplexity: {value: 23.41, se: 0.93, n: 62}}}
  healed: {piqa: {acc_norm: {value: 0.651, se: 0.0151, n: 1000}}, boolq: {acc: {value: 0.406, se: 0.0155, n: 1000}},
    wikitext: {word_perplexity: {value: 31.72, se: 1.21, n: 62}}}
retention:
  plain_fraction: {value: 0.9693, se: 0.0137, n: 2000}
  adjusted_fraction: {value: 0.8251, se: 0.0534, n: 1000}
  by_task:
    piqa: {counts: true, at_chance: false, plain_fraction: {value: 0.9531, se: 0.0142, n: 1000},
      adjusted_fraction: {value: 0.8251, se: 0.0534, n: 1000}}
    boolq: {counts: false, at_chance: true, plain_fraction: {value: 0.9854, se: 0.0231, n: 1000}}
  left_out: {wikitext: less word_perplexity is better}
"""


def written(loops: float, kind: str) -> dict[str, Any]:
    """Return what is measured of 16 texts a model wrote."""
    names = ("loop", "empty", "cut_off", "distinct_1", "distinct_2", "distinct_3")
    values = (loops, 0.0, 0.8125, 0.6213, 0.8141, 0.9017)
    counted = {f"{name}_fraction": quantity(value, 0.0527, 16) for name, value in zip(names, values, strict=True)}
    other = {name: item | {"value": item["value"] / 2} for name, item in counted.items()}
    how = {"new_tokens": 64, "num_prompts": 16, "seed": 0, "temperature": 0.8, "top_p": 0.95}
    return how | {"greedy": counted, "sampled": other}


def task_results() -> dict[str, Any]:
    """Return a run with tasks, writing, positions and domains measured."""
    results = full_results()
    found, evaluated = yaml.safe_load(TASKS), results["evaluate"]
    evaluated |= {"harness": found["harness"], "overlap": found["overlap"]}
    for model, far in (("parent", 0), ("cut", 0.6), ("healed", 0.4)):
        own = evaluated[model]
        own["writing"] = written(0.0625 if model == "parent" else 0.1875, model)
        own["samples"] = [
            {
                "kind": "plain",
                "prompt": f"The river {i}",
                "text": EVIL,
                "cut_off": True,
                "loops": i < 2 * bool(far),
                "sampled": {"text": f"by {model} {i}", "cut_off": False, "loops": False},
            }
            for i in range(16)
        ]
        if model in found["scores"]:
            own["tasks"] = found["scores"][model]
        figures = {
            name: own[name] for name in ("kl_nats", "top1_agreement_fraction", "ppl", "ppl_ratio") if name in own
        }
        own["by_domain"] = {name: {"num_blocks": 32, **figures} for name in ("c4", "alpaca")}
        if far:
            own["kl_by_position"] = [
                {
                    "from": low,
                    "to": high,
                    "kl_nats": quantity(far + 1 / low, 0.0213),
                    "top1_agreement_fraction": quantity(0.6, 0.01),
                }
                for low, high in ((1, 16), (16, 32), (32, 64), (64, 128), (128, 257))
            ]
    evaluated["healed"]["retention"] = found["retention"]
    return results


QUANTIZED = """
quantize:
  of: heal
  method: gptq
  bits: 4
  group_size: 64
  symmetric: true
  act_order: true
  damping: 0.05
  wider: {model.layers.12.mlp.up_proj: 8, model.layers.13.mlp.up_proj: 8}
  converted: 168
  left: {no linear layer (LlamaRMSNorm): 49, embeddings: 1, "the head, tied to the embeddings": 1}
  modules: 219
  bytes: 118000123
  source_bytes: 228700456
  folder_bytes: {parent: 271170789, cut: 228700456, heal: 228700456}
  kl_to_source_nats: {value: 0.0412, se: 0.0013, n: 16384}
  tried:
    - {damping: 0.01, kl_to_source_nats: {value: 0.0437, se: 0.0014, n: 16384}}
    - {damping: 0.05, kl_to_source_nats: {value: 0.0412, se: 0.0013, n: 16384}}
  runs_packed: false
  write_s: 81.2
quantized: {kl_nats: {value: 0.4871, se: 0.022, n: 16384}, ppl: {value: 27.02, se: 0.45, n: 16320},
  ppl_ratio: {value: 1.5702, se: 0.0131, n: 16320}, top1_agreement_fraction: {value: 0.6834, se: 0.0049, n: 16384}}
beside:
  parent4: {how: "the parent in 4 bits, nothing removed", bits: 4, bytes: 117000789,
    kl_nats: {value: 0.0934, se: 0.0071, n: 16384}, ppl: {value: 18.83, se: 0.33, n: 16320},
    ppl_ratio: {value: 1.0942, se: 0.0061, n: 16320}, top1_agreement_fraction: {value: 0.8631, se: 0.0034, n: 16384}}
  healed8: {how: "the final model of the run in 8 bits", bits: 8, bytes: 146100789,
    kl_nats: {value: 0.4421, se: 0.0211, n: 16384}, ppl: {value: 25.15, se: 0.43, n: 16320},
    ppl_ratio: {value: 1.4611, se: 0.0114, n: 16320}, top1_agreement_fraction: {value: 0.7009, se: 0.0047, n: 16384},
    retention: {adjusted_fraction: {value: 0.8123, se: 0.0201, n: 900}}}
"""


def quantized_results() -> dict[str, Any]:
    """Return a run that quantises, beside two other ways to be small, one of which is better."""
    found = yaml.safe_load(QUANTIZED)
    results = full_results() | {"quantize": found["quantize"]}
    results["evaluate"] |= {"quantized": found["quantized"], "beside": found["beside"]}
    results["benchmark"]["not_timed"] = {"quantized": "transformers unpacks these weights"}
    return results


VARIANTS = {
    "full": full_results,
    "old": old_results,
    "long": long_results,
    "rates": rates_results,
    "two runs": two_run_results,
    "pilots": pilot_results,
    "two phases": two_phase_results,
    "failed": failed_results,
    "tasks": task_results,
    "quantized": quantized_results,
}


DRAWN = ("layers", "angles", "surface", "rates")
"""Parts of the search that are shown in figures, or at the terminal, and not in words."""
IN_PAGE_ONLY = (*DRAWN, "by_domain", "by_task", "writing")
SHARES = ("_fraction", "acc", "acc_norm")


def quantities(node: Any, name: str = "", left_out: tuple[str, ...] = DRAWN) -> list[str]:
    """Return every measured quantity below a node as the page should print it; of a difference the size alone."""
    if not isinstance(node, dict):
        return []
    if set(node) == {"value", "se", "n"}:
        return [measured(node, 100 if name.endswith(SHARES) else 1).lstrip("-")]
    return [text for key, item in node.items() if key not in left_out for text in quantities(item, key, left_out)]
