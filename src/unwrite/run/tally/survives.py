"""What survives of many writes, of stand-ins for each, and who acts on them? Sums of every prompt, from executed runs.

survival = Σ⟨x − x^{−w}, o_w⟩_m / Σ⟨o_w, o_w⟩_m over positions, x^{−w} the stream of the run in which w's write was
taken out right after it was written, ⟨a, b⟩_m = Σ m_i a_i b_i. A node acts on a write by what it writes along it
because it is there: acts = Σ⟨o_e − o_e^{−w}, o_w⟩_m / Σ⟨o_w, o_w⟩_m. (Dao et al. 2023, Fig. 3; facts: erasure on real
models)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unwrite.errors import NumericError
from unwrite.model.capture import Recording
from unwrite.model.capture import run as writes_of
from unwrite.model.fold import Folded
from unwrite.model.view import Model
from unwrite.nodes import MLPS, Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch
from unwrite.run.replay.clean import clean
from unwrite.run.replay.removed import Changed, alone, at_once, changed, in_order
from unwrite.run.source.standins import Others, Stead, others_of, stand_in
from unwrite.stats.verdicts import Sums, by_document

# Stand-ins of each kind for a writer that is asked about alone.
ALONE: Mapping[str, int] = {"typical": 8, "signs": 4}
# A row is a sink if the stream there is so many times as long as it is in the median of its prompt.
SINK = 10.0
# The first weights, without the loudest channels.
FEWER = "fewer channels"
# Who the write itself is, among what is put in its place.
OWN = ("own", 0)
_DONE = "chunks done"
# What is NaN where nothing was run; all else is 0 there, but for what every part of a prompt's runs counts anew.
_NAN, _ALIKE = ("y", "rescaled", "rows"), ("sinks", "counted")


@dataclass(frozen=True, eq=False)
class Removals:
    """Which writes are taken out of which tokens, what is put in their place, and how channels are weighed.

    `weights` by name [writer, d_model]; of the first name also stand-ins are as large as the write, and nodes are asked
    how they act. `loudest` are the channels without which a verdict must hold as well.
    """

    lm: Model
    folded: tuple[Folded, ...]
    tokens: Tokens
    skip: int
    writers: Sequence[Node]
    weights: Mapping[str, Float[Tensor, "writer d_model"]]
    draws: Mapping[str, int]
    loudest: tuple[int, ...] = ()

    @property
    def weighed(self) -> dict[str, Float[Tensor, "writer d_model"]]:
        """All weights in which is measured: those asked for, and the first without the loudest channels."""
        fewer = next(iter(self.weights.values())).clone()
        fewer[:, [*self.loudest]] = 0.0
        return {**self.weights, FEWER: fewer}

    @property
    def puts_in(self) -> list[tuple[str, int]]:
        """The write itself and every draw of every control."""
        return [OWN, *((control, draw) for control, draws in self.draws.items() for draw in range(draws))]

    @property
    def columns(self) -> dict[str, slice]:
        """Where the draws of each control are among these."""
        ends = np.cumsum([1, *self.draws.values()]).tolist()
        return {control: slice(*pair) for control, pair in zip(self.draws, pairwise(ends), strict=True)}

    def sums(self, whole: Arrays, weigh: str | None = None, without_sinks: bool = False) -> Sums:
        """What was summed up of all prompts, by document, in these weights (by default the first): what a verdict rests
        on. By whom something is erased is measured in the first weights, in all rows.

        Raises NumericError without sinks in others than the first.
        """
        which = [*self.weights, FEWER].index(weigh or next(iter(self.weights)))
        if without_sinks and which:
            raise NumericError("sums without sinks are kept in the first weights only", got=weigh)
        y, x = (
            np.moveaxis(whole["without_sinks"], -1, 0)
            if without_sinks
            else (whole["y"][..., -1, which], whole["x"][..., which])
        )
        y, x, along, acts = (by_document(part, self.tokens.cluster) for part in (y, x, whole["share"], whole["acts"]))
        depth, block = (np.array([node.layer for node in nodes]) for nodes in (self.writers, self.lm.parts))
        return Sums(y, x, self.columns, depth, along, acts, block)


class SurvivalTally:
    """Sums of every prompt, filled in batch by batch; of the batch that is not done those of the runs that are."""

    def __init__(self, asked: Removals, job: Job):
        self._asked, self._job = asked, job
        self._rows = Rows(self._measured, _joined)
        self._begun: Arrays = {}
        self.kept = Ledger({"done": self._rows.kept, "begun": self._begun})
        self.step, self.whole = self._rows.step, self._rows.whole

    def _measured(self, batch: Batch) -> Arrays:
        of = Measuring(self._asked, batch)
        name, prompts = f"prompts {batch.first} to {batch.first + batch.real}", len(self._asked.tokens)
        name += f", part {batch.share[0]}" if batch.share[1] > 1 else ""
        held = {
            path.removeprefix(f"{name}/"): part for path, part in self._begun.items() if path.startswith(f"{name}/")
        }
        for done, total in of.all(held):
            self._begun.clear()
            self._begun |= {f"{name}/{key}": part for key, part in of.found(done).items()}
            reached = batch.first + batch.real * done / total
            self._job.tick(self.kept, done / total, f"{reached:.1f}/{prompts} prompts")
        self._begun.clear()
        batch.require_sums((of.y[..., -1, :][of.own], of.x, of.share, of.acts), "what a run without a write leaves")
        return of.found()


def _joined(one: Arrays, other: Arrays) -> Arrays:
    """Two parts of the runs of the same prompts."""
    found = {name: part + other[name] for name, part in one.items() if name not in (*_NAN, *_ALIKE)}
    found |= {name: np.where(np.isnan(one[name]), other[name], one[name]) for name in _NAN}
    return {**found, **{name: one[name] for name in _ALIKE}}


class Measuring:
    """One batch of prompts, one clean run of it, and every run in which something is taken out of it."""

    def __init__(self, asked: Removals, batch: Batch):
        lm = self.lm = asked.lm
        self.asked, self.real, self.weights, self.part = asked, batch.real, asked.weighed, batch.share
        self.kept = batch.beyond(asked.skip).to(lm.device)
        self.run = clean(lm, batch.ids, asked.folded)
        # Of one prompt the clean run has called its blocks just so.
        self.calls = self.run.calls if len(batch.ids) == 1 else alone(lm, batch.ids)
        self.other = Others(
            lm, asked.folded, writes_of(lm, others_of(asked.tokens, asked.skip, batch), asked.folded), self.kept
        )
        self.state = {state: i for i, state in enumerate(lm.states)}
        self.at = {node: i for i, node in enumerate(lm.parts)}
        self.sinks = self._sinks()
        shape = (batch.real, len(asked.writers), len(asked.puts_in))
        self.length = batch.ids.shape[1]
        exact = {"dtype": torch.float64, "device": lm.device}
        self.y = torch.full((*shape, len(lm.states), len(self.weights)), torch.nan, **exact)
        self.x = torch.zeros(*shape, len(self.weights), **exact)
        self.own = torch.zeros(shape, dtype=torch.bool, device=lm.device)
        self.without_sinks = torch.zeros(*shape, 2, **exact)
        self.share, self.acts = (torch.zeros(*shape[:2], len(lm.parts), **exact) for _ in range(2))
        self.rescaled = torch.full((*shape[:2], len(lm.states)), torch.nan, **exact)
        self.rows = torch.full((*shape[:2], self.length), torch.nan, device=lm.device, dtype=torch.float32)
        self.channels = torch.zeros(*shape[:2], lm.d_model, **exact)

    def all(self, held: Arrays) -> Iterator[tuple[int, int]]:
        """Every run, or this part of them, in as many chunks as it takes, some of them `held`; says how many are done,
        of how many."""
        writers, put_in = range(len(self.asked.writers)), range(self.x.shape[2])
        runs = [(p, w, s) for w in writers for s in put_in for p in range(self.real)]
        order = in_order(self.lm, [self.asked.writers[w] for _, w, _ in runs])
        for name, part in self._sums().items() if held else ():
            part.copy_(torch.from_numpy(held[name]))
        size, (part, of) = at_once(self.length, self.lm.device), self.part
        # Which runs go up together is the same whoever does them, and so are their bits.
        chunks = [[runs[i] for i in order[start : start + size]] for start in range(0, len(order), size)][part::of]
        for p, w, s in (run for chunk in chunks for run in chunk):
            self.own[p, w, s] = True
        for done, chunk in enumerate(chunks, 1):
            if done > int(held.get(_DONE, 0)):
                _Chunk(self, chunk).go()
                yield done, len(chunks)

    def _sums(self) -> dict[str, Tensor]:
        return {
            "y": self.y, "x": self.x, "without_sinks": self.without_sinks, "share": self.share, "acts": self.acts,
            "rescaled": self.rescaled, "rows": self.rows, "channels": self.channels,
        }  # fmt: skip

    def found(self, done: int | None = None) -> Arrays:
        """What is summed up, as arrays by name; with how many runs are done, if not all."""
        counts = {"sinks": self.sinks & self.kept, "counted": self.kept}
        whole = {**self._sums(), **{name: part[: self.real].sum(1) for name, part in counts.items()}}
        found = {name: part.cpu().numpy().copy() for name, part in whole.items()}
        return found if done is None else {**found, _DONE: np.array(done)}

    def _sinks(self) -> Bool[Tensor, "prompt position"]:
        """Rows at which the stream of the clean run is far longer than elsewhere in the prompt, at some location."""
        found = torch.zeros_like(self.kept)
        for state in self.lm.states:
            x = self.run.record.stream[state]
            length = x.expand(len(self.kept), *x.shape[1:]).norm(dim=-1)
            middle = length.masked_fill(~self.kept, torch.nan).nanmedian(1, keepdim=True).values
            found |= length > SINK * middle
        return found

    def writes(self, w: int, puts: Iterable[int]) -> dict[tuple[int, int], Float[Tensor, "prompt position d_model"]]:
        """What is taken out: a write itself, or what stands in for it."""
        node, weights = self.asked.writers[w], next(iter(self.weights.values()))[w]
        own = self.run.write(node) * self.kept[..., None]
        place = Stead(self.lm, node, own, self.other)
        put_in = {s: self.asked.puts_in[s] for s in puts}
        return {(w, s): own if put == OWN else stand_in(place, *put, weights) for s, put in put_in.items()}


class _Chunk:
    """Some runs, each (prompt, writer, what is put in), that go up the layers together."""

    def __init__(self, of: Measuring, runs: Sequence[tuple[int, int, int]]):
        self.of, lm = of, of.lm
        self.prompt, self.w, self.s = (torch.tensor(part, device=lm.device) for part in zip(*runs, strict=True))
        self.nodes = [of.asked.writers[w] for _, w, _ in runs]
        made: dict[tuple[int, int], Tensor] = {}
        for writer in dict.fromkeys(w for _, w, _ in runs):
            made |= of.writes(writer, dict.fromkeys(s for _, w, s in runs if w == writer))
        self.write = torch.stack([made[w, s][p] for p, w, s in runs])
        # How channels are weighed in each run: [run, d_model, weigh].
        self.weights = torch.stack([weights[self.w] for weights in of.weights.values()], -1)
        # Only of the write itself it is asked who acts on it.
        own = [i for i, (_, _, s) in enumerate(runs) if s == 0]
        self.own = torch.tensor(own, dtype=torch.long, device=lm.device)
        self.along = self.write[self.own] * self.weights[self.own, None, :, 0]
        self.alone = len({p for p, _, _ in runs}) == 1

    def go(self) -> None:
        of = self.of
        energy, own = self._weighed(self.write.square()), self.own
        of.x[self.prompt, self.w, self.s] = energy
        after = torch.tensor([of.state[of.lm.after(node)] for node in self.nodes], device=of.lm.device)
        of.y[self.prompt, self.w, self.s, after] = energy
        # Right after the write nothing has been run yet.
        for k, i in enumerate(own.tolist()):
            x = of.run.record.stream[of.lm.after(self.nodes[i])][self.prompt[i : i + 1]]
            self._rescaled(own[k : k + 1], after[i], x.norm(dim=-1), (x - self.write[i : i + 1]).norm(dim=-1))
        of.channels[self.prompt[own], self.w[own]] = self.write[own].square().sum(1, dtype=torch.float64)
        runs = Changed(self.nodes, self.prompt, -self.write, own)
        self._end(changed(of.run, of.calls, runs, self._seen))

    def _clean(self, whole: Tensor, runs: Tensor | slice) -> Tensor:
        """What belongs to some runs, of what there is for every prompt; once if they are all of one."""
        return whole[self.prompt[:1]] if self.alone else whole[self.prompt[runs]]

    def _weighed(self, products: Float[Tensor, "run position d_model"]) -> Float[Tensor, "run weigh"]:
        """Products of channels, weighed and summed up in the first runs: over positions first, so that they are gone
        through once however many weights there are."""
        return torch.einsum("rd,rdk->rk", products.sum(1).double(), self.weights[: len(products)].double())

    def _seen(self, layer: int, n: int, record: Recording) -> None:
        of, own = self.of, self.own[self.own < n]
        for state, x in record.stream.items():
            base, at = self._clean(of.run.record.stream[state], slice(n)), of.state[state]
            products = (base - x).mul_(self.write[:n])
            of.y[self.prompt[:n], self.w[:n], self.s[:n], at] = self._weighed(products)
            if len(own):
                length = base.norm(dim=-1) if self.alone else base.norm(dim=-1)[own]
                self._rescaled(own, at, length, x[own].norm(dim=-1))
        if len(own):
            self._nodes(layer, own, record)

    def _rescaled(self, own: Tensor, at: Any, length: Tensor, without: Tensor) -> None:
        """Sums of log(‖x‖ / ‖x^{−w}‖): by how much norms scale everything else otherwise."""
        grew = (length / without).log().double() * self.of.kept[self.prompt[own]]
        self.of.rescaled[self.prompt[own], self.w[own], at] = grew.nansum(1)

    def _nodes(self, layer: int, own: Tensor, record: Recording) -> None:
        """What each node of a layer writes along the write, and how much of that because it is there."""
        of, lm, along = self.of, self.of.lm, self.along[: len(own)]
        prompt, w, folds = self.prompt[own], self.w[own], self.of.asked.folded[layer]
        if layer in record.z:
            first, (count, width, _) = of.at[Node(lm.layers[layer].kind, layer, 0)], folds.w_o.shape
            heads = slice(first, first + count)
            read = (along @ folds.w_o.flatten(0, 1).t()).unflatten(-1, (count, width))
            z, clean = record.z[layer], self._clean(of.run.record.z[layer], own)
            of.share[prompt, w, heads] = _both(clean * read)
            of.acts[prompt, w, heads] = _both((clean - z).mul_(read))
        for mlp in (node for kind in MLPS if (node := Node(kind, layer)) in of.at):
            written, clean = record.vectors[mlp], self._clean(of.run.record.vectors[mlp], own)
            of.share[prompt, w, of.at[mlp]] = _both(clean * along)
            of.acts[prompt, w, of.at[mlp]] = _both((clean - written).mul_(along))
        if (bias := Node("bias", layer)) in of.at:
            onto, gain = along @ folds.bias, of.run.record.gain.get(layer)
            at = of.at[bias]
            of.share[prompt, w, at] = _summed(onto if gain is None else onto * gain[prompt])
            if gain is not None:
                of.acts[prompt, w, at] = _summed(onto * (gain[prompt] - record.gain[layer]))

    def _end(self, final: Float[Tensor, "run position d_model"]) -> None:
        of = self.of
        products = (self._clean(of.run.record.stream[of.lm.states[-1]], slice(None)) - final).mul_(self.write)
        weights = self.weights[..., :1]
        products, energy = ((part @ weights)[..., 0] for part in (products, self.write.square()))
        plain = ~of.sinks[self.prompt]
        of.without_sinks[self.prompt, self.w, self.s, 0] = _summed(products * plain)
        of.without_sinks[self.prompt, self.w, self.s, 1] = _summed(energy * plain)
        own = self.own
        ratio = torch.where(energy > 0, products / energy, torch.nan)[own]
        of.rows[self.prompt[own], self.w[own]] = ratio.float()


def _summed(products: Float[Tensor, "*run position"]) -> Float[Tensor, "*run"]:
    return products.sum(-1, dtype=torch.float64)


def _both(products: Float[Tensor, "run position ... d"]) -> Float[Tensor, "run ..."]:
    """Summed up over positions, which are many and far apart in memory, and then exactly."""
    return _summed(products.sum(1))
