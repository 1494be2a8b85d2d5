"""Free memory is what the tightest control group leaves, with its cached files counted as free; buffers end."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from layerscalpel import memory
from layerscalpel.memory import free_bytes

CPU = torch.device("cpu")


def group(folder: Path, **files: object) -> Path:
    """Write a control group's files; `__` stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n", encoding="utf-8")
    return folder


def test_without_a_limit_the_machine_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_limits", list)
    available = psutil.virtual_memory().available
    assert free_bytes(CPU) == pytest.approx(available, rel=0.2)
    unlimited = group(tmp_path, memory__max="max", memory__current=5, memory__stat="inactive_file 3")
    monkeypatch.setattr(memory, "_limits", lambda: [unlimited, tmp_path / "none"])
    assert free_bytes(CPU) == pytest.approx(available, rel=0.2)


def test_the_tightest_group_decides(monkeypatch, tmp_path):
    stat = "anon 500\ninactive_file 30\nactive_file 7\nfile 900"
    outer = group(tmp_path, memory__max=5000, memory__current=1000, memory__stat=stat)
    inner = group(tmp_path / "in", memory__max=2000, memory__current=1500, memory__stat=stat)
    monkeypatch.setattr(memory, "_limits", lambda: [inner, outer])
    assert free_bytes(CPU) == 2000 - 1500 + 30 + 7
    monkeypatch.setattr(memory, "_limits", lambda: [outer])
    assert free_bytes(CPU) == 5000 - 1000 + 30 + 7


def test_groups_of_the_first_version_are_read(monkeypatch, tmp_path):
    stat = "inactive_file 1\ntotal_inactive_file 30\ntotal_active_file 7"
    old = group(tmp_path, memory__limit_in_bytes=2000, memory__usage_in_bytes=1500, memory__stat=stat)
    monkeypatch.setattr(memory, "_limits", lambda: [old])
    assert free_bytes(CPU) == 2000 - 1500 + 30 + 7


@pytest.mark.parametrize("num_bytes", [0, 1, 10_000])
def test_a_host_buffer_is_given_back_with_its_last_view(monkeypatch, num_bytes):
    made = []

    def make(*size: int) -> mmap.mmap:
        pages = original(*size)
        made.append(weakref.ref(pages))
        return pages

    original = mmap.mmap
    monkeypatch.setattr(memory.mmap, "mmap", make)
    buffer = memory.host_buffer(num_bytes, torch.device("cpu"))
    assert (buffer.dtype, buffer.shape) == (torch.uint8, (num_bytes,))
    view = buffer[num_bytes // 2 :].fill_(7)
    del buffer
    assert [pages() is not None for pages in made] == [True] * (num_bytes > 0)
    assert view.eq(7).all()
    del view
    assert all(pages() is None for pages in made)
