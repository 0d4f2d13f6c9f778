"""Where does each head look? The attention pattern, from the model's own forward pass.

transformers lets an attention function be put in by name, with the mask that belongs to it; a name without its mask
would silently attend to the future, so both are put in and both are taken out again. Families that ignore the
interface (gpt_neo, gptj, bloom, falcon) return the pattern from their attention modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unwrite.errors import ModelError
from unwrite.model.view import Model

_NAME = "unwrite_patterns"
Patterns = dict[int, Float[Tensor, "prompt head query key"]]


@contextmanager
def patterns(lm: Model) -> Iterator[Patterns]:
    """Inside the `with`, every forward pass leaves layer -> attention pattern (per query head) in the mapping.

    The model computes attention openly while it lasts, in its own dtype; afterwards its attention implementation is
    what it was. Raises ModelError for attention with learned sinks, whose rows do not sum to 1.
    """
    found: Patterns = {}
    with _open_attention(lm, found) if lm.row.interface else _returned_weights(lm, found):
        yield found


@contextmanager
def _open_attention(lm: Model, found: Patterns) -> Iterator[None]:
    layer_of = {layer.attention: layer.index for layer in lm.layers}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any):
        pattern, key_value = _pattern(query, key, attention_mask, **settings), _per_query_head(value, query)
        found[layer_of[module]] = pattern.detach()
        return (pattern @ key_value).transpose(1, 2).contiguous(), pattern

    # transformers makes a mask only for names in the class-wide register.
    AttentionMaskInterface.register(_NAME, eager_mask)
    ALL_ATTENTION_FUNCTIONS[_NAME] = attend
    try:
        with _implementation(lm, _NAME):
            yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME], AttentionMaskInterface._global_mapping[_NAME]


def _pattern(
    query: Tensor, key: Tensor, mask: Tensor, scaling: float | None = None, softcap: float | None = None, **rest: Any
) -> Float[Tensor, "prompt head query key"]:
    if rest.get("s_aux") is not None:
        raise ModelError("attention has learned sinks: rows of its pattern sum below 1, so heads have no constant part")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ _per_query_head(key, query).transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.softmax(scores + mask[..., : key.shape[-2]], dim=-1)


def _per_query_head(shared: Tensor, query: Tensor) -> Tensor:
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


@contextmanager
def _returned_weights(lm: Model, found: Patterns) -> Iterator[None]:
    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[layer] = output[1].detach()

        return hook

    handles = [layer.attention.register_forward_hook(keep(layer.index)) for layer in lm.layers]
    try:
        with _implementation(lm, "eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _implementation(lm: Model, name: str) -> Iterator[None]:
    # The configuration is what every forward pass reads; the model's own setter refuses families such as falcon.
    before = lm.config._attn_implementation
    lm.config._attn_implementation = name
    try:
        yield
    finally:
        lm.config._attn_implementation = before
