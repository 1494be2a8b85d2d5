"""Every setting of a run as a frozen dataclass: its default, its range and one sentence that says what it does.

The sentence under a field is also its help text on the command line: nothing is described twice. config.py merges
recipes and flags onto these defaults.

    Config().heal.lr  # 0.0005
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SearchName = Literal["clp", "gate", "exact", "pilot", "angular", "influence", "last", "random"]
StitchName = Literal["none", "scalar", "linear", "ridge", "rotation", "auto"]
HealName = Literal["endpoint", "lora", "last", "all", "none"]
SecondName = Literal["none", "endpoint", "lora", "all"]
Objective = Literal["ce", "kl", "both", "seam", "end"]
TeacherName = Literal["hidden", "topk", "online"]
FrozenName = Literal["device", "cpu", "4bit"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16"]
ProofName = Literal["auto", "memory", "parts", "none"]
OffloadName = Literal["none", "cpu", "disk"]
EngineName = Literal["vllm", "llama.cpp"]
AnswersName = Literal["given", "greedy", "sampled"]
QuantizeName = Literal["none", "gptq", "rtn"]
BesideName = Literal["parent_same", "parent8", "parent4", "healed8", "quantized_first"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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
    packed: bool = False
    """Keep the weights of a compressed-tensors parent packed and unpack them at each use: less memory, more time."""

    def permissions(self) -> dict[str, bool]:
        """Return what the checkpoint may do."""
        allowed = {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}
        return allowed | {"allow_quantised": True}


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
    latency_ms: float | None = bounded(None, 0.001)
    """Remove as few layers as bring a generated token to so many milliseconds on this machine."""


@dataclass(frozen=True)
class DataSettings:
    """Text, and the sizes of its disjoint parts."""

    calibration: str = "c4"
    """Text that the search reads: a named source or a .jsonl, .json, .txt or .md file, also with .gz."""
    healing: str = "alpaca"
    """Text or instructions that heal the seam: a named source, a file, or a mix by weight as alpaca=2,c4=1."""
    evaluation: str = "c4"
    """Held-out text that measures the result: a named source, a file, or a mix by weight as c4=1,alpaca=1."""
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
    answers: AnswersName = "given"
    """Who answers the prompts of healing conversations: the data, or the parent itself."""
    answer_tokens: int = bounded(256, 1)
    """Most tokens of an answer that the parent writes; a longer one is cut off there."""


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
    """Repair without training, folded into weights; kept only if it lowers the held-out KL; auto takes the best."""
    ridge: float = bounded(1e-2, 0.0)
    """Ridge of the stitches linear and ridge, as a share of the mean diagonal of their Gram matrix."""


@dataclass(frozen=True)
class HealSettings:
    """Training of the seam."""

    method: HealName = "endpoint"
    """What is trained; endpoint trains only the layers at the seam."""
    objective: Objective = "ce"
    """Loss on the labelled tokens: ce (cross-entropy), kl (to the parent), both, or squared error of hidden states."""
    kl_weight: float = bounded(1.0, 0.0)
    """Weight of the KL in the objective `both`."""
    seam_weight: float = bounded(0.0, 0.0)
    """Weight of the hidden states' relative squared error after the seam, added to any objective."""
    end_weight: float = bounded(0.0, 0.0)
    """Weight of the hidden states' relative squared error after the last layer, added to any objective."""
    width: int = bounded(1, 1)
    """Layers trained on each side of the seam."""
    expand: int = bounded(0, 0, 8)
    """Train each linear layer as a product of two of so many times its rank, multiplied out at the end; 0 leaves it."""
    lora_rank: int = bounded(8, 1)
    """Rank of the adapters of LoRA, on all linear layers."""
    last_layers: int = bounded(3, 1)
    """Layers that the method `last` trains, beside the final norm and the head."""
    lr: float = bounded(5e-4, 1e-8)
    """Peak learning rate of AdamW (the paper does not state its own)."""
    epochs: int = bounded(2, 1)
    """Passes over the healing blocks."""
    second: SecondName = "none"
    """A second phase after the first: what it trains."""
    second_lr: float = bounded(5e-5, 1e-8)
    """Peak learning rate of the second phase."""
    second_epochs: int = bounded(1, 1)
    """Passes over the healing blocks in the second phase."""
    batch_size: int = bounded(16, 1)
    """Blocks per optimiser step."""
    micro_batch_size: int = bounded(4, 1)
    """Blocks per forward and backward; gradients accumulate up to batch_size; halved when memory runs out."""
    warmup_fraction: float = bounded(0.05, 0.0, 1.0)
    """Share of the steps in which the learning rate rises linearly."""
    weight_decay: float = bounded(0.0, 0.0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = bounded(1.0, 1e-6)
    """Gradients are scaled down to this norm."""
    validations: int = bounded(10, 1)
    """How often the held-out loss is measured; the best of these states is kept."""
    separate_documents: bool = True
    """Keep the documents packed into one block apart in attention, where the model allows it."""
    teacher: TeacherName = "hidden"
    """What is kept of the parent: its last hidden states, its top-k probabilities, or nothing (run at every step)."""
    teacher_top_k: int = bounded(64, 1)
    """Probabilities a token that teacher=topk keeps; the rest counts as one."""
    cache_gib: float = bounded(16.0, 0.0)
    """Disk for what frozen layers and the parent compute once; blocks past it are recomputed."""
    cache_dtype: CacheDtype = "auto"
    """Number format of the cached hidden states; auto is the one the model computes in."""
    compile: bool = False
    """Compile the layers that training runs through (torch.compile): slower to start, faster steps on a GPU."""
    checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, a third more time."""
    frozen: FrozenName = "device"
    """Where layers not at work wait: on the device, in host memory, or there while frozen ones run in 4 bit."""
    shard: bool = False
    """Spread the weights of the layers at work over the processes (FSDP2); the others wait in host memory."""


@dataclass(frozen=True)
class QuantizeSettings:
    """Fewer bits a weight, after healing."""

    method: QuantizeName = "none"
    """How the linear layers of the final model are quantised; `scalpel methods` lists the ways."""
    bits: Literal[3, 4, 8] = 4
    """Bits of a quantised weight."""
    group_size: Literal[0, 16, 32, 64, 128, 256] = 0
    """Weights of a row that share a scale; 0 takes the largest of 128, 64, 32 that divides every linear's input."""
    symmetric: bool = True
    """Whether zero lies in the middle of each group's grid; otherwise each group has its own zero."""
    act_order: bool = True
    """Whether gptq begins with the columns that see the largest inputs."""
    damping: tuple[float, ...] = bounded((0.01, 0.05, 0.1), 1e-6, 1.0)
    """What gptq adds to its Hessian, as a share of the mean diagonal; of several the lowest held-out KL wins."""
    head: Literal["keep", "quantize"] = "keep"
    """Whether the output embedding is quantised too; the input embedding never is."""
    seam_bits: Literal[0, 8, 16] = 0
    """Bits of the two layers that meet at the seam: 0 as the rest, 16 leaves them as they are."""
    num_blocks: int = bounded(64, 1)
    """Blocks of the calibration text that gptq reads, at most."""
    beside: tuple[BesideName, ...] = ()
    """Other ways to be small, made and measured beside: parent_same, parent8, parent4, healed8, quantized_first."""
    keep_beside: bool = False
    """Keep the checkpoints of what was measured beside; otherwise their figures alone stay."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Figures on held-out text."""

    batch_size: int = bounded(4, 1)
    """Blocks per forward."""
    sample_tokens: int = bounded(64, 0)
    """New tokens of each generated sample; 0 switches samples off."""
    sample_prompts: int = bounded(16, 1, 16)
    """Prompts that each model continues, each greedily and by lot."""
    context_tokens: int | None = bounded(None, 8)
    """Length of the texts of the long-context check; None is the model's context limit, at most 4,096."""
    long_blocks: int = bounded(4, 0)
    """Texts of the long-context check, perplexity by position; 0 switches it off."""
    tasks: str = "none"
    """Tasks of lm-evaluation-harness: default, offline, offline:NAME, names, groups or task files, comma separated."""
    limit: int | None = bounded(None, 1)
    """Items per task, the first so many; None takes all."""
    fewshot: int | None = bounded(None, 0, 100)
    """Examples before each item of a task; None takes each task's own number."""
    task_batch_size: int | None = bounded(None, 1)
    """Sequences of a task at once; None is 16 on the cpu and 64 elsewhere, halved where memory runs out."""
    task_tokens: int | None = bounded(None, 8)
    """Longest sequence of a task; a longer one loses its beginning. None is the model's context limit."""
    chat_template: bool = False
    """Put the items of tasks into the tokenizer's chat template."""


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
    batch_sizes: tuple[int, ...] = bounded((8,), 1)
    """Numbers of sequences that are timed as well, as 4,16."""
    prompt_lengths: tuple[int, ...] = bounded((), 1)
    """Lengths of the prompt that are timed as well, as 512,2048."""
    graphs: bool = True
    """On a GPU, decode by a CUDA graph over a static cache too; where that works its figures stand in first place."""
    latency: bool = False
    """Fit the milliseconds of a generated token to the number of layers; a target in milliseconds does so anyway."""
    engines: tuple[EngineName, ...] = ()
    """Inference engines that time the checkpoints too, where they are installed: vllm, llama.cpp."""
    engine_python: str = ""
    """The Python that these engines are installed in, where it is another, as /envs/vllm/bin/python."""


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
    quantize: QuantizeSettings = QuantizeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()
    seed: int = bounded(0, 0, 2**31 - 1)
    """Seed of shuffling, random token ids and initialisation."""
