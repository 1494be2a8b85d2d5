"""A model whose layers stay on disk computes what it computes in memory, and holds two layers at most."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import SINGLE, edit_weights, write_gguf
from families import VOCAB, multimodal, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedModel, RwkvConfig, RwkvForCausalLM, ZambaConfig, ZambaForCausalLM
from world import write_model

from layerscalpel import feed as feed_module
from layerscalpel import offload as offload_module
from layerscalpel import reader as reader_module
from layerscalpel.decoder import load_origin
from layerscalpel.errors import UserError
from layerscalpel.feed import LayerFeed
from layerscalpel.hooks import head_logits, hidden_at, visit_layer
from layerscalpel.layers import Decoder, all_tensors, device_of
from layerscalpel.offload import offloaded_decoder
from layerscalpel.origin import Origin, peek, skeleton
from layerscalpel.probe import find_layers
from layerscalpel.reader import FORMATS, Part, Reader
from layerscalpel.shards import read_weights

CPU = torch.device("cpu")
slow = partial(pytest.param, marks=pytest.mark.slow)
FAMILIES = ["llama", "qwen2", "gemma3_text", "gpt2", "qwen3_moe", "deepseek_v3", "bamba"]
"""Untied, with biases, tied, transposed and tied, experts, buffers in the files, a state space between attention."""
SLOW_FAMILIES = ("qwen2", "deepseek_v3", "gpt2", "qwen3_moe")
"""The last two are of every day in bfloat16."""
SHARDED = "40KB"
"""Makes several files of a tiny model."""


def save(folder: Path, model: PreTrainedModel, shards: str = SHARDED) -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A llama of 8 layers in several files."""
    return save(tmp_path_factory.mktemp("sharded"), tiny("llama"))


def offloaded(folder: Path, **options: str) -> Decoder:
    return offloaded_decoder(peek(str(folder)), device="cpu", **options)[1]  # type: ignore[arg-type]


def feed_of(decoder: Decoder) -> LayerFeed:
    assert isinstance(decoder.resident, LayerFeed)
    return decoder.resident


@torch.no_grad()
def one_by_one(decoder: Decoder) -> list[torch.Tensor]:
    """Return the hidden states at all boundaries and the logits, of one layer after the other."""
    hidden = [hidden_at(decoder, tokens(), 0)]
    for i in feed_of(decoder)():
        hidden.append(visit_layer(decoder, i, tokens(), hidden[-1], lambda *_: None))
    return [*hidden, head_logits(decoder, hidden[-1])]


@torch.no_grad()
def in_memory(model: PreTrainedModel) -> list[torch.Tensor]:
    """Return the hidden states at all boundaries and the logits, of the model's own forward."""
    decoder = find_layers(model)
    hidden = [hidden_at(decoder, tokens(), boundary) for boundary in range(len(decoder) + 1)]
    return [*hidden, model(input_ids=tokens(), use_cache=False).logits]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def present(decoder: Decoder) -> list[int]:
    """Return the layers that have weights."""
    return [i for i, layer in enumerate(decoder.layers) if any(not p.is_meta for p in layer.parameters())]


# ---------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(
    ("family", "stored", "dtype"),
    [
        *((slow if family in SLOW_FAMILIES else pytest.param)(family, "float32", "float32") for family in FAMILIES),
        ("gpt2", "bfloat16", "bfloat16"),
        ("qwen3_moe", "bfloat16", "float32"),
        slow("gpt2", "bfloat16", "float32"),
        slow("qwen3_moe", "bfloat16", "bfloat16"),
    ],
)
def test_layers_one_by_one_compute_what_the_whole_model_computes(tmp_path, family, stored, dtype):
    origin = peek(str(save(tmp_path, tiny(family).to(getattr(torch, stored)))))
    whole = load_origin(origin, device="cpu", dtype=dtype).model
    (model, _, _), decoder = offloaded_decoder(origin, device="cpu", dtype=dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert equal(one_by_one(decoder), in_memory(whole))
    assert device_of(model) == CPU
    assert not model.training


@pytest.mark.parametrize(
    "build", [partial(tiny, "gemma3_text"), partial(tiny, "gpt2"), partial(tiny, "bloom"), multimodal]
)
def test_all_but_the_layers_is_as_transformers_loads_it(tmp_path, build):
    origin = peek(str(save(tmp_path, build())))
    whole = load_origin(origin, device="cpu", dtype="bfloat16").model
    (model, _, _), decoder = offloaded_decoder(origin, device="cpu", dtype="bfloat16")
    expected, found = all_tensors(whole), all_tensors(model)
    assert found.keys() == expected.keys()
    absent = {name for name, tensor in found.items() if tensor.is_meta}
    assert absent == {name for name, _ in whole.named_parameters() if name.startswith(f"{decoder.path}.")}
    for name in found.keys() - absent:  # buffers that no file holds are among them
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])
    assert model.config._attn_implementation == whole.config._attn_implementation
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    known, learnt = find_layers(whole), decoder
    assert (learnt.returns, learnt.hidden_dims) == (known.returns, known.hidden_dims)
    assert (learnt.per_row, learnt.seen, learnt.path) == (known.per_row, known.seen, known.path)


