"""Tensors keep their every byte on the way into new files, and files that are not what they say are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INDEX, SINGLE, names
from families import tiny, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from layerscalpel import shards
from layerscalpel.decoder import load_decoder
from layerscalpel.errors import UserError
from layerscalpel.origin import peek
from layerscalpel.shards import copy_weights, digest, digests, read_weights

FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Every format that safetensors spells, of those that a checkpoint has had so far."""
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
SHARDED = "40KB"
"""Makes eight files of the tiny llama."""


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bytes (a bool has but two), NaN payloads and all."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_by_hand(path: Path, header: Any, body: bytes = b"") -> Path:
    """Write a safetensors file of any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the length of a file's header and what is in it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def files_of(folder: Path) -> list[str]:
    return [name for name in names(folder) if "safetensors" in name]


def same_names(folder: Path) -> dict[str, str]:
    return {name: name for name in read_weights(folder).tensors}


def two_shards(folder: Path, **weight_map: str) -> Path:
    """Write a checkpoint of the tensors a and b in a shard each."""
    save_file({"a": torch.arange(6.0)}, folder / FIRST)
    save_file({"b": torch.arange(4.0)}, folder / SECOND)
    named = {"a": FIRST, "b": SECOND} | weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": named}), encoding="utf-8")
    return folder


def refuse(folder: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_weights(folder)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A checkpoint in eight files."""
    folder = tmp_path_factory.mktemp("sharded")
    tiny("llama").save_pretrained(folder, max_shard_size=SHARDED)
    assert len(files_of(folder)) == 9
    return folder


# ---------------------------------------------------------------------------------------------- copying


def no_kernel_copy(*_: object, **__: object) -> int:
    raise OSError(errno.EXDEV, "another file system")


def short_kernel_copy(source: int, target: int, count: int, offset_src: int) -> int:
    """Copy at most 11 bytes, and nothing of the last ones, as a kernel may."""
    return os.write(target, os.pread(source, min(count, 11), offset_src)) if count > 30 else 0


@pytest.mark.parametrize("copy", [None, no_kernel_copy, short_kernel_copy], ids=["kernel", "buffer", "both"])
def test_a_copy_of_shards_holds_every_tensor_under_its_new_name(sharded, tmp_path, monkeypatch, copy):
    monkeypatch.setattr(shards, "BUFFER_BYTES", 7)
    if copy:
        monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    source = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    kept = [name for name in read_weights(sharded).tensors if ".layers.3." not in name]
    copy = copy_weights(read_weights(sharded), {name: f"new.{name}" for name in kept}, tmp_path)
    assert copy.tensors.keys() == {f"new.{name}" for name in kept}
    found = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        found |= load_file(file)
    assert found.keys() == copy.tensors.keys()
    assert all(torch.equal(found[f"new.{name}"], source[name]) for name in kept)
    assert copy.num_bytes() == sum(raw.numel() * raw.element_size() for raw in found.values())


def test_a_whole_copy_loads_as_the_model(sharded, tmp_path):
    copy_weights(read_weights(sharded), same_names(sharded), tmp_path)
    (tmp_path / "config.json").write_bytes((sharded / "config.json").read_bytes())
    first, second = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (sharded, tmp_path))
    with torch.no_grad():
        assert torch.equal(first(tokens()).logits, second(tokens()).logits)
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    assert index["weight_map"] == json.loads((sharded / INDEX).read_text(encoding="utf-8"))["weight_map"]
    assert index["metadata"]["total_size"] == read_weights(sharded).num_bytes()


