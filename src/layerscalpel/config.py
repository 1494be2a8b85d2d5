"""Merge recipes (YAML) and `section.key=value` pairs onto the defaults of settings.py.

`build_config` reports all findings at once: unknown keys, wrong types, values out of range, contradictions.

    config = build_config([recipe("demo"), {"search.method": "exact"}])
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from layerscalpel.errors import UserError, one_line, suggest
from layerscalpel.settings import Config, TargetSettings

LEARNING = ("clp", "gate", "pilot")
"""Searches that compute gradients."""
TARGET_FLAGS = {
    "rate": "--rate",
    "layers": "--layers",
    "segment": "--segment",
    "max_kl": "--max-kl",
    "params": "--target-params",
    "latency_ms": "--target-latency-ms",
}
"""{target setting: its flag}; one of them is given at most."""


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: `13:19` stays text (YAML 1.1 reads 799) and `5e-4` is a number."""


YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)


@functools.cache
def sentences(section: type) -> dict[str, str]:
    """Return {field: the sentence under it} of a settings class."""
    found, name = {}, ""
    for node in ast.walk(ast.parse(inspect.getsource(section))):
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    name = statement.target.id
                elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    found[name] = str(statement.value.value)
    return found


def setting_keys() -> dict[str, tuple[type, str]]:
    """Return {dotted key: (section class, field name)} of every setting, top-level ones without a dot."""
    keys: dict[str, tuple[type, str]] = {}
    for section in fields(Config):
        kind = type(getattr(Config(), section.name))
        if kind.__module__ != Config.__module__:
            keys[section.name] = (Config, section.name)
            continue
        keys.update({f"{section.name}.{item.name}": (kind, item.name) for item in fields(kind)})
    return keys


def recipes() -> dict[str, Path]:
    """Return {name: file} of the recipes that come with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def recipe(name: str | Path) -> dict[str, Any]:
    """Read a recipe, one of the package's by name or any YAML file, and return its settings as {dotted key: value}.

    What it does not say is as in settings.py, or as in the recipe that it names as its `base`.
    """
    path = recipes().get(str(name), Path(name))
    own = _settings_in(path)
    if "base" not in own:
        return own
    base = str(own.pop("base"))
    if base not in recipes():
        raise UserError(f"recipe {name} has the base {base}, which is none of the package's{suggest(base, recipes())}")
    return recipe(base) | own


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        known = suggest(str(path), recipes())
        raise UserError(f"recipe {path} cannot be read: {error.strerror}{known}, or a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise UserError(f"recipe {path} is no valid YAML: {reason} - see {recipes()['demo']} for the form") from error
    if not isinstance(document, Mapping):
        raise UserError(f"recipe {path} holds no sections - write 'search:' and its keys below, as {recipes()['demo']}")
    return dict(_flatten(document))


def _flatten(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield str(name), value


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `section.key=value` and read the value as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text} has no '=' - write --set section.key=value, as --set heal.epochs=1")
    try:
        return key.strip(), yaml.load(value, YamlLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is no valid YAML - quote it") from error


def build_config(layers: Sequence[Mapping[str, Any]]) -> Config:
    """Merge settings (later ones win) onto the defaults.

    Raises:
        UserError: unknown keys, wrong types, values out of range or contradictory targets, all of them at once.
    """
    merged: dict[str, Any] = {key: value for layer in layers for key, value in layer.items()}
    keys, findings, config = setting_keys(), [], Config()
    for key, value in merged.items():
        if key not in keys:
            findings.append(f"unknown setting '{key}'{suggest(key, keys)}")
            continue
        try:
            config = _replaced(config, key, _checked(key, value, *keys[key]))
        except UserError as error:
            findings.append(str(error))
    findings += _target_findings(config.target)
    findings += _search_findings(config)
    if findings:
        raise UserError("\n".join(findings))
    return config


def _replaced(config: Config, key: str, value: Any) -> Config:
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _checked(key: str, value: Any, section: type, name: str) -> Any:
    hint = get_type_hints(section)[name]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    limits = next(item for item in fields(section) if item.name == name).metadata
    if get_origin(kind) is tuple:
        return tuple(_one(key, item, get_args(kind)[0], limits) for item in _listed(value))
    return _one(key, value, kind, limits)


def _listed(value: Any) -> list[Any]:
    """Return the items of a list; text with commas, as a flag gives it, and a single value are lists, too."""
    if isinstance(value, str):
        return [yaml.load(item, YamlLoader) for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _one(key: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    if get_origin(kind) is Literal:
        if not any(value == name and type(value) is type(name) for name in get_args(kind)):
            raise UserError(f"{key}={value} is unknown{suggest(str(value), get_args(kind))}")
        return value
    number = _converted(key, value, kind)
    low, high = limits.get("low"), limits.get("high")
    endless = isinstance(number, float) and not math.isfinite(number)  # .inf and .nan
    if endless or (low is not None and number < low) or (high is not None and number > high):
        allowed = f"{low} or more" if high is None else f"{low}..{high}"
        raise UserError(f"{key}={value} is out of range - allowed: {allowed}")
    return number


def _converted(key: str, value: Any, kind: type) -> Any:
    if kind is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{key}={value!r} is not {wanted} - mend the recipe or the flag")


def _search_findings(config: Config) -> Iterator[str]:
    search, method = config.search, config.search.method
    if search.initial_start is not None and search.num_starts != 1:
        yield "search.initial_start is for a single start - add search.num_starts=1, or leave it out"
    if config.target.segment is not None:
        return
    if config.model.offload != "none" and method in LEARNING:
        yield f"search.method={method} learns with all weights in memory - with --offload add --search exact"
    if method == "pilot" and config.heal.method == "none":
        yield "search.method=pilot heals its candidates - choose a heal.method, or --search clp"
    if search.segments > 1 and method not in ("exact", "clp"):
        yield f"search.segments=2 compares exact scores, search.method={method} does not - add --search exact, or clp"
    if search.segments > 1 and config.stitch.method != "none":
        yield "a stitch mends one seam - leave out stitch.method, or --segments"


def _target_findings(target: TargetSettings) -> list[str]:
    findings = []
    given = [name for name in TARGET_FLAGS if getattr(target, name) is not None]
    if len(given) > 1:
        flags = ", ".join(TARGET_FLAGS.values())
        findings.append(f"target has {' and '.join(given)} at once - give one of {flags}")
    if target.rate is not None and not 0 < target.rate < 1:
        findings.append(f"rate {target.rate} is not between 0 and 1 - 0.2 removes one layer in five")
    return findings


def to_dict(config: Config) -> dict[str, Any]:
    """Return the settings as nested plain values, in the order of a recipe."""
    return {name: _plain(value) for name, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    """Return a section whose tuples are lists, as they are read from a file."""
    if not isinstance(value, dict):
        return value
    return {name: list(item) if isinstance(item, tuple) else item for name, item in value.items()}
