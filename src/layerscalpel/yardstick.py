"""Measure a model that was not cut beside the runs: is a cut model better than a smaller one of the same size?

It reads the same held-out text and the same tasks. KL, agreement and the ratio of perplexities need the same tokens:
with another tokenizer they are left out, and KL too where the sizes of the vocabularies differ. Its speed is not
measured.

    group, notes = measure_baseline("Qwen/Qwen2.5-0.5B", groups, Path("runs/compared"))
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from layerscalpel import evaluate as quality
from layerscalpel.alike import signatures_of
from layerscalpel.byblock import BlockResult, by_block, save_blocks, token_identity
from layerscalpel.card import shown_name
from layerscalpel.data import TokenBlocks, prepare_blocks
from layerscalpel.decoder import Loaded, choose_device, load_decoder, num_parameters, stored_bytes
from layerscalpel.distances import distances
from layerscalpel.errors import UserError
from layerscalpel.exam import prepare_exam, require_tasks
from layerscalpel.fingerprint import made_with
from layerscalpel.gather import BASELINE, STAGE_OF, Group, Run
from layerscalpel.inputs import file_identity, task_identities
from layerscalpel.layers import Decoder
from layerscalpel.losses import block_mean, exp_of
from layerscalpel.origin import peek
from layerscalpel.probe import find_layers
from layerscalpel.progress import say, waiting
from layerscalpel.retention import retentions
from layerscalpel.rundir import read_json, write_json
from layerscalpel.settings import Config
from layerscalpel.tasknames import words_of

LIKE = 0.1
"""Difference of parameters, as a share, up to which sizes count as the same."""


class Yardstick:
    """A baseline, loaded when it is first needed."""

    def __init__(self, name: str, run: Run) -> None:
        """Take a model's name and a run that says how models compute."""
        self.name, self.model = name, made_with(run.path).model
        self.origin = peek(name, **self.model.permissions())
        self._loaded: dict[str, Loaded] = {}

    def load(self, name: str) -> Loaded:
        """Load it, or the parent, once."""
        if name not in self._loaded:
            how = {"device": self.model.device, "dtype": self.model.dtype, **self.model.permissions()}
            with waiting(f"loading {name}"):
                self._loaded[name] = load_decoder(name, **how)
        return self._loaded[name]


def measure_baseline(name: str, groups: Sequence[Group], out: Path) -> tuple[Group, list[str]]:
    """Measure a model on the text of every seed, and on the tasks, of runs with the first group's parent.

    Args:
        name: hub id, checkpoint folder, .gguf file, or demo.
        groups: of runs.
        out: what is measured is kept in OUT/baseline, and not measured again.

    Raises:
        UserError: there is no such model, or nothing of it compares.
    """
    first = groups[0].first
    runs: dict[int, Run] = {}
    for run in (run for group in groups for run in group.runs.values() if run.parent == first.parent):
        runs.setdefault(run.seed, run)
    yardstick, found, notes = Yardstick(name, first), {}, []
    require_tasks(made_with(first.path).evaluate, yardstick.origin.max_tokens)
    short, earlier = shown_name(name), None
    for seed, run in sorted(runs.items()):
        folder = out / BASELINE / f"{Path(short).name}-seed{seed}"
        results = _kept_or_measured(yardstick, run, folder, earlier)
        earlier = earlier or folder / "evaluate"
        found[seed] = Run(folder, results, run.settings)
        notes += [f"{short} {note}" for note in results["notes"]]
    group = Group(short, BASELINE, found)
    return group, list(dict.fromkeys([*notes, *_size_notes(short, group, first)]))


def _size_notes(name: str, group: Group, run: Run) -> list[str]:
    own = group.first.results["model"]["parameters"]
    other = run.results[STAGE_OF[run.models[-1]]]["parameters"]
    if abs(own / other - 1) <= LIKE:
        return []
    return [f"{name} has {own:,} parameters and {run.path} {other:,}: the sizes are not the same"]


