"""What the stages of a run share: the models and the text.

bench = Workbench(config, folder, ["search", "cut"])
bench.decoder, bench.parts.calibration
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from layerscalpel import aside, parallel
from layerscalpel.answerfile import AnswerFile
from layerscalpel.answers import Answering, write_answers
from layerscalpel.checks import reads_healing
from layerscalpel.data import Parts, prepare_blocks
from layerscalpel.decoder import Loaded, choose_device, choose_dtype, load_decoder
from layerscalpel.draw import Answer
from layerscalpel.errors import UserError
from layerscalpel.exam import Exam, prepare_exam
from layerscalpel.forms import Record
from layerscalpel.forwards import moved
from layerscalpel.inputs import file_identity
from layerscalpel.judge import Judge
from layerscalpel.layers import Decoder, device_of, num_layers_of
from layerscalpel.longtext import LongCheck, prepare_check
from layerscalpel.memory import free_bytes
from layerscalpel.offload import offloaded_decoder
from layerscalpel.origin import Origin, peek, read_config, skeleton
from layerscalpel.places import Place, spares_device
from layerscalpel.plan import plan_cut
from layerscalpel.probe import find_layers
from layerscalpel.progress import waiting
from layerscalpel.records import SELF
from layerscalpel.rundir import read_json
from layerscalpel.search import uses_gate
from layerscalpel.segment import Segment, segments_of
from layerscalpel.selftext import sample_blocks
from layerscalpel.settings import Config
from layerscalpel.store import StreamStore
from layerscalpel.streams import Removal

PLACES = {"cpu": "in host memory", "disk": "on disk"}


class Workbench:
    """What the stages of one run share, loaded when first needed."""

    def __init__(self, config: Config, path: Path, wanted: list[str], known: Path | None = None) -> None:
        self.config, self.path, self.wanted = config, path, wanted
        self.known = known
        """Another run of the same parent: what tasks gave there is not measured again."""
        self.together = False
        """Whether the other processes, if there are any, do the same now."""
        self._let_go = False
        self._open = contextlib.ExitStack()
        self._checked: dict[Removal, str | None] = {}

    def close(self) -> None:
        """Remove what waits in files."""
        self._open.close()

    def call(self, stage: str, *given: Any) -> None:
        """Have the other processes, if there are any, begin a stage with this one; they get the text for healing."""
        if parallel.world() > 1:
            heals = stage == "heal" and self.config.heal.method != "none"
            parallel.first_says((stage, given, self.parts if heals else None))
            self.together = True

    def called(self) -> tuple[str, tuple[Any, ...]] | None:
        """Wait until rank 0 begins a stage that all do, and return it with what it is given; None at the end."""
        told = parallel.first_says(None)
        if told is None:
            return None
        stage, given, parts = told
        if parts is not None:
            vars(self)["parts"] = parts
        self.together = True
        return stage, given

    def let_go(self) -> None:
        """Tell the other processes that there is nothing more to do; not amid a stage, in which they do not listen."""
        if parallel.world() > 1 and not self.together and not self._let_go:
            self._let_go = True
            parallel.first_says(None)

    def load(self, name: str, *, in_host_memory: bool = False) -> Loaded:
        """Load a model as the run's settings say, or into host memory in the number format that they say."""
        model = self.config.model
        device, dtype = model.device, model.dtype
        if in_host_memory:
            stored = peek(name, **model.permissions()).dtype
            dtype, device = str(choose_dtype(dtype, choose_device(device), stored)).removeprefix("torch."), "cpu"
        with waiting(f"loading {name}"):
            return load_decoder(name, device=device, dtype=dtype, packed=model.packed, **model.permissions())

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

    @contextlib.contextmanager
    def parent_aside(self) -> Iterator[None]:
        """Within, the uncut model waits in host memory, if it is loaded: the device has room for another."""
        loaded = "_parent" in vars(self) and self.decoder.resident is None
        with moved([self.parent.model] if loaded else [], torch.device("cpu")):
            yield

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
                answer=self.answer() if heals else None,
            )
        if not sampled or not self._reads_calibration():
            return parts
        sizes = {"num_blocks": num_blocks, "block_tokens": self.config.data.block_tokens}
        model, tokenizer = self.parent.model, self.parent.tokenizer
        mine = None if parallel.rank() else sample_blocks(model, tokenizer, seed=self.config.seed, **sizes)
        return replace(parts, calibration=parallel.first_says(mine) if self.together else mine)

    def _reads_calibration(self) -> bool:
        """Tell whether a stage that is not finished reads calibration text."""
        settings = self.config.quantize
        last = "stitch" if settings.method == "none" else "evaluate" if settings.beside else "quantize"
        return not (self.path / last / "done.json").exists()

    def long_check(self) -> LongCheck:
        """Draw the long texts of the run and return the check on them."""
        settings, stated = self.config.evaluate, self.origin.max_tokens
        return prepare_check(
            self.parts, asked=settings.context_tokens, stated=stated, num_blocks=settings.long_blocks, store=self.store
        )

    @property
    def judged_by(self) -> Literal["calibration", "validation"]:
        """The text that healing is judged by; what the parent samples of itself is not there in every call."""
        return "validation" if self.config.data.calibration == SELF else "calibration"

    def exam(self, folder: Path) -> Exam:
        """Return what measures the tasks of the settings and keeps the results in a folder."""
        device, earlier = choose_device(self.config.model.device), self.path / f"{aside.MARK}{folder.name}"
        if self.known and not earlier.exists():
            earlier = self.known / folder.name
        return prepare_exam(self.config.evaluate, self.parent.tokenizer, folder, device=device, earlier=earlier)

    def identity(self, stage: str | None = None) -> str:
        """Return what tells the checkpoint of a stage, or the parent, from another of that name; and its tokenizer."""
        return file_identity(self.origin.place) if stage is None else self.identity_of(self.path / stage / "model")

    def identity_of(self, folder: Path) -> str:
        """Return what tells a checkpoint made from the parent from another of that name; and its tokenizer."""
        return f"{file_identity(str(folder))}|{file_identity(self.origin.place)}"

    def result_of(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage found."""
        return read_json(self.path / stage / "done.json")["result"]

    def judge(self) -> Judge:
        """Return what tells whether healing brought the cut model nearer to its parent."""
        blocks, settings = getattr(self.parts, self.judged_by), self.config
        place = Place(choose_device(settings.model.device), frozen="cpu" if spares_device(settings.heal) else "device")
        size = settings.evaluate.batch_size
        few = blocks.first(settings.search.num_blocks)
        return Judge.of(self.decoder, few, place, batch_size=size, store=self.store)

    def answer(self) -> Answer | None:
        """Return what writes the answers of healing conversations, or None where the data does."""
        data = self.config.data
        if data.answers == "given":
            return None
        answering = Answering(data.answers, data.answer_tokens, data.healing_block_tokens, self.config.seed)
        kept = AnswerFile(self.path / "search" / "answers.jsonl")  # not in heal/, which begins empty
        model, tokenizer = self.parent.model, self.parent.tokenizer

        def answer(records: list[Record]) -> list[Record]:
            mine = [] if parallel.rank() else write_answers(model, tokenizer, records, answering, kept)
            return parallel.first_says(mine) if self.together else mine

        return answer

    def child(self, *stages: str, in_host_memory: bool = False) -> Decoder:
        """Load the checkpoint of the first of these stages that wrote one."""
        return find_layers(self.load(str(self.child_folder(*stages)), in_host_memory=in_host_memory).model)

    def child_folder(self, *stages: str) -> Path:
        """Return the folder of the first of these stages' checkpoints that exists."""
        for stage in stages:
            if (folder := self.path / stage / "model").is_dir():
                return folder
        raise UserError(f"{self.path} has no checkpoint of {' or '.join(stages)} any more - use --redo cut")


def _refusal(bare: PreTrainedModel, segments: Sequence[Segment]) -> str | None:
    """Plan cuts one after the other, the last runs first, so that those before keep their numbers."""
    for segment in reversed(segments):
        try:
            bare = plan_cut(bare, replace(segment, num_layers=num_layers_of(bare.config))).cut
        except UserError as error:
            return str(error)
    return None
