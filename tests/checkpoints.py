"""What the tests of checkpoints share: the fresh process without its five seconds, and ways to damage files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import gguf
import numpy
import torch
from families import VOCAB, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from layerscalpel import witness

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd_llama"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


class SameProcess:
    """Stands in for the fresh process where that is not the point: answers as its `main` does, in this one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = witness.examine(json.loads(json.dumps(task)))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        return json.loads(json.dumps(answer))


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an unsharded checkpoint."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def names(folder: Path) -> list[str]:
    """Return all that lies below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k rows in the order of llama.cpp, whose rotary pairs stand side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """Write a llama as llama.cpp's converter does, with a byte-level BPE tokenizer of single characters."""
    config, stored = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<end>", "Ġ", *map(chr, range(33, 126)), "on", "er"])
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * 96])
    writer.add_token_merges(["o n", "e r"])  # a list of one comes back as a text in some releases
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in stored.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy().astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_remote(folder: Path, code: str = "", **changes: object) -> Path:
    """Save a tiny llama whose config and model are classes that come with it; `code` runs when they are imported."""
    tiny("llama", **changes).save_pretrained(folder)
    (folder / "odd.py").write_text(f"{REMOTE}\n{code}\n", encoding="utf-8")
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    edit_json(folder / "config.json", model_type="odd_llama", architectures=["OddForCausalLM"], auto_map=auto_map)
    return folder
