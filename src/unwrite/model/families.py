"""Where are the parts of each architecture? DATA: one row per `model_type` of transformers.

A row says where modules are, never how they compute; the certificate decides at load whether a row is true.
Paths are attribute paths; "a|b" means the first that exists. Numbers that a configuration decides are functions of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import transformers

Config = Any
# Where a model's row comes from: this table, or `discover`.
BY_HAND, FOUND = "by hand", "found"


def _no(config: Config) -> bool:
    return False


def _yes(config: Config) -> bool:
    return True


def _one(config: Config) -> float:
    return 1.0


def _none(config: Config) -> None:
    return None


def _nowhere(config: Config) -> Mapping[str, str]:
    return {}


def _kv_heads(config: Config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@dataclass(frozen=True)
class Family:
    """How to find, in a causal language model of transformers, everything that writes into the residual stream."""

    # From the causal model to its decoder; the next four from the decoder.
    decoder: str = "model"
    blocks: str = "layers"
    embed: str = "embed_tokens"  # the last module of the token path: after an embedding norm, where there is one
    pos_embed: str | None = None
    final_norm: str = "norm"
    # From a block.
    input_norm: str | None = "input_layernorm"
    attention: str = "self_attn"
    mid: str | None = "post_attention_layernorm"  # the module whose input is the stream between attention and MLP
    mlp: str = "mlp"  # the module whose output the MLP writes, or hands to post_mlp_norm
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    act: str = "down_proj"  # from `mlp`: the projection that reads the hidden activation ("": `mlp` itself)
    # From the attention module.
    out_proj: str = "o_proj"
    value: str = "v_proj"  # its last outputs are the values, unless they are grouped
    grouped_values: bool = False  # fused as [kv head, (its query heads, key, value), head_dim]
    kv_heads: Callable[[Config], int] = _kv_heads
    gated: bool = True  # the MLP multiplies an activation by a second projection
    # What the configuration decides.
    layer_norm: bool = False  # every reader removes the mean over d_model
    norm_gain_offset: float = 0.0  # the gain of a norm is weight + this
    float32_inside: bool = True  # norms or softmax compute in float32 whatever the dtype
    interface: bool = True  # attention goes through transformers' AttentionInterface
    # Where it does not: "q", "k", "v", "pattern" -> the module that puts it out just as attention uses it, if one does.
    opened: Callable[[Config], Mapping[str, str]] = _nowhere
    parallel: Callable[[Config], bool] = _no
    embed_scale: Callable[[Config], float] = _one  # applied outside the embedding module
    residual_scale: Callable[[Config], float] = _one
    logit_scale: Callable[[Config], float] = _one
    logit_cap: Callable[[Config], float | None] = _none
    refuse: Callable[[Config], str | None] = _none  # why this configuration cannot be expressed


def _opt_refusal(config: Config) -> str | None:
    if not config.do_layer_norm_before:
        return "it normalises the stream itself after every write (post-LN), so writes do not add up"
    if config.word_embed_proj_dim != config.hidden_size:
        return "it projects the stream before the unembedding"
    return "it has no final norm" if config._remove_final_layer_norm else None


def _bloom_refusal(config: Config) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "its residual is taken after the norm, so writes do not add up"
    if config.pretraining_tp > 1 and config.slow_but_exact:
        return "its projections are computed in slices that no module shows"
    return None


def _falcon_kv_heads(config: Config) -> int:
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


def _falcon_opened(config: Config) -> Mapping[str, str]:
    fused = "query_key_value"
    # With rotary positions, queries and keys are turned after the projection, and no module sees the pattern.
    return {"q": fused, "k": fused, "v": fused, "pattern": "attention_dropout"} if config.alibi else {"v": fused}


_LLAMA = Family()
_GEMMA = replace(_LLAMA, norm_gain_offset=1.0)
_SANDWICH = replace(
    _GEMMA,
    mid="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
    logit_cap=lambda config: config.final_logit_softcapping,
)
_LAYER_NORM = Family(layer_norm=True, float32_inside=False, gated=False)
_GPT2 = replace(
    _LAYER_NORM,
    decoder="transformer",
    blocks="h",
    embed="wte",
    pos_embed="wpe",
    final_norm="ln_f",
    input_norm="ln_1",
    attention="attn",
    mid="ln_2",
    act="c_proj",
    out_proj="c_proj",
    value="c_attn",
)
_NEOX = replace(
    _LAYER_NORM,
    decoder="gpt_neox",
    embed="embed_in",
    final_norm="final_layer_norm",
    attention="attention",
    act="dense_4h_to_h",
    out_proj="dense",
    value="query_key_value",
    grouped_values=True,
    parallel=lambda config: config.use_parallel_residual,
)

_RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
# From 5.24 on it goes through the interface.
_GPTJ_ATTENTION: dict[str, Any] = (
    {} if _RELEASE >= (5, 24)
    else {"interface": False, "opened": lambda config: {"v": "v_proj", "pattern": "attn_dropout"}}
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        attention="attn.attention",
        out_proj="out_proj",
        value="v_proj",
        interface=False,
        opened=lambda config: {"q": "q_proj", "k": "k_proj", "v": "v_proj", "pattern": "attn_dropout"},
    ),
    "gpt_neox": _NEOX,
    "gptj": replace(
        _GPT2,
        pos_embed=None,
        act="fc_out",
        out_proj="out_proj",
        value="v_proj",
        **_GPTJ_ATTENTION,
        parallel=_yes,
    ),
    "opt": replace(
        _LAYER_NORM,
        decoder="model.decoder",
        pos_embed="embed_positions",
        final_norm="final_layer_norm",
        input_norm="self_attn_layer_norm",
        mid="final_layer_norm",
        mlp="fc2",
        act="",
        out_proj="out_proj",
        refuse=_opt_refusal,
    ),
    "bloom": replace(
        _NEOX,
        decoder="transformer",
        blocks="h",
        embed="word_embeddings_layernorm",
        final_norm="ln_f",
        attention="self_attention",
        mlp="mlp.dense_4h_to_h",  # the block adds the residual inside the module around it
        act="",
        float32_inside=True,
        interface=False,
        opened=lambda config: {
            **dict.fromkeys(("q", "k", "v"), "query_key_value"),
            "pattern": "attention_dropout",
        },
        parallel=_no,
        refuse=_bloom_refusal,
    ),
    "falcon": replace(
        _NEOX,
        decoder="transformer",
        blocks="h",
        embed="word_embeddings",
        final_norm="ln_f",
        input_norm="ln_attn|input_layernorm",
        mid="ln_mlp|post_attention_layernorm",
        attention="self_attention",
        interface=False,
        opened=_falcon_opened,
        kv_heads=_falcon_kv_heads,
        parallel=lambda config: config.parallel_attn or config.new_decoder_architecture,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi": replace(_LAYER_NORM, final_norm="final_layernorm", out_proj="dense", act="fc2", parallel=_yes),
    "phi3": replace(_LLAMA, value="qkv_proj"),
    "gemma": _GEMMA,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": replace(
        _LLAMA,
        input_norm=None,
        mid="mlp",
        post_attention_norm="post_attention_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    ),
    "granite": replace(
        _LLAMA,
        embed_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logit_scale=lambda config: 1.0 / config.logits_scaling,
    ),
    "cohere": replace(_LLAMA, layer_norm=True, parallel=_yes, logit_scale=lambda config: config.logit_scale),
    "stablelm": replace(_LAYER_NORM, gated=True, parallel=lambda config: config.use_parallel_residual),
    "starcoder2": replace(_LAYER_NORM, act="c_proj"),
    "mixtral": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
}

# Families of transformers that are known and cannot be expressed, with the reason given to the user.
REFUSED: dict[str, str] = {
    "gpt_oss": "learned attention sinks: rows of the pattern sum below 1, so heads have no constant part",
    "gemma3n": "it normalises values and keeps several parallel streams",
    "gemma4": "it normalises values",
    "deepseek_v2": "latent attention: values are compressed and shared across heads through a norm",
    "deepseek_v3": "latent attention: values are compressed and shared across heads through a norm",
    "qwen3_next": "gated and linear attention: a head's write is not its pattern times its values",
    "mamba": "it has no attention heads",
    "mamba2": "it has no attention heads",
    "rwkv": "it has no attention heads",
}
