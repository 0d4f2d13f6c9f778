"""On which models should a property of the library hold? Tiny random ones of every supported family, no download.

`config` draws a small architecture, `model` builds it and draws every parameter again, so that no identity can hold
because a bias happens to be zero or a gain happens to be one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

Draw = Callable[[random.Random, dict[str, Any]], Any]

SPREAD = 0.15


def _fixed(value: Any) -> Draw:
    return lambda rng, drawn: value


def _one_of(*values: Any) -> Draw:
    return lambda rng, drawn: rng.choice(values)


def _between(low: float, high: float) -> Draw:
    return lambda rng, drawn: rng.uniform(low, high)


def _integer(low: int, high: int) -> Draw:
    return lambda rng, drawn: rng.randint(low, high)


def _width(rng: random.Random, drawn: dict[str, Any]) -> int:
    heads = drawn["num_attention_heads"]
    return rng.choice([heads * size for size in (4, 8, 12) if 16 <= heads * size <= 48])


def _kv_heads(rng: random.Random, drawn: dict[str, Any]) -> int:
    heads = drawn["num_attention_heads"]
    return rng.choice([count for count in range(1, heads + 1) if heads % count == 0])


def _rotary_dim(rng: random.Random, drawn: dict[str, Any]) -> int:
    return rng.choice([2, drawn["hidden_size"] // drawn["num_attention_heads"]])


def _word_width(rng: random.Random, drawn: dict[str, Any]) -> int:
    return rng.choice([drawn["hidden_size"], 12])


def _per_layer(*kinds: str) -> Draw:
    return lambda rng, drawn: [rng.choice(kinds) for _ in range(drawn["num_hidden_layers"])]


def _attention_types(rng: random.Random, drawn: dict[str, Any]) -> list:
    return [[_per_layer("global", "local")(rng, drawn), 1]]


# Falcon picks its layout from several flags together, and the other combinations crash in its own forward.
_FALCON_LAYOUTS = tuple(
    {"new_decoder_architecture": new, "multi_query": multi, "parallel_attn": parallel, "num_ln_in_parallel_attn": norms}
    for new, multi, parallel, norms in (
        (False, True, True, None),
        (False, True, False, None),
        (False, False, True, None),
        (False, False, False, None),
        (True, True, True, 2),
        (True, False, True, 1),
    )
)


def _falcon(flag: str) -> Draw:
    return lambda rng, drawn: _FALCON_LAYOUTS[drawn["layout"]][flag]


def _falcon_kv_heads(rng: random.Random, drawn: dict[str, Any]) -> int | None:
    return _kv_heads(rng, drawn) if drawn["new_decoder_architecture"] else None


_flag = _one_of(False, True)

_COMMON: dict[str, Draw] = {
    "vocab_size": _integer(50, 70),
    "num_hidden_layers": _one_of(2, 3),
    "num_attention_heads": _one_of(2, 3, 4),
    "hidden_size": _width,
    "tie_word_embeddings": _flag,
    "pad_token_id": _fixed(0),
    "bos_token_id": _fixed(1),
    "eos_token_id": _fixed(2),
}

_inner = _integer(20, 60)
_POSITIONS = {"max_position_embeddings": _one_of(32, 48, 64)}
_MLP = {**_POSITIONS, "intermediate_size": _inner}
_GROUPED = {**_MLP, "num_key_value_heads": _kv_heads}
_HEAD = {"head_dim": _one_of(4, 8, 12)}
_BIAS = {"attention_bias": _flag}
_WINDOW = {"sliding_window": _one_of(None, 4)}
_LATE_WINDOW = {"use_sliding_window": _flag, "sliding_window": _fixed(4), "max_window_layers": _fixed(1)}
_PARTIAL = {"partial_rotary_factor": _one_of(0.5, 1.0)}
_DROPOUTS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _fixed(0.0))
# The grouped kernel transformers picks by default has no float64; the plain loop over experts does.
_EXPERTS = {"experts_implementation": _fixed("eager"), "num_experts_per_tok": _one_of(1, 2)}
_QWEN_EXPERTS = {
    **_EXPERTS,
    "num_experts": _one_of(3, 4),
    "moe_intermediate_size": _integer(12, 30),
    "norm_topk_prob": _flag,
    "decoder_sparse_step": _one_of(1, 2),
    "mlp_only_layers": _one_of([], [0]),
}
_GEMMA = {**_GROUPED, **_HEAD, **_BIAS}
_GEMMA_POST_NORM = {
    **_GEMMA,
    "sliding_window": _fixed(4),
    "layer_types": _per_layer("sliding_attention", "full_attention"),
    "query_pre_attn_scalar": _one_of(4, 16),
    "final_logit_softcapping": _one_of(None, 5.0, 30.0),
}

_FAMILY: dict[str, dict[str, Draw]] = {
    "gpt2": {
        **_POSITIONS,
        **_DROPOUTS,
        "n_inner": _inner,
        "scale_attn_weights": _flag,
        "scale_attn_by_inverse_layer_idx": _flag,
    },
    "gpt_neo": {**_MLP, "attention_types": _attention_types, "window_size": _fixed(4)},
    "gpt_neox": {**_MLP, **_BIAS, "use_parallel_residual": _flag, "rotary_pct": _one_of(0.5, 1.0)},
    "gptj": {**_POSITIONS, **_DROPOUTS, "n_inner": _inner, "rotary_dim": _rotary_dim},
    "opt": {
        **_POSITIONS,
        "ffn_dim": _inner,
        "dropout": _fixed(0.0),
        "do_layer_norm_before": _fixed(True),
        "enable_bias": _flag,
        "layer_norm_elementwise_affine": _one_of(True, True, False),
        "word_embed_proj_dim": _word_width,
    },
    "bloom": {},
    "falcon": {
        **_POSITIONS,
        "layout": _integer(0, len(_FALCON_LAYOUTS) - 1),
        **{flag: _falcon(flag) for flag in _FALCON_LAYOUTS[0]},
        "num_kv_heads": _falcon_kv_heads,
        "ffn_hidden_size": _inner,
        "bias": _flag,
        "alibi": _flag,
    },
    "llama": {**_GROUPED, **_HEAD, **_BIAS, "mlp_bias": _flag},
    "mistral": {**_GROUPED, **_HEAD, **_WINDOW},
    "qwen2": {**_GROUPED, **_LATE_WINDOW},
    "qwen3": {**_GROUPED, **_HEAD, **_BIAS, **_LATE_WINDOW},
    "phi": {**_GROUPED, **_PARTIAL, "qk_layernorm": _flag},
    "phi3": {**_GROUPED, **_PARTIAL, **_WINDOW},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA_POST_NORM, "attn_logit_softcapping": _one_of(None, 5.0)},
    "gemma3_text": _GEMMA_POST_NORM,
    "olmo2": {**_GROUPED, **_BIAS},
    "granite": {
        **_GROUPED,
        **_BIAS,
        "mlp_bias": _flag,
        "embedding_multiplier": _between(0.5, 3.0),
        "attention_multiplier": _between(0.1, 0.5),
        "residual_multiplier": _between(0.3, 1.5),
        "logits_scaling": _between(0.5, 3.0),
    },
    "cohere": {**_GROUPED, **_BIAS, "use_qk_norm": _flag, "logit_scale": _between(0.1, 2.0)},
    "stablelm": {
        **_GROUPED,
        **_PARTIAL,
        "use_qkv_bias": _flag,
        "qk_layernorm": _flag,
        "use_parallel_residual": _flag,
    },
    "starcoder2": {**_GROUPED, **_WINDOW, "use_bias": _flag},
    "mixtral": {**_GROUPED, **_HEAD, **_WINDOW, **_EXPERTS, "num_local_experts": _one_of(3, 4)},
    "qwen2_moe": {
        **_GROUPED,
        **_QWEN_EXPERTS,
        "shared_expert_intermediate_size": _integer(12, 30),
        "qkv_bias": _flag,
        "use_sliding_window": _flag,
        "sliding_window": _fixed(4),
    },
    "qwen3_moe": {
        **_GROUPED,
        **_HEAD,
        **_BIAS,
        **_QWEN_EXPERTS,
        "use_sliding_window": _flag,
        "sliding_window": _fixed(4),
    },
}

FAMILIES: tuple[str, ...] = tuple(_FAMILY)


def config(family: str, rng: random.Random, **overrides: Any) -> PretrainedConfig:
    """A random small configuration of `family`; an override replaces its draw and the draws after it see it.

    Shape overrides take the common names (`hidden_size`, `num_attention_heads`, ...) in every family. Falcon's flags
    go together, so one is overridden by `layout`, an index into its valid combinations.
    """
    drawn: dict[str, Any] = {}
    for name, draw in {**_COMMON, **_FAMILY[family]}.items():
        # Drawing even what is overridden keeps the other draws of a seed the same with and without the override.
        value = draw(rng, drawn)
        drawn[name] = overrides.get(name, value)
    settings = {**drawn, **overrides}
    settings.pop("layout", None)
    return AutoConfig.for_model(family, **settings)


def _redraw(module: torch.nn.Module, generator: torch.Generator) -> None:
    is_norm = "Norm" in type(module).__name__
    for name, parameter in module.named_parameters(recurse=False):
        noise = SPREAD * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # A fresh norm gain sits at its neutral value, which is 1 or, where the model adds 1 itself, 0.
        centre = parameter.double() if is_norm and name == "weight" else 0.0
        parameter.copy_(centre + noise)


def model(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
    """A random model of `family` in eval mode; every dtype of one seed holds the same values, rounded."""
    settings = config(family, random.Random(f"{family} {seed}"), **overrides)
    built = AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in built.modules():
            _redraw(module, generator)
    return built


def snapshot(hf: Any) -> dict[str, Any]:
    """Everything about a model, and about transformers, that a view could have changed."""
    return {
        **of_module(hf),
        "config": hf.config.to_dict(),
        "attention": hf.config._attn_implementation,
        "experts": getattr(hf.config, "_experts_implementation", None),
        "registers": [list(ALL_ATTENTION_FUNCTIONS), list(ALL_MASK_ATTENTION_FUNCTIONS),
                      list(AttentionInterface._global_mapping), list(AttentionMaskInterface._global_mapping)],
    }  # fmt: skip


def of_module(hf: nn.Module) -> dict[str, Any]:
    """The same of any module, and of torch."""
    sha = hashlib.sha256()
    for name, part in sorted(hf.state_dict().items()):
        sha.update(name.encode() + part.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "state": sha.hexdigest(),
        "hooks": {
            (name, kind): list(getattr(module, kind).values())
            for name, module in hf.named_modules()
            for kind in dir(module)
            if "_hooks" in kind and isinstance(getattr(module, kind), dict)
        },
        "forward": {name: module.__dict__.get("forward") for name, module in hf.named_modules()},
        "global hooks": [len(part) for name, part in vars(nn.modules.module).items() if name.startswith("_global_")
                         and isinstance(part, dict)],
        "training": {name: module.training for name, module in hf.named_modules()},
        "gradients": {name: (part.requires_grad, part.grad) for name, part in hf.named_parameters()},
        "versions": {name: part._version for name, part in hf.named_parameters()},
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip
