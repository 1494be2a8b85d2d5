"""A store is a dict, whatever the tiers its tensors lie in; no tier takes more than it may; nothing stays behind."""

from __future__ import annotations

import errno
import os
import random
import resource
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from layerscalpel import store as module
from layerscalpel.errors import UserError
from layerscalpel.store import StreamStore

CPU = torch.device("cpu")
SHAPES = [((2, 3, 8), torch.bfloat16), ((1, 3, 8), torch.bfloat16), ((4, 5), torch.float32), ((7,), torch.float16)]
SHAPES += [((2, 2, 16), torch.float32), ((3, 0), torch.float32)]
KEYS = [("parent", i) for i in range(9)] + [(0, tuple(range(i))) for i in range(4)] + list(range(9))
MOST = len(KEYS) * sum({torch.empty(shape, dtype=dtype).nbytes for shape, dtype in SHAPES})
"""Bytes of a file in which every key once had every size."""


def random_tensor(draw: random.Random) -> torch.Tensor:
    """Return a tensor of random bytes, NaN payloads and all; sometimes a view of a larger one."""
    shape, dtype = draw.choice(SHAPES)
    number = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.tensor(draw.choices(range(256), k=number), dtype=torch.uint8).view(dtype).reshape(shape)
    how = draw.randrange(3)
    if how == 0:
        return torch.stack([torch.zeros_like(raw), raw])[1]
    return raw.transpose(0, -1).contiguous().transpose(0, -1) if how == 1 else raw


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in format, shape and every bit."""
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def open_store(folder: Path, device_bytes: int = 0, host_bytes: int = 0) -> StreamStore:
    return StreamStore(CPU, device_bytes=device_bytes, host_bytes=host_bytes, folder=folder)


@pytest.fixture
def apart(monkeypatch) -> None:
    """Have the CPU taken for a device with memory of its own."""
    monkeypatch.setattr(module, "_has_own_memory", lambda _device: True)


@contextmanager
def file_limit(num_bytes: int):
    """Within, a file cannot grow past `num_bytes`, as on a disk that gets full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def check_against_a_dict(store: StreamStore, limits: tuple[int, int], draw: random.Random) -> set[str]:
    """Do 400 random things to a store and a dict; return the tiers that held something."""
    known: dict = {}
    seen = set()
    for _ in range(400):
        key = draw.choice(KEYS)
        what = draw.random()
        if what < 0.6:
            store[key] = known[key] = random_tensor(draw)
        elif what < 0.8 and key in known:
            assert same(store.pop(key), known.pop(key))
        else:
            assert (key in store) == (key in known)
            if key in known:
                assert same(store[key], known[key])
        used = {"device": store.device_used, "host": store.host_used, "file": store.file_used}
        seen |= {tier for tier, num_bytes in used.items() if num_bytes}
        assert sum(used.values()) == sum(tensor.nbytes for tensor in known.values())
        assert (used["device"] <= limits[0], used["host"] <= limits[1]) == (True, True)
        assert used["file"] <= store.file_peak <= MOST
    assert list(store) == list(known)
    assert all(same(store[key], known[key]) for key in known)
    with pytest.raises(KeyError):
        _ = store["never put"]
    return seen


@pytest.mark.parametrize(
    ("limits", "tiers"),
    [
        ((0, 0), {"file"}),
        ((0, 1 << 20), {"host"}),
        ((1 << 20, 0), {"device"}),
        ((600, 600), {"device", "host", "file"}),
        ((0, 700), {"host", "file"}),
        ((700, 0), {"device", "file"}),
        ((600, 1 << 20), {"device", "host"}),
    ],
)
def test_a_store_is_a_dict_in_every_mix_of_tiers(tmp_path, apart, limits, tiers):
    with open_store(tmp_path, *limits) as store:
        assert check_against_a_dict(store, limits, random.Random(0)) == tiers
        store.clear()
        assert (len(store), store.device_used, store.host_used, store.file_used) == (0, 0, 0, 0)


@pytest.mark.parametrize(("host_bytes", "tiers"), [(0, {"file"}), (600, {"host", "file"}), (1 << 20, {"host"})])
def test_on_a_cpu_there_is_no_device_tier(tmp_path, host_bytes, tiers):
    with open_store(tmp_path, 1 << 30, host_bytes) as store:
        assert check_against_a_dict(store, (0, host_bytes), random.Random(1)) == tiers


def test_what_lies_in_the_same_memory_is_not_copied_but_a_view_does_not_keep_the_rest_alive(tmp_path):
    whole, large = torch.randn(4, 8), torch.randn(10, 4, 8)
    with open_store(tmp_path, host_bytes=1 << 20) as store:
        store["whole"], store["view"] = whole, large[3]
        assert store["whole"].data_ptr() == whole.data_ptr()
        assert store["view"].untyped_storage().nbytes() == store["view"].nbytes
        assert torch.equal(store["view"], large[3])


