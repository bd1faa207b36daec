"""Small random checkpoints of real architectures, written to disk as a user would have them.

Weights are drawn wider than transformers' own initialisation: with its 0.02 a block adds next to nothing to the
residual stream, and a wrong expert would go unnoticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from lynx_trt.export.checkpoint import auto_class

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}

_LATENT: dict[str, Any] = {
    **GROUPED,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_shared_experts": 1,
}
_EXPERTS: dict[str, Any] = {
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
_GATED_DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_INDEXER: dict[str, Any] = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 32}
_SIGHT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIGHT_OF_QWEN: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 64,
}

# One line on why each is here. The nine that the project promises come first.
CONFIGS: dict[str, Any] = {
    # softmax over all, renormalised; the plain case
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2
    ),
    # a shared expert beside the routed ones; weights not renormalised; biases in attention
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=128,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    # norms on query and key, head size apart from hidden size
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON,
        head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    # norms over all heads at once
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, intermediate_size=32, num_experts=8, num_experts_per_tok=2),
    # softmax over the chosen; multipliers everywhere
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **COMMON,
        intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.1,
    ),
    # a router that no rule describes; LayerNorm; a bias on the output embedding
    "phimoe": lambda: transformers.PhimoeConfig(
        **COMMON,
        intermediate_size=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        lm_head_bias=True,
        attention_bias=True,
    ),
    # sigmoid with correction bias; a dense first layer; half of each head is rotated
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **COMMON, **GROUPED, head_dim=16, n_group=1, topk_group=1, use_qk_norm=True, partial_rotary_factor=0.5
    ),
    # latent attention; sigmoid with correction bias, limited to groups, scaled
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4},
        **GROUPED,
        n_group=4,
        topk_group=2,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_shared_experts=1,
    ),
    # latent attention with queries of their own; softmax, not renormalised
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **{**COMMON, "num_hidden_layers": 3, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=24,
        n_shared_experts=1,
    ),
    # biases, attention sinks, clamped activation, interleaved and transposed weights, sliding windows
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, head_dim=16, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2, sliding_window=8
    ),
    # --- Layers with a state in place of keys and values.
    # Gated DeltaNet, queries and keys shared by two heads each; attention with a gate
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**COMMON, **_GATED_DELTA_NET, **_EXPERTS),
    # the same in another order, beside images; positions in three dimensions
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeConfig(
        text_config={**COMMON, **_GATED_DELTA_NET, **_EXPERTS},
        vision_config={**_SIGHT_OF_QWEN, "num_position_embeddings": 16},
    ),
    # short convolutions; sigmoid with a bias for choice; a dense first layer
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **{**COMMON, "num_hidden_layers": 3},
        layer_types=["conv", "full_attention", "conv"],
        num_dense_layers=1,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
    ),
    # Mamba-2 beside attention without positions
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **COMMON,
        layer_types=["linear_attention", "full_attention"],
        intermediate_size=32,
        shared_intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=2,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=24,
        mamba_n_groups=2,
        mamba_expand=2,
        mamba_chunk_size=8,
        position_embedding_type="nope",
    ),
    # Mamba-2, attention and MoE in layers of their own; experts without a gate, relu squared
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{**COMMON, "num_hidden_layers": 4},
        layer_types=["linear_attention", "moe", "full_attention", "moe"],
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=48,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=24,
        n_groups=2,
        chunk_size=8,
    ),
    # Kimi Delta Attention, a decay a key, beside latent attention without positions
    "kimi_linear": lambda: transformers.KimiLinearConfig(
        **{**COMMON, **_LATENT, "num_hidden_layers": 3},
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_heads=4,
        linear_head_dim=16,
        n_group=1,
        topk_group=1,
    ),
    # the same layers in another model; groups of experts
    "bailing_hybrid": lambda: small_config(
        "bailing_hybrid", num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2
    ),
    # Mamba-1, which is not supported
    "jamba": lambda: small_config(
        "jamba",
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=1,
        expert_layer_offset=0,
    ),
    # --- Attention to what an indexer chooses. Of many heads, or most scores would be 0 and the choice arbitrary.
    # latent attention; an indexer in each layer
    "deepseek_v32": lambda: small_config("deepseek_v32", num_hidden_layers=2, **_INDEXER),
    # every second layer takes the choice of the one before
    "glm_moe_dsa": lambda: small_config("glm_moe_dsa", **_INDEXER, index_topk_freq=2),
    "axk2": lambda: small_config("axk2", **_INDEXER),
    "hy_v4": lambda: small_config("hy_v4", **_INDEXER),
    # beside layers with a window
    "dots3_note_text": lambda: transformers.CONFIG_MAPPING["dots3_note_text"](
        **{**_LATENT, **COMMON, **_INDEXER, "num_key_value_heads": 4, "num_hidden_layers": 4},
        n_group=1,
        topk_group=1,
        sliding_window=8,
    ),
    "mistral_large4": lambda: transformers.MistralLarge4Config(
        text_config={**small_config("mistral_large4", **_INDEXER).to_dict()}, vision_config=_SIGHT
    ),
    # --- Models of text and images, of which the language model is taken.
    # a router in the decoder layer, a number an expert behind it; a dense MLP beside the experts; heads of two sizes,
    # the larger of which have the key as their value; norms without weights; logits with a soft cap
    "gemma4": lambda: transformers.Gemma4Config(
        text_config={
            **COMMON,
            "head_dim": 16,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 256,
            "final_logit_softcapping": 30.0,
        },
        vision_config={**_SIGHT, "head_dim": 8, "num_key_value_heads": 4},
        audio_config=None,
    ),
    # positions in three dimensions, which are the same of text
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeConfig(
        text_config={
            **COMMON,
            "head_dim": 16,
            "intermediate_size": 128,
            "moe_intermediate_size": 48,  # stored turned, which must not be square
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={**_SIGHT_OF_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
    # the same in another order, of half a head
    "glm4v_moe": lambda: transformers.Glm4vMoeConfig(
        text_config={
            **COMMON,
            **GROUPED,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={**_SIGHT_OF_QWEN, "image_size": 28, "patch_size": 14},
    ),
    # Mistral Small 4: latent attention, queries that grow with their position
    "mistral3": lambda: transformers.Mistral3Config(
        text_config={
            **COMMON,
            **_LATENT,
            "model_type": "mistral4",
            "head_dim": 24,
            "n_group": 1,
            "topk_group": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.1,
                "partial_rotary_factor": 1 / 3,
            },
        },
        vision_config={**_SIGHT, "model_type": "pixtral", "head_dim": 8},
    ),
    # attention to some blocks of the past, chosen by an indexer
    "minimax_m3_vl": lambda: transformers.MiniMaxM3VLConfig(
        text_config={
            **small_config("minimax_m3_vl").to_dict(),
            "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        },
        vision_config={**_SIGHT, "head_dim": 8},
    ),
    # Kimi K2.5: DeepSeek-V3's layers
    "kimi_k25": lambda: transformers.Kimi_K25Config(
        text_config={**COMMON, **_LATENT, "model_type": "deepseek_v3", "head_dim": 8, "n_group": 1, "topk_group": 1},
        vision_config=_SIGHT,
    ),
}


# What a config of any architecture has under some of these names, made small.
_SMALL: dict[str, Any] = {
    **_LATENT,
    **COMMON,  # last: its heads are not those of latent attention
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_shared_expert_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "sliding_window": 8,
    "num_nextn_predict_layers": 0,
}


def small_config(model_type: str, **others: Any) -> Any:
    """Transformers' own config of an architecture, with small numbers in the places of large ones, and `others`."""
    config = transformers.CONFIG_MAPPING[model_type]().get_text_config()
    names = {name for name in _SMALL if hasattr(config, name)}
    changes = {name: _SMALL[name] for name in names}
    if "kv_lora_rank" in names:  # latent attention: all heads have keys, of which this is the part with positions
        changes |= {"num_key_value_heads": 4, "head_dim": 8}
    return type(config)(**{**changes, **others})


def random_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of architecture `name` in eager mode; `changes` are set on the config of its language model."""
    config = CONFIGS[name]() if name in CONFIGS else small_config(name)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config, attn_implementation="eager").to(dtype).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif "sinks" in key or "bias" in key:
                parameter.normal_(0, 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        for key, buffer in model.named_buffers():
            if "e_score" in key:
                buffer.normal_(0, 0.3)
    return model


def save(model: Any, folder: Path, *, merged: bool = False, shard: str = "5GB") -> Path:
    """Write a checkpoint: in the hub's layout (a tensor an expert), or with the experts of a layer merged."""
    model.save_pretrained(folder, save_original_format=not merged, max_shard_size=shard)
    return folder
