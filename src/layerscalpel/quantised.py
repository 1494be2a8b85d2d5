"""Checkpoints that are quantised already: by which method, and what can be done with them here.

Whole layers of any of them can be cut. Those of compressed-tensors that quantise the weights of linear layers alone,
and those of bitsandbytes in 4 bit, can be searched and healed, too.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers import AutoHfQuantizer

from layerscalpel.errors import UserError, one_line

ALLOWED = "compressed-tensors of weights alone, or bitsandbytes in 4 bit"
EXTRAS = {"compressed-tensors": "quant"}
"""{method: the extra of this package that brings its library}."""
MORE_THAN_WEIGHTS = ("input_activations", "output_activations")


def quantisation_of(config: Any) -> str | None:
    """Return the method by which the weights are quantised, as a config or its text part says; None if they are not."""
    settings = _settings(config)
    if not settings:
        return None
    method = _plain(settings).get("quant_method")
    return str(getattr(method, "value", method) or "an unnamed method")


def why_not_run(config: Any) -> str:
    """Return why a quantised model cannot be searched and healed, only cut; nothing if it can, or is not quantised."""
    method, settings = quantisation_of(config), _plain(_settings(config) or {})
    if method is None or (method == "bitsandbytes" and settings.get("load_in_4bit")):
        return ""
    if method == "bitsandbytes":
        return "bitsandbytes in 8 bit multiplies rounded activations"
    if method != "compressed-tensors":
        return f"{method} has layers of its own"
    groups = settings.get("config_groups") or {}
    rounded = any(_plain(group).get(what) for group in groups.values() for what in MORE_THAN_WEIGHTS)
    if rounded or settings.get("kv_cache_scheme"):
        return "it quantises activations, too"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "it turns hidden states (transform_config)"
    if settings.get("quantization_status") not in (None, "compressed"):
        return f"its weights are not packed (quantization_status={settings['quantization_status']})"
    return ""


def unpacked_on_loading(config: Any) -> bool:
    """Tell whether compressed-tensors is to unpack the weights as it reads them."""
    return bool(_plain(_settings(config) or {}).get("dequantize"))


def require_runnable(config: Any, name: str) -> None:
    """Refuse a quantised model that cannot be searched and healed, or not be loaded here."""
    if reason := why_not_run(config):
        raise UserError(
            f"model {name} is already quantised ({quantisation_of(config)}): {reason}, so it can only be cut at a"
            f" given segment (scalpel cut) - allowed: {ALLOWED}; or search and heal the unquantised checkpoint,"
            " quantise after"
        )
    if quantisation_of(config):
        require_back_end(config, name, "here", "install that")


def require_back_end(
    config: Any, name: str, purpose: str = "here to prove its cut", cure: str = "install that, or --no-verify"
) -> None:
    """Refuse the quantised model of that name if it cannot be loaded here: its cut could not be proven."""
    try:
        AutoHfQuantizer.from_config(_settings(config)).validate_environment()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(not_loaded(config, name, error, purpose, cure)) from error


def not_loaded(config: Any, name: str, error: Exception, purpose: str = "here", cure: str = "install that") -> str:
    """Return why the quantised model of that name cannot be loaded, and what to install, by its extra if it has one."""
    method = quantisation_of(config)
    if isinstance(error, ImportError) and method in EXTRAS:
        cure = cure.replace("install that", f"pip install layerscalpel[{EXTRAS[method]}]")
    return f"model {name} is quantised ({method}) and cannot be loaded {purpose}: {one_line(error)} - {cure}"


def _settings(config: Any) -> Any:
    whole, text = (getattr(c, "quantization_config", None) for c in (config, config.get_text_config(decoder=True)))
    return whole or text


def _plain(settings: Any) -> dict[str, Any]:
    return settings if isinstance(settings, dict) else settings.to_dict()
