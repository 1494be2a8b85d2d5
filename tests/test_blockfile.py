"""Records of blocks come back bit for bit, stay within their bound, and outlive the process that wrote them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from test_store import file_limit
from torch import Tensor

from layerscalpel.blockfile import ALIGNED, BlockFile, Part
from layerscalpel.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8)
ROWS = (3, 0, 1, 5, 2, 7)


def some(part: Part, blocks: range, seed: int) -> Tensor:
    """Return random matrices of these blocks, one below the other."""
    torch.manual_seed(seed)
    count = sum(part.rows[block] for block in blocks)
    return torch.randint(0, 100, (count, part.width)).to(part.dtype)


def one_part(path: Path, room: int = 1 << 20, key: str = "k", rows: tuple[int, ...] = ROWS) -> BlockFile:
    return BlockFile(path / "blocks.bin", {"a": Part(rows, 9, torch.float32)}, room=room, key=key)


def filled(path: Path, count: int, key: str = "k") -> tuple[BlockFile, Tensor]:
    """Return an open file whose first blocks are written and noted, and what was written."""
    file = one_part(path, key=key)
    file.open()
    rows = some(file.parts["a"], range(count), seed=1)
    file.write(0, {"a": rows}, count)
    file.note()
    return file, rows


@pytest.mark.parametrize("seed", range(6))
def test_what_was_written_is_read_in_any_order_and_begins_at_aligned_places(seed: int, tmp_path: Path) -> None:
    draw, count = random.Random(seed), 7
    parts = {
        name: Part([draw.choice((0, 1, 2, 5)) for _ in range(count)], draw.randint(1, 9), draw.choice(DTYPES))
        for name in "abc"
    }
    file = BlockFile(tmp_path / "blocks.bin", parts, room=1 << 20, key="")
    file.open()
    rows = {name: some(part, range(count), seed) for name, part in parts.items()}
    low = 0
    while low < count:  # in several turns
        turn = range(low, min(count, low + draw.randint(1, 3)))
        begin = {name: sum(part.rows[:low]) for name, part in parts.items()}
        end = {name: sum(part.rows[: turn.stop]) for name, part in parts.items()}
        file.write(low, {name: rows[name][begin[name] : end[name]] for name in parts}, len(turn))
        low = turn.stop
    order = [draw.randrange(count) for _ in range(10)]
    found = file.read(torch.tensor(order))
    for name, part in parts.items():
        matrices = rows[name].split(list(part.rows))
        assert torch.equal(found[name], torch.cat([matrices[i] for i in order]))
        assert found[name].dtype == part.dtype
        assert all(file._view(name, i).data_ptr() % ALIGNED == 0 for i in range(count) if part.rows[i])


@pytest.mark.parametrize("room", [0, 1, 127, 128, 500, 700, 1 << 20])
def test_as_many_blocks_as_there_is_room_for(room: int, tmp_path: Path) -> None:
    file = one_part(tmp_path, room)
    file.open()
    sizes = [-(-rows * 9 * 4 // ALIGNED) * ALIGNED for rows in ROWS]
    assert file.num_bytes == sum(sizes[: file.num_blocks]) <= room
    assert file.num_blocks == len(ROWS) or file.num_bytes + sizes[file.num_blocks] > room
    on_disk = tmp_path / "blocks.bin"
    assert (on_disk.stat().st_size if on_disk.exists() else 0) == file.num_bytes


def test_without_parts_there_is_nothing_to_keep(tmp_path: Path) -> None:
    file = BlockFile(tmp_path / "blocks.bin", {}, room=1 << 20, key="")
    file.open()
    file.note()
    assert (file.num_blocks, file.read(torch.tensor([0, 1])), list(tmp_path.iterdir())) == (0, {}, [])


def test_nothing_is_taken_before_it_is_opened_or_left_after_it_is_removed(tmp_path: Path) -> None:
    one_part(tmp_path)
    assert list(tmp_path.iterdir()) == []
    file, _ = filled(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"blocks.bin", "blocks.json"}
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_leaves_what_it_had_noted(tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        file, _ = filled(tmp_path, 3)
        file.write(3, {"a": some(file.parts["a"], range(3, 4), seed=2)}, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    file = one_part(tmp_path)
    file.open()
    assert file.filled == 3
    rows = some(file.parts["a"], range(3), seed=1)
    assert torch.equal(file.read(torch.arange(3))["a"], rows)
    file.write(3, {"a": some(file.parts["a"], range(3, 6), seed=3)}, 3)
    assert torch.equal(file.read(torch.arange(3))["a"], rows)
    assert file.filled == 6


@pytest.mark.parametrize("reserve", ["yes", "no"])
@pytest.mark.parametrize("other", ["key", "room", "no note", "damaged note", "no file"])
def test_another_file_begins_anew(other: str, reserve: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reserve == "no":
        monkeypatch.delattr(os, "posix_fallocate")
    filled(tmp_path, 4)
    note, rows = tmp_path / "blocks.json", ROWS
    if other == "no note":
        note.unlink()
    elif other == "damaged note":
        note.write_text('{"key": "k", "fil', encoding="utf-8")
    elif other == "no file":
        (tmp_path / "blocks.bin").unlink()
    elif other == "room":
        rows = (*ROWS, 1)
    file = one_part(tmp_path, key="another" if other == "key" else "k", rows=rows)
    file.open()
    assert file.filled == 0
    assert (tmp_path / "blocks.bin").stat().st_size == file.num_bytes


@pytest.mark.parametrize("reserve", ["yes", "no"])
def test_a_full_disk_is_a_user_error_and_nothing_is_left(
    reserve: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    if reserve == "no":
        monkeypatch.setattr(os, "posix_fallocate", cannot)
    file = BlockFile(tmp_path / "blocks.bin", {"a": Part([1024] * 8, 256, torch.float32)}, room=1 << 30, key="")
    with file_limit(3 << 20), pytest.raises(UserError, match=r"no space left for 0\.0 GiB .* lower heal\.cache_gib"):
        file.open()
    assert list(tmp_path.iterdir()) == []
    file.open()  # there is room now
    assert (tmp_path / "blocks.bin").stat().st_blocks * 512 >= file.num_bytes == 8 << 20


def test_a_file_that_goes_on_keeps_its_bytes_where_room_cannot_be_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    _, rows = filled(tmp_path, 4)
    file = one_part(tmp_path)
    file.open()
    assert file.filled == 4
    assert torch.equal(file.read(torch.arange(4))["a"], rows)
    assert json.loads((tmp_path / "blocks.json").read_text(encoding="utf-8"))["filled"] == 4
