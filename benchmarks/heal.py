"""The paper's recipe on a real model: cut, tune the endpoints on instructions, measure on held-out text.

    python benchmarks/heal.py --text c4.jsonl.gz --instructions alpaca.jsonl.gz --out docs/benchmarks/heal.json

Segment [13, 19), cross-entropy, 2 epochs, learning rate 5e-4, blocks of 512, batch 16; KL and perplexity on 256
held-out blocks of 256 tokens in float32. Every seed is appended to the output as it is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from layerscalpel.config import build_config
from layerscalpel.cut import cut_model
from layerscalpel.data import prepare_blocks
from layerscalpel.decoder import load_decoder, save_decoder
from layerscalpel.evaluate import Reference, evaluate, final_hidden
from layerscalpel.heal import HEALERS
from layerscalpel.layers import Decoder
from layerscalpel.probe import find_layers
from layerscalpel.segment import Segment


def quality(folder: Path, blocks, reference: Reference, device: str) -> dict:
    model, _, _ = load_decoder(str(folder), device=device, dtype="float32")
    return evaluate(find_layers(model), blocks, reference, batch_size=16).to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True)
    parser.add_argument("--instructions", required=True)
    parser.add_argument("--segment", default="13:19")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--objectives", default="ce")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True, type=Path)
    given = parser.parse_args()
    exact_parent, tokenizer, origin = load_decoder(given.model, device=given.device, dtype="float32")
    config = build_config(
        [
            {
                "data.calibration": given.text,
                "data.evaluation": given.text,
                "data.healing": given.instructions,
                "data.evaluation_blocks": 256,
                "heal.epochs": 2,
                "heal.lr": 5e-4,
                "heal.micro_batch_size": 16,
            }
        ]
    )
    decoder = find_layers(exact_parent)
    start, stop = map(int, given.segment.split(":"))
    segment = Segment(start, stop, len(decoder))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows: list[dict] = [{"device": name, "torch": torch.__version__, "model": given.model, "segment": given.segment}]

    def keep(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    held_out = prepare_blocks(tokenizer, config.data, num_calibration=32, seed=0, heal=False).evaluation
    reference = Reference(decoder, final_hidden(decoder, held_out.tokens, batch_size=16, label="parent"))
    keep({"model": "parent", **evaluate(decoder, held_out, None, batch_size=16).to_dict()})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_decoder(cut_model(decoder, segment)[0], tokenizer, folder / "cut", dtype=origin.dtype)
        keep({"model": "cut", **quality(folder / "cut", held_out, reference, given.device)})
        for objective in given.objectives.split(","):
            values = []
            for seed in range(given.seeds):
                recipe = build_config(
                    [{"heal.epochs": 2, "heal.lr": 5e-4, "heal.micro_batch_size": 16, "heal.objective": objective}]
                ).heal
                parts = prepare_blocks(tokenizer, config.data, num_calibration=32, seed=seed)
                student, _, _ = load_decoder(str(folder / "cut"), device=given.device)
                parent: Decoder | None = None
                if objective != "ce":
                    parent = find_layers(load_decoder(given.model, device=given.device).model)
                began = time.perf_counter()
                found = HEALERS["endpoint"].train(
                    find_layers(student),
                    parent,
                    [segment.start],
                    parts.healing,
                    parts.validation,
                    recipe,
                    seed=seed,
                    scratch=folder / "scratch",
                )
                took = time.perf_counter() - began
                target = folder / f"healed-{objective}-{seed}"
                save_decoder(student, tokenizer, target, dtype=origin.dtype)
                figures = quality(target, held_out, reference, given.device)
                values.append(figures["kl_nats"]["value"])
                keep(
                    {
                        "model": "healed",
                        "objective": objective,
                        "seed": seed,
                        "wall_s": took,
                        "steps": found.steps,
                        "best_step": found.best_step,
                        "validation": found.validation,
                        **figures,
                    }
                )
            spread = statistics.stdev(values) if len(values) > 1 else None
            keep({"model": "healed", "objective": objective, "mean_kl_nats": statistics.mean(values), "spread": spread})


if __name__ == "__main__":
    main()