def test_the_tokenizer_comes_with_it(tmp_path):
    (_, tokenizer, origin), _ = offloaded_decoder(peek(str(write_model(tmp_path / "model"))), device="cpu")
    assert tokenizer("by")["input_ids"]
    assert origin.num_layers == 8


def test_weights_can_be_others_than_the_files_have(sharded):
    """As in a measurement that has all layers be the first, so that a large model fits a small disk."""
    weights = read_weights(sharded)
    first = {name: tensor for name, tensor in weights.tensors.items() if ".layers.0." in name}
    outside = {name: tensor for name, tensor in weights.tensors.items() if ".layers." not in name}
    alike = {name.replace(".layers.0.", f".layers.{i}."): tensor for i in range(8) for name, tensor in first.items()}
    _, decoder = offloaded_decoder(peek(str(sharded)), device="cpu", weights=replace(weights, tensors=outside | alike))
    expected = tiny("llama").model.layers[0].state_dict()
    for i in feed_of(decoder)():
        assert all(torch.equal(tensor, expected[name]) for name, tensor in decoder.layers[i].state_dict().items())


def test_what_the_model_does_not_take_is_not_read(tmp_path, monkeypatch):
    save(tmp_path, tiny("llama"), "1GB")
    extra = {"model.layers.8.mlp.up_proj.weight": torch.randn(48, 32), "mtp.layers.0.fc.weight": torch.randn(9, 9)}
    edit_weights(tmp_path, lambda tensors: tensors.update(extra))
    places = {tensor.begin for name, tensor in read_weights(tmp_path).tensors.items() if name in extra}
    reads = count_reads(monkeypatch)
    decoder = offloaded(tmp_path)
    assert equal(one_by_one(decoder), in_memory(tiny("llama")))
    assert len(places) == 2
    assert not places & {begin for _, begin in reads}


# ---------------------------------------------------------------------------------------------- memory


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """Return a list that gets (file, first byte) of every read from now on."""
    reads = []

    def read(buffer: torch.Tensor, file: Path, begin: int) -> None:
        reads.append((file, begin))
        original(buffer, file, begin)

    original = reader_module.read_into
    monkeypatch.setattr(reader_module, "read_into", read)
    return reads


