"""What does a tiny model of every type of transformers look like? Its own configuration, with smaller numbers.

`TEXT` and `IMAGES` name the types. A configuration is shrunk at any depth by what its numbers are called, and lists of
layers by what they list; where a part needs numbers of its own they stand in `own.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from own import DROPPED, OWN

Given = Mapping[str, Any]

SPREAD = 0.15
WIDTH, HEADS, HEAD, INNER, LAYERS, VOCABULARY, CONTEXT = 32, 4, 8, 64, 4, 128, 64

# Encoders that a flag makes decoders, and decoders that read the states of another model.
_OTHERS = (
    *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    *auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    *(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys() - {"moss_transcribe_diarize"}),
    *("bert-generation", "git", "moshi", "trocr", "xlnet"),
)
TEXT = tuple(sorted(set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(_OTHERS)))
IMAGES = tuple(sorted(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
MAKERS: dict[str, Any] = {"text": AutoModelForCausalLM, "images": AutoModelForImageTextToText}


def _key_heads(value: int, given: Given) -> int:
    """As the heads of the original share keys: all of them one, none, or two each."""
    heads = next((given[name] for name in ("num_attention_heads", "n_head", "num_heads") if given.get(name)), None)
    return 1 if value == 1 else HEADS if value == heads else HEADS // 2


def _at_most_one(value: int, given: Given) -> int:
    return min(value, 1)


def _head(value: int, given: Given) -> int:
    """What of latent attention is turned is all that is called a head's width in some of its configurations."""
    return HEAD // 2 if {"qk_rope_head_dim", "kv_lora_rank"} <= given.keys() else HEAD


def _special(value: int, given: Given) -> int:
    return value if value < VOCABULARY else 3


