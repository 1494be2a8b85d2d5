"""Tiny seeded random models of many families: hidden 32, 6 layers or more, a vocabulary of 97."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedModel

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2}

FAMILIES: dict[str, dict] = {
    "llama": COMMON,
    "mistral": COMMON | {"sliding_window": 6},
    "qwen2": COMMON | SLIDING | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": COMMON | {"head_dim": 8},
    "gemma2": COMMON | SLIDING | {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": COMMON | SLIDING | {"head_dim": 8, "sliding_window": 6},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 128, **TOKENS},
    "gpt_neox": COMMON,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
        **TOKENS,
    },
    "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 8, "n_head": 4, **TOKENS},
    "phi3": COMMON,
    "olmo2": COMMON,
    "granite": COMMON | {"residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DENSE_FIRST = {
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
RULES: dict[str, dict] = {
    "smollm3": COMMON | {"no_rope_layers": [1, 1, 1, 0, 1, 0, 1, 1]},
    "lfm2": COMMON | {"full_attn_idxs": [2, 5], "layer_types": None},
    "cohere2": COMMON | SLIDING | {"sliding_window": 6},
    "exaone4": COMMON | SLIDING | {"head_dim": 8, "sliding_window": 6},
    "olmo3": COMMON | SLIDING | {"sliding_window": 6},
    "gpt_oss": COMMON
    | SLIDING
    | {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 8,
        "num_heads": 4,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 4]],
        "window_size": 6,
        **TOKENS,
    },
    "llama4_text": COMMON
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 6,
        "moe_layers": [1, 3, 4, 7],
        "no_rope_layers": [1, 1, 1, 0, 1, 0, 1, 1],
        "layer_types": ["full_attention" if i in (3, 5) else "chunked_attention" for i in range(8)],
    },
    "jamba": COMMON
    | {
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "bamba": COMMON
    | {
        "attn_layer_indices": [2, 5],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "recurrent_gemma": COMMON
    | {"block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 6, "lru_width": 32}
    | {"num_key_value_heads": 1},
    "minicpm3": COMMON | LATENT | {"scale_depth": 1.4},
    "qwen3_moe": COMMON | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": [0, 3]},
    "qwen2_moe": COMMON | EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    "glm4_moe": COMMON | DENSE_FIRST | {"head_dim": 8},
    "deepseek_v3": COMMON | DENSE_FIRST | LATENT,
    "gemma3n_text": COMMON
    | {
        "head_dim": 8,
        "num_kv_shared_layers": 3,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
        "sliding_window": 6,
        "activation_sparsity_pattern": [0.0] * 8,
        "intermediate_size": [48] * 8,
    },
}
"""Families whose layers follow a rule of their own; some of them cannot be cut, or not everywhere."""


def tiny(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a random model whose layers all matter: weights larger than a fresh model's, norms off their ones."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **((FAMILIES | RULES)[family] | changes))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def multimodal() -> PreTrainedModel:
    """Return a tiny model that sees images."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=COMMON | SLIDING | {"head_dim": 8, "sliding_window": 6},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def tokens(batch: int = 3, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Return random token ids [batch, length] without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
