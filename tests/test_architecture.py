"""The house itself: imports point one way, nothing heavy loads early, tables and documents agree with the code."""

from __future__ import annotations

import ast
import importlib
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from layerscalpel import config, settings
from layerscalpel.beside import BESIDE
from layerscalpel.heal import HEALERS
from layerscalpel.quantize import BACKENDS
from layerscalpel.search import SEARCHES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "layerscalpel"
ORDER = [
    "errors",
    "settings",
    "config",
    "progress",
    "converter",
    "ggufs",
    "enginework",
    "enginewords",
    "segment",
    "student",
    "speedwords",
    "parallel",
    "layers",
    "hooks",
    "probe",
    "passes",
    "streams",
    "carried",
    "shards",
    "packedlinear",
    "memory",
    "reader",
    "quantised",
    "quiet",
    "origin",
    "chosen",
    "decoder",
    "forms",
    "records",
    "encode",
    "overlap",
    "packing",
    "draw",
    "data",
    "selftext",
    "answerfile",
    "continuations",
    "answers",
    "losses",
    "race",
    "blockfile",
    "store",
    "valley",
    "similarity",
    "gate",
    "exact",
    "sizes",
    "renumber",
    "traces",
    "plan",
    "cut",
    "witness",
    "twin",
    "proof",
    "feed",
    "offload",
    "packed",
    "scheme",
    "quantfolder",
    "rtn",
    "gptq",
    "items",
    "offline",
    "tasknames",
    "taskset",
    "inputs",
    "examinee",
    "harness",
    "exam",
    "paired",
    "retention",
    "evaluate",
    "longtext",
    "distances",
    "byblock",
    "writing",
    "grams",
    "trials",
    "anatomy",
    "seam",
    "fold",
    "rehearsal",
    "stitch",
    "transfer",
    "rows",
    "frozen",
    "objectives",
    "forwards",
    "fourbit",
    "spread",
    "places",
    "expand",
    "trained",
    "gradients",
    "resume",
    "schedule",
    "training",
    "phase",
    "heal",
    "judge",
    "turns",
    "graphs",
    "footprint",
    "benchmark",
    "engines",
    "latency",
    "speed",
    "quantproof",
    "quantize",
    "task",
    "targets",
    "baselines",
    "clp",
    "pilot",
    "search",
    "tworuns",
    "summary",
    "racewords",
    "targetwords",
    "searchwords",
    "proofwords",
    "healwords",
    "longwords",
    "taskwords",
    "writingwords",
    "distancewords",
    "quantwords",
    "tasktables",
    "tables",
    "card",
    "plots",
    "searchplots",
    "layerplots",
    "longplots",
    "taskplots",
    "report",
    "fingerprint",
    "aside",
    "rundir",
    "gather",
    "alike",
    "contest",
    "compare",
    "comparewords",
    "comparepage",
    "history",
    "checkpoint",
    "quantchecks",
    "needs",
    "checks",
    "workbench",
    "overwrite",
    "unpacked",
    "verdict",
    "quantizing",
    "beside",
    "measuring",
    "stages",
    "run",
    "alone",
    "sweep",
    "yardstick",
    "comparecli",
    "describe",
    "checkengine",
    "checkalone",
    "export",
    "enginecli",
    "parsing",
    "showcli",
    "cli",
    "__main__",
]


def own_imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "layerscalpel":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerscalpel."):
            found.add(str(node.module).removeprefix("layerscalpel."))
    return found


def test_every_module_has_its_place() -> None:
    assert set(ORDER) == {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module: str) -> None:
    later = set(ORDER[ORDER.index(module) :])
    assert not own_imports(module) & later


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, layerscalpel.cli; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_core_imports_without_datasets_or_plotting() -> None:
    child = multiprocessing.get_context("fork").Process(target=import_core)  # transformers is imported already
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0


def import_core() -> None:
    """Import this package anew where the extras do not exist."""
    missing = ("datasets", "matplotlib", "lm_eval")
    for name in list(sys.modules):
        if name.partition(".")[0] in ("layerscalpel", *missing):
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(missing))
    for module in ("run", "alone", "cli"):
        importlib.import_module(f"layerscalpel.{module}")


def test_tables_have_exactly_the_names_that_settings_allow() -> None:
    assert set(SEARCHES) == set(get_args(settings.SearchName))
    assert set(HEALERS) == set(get_args(settings.HealName))
    assert {"none", *BACKENDS} == set(get_args(settings.QuantizeName))
    assert set(BESIDE) == set(get_args(settings.BesideName))


def test_every_setting_has_its_sentence() -> None:
    for key, (section, name) in config.setting_keys().items():
        sentence = config.sentences(section).get(name, "")
        assert sentence.endswith("."), key


def test_functions_are_small() -> None:
    long = []
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.body:
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                if length > 40:
                    long.append(f"{path.name}:{node.name} has {length} lines")
    assert long == []


def test_recipes_are_valid() -> None:
    assert set(config.recipes()) == {"best", "demo", "paper"}
    for name, path in config.recipes().items():
        assert config.build_config([config.recipe(name)]) == config.build_config([config.recipe(path)])
    assert config.build_config([config.recipe("paper")]) == config.build_config([])


def test_the_readme_names_every_search_and_both_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert all(f"`{name}`" in text for name in SEARCHES)


def test_settings_named_in_documents_exist() -> None:
    known, sections = set(config.setting_keys()), {key.split(".")[0] for key in config.setting_keys() if "." in key}
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        named = re.findall(r"`([a-z_]+\.[a-z_]+)(?:=[^`]*)?`", path.read_text(encoding="utf-8"))
        wrong = [key for key in named if key.split(".")[0] in sections and key not in known and not is_file(key)]
        assert wrong == [], path.name


def is_file(name: str) -> bool:
    return name.endswith((".py", ".md", ".json"))


def test_commands_in_the_readme_parse() -> None:
    from layerscalpel.cli import build_parser

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:scalpel|torchrun .* -m layerscalpel) ([a-z].*)$", text, flags=re.MULTILINE)
    assert commands
    for line in commands:
        build_parser().parse_args(line.split("  #")[0].split())
