"""Where does each head look, and what does attention see? From the model's own forward pass.

transformers lets an attention function be put in by name, with the mask that belongs to it; a name without its mask
would silently attend to the future, so both are put in and both are taken out again. Of the families that ignore the
interface, gpt_neo, bloom and, before transformers 5.24, gptj return the pattern from their attention modules. So does
falcon, but only where it computes eagerly: by default it calls torch's own function, and with alibi the two do not
compute the same (the bias is added twice when eager). So the call that the model makes is opened, and never exchanged
for another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unwrite.errors import ModelError
from unwrite.model.gates import has_gates, multiplied, sloped
from unwrite.model.hooks import Call, after, hooked
from unwrite.model.mixers import mixers_called
from unwrite.model.softmax import added, chosen, pattern_of, per_query_head, scores_of
from unwrite.model.view import Layer, Model

_NAME = "unwrite"
Attended = tuple[Tensor, Tensor | None]  # [prompt, query, head, d_head], and the pattern if it was computed
Attend = Callable[[Tensor, Tensor, Tensor], Attended]  # of queries, keys and values as [prompt, head, position, d_head]
Around = Callable[[int, Attend, Tensor, Tensor, Tensor], Attended]


@dataclass(frozen=True, eq=False)
class Patterns(Mapping[int, Tensor]):
    """Layer -> attention pattern [prompt, head, query, key], per query head; its rows sum to 1, or with sinks to less.

    `gate`: layer -> what the heads' outputs [prompt, query, head, d_head] were multiplied by before the out-projection,
    in models where they are; a norm among that is its gain times its scale. `mixed`: layer -> how its mixer was called,
    of mixers that show their values.
    """

    pattern: dict[int, Tensor] = field(default_factory=dict)
    gate: dict[int, Tensor] = field(default_factory=dict)
    mixed: dict[int, Call] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> Tensor:
        return self.pattern[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.pattern)

    def __len__(self) -> int:
        return len(self.pattern)


@contextmanager
def patterns(lm: Model) -> Iterator[Patterns]:
    """Inside the `with`, every forward pass leaves layer -> attention pattern (per query head) in the mapping.

    The model computes attention openly while it lasts, in its own dtype; afterwards its attention implementation is
    what it was. Raises ModelError where attention that is opened would not be the model's own.
    """
    with mixers_called(lm) as mixed:
        found = Patterns(mixed=mixed)
        if not lm.applies("opened"):  # there are none
            yield found
            return
        lm.require("opened")
        with _open(lm, found):
            yield found


def is_called(lm: Model) -> bool:
    """Is attention a function that can be put in: by transformers' interface, or for torch's own (falcon)?"""
    return lm.row.interface or lm.config._attn_implementation == "sdpa"


def _open(lm: Model, found: Patterns) -> AbstractContextManager[None]:
    if lm.row.interface:
        return _open_attention(lm, found)
    return _open_torch(lm, found) if is_called(lm) else _returned_weights(lm, found)


def _open_torch(lm: Model, found: Patterns) -> AbstractContextManager[None]:
    def around(layer: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Attended:
        out, pattern = attend(query, key, value)
        if pattern is not None:
            found.pattern[layer] = pattern.detach().to(lm.device)
        return out, pattern

    return around_attention(lm, around, eager=True)


@contextmanager
def _open_attention(lm: Model, found: Patterns) -> Iterator[None]:
    layer_of = {layer.attention: layer.index for layer in lm.layers if layer.attends}
    closed = _own(lm) != "eager"

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ):
        mask = added(attention_mask, query.dtype) if closed else attention_mask
        mask = chosen(mask, query, key, settings)
        pattern, key_value = pattern_of(query, key, mask, **settings), per_query_head(value, query)
        found.pattern[layer_of[module]] = pattern.detach().to(lm.device)
        out = (pattern @ key_value).transpose(1, 2).contiguous()
        return sloped(lm, out), pattern

    with multiplied(lm, found.gate), registered(lm.config, attend, eager_mask):
        yield


@dataclass(frozen=True, eq=False)
class Scored:
    """What one layer's attention was called with: queries, keys and values of every query head, and its scores.

    `scores` gives those of other queries or keys, after the scaling and soft-cap of the model and before the softmax;
    `visible` says which keys a query sees, `shared` how many keys and values the heads have between them, `sink` what
    each head's softmax takes beside its scores, if anything.
    """

    query: Float[Tensor, "prompt head query d_head"]
    key: Float[Tensor, "prompt head key d_head"]
    value: Float[Tensor, "prompt head key d_head"]
    visible: Bool[Tensor, "_ _ query key"]
    shared: int
    scores: Callable[[Tensor, Tensor], Float[Tensor, "prompt head query key"]]
    sink: Float[Tensor, " head"] | None = None


@contextmanager
def scoring(lm: Model) -> Iterator[dict[int, Scored]]:
    """Inside the `with`, every forward pass leaves layer -> what its attention was called with, in float32 or better.

    Raises ModelError for a family whose attention does not go through transformers' interface, and where something
    stands between attention and the out-projection.
    """
    if not lm.row.interface:
        raise ModelError(f"the scores of {lm.family}'s attention are not shown by any module", fix="use method='atp'")
    if has_gates(lm):
        raise ModelError(
            f"heads of {lm.family} are gated or normed, so the slope of what they give is not that at a pattern",
            fix="use method='atp'",
        )
    lm.require("opened")
    found: dict[int, Scored] = {}
    layer_of = {layer.attention: layer.index for layer in lm.layers if layer.attends}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **settings: Any):
        exact = torch.promote_types(query.dtype, torch.float32)
        mask = chosen(attention_mask, query, key, settings)
        assert mask is not None  # noqa: S101 (that of eager attention, asked for below)
        keys, values = (per_query_head(shared, query) for shared in (key, value))
        visible = mask[..., : key.shape[-2]] > torch.finfo(mask.dtype).min / 2
        scores = partial(scores_of, **settings)
        seen = [part.detach().to(lm.device, exact) for part in (query, keys, values)]
        sink = None if (own := settings.get("s_aux")) is None else own.detach().flatten().to(lm.device, exact)
        found[layer_of[module]] = Scored(seen[0], seen[1], seen[2], visible.to(lm.device), key.shape[1], scores, sink)
        pattern = pattern_of(query, key, mask, **settings)
        return (pattern @ values).transpose(1, 2).contiguous(), pattern

    with registered(lm.config, attend, eager_mask):
        yield found


@contextmanager
def around_attention(lm: Model, around: Around, eager: bool) -> Iterator[None]:
    """Inside the `with`, what attends in each layer is `around(layer, attend, query, key, value)`.

    `attend` is the model's own attention function, or with `eager` the one of its family that also returns the pattern;
    keys and values are per key/value head, and may be handed on per query head. For models of which `is_called` holds.
    Raises ModelError where another function than the model's own would not do the same.
    """
    if eager or (lm.row.interface and not _is_own(lm)):
        lm.require("opened")
    with _around_interface(lm, around, eager) if lm.row.interface else _around_torch(lm, around, eager):
        yield


@contextmanager
def _around_interface(lm: Model, around: Around, eager: bool) -> Iterator[None]:
    own = "eager" if eager else _own(lm)
    layer_of = {layer.attention: layer.index for layer in lm.layers if layer.attends}
    opened = own == "eager" and _own(lm) != "eager"
    attend = partial(_attend_interface, around, layer_of, own, opened)
    mask = _eager_mask if own == "eager" else AttentionMaskInterface._global_mapping.get(own)
    with registered(lm.config, attend, mask):
        yield


def _eager_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of eager attention, if any; its least float64 would be −∞ in a float32 softmax: NaN in a padded row."""
    mask = eager_mask(*args, **kwargs)
    if mask is None or mask.dtype != torch.float64:
        return mask
    return mask.clamp_min(torch.finfo(torch.float32).min)


