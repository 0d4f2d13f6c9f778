"""Where do the values come from that nodes are set to? Source prompts, means, zero, other pairs, another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.errors import ModelError, NumericError, TokensError, counted, one_of
from unwrite.model.load import weights_hash
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.run.edit.slots import Slot, Values, added_to, slots, values
from unwrite.run.loop.stream import batch_size, batches, parts

DONORS = ("source", "mean", "zero", "resample")


@dataclass(frozen=True, eq=False)
class Donor:
    """`name` says where values of `slots` come from; `reader` is the model that reads them there.

    They are handed out where `lm` is, in which they are put: another model may lie elsewhere. `at`: the rows of source
    prompts that roles name, of which alone values are taken; by default of all rows.
    """

    name: str
    pairs: Pairs
    slots: tuple[Slot, ...]
    reader: Model
    read: tuple[Slot, ...]
    order: Int[np.ndarray, " pair"]
    lm: Model
    at: Int[np.ndarray, "pair role"] | None = None

    @property
    def read_by(self) -> dict[str, str]:
        """The hash of another model's weights that read the values."""
        return {"read by": weights_hash(self.reader)} if self.name not in DONORS else {}

    def ids(self, rows: slice) -> Int[Tensor, "pair position"]:
        """The prompts that these pairs' values come from."""
        return torch.from_numpy(self.pairs.source.ids[self.order[rows]])

    def values(self, rows: slice) -> Values:
        """What the nodes of these pairs are set to, at every position or at each role."""
        if self.name == "mean":
            return {slot: part.expand(rows.stop - rows.start, *part.shape[1:]) for slot, part in self._means.items()}
        found = self._taken(values(self.reader, self.ids(rows), self.read), self.order[rows])
        return {slot: self._put(slot, found[other], other) for slot, other in zip(self.slots, self.read, strict=True)}

    def _put(self, slot: Slot, value: Tensor, read: Slot) -> Tensor:
        """A value as it is put where a block adds a constant of its own to what lies there."""
        value = value.to(self.lm.device)
        if self.name == "zero":
            return torch.zeros_like(value) - added_to(self.lm, slot).to(value)
        if self.reader is self.lm:
            return value
        return value + (added_to(self.reader, read).to(value) - added_to(self.lm, slot).to(value))

    def _taken(
        self, found: Values, pairs: Int[np.ndarray, " pair"]
    ) -> Mapping[Slot, Float[Tensor, "pair place _unit _d"]]:
        """Values of these pairs' source prompts at the rows that roles name, where they do."""
        if self.at is None:
            return found
        rows = torch.from_numpy(self.at[pairs])
        return {slot: part[torch.arange(len(rows))[:, None], rows] for slot, part in found.items()}

    @cached_property
    def _means(self) -> Values:
        """Means over the source prompts that reach a position, or that have a role, which is all."""
        tokens, total = self.pairs.source, dict.fromkeys(self.slots, torch.zeros(()))
        reach = torch.from_numpy(np.arange(tokens.length) < tokens.lengths[:, None])
        reach = reach if self.at is None else reach.new_ones(self.at.shape)
        for batch in batches(tokens, batch_size(self.reader, tokens)):
            pairs = np.minimum(batch.first + np.arange(len(batch.ids)), len(tokens) - 1)
            for rows, found in parts(batch, lambda part: values(self.reader, part.ids, self.slots)):
                for slot, part in self._taken(found, pairs[rows]).items():
                    real = batch.counted[rows]
                    kept = real if self.at is None else real[:, :1].expand(-1, self.at.shape[1])
                    exact = part.to(self.reader.compute_dtype)
                    total[slot] = total[slot].to(exact) + torch.einsum("bt...,bt->t...", exact, kept.to(exact))
        counts = reach.sum(0).clamp_min(1)
        return {slot: (part / counts.to(part)[:, None, None])[None] for slot, part in total.items()}


def donor(
    lm: Model, pairs: Pairs, asked: tuple[Slot, ...], source: Any, at: Int[np.ndarray, "pair role"] | None = None
) -> Donor:
    """The donor that `source` names, or another model.

    Raises NumericError for an unknown name, ModelError for a model of another shape, TokensError for a lone pair that
    has no other to take values from.
    """
    order = np.arange(len(pairs))
    if not isinstance(source, Model):
        one_of("source", source, DONORS, also="a model of uw.load")
    own_positions = lm.row.pos_embed is not None and (isinstance(source, Model) or source == "zero")
    if own_positions and any(slot.kind == "embed" for slot in asked):
        raise NumericError(
            "beside its embedding the stream holds positions of the model's own", fix="patch 'resid_pre0', or use mean"
        )
    if isinstance(source, Model):
        pairs.source.check(source.vocabulary, source.context)
        return Donor(_other_name(lm, source), pairs, asked, source, _same(source, asked), order, lm, at)
    if source == "resample":
        order = _others(pairs)
    return Donor(source, pairs, asked, lm, asked, order, lm, at)


def require_way(pairs: Pairs, source: Any, method: str) -> None:
    """Raise NumericError where embeddings cannot go from those of base prompts to those of source prompts."""
    if not isinstance(source, str) or source != "source":
        raise NumericError(f"{method} goes from base to source prompts", got=f"source={source}", fix="leave it out")
    if not pairs.aligned:
        what = f"{method} goes from base to source prompts"
        raise NumericError(what, got="unequal numbers of tokens", expected="equal")


def _other_name(lm: Model, other: Model) -> str:
    shape = ("n_heads", "kv_heads", "head_dim", "d_model", "vocabulary")
    for name in shape:
        if getattr(lm, name) != getattr(other, name):
            raise ModelError(
                "values come from a model of another shape",
                got=f"{name} {getattr(other, name)}", expected=f"{name} {getattr(lm, name)}",
            )  # fmt: skip
    return str(other.about.get("name", other.family))


def _same(other: Model, asked: tuple[Slot, ...]) -> tuple[Slot, ...]:
    return tuple(slots(other, slot.names)[0] for slot in asked)


def _others(pairs: Pairs) -> Int[np.ndarray, " pair"]:
    """For each pair the next one with as many tokens."""
    order = np.arange(len(pairs))
    for length in np.unique(pairs.source.lengths):
        same = np.flatnonzero(pairs.source.lengths == length)
        if len(same) == 1:
            raise TokensError(
                f"pair {same[0]} has no other pair of its length to take values from",
                got=counted(int(length), "token"),
                fix="add one, or choose another source",
            )
        order[same] = np.roll(same, -1)
    return order