def count_buffers(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Return the bytes of all host buffers made from now on that are still held, by a number of their own."""
    live: dict[int, int] = {}

    def make(num_bytes: int, device: torch.device) -> torch.Tensor:
        buffer = original(num_bytes, device)
        number = time.perf_counter_ns()
        live[number] = num_bytes
        weakref.finalize(buffer.untyped_storage(), live.pop, number)
        return buffer

    original = reader_module.host_buffer
    monkeypatch.setattr(reader_module, "host_buffer", make)
    return live


def test_one_layer_is_there_at_a_time_and_two_buffers(sharded, monkeypatch):
    decoder = offloaded(sharded)
    absent = {name: tensor for name, tensor in all_tensors(decoder.model).items() if tensor.is_meta}
    live = count_buffers(monkeypatch)
    assert present(decoder) == []
    for i in feed_of(decoder)():
        assert present(decoder) == [i]
        assert len(live) <= 2
    assert present(decoder) == []
    assert not live
    found = all_tensors(decoder.model)
    assert all(found[name] is tensor for name, tensor in absent.items())


def test_buffers_of_the_layers_stay(tmp_path):
    decoder = offloaded(save(tmp_path, tiny("gpt_neo")))
    known = dict(decoder.layers.named_buffers())
    assert known
    assert not any(buffer.is_meta for buffer in known.values())
    for _ in feed_of(decoder)():
        assert all(buffer is known[name] for name, buffer in decoder.layers.named_buffers())


@pytest.mark.parametrize(("keep", "times"), [("cpu", 1), ("disk", 3)])
def test_every_pass_is_the_same_and_files_are_read_as_often_as_said(sharded, monkeypatch, keep, times):
    decoder = offloaded(sharded, keep=keep)
    reads, live = count_reads(monkeypatch), count_buffers(monkeypatch)
    passes = [one_by_one(decoder) for _ in range(3)]
    assert equal(passes[0], in_memory(tiny("llama")))
    assert equal(passes[0], passes[1])
    assert equal(passes[0], passes[2])
    inside = {(t.file, t.begin) for name, t in read_weights(sharded).tensors.items() if ".layers." in name}
    assert set(reads) == inside
    assert len(reads) == times * len(inside)
    assert sum(live.values()) == (sum(p.buffer_bytes for p in feed_of(decoder)._parts) if keep == "cpu" else 0)


def test_bytes_per_pass_are_those_of_the_layers(sharded):
    stored = read_weights(sharded).tensors.items()
    assert feed_of(offloaded(sharded)).num_bytes == sum(t.num_bytes for name, t in stored if ".layers." in name)


@pytest.mark.parametrize(
    ("keep", "how"),
    [
        ("cpu", "closed"),
        ("disk", "dropped"),
        ("cpu", "left open"),
        ("disk", "left open"),
        slow("disk", "closed"),
        slow("cpu", "dropped"),
    ],
)
def test_a_pass_may_be_abandoned(sharded, monkeypatch, how, keep):
    decoder = offloaded(sharded, keep=keep)
    live = count_buffers(monkeypatch)
    turns = feed_of(decoder)()
    assert [next(turns) for _ in range(3)] == [0, 1, 2]
    if how == "closed":
        turns.close()  # type: ignore[attr-defined]
    if how == "dropped":
        del turns
    if how != "left open":
        assert present(decoder) == []
        assert len(live) == (3 if keep == "cpu" else 0)
    assert equal(one_by_one(decoder), in_memory(tiny("llama")))
    if how == "left open":
        with pytest.raises(RuntimeError, match="another pass over the layers began"):
            next(turns)


def test_the_time_waited_for_weights_is_told(sharded, monkeypatch):
    decoder = offloaded(sharded)

    def slow(buffer: torch.Tensor, file: Path, begin: int) -> None:
        time.sleep(0.01)
        original(buffer, file, begin)

    original = reader_module.read_into
    monkeypatch.setattr(reader_module, "read_into", slow)
    list(feed_of(decoder)())
    assert feed_of(decoder).seconds_waited > 8 * 0.01


def test_the_time_to_compute_is_no_waiting(sharded, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(feed_module.time, "perf_counter", lambda: clock[0])
    decoder = offloaded(sharded)
    for _ in feed_of(decoder)():
        clock[0] += 1
    assert feed_of(decoder).seconds_waited == 0
    assert clock == [8]


MEASURE = """
import re, sys
import torch
import layerscalpel.offload as offload
from layerscalpel.hooks import head_logits, hidden_at, visit_layer
from layerscalpel.origin import peek
from transformers import LlamaForCausalLM

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

before = kilobytes("VmRSS")
with torch.no_grad():
    _, decoder = offload.offloaded_decoder(peek(sys.argv[1]), device="cpu", dtype="float32")
    tokens = torch.arange(16)[None]
    hidden = hidden_at(decoder, tokens, 0)
    for i in decoder.resident():
        hidden = visit_layer(decoder, i, tokens, hidden, lambda *_: None)
    assert head_logits(decoder, hidden).isfinite().all()
print((kilobytes("VmHWM") - before) * 1024, decoder.resident.num_bytes)
"""


def write_large(folder: Path, num_layers: int) -> Path:
    """Write a llama of 8 MB a layer in bfloat16, one layer a file; all have the numbers of the first."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=num_layers, architectures=["LlamaForCausalLM"], **sizes)
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in skeleton(config).state_dict().items()}
    kept = [name for name in shapes if ".layers." not in name or ".layers.0." in name]
    numbers = {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in kept}
    index = {}
    for i in range(num_layers):
        file = f"model-{i + 1:05}-of-{num_layers:05}.safetensors"
        here = {n.replace(".layers.0.", f".layers.{i}."): t for n, t in numbers.items() if i == 0 or ".layers." in n}
        save_file(here, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(here, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.slow
def test_a_pass_takes_a_fraction_of_the_memory_of_the_weights(tmp_path):
    """Of 28 layers two as they are stored and one in float32 are a seventh; the rest is what else a process takes."""
    command = [sys.executable, "-c", MEASURE, str(write_large(tmp_path, 28))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, weights = map(int, done.stdout.split())
    assert weights > 200 << 20
    assert peak < weights / 2


# ---------------------------------------------------------------------------------------------- reading


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("piece_bytes", [7, 1 << 24])
def test_every_format_is_read_bit_for_bit(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(reader_module, "PIECE_BYTES", piece_bytes)
    shapes = [(3, 5), (), (0, 2), (129,)]
    known = {f"{n}{i}": random_bytes(shape, d, i) for n, d in FORMATS.items() for i, shape in enumerate(shapes)}
    save_file(known, tmp_path / SINGLE)
    part, reader = Part(read_weights(tmp_path).tensors), Reader(CPU)
    buffer = reader.received(reader.send_for(part, lambda: reader.buffer(part.buffer_bytes))).place
    found = part.views(buffer)
    assert found.keys() == known.keys()
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (known[name].dtype, known[name].shape)
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, known[name])))
        assert tensor.data_ptr() % reader_module.ALIGNMENT == 0 or not tensor.numel()
    assert part.num_bytes() == sum(tensor.nbytes for tensor in known.values())


def damage_length(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3000])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_length, r"file .* ends too early - it was changed while it was read"),
        (Path.unlink, r"file .* cannot be read: No such file or directory - "),
    ],
)
def test_a_file_that_changes_between_the_passes_is_told_and_a_mended_one_read(sharded, tmp_path, damage, said):
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    decoder = offloaded(tmp_path)
    expected = one_by_one(decoder)
    last = next(t.file for name, t in read_weights(tmp_path).tensors.items() if ".layers.4." in name)
    damage(last)
    with pytest.raises(UserError, match=said):
        one_by_one(decoder)
    assert present(decoder) == []
    last.write_bytes((sharded / last.name).read_bytes())
    assert equal(one_by_one(decoder), expected)


