"""What cannot be done to a parent whose weights are quantised already, told by name before they are read.

Its packed numbers stay what they are. So a method that changes weights it cannot store packed again is refused: a
stitch, adapters on all layers, training of all layers.

    require_fit_for_quantised(config, origin, ["search", "cut", "heal"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from layerscalpel.errors import UserError
from layerscalpel.origin import Origin
from layerscalpel.quantised import require_runnable, unpacked_on_loading
from layerscalpel.settings import Config

TRAINED = {
    "all": "trains every layer, so that nothing stays quantised",
    "lora": "merges its adapters into every layer, so that nothing stays quantised",
}


def require_fit_for_quantised(config: Config, origin: Origin, wanted: Sequence[str]) -> None:
    """Refuse settings that a quantised parent does not go with, and `packed` where nothing is.

    Raises:
        UserError: all findings at once.
    """
    if not origin.quantised:
        if config.model.packed:
            raise UserError(f"model.packed=true has no effect: {origin.name} is not quantised - leave it out")
        return
    require_runnable(origin.config, origin.name)
    if findings := list(_findings(config, origin, wanted)):
        where = f"model {origin.name} is quantised ({origin.quantised}): "
        raise UserError("\n".join(where + finding for finding in findings))


def _findings(config: Config, origin: Origin, wanted: Sequence[str]) -> Iterator[str]:
    model = config.model
    if model.offload != "none":
        yield f"--offload {model.offload} reads plain weights - leave it out" + _instead(origin)
    if model.packed and origin.quantised != "compressed-tensors":
        yield f"model.packed=true has no effect, {origin.quantised} keeps its weights packed anyway - leave it out"
    elif model.packed and unpacked_on_loading(origin.config):
        yield "model.packed=true has no effect where its config.json says dequantize - leave out one of them"
    if config.search.method == "pilot" and config.target.segment is None:
        yield "search.method=pilot cuts plain weights in memory - allowed: clp, gate, exact, or --segment"
    if "stitch" in wanted and config.stitch.method != "none":
        stitch = config.stitch.method
        yield f"stitch.method={stitch} changes weights that are packed - allowed: none, as in --recipe paper"
    if "heal" in wanted and config.heal.method != "none":
        yield from _of_healing(config, origin)


def _of_healing(config: Config, origin: Origin) -> Iterator[str]:
    heal = config.heal
    for key, method in (("heal.method", heal.method), ("heal.second", heal.second)):
        if method in TRAINED:
            yield f"{key}={method} {TRAINED[method]} - allowed: endpoint, last, none, as in --recipe paper"
    if heal.shard:
        yield "heal.shard spreads plain weights - leave it out"
    if heal.frozen == "4bit":
        yield "heal.frozen=4bit would round its weights a second time - allowed: device" + _instead(origin)
    elif heal.frozen != "device" and origin.quantised == "bitsandbytes":
        yield f"heal.frozen={heal.frozen} cannot set bitsandbytes' layers aside - allowed: device"
    if heal.compile and config.model.packed:
        yield "heal.compile takes no layers that are unpacked at each use - allowed: one of it and model.packed"


def _instead(origin: Origin) -> str:
    return "; model.packed=true takes less memory" if origin.quantised == "compressed-tensors" else ""
