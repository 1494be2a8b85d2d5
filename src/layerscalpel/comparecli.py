"""What `scalpel compare` does: several runs, or several methods on one model, beside each other.

comparison = compared(arguments, configure)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from layerscalpel.alike import require_one_tokenizer
from layerscalpel.compare import Comparison, compare
from layerscalpel.comparepage import write_comparison
from layerscalpel.comparewords import WIDE, print_comparison
from layerscalpel.errors import UserError
from layerscalpel.gather import Group, grouped, read_run
from layerscalpel.sweep import Configure, methods_in, seeds_in, sweep
from layerscalpel.yardstick import measure_baseline


def show_comparison(arguments: argparse.Namespace, configure: Configure) -> None:
    """Compare what the arguments name; print it, and write it where they say so.

    Args:
        arguments: targets, methods, seeds, baseline, out, json.
        configure: gives the settings of a method and a seed.

    Raises:
        UserError: a mistake the user can mend.
    """
    out = Path(arguments.out).expanduser() if arguments.out else None
    if out and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file - give a folder")
    comparison = compared(arguments, configure, out)
    page = write_comparison(comparison, out) if out else None
    if arguments.json:
        print(json.dumps(comparison.to_dict(), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    print_comparison(comparison, console)
    if page:
        console.print(f"page {page}", highlight=False, markup=False, soft_wrap=True)


def compared(arguments: argparse.Namespace, configure: Configure, out: Path | None) -> Comparison:
    """Return the comparison that the arguments name."""
    groups, notes = _of_methods(arguments, configure, out) if arguments.methods else _of_folders(arguments)
    baselines: list[Group] = []
    if arguments.baseline:
        if out is None:
            raise UserError("--baseline is measured, so give the folder that keeps it: --out DIR")
        require_one_tokenizer([run for group in groups for run in group.runs.values()])
        group, more = measure_baseline(arguments.baseline, groups, out)
        baselines, notes = [group], [*notes, *more]
    return compare(groups, baselines, notes)


def _of_folders(arguments: argparse.Namespace) -> tuple[list[Group], list[str]]:
    if arguments.seeds:
        raise UserError("--seeds is for --methods - leave it out; runs that differ in the seed are found")
    return grouped([read_run(name) for name in arguments.targets])


def _of_methods(arguments: argparse.Namespace, configure: Configure, out: Path | None) -> tuple[list[Group], list[str]]:
    methods, seeds = methods_in(arguments.methods), seeds_in(arguments.seeds or "0")
    if len(arguments.targets) != 1:
        raise UserError(f"--methods takes one MODEL, not {len(arguments.targets)} - leave out --methods for folders")
    if out is None:
        raise UserError("--methods needs the folder of its runs: --out DIR")
    return sweep(configure, methods, seeds, out)
