"""Every setting of a run, with its default, its range and one sentence that says what it does.

A run is described by one frozen `Config` of frozen sections. `build_config` merges recipes (YAML) and
`section.key=value` pairs onto the defaults and reports all findings at once. The sentence under a field is also its
help text on the command line: nothing is described twice.

    config = build_config([recipe("recipes/demo.yaml"), {"search.method": "exact"}])
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from layerscalpel.errors import UserError, one_line, suggest

SearchName = Literal["clp", "gate", "exact", "pilot", "angular", "influence", "last", "random"]
StitchName = Literal["none", "linear"]
HealName = Literal["endpoint", "none"]
Objective = Literal["ce", "kl", "both"]
ProofName = Literal["auto", "memory", "parts", "none"]
OffloadName = Literal["none", "cpu", "disk"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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


def bounded(default: Any, low: float | None = None, high: float | None = None) -> Any:
    """A field whose value lies in low..high, both included (None leaves that side open)."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class ModelSettings:
    """The model and how it computes."""

    name: str = ""
    """Hub id, checkpoint folder, .gguf file, or `demo`."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: Dtype = "auto"
    """Number format while computing; auto is float32 on cpu and mps, the checkpoint's own on cuda."""
    offload: OffloadName = "none"
    """Where the layers of a model larger than memory stay while it is searched; each comes in once per pass."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint; without it such a model is refused."""
    allow_pickle: bool = False
    """Accept weights in .bin files, of which torch loads the tensors only; without it they are refused."""

    def permissions(self) -> dict[str, bool]:
        """Return what the checkpoint may do."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}


@dataclass(frozen=True)
class TargetSettings:
    """How much to remove; give one of them."""

    rate: float | None = None
    """Share of the layers to remove, 0..1; 0.2 when nothing else is given."""
    layers: int | None = bounded(None, 1)
    """Number of layers to remove."""
    segment: str | None = None
    """The layers to remove as START:STOP, 0-based, STOP excluded; nothing is searched then."""
    max_kl: float | None = bounded(None, 0.0)
    """Remove as many layers as the KL to the parent, in nats per token before healing, allows."""
    params: str | None = None
    """Remove as few layers as leave at most so many parameters, as 90M or 6.7B."""
    latency_ms: float | None = bounded(None, 0.0)
    """Remove as few layers as bring a generated token to so many milliseconds on this machine."""


@dataclass(frozen=True)
class DataSettings:
    """Text, and the sizes of its disjoint parts."""

    calibration: str = "c4"
    """Text that the search reads: a named source or a .jsonl[.gz] or .txt file."""
    healing: str = "alpaca"
    """Text or instructions that heal the seam: a named source or a file."""
    evaluation: str = "c4"
    """Held-out text that measures the result: a named source or a file."""
    block_tokens: int = bounded(256, 8)
    """Length of a calibration or evaluation block."""
    healing_block_tokens: int = bounded(512, 8)
    """Length of a healing block."""
    evaluation_blocks: int = bounded(64, 2)
    """Held-out blocks that measure the result."""
    healing_blocks: int | None = bounded(None, 2)
    """At most so many healing blocks; None takes all the source has."""
    validation_fraction: float = bounded(0.05, 0.001, 0.5)
    """Share of the healing blocks kept aside to choose the best checkpoint."""


@dataclass(frozen=True)
class SearchSettings:
    """How the segment is found."""

    method: SearchName = "clp"
    """How the segment is found; `scalpel methods` lists them with their papers."""
    num_blocks: int = bounded(64, 2)
    """Calibration blocks that score the windows, at most; the race ends earlier when one window is left."""
    batch_size: int = bounded(4, 1)
    """Blocks per parent forward."""
    confidence: float = bounded(0.99, 0.0, 0.999999)
    """Confidence with which the race keeps the best window; at 0 every window sees every block."""
    first_blocks: int = bounded(8, 8)
    """Blocks that every window sees before the first is dropped."""
    all_rates: bool = False
    """Score the windows of every length up to half of the layers."""
    segments: int = bounded(1, 1, 2)
    """Runs of layers to remove; with 2 the better of one and two runs of the same total is taken."""
    device_gib: float | None = bounded(None, 0.0)
    """Device memory for hidden states of an offloaded model; None takes half of what is free."""
    stream_gib: float = bounded(8.0, 0.0)
    """Host memory for hidden states of an offloaded model; past it they go to a file."""
    gate_blocks: int = bounded(128, 1)
    """Calibration blocks the gate learns from, one pass, one step per block."""
    num_starts: int = bounded(5, 1)
    """Evenly spaced start indices learned at once; 1 is the paper's single start."""
    initial_start: float | None = bounded(None, 0)
    """Where a single start begins; None is the middle of the possible starts."""
    steepness: float = bounded(5.0, 0.1)
    """Final steepness k of the gate (the paper's value is 5)."""
    initial_steepness: float = bounded(1.0, 0.1)
    """Steepness at the first step, annealed geometrically to the final one; equal values switch annealing off."""
    gate_lr: float = bounded(0.3, 1e-6)
    """Adam's first learning rate for the start index, in layers, falling to 0 (the paper does not state its own)."""
    gate_patience: int = bounded(0, 0)
    """Steps without movement after which a start is settled and not computed any more; 0 learns to the end."""
    gate_checkpointing: bool = False
    """Recompute the layers in the backward pass of the gate: less memory, a third more time."""
    pilot_steps: int = bounded(150, 1)
    """Healing steps of each pilot."""
    pilot_count: int = bounded(4, 2)
    """Most candidates that a pilot search heals."""


