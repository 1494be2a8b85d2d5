"""Cut a tiny twin of every causal language model class that transformers knows, at five places, and prove each cut.

    python benchmarks/sweep.py                 # all; writes docs/benchmarks/families.json and docs/families.md
    python benchmarks/sweep.py llama gpt2      # some; prints only

Each twin (layerscalpel/twin.py) has the layer count and the per-layer rules of the family's default config. A cut goes
through files, as `scalpel cut` does, and one fresh process loads every result: logits equal to the parent's with the
segment bypassed (torch.equal, float32, CPU), generation with a cache equal to without, parameter count, tied weights,
config accepted by its validators.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from family_samples import NOT_BUILDABLE, SAMPLES
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerscalpel.errors import UserError
from layerscalpel.layers import num_layers_of
from layerscalpel.proof import prove_twin
from layerscalpel.quiet import quiet_transformers
from layerscalpel.segment import Segment
from layerscalpel.twin import twin_model
from layerscalpel.witness import Witness

NAMED = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"),
    *(
        "olmo3",
        "smollm3",
        "granite",
        "cohere",
        "cohere2",
        "stablelm",
        "starcoder2",
        "falcon",
        "gpt2",
        "gpt_neox",
        "gptj",
    ),
    *("opt", "bloom", "mpt", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe", "exaone4", "lfm2", "mamba2"),
    *("qwen2_moe", "qwen3_next", "llama4_text", "jamba", "granitemoehybrid", "gemma3n_text", "gemma4_text"),
)
MULTIMODAL = (
    *(
        "llava",
        "llava_next",
        "llava_onevision",
        "mistral3",
        "internvl",
        "idefics3",
        "smolvlm",
        "qwen2_vl",
        "qwen2_5_vl",
    ),
    *("qwen3_vl", "qwen3_vl_moe", "glm4v", "paligemma", "aya_vision", "lfm2_vl", "kimi_k25"),
)
"""Not in the causal mapping; loaded by AutoModelForImageTextToText."""
HEAD = """# Families

What `scalpel cut` does with every causal language model class that transformers knows ({versions}),
written by `benchmarks/sweep.py`. Each family was tried as a tiny random twin of its default config, or where that makes
no causal model, of a published one ([benchmarks/family_samples.py](../benchmarks/family_samples.py)): same layer count,
same per-layer rules, small sizes. Each was cut at five places through files, and the result loaded in a fresh process.

*yes*: proven. Logits equal the parent's with the segment bypassed (torch.equal, float32, CPU), generation with a cache
equals generation without, the parameter count is what must stay, tied weights are tied, the config passes its own
validators. *no*: refused with a reason, before anything is written; the last column has the first reason.

Of {total} model types {built} can be built tiny. **{cut} ({cut_percent:.0f} %) can be cut, proven**: {everywhere}
({everywhere_percent:.0f} %) at all five places, {in_part} at some, where another would break a rule of the family.
{refused} are refused everywhere, {not_buildable} cannot be built, {defects} ended with a crash. A wrong result can only
be a wrong proof: none is known.

