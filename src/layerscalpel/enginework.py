"""Asks one inference engine, in the interpreter that the engine is installed in.

    /envs/vllm/bin/python enginework.py job.json   # writes the file that the job names as "answer"

This file runs as a script wherever an engine lives, so it imports nothing but the engine and what every Python has:
none of this package, and torch only inside the engines that bring it. All engines take token ids, so that they are
asked the same whatever their tokenizer does. A job is plain JSON:

    {"engine", "place", "length", "threads",        what is loaded, for texts of at most so many tokens
     "blocks": [[id]],                              read: the loss of every token, and the likeliest one, in each place
     "prompts": [[id]], "new_tokens": 8,            continued, the likeliest token each time, over ends of the text too
     "timed": {"prompts", "new_tokens", "rounds"},  seconds of each round, after one that warms up
     "texts": [str],                                cut into tokens by the engine's own tokenizer, where it has one
     "answer": file}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Rows = list[list[int]]
Losses = list[list[float]]
MOST_MEMORY = 0.9
"""Share of the device's free memory that vLLM may take."""


class Transformers:
    """AutoModelForCausalLM in the checkpoint's own number format, one sequence at a time or many of one length."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import transformers

        self.torch, self.version = torch, transformers.__version__
        torch.set_num_threads(job["threads"])
        options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": bool(job.get("trust_remote_code"))}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(job["place"], **options)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device).eval()
        self.how = {"dtype": str(self.model.dtype).removeprefix("torch."), "device": self.device}

    def read(self, blocks: Rows) -> tuple[Losses, Rows]:
        """Return the loss of every token but the first, and the likeliest token in each of these places."""
        losses, likeliest = [], []
        for row in blocks:
            with self.torch.inference_mode():
                ids = self.torch.tensor([row], device=self.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            losses.append([-value for value in chosen.tolist()])
            likeliest.append(logits.argmax(-1).tolist())
        return losses, likeliest

    def turn(self, prompts: Rows, count: int) -> tuple[Rows, float, float]:
        """Continue prompts of one length; return the new tokens, seconds to the first ones, seconds of the others."""
        began = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model(input_ids=self.torch.tensor(prompts, device=self.device), use_cache=True)
            tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
            tokens[0].tolist()  # waits for the device
            first = time.perf_counter() - began
            for _ in range(count - 1):
                out = self.model(input_ids=tokens[-1], past_key_values=out.past_key_values, use_cache=True)
                tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
        rows = self.torch.cat(tokens, dim=1).tolist()
        return rows, first, time.perf_counter() - began - first

    def write(self, prompts: Rows, count: int) -> Rows:
        """Continue each prompt."""
        return [self.turn([prompt], count)[0][0] for prompt in prompts]


class Vllm:
    """vLLM's offline class, in the checkpoint's own number format."""

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; on a CPU it would take half of the memory
        import torch
        import vllm  # type: ignore[import-not-found]

        self.vllm, self.version = vllm, getattr(vllm, "__version__", "unknown")
        on_gpu = torch.cuda.is_available()
        free, total = torch.cuda.mem_get_info() if on_gpu else (1, 1)
        self.engine = vllm.LLM(
            model=job["place"],
            max_model_len=job["length"],
            max_num_seqs=max(1, len(job.get("timed", {}).get("prompts", []))),
            enable_prefix_caching=False,  # the same prompt comes again and again
            trust_remote_code=bool(job.get("trust_remote_code")),
            enforce_eager=not on_gpu,  # compiling for a CPU takes longer than all that is asked
            **({"gpu_memory_utilization": MOST_MEMORY * free / total} if on_gpu else {}),
        )
        self.how = {"device": "cuda" if on_gpu else "cpu"}

    def _ask(self, prompts: Rows, **how: Any) -> list[Any]:
        asked = [{"prompt_token_ids": row} for row in prompts]
        how = {"temperature": 0.0, "ignore_eos": True} | how
        return self.engine.generate(asked, self.vllm.SamplingParams(**how), use_tqdm=False)

    def read(self, blocks: Rows) -> tuple[Losses, Rows]:
        """As of `Transformers`."""
        losses, likeliest = [], []
        for row, found in zip(blocks, self._ask(blocks, max_tokens=1, prompt_logprobs=1), strict=True):
            known = found.prompt_logprobs[1:]  # of the first token there is none
            losses.append([-place[token].logprob for place, token in zip(known, row[1:], strict=True)])
            likeliest.append([max(place, key=lambda token: place[token].logprob) for place in known])
        return losses, likeliest

    def turn(self, prompts: Rows, count: int) -> tuple[Rows, float, float]:
        """Ask for one token, then for all of them: what that takes longer is the decoding's."""
        began = time.perf_counter()
        self._ask(prompts, max_tokens=1)
        read = time.perf_counter()
        found = self._ask(prompts, max_tokens=count)
        first, whole = read - began, time.perf_counter() - read
        return [list(row.outputs[0].token_ids) for row in found], first, whole - first

    def write(self, prompts: Rows, count: int) -> Rows:
        """Continue each prompt."""
        return [list(row.outputs[0].token_ids) for row in self._ask(prompts, max_tokens=count)]


