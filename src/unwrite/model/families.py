"""Where are the parts of each architecture? DATA: one row per `model_type` of transformers.

A row says where modules are, never how they compute; the certificate decides at load whether a row is true.
Paths are attribute paths; "a|b" means the first that exists. Numbers that a configuration decides are functions of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import transformers

Config = Any
Where = Any  # a str, or None where there is nothing; or a tuple of these, one for each layer
# Where a model's row comes from: this table, or `discover`.
BY_HAND, FOUND = "by hand", "found"
# In the place of a path, where no one module gives what is written: all that the first block reads and nothing else is.
REST = ""


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


def _no_layers(config: Config) -> Mapping[int, int]:
    return {}


def _heads(config: Config) -> int:
    return config.num_attention_heads


def _last(config: Config) -> tuple[int, int]:
    return 1, 0


def _kv_heads(config: Config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


@dataclass(frozen=True)
class Family:
    """How to find, in a causal language model of transformers, everything that writes into the residual stream."""

    # From the causal model to its decoder; the next four from the decoder.
    decoder: str = "model"
    blocks: str = "layers"
    embed: str = "embed_tokens"  # the last module of the token path, after an embedding norm if there is one; or REST
    pos_embed: str | None = None  # or REST
    final_norm: str = "norm"
    # From a block.
    input_norm: Where = "input_layernorm"
    attention: Where = "self_attn"  # or what is in its place: a mixer; a layer without its out_proj has neither
    mid: Where = "post_attention_layernorm"  # the module whose input is the stream between attention and MLP
    mlp: Where = "mlp"  # the module whose output the MLP writes, or hands to post_mlp_norm; a layer may have none
    beside: Where = None  # what another module writes beside the MLP, from the same state, or
    late: Where = None  # from that between both, which this module reads
    post_attention_norm: Where = None
    post_mlp_norm: Where = None
    post_beside_norm: Where = None
    out_bias: str | None = None  # a parameter that the block adds to what attention writes; some layers may lack it
    act: str = "down_proj"  # from `mlp`: the projection that reads the hidden activation ("": `mlp` itself)
    # From the attention module.
    out_proj: Where = "o_proj"
    value: Where = "v_proj"
    # Its outputs lie in so many equal groups; in each come the values of the group's key/value heads, and behind them
    # what is as wide as so many heads.
    value_layout: Callable[[Config], tuple[int, int]] = _last
    value_factor: Callable[[Config], float] = _one  # by which they are multiplied before attention carries them
    # Where values are made in two steps: the projection whose first outputs are normed for the one that gives values.
    latent: Where = None
    latent_norm: Where = None
    value_norm: Where = None  # the norm through which attention is given them, those of each head by themselves
    # Layers whose attention looks at keys and values of an earlier one -> that one.
    shared: Callable[[Config], Mapping[int, int]] = _no_layers
    head_norm: Where = None  # the norm through which the out-projection reads what attention gives
    gated_heads: bool = False  # that is multiplied, number by number, on its way to the out-projection
    sinks: bool = False  # a softmax has one part more that no key gets, so rows of patterns sum to less than 1
    heads: Callable[[Config], int | Sequence[int]] = _heads  # of all layers alike, or of each
    kv_heads: Callable[[Config], int | Sequence[int]] = _kv_heads
    # Layers where something without a pattern mixes positions in the place of attention -> its heads.
    mixers: Callable[[Config], Mapping[int, int]] = _no_layers
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
    residual_scale: Callable[[Config], float | Sequence[float]] = _one  # of all layers alike, or of each, as gains
    gain: Callable[[Config], float | Sequence[float]] = _one  # by which a block multiplies all that it gives
    mid_gain: Callable[[Config], float | Sequence[float]] = _one  # and by which it did what its MLP reads
    logit_scale: Callable[[Config], float] = _one
    logit_cap: Callable[[Config], float | None] = _none
    refuse: Callable[[Config], str | None] = _none  # why this configuration cannot be expressed

    def of_layer(self, index: int) -> Family:
        """The same with the paths of one layer."""
        each = {name: part[index] for name, part in vars(self).items() if isinstance(part, tuple)}
        return replace(self, **each) if each else self


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
    value_layout=lambda config: (config.num_attention_heads, 0),  # [head, (query, key, value), head_dim]
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
        value_layout=lambda config: (_falcon_kv_heads(config), 0),
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
