"""What the command line understands: its commands, their flags, and the settings that these come to.

The help of a flag is the sentence under its setting. This module imports no torch, so that --help is there at once.

    arguments = build_parser().parse_args(["run", "demo", "--rate", "0.2"])
    config = settings_of(arguments, model__name=arguments.target)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from layerscalpel import __version__
from layerscalpel.config import build_config, parse_assignment, recipe, recipes, sentences
from layerscalpel.enginecli import add_commands
from layerscalpel.errors import UserError
from layerscalpel.fingerprint import STAGES
from layerscalpel.settings import (
    Config,
    DataSettings,
    EvaluateSettings,
    ModelSettings,
    QuantizeSettings,
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
    "--quantize": ("quantize.method", QuantizeSettings),
    "--group-size": ("quantize.group_size", QuantizeSettings),
    "--tasks": ("evaluate.tasks", EvaluateSettings),
    "--limit": ("evaluate.limit", EvaluateSettings),
    "--device": ("model.device", ModelSettings),
    "--offload": ("model.offload", ModelSettings),
    "--dtype": ("model.dtype", ModelSettings),
    "--seed": ("seed", Config),
}
"""Flags that are short for a setting; their help is the sentence under it."""
DEFAULT_RECIPE = "best"
"""What commands that heal a model take where no recipe is named."""
HEALING = ("run", "heal")
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
        ("quantize", "quantise what a run directory has come to, or one model; --out is then a plain checkpoint"),
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
    add_commands(commands)
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
    default = f" (default {DEFAULT_RECIPE})" if name in HEALING else ""
    known = f"{', '.join(recipes())} or a YAML file of settings{default}"
    command.add_argument("--recipe", metavar="NAME", help=known)
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
    chosen = arguments.recipe or (DEFAULT_RECIPE if base is None and arguments.command in HEALING else None)
    below = (base or {}) | (recipe(chosen) if chosen else {})
    given = {key: value for key, _ in FLAGS.values() if (value := getattr(arguments, key, None)) is not None}
    texts = {"target.segment", "target.params", *(f"data.{part}" for part in PARTS), "evaluate.tasks"}
    above = dict(parse_assignment(text) for text in arguments.assignments)
    above |= _bits_of(given)
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


def _bits_of(given: dict[str, Any]) -> dict[str, Any]:
    """Take the bits off METHOD:BITS, and return them as a setting of their own."""
    method, colon, bits = str(given.get("quantize.method", "")).partition(":")
    if not colon:
        return {}
    if not bits:
        raise UserError(f"--quantize {method}: lacks its bits after the colon - allowed: {method}:4, or {method} alone")
    given["quantize.method"] = method
    return {"quantize.bits": parse_assignment(f"quantize.bits={bits}")[1]}


def default_out(model: str) -> Path:
    """Return runs/<last part of the model's name>."""
    return Path("runs") / (Path(model).name.removesuffix(".gguf") or "run")
