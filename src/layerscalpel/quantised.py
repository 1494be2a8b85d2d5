"""Checkpoints that are quantised already: by which method, and whether they can be loaded here."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import AutoHfQuantizer

from layerscalpel.errors import UserError, one_line


def quantisation_of(config: Any) -> str | None:
    """Return the method by which the weights are quantised, as a config or its text part says; None if they are not."""
    settings = _settings(config)
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method) or "an unnamed method")


def require_back_end(config: Any, name: str) -> None:
    """Refuse the quantised model of that name if it cannot be loaded here: its cut could not be proven."""
    try:
        AutoHfQuantizer.from_config(_settings(config)).validate_environment()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"model {name} is quantised ({quantisation_of(config)}) and cannot be loaded here to prove its cut:"
            f" {one_line(error)} - install that, or --no-verify"
        ) from error


def _settings(config: Any) -> Any:
    whole, text = (getattr(c, "quantization_config", None) for c in (config, config.get_text_config(decoder=True)))
    return whole or text
