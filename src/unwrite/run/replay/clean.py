"""What does a clean run leave, that changed ones can begin from?

`Clean` is for runs of whole prompts, which record what every node writes; `Base` for many runs of some of a prompt's
rows, which find the others among kept keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.attention import Patterns, patterns
from unwrite.model.cache import Past
from unwrite.model.capture import Recording, evaluating, recording
from unwrite.model.continued import Calls, apart, by_prompt, calling, calls_from, continued, kept_run
from unwrite.model.fold import Folded
from unwrite.model.hooks import read_of
from unwrite.model.mixers import through_mixer
from unwrite.model.placed import decode
from unwrite.model.values import read_by, through_values, value_scale
from unwrite.model.view import Layer, Model
from unwrite.model.writes import blocks, expand, write_of
from unwrite.nodes import Node
from unwrite.prompts.pairs import Pairs
from unwrite.run.edit.slots import Slot, Values, values_of, watching


@dataclass(frozen=True)
class Clean:
    """A clean run of one batch: what it recorded, how each block was called, and patterns where they were asked for."""

    lm: Model
    folded: Sequence[Folded]
    record: Recording
    calls: Calls
    patterns: Patterns

    def written(self, record: Recording) -> Iterator[Float[Tensor, "node prompt position d_model"]]:
        """What every node wrote in this run or in one continued from it: in write order, a block at a time."""
        rows = record.vectors[Node("embed")].shape[:2]
        writes = record.writes.map(lambda part: part.expand(rows[0], *part.shape[1:]).flatten(0, 1))
        for among in blocks(self.lm):
            yield expand(self.lm, tuple(self.folded), writes, among=among).unflatten(1, rows)

    def write(self, node: Node) -> Float[Tensor, "prompt position d_model"]:
        """What one node wrote in this run."""
        own = write_of(self.lm, self.folded, self.record.writes, node)
        return own.expand(*self.record.vectors[Node("embed")].shape[:2], -1)

    def input(self, layer: int) -> Float[Tensor, "prompt position d_model"]:
        """The stream as this layer's block was given it, wherever the layer before it computes."""
        return read_of(self.calls[layer])

    def scale(self, layer: Layer) -> Float[Tensor, "prompt position *kv_head"] | None:
        """The frozen scale of the norms before and in this layer's values."""
        return value_scale(self.lm, layer, self.record.stream[layer.makes_values.reads])

    def carried(self, layer: int, vector: Tensor) -> Float[Tensor, "prompt position head d_model"]:
        """C of eq. 3: what this layer's heads write because `vector` is in the stream that their values are made of,
        pattern and norms held.

        Of a mixer that shows its values what its heads do, with all else held that it makes of the stream. Raises
        ModelError for a layer with neither.
        """
        block = self.lm.layers[layer]
        scale = self.scale(block)
        if block.mixes:
            read = read_by(self.lm, block, vector, scale)
            through = through_mixer(self.lm, block, self.patterns.mixed[layer], read)
        else:
            gate = self.patterns.gate.get(layer)
            through = through_values(self.lm, block, self.patterns[layer], vector, scale, gate)
        return torch.einsum("bthk,hkd->bthd", self.post_scaled(block, through), self.folded[layer].w_o)

    def post_scaled(self, layer: Layer, z: Tensor) -> Tensor:
        """A part of z times the frozen scale of a post-norm, where there is one."""
        gain = self.record.gain.get(layer.index)
        return z if gain is None else z * gain[..., None, None]


@torch.no_grad()
def clean(
    lm: Model, ids: Int[Tensor, "prompt position"], folded: Sequence[Folded], with_patterns: bool = False
) -> Clean:
    """Run the base model once over left-aligned prompts. With patterns, its attention is computed openly."""
    with ExitStack() as stack:
        found = stack.enter_context(patterns(lm) if with_patterns else nullcontext(Patterns()))
        record = stack.enter_context(recording(lm, folded, truth=True))
        calls = stack.enter_context(calling(lm))
        stack.enter_context(apart(lm))
        decode(lm, ids, use_cache=False)
    return Clean(lm, folded, record, {layer: by_prompt(lm, call, call) for layer, call in calls.items()}, found)


@dataclass(frozen=True, eq=False)
class Base:
    """A clean run of base prompts, and all that a patched one can take from it.

    `inputs[l]` is what block l read, `inputs[L]` the final stream; `kept` are keys and values, where each layer's
    attention is (none: a part of a run is not that of the whole, so runs are whole), everything else on the model's own
    device; `values` those of slots.
    """

    lm: Model
    ids: Int[Tensor, "pair position"]
    row: Int[Tensor, " pair"]
    inputs: Sequence[Float[Tensor, "pair position d_model"]]
    kept: Sequence[Past]
    values: Values

    @property
    def final(self) -> Float[Tensor, "pair d_model"]:
        """The final stream at the rows that are read."""
        return self.inputs[-1][torch.arange(len(self.row), device=self.row.device), self.row]

    def calls(self, start: int, end: int) -> Calls:
        """How the model calls each block for rows start … end of its prompts that follow on earlier ones."""
        return calls_from(self.lm, self.ids, self.kept, start, end)

    def begin(self, start: int) -> int:
        """The first row that a run must bring which differs from this one from row `start` on."""
        return start if self.kept else 0

    def end(self, row: Int[Tensor, " run"]) -> int:
        """Behind the last row that runs must bring of which these rows are read."""
        return int(row.max()) + 1 if self.kept else self.ids.shape[1]


@torch.no_grad()
def base_run(lm: Model, ids: Int[Tensor, "pair position"], row: Int[Tensor, " pair"], slots: Sequence[Slot]) -> Base:
    """Run left-aligned base prompts once and keep what patched runs will need."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        stack.enter_context(apart(lm))
        found = stack.enter_context(watching(lm, slots))
        inputs, kept = kept_run(lm, ids)
    kept = kept if continued(lm, ids, inputs, kept) else []
    return Base(lm, ids.to(lm.device), row, inputs, kept, values_of(lm, found, inputs, len(ids)))


def base_of(lm: Model, pairs: Pairs, rows: slice, slots: Sequence[Slot]) -> Base:
    """The base run of some of the pairs."""
    row = torch.from_numpy(pairs.row[rows]).to(lm.device)
    return base_run(lm, torch.from_numpy(pairs.base.ids[rows]), row, slots)
