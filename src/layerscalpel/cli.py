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
from typing import Any

from layerscalpel.config import recipe
from layerscalpel.enginecli import check_command, export_command
from layerscalpel.errors import UserError, suggest
from layerscalpel.fingerprint import STAGES
from layerscalpel.parsing import FLAGS, build_parser, default_out, settings_of
from layerscalpel.progress import say, set_quiet
from layerscalpel.rundir import finished_results, finished_stages, require_models
from layerscalpel.settings import Config
from layerscalpel.showcli import inspect_command, methods_command

QUANTIZE = {"quantize.method": "gptq"}
"""What `scalpel quantize` does where nobody says how."""


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
        base = recipe(target / "config.yaml")
        if stage == "quantize" and base.get("quantize.method", "none") == "none":
            base |= QUANTIZE
        config = settings_of(arguments, base)
        if stage == "quantize":
            _require_method(config)
        before = finished_stages(target)
        _go(config, arguments, until=stage, redo=stage if Path(arguments.out) == target else None)
        if not is_helper() and (gone := [name for name in before if name not in finished_stages(target)]):
            say(f"to be done again: {', '.join(gone)} - scalpel report {target}")
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
    elif stage == "quantize":
        quantize_command(arguments)
    else:
        raise UserError(f"{target} is no run directory - make one with: scalpel run MODEL --out DIR")


def quantize_command(arguments: argparse.Namespace) -> None:
    """`scalpel quantize MODEL`."""
    config = settings_of(arguments, QUANTIZE, model__name=arguments.target)
    _require_method(config)
    if is_helper():  # as surgery
        return
    out = fresh_out(arguments, "scalpel quantize MODEL needs --out DIR, as --quantize gptq:4 --out small")
    from layerscalpel.alone import quantize_alone

    found = quantize_alone(config, out)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        from layerscalpel.quantwords import quantize_lines

        print("\n".join([*quantize_lines(found), f"loads in a fresh process: {out}"]))


def _require_method(config: Config) -> None:
    if config.quantize.method == "none":
        raise UserError("scalpel quantize with quantize.method=none would quantise nothing - allowed: gptq, rtn")


def fresh_out(arguments: argparse.Namespace, usage: str) -> Path:
    """Return the folder that --out names, which must be new or empty."""
    if not arguments.out:
        raise UserError(usage)
    out = Path(arguments.out).expanduser()
    if above := next((folder for folder in out.parents if folder.is_file()), None):
        raise UserError(f"--out {arguments.out} lies in {above}, which is a file - choose another --out")
    source = Path(arguments.target).expanduser()
    if source.is_dir() and source.resolve() in out.resolve().parents:
        raise UserError(f"--out {arguments.out} lies inside the model's own folder {source} - choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files - choose another --out or remove it")
    return out


def cut_command(arguments: argparse.Namespace) -> None:
    """`scalpel cut`: just the surgery."""
    config = settings_of(arguments, model__name=arguments.target)
    if is_helper():  # surgery takes one
        return
    usage = "scalpel cut needs --segment START:STOP and --out DIR, as --segment 13:19 --out cut"
    if not config.target.segment:
        raise UserError(usage)
    out = fresh_out(arguments, usage)
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


COMMANDS = {
    "run": run_command,
    "search": stage_command,
    "heal": stage_command,
    "quantize": stage_command,
    "evaluate": stage_command,
    "benchmark": stage_command,
    "report": stage_command,
    "cut": cut_command,
    "compare": compare_command,
    "export": export_command,
    "check": check_command,
    "inspect": inspect_command,
    "methods": methods_command,
}
