"""What must attention remember of earlier positions, so that a pass may bring only the later ones?

Keys and values of a clean run, kept whole (also where a sliding window would forget them; the mask still hides them).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer

from unwrite.model.hooks import Call

# Older releases of transformers have no scorers, and no cache for their keys.
_LAYER: type[DynamicLayer] = getattr(cache_utils, "DynamicIndexedLayer", DynamicLayer)

# Keys and values, or what both are made of, and keys of a scorer that says where attention looks, where there is one.
Past = tuple[Float[Tensor, "prompt _heads position _d"], ...]

# A mask is [prompt, head or 1, query, key].
_OF_MASK = 4


def empty() -> Cache:
    """A cache for a run that begins at position 0."""
    # Some attention looks only where a scorer with keys of its own says, and then asks the cache for those.
    return Cache(layer_class_to_replicate=_LAYER)


def keeping(decoder: nn.Module, cache: Cache) -> dict[str, Any]:
    """The arguments by which a decoder is given a cache, whose name transformers 5.24 changed."""
    name = "cache" if "cache" in inspect.signature(type(decoder).forward).parameters else "past_key_values"
    return {"use_cache": True, name: cache}


def kept_of(cache: Cache, makes: Sequence[bool]) -> list[Past]:
    """Keys and values of every layer after a run, nothing of one that `makes` none of its own.

    None at all where some layer that makes them kept none under its own number.
    """
    there: list[Any] = [*cache.layers]
    kept: list[Any] = [
        () if not own else _kept(there[i]) if i < len(there) else (None,) for i, own in enumerate(makes)
    ]  # fmt: skip
    return kept if all(part is not None for past in kept for part in past) else []


def _kept(layer: Any) -> tuple[Any, ...]:
    scorer = getattr(layer, "indexer_keys", None)
    pair = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return pair if scorer is None else (*pair, scorer[:, None])


class _Remembered(_LAYER):
    """Earlier positions of one layer. New ones are attended to and not remembered, so that it serves many passes."""

    def __init__(self, keys: Tensor, values: Tensor, scorer: Tensor | None = None):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.scorer = scorer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        known = [] if self.scorer is None else [self.scorer[:, 0]]
        return torch.cat([*known, indexer_key_states], 1)


def remembering(kept: Mapping[int, Past], layers: int) -> Cache:
    """A cache in which some of the layers know earlier positions, for any number of passes that bring the next ones."""
    return Cache(layers=[_Remembered(*kept[i]) if kept.get(i) else _LAYER() for i in range(layers)])


@dataclass(frozen=True, eq=False)
class ByPrompt:
    """An argument of a block that is another one for another prompt: a tensor whose first axis is that of the prompts,
    or what blocks hand on to later ones, tensors of that kind by name."""

    whole: Any


class Handed:
    """What blocks of runs that go up together have handed on to later ones, by run. Runs that join them take what it
    was in the run of the whole prompts."""

    def __init__(self, known: Mapping[str, Mapping[Any, tuple[Tensor, ...]]] | None = None):
        self._known = dict(known or {})
        self._given: dict[str, Any] = {}

    def of(self, runs: Int[Tensor, " run"]) -> Handed:
        """That of some of the runs, apart from these."""
        some: Callable[[Tensor], Tensor] = lambda part: part[runs.to(part.device)]  # noqa: E731
        return Handed({name: {key: tuple(map(some, parts)) for key, parts in known.items()}
                       for name, known in self._known.items()})  # fmt: skip

    def give(self, name: str, whole: MutableMapping[Any, Any], prompt: Int[Tensor, " run"]) -> MutableMapping[Any, Any]:
        """What a block of runs of these prompts is given, and may add to."""
        known, made = self._known.get(name, {}), copy(whole)
        for key, parts in whole.items():
            own = known.get(key, ())
            n = len(own[0]) if own else 0
            rest = [part[prompt[n:].to(part.device)] for part in parts]
            joined = (
                [torch.cat(pair) for pair in zip(own, rest, strict=True)] if own and n < len(prompt) else own or rest
            )
            made[key] = tuple(joined)
        self._given[name] = made
        return made

    def keep(self) -> None:
        """The block has run: what it left is what later ones find."""
        self._known |= {name: dict(given) for name, given in self._given.items()}


def of_prompts(call: Call, prompt: Int[Tensor, " run"], handed: Handed) -> Call:
    """A call in which what is another one for another prompt is that of these prompts, one for each run."""

    def fit(name: str, value: Any) -> Any:
        if not isinstance(value, ByPrompt):
            return value
        whole = value.whole
        return whole[prompt.to(whole.device)] if isinstance(whole, Tensor) else handed.give(name, whole, prompt)

    return _each(call, fit)


def with_past(call: Call, cache: Cache | None, prompt: Int[Tensor, " run"], handed: Handed) -> Call:
    """The arguments with which a block was called for one prompt, for runs of these prompts with this past."""
    prompts = len(prompt)

    def fit(name: str, value: Any) -> Any:
        if isinstance(value, Cache):
            return cache
        if isinstance(value, Tensor) and value.dim() == _OF_MASK and len(value) == 1:
            return value.expand(prompts, -1, -1, -1)  # some families ask for a mask of every prompt
        # Everything else has an axis for prompts, of size 1; that of ALiBi may be folded into that of its heads.
        return value.repeat(prompts, *[1] * (value.dim() - 1)) if name == "alibi" and value is not None else value

    return of_prompts(_each(call, fit), prompt, handed)


def _each(call: Call, fit: Callable[[str, Any], Any]) -> Call:
    args, kwargs = call
    return tuple(fit(str(i), value) for i, value in enumerate(args)), {n: fit(n, value) for n, value in kwargs.items()}
