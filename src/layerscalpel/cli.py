"""The command line: a thin skin over run.py and the stage functions.

Exit codes: 0 done, 2 a mistake the user can mend, 1 a defect, 130 interrupted (call it again to go on).
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from layerscalpel import __version__
from layerscalpel.config import build_config, parse_assignment, recipe, sentences
from layerscalpel.errors import UserError, suggest
from layerscalpel.progress import say, set_quiet
from layerscalpel.rundir import STAGES, finished_results, require_models
from layerscalpel.settings import (
    Config,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    SearchSettings,
    TargetSettings,
)

FLAGS: dict[str, tuple[str, type]] = {
    "--rate": ("target.rate", TargetSettings),
    "--layers": ("target.layers", TargetSettings),
    "--segment": ("target.segment", TargetSettings),
    "--max-kl": ("target.max_kl", TargetSettings),
    "--target-params": ("target.params", TargetSettings),
    "--target-latency-ms": ("target.latency_ms", TargetSettings),
    "--segments": ("search.segments", SearchSettings),
    "--search": ("search.method", SearchSettings),
    "--calibration": ("data.calibration", DataSettings),
    "--healing": ("data.healing", DataSettings),
    "--evaluation": ("data.evaluation", DataSettings),
    "--tasks": ("evaluate.tasks", EvaluateSettings),
    "--limit": ("evaluate.limit", EvaluateSettings),
    "--device": ("model.device", ModelSettings),
    "--offload": ("model.offload", ModelSettings),
    "--dtype": ("model.dtype", ModelSettings),
    "--seed": ("seed", Config),
}
"""Flags that are short for a setting; their help is the sentence under it."""
NOT_COMPARED = ("--segment", "--segments", "--search", "--seed", "--max-kl", "--target-params", "--target-latency-ms")
"""Flags that several methods with one budget cannot have."""
PARTS = ("calibration", "healing", "evaluation")
PERMISSIONS = ("trust_remote_code", "allow_pickle")
"""Flags that allow what a checkpoint may otherwise not do."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """End as every other mistake of the user's does."""
        raise UserError(f"{message} - see {self.prog} --help")


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="scalpel", description="Remove the layers that matter least, heal the seam, prove the result.")
    parser.add_argument("--version", action="version", version=f"layerscalpel {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    run = _command(commands, "run", "the whole path: search, cut, heal, measure, report", "MODEL")
    run.add_argument("--until", metavar="STAGE", help=f"stop after this stage: {', '.join(STAGES)}")
    run.add_argument("--redo", metavar="STAGE", help="do this stage and all after it again")
    _no_verify(run)
    for name, sentence in (
        ("search", "find the segment and stop there"),
        ("heal", "heal the seam of a run directory, or cut anew what `scalpel cut` cut and heal it"),
        ("evaluate", "measure a run directory's models, or one model alone"),
        ("benchmark", "time a run directory's models, or one model alone"),
        ("report", "write report and model card of a run directory again"),
    ):
        _command(commands, name, sentence, "TARGET")
    cut = _command(commands, "cut", "just the surgery, proven; --out is then a plain checkpoint", "MODEL")
    _no_verify(cut)
    compare = _command(commands, "compare", "one table over several runs, or several methods on one model", "DIR")
    compare.add_argument("--methods", metavar="A,B", help="run these searches on one MODEL, with one budget")
    compare.add_argument("--seeds", metavar="0,1", help="seeds of the runs of --methods (default 0)")
    compare.add_argument("--baseline", metavar="MODEL", help="measure this model too, on the same text and tasks")
    inspect = commands.add_parser("inspect", help="layers, sizes, and what can be cut, without loading weights")
    inspect.add_argument("target", metavar="MODEL")
    inspect.add_argument("--json", action="store_true", help="print machine-readable output")
    inspect.add_argument("--layers", metavar="N", help="try a cut of N layers at every place (default a fifth)")
    _permissions(inspect)
    commands.add_parser("methods", help="the tables of methods with their papers")
    return parser


def _command(commands: Any, name: str, sentence: str, target: str) -> Parser:
    command = commands.add_parser(name, help=sentence, description=sentence)
    model = "hub id, checkpoint folder, .gguf file, or demo"
    if target == "DIR":
        command.add_argument("targets", nargs="+", metavar=target, help=f"run directories; with --methods a {model}")
    else:
        more = "" if target == "MODEL" else "; or a run directory"
        command.add_argument("target", metavar=target, help=model + more)
    for flag, (key, section) in FLAGS.items():
        if target == "DIR" and flag in NOT_COMPARED:
            continue
        command.add_argument(flag, dest=key, metavar="X", help=sentences(section)[key.rpartition(".")[2]])
    command.add_argument("--all-rates", action="store_true", help=sentences(SearchSettings)["all_rates"])
    _permissions(command)
    command.add_argument("--recipe", metavar="FILE", help="YAML file of settings")
    command.add_argument(
        "--set", dest="assignments", metavar="KEY=VALUE", action="append", default=[], help="any setting"
    )
    command.add_argument("--out", metavar="DIR", help="run directory (default runs/<name>)")
    command.add_argument("--json", action="store_true", help="print machine-readable output")
    command.add_argument("--quiet", action="store_true", help="print the result only")
    return command


def _permissions(command: Parser) -> None:
    for name in PERMISSIONS:
        command.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=sentences(ModelSettings)[name])