def _kept_or_measured(yardstick: Yardstick, run: Run, folder: Path, earlier: Path | None) -> dict[str, Any]:
    key = key_of(yardstick, run)
    if (folder / "results.json").exists() and read_json(folder / "results.json").get("key") == key:
        say(f"{folder} is finished")
        return read_json(folder / "results.json")
    loaded = yardstick.load(yardstick.name)
    found, notes = _on_text(yardstick, run, folder / "evaluate")
    exam_found, summary = _on_tasks(loaded, yardstick, run, folder / "evaluate", earlier)
    sizes = {"name": yardstick.name, "parameters": num_parameters(loaded.model)}
    results = {
        "key": key,
        "parent": run.results["parent"],
        "model": sizes | {"bytes": stored_bytes(loaded.model, loaded.origin)},
        "data": {"evaluation": {"sha256": run.text}},
        "evaluate": {BASELINE: found | exam_found, **summary},
        "notes": notes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    return results


def key_of(yardstick: Yardstick, run: Run) -> list[Any]:
    """Return what a baseline's figures depend on, as JSON gives it back."""
    config = made_with(run.path)
    computes = replace(config.model, device=str(choose_device(config.model.device)))
    models = [file_identity(name) for name in (yardstick.origin.place, run.parent[0])]
    tasks = [task_identities(config.evaluate.tasks), signatures_of(run)]
    return json.loads(json.dumps([models, run.text, asdict(computes), asdict(config.evaluate), tasks]))


def _on_text(yardstick: Yardstick, run: Run, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the figures on held-out text, and what was left out."""
    config, loaded, kept = made_with(run.path), yardstick.load(yardstick.name), run.blocks("parent")
    if kept is None:
        raise UserError(f"{run.path} has no figures by block - measure it anew: scalpel evaluate {run.path}")
    if token_identity(loaded.tokenizer) != kept.tokenizer:
        if not words_of(config.evaluate.tasks):
            raise UserError(
                f"the tokenizer of {yardstick.name} differs from that of the runs, and they measured no tasks, so"
                " nothing compares - allowed: a baseline with their tokenizer, or runs evaluated with --tasks"
            )
        left_out = "KL, agreement and perplexity are by token and left out"
        return {}, [f"has another tokenizer than the runs: {left_out}"]
    blocks = prepare_blocks(loaded.tokenizer, config.data, num_calibration=0, seed=run.seed, heal=False).evaluation
    if blocks.summary()["sha256"] != run.text:
        raise UserError(
            f"the held-out text of {run.path} has changed since it was measured - measure it anew:"
            f" scalpel evaluate {run.path}"
        )
    return _against_parent(yardstick, config, blocks, kept, folder)


def _against_parent(
    yardstick: Yardstick, config: Config, blocks: TokenBlocks, kept: BlockResult, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    decoder, size = find_layers(yardstick.load(yardstick.name).model), config.evaluate.batch_size
    reference, why = _reference(yardstick, config, blocks, decoder)
    figures = quality.token_figures(decoder, blocks, reference, batch_size=size, label=f"evaluating {yardstick.name}")
    save = partial(by_block, text=kept.text, tokenizer=kept.tokenizer)
    save_blocks(folder, BASELINE, save(figures))
    found = distances(figures, blocks.domains)
    if reference is None:
        ratio = exp_of(block_mean(save(figures).nll_N - kept.nll_N, kept.labelled_N))
        found["ppl_ratio"] = ratio.to_dict()
    return found, [f"{why}: KL and agreement are left out"] if why else []


def _reference(
    yardstick: Yardstick, config: Config, blocks: TokenBlocks, decoder: Decoder
) -> tuple[quality.Reference | None, str | None]:
    """Return the parent's side of a KL, or why there is none."""
    if config.model.offload != "none":
        return None, "cannot be loaded beside a parent that does not fit into memory"
    parent = find_layers(yardstick.load(config.model.name).model)
    if parent.vocab_size != decoder.vocab_size:
        return None, f"gives probabilities of {decoder.vocab_size:,} tokens and the parent of {parent.vocab_size:,}"
    final = quality.final_hidden(parent, blocks.tokens, batch_size=config.evaluate.batch_size, label="parent")
    return quality.Reference(parent, final), None


def _on_tasks(
    loaded: Loaded, yardstick: Yardstick, run: Run, folder: Path, earlier: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the scores with what they are of the parent's, and how they were measured."""
    settings, parent = made_with(run.path).evaluate, run.items("parent")
    exam = prepare_exam(settings, loaded.tokenizer, folder, device=loaded.model.device, earlier=earlier)
    found = exam.measure(BASELINE, loaded.model, file_identity(yardstick.origin.place))
    if found and parent:
        found["retention"] = retentions(parent, exam.results[BASELINE], seed=run.seed).to_dict()
    return found, exam.summary()
