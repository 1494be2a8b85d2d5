"""The run directory: one folder a stage, finished when its done.json is there, and one results.json above them.

A stage's fingerprint covers the settings it depends on and the fingerprints before it. A finished stage with the same
fingerprint is not run again; one with another fingerprint is an error, unless the user redoes it. This module imports
no torch, so a finished run prints its table at once.

    runs/<name>/  config.yaml provenance.json events.jsonl results.json report.html README.md
                  search/ cut/model/ stitch/ heal/model/ quantize/model/ evaluate/ benchmark/ report/
                  each of these with done.json, written last
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from layerscalpel import aside
from layerscalpel.config import to_dict
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import STAGES, changed_settings, fingerprints, made_with
from layerscalpel.settings import Config

KEYED = ("heal", "evaluate")
"""Stages that find out themselves what of an interrupted attempt with other settings they can go on with."""
SKIPPED: dict[str, Any] = {"skipped": True}
"""The result of a stage that is switched off."""


def write_json(path: Path, content: Any) -> None:
    """Write JSON by rename: a reader sees the old file or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        UserError: it is not there or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}) - is this a run directory? `scalpel run` makes one"
        ) from error


def read_done(path: Path) -> dict[str, Any]:
    """Read the done.json of a stage.

    Raises:
        UserError: it is not there or damaged.
    """
    content = read_json(path)
    if not isinstance(content.get("fingerprint"), str) or not isinstance(content.get("result"), dict):
        raise UserError(f"{path} is damaged: it lacks the result - remove the file, and its stage is done again")
    return content


class RunDir:
    """One run directory, opened for one configuration."""

    def __init__(self, path: str | Path, config: Config, *, redo: str | None = None) -> None:
        """Open or create the directory.

        Raises:
            UserError: it holds something else, was made with other settings, or another process is at work in it.
        """
        self.path, self.config = Path(path), config
        self.fingerprints = fingerprints(config)
        self._refuse_foreign()
        self._lock = self._locked()
        if aside.restore(self.path, KEYED):  # by a call that was killed while it did something again
            write_json(self.path / "results.json", self.results())
        stale = stages_from(redo) if redo else []
        self._refuse_other_settings(stale)
        self._set_aside(stale)
        (self.path / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file - give a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / "config.yaml").exists():
            raise UserError(f"folder {self.path} holds other files and is no run directory - choose another --out")

    def _locked(self) -> Any:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"folder {self.path} cannot be written ({error.strerror}) - choose another --out"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another scalpel is at work in {self.path} - wait for it or choose another --out"
            ) from error
        return lock

    def _set_aside(self, stale: list[str]) -> None:
        """Set aside what is to be redone, checkpoints and pages too, until the first stage of it is done again.

        What was begun and not finished is no result: it stays, and goes on if it can.
        """
        if stale:
            done = [stage for stage in stale if self.done(stage) or not (self.path / stage / aside.STARTED).exists()]
            aside.set_aside(self.path, [*done, "report.html", "README.md"])
            write_json(self.path / "results.json", self.results())

    def _refuse_other_settings(self, stale: list[str]) -> None:
        kept = [stage for stage in STAGES if stage not in stale]
        other = next((s for s in kept if (d := self.done(s)) and d["fingerprint"] != self.fingerprints[s]), None)
        if other is None:
            return
        changed = changed_settings(other, made_with(self.path), self.config)
        command = f"scalpel run {self.config.model.name} {'...' if changed else f'--recipe {self.path}/config.yaml'}"
        why = f"with other settings: {'; '.join(changed)}" if changed else "of input files that have changed since"
        raise UserError(
            f"folder {self.path} was made {why} - choose another --out, or do its stage {other} and what follows again:"
            f" {command} --out {self.path} --redo {other}"
        )

    def done(self, stage: str) -> dict[str, Any] | None:
        """Return a finished stage's done.json, or None."""
        path = self.path / stage / "done.json"
        return read_done(path) if path.exists() else None

    def stage(self, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Return the stage's result, from its folder if it is finished, else by doing the work there.

        `work(folder)` returns plain values. An interrupted stage keeps its folder, and goes on in it with the same
        fingerprint, or by what it finds there.
        """
        finished = self.done(name)
        if finished:
            return finished["result"]
        folder, mark = self.path / name, self.path / name / aside.STARTED
        if not (mark.exists() and (name in KEYED or read_json(mark)["fingerprint"] == self.fingerprints[name])):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder / "model", ignore_errors=True)  # an unfinished stage's checkpoint may lack its proof
        folder.mkdir(parents=True, exist_ok=True)
        write_json(mark, {"fingerprint": self.fingerprints[name]})
        self.event("start", name)
        began = time.monotonic()
        result = work(folder) | {"wall_s": round(time.monotonic() - began, 2)}
        write_json(folder / "done.json", {"fingerprint": self.fingerprints[name], "result": result})
        mark.unlink()
        aside.drop(self.path)
        self.event("done", name, wall_s=result["wall_s"])
        write_json(self.path / "results.json", self.results())
        return result

    def event(self, kind: str, stage: str, **values: Any) -> None:
        """Append one line to events.jsonl."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": kind, "stage": stage, **values}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def results(self) -> dict[str, Any]:
        """Return the contents of results.json: what the finished stages found."""
        return collect(self.path)

    def earlier(self) -> dict[str, Any]:
        """Return the provenance that an earlier call left, or nothing."""
        path = self.path / "provenance.json"
        return read_json(path) if path.exists() else {}

    def close(self) -> None:
        """Let other processes in; what was to be redone and was not is there again."""
        if aside.restore(self.path, KEYED):
            write_json(self.path / "results.json", self.results())
        self._lock.close()