def _no_verify(command: Parser) -> None:
    command.add_argument(
        "--no-verify", action="store_true", help="skip the proof of the cut checkpoint; the card says so"
    )


def settings_of(arguments: argparse.Namespace, base: dict[str, Any] | None = None, **fixed: Any) -> Config:
    """Return the settings of a command: a run's own, the recipe, then --set and the flags, then what is fixed.

    `fixed` maps section__name to what the command itself names: its model, a checkpoint's segment.
    """
    below = (base or {}) | (recipe(arguments.recipe) if arguments.recipe else {})
    given = {key: value for key, _ in FLAGS.values() if (value := getattr(arguments, key, None)) is not None}
    texts = {"target.segment", "target.params", *(f"data.{part}" for part in PARTS), "evaluate.tasks"}
    above = dict(parse_assignment(text) for text in arguments.assignments)
    above |= {k: v if k in texts else parse_assignment(f"{k}={v}")[1] for k, v in given.items()}
    above |= {f"model.{name}": True for name in PERMISSIONS if getattr(arguments, name)}
    if getattr(arguments, "all_rates", False):
        above["search.all_rates"] = True
    if getattr(arguments, "no_verify", False):
        above["cut.proof"] = "none"
    named = {key.replace("__", "."): value for key, value in fixed.items()}
    if twice := sorted(set(above) & set(named)):
        raise UserError(f"{', '.join(twice)} is given twice, by TARGET and by --set or a flag - leave one out")
    if any(key.startswith("target.") for key in above | named):  # replaces whatever kind of target the recipe has
        below = {key: value for key, value in below.items() if not key.startswith("target.")}
    return build_config([below, above, named])