# What a whole number is called -> what it becomes; the first row that fits.
_NUMBERS: tuple[tuple[str, int | Callable[[int, Given], int]], ...] = (
    (r"_?(pad|bos|eos|cls|sep|mask|decoder_start|forced_eos|eod)_token_id", _special),
    (r"(\w+_)?vocab_size(_per_layer_input)?|n_vocab|additional_vocab_size", VOCABULARY),
    (r"num_nextn_predict_layers|(num_)?mtp_(num_hidden_)?layers", 0),
    (r"((num|n|encoder|decoder)_)?(hidden_|encoder_|decoder_)?layers?|num_blocks|depth|conf_num_hidden_layers", LAYERS),
    (r"\w*(key_value_heads|kv_heads?)\w*|kv_n_heads", _key_heads),
    (r"linear_num_key_heads|index_n_heads|n_mamba_heads", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"(\w*num_|n_|resampler_|resampler_n_|\w+coder_)*(attention_|value_)?heads?(_swa)?|num_query_groups", HEADS),
    (r"qk_rope_head_dim|rotary_dim", HEAD // 2),
    (r"codebook_size|num_embeddings|encoder_hash_byte_group_vocab", CONTEXT),
    (r"qk_head_dim", HEAD + HEAD // 2),
    (r"kv_lora_rank", HEAD * 2),
    (r"[qo]_lora_rank", HEAD * 3),
    (r"head_dim", _head),
    (r"(\w+_)?head_dim|d_kv|dim_head|kv_channels|mamba_d_head|mamba_headdim|linear_(key|value)_head_dim", HEAD),
    (r"(moe|expert|\w*experts?)_(ffn_)?(intermediate|hidden)_size|share_expert_dim", INNER // 2),
    (r"(\w+_)?intermediate_size(_mlp)?|n_inner|(\w+_)?ffn_(hidden_size|dim)|d_ff|dff|dim_ff|mlp_dim|d_inner", INNER),
    (r"mamba_d_ssm", INNER),
    (r"hidden_size_per_layer_input|ple_embed_dim|gated_norm_rank", HEAD),
    (r"(\w+_)?hidden_sizes?(_global)?|adapter_input_size|(base|conv|downsample|nemo_conv)_channels", WIDTH),
    (r"(\w+_)?(embed(ding)?|hidden|proj|model|projection|output|input|in|out)_dim", WIDTH),
    (r"n_embe?d?|d_model|word_embed_proj_dim|dim|lru_width", WIDTH),
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|moe_num_experts_per_tok|experts_per_token", 2),
    (r"(num_|n_|moe_num_)+(local_|routed_|moe_)?experts", 4),
    (r"(num_|n_|moe_num_)+shared_experts|first_k_dense\w*|num_dense_layers|moe_layer_start_index", _at_most_one),
    (r"n_group|topk_group|num_expert_groups?|(mamba_)?n_?groups", 1),
    (r"(sliding|attention|local)_\w*(window|chunk_size)\w*|window_size|local_attention", 4),
    (r"index_topk", CONTEXT),
    (r"(mamba_d_|ssm_|mamba_)?state(_size)?", 8),
    (r"(mamba_)?chunk_size", 8),
    (r"mamba_dt_rank|time_step_rank|laurel_rank|hc_lowrank", 4),
    (r"(original_)?max_position_embeddings|max_(source|target)_positions|n_positions|n_ctx", CONTEXT),
    (r"max_seq_len|seq_length|context_length|model_max_length", CONTEXT),
    (r"image_size|crop_size", 32),
    (r"patch_size", 16),
)  # fmt: skip


def config(kind: str, **overrides: Any) -> PretrainedConfig:
    """A small configuration of a type of transformers, as its class makes it."""
    made = CONFIG_MAPPING[kind]
    given = made().to_dict()
    return made(**{**_smaller(given), **overrides})


def _smaller(given: Given) -> dict[str, Any]:
    """The settings of a configuration and, inside of it, of others."""
    kind = given.get("model_type", "")
    kept = {name: value for name, value in given.items() if name not in ("model_type", *DROPPED)}
    small = _merged({name: _shrunk(name, value, given) for name, value in kept.items()}, OWN.get(kind, {}))
    return {**small, "model_type": kind} if kind else small


def _merged(settings: Given, own: Given) -> dict[str, Any]:
    inner = {name: _merged(settings.get(name) or {}, value) if isinstance(value, dict) else value
             for name, value in own.items()}  # fmt: skip
    return {**settings, **inner}


def _shrunk(name: str, value: Any, given: Given) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return _number(name, value, given)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return _sections(_smaller(value)) if "mrope_section" in value else _smaller(value)
    if isinstance(value, list | tuple) and value:
        return _listed(name, value, given)
    return value


def _number(name: str, value: int, given: Given) -> int:
    for pattern, small in _NUMBERS:
        if re.fullmatch(pattern, name):
            return small(value, given) if callable(small) else small
    return value


def _sections(rotary: dict[str, Any]) -> dict[str, Any]:
    """Pairs of a head's turned channels that go with time, height and width."""
    return {**rotary, "mrope_section": [2, 1, 1] if rotary.get("partial_rotary_factor", 1) == 1 else [1, 1, 0]}


def _listed(name: str, values: Sequence[Any], given: Given) -> list[Any]:
    """One value a layer, of every kind that there is; other lists value by value."""
    depth = next((given[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if given.get(key)), None)
    if len(values) == depth or name.endswith("layer_types"):
        return _kinds([_shrunk(name, value, given) for value in values])
    return [_shrunk(name, value, given) for value in values]


def _kinds(values: Sequence[Any]) -> list[Any]:
    first = [*values[:LAYERS]]
    kinds = [value for i, value in enumerate(values) if value not in values[:i]]
    if all(value in first for value in kinds):
        return first
    return [kinds[layer % len(kinds)] for layer in range(LAYERS)]


def model(kind: str, mapping: str = "text", seed: int = 0) -> PreTrainedModel:
    """A float32 model of a type in eval mode, all of whose parameters are drawn anew; `mapping` one of MAKERS."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = MAKERS[mapping].from_config(config(kind), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            _redraw(parameter, generator)
        for name, buffer in built.named_buffers():
            if name.endswith("layer_scalar"):  # a gain that is trained, and kept as a buffer
                buffer.mul_(0.7)
    return built


def _redraw(parameter: Tensor, generator: torch.Generator) -> None:
    """Noise, around where a fresh model starts if that is away from zero, as gains of norms and decays of states do."""
    if not parameter.is_floating_point():
        return
    start = parameter if parameter.mean().abs() > parameter.std(correction=0) / 2 else torch.zeros_like(parameter)
    parameter.copy_(start + SPREAD * torch.randn(parameter.shape, generator=generator))


def some_ids(seed: int = 1) -> Tensor:
    """Two prompts of nine tokens."""
    return torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(seed))