A model that is refused here may still have segments that can be cut, and the other way round: the rules of a checkpoint
are in its own config. `scalpel inspect MODEL` tries every place.
"""
ROOT = Path(__file__).parents[1]
POSITIONS = ("front", "middle", "back", "one layer", "half")
SECONDS = 120
"""What one family may take."""


def segments(num_layers: int) -> dict[str, Segment]:
    """Return the five places of a cut; a fifth of the layers at the front, in the middle and at the back."""
    n, half = max(1, num_layers // 5), num_layers // 2
    bounds = {
        "front": (0, n),
        "middle": (half - n // 2, half - n // 2 + n),
        "back": (num_layers - n, num_layers),
        "one layer": (half, half + 1),
        "half": (num_layers // 4, num_layers // 4 + half),
    }
    return {name: Segment(start, stop, num_layers) for name, (start, stop) in bounds.items()}


def try_family(model_type: str, witness: Witness, positions: Iterable[str] = POSITIONS) -> dict[str, Any]:
    """Return {status, layers, positions: {position: "proven" or the refusal}, reason} of one family."""
    if model_type in NOT_BUILDABLE:
        return {"status": "not buildable", "reason": NOT_BUILDABLE[model_type]}
    try:
        twin = twin_model(AutoConfig.for_model(model_type, **SAMPLES.get(model_type, {})))
        with torch.no_grad():
            twin(input_ids=torch.randint(3, 100, (1, 8)), use_cache=False)
    except Exception as error:  # whatever stops transformers from building or running the uncut model
        return {"status": "not buildable", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    found: dict[str, str] = {}
    try:
        num_layers = num_layers_of(twin.config)
        places = segments(num_layers)
    except UserError as error:
        return {"status": "refused", "class": type(twin).__name__, "reason": str(error)}
    for position in positions:
        try:
            prove_twin(witness, twin, places[position])
            found[position] = "proven"
        except UserError as error:
            found[position] = str(error)
    reasons = [text for text in found.values() if text != "proven"]
    status = "proven" if not reasons else "refused" if len(reasons) == len(found) else "proven in part"
    return {
        "status": status,
        "class": type(twin).__name__,
        "layers": num_layers,
        "positions": found,
        "reason": reasons[0] if reasons else "",
    }


def sweep(model_types: list[str]) -> dict[str, dict[str, Any]]:
    """Try every family with one fresh process for all of them; print a line each."""
    found = {}
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_slow)
    with quiet_transformers(), Witness() as witness:
        for model_type in model_types:
            began = time.monotonic()
            signal.alarm(SECONDS)
            try:
                found[model_type] = try_family(model_type, witness)
            except Exception as error:
                traceback.print_exc()
                found[model_type] = {"status": "defect", "reason": f"{type(error).__name__}: {error}"}
            finally:
                signal.alarm(0)
            row = found[model_type]
            print(
                f"{row['status']:16}{model_type:28}{time.monotonic() - began:6.1f} s  {row['reason'][:200]}", flush=True
            )
    return found


def _too_slow(*_: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def render(content: dict[str, Any]) -> str:
    """Return docs/families.md."""
    found = {name: row for name, row in content["families"].items() if name not in MULTIMODAL}
    totals = Counter(row["status"] for row in found.values())
    built = sum(totals.values()) - totals["not buildable"]
    cut = totals["proven"] + totals["proven in part"]
    text = HEAD.format(
        versions=f"transformers {content['transformers']}, torch {content['torch']}",
        total=len(found),
        built=built,
        cut=cut,
        cut_percent=100 * cut / built,
        everywhere=totals["proven"],
        everywhere_percent=100 * totals["proven"] / built,
        in_part=totals["proven in part"],
        refused=totals["refused"],
        not_buildable=totals["not buildable"],
        defects=totals["defect"],
    )
    for title, names in (
        ("Families people ask for", [name for name in NAMED if name in found]),
        ("All others", [name for name in found if name not in NAMED]),
        (
            "Models that see images, too: the text decoder is cut, the rest carried along, the proof is on text",
            MULTIMODAL,
        ),
    ):
        text += f"\n## {title}\n\n| type | class | layers | front | middle | back | one layer | half | why not |\n"
        text += "|---|---|---|---|---|---|---|---|---|\n"
        text += "".join(_row(name, content["families"][name]) for name in names)
    return text


def _row(name: str, row: dict[str, Any]) -> str:
    marks = ["yes" if row.get("positions", {}).get(place) == "proven" else "no" for place in POSITIONS]
    reason = row["reason"].replace("|", "/").replace(" - choose another segment", "")
    if row["status"] == "not buildable":
        marks, reason = ["-"] * len(POSITIONS), f"not buildable: {reason}"
    reason = reason if len(reason) <= 160 else reason[:157] + "..."
    return f"| `{name}` | {row.get('class', '-')} | {row.get('layers', '-')} | {' | '.join(marks)} | {reason} |\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the families")
    arguments = parser.parse_args()
    chosen, jobs = arguments.model_types, arguments.jobs
    names = chosen or [*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *MULTIMODAL]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        parts = pool.map(sweep, [names[i::jobs] for i in range(jobs)])
        found = dict(sorted((item for part in parts for item in part.items()), key=lambda item: item[0]))
    print(dict(Counter(row["status"] for row in found.values())))
    if not chosen:
        content = {"transformers": transformers.__version__, "torch": torch.__version__, "families": found}
        (ROOT / "docs/benchmarks/families.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (ROOT / "docs/families.md").write_text(render(content), encoding="utf-8")


if __name__ == "__main__":
    main()