def collect(path: Path) -> dict[str, Any]:
    """Merge the finished stages of a run directory into the form of results.json; absent stages are absent."""
    stages = {s: read_done(path / s / "done.json")["result"] for s in STAGES if (path / s / "done.json").exists()}
    stages.pop("report", None)
    data = {part: found for result in stages.values() for part, found in result.pop("data", {}).items()}
    found = stages.get("search", {})
    head = {key: found.pop(key) for key in ("parent", "segment", "segments") if key in found}
    return head | {"data": data} | {name: result for name, result in stages.items() if not result.get("skipped")}


def finished_results(path: str | Path, config: Config, until: str | None, redo: str | None) -> dict[str, Any] | None:
    """Return the results if all wanted stages are finished with these settings, else None; loads nothing.

    What cannot be read is not finished either: `RunDir` says what is wrong with it.
    """
    path, wanted = Path(path), stages_until(until or list(STAGES)[-1])
    if redo or not (path / "results.json").exists():
        return None
    expected = fingerprints(config)
    try:
        if any(read_done(path / stage / "done.json")["fingerprint"] != expected[stage] for stage in wanted):
            return None
        return read_json(path / "results.json")
    except UserError:
        return None


def finished_stages(path: Path) -> list[str]:
    """Return the stages that are finished and did something; one whose record is damaged is not."""
    found = []
    for stage in STAGES:
        with contextlib.suppress(UserError):
            found += [] if read_done(path / stage / "done.json")["result"].get("skipped") else [stage]
    return found


def require_models(path: Path) -> None:
    """Refuse a run directory that no stage has written a checkpoint to.

    Raises:
        UserError: there is none.
    """
    if not any((path / stage / "model").is_dir() for stage in STAGES):
        raise UserError(
            f"run directory {path} holds no models yet, so there is nothing to measure"
            f" - finish its cut first: scalpel run MODEL --until cut --out {path}"
        )


def stages_until(last: str) -> list[str]:
    """Return the stages up to and with `last`."""
    names = list(STAGES)
    return names[: names.index(last) + 1]


def stages_from(first: str) -> list[str]:
    """Return `first` and the stages that depend on it."""
    names = list(STAGES)
    return [first, "report"] if first == "evaluate" else names[names.index(first) :]


def software() -> dict[str, str]:
    """Return the versions of what computes here."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("layerscalpel", "torch", "transformers", "accelerate", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions | {"python": platform.python_version(), "platform": platform.platform()}


def provenance(config: Config, folder: RunDir, started: float) -> dict[str, Any]:
    """Return versions and platform, when the run was first started, and the sum of its stages' seconds."""
    return {
        **software(),
        "started": folder.earlier().get("started") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "wall_s": round(sum(done["result"]["wall_s"] for stage in STAGES if (done := folder.done(stage))), 1),
        "seed": config.seed,
        "settings": asdict(config.model),
    }
