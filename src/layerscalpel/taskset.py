"""The tasks that are measured, loaded by lm-evaluation-harness with their data; tasknames.py says what may be named.

The harness knows some 14,000 tasks and takes ten seconds to read them, so a single task is found by the file that
defines it, and the whole index is read for groups, tags and misspelt names only.

    tasks_in("offline:piqa,offline:boolq")  # [TaskSet("piqa", ...), TaskSet("boolq", ...)]
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerscalpel.errors import UserError, kind_and_line, one_line
from layerscalpel.offline import PACKAGED, exported
from layerscalpel.progress import waiting
from layerscalpel.tasknames import OFFLINE, known_name, names_files, packaged_names, words_of

INSTALL = "pip install 'layerscalpel[eval]'"
UNSOUND = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What the harness raises of a definition that does not fit its data; jinja2's errors are added."""
NAME_LINE = re.compile(r"""^["']?task["']?[ \t]*:[ \t]*["']?([^\s"'\[\]{}#]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
"""The line of a definition that names its task."""


@dataclass(frozen=True)
class TaskSet:
    """What counts as one task: a task, or a group that has a score of its own."""

    name: str
    parts: tuple[Any, ...]
    """The harness's tasks: one, or those of the group."""
    source: str
    """hub, offline or file."""
    grouped: bool = False


def require_harness() -> None:
    """Refuse to measure tasks without the extra that does it."""
    if find_spec("lm_eval") is None:
        raise UserError(f"tasks are measured by lm-eval, which is not installed - {INSTALL}, or leave out --tasks")


@functools.lru_cache(maxsize=1)
def tasks_in(spec: str, fewshot: int | None = None) -> tuple[TaskSet, ...]:
    """Return the tasks that are asked for, their data read.

    Args:
        spec: as above.
        fewshot: examples before each item; None for what each task says itself.

    Raises:
        UserError: the harness is not installed, or a task is unknown, given twice, of a kind that is not measured, or
            its data cannot be reached; all tasks without data are named at once.
    """
    words = words_of(spec)
    if not words:
        return ()
    require_harness()
    with waiting("reading tasks"), quiet_harness():
        found = _all_of(words)
        for name, part in [(one.name, part) for one in found for part in one.parts]:
            _require_kind(name, part)
            _set_fewshot(part, fewshot)
    names = [part.task_name for one in found for part in one.parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--tasks {spec} comes to {', '.join(twice)} twice - leave one out")
    return tuple(found)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep what the harness tells of its work off the terminal: we say it ourselves; its errors are raised."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    from layerscalpel.quiet import without_bars  # the command line starts without transformers

    logger, bars = logging.getLogger("lm_eval"), is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()), without_bars():
            yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bar()


def _all_of(words: Iterable[str]) -> list[TaskSet]:
    """Load every part; those without data are told at once."""
    found: list[TaskSet] = []
    unreachable: dict[str, str] = {}
    packaged = exported([word.removeprefix(OFFLINE) for word in words if word.startswith(OFFLINE)])
    for word in words:
        try:
            found += _loaded(word, packaged)
        except _NoDataError as error:
            unreachable[word] = str(error)
    if unreachable:
        reason = next(iter(unreachable.values()))
        held = [f"{OFFLINE}{name}" for name in unreachable if name in PACKAGED]
        rest = [name for name in unreachable if name not in PACKAGED]
        ways = [f"take packaged data: --tasks {','.join(held)}"] if held else []
        ways += [f"for {', '.join(rest)} a task file whose data is here"] if rest else []
        ways += [] if held else [f"packaged are {packaged_names()}"]
        raise UserError(
            f"the data of {', '.join(unreachable)} cannot be reached ({reason}) - go online, or {'; '.join(ways)}"
        )
    return found


class _NoDataError(Exception):
    """The data of a task cannot be read."""


def _loaded(word: str, packaged: Mapping[str, Path]) -> list[TaskSet]:
    from lm_eval.tasks import TaskManager

    if word.startswith(OFFLINE):
        return _sets(TaskManager(include_defaults=False), [str(packaged[word.removeprefix(OFFLINE)])], "offline")
    if names_files(word):
        return _from_files(Path(word).expanduser())
    if word in (files := _files_of_tasks()):
        return _sets(TaskManager(include_defaults=False), [str(files[word])], "hub")
    return _sets(_whole_index(), [known_name(word, _whole_index().all_tasks)], "hub")


@functools.cache
def _files_of_tasks() -> dict[str, Path]:
    """Return {task: the file that defines it} of the harness's single tasks."""
    spec = find_spec("lm_eval")
    assert spec is not None, "asked for before"
    assert spec.submodule_search_locations is not None
    files = sorted(Path(spec.submodule_search_locations[0], "tasks").rglob("*.yaml"), key=Path.as_posix)
    named = ((NAME_LINE.search(path.read_text(encoding="utf-8")), path) for path in reversed(files))
    return {match[1]: path for match, path in named if match}


@functools.cache
def _whole_index() -> Any:
    from lm_eval.tasks import TaskManager

    with waiting("reading all tasks, groups and tags of the harness"):
        return TaskManager()


def _from_files(path: Path) -> list[TaskSet]:
    """Load all tasks of a folder, or what one file defines, which may be a group of tasks beside it."""
    from lm_eval.tasks import TaskManager

    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise UserError(f"there are no task definitions at {path} - give a folder of YAML files, or one of them")
    defined = _definitions(folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    specs = manager.all_subtasks if path.is_dir() else [defined.get(path, {}).get("group") or str(path)]
    if not specs:
        raise UserError(f"the folder {path} defines no task - it needs files *.yaml with a line 'task: NAME'")
    return _sets(manager, specs, "file")


def _definitions(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read all definitions of a folder; refuse a damaged one, which the harness would leave out."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            found[path] = load_yaml(path, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = one_line(error)[:200]
            raise UserError(f"the task definition {path} cannot be read: {reason} - mend or remove it") from error
    return found


def _sets(manager: Any, specs: list[str], source: str) -> list[TaskSet]:
    """Load tasks; a group that has a score of its own, over all items alike, is one set."""
    found = []
    for spec in specs:
        loaded = _with_data(manager, spec)
        tasks, groups = loaded["tasks"], loaded.get("groups", {})
        top = groups.get(spec)
        if top is not None and top.has_aggregation and all(m.weight_by_size for m in top.aggregate_metric_list):
            found.append(TaskSet(top.name, tuple(tasks.values()), source, grouped=True))
        else:
            found += [TaskSet(name, (task,), source) for name, task in tasks.items()]
    return found


def _with_data(manager: Any, spec: str) -> Any:
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    name = Path(spec).stem
    try:
        return manager.load([spec])
    except (OSError, DatasetsError) as error:
        raise _NoDataError(one_line(error)[:160]) from error
    except ImportError as error:
        raise UserError(f"the task {name} needs a package: {one_line(error)[:160]} - install it") from error
    except StopIteration as error:  # of a file without lines
        raise UserError(f"the task {name} has no items - check the file that holds its data") from error
    except (*UNSOUND, TemplateError) as error:
        said = f"the task {name} cannot be loaded: {kind_and_line(error)[:200]}"
        raise UserError(f"{said} - check its definition and its metrics") from error


def _require_kind(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task {name} runs code that a model wrote, which is not done here - leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {name} shows pictures or sound, which a language model cannot take - leave it out")


def _set_fewshot(task: Any, fewshot: int | None) -> None:
    """Set the number of examples as the harness's own command does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    if task.get_config("num_fewshot") and _draws_from_items(task):
        raise UserError(
            f"the task {task.task_name} has no examples but the items it is measured on, so it takes none"
            " - leave out evaluate.fewshot, or the task"
        )


def _draws_from_items(task: Any) -> bool:
    """Tell whether few-shot examples would come from the items that are measured."""
    shots = getattr(task, "fewshot_cfg", None)
    if shots is None or shots.samples is not None:
        return False
    measured = task.get_config("test_split") or task.get_config("validation_split")
    drawn = shots.split or task.get_config("training_split") or task.get_config("validation_split") or measured
    return drawn == measured