def test_one_file_stays_one_file_without_an_index(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt2").save_pretrained(source)
    out.mkdir()
    copy_weights(read_weights(source), same_names(source), out)
    assert names(out) == [SINGLE]
    assert load_file(out / SINGLE).keys() == load_file(source / SINGLE).keys()


def test_shards_that_lose_all_tensors_vanish_and_the_numbering_closes(sharded, tmp_path):
    weights = read_weights(sharded)
    second, fourth = sorted(weights.metadata)[1], sorted(weights.metadata)[3]
    kept = {name: name for name, tensor in weights.tensors.items() if tensor.file.name not in (second, fourth)}
    copy = copy_weights(weights, kept, tmp_path)
    assert files_of(tmp_path) == [*(f"model-{i:05}-of-00006.safetensors" for i in range(1, 7)), INDEX]
    assert list(copy.tensors) == list(kept)  # in the order of the shards they came from
    index = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))
    assert index["weight_map"] == {name: tensor.file.name for name, tensor in copy.tensors.items()}
    assert index["metadata"]["total_size"] == copy.num_bytes() < weights.num_bytes()


def test_all_that_stays_in_one_shard_is_one_plain_file(sharded, tmp_path):
    weights = read_weights(sharded)
    last = sorted(weights.metadata)[-1]
    copy_weights(weights, {n: n for n, tensor in weights.tensors.items() if tensor.file.name == last}, tmp_path)
    assert names(tmp_path) == [SINGLE]