# ---------------------------------------------------------------------------------------------- refusals


def pop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def narrow(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


UP, EXPERT = "model.layers.5.mlp.up_proj.weight", "model.layers.5.mlp.experts.2.up_proj.weight"


LACKING = pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", pop(UP), rf"lacks 1 tensors of the right shape \({UP}\) - fetch it again"),
        ("llama", narrow(UP), rf"lacks 1 tensors of the right shape \({UP}\) - fetch it again"),
        ("llama", pop("model.norm.weight"), r"lacks 1 tensors of the right shape \(model\.norm\.weight\)"),
        ("llama", pop("lm_head.weight"), r"lacks 1 tensors of the right shape \(lm_head\.weight\)"),
        ("qwen3_moe", pop(EXPERT), r"cannot be loaded: its tensors cannot be put together - fetch it again"),
    ],
)


@LACKING
def test_files_that_lack_a_tensor_are_refused_at_once(tmp_path, family, change, said):
    save(tmp_path, tiny(family), "1GB")
    edit_weights(tmp_path, change)
    with pytest.raises(UserError, match=said):
        offloaded(tmp_path)


@LACKING
def test_given_tensors_that_do_not_suffice_are_refused_when_they_are_needed(tmp_path, family, change, said):
    save(tmp_path, tiny(family), "1GB")
    edit_weights(tmp_path, change)
    weights = read_weights(tmp_path)
    with pytest.raises(UserError, match=said):
        list(feed_of(offloaded_decoder(peek(str(tmp_path)), device="cpu", weights=weights)[1])())


