"""`scalpel export` and `scalpel check`: their flags, and what they do.

This module imports no torch before a command runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from layerscalpel.errors import UserError
from layerscalpel.rundir import read_json, write_json

ENGINE_HELP = "the Python that the engine is installed in, as /envs/vllm/bin/python (default this one)"


def add_commands(commands: Any) -> None:
    """Add both commands to a parser's."""
    sentence = "write a checkpoint in the form of another engine, and run it there before it is handed over"
    export = commands.add_parser("export", help=sentence, description=sentence)
    formats = export.add_subparsers(dest="format", metavar="FORMAT", required=True, parser_class=type(export))
    made = formats.add_parser("gguf", help="a file for llama.cpp, Ollama and LM Studio")
    made.add_argument(
        "target", metavar="DIR", help="run directory (its healed or cut model), checkpoint folder or hub id"
    )
    made.add_argument("--type", default="f16", metavar="TYPE", help="f16 (default), bf16, f32, q8_0, q4_k_m, ...")
    made.add_argument("--out", metavar="FILE", help="default: beside the checkpoint, or in the run's folder export/")
    made.add_argument("--converter", metavar="PATH", help="llama.cpp's converter, or the clone that holds it")
    made.add_argument("--get-converter", action="store_true", help="fetch the converter by pip where it is not here")
    made.add_argument("--no-verify", action="store_true", help="do not run the file; it is then called not verified")
    sentence = "run a checkpoint in an engine and compare it with transformers in float32"
    check = commands.add_parser("check", help=sentence, description=sentence)
    check.add_argument("target", metavar="DIR", help="run directory, checkpoint folder, hub id, or .gguf file")
    check.add_argument("--engine", required=True, metavar="NAME", help="transformers, vllm or llama.cpp")
    check.add_argument("--reference", metavar="DIR", help="compare with this checkpoint (default: the same one)")
    check.add_argument("--out", metavar="DIR", help="write results.json there; several engines may share it")
    check.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    for command in (made, check):
        command.add_argument("--engine-python", default=sys.executable, metavar="PATH", help=ENGINE_HELP)
        command.add_argument("--text", metavar="SOURCE", help="held-out text: a named source or a file")
        command.add_argument("--blocks", type=int, default=32, metavar="N", help="held-out blocks (default 32)")
        command.add_argument("--json", action="store_true", help="print machine-readable output")
        command.add_argument("--quiet", action="store_true", help="print the result only")


def export_command(arguments: argparse.Namespace) -> None:
    """`scalpel export gguf`."""
    from layerscalpel.ggufs import type_named

    _require_blocks(arguments)
    type_named(arguments.type)  # before torch is imported for seconds
    from layerscalpel.enginewords import export_lines
    from layerscalpel.export import Ways, export_gguf

    ways = Ways(
        converter=arguments.converter,
        get_converter=arguments.get_converter,
        python=arguments.engine_python,
        text=arguments.text,
        num_blocks=arguments.blocks,
        verify=not arguments.no_verify,
    )
    out = Path(arguments.out) if arguments.out else None
    found = export_gguf(arguments.target, arguments.type, out, ways)
    _print(found, export_lines(found), arguments.json)


def check_command(arguments: argparse.Namespace) -> None:
    """`scalpel check`."""
    _require_blocks(arguments)
    out = Path(arguments.out).expanduser() if arguments.out else None
    earlier = _earlier(out)
    from layerscalpel.checkalone import Check, check_alone
    from layerscalpel.checkengine import LEAST_ALIKE, require_close
    from layerscalpel.enginewords import check_lines

    results = check_alone(
        arguments.target,
        Check(
            arguments.engine,
            python=arguments.engine_python,
            text=arguments.text,
            num_blocks=arguments.blocks,
            reference=arguments.reference,
            trust_remote_code=arguments.trust_remote_code,
        ),
    )
    if out:
        _require_same_model(earlier, results, out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", results | {"check": earlier.get("check", {}) | results["check"]})
    found = results["check"][arguments.engine]
    _print(results, check_lines(arguments.engine, found), arguments.json)
    if arguments.reference is None:  # another checkpoint may well differ
        require_close(arguments.engine, found, alike=LEAST_ALIKE)


def _require_blocks(arguments: argparse.Namespace) -> None:
    if arguments.blocks < 2:
        raise UserError(f"--blocks {arguments.blocks} is too few for a standard error - allowed: 2 or more")


def _earlier(out: Path | None) -> dict[str, Any]:
    """Return what earlier checks wrote into a folder; refuse one that holds something else."""
    if out is None or not out.exists():
        return {}
    found = read_json(out / "results.json") if (out / "results.json").is_file() else {}
    if not out.is_dir() or ("check" not in found and any(out.iterdir())) or (out / "config.yaml").exists():
        raise UserError(f"{out} already holds other files - choose another --out")
    return found


def _require_same_model(earlier: dict[str, Any], results: dict[str, Any], out: Path) -> None:
    if earlier and earlier["model"]["name"] != results["model"]["name"]:
        raise UserError(f"{out} has checks of {earlier['model']['name']} - choose another --out")


def _print(found: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines))