class LlamaCpp:
    """llama-cpp-python on a GGUF, one sequence at a time."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self.llama_cpp, self.job, self.version = llama_cpp, job, getattr(llama_cpp, "__version__", "unknown")
        self.how = {"device": "gpu where it is built for one"}
        self.model: Any = None
        self.every: bool | None = None

    def _opened(self, every: bool) -> Any:
        """Return the model, with the logits of every place kept or of the last one only, which costs no time."""
        if self.every is not every:
            self.model, self.every = None, every
            self.model = self.llama_cpp.Llama(
                model_path=self.job["place"],
                n_ctx=self.job["length"],
                n_batch=self.job["length"],
                n_threads=self.job["threads"],
                n_threads_batch=self.job["threads"],
                n_gpu_layers=-1,
                logits_all=every,
                verbose=False,
            )
        return self.model

    def read(self, blocks: Rows) -> tuple[Losses, Rows]:
        """As of `Transformers`."""
        import numpy

        model, losses, likeliest = self._opened(every=True), [], []
        for row in blocks:
            model.reset()
            model.eval(row)
            logits = model.scores[: len(row) - 1].astype(numpy.float64)
            top = logits.max(axis=1)
            total = top + numpy.log(numpy.exp(logits - top[:, None]).sum(axis=1))
            losses.append((total - logits[range(len(row) - 1), row[1:]]).tolist())
            likeliest.append(logits.argmax(axis=1).tolist())
        return losses, likeliest

    def turn(self, prompts: Rows, count: int) -> tuple[Rows, float, float]:
        """Continue one prompt."""
        model, tokens = self._opened(every=False), []
        model.reset()
        began = time.perf_counter()
        model.eval(prompts[0])
        tokens.append(model.sample(temp=0.0))
        first = time.perf_counter() - began
        for _ in range(count - 1):
            model.eval([tokens[-1]])
            tokens.append(model.sample(temp=0.0))
        return [tokens], first, time.perf_counter() - began - first

    def write(self, prompts: Rows, count: int) -> Rows:
        """Continue each prompt."""
        return [self.turn([prompt], count)[0][0] for prompt in prompts]

    def tokens(self, texts: list[str]) -> Rows:
        """Cut texts as the file's own tokenizer does, with nothing put before them."""
        model = self._opened(every=False)
        return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


ENGINES: dict[str, Any] = {"transformers": Transformers, "vllm": Vllm, "llama.cpp": LlamaCpp}


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """Return what the engine says to a job: version, how, and what was asked for."""
    engine = ENGINES[job["engine"]](job)
    found: dict[str, Any] = {"version": engine.version}
    if "blocks" in job:
        found["losses"], found["likeliest"] = engine.read(job["blocks"])
    if "texts" in job and hasattr(engine, "tokens"):
        found["tokens"] = engine.tokens(job["texts"])
    if "prompts" in job:
        found["continued"] = engine.write(job["prompts"], job["new_tokens"])
    if timed := job.get("timed"):
        turns = [engine.turn(timed["prompts"], timed["new_tokens"])[1:] for _ in range(timed["rounds"] + 1)]
        found["turns"] = turns[1:]
    return found | engine.how


def quantised(job: dict[str, Any]) -> dict[str, Any]:
    """Write a GGUF in another type by llama.cpp's own function."""
    import ctypes

    import llama_cpp  # type: ignore[import-not-found]

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = job["ftype"], job["threads"]
    code = llama_cpp.llama_model_quantize(job["place"].encode(), job["quantised"].encode(), ctypes.byref(settings))
    if code:
        sys.exit(f"llama_model_quantize ended with {code}")
    return {"version": getattr(llama_cpp, "__version__", "unknown")}


def main() -> None:
    """Do the job that the first argument names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = quantised(job) if "quantised" in job else answered(job)
    Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
