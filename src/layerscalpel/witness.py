"""The fresh process of a proof: load checkpoints as any user would and compare them with reference logits.

`Witness` starts it and asks; `main` runs in it, reading one JSON task a line and answering with one JSON line each. In
there only transformers is used, nothing of this package, so that it sees just what a user will see. One process may see
many checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from typing import IO, Any, Self


class Witness:
    """A fresh process that loads checkpoints; use as a context manager."""

    def __enter__(self) -> Self:
        """Start the process; it imports transformers while we go on."""
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "layerscalpel.witness"],  # -P: no code from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream:
                with contextlib.suppress(BrokenPipeError):  # a task that a dead process did not read
                    stream.close()

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return what `examine` found, or {"error": reason}."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            if line := self._process.stdout.readline():
                return json.loads(line)
        except BrokenPipeError:
            pass
        self._errors.seek(0)
        last = (self._errors.read().decode(errors="replace").strip().splitlines() or ["it ended without a word"])[-1]
        return {"error": f"{last} (exit code {self._process.wait()})"}


def examine(task: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint in task['folder'] and return what is to be compared.

    Returns:
        logits_equal, max_difference, generation_equal (None if not asked for), parameters, tied, config_equal.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(task["threads"])
    reference = load_file(task["reference"])
    options = {"dtype": getattr(torch, task["dtype"]), "trust_remote_code": task["trust_remote_code"]}
    if task.get("attention"):
        options["attn_implementation"] = task["attention"]
    if task.get("offload"):
        options |= {"device_map": {"": "disk"}, "offload_folder": task["offload"]}
    model: Any = getattr(transformers, task["auto_class"]).from_pretrained(task["folder"], **options).eval()
    if not task.get("offload"):
        model = model.to(task["device"])
    tokens = reference["tokens"].to(task["device"])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.float().cpu()
    found = {
        "logits_equal": torch.equal(logits, reference["logits"]),
        "max_difference": (logits - reference["logits"]).abs().max().item(),
        "generation_equal": None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tied": is_tied(model),
        "config_equal": type(model.config)(**model.config.to_dict()).to_dict() == model.config.to_dict(),
    }
    if task["generate"]:
        model.generation_config = transformers.GenerationConfig()  # greedy, whatever the model's own settings are
        found["generation_equal"] = generates_alike(model, tokens)
    return found


def generates_alike(model: Any, tokens: Any) -> bool:
    """Tell whether the 8 greedy tokens after token ids [B, T] are the same with a cache as without."""
    import torch

    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
    settings["attention_mask"] = torch.ones_like(tokens)
    with torch.no_grad():
        cached, uncached = (model.generate(tokens, use_cache=flag, **settings) for flag in (True, False))
    return torch.equal(cached, uncached)


def is_tied(model: Any) -> bool:
    """Tell whether the output embedding is the input embedding."""
    outputs = model.get_output_embeddings()
    return outputs is not None and outputs.weight is model.get_input_embeddings().weight


def main() -> None:
    """Answer tasks until the input ends; what a model's own code prints goes where errors go."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                answer = examine(json.loads(line))
            except Exception as error:  # whatever transformers raises is the answer
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