@dataclass(frozen=True)
class CutSettings:
    """The surgery."""

    proof: ProofName = "auto"
    """How to prove the checkpoint; auto compares logits in memory if they fit (`memory`), else in three `parts`."""
    proof_minutes: float = bounded(30.0, 0.0)
    """How long logits of a model larger than memory may take, read from disk; past it the other parts must do."""


@dataclass(frozen=True)
class StitchSettings:
    """Repair without training."""

    method: StitchName = "none"
    """Training-free repair folded into the seam, kept only if it lowers the held-out KL."""
    ridge: float = bounded(1e-2, 0.0)
    """Ridge of the linear stitch, as a share of the mean diagonal of its Gram matrix."""


@dataclass(frozen=True)
class HealSettings:
    """Training of the seam."""

    method: HealName = "endpoint"
    """What is trained; endpoint trains only the layers at the seam."""
    objective: Objective = "ce"
    """Loss on the labelled tokens: cross-entropy, KL to the parent, or their sum."""
    width: int = bounded(1, 1)
    """Layers trained on each side of the seam."""
    lr: float = bounded(5e-4, 1e-8)
    """Peak learning rate of AdamW (the paper does not state its own)."""
    epochs: int = bounded(2, 1)
    """Passes over the healing blocks."""
    batch_size: int = bounded(16, 1)
    """Blocks per optimiser step."""
    micro_batch_size: int = bounded(4, 1)
    """Blocks per forward and backward; gradients accumulate up to batch_size."""
    warmup_fraction: float = bounded(0.05, 0.0, 1.0)
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: float = bounded(0.0, 0.0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = bounded(1.0, 1e-6)
    """Gradients are scaled down to this norm."""
    validations: int = bounded(10, 1)
    """How often the held-out loss is measured; the best of these states is kept."""
    cache_gib: float = bounded(16.0, 0.0)
    """Disk for the cached output of the frozen prefix; blocks past it are recomputed."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Figures on held-out text."""

    batch_size: int = bounded(4, 1)
    """Blocks per forward."""
    sample_tokens: int = bounded(64, 0)
    """New tokens of each generated sample; 0 switches samples off."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """Timing of parent and result."""

    enabled: bool = True
    """Measure latency and speed of parent and result."""
    prompt_tokens: int = bounded(128, 1)
    """Length of the prompt that prefill is timed on."""
    new_tokens: int = bounded(32, 2)
    """Tokens that decoding is timed on."""
    batch_size: int = bounded(1, 1)
    """Sequences at once."""
    repeats: int = bounded(5, 2)
    """Timed rounds per model, interleaved, after one warm-up round."""


@dataclass(frozen=True)
class Config:
    """All settings of a run; the sections are those of a recipe file."""

    model: ModelSettings = ModelSettings()
    target: TargetSettings = TargetSettings()
    data: DataSettings = DataSettings()
    search: SearchSettings = SearchSettings()
    cut: CutSettings = CutSettings()
    stitch: StitchSettings = StitchSettings()
    heal: HealSettings = HealSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    seed: int = bounded(0, 0, 2**31 - 1)
    """Seed of shuffling, random token ids and initialisation."""


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
        if kind.__module__ != __name__:
            keys[section.name] = (Config, section.name)
            continue
        keys.update({f"{section.name}.{item.name}": (kind, item.name) for item in fields(kind)})
    return keys


def recipe(path: str | Path) -> dict[str, Any]:
    """Read a YAML recipe and return its settings as {dotted key: value}."""
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), YamlLoader)
    except OSError as error:
        raise UserError(f"recipe {path} cannot be read: {error.strerror} - give a YAML file with --recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = one_line(error)
        raise UserError(f"recipe {path} is no valid YAML: {reason} - see recipes/demo.yaml for the form") from error
    if not isinstance(document, Mapping):
        raise UserError(f"recipe {path} holds no sections - write 'search:' and its keys below, as recipes/demo.yaml")
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
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UserError(f"{key}={value} is unknown{suggest(str(value), get_args(kind))}")
        return value
    number = _converted(key, value, kind)
    limits = next(item for item in fields(section) if item.name == name).metadata
    low, high = limits.get("low"), limits.get("high")
    if (low is not None and number < low) or (high is not None and number > high) or number != number:
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
    return asdict(config)
