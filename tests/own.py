"""Which tiny configurations need numbers that no rule gives? DATA, read by `every.py`: type of a part -> its settings.

Settings inside of settings are merged. Where a fresh configuration leaves out what a type is there for (layers of
another kind, shared keys, a factor other than 1), it is put in.
"""

from __future__ import annotations

from typing import Any

from transformers import SiglipVisionConfig

Settings = dict[str, Any]

# Settings that a configuration makes again from others, or that only say where it is from.
DROPPED = ("transformers_version", "architectures", "dtype", "_name_or_path", "auto_map", "per_layer_config",
           "id2label", "label2id")  # fmt: skip


def _turned(**sections: Any) -> Settings:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections}}


def _in_turn(*kinds: str) -> list[str]:
    return [*kinds, *kinds]


# Of four pairs of turned channels in a head, or of two: how many go with time, height and width.
_FOUR, _TWO = _turned(mrope_section=[2, 1, 1]), _turned(mrope_section=[1, 1, 0], partial_rotary_factor=0.5)
_NO_FACTORS = _turned()["rope_parameters"]
_LINEAR = {"layer_types": _in_turn("linear_attention", "full_attention")}
_SCALED = {"embedding_multiplier": 1.5, "residual_multiplier": 0.6, "logits_scaling": 2.0, "attention_multiplier": 0.3}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_SHARING = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_GEMMA4 = {**_SHARING, "per_layer_config": {str(layer): {"head_dim": 16} for layer in (1, 3, 5)}}
# As in checkpoints; a fresh configuration lacks it, and then the model's own code fails on padded prompts.
_MARKED = {"vision_start_token_id": 151652}
_WORDS = {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}}
# A tower of its own: the one that these would have is made by timm and reads images with pillow.
_TOWER = {"vision_config": SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16,
    model_args={"embed_dim": 32},
)}  # fmt: skip

OWN: dict[str, Settings] = {
    "bailing_hybrid": _LINEAR,
    "bamba": {"attn_layer_indices": [1, 3]},
    "chameleon": _WORDS,
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"),
                                                             _FOUR["rope_parameters"])},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_ocr2_text": {**_ROUTED, "mlp_layer_types": _in_turn("dense", "sparse")},
    "deepseek_v2": _ROUTED,
    "dots3_note_text": {
        "per_layer_config": {
            layer: {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "kv_lora_rank": 24,
                    "qk_nope_head_dim": 12}
            for layer in ("2", "3")
        },
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    # As it is kept: attention and MLPs are blocks of their own, so twice as many.
    "dory": {"num_hidden_layers": 8, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2,
             "layer_types": _in_turn("sliding_attention", "mlp", "full_attention", "mlp")},
    "dots1": _ROUTED,
    "emu3": _WORDS,
    "ernie4_5_vl_moe_text": _turned(mrope_section=[1, 1, 2]),
    "falcon_h1": {
        "embedding_multiplier": 1.9, "lm_head_multiplier": 0.7, "key_multiplier": 0.9, "attention_in_multiplier": 0.8,
        "attention_out_multiplier": 0.6, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.4,
        "ssm_multipliers": [0.9, 0.8, 0.7, 1.1, 1.2], "mlp_multipliers": [0.8, 0.6],
    },
    "fast_vlm": _TOWER,
    "gemma3n_text": {**_SHARING, "intermediate_size": [64] * 6, "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm46v_text": _FOUR,
    "glm4v_moe_text": _TWO,
    "glm4v_text": _FOUR,
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "qk_head_dim": 8},
    "glm_ocr_text": _FOUR,
    "glmga_text": _FOUR,
    "granite": _SCALED,
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2",
                        "vision_config": {"hidden_size": 64}},
    "granite4_vision_text": _SCALED,
    "granitemoe": _SCALED,
    "granitemoehybrid": {**_SCALED, "layer_types": _in_turn("mamba", "attention")},
    "granitemoeshared": _SCALED,
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, **_turned(mrope_section=[1, 1, 1, 1])},
    "hy_v4_vl_text": {"rope_parameters": {"mrope_section": [1, 1, 0]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 2, 4, 2]},
    "lfm2": {"layer_types": _in_turn("conv", "full_attention"), "full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": _in_turn("conv", "full_attention"), "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 16},
    "minimax": {
        "layer_types": _in_turn("full_attention", "linear_attention"), "block_size": 4,
        "full_attn_alpha_factor": 1.3, "full_attn_beta_factor": 0.7, "linear_attn_alpha_factor": 1.2,
        "linear_attn_beta_factor": 0.8, "mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.9,
    },
    "ministral": {"head_dim": 8},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": _FOUR,
    "perception_lm": _TOWER,
    "qwen2_5_omni_text": _FOUR,
    "qwen2_5_omni_thinker": _MARKED,
    "qwen2_5_vl_text": _FOUR,
    "qwen2_vl_text": _FOUR,
    "qwen3_omni_moe_thinker": _MARKED,
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 4, "layer_types": _in_turn("full_attention", "sliding_attention"),
                "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _NO_FACTORS)},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 64, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 6, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5], "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
