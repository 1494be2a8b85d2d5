"""The commands that only show something: what is known of a model without its weights, and the tables of methods."""

from __future__ import annotations

import argparse
import json

from layerscalpel.config import build_config, parse_assignment
from layerscalpel.parsing import PERMISSIONS


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
    from layerscalpel.quantize import BACKENDS
    from layerscalpel.records import SOURCES
    from layerscalpel.search import SEARCHES
    from layerscalpel.stitch import STITCHES

    tables: dict[str, list[tuple[str, str, str]]] = {
        "search (--search)": [(name, row.sentence, row.paper) for name, row in SEARCHES.items()],
        "stitch (stitch.method)": [(name, *row) for name, row in STITCHES.items()],
        "heal (heal.method)": [(name, row.sentence, row.paper) for name, row in HEALERS.items()],
        "quantize (--quantize)": [(name, row.sentence, row.paper) for name, row in BACKENDS.items()],
        "text sources (--calibration, --healing, --evaluation)": [(n, row.sentence, "") for n, row in SOURCES.items()],
    }
    for title, rows in tables.items():
        print(title)
        for name, sentence, paper in rows:
            print(f"  {name:<11}{sentence}{f' [{paper}]' if paper else ''}")