def _attend_interface(
    around: Around, layer_of: dict[nn.Module, int], own: str, opened: bool, module: nn.Module, *seen: Tensor | None,
    **settings: Any,
) -> Attended:  # fmt: skip
    query, key, value, *mask = seen
    assert query is not None and key is not None and value is not None  # noqa: S101, PT018
    if opened and mask:
        mask[0] = added(mask[0], query.dtype)
    if mask:
        mask[0] = chosen(mask[0], query, key, settings)
    function, shared = ALL_ATTENTION_FUNCTIONS.get(own) or eager_of(module), key.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Attended:
        whose = module if key.shape[1] == shared else _Ungrouped(module)
        out, pattern = function(whose, query, key, value, *mask, **settings)
        # Some families scale what a head gives by what its sink leaves, and return the pattern before that.
        sunk = pattern is not None and settings.get("s_aux") is not None
        return out, pattern_of(query, key, *mask, **settings).to(out.dtype) if sunk else pattern

    return around(layer_of[module], attend, query, key, value)


@contextmanager
def _around_torch(lm: Model, around: Around, eager: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in (layer for layer in lm.layers if layer.attends):
            attend = partial(_attend_torch, layer, partial(around, layer.index), eager)
            stack.enter_context(_calls(layer.attention, attend))
        yield


def _attend_torch(
    layer: Layer, around: Callable[..., Attended], eager: bool, query: Tensor, key: Tensor, value: Tensor,
    **settings: Any,
) -> Tensor:  # fmt: skip
    # A family may have given every query head its copy already; the call stays as it is where nobody changes them.
    each = max(1, key.shape[1] // layer.kv_heads)
    shared_key, shared_value = key[:, ::each], value[:, ::each]
    function = _torch_with_pattern if eager else _torch_alone
    attend: Attend = lambda query, own_key, own_value: function(  # noqa: E731
        query,
        key if own_key is shared_key else per_query_head(own_key, query),
        value if own_value is shared_value else per_query_head(own_value, query),
        **settings,
    )
    return around(attend, query, shared_key, shared_value)[0].transpose(1, 2)


def _torch_alone(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Attended:
    return nn.functional.scaled_dot_product_attention(query, key, value, **settings).transpose(1, 2), None


def _torch_with_pattern(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **rest: Any
) -> Attended:
    """What torch's attention function computes, openly: in float32 or better, as it does."""
    exact = torch.promote_types(query.dtype, torch.float32)
    if attn_mask is None:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)[None, None]
        attn_mask = attn_mask.tril() if is_causal else attn_mask
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=exact).masked_fill(~attn_mask, torch.finfo(exact).min)
    pattern = pattern_of(query.to(exact), key.to(exact), attn_mask.to(exact), scaling=rest.get("scale")).to(query.dtype)
    pattern = nn.functional.dropout(pattern, rest.get("dropout_p", 0.0))
    return (pattern @ per_query_head(value, query)).transpose(1, 2), pattern


@contextmanager
def _calls(module: nn.Module, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the `with`, torch's attention function is `attend` while this module's forward runs."""
    before, forward = module.__dict__.get("forward"), module.forward

    def shown(*args: Any, **kwargs: Any) -> Any:
        with AttendInstead(attend):
            return forward(*args, **kwargs)

    module.forward = shown
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class AttendInstead(TorchFunctionMode):
    """Inside the `with`, another function is in the place of torch's attention."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attention = nn.functional.scaled_dot_product_attention
        return (self._attend if func is attention else func)(*args, **(kwargs or {}))


class _Ungrouped:
    """An attention module for a call in which every query head has its own key and value."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _is_own(lm: Model) -> bool:
    return _own(lm) == (lm.config._attn_implementation or "eager")


def _own(lm: Model) -> str:
    name = lm.config._attn_implementation
    # Flash and flex attention are asked for by name in many places, so another name would not do the same.
    return "eager" if name is None or any(word in name for word in ("flash", "flex", "paged", "|")) else name


def eager_of(module: nn.Module) -> Callable[..., Attended]:
    """The eager attention function of a module's family."""
    for kind in type(module).__mro__:
        if function := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None):
            return function
    raise ModelError(
        f"no eager attention function is known for {type(module).__name__}",
        expected="an eager_attention_forward beside it in transformers",
    )


@contextmanager
def registered(config: Any, attend: Callable[..., Any], mask: Callable[..., Any] | None) -> Iterator[None]:
    """Inside the `with`, `attend` is what attends in a model of this configuration, under masks that `mask` makes."""
    if str(config._attn_implementation).startswith(_NAME):
        raise ModelError(
            "attention of this model is already opened by an enclosing `with`", fix="close the trace around it first"
        )
    # Two models may be open at once, and be closed in any order.
    name = f"{_NAME}_{id(attend)}"
    try:
        # transformers makes a mask only for names in the class-wide register.
        if mask is not None:
            AttentionMaskInterface.register(name, mask)
        ALL_ATTENTION_FUNCTIONS[name] = attend
        with implementation(config, name):
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def _returned_weights(lm: Model, found: Patterns) -> Iterator[None]:
    def keep(layer: int, pattern: Tensor) -> None:
        found.pattern[layer] = pattern.detach().to(lm.device)

    seen = (after(layer.attention, partial(keep, layer.index), item=1) for layer in lm.layers if layer.attends)
    with hooked(seen), implementation(lm.config, "eager"):
        yield


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    """Inside the `with`, the attention of models of this configuration goes by this name."""
    # The configuration is what every forward pass reads; the model's own setter refuses families such as falcon.
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