def default_out(model: str) -> Path:
    """Return runs/<last part of the model's name>."""
    return Path("runs") / (Path(model).name.removesuffix(".gguf") or "run")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; ours are rich's
    arguments = argparse.Namespace(command="")
    try:
        arguments = build_parser().parse_args(argv)
        set_quiet(getattr(arguments, "quiet", False) or (getattr(arguments, "json", False) and not sys.stderr.isatty()))
        COMMANDS[arguments.command](arguments)
    except UserError as error:
        for line in str(error).splitlines():
            print(f"scalpel: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        what = "no space left on the device" if error.errno == errno.ENOSPC else f"{error.strerror}: {error.filename}"
        print(f"scalpel: {what} - mend that, or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "nothing was written" if arguments.command == "cut" else "what is finished stays; call it again"
        print(f"scalpel: interrupted - {goes_on}", file=sys.stderr)
        return 130
    return 0


def run_command(arguments: argparse.Namespace) -> None:
    """`scalpel run`."""
    for name in (arguments.until, arguments.redo):
        if name is not None and name not in STAGES:
            raise UserError(f"there is no stage '{name}'{suggest(name, STAGES)}")
    config = settings_of(arguments, model__name=arguments.target)
    _go(config, arguments, until=arguments.until, redo=arguments.redo)


def _go(config: Config, arguments: argparse.Namespace, *, until: str | None, redo: str | None) -> None:
    out = Path(arguments.out) if arguments.out else default_out(config.model.name)
    results = _finished(out, config, until, redo)
    if results is None:
        from layerscalpel.run import run  # torch and transformers take seconds to import

        results = run(config, out, until=until or "report", redo=redo)
        if not results:  # a process that helped only
            return
    else:
        say(f"{out} is finished; nothing to do")
    if not is_helper():
        show(results, out, arguments.json)


def _finished(out: Path, config: Config, until: str | None, redo: str | None) -> dict[str, Any] | None:
    """Return the results of a finished run, or None; of several processes the first one looks, for all.

    Each looking for itself could see another state, as while the first one still writes.
    """
    if not is_one_of_several():
        return finished_results(out, config, until, redo)
    from layerscalpel import parallel

    parallel.join(config.model.device)
    return parallel.first_says(None if is_helper() else finished_results(out, config, until, redo))


def is_one_of_several() -> bool:
    """Tell whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_helper() -> bool:
    """Tell whether this is one of several processes, and not the one that writes and speaks."""
    return is_one_of_several() and os.environ.get("RANK", "0") != "0"


def show(results: dict[str, Any], out: Path, as_json: bool) -> None:
    """Print the results: JSON, or the table and samples for a person."""
    if as_json:
        print(json.dumps(results, indent=2))
        return
    from rich.console import Console

    from layerscalpel.tables import print_results

    print_results(results, out, Console())


def stage_command(arguments: argparse.Namespace) -> None:
    """`scalpel search|heal|evaluate|benchmark|report`: one stage on a run directory or a model."""
    stage, target = arguments.command, Path(arguments.target)
    if (target / "config.yaml").is_file():
        arguments.out = arguments.out or str(target)
        if stage in ("evaluate", "benchmark") and Path(arguments.out) == target:
            require_models(target)
        config = settings_of(arguments, recipe(target / "config.yaml"))
        _go(config, arguments, until=stage, redo=stage if Path(arguments.out) == target else None)
    elif stage == "search":
        _go(settings_of(arguments, model__name=arguments.target), arguments, until=stage, redo=None)
    elif stage in ("evaluate", "benchmark"):
        from layerscalpel.alone import measure_alone

        config = settings_of(arguments, model__name=arguments.target)
        out = Path(arguments.out) if arguments.out else default_out(config.model.name)
        show(measure_alone(stage, config, out), out, arguments.json)
    elif stage == "heal" and (target / "layerscalpel.json").is_file():
        from layerscalpel.history import parent_of

        parent, segment = parent_of(target)
        config = settings_of(arguments, model__name=parent, target__segment=segment)
        arguments.out = arguments.out or str(default_out(target.name))
        _go(config, arguments, until=stage, redo=None)
    else:
        raise UserError(f"{target} is no run directory - make one with: scalpel run MODEL --out DIR")


def cut_command(arguments: argparse.Namespace) -> None:
    """`scalpel cut`: just the surgery."""
    config = settings_of(arguments, model__name=arguments.target)
    if is_helper():  # surgery takes one
        return
    if not config.target.segment or not arguments.out:
        raise UserError("scalpel cut needs --segment START:STOP and --out DIR, as --segment 13:19 --out cut")
    out = Path(arguments.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files - choose another --out or remove it")
    from layerscalpel.alone import cut_alone

    found = cut_alone(config, out)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        proof = found["proof"]
        proven = f"proven ({proof['kind']})" if proof else "not proven (--no-verify)"
        print(f"{found['removed']} removed, {found['parameters']:,} parameters left, {proven}: {out}")


def compare_command(arguments: argparse.Namespace) -> None:
    """`scalpel compare`: several runs, or several methods on one model, side by side."""
    from layerscalpel.comparecli import show_comparison

    if is_one_of_several():
        raise UserError("scalpel compare takes one process - do the runs with torchrun, then compare their folders")
    given = [flag for flag, (key, _) in FLAGS.items() if getattr(arguments, key, None) is not None]
    if (given or arguments.recipe or arguments.assignments) and not arguments.methods:
        named = ", ".join(given) or "--recipe and --set"
        raise UserError(f"{named} would be settings of new runs - add --methods, or leave them out")

    def configure(method: str, seed: int) -> Config:
        return settings_of(arguments, model__name=arguments.targets[0], search__method=method, seed=seed)

    show_comparison(arguments, configure)


def inspect_command(arguments: argparse.Namespace) -> None:
    """`scalpel inspect`: what is known without weights."""
    from layerscalpel.describe import describe

    given = [dict([parse_assignment(f"target.layers={arguments.layers}")])] if arguments.layers else []
    n = build_config(given).target.layers
    found = describe(arguments.target, n, **{name: getattr(arguments, name) for name in PERMISSIONS})
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from layerscalpel.tables import print_description

    print_description(found, Console())


def methods_command(_arguments: argparse.Namespace) -> None:
    """`scalpel methods`: every table of methods."""
    from layerscalpel.heal import HEALERS
    from layerscalpel.records import SOURCES
    from layerscalpel.search import SEARCHES
    from layerscalpel.stitch import STITCHES

    tables: dict[str, list[tuple[str, str, str]]] = {
        "search (--search)": [(name, row.sentence, row.paper) for name, row in SEARCHES.items()],
        "stitch (stitch.method)": [(name, *row) for name, row in STITCHES.items()],
        "heal (heal.method)": [(name, row.sentence, row.paper) for name, row in HEALERS.items()],
        "text sources (--calibration, --healing, --evaluation)": [(n, row.sentence, "") for n, row in SOURCES.items()],
    }
    for title, rows in tables.items():
        print(title)
        for name, sentence, paper in rows:
            print(f"  {name:<11}{sentence}{f' [{paper}]' if paper else ''}")


COMMANDS = {
    "run": run_command,
    "search": stage_command,
    "heal": stage_command,
    "evaluate": stage_command,
    "benchmark": stage_command,
    "report": stage_command,
    "cut": cut_command,
    "compare": compare_command,
    "inspect": inspect_command,
    "methods": methods_command,
}
