"""The part of benchmarks/quantise.py on the real model: makes each model of the plan and measures it.

Dimensions: N blocks, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Row, blocks_of, seconds
from quantise_sizes import QuantiseSizes, Trial
from torch import Tensor, nn
from torch.nn import functional

from layerscalpel.checkpoint import cut_checkpoint
from layerscalpel.data import TokenBlocks
from layerscalpel.decoder import load_decoder, save_decoder
from layerscalpel.evaluate import Reference, final_hidden, token_figures
from layerscalpel.footprint import folder_bytes
from layerscalpel.layers import Decoder
from layerscalpel.origin import peek
from layerscalpel.probe import find_layers
from layerscalpel.quantize import BACKENDS
from layerscalpel.scheme import Scheme, bare_model
from layerscalpel.segment import Segment
from layerscalpel.settings import QuantizeSettings

C4, WIKITEXT = "calib/c4_full_docs.jsonl.gz", "lm/wikitext2_raw_test.txt"


@dataclass(frozen=True)
class Texts:
    """What models read."""

    calibration_NT: Tensor
    c4: TokenBlocks
    """Held out."""
    wikitext: TokenBlocks


class Bench:
    """The models that all others are made from, and the text."""

    def __init__(self, model: str, healed: Path, segment: str, data: Path, work: Path, sizes: QuantiseSizes) -> None:
        self.sizes, self.work = sizes, work
        loaded = load_decoder(model, device="cpu", dtype="float32")
        start, stop = map(int, segment.split(":"))
        self.segment = Segment(start, stop, len(find_layers(loaded.model)))
        self.folders = {"parent": work / "parent", "healed": healed, "cut": work / "cut"}
        if not self.folders["parent"].exists():
            save_decoder(loaded.model, loaded.tokenizer, self.folders["parent"], dtype=loaded.origin.dtype)
        if not self.folders["cut"].exists():
            cut_checkpoint(peek(str(self.folders["parent"])), self.segment, self.folders["cut"], proof="none")
        self.texts = _texts(loaded.tokenizer, data, sizes)
        self.references = {name: self._reference(self.folders[name]) for name in ("parent", "healed")}

    def row(self, trial: Trial) -> Row:
        """Make the model of a trial and measure it."""
        folder, found = self._made(trial)
        decoder = _opened(folder)
        found |= {"bytes": folder_bytes(folder), "layers": len(decoder)}
        c4, wikitext = self.texts.c4, self.texts.wikitext
        hidden_NTD = final_hidden(decoder, c4.tokens, batch_size=4)
        for name, reference in self.references.items():
            figures = token_figures(decoder, c4, reference, hidden_NTD)
            found[f"kl_to_{name}_nats"] = figures.kl_NT.mean(1).tolist()
            found["c4_nll_nats"] = (figures.nll_NT.sum(1) / figures.labelled_N).tolist()
        windows = token_figures(decoder, wikitext, None, batch_size=1)
        found["wikitext_nll_nats"] = (windows.nll_NT.sum(1) / windows.labelled_N).tolist()
        found |= {"c4_targets": int(c4.labelled[:, 1:].sum()), "wikitext_targets": int(wikitext.labelled[:, 1:].sum())}
        if trial.base == "healed" and trial.method != "none":
            found["errors"] = self._errors(decoder)
        return found

    def _made(self, trial: Trial) -> tuple[Path, Row]:
        """Return the folder of a trial's model, and how it was made."""
        base = "parent" if trial.base == "quantised parent" else trial.base
        if trial.method == "none":
            return self.folders[base], {"base": base, "method": "none"}
        settings = QuantizeSettings(method=trial.method, **({"damping": (0.01,)} | trial.settings))
        seams = [] if base == "parent" else [self.segment.start]
        scheme = Scheme.of(bare_model(self.folders[base]), settings, seams)
        folder = self.work / "_".join(["parent" if base == "parent" else trial.base, trial.method, *_words(settings)])
        took_s = None
        if trial.base != "quantised parent" or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            write = functools.partial(
                BACKENDS[trial.method].write, self.folders[base], folder, self.texts.calibration_NT, scheme
            )
            took_s = seconds(write)[1]
        found = {"base": base, "method": trial.method, "write_s": took_s, **trial.settings, **scheme.counts()}
        if trial.base == "quantised parent":
            whole, folder = folder, folder.with_name(f"{folder.name}_cut")
            shutil.rmtree(folder, ignore_errors=True)
            cut_checkpoint(peek(str(whole), allow_quantised=True), self.segment, folder, proof="none")
        return folder, found

    def _reference(self, folder: Path) -> Reference:
        decoder = _opened(folder)
        return Reference(decoder, final_hidden(decoder, self.texts.c4.tokens, batch_size=4))

    @torch.no_grad()
    def _errors(self, decoder: Decoder) -> dict[str, dict[str, float]]:
        """Return the relative errors of weights and of outputs on the healed model's inputs, healed layers apart.

        Each is the root of the sum of squares over all linear layers of a kind, over that of what is meant.
        """
        healed = self.references["healed"].decoder
        beside = {healed.layers[i] for i in (self.segment.start - 1, self.segment.start) if 0 <= i < len(healed)}
        sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in ("healed", "untouched")}
        hooks = []
        for layer, other in zip(healed.layers, decoder.layers, strict=True):
            linears = dict(other.named_modules())
            total = sums["healed" if layer in beside else "untouched"]
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    hooks.append(module.register_forward_hook(_adding(total, linears[name].weight)))
        try:
            healed.model(input_ids=self.texts.c4.tokens[: self.sizes.error_blocks], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            kind: {"weight_error": (a / b).sqrt().item(), "output_error": (c / d).sqrt().item()}
            for kind, (a, b, c, d) in sums.items()
        }


def _adding(total: Tensor, weight_RC: Tensor) -> Callable[..., None]:
    """Return a hook that adds the squares of a linear layer's errors and of what is meant."""

    def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        wrong = module.weight - weight_RC
        for place, tensor in enumerate((wrong, module.weight, functional.linear(inputs[0], wrong), output)):
            total[place] += tensor.double().square().sum()

    return add


def _opened(folder: Path) -> Decoder:
    return find_layers(load_decoder(str(folder), device="cpu", dtype="float32", allow_quantised=True).model)


def _words(settings: QuantizeSettings) -> list[str]:
    named = (settings.bits, settings.group_size, settings.symmetric, settings.act_order, settings.damping[0])
    return [str(item) for item in (*named, settings.seam_bits)]


def _texts(tokenizer: Any, data: Path, sizes: QuantiseSizes) -> Texts:
    """Return the calibration text, and what is held out."""
    count, length = sizes.calibration
    wanted = {"block_tokens": length, "num_calibration": count, "evaluation_blocks": sizes.held_out_blocks}
    parts = blocks_of(tokenizer, str(data / C4), str(data / C4), sizes=wanted, seed=0)
    ids = tokenizer((data / WIKITEXT).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    size = sizes.windows * sizes.window_tokens
    windows_NT = torch.tensor(ids[:size]).view(sizes.windows, sizes.window_tokens)
    wikitext = TokenBlocks(windows_NT, torch.ones_like(windows_NT, dtype=torch.bool), "wikitext", 1, {})
    return Texts(parts.calibration.tokens, parts.evaluation, wikitext)