def test_a_head_that_only_files_untie_is_kept_and_a_missing_embedding_taken_from_it(tmp_path):
    save(tmp_path, tiny("gpt2"), "1GB")
    name = next(iter(load_file(tmp_path / SINGLE)))
    assert name.startswith("transformer.")
    edit_weights(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    decoder = offloaded(tmp_path)
    assert equal(one_by_one(decoder), in_memory(tiny("gpt2")))


def origin_of(tmp_path: Path, **changes: object) -> Origin:
    return replace(peek(str(save(tmp_path, tiny("llama")))), **changes)  # type: ignore[arg-type]


def test_other_kinds_of_model_are_refused(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny("llama"))
    for origin, what in (
        (peek(str(tmp_path / "model.gguf")), "a GGUF"),
        (origin_of(tmp_path / "a", pickled=True), "pickled"),
        (origin_of(tmp_path / "b", quantised="gptq"), "quantised"),
    ):
        with pytest.raises(UserError, match=rf"is {what}: its layers cannot be left on disk - allowed: .* --offload"):
            offloaded_decoder(origin, device="cpu")


def rwkv() -> PreTrainedModel:
    return RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=8, context_length=64)).eval()


def zamba() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "mamba_dt_rank": 4}
    kinds = ["mamba", "hybrid"] * 4
    config = ZambaConfig(
        vocab_size=VOCAB, num_hidden_layers=8, layers_block_type=kinds, use_mamba_kernels=False, **sizes
    )
    return ZambaForCausalLM(config).eval()


def test_layers_that_share_weights_are_refused(tmp_path):
    origin = peek(str(save(tmp_path, zamba())))
    said = r"layers of ZambaForCausalLM share weights \(model\.layers\.\d.* and model\..*\), so that none can be left"
    with pytest.raises(UserError, match=said):
        offloaded_decoder(origin, device="cpu")


def test_layers_that_the_model_comes_between_are_known_by_the_twin(tmp_path):
    decoder = offloaded(save(tmp_path, rwkv()))
    assert decoder.entangled == find_layers(rwkv()).entangled
    with pytest.raises(UserError, match=r"layers of RwkvForCausalLM .* but not searched"):
        hidden_at(decoder, tokens(), 0)


def test_a_family_without_a_twin_is_refused(sharded, monkeypatch):
    def refuse(_config: object) -> None:
        raise UserError("a tiny twin of X cannot be built: sizes - prove the cut on the model itself")

    monkeypatch.setattr(offload_module, "twin_model", refuse)
    with pytest.raises(
        UserError, match=r"cannot be left on disk: a tiny twin of X cannot be built: sizes - do without"
    ):
        offloaded(sharded)


def test_a_format_that_is_none_of_ours_is_refused(tmp_path):
    weights = read_weights(save(tmp_path, tiny("llama")))
    odd = {name: replace(t, dtype="F4" if name == UP else t.dtype) for name, t in weights.tensors.items()}
    with pytest.raises(UserError, match=rf"tensor {UP} of .* is stored as F4 - allowed: F64, .* - load and save"):
        offloaded_decoder(peek(str(tmp_path)), device="cpu", weights=replace(weights, tensors=odd))


# ---------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["cpu", "disk"])
def test_on_a_gpu_too(tmp_path, family, keep):
    origin = peek(str(save(tmp_path, tiny(family))))
    (_, _, _), decoder = offloaded_decoder(origin, device="cuda", dtype="float32", keep=keep)
    whole = find_layers(load_origin(origin, device="cuda", dtype="float32").model)
    ids = tokens().cuda()
    with torch.no_grad():
        for _ in range(2):
            hidden = hidden_at(decoder, ids, 0)
            for i in feed_of(decoder)():
                assert present(decoder) == [i]
                hidden = visit_layer(decoder, i, ids, hidden, lambda *_: None)
            torch.testing.assert_close(hidden, hidden_at(whole, ids, len(whole)))


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["cpu", "disk"])
def test_a_gpu_holds_two_layers_at_most(tmp_path, keep):
    origin = peek(str(write_large(tmp_path, 20)))
    _, decoder = offloaded_decoder(origin, device="cuda", dtype="bfloat16", keep=keep)
    layer = feed_of(decoder).num_bytes / len(decoder)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for i in feed_of(decoder)():
        assert all(p.is_cuda for p in decoder.layers[i].parameters())
    assert torch.cuda.max_memory_allocated() - before < 2.05 * layer
    assert torch.cuda.memory_allocated() == before
