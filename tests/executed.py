"""What does a write do to a logit of the user's own model when it is really taken out? Plain hooks, a prompt at a time.

What nodes write is what twin.py finds; nothing of the library is imported. `exact` makes families that compute norms
and softmax in float32 compute them in float64, so that a wrong formula cannot hide behind rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from twin import Truth

# OPT may project the stream before the unembedding; such a model is refused.
PINNED: dict[str, dict[str, Any]] = {"opt": {"word_embed_proj_dim": None}}


@contextmanager
def exact() -> Iterator[None]:
    """Inside the `with`, float32 in the code of a model means float64."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Inside the `with`, hooks that were put on modules stay there."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weights(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A tiny model that can be decomposed."""
    return tiny.model(family, seed, dtype, **{**PINNED.get(family, {}), **settings})


def uncapped(hf: Any) -> Any:
    """The same model without a soft-cap on its logits."""
    hf = copy.deepcopy(hf)
    if hasattr(hf.config, "final_logit_softcapping"):
        hf.config.final_logit_softcapping = None
    return hf


@dataclass(frozen=True)
class Alone:
    """One prompt [position] of a Hugging Face model, and the logit of `answer` (less that of `against`) at one row."""

    hf: Any
    ids: Tensor
    row: int
    answer: int
    against: int | None = None
    raw: bool = False

    @cached_property
    def truth(self) -> Truth:
        return Truth(self.hf, self.ids[None])

    @cached_property
    def writes(self) -> Mapping[str, Tensor]:
        """What every node writes [position, d_model]."""
        return self._written(self.truth)

    def _written(self, truth: Truth) -> dict[str, Tensor]:
        return {name: write[0] for name, write in (truth.raw() if self.raw else truth.paper()).items()}

    def difference(self, logits: Tensor) -> float:
        """Of logits [prompt, position, token]."""
        row = logits[0, self.row]
        return float(row[self.answer] - (0 if self.against is None else row[self.against]))

    @cached_property
    def measured(self) -> float:
        """By the model itself."""
        return self.difference(self.truth.logits())

    def direct(self, vector: Tensor) -> float:
        """What `vector` in the final stream's read row adds to the difference, the final norm multiplying as it did."""
        return self.difference(self.spoken(vector).expand(1, self.row + 1, -1))

    @torch.no_grad()
    def spoken(self, vector: Tensor) -> Tensor:
        """The same for the logit of every token."""
        head, norm, x = self.hf.get_output_embeddings(), self.truth.final, self.truth.states()[self._end][0, self.row]
        nothing, shifted = norm(torch.zeros_like(x)), norm(x + 1)
        sees_mean = (shifted - norm(x)).abs().max() > 1e-6
        moved = [v if sees_mean else v - v.mean() for v in (x, vector)]
        normed = (norm(x) - nothing) / moved[0] * moved[1]
        return self._scale * (head(normed) - head(torch.zeros_like(normed)))

    @cached_property
    @torch.no_grad()
    def _scale(self) -> float:
        """Some families multiply all logits by a number."""
        made = self.hf.get_output_embeddings()(self.truth.final(self.truth.states()[self._end][0, self.row]))
        return float(self.truth.logits()[0, self.row, 0] / made[0])

    @property
    def _end(self) -> str:
        return list(self.truth.states())[-1]

    def constant(self) -> float:
        """What is left of the difference when all writes are accounted for."""
        return self.measured - sum(self.direct(write[self.row]) for write in self.writes.values())

    def total(self, node: str, change: Tensor) -> float:
        """How much smaller the difference is without `change` [position, d_model] in what `node` writes."""
        with self.without(node, change):
            return self.measured - self.difference(Truth(self.hf, self.ids[None]).logits())

    def why(self, node: str, change: Tensor) -> dict[str, float]:
        """The account of `total` part by part, from the writes of a run without the change."""
        with self.without(node, change):
            gone = Truth(self.hf, self.ids[None])
            end, measured, again = (
                gone.states()[self._end][0, self.row],
                self.difference(gone.logits()),
                self._written(gone),
            )
        names = list(self.writes)
        parts = dict.fromkeys(("direct", "erased", "filled_in", "norm"), 0.0)
        parts["direct"] = self.direct(change[self.row])
        for name in names:
            # The hooks of a removal sit in its own layer, and where the removed run is taken apart they show there.
            own = name == node or _layer(name) < _layer(node) or (_layer(name) == _layer(node) and name[:3] != "MLP")
            a = self.direct(self.writes[name][self.row])
            b = a if own else self.direct(again[name][self.row])
            for part, bound in (("erased", min), ("filled_in", max)):
                sign = -1 if parts["direct"] < 0 else 1
                parts[part] += sign * (bound(sign * a, 0) - bound(sign * b, 0))
        parts["norm"] = self.direct(end) + self._bias - measured
        return parts

    @property
    def _bias(self) -> float:
        return self.measured - self.direct(self.truth.states()[self._end][0, self.row])

    @contextmanager
    def without(self, node: str, change: Tensor) -> Iterator[None]:
        """Inside the `with`, `node` writes less by `change` wherever the model is called, for repeated prompts too."""
        module, before = self._place(node)
        # Granite multiplies what a branch gives by a number before it adds it to the stream.
        branch = not before and not node.startswith("MLP")
        less = change / (getattr(self.hf.config, "residual_multiplier", 1.0) if branch else 1.0)

        def put(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] - less, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] - less}

        def take(_: nn.Module, args: Any, output: Any) -> Any:
            return output - less if isinstance(output, Tensor) else (output[0] - less, *output[1:])

        add = module.register_forward_pre_hook(put, with_kwargs=True) if before else module.register_forward_hook(take)
        try:
            yield
        finally:
            add.remove()

    def _place(self, node: str) -> tuple[nn.Module, bool]:
        if "embed" in node:
            return self.truth.blocks[0], True
        block = self.truth.blocks[_layer(node)]
        if node.startswith("MLP"):
            return block, False
        return (block.post_attention_layernorm if self.truth._post_norm else self.truth._out(block)), False


def _layer(node: str) -> int:
    """L12H3, L12.bias and MLP12 are of layer 12; embeddings come before all layers."""
    digits = node.removeprefix("MLP").removeprefix("L").replace(".", "H").split("H")[0]
    return int(digits) if digits.isdigit() else -1