def test_a_freed_place_goes_to_the_best_tier_with_room(tmp_path, apart):
    state = torch.randn(8)
    with open_store(tmp_path, device_bytes=32, host_bytes=32) as store:
        for key in "abc":
            store[key] = state + ord(key)
        assert (store.device_used, store.host_used, store.file_used) == (32, 32, 32)
        del store["a"]
        store["d"] = state
        assert (store.device_used, store.host_used, store.file_used) == (32, 32, 32)
        store["c"] = store["c"] * 2  # its own place in the file is free again
        assert (store.file_used, store.file_peak) == (32, 32)
        assert torch.equal(store["c"], (state + ord("c")) * 2)


def test_places_in_the_file_are_used_again(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with open_store(tmp_path) as store:
        for turn in range(20):
            for key in range(6):
                store[key] = torch.randn(64, generator=generator)
            if turn % 2:
                del store[turn % 6]
        assert store.file_peak == 6 * 256
        store.clear()
        store["of another size"] = torch.zeros(100)  # an empty file begins anew
        assert store.file_peak == 6 * 256
        assert os.fstat(store._file.file.fileno()).st_size == 400


def test_host_buffers_are_used_again_and_stay_within_the_limit(tmp_path, apart, monkeypatch):
    made = []
    monkeypatch.setattr(module, "host_buffer", lambda n, _device: made.append(n) or torch.empty(n, dtype=torch.uint8))
    with open_store(tmp_path, host_bytes=1000) as store:
        for _ in range(10):
            for key in range(3):
                store[key] = torch.randn(50)
        assert made == [200, 200, 200]
        store.clear()
        for key in range(10):  # buffers of 200 bytes make room for others
            store[key] = torch.full((25,), float(key))
            assert store._host.taken <= 1000
        assert (store.host_used, store.file_used) == (1000, 0)
        assert all(torch.equal(store[key], torch.full((25,), float(key))) for key in range(10))


@pytest.mark.parametrize("fails", [False, True])
def test_the_file_is_gone_afterwards(tmp_path, fails):
    folder = tmp_path / "made" / "here"
    try:
        with open_store(folder) as store:
            store["a"] = torch.randn(1000)
            assert any(str(folder) in os.readlink(f"/proc/self/fd/{fd}") for fd in open_files())
            assert fails is False or 1 / 0
    except ZeroDivisionError:
        assert fails
    assert list(folder.iterdir()) == []
    assert not any(str(folder) in os.readlink(f"/proc/self/fd/{fd}") for fd in open_files())


def open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


def test_a_store_that_needs_no_file_makes_none(tmp_path):
    with open_store(tmp_path / "never", host_bytes=1 << 20) as store:
        store["a"] = torch.randn(1000)
        assert store.file_peak == 0
    assert not (tmp_path / "never").exists()


def cannot_reserve(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "not on this file system")


@pytest.mark.parametrize("reserve", ["yes", "no"])
def test_a_full_disk_is_told_with_sizes_and_costs_only_the_tensor_that_was_put(tmp_path, monkeypatch, reserve):
    if reserve == "no":
        monkeypatch.setattr(os, "posix_fallocate", cannot_reserve)
    first = torch.randn(1 << 18)
    with open_store(tmp_path) as store:
        store["a"] = first
        store["b"] = torch.zeros(3)
        with file_limit(1 << 20):
            for _ in range(2):
                with pytest.raises(UserError, match=r"no space left .*: 2\.0 MiB needed beside 1\.0 in its file, .* -"):
                    store["b"] = torch.randn(1 << 19)
        assert list(store) == ["a"]
        assert torch.equal(store["a"], first)
        store["b"] = first + 1
        assert torch.equal(store["b"], first + 1)


def test_other_errors_of_a_disk_pass_through(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with open_store(tmp_path / "file") as store, pytest.raises(FileExistsError):
        store["a"] = torch.zeros(3)


def test_the_file_is_no_memory_of_the_process(tmp_path):
    state = torch.randn(1 << 18)
    process = psutil.Process()
    with open_store(tmp_path) as store:
        store["first"] = state
        before = process.memory_info().rss
        for key in range(60):
            store[key] = state
            assert torch.equal(store[key], state)
        assert store.file_used == 61 << 20
        assert process.memory_info().rss - before < 20 << 20


@pytest.mark.gpu
def test_states_come_back_from_all_tiers_of_a_gpu_while_it_computes(tmp_path):
    device = torch.device("cuda")
    with StreamStore(device, device_bytes=40 << 20, host_bytes=40 << 20, folder=tmp_path) as store:
        expected = {key: torch.randn(4, 1000, 1000, device=device).bfloat16() for key in range(15)}  # 8 MB each
        store.update(expected)
        assert min(store.device_used, store.host_used, store.file_used) > 0
        for _ in range(5):
            for key in range(15):
                expected[key] = (expected[key] @ expected[key]).clamp(-2, 2)
                store[key] = (store[key] @ store[key]).clamp(-2, 2)
        assert all(torch.equal(store[key], expected[key]) for key in expected)
        assert store._host.taken <= 40 << 20
        assert store.file_peak == store.file_used