@pytest.mark.parametrize("spelled", FORMATS)
def test_every_format_keeps_its_bytes(tmp_path, spelled):
    (tmp_path / "out").mkdir()
    tensors = {f"t{i}": random_bytes((3, i), FORMATS[spelled], seed=i) for i in range(1, 6)}
    save_file(tensors, tmp_path / SINGLE)
    weights = read_weights(tmp_path)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {spelled}
    copy_weights(weights, {"t5": "x", "t1": "y", "t4": "z"}, tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    for new, old in {"x": "t5", "y": "t1", "z": "t4"}.items():
        assert found[new].dtype == FORMATS[spelled]
        assert found[new].shape == tensors[old].shape
        assert raw_bytes(found[new]) == raw_bytes(tensors[old])


@pytest.mark.parametrize("kept", [["none", "one", "some"], ["none"], ["one"], ["wide", "none"]])
def test_empty_tensors_and_scalars_come_through(tmp_path, kept):
    (tmp_path / "out").mkdir()
    tensors = {
        "none": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
        "some": torch.arange(5, dtype=torch.int16),
        "wide": torch.zeros(2, 0, 3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / SINGLE)
    copy = copy_weights(read_weights(tmp_path), {name: name for name in kept}, tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)
    assert found.keys() == set(kept)
    assert all(torch.equal(found[name], tensors[name]) for name in kept)
    assert {name: tensor.shape for name, tensor in copy.tensors.items()} == {n: tuple(tensors[n].shape) for n in kept}


def test_the_words_of_a_header_are_kept(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE, metadata={"format": "pt", "quantised_by": "somebody"})
    copy_weights(read_weights(tmp_path), {"a": "b"}, tmp_path / "out")
    with safe_open(tmp_path / "out" / SINGLE, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt", "quantised_by": "somebody"}


def test_a_header_without_words_gets_the_format_that_transformers_asks_for(tmp_path):
    (tmp_path / "out").mkdir()
    write_by_hand(tmp_path / SINGLE, {"a": entry(0, 4)}, b"1234")
    copy_weights(read_weights(tmp_path), {"a": "a"}, tmp_path / "out")
    with safe_open(tmp_path / "out" / SINGLE, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["a", "ab", "abc", "a longer name", "ä"])
def test_tensors_begin_at_a_multiple_of_8(tmp_path, name):
    (tmp_path / "out").mkdir()
    write_by_hand(tmp_path / SINGLE, {"t": entry(0, 3)}, b"123")  # whose own header is not aligned
    copy_weights(read_weights(tmp_path), {"t": name}, tmp_path / "out")
    assert header_of(tmp_path / "out" / SINGLE)[0] % 8 == 0
    assert bytes(load_file(tmp_path / "out" / SINGLE)[name].tolist()) == b"123"


@contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Within, a file cannot grow past `num_bytes`: a raw write stops in the middle, as on a disk that gets full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("copy", [None, no_kernel_copy], ids=["kernel", "buffer"])
def test_a_write_that_stops_in_the_middle_is_an_error(tmp_path, monkeypatch, copy):
    (tmp_path / "out").mkdir()
    if copy:
        monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    save_file({"a": torch.ones(5000)}, tmp_path / SINGLE)
    with pytest.raises(OSError, match="File too large"), file_limit(8000):
        copy_weights(read_weights(tmp_path), {"a": "a"}, tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "out").mkdir()
    save_file({"a": torch.ones(5000)}, tmp_path / SINGLE)
    weights = read_weights(tmp_path)
    os.truncate(tmp_path / SINGLE, 10000)
    with pytest.raises(UserError, match="ends too early - it was changed while it was read"):
        copy_weights(weights, {"a": "a"}, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- digests


def test_a_digest_is_of_format_shape_and_bytes(tmp_path):
    plain = random_bytes((2, 6), torch.bfloat16)
    flipped = plain.clone()
    flipped.view(torch.uint8)[1, 5] ^= 1
    tensors = {
        "plain": plain,
        "same": plain.clone(),
        "flipped": flipped,
        "other format": plain.clone().view(torch.float16),
        "other shape": plain.clone().view(6, 2),
    }
    save_file(tensors, tmp_path / SINGLE)
    stored = read_weights(tmp_path).tensors
    found = {name: digest(tensor) for name, tensor in stored.items()}
    assert found["same"] == found["plain"]
    assert len(set(found.values())) == 4
    assert digests(stored.values()) == list(found.values())
    assert found["plain"] == hashlib.sha256(b"BF16 (2, 6) " + raw_bytes(plain)).hexdigest()


@pytest.mark.parametrize("buffer", [1, 5, 24])
def test_a_digest_does_not_depend_on_the_buffer(tmp_path, monkeypatch, buffer):
    save_file({"a": random_bytes((4, 6), torch.int8), "none": torch.zeros(0)}, tmp_path / SINGLE)
    stored = read_weights(tmp_path).tensors.values()
    expected = digests(stored)
    monkeypatch.setattr(shards, "BUFFER_BYTES", buffer)
    assert digests(stored) == expected


# ---------------------------------------------------------------------------------------------- bad files


def test_a_shard_that_is_not_there_is_named(tmp_path):
    two_shards(tmp_path, b="model-00003-of-00002.safetensors")
    refuse(tmp_path, r"shard model-00003-of-00002\.safetensors named in model\.safetensors\.index\.json is missing")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/abs.safetensors", "a/b.safetensors", "..", ".", "", 7, None])
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    inner = two_shards_in(tmp_path / "inner", shard)
    refuse(inner, r"index .* names a shard outside its folder: .* - do not use this checkpoint")


def two_shards_in(folder: Path, shard: Any) -> Path:
    """Write the two shards where a wrong name would find a file outside of the folder, too."""
    (folder / "a").mkdir(parents=True)
    save_file({"b": torch.arange(4.0)}, folder.parent / "x.safetensors")
    save_file({"b": torch.arange(4.0)}, folder / "a" / "b.safetensors")
    return two_shards(folder, b=shard)


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": ["x"]}}', b"\xff\xfe"],
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    two_shards(tmp_path)
    (tmp_path / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(tmp_path, r"index .*model\.safetensors\.index\.json cannot be read: .* - fetch it again")


def test_a_tensor_named_twice_in_an_index_is_refused(tmp_path):
    two_shards(tmp_path)
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}', encoding="utf-8")
    refuse(tmp_path, r"index .* cannot be read: a stands in it twice - fetch it again")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    two_shards(tmp_path)
    save_file({"b": torch.arange(4.0), "a": torch.ones(6)}, tmp_path / SECOND)
    refuse(
        tmp_path, r"tensor a is in model-00001-of-00002\.safetensors and in model-00002-of-00002\.safetensors - keep"
    )


@pytest.mark.parametrize(
    ("weight_map", "about"),
    [
        ({"c": FIRST}, r"1 tensors \(c, "),  # named, stored nowhere
        ({"a": SECOND}, r"1 tensors \(a, "),  # stored in a shard that is not named
        ({"a": SECOND, "b": FIRST}, r"2 tensors \(a, "),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, weight_map, about):
    two_shards(tmp_path, **weight_map)
    refuse(tmp_path, rf"index .* disagrees with its shards about {about}\.\.\.\) - fetch the checkpoint again")


def test_a_tensor_that_no_index_names_is_refused(tmp_path):
    two_shards(tmp_path)
    save_file({"a": torch.arange(6.0), "extra": torch.ones(2)}, tmp_path / FIRST)
    refuse(tmp_path, r"index .* disagrees with its shards about 1 tensors \(extra, ")


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    save_file({"a": torch.arange(6.0)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:kept])
    refuse(tmp_path, r"file .*model\.safetensors is truncated or damaged \(.*\) - fetch it again")


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"no JSON at all", b""),
        (b'{"a": ', b""),
        (b"\xff\xfe\xfd", b""),
        ([], b""),
        ({"a": 3}, b""),
        ({"a": entry(0, 4)}, b"123"),  # past the end
        ({"a": entry(0, 4)}, b"12345"),  # more than is named
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),  # overlapping
        ({"a": entry(0, 2), "b": entry(4, 6)}, b"123456"),  # a hole
        ({"a": entry(0, 4, shape=[5])}, b"1234"),
        ({"a": entry(0, 4, dtype="F31")}, b"1234"),
    ],
)
def test_a_header_of_nonsense_is_refused(tmp_path, header, body):
    write_by_hand(tmp_path / SINGLE, header, body)
    refuse(tmp_path, r"file .*model\.safetensors is truncated or damaged \(.*\) - fetch it again")


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    one = json.dumps(entry(0, 2))
    write_by_hand(tmp_path / SINGLE, f'{{"a": {one}, "a": {one}}}'.encode(), b"12")
    refuse(tmp_path, r"file .*model\.safetensors (has a damaged header: a stands in it twice|is truncated or damaged)")


def test_a_folder_without_weights_is_refused(tmp_path):
    refuse(tmp_path, r"holds no model\.safetensors and no model\.safetensors\.index\.json - give a Hugging Face")


def test_one_file_beside_an_index_is_what_counts(tmp_path):
    """As transformers has it."""
    two_shards(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / SINGLE)
    assert list(read_weights(tmp_path).tensors) == ["c"]


# ---------------------------------------------------------------------------------------------- pickles


class Malicious:
    """Pickled, it creates a file when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def pickled(folder: Path, extra: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint whose weights are pickled."""
    model = tiny("llama")
    model.save_pretrained(folder)
    (folder / SINGLE).unlink()
    torch.save(model.state_dict() | (extra or {}), folder / "pytorch_model.bin")
    return folder


def test_pickled_weights_need_a_permission(tmp_path):
    refuse(pickled(tmp_path), r"holds only pickled weights \(\.bin\), which can run code - pass --allow-pickle to load")
    with pytest.raises(UserError, match="--allow-pickle"):
        peek(str(tmp_path))
    with pytest.raises(UserError, match="--allow-pickle"):
        load_decoder(str(tmp_path))


def test_pickled_weights_load_with_the_permission(tmp_path):
    loaded = load_decoder(str(pickled(tmp_path)), allow_pickle=True)
    assert loaded.origin.pickled
    expected = tiny("llama").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_pickled_code_is_not_run_even_with_the_permission(tmp_path):
    marker = tmp_path / "marker"
    pickled(tmp_path, {"model.evil": Malicious(marker)})
    with pytest.raises(UserError, match=r"cannot be loaded: its pickled weights are damaged or hold more than tensors"):
        load_decoder(str(tmp_path), allow_pickle=True)
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # so the file was one that does run


@pytest.mark.parametrize("kept", [0, 30, 1000, -100])
def test_truncated_pickles_are_refused(tmp_path, kept):
    path = pickled(tmp_path) / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="its pickled weights are damaged or hold more than tensors - do not use them"):
        load_decoder(str(tmp_path), allow_pickle=True)


def test_the_permission_changes_nothing_where_there_are_safetensors(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    assert not load_decoder(str(tmp_path), allow_pickle=True).origin.pickled
    assert not (tmp_path / "marker").exists()
