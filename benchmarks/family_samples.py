"""Real-size settings for the families of transformers whose own defaults make no causal model worth cutting.

Every other entry of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` is taken with its defaults. Sizes are those of a published
checkpoint where one is named.

    AutoConfig.for_model("dots1", **SAMPLES["dots1"])
"""

from __future__ import annotations

from typing import Any

CAUSAL = {"is_decoder": True}
"""BERT-like classes mask the future only as decoders."""
SLIDING_4 = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

QWEN4_INDEXER = {  # its fields are None by default
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 128,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    "ple_layer_ids": [2, 19],
    "eos_token_id": 248046,
}

NO_LAYER_INPUTS = {"hidden_size_per_layer_input": 0}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}}

SAMPLES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
        ),
        CAUSAL,
    ),
    "xmod": CAUSAL | {"default_language": "en_XX"},  # it refuses to run without a language
    "xlm": {"causal": True},  # bidirectional by default
    "xlnet": {"attn_type": "uni"},  # bidirectional by default
    # Bamba-9B and Granite 4: by default no layer attends, and then the cache does not know its length.
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "granitemoehybrid": {
        "num_hidden_layers": 40,
        "layer_types": ["full_attention" if i in (5, 15, 25, 35) else "linear_attention" for i in range(40)],
    },
    "blenderbot": {"encoder_layers": 24},  # the decoder alone counts its 24 layers by the encoder's number
    "bloom": {"n_layer": 24, "hidden_size": 1024, "n_head": 16},  # bloom-560m; 2 layers by default
    "cohere_compass_text": {  # by default no rotary for the layer types
        "layer_types": SLIDING_4 * 10,
        "num_key_value_heads": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [24, 20, 20]},
            "full_attention": None,
        },
    },
    "dbrx": {  # dbrx-instruct; the default attn_config has no rope_theta
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {  # DeepSeek-V2; by default no expert is chosen
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "first_k_dense_replace": 1,
    },
    "dots1": {  # dots.llm1; by default no number of experts
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "max_window_layers": 48,
    },
    "emu3": {"architectures": ["Emu3ForCausalLM"]},  # with images it needs a map of its vocabulary
    # Gemma 4 31B and 26B-A4B; the small ones' embeddings per layer stand outside the layers, so they are refused
    "gemma4_text": NO_LAYER_INPUTS,
    "gemma4_unified_text": NO_LAYER_INPUTS,
    "gemma4": {"text_config": NO_LAYER_INPUTS},
    "gemma4_unified": {"text_config": NO_LAYER_INPUTS},
    # Qwen2-VL, Qwen2.5-VL and GLM-4.1V; by default the sections of their rotary are in the code alone
    "qwen2_vl": {"text_config": SECTIONS},
    "qwen2_5_vl": {"text_config": SECTIONS},
    "glm4v": {
        "text_config": {
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
        }
    },
    "glm4_moe": {"head_dim": 128, "first_k_dense_replace": 3},  # GLM-4.5; by default 4096 is divided by 96 heads
    "hunyuan_v1_dense": {"num_key_value_heads": 8, "head_dim": 128},  # Hunyuan-7B; head_dim is None by default
    "hunyuan_v1_moe": {  # Hunyuan-A13B; head_dim is None by default
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "num_experts": 64,
        "moe_topk": [8] * 32,
    },
    "lfm2_moe": {  # LFM2-8B-A1B; layer_types is None by default
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if i in (2, 6, 10, 14, 18, 21) else "conv" for i in range(24)],
    },
    "ministral": {  # Ministral-8B; head_dim is None by default
        "head_dim": 128,
        "num_hidden_layers": 36,
        "layer_types": ["sliding_attention" if i % 4 else "full_attention" for i in range(36)],
    },
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},  # Nemotron-4-15B; no key-value heads by default
    "nemotron_h": {  # Nemotron-H-8B; 4 layers by default
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    },
    "plbart": {"encoder_layers": 12, "decoder_layers": 12},  # plbart-large; 6 layers by default
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "qwen4_exp_text": QWEN4_INDEXER,
    "reformer": {  # reformer-enwik8; 6 layers by default, and no fixed hashes
        "is_decoder": True,
        "hash_seed": 0,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "attention_head_size": 128,
        "feed_forward_size": 4096,
        "axial_pos_embds_dim": [256, 768],
        "axial_pos_shape": [128, 512],
        "max_position_embeddings": 65536,
        "attn_layers": ["local", "lsh"] * 6,
        "lsh_attn_chunk_length": 256,
        "local_attn_chunk_length": 128,
    },
    "whisper": {  # whisper-small; 4 layers by default
        "d_model": 768,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
    },
}
"""{model_type: keyword arguments for AutoConfig.for_model}."""

NOT_BUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; its text decoder is gemma3n_text",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "every layer reads the keys and values of another model, and transformers 5.23 refuses to build such layers",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        "AutoModelForCausalLM makes its class from the outer config, and refuses the decoder's; it reads audio codes",
    ),
}
"""{model_type: why no causal language model can be built from its name alone}."""
