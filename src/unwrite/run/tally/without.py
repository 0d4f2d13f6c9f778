"""What changes downstream when one write is taken away? Sums and histograms over clean runs and runs without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unwrite.model.capture import Recording
from unwrite.model.fold import fold
from unwrite.model.view import Model
from unwrite.nodes import MLPS, PROJECTED, Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, batches, parts
from unwrite.run.replay.clean import Clean, clean
from unwrite.run.replay.edited import added, hidden, one_reader
from unwrite.run.source.rotations import rotations
from unwrite.run.tally.by_position import at_the_end, by_position, typical
from unwrite.run.tally.decodable import Decoding, Moments
from unwrite.run.tally.products import along, dot, ratio, squares, summed
from unwrite.stats.mergeable import RATIO, ClusterSums, Histogram, Tree

ROTATIONS = 20
# Readers of the write are compared with readers of this many of them: every one costs a pass through the later blocks.
READ_ROTATIONS = 5
CONDITIONS = ("clean", "patched")
_CLUSTERED, _PLAIN = ("sums", "erasers", "places"), ("nodes", "states")
# What each pass fills.
_EXECUTED = ("sums", "places", *_PLAIN, CONDITIONS[0], "values", "rows", "prompts", "decoding")
_HIDDEN = ("erasers", CONDITIONS[1], "opposed")


@dataclass(frozen=True)
class Measured:
    """What some prompts say, computed to the end and not yet added to anything."""

    totals: dict[str, Any]
    ratios: dict[str, Tensor]
    moments: Moments | None = None
    of_prompts: tuple[int, np.ndarray] = (0, np.zeros(0))

    def tensors(self) -> Iterator[Tensor]:
        """All sums and ratios."""
        yield from self.ratios.values()
        for total in self.totals.values():
            yield from total.tensors().values() if isinstance(total, ClusterSums) else (total,)


class WithoutTally:
    """Everything that `verify` keeps about one writer while prompts stream by."""

    def __init__(self, lm: Model, tokens: Tokens, writer: Node, skip: int, floor: float, job: Job):
        self.lm, self.tokens, self.writer, self.skip, self.floor, self._job = lm, tokens, writer, skip, floor, job
        self.folded = fold(lm)
        rows, n = int(np.maximum(tokens.lengths - skip, 0).sum()), len(lm.parts)
        channels = {**dict.fromkeys(CONDITIONS, n + len(lm.states)), "values": n, "opposed": 1}
        self.ratios = {name: Histogram(width, RATIO, rows, lm.device) for name, width in channels.items()}
        self._rotations = list(rotations(lm, ROTATIONS))
        self._space = _space(self)
        self.decoding = Decoding(lm, tokens, writer, skip, self._space)
        codec = (ClusterSums.tensors, ClusterSums.of_tensors)
        self._totals: dict[str, Tree[Any]] = {name: Tree(add, *codec, lm.device) for name in _CLUSTERED}
        self._totals |= {name: Tree(add, device=lm.device) for name in _PLAIN}
        self._of_prompts = np.zeros(len(tokens))
        self._rows: Arrays = {}
        beside = {"rows": self._rows, "prompts": self._of_prompts, "decoding": self.decoding.kept}
        self.kept = Ledger({**self.ratios, **self._totals, **beside})

    def later(self, node: Node) -> bool:
        """Does `node` write after the writer, so that it can act because of it?"""
        if node.layer != self.writer.layer:
            return node.layer > self.writer.layer
        return node.kind in MLPS and self.lm.can_read(node, self.writer)

    def executed(self, erasers: Sequence[Node] = ()) -> Round:
        """One clean run, one without the write, one for every rotation, its readers, and the algebra through values.

        With `erasers` named beforehand, what `hiding` does as well, from the same run.
        """
        kept = self.kept.only((*_EXECUTED, *(_HIDDEN if erasers else ())))
        runs = 2 + ROTATIONS + READ_ROTATIONS

        def ran(done: int) -> None:
            self._job.tick(kept, done / runs, f"{done}/{runs} runs")

        return Round(self, lambda batch: self._measured(batch, erasers, ran), kept)

    def hiding(self, erasers: Sequence[Node]) -> Round:
        """The paper's intervention: the write hidden from the values of all heads in the erasers' layers."""

        def measured(batch: Batch) -> Measured:
            return self._hidden(batch, self._clean(batch, with_patterns=True), erasers)

        return Round(self, measured, self.kept.only(_HIDDEN))

    def add(self, batch: Batch, found: Iterable[tuple[slice, Measured | None]]) -> None:
        """Take in the parts of a batch, each of which is complete."""
        totals: dict[str, list[Any]] = {}
        for part in (part for _, part in found if part is not None):
            for name, values in part.ratios.items():
                self.ratios[name].add(values)
            for name, value in part.totals.items():
                totals.setdefault(name, []).append(value)
            if part.moments is not None:
                self.decoding.add(part.moments)
            first, survival = part.of_prompts
            self._of_prompts[first : first + len(survival)] = survival
        for name, values in totals.items():
            self._totals[name].add(batch.index, reduce(add, values))

    def _measured(self, batch: Batch, erasers: Sequence[Node], ran: Callable[[int], None]) -> Measured:
        run = self._clean(batch, with_patterns=True)
        beside = self._hidden(batch, run, erasers) if erasers else Measured({}, {})
        # Executed runs are the model's own, and so is what they are compared with. Attention that is opened to show its
        # pattern rounds otherwise than a fused kernel, and takes a mask that the kernel would not take in a continued
        # run: only a family that returns its patterns and is eager by itself shows them in its own run. Elsewhere a
        # second run gives the patterns, and nothing else.
        if self.lm.row.interface or self.lm.config._attn_implementation != "eager":
            patterns = run.patterns
            del run  # or both would be held until the second is there
            run = replace(self._clean(batch), patterns=patterns)
        part = self._followed(batch, run, ran)
        return replace(part, totals={**part.totals, **beside.totals}, ratios={**part.ratios, **beside.ratios})

    def _followed(self, batch: Batch, run: Clean, ran: Callable[[int], None]) -> Measured:
        kept = self._kept(batch)
        write = run.write(self.writer) * kept[..., None]
        finite, onto, energy = self._looked_at(run, write, kept)
        prompt, place = kept.nonzero(as_tuple=True)
        batch.require_finite(self.lm, finite[:, prompt, place].t(), prompt, place)
        sums, rows = self._executed(run, onto, write)
        rows = rows[:, : batch.real]
        for number, rotation in enumerate(self._rotations):
            ran(1 + number)
            turned = write @ rotation
            sums[f"rotation {number}"] = self._survival(run.record, added(run, self.writer, -turned), turned)
        by_node, through = self._through_values(run, write)
        sums |= through
        read, sums["one_reader"] = self._read(run, write, kept)
        generic = []
        for number, rotation in enumerate(self._rotations[:READ_ROTATIONS]):
            ran(2 + ROTATIONS + number)
            generic.append(self._read(run, write @ rotation, kept)[0])
        self._rows |= {name: np.array(part.shape[1]) for name, part in sums.items()}
        totals = {
            "sums": self._clusters(batch, torch.cat(list(sums.values()), 1), write),
            "nodes": torch.stack([*energy, read, *generic]),
            "states": torch.cat([self._energy(x[None] * kept[..., None]) for x in self._states(run.record)], 1),
            "places": by_position(rows, self.tokens.cluster[batch.first : batch.first + batch.real]),
        }
        ratios = {CONDITIONS[0]: self._ratios(onto, run.record, write, kept), "values": ratio(by_node, write)}
        moments = self.decoding.measure(batch, run.record.stream, write, kept)
        return Measured(totals, ratios, moments, (batch.first, (rows[1].sum(1) / rows[2].sum(1)).cpu().numpy()))

    def _hidden(self, batch: Batch, run: Clean, erasers: Sequence[Node]) -> Measured:
        kept = self._kept(batch)
        write = run.write(self.writer) * kept[..., None]
        patched = hidden(run, write, sorted({node.layer for node in erasers}))
        opposed, caused = write.new_zeros(write.shape[:2]), write.new_zeros(write.shape[:2])
        for node in erasers:
            opposed += along(run.write(node), write)
            caused += along(run.carried(node.layer, write)[:, :, node.head], write)
        sums = summed(torch.stack([opposed, caused])).t()
        ratios = {
            CONDITIONS[1]: self._ratios(self._onto(run, patched, write), patched, write, kept),
            "opposed": ratio(opposed[None], write),
        }
        return Measured({"erasers": self._clusters(batch, sums, write)}, ratios)

    def _clean(self, batch: Batch, with_patterns: bool = False) -> Clean:
        return clean(self.lm, batch.ids, self.folded, with_patterns)

    def _kept(self, batch: Batch) -> Tensor:
        return batch.beyond(self.skip).to(self.lm.device)

    def _states(self, record: Recording) -> list[Float[Tensor, "prompt position d_model"]]:
        return [record.stream[state] for state in self.lm.states]

    def _looked_at(self, run: Clean, write: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of every node of the clean run: where it is finite, what of it lies along the write, and its energy."""
        found = [
            (nodes.isfinite().all(-1), along(nodes, write), self._energy(nodes * kept[..., None]).t())
            for nodes in run.written(run.record)
        ]
        finite, onto, energy = map(torch.cat, zip(*found, strict=True))
        return finite, onto, energy.t()

    def _onto(self, run: Clean, record: Recording, write: Tensor) -> Float[Tensor, "node prompt position"]:
        """What of every node lies along the write."""
        return torch.cat([along(nodes, write) for nodes in run.written(record)])

    def _executed(self, run: Clean, onto: Tensor, write: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Sums by prompt, and what lies along the write at the end, row by row."""
        without, end = added(run, self.writer, -write), self.lm.states[-1]
        share, share_without = summed(onto).t(), summed(self._onto(run, without, write)).t()
        levels = torch.stack([dot(x, write) for x in self._states(run.record)], 1)
        sums = {
            "level": levels,
            "survival": self._survival(run.record, without, write),
            "share": share,
            "share_without": share_without,
            "acts": share - share_without,
        }
        return sums, at_the_end(run.record.stream[end], without.stream[end], write)

    def _survival(self, record: Recording, without: Recording, write: Tensor) -> Float[Tensor, "prompt location"]:
        pairs = zip(self._states(record), self._states(without), strict=True)
        return torch.stack([dot(x - other, write) for x, other in pairs], 1)

    def _ratios(self, onto: Tensor, record: Recording, write: Tensor, kept: Tensor) -> Float[Tensor, "row channel"]:
        """Ratios onto the clean write, where it is above the floor, of nodes and of states."""
        stream, energy = self._states(record), write.pow(2).sum(-1)
        largest = reduce(torch.maximum, (x.pow(2).sum(-1) for x in stream))
        # Written so that NaN is not left out as too small.
        there = kept & ~(energy <= self.floor**2 * largest)
        found = torch.cat([onto, torch.stack([along(x, write) for x in stream])])
        return found[:, there].t() / energy[there][:, None]

    def _through_values(self, run: Clean, write: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What of each C lies along the write, and the write propagated layer by layer: x ← x + Σ_e C_e(x)."""
        by_node = write.new_zeros(len(self.lm.parts), *write.shape[:2])
        whole, survival, read, carriers = write, [], dict[int, Tensor](), self.lm.carriers(self.writer)
        for state in self.lm.states:
            layer = self.lm.layers[state.layer]
            first = layer.index not in read and state.state != "pre"
            read |= {layer.index: whole} if first else {}
            if first and layer.index in carriers:
                by_node[self._heads(layer.index)] = along(run.carried(layer.index, write).movedim(2, 0), write)
                whole = whole + run.carried(layer.index, read[layer.makes_values.index]).sum(2)
            survival.append(dot(whole, write))
        return by_node, {"v_share": summed(by_node).t(), "v_survival": torch.stack(survival, 1)}

    def _heads(self, layer: int) -> slice:
        """Where the heads of a layer, or of its mixer, are among the nodes."""
        first = self.lm.parts.index(Node(self.lm.layers[layer].kind, layer, 0))
        return slice(first, first + self.lm.layers[layer].heads)

    def _read(self, run: Clean, vector: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Σ‖·‖² of what each node writes because it reads `vector`, and each MLP's part of that along the vector."""
        mlps = [node for node in self.lm.parts if node.kind in MLPS and self.later(node)]
        n, exact = len(self.lm.parts), torch.float64
        onto, energy = vector.new_zeros(len(vector), n, dtype=exact), vector.new_zeros(n, dtype=exact)
        for layer in self.lm.carriers(self.writer):
            # Behind a prompt, padding would read it.
            energy[self._heads(layer)] = squares(run.carried(layer, vector).movedim(2, 0) * kept[..., None])
        there = vector.ne(0).any(-1, keepdim=True)  # elsewhere the difference is rounding
        for node, change in one_reader(run, vector, mlps).items():
            index = self.lm.parts.index(node)
            energy[index] = squares((change * there)[None])[0]
            onto[:, index] = dot(change, vector)
        return energy, onto

    def _energy(self, vectors: Float[Tensor, "what prompt position d_model"]) -> Float[Tensor, "kind what"]:
        """Σ‖·‖², whole and inside the head's space."""
        return torch.stack([squares(vectors), squares(vectors @ self._space)])

    def _clusters(self, batch: Batch, sums: Float[Tensor, "prompt sum"], write: Tensor) -> ClusterSums:
        clusters, energy = self.tokens.cluster[batch.first : batch.first + batch.real], dot(write, write)
        y, x = (part[: batch.real, ..., None] for part in (sums, energy))
        return ClusterSums.over(clusters, y, x)

    @property
    def n_positions(self) -> int:
        """Positions at which the write is above the floor."""
        return int(self.ratios[CONDITIONS[0]].counts[0].sum())

    @property
    def n_clusters(self) -> int:
        """Independent prompts or documents."""
        return self._totals["sums"].total().closed().n

    def shares(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Every sum over Σ‖o_w‖², by name, and its standard error."""
        value, error = (self._named(part[:, 0]) for part in self._totals["sums"].total().share())
        return value, error

    def places(self) -> tuple[Float[np.ndarray, "what group"], Float[np.ndarray, "what group"]]:
        """Level and survival at the end by groups of positions, and their standard errors."""
        return self._totals["places"].total().share()

    def strips(self) -> tuple[Tokens, Float[np.ndarray, "what prompt position"]]:
        """Typical and extreme prompts, and what lies along the write at their ends, row by row (NaN: not counted)."""
        shown, end = self.tokens.take(typical(self._of_prompts)), self.lm.states[-1]
        found = np.full((3, len(shown), shown.length), np.nan)

        def measured(batch: Batch) -> np.ndarray:
            run, kept = self._clean(batch), self._kept(batch)
            write = run.write(self.writer) * kept[..., None]
            rows = at_the_end(run.record.stream[end], added(run, self.writer, -write).stream[end], write)
            batch.require_numbers(rows.isfinite().all(0), "a run without the write")
            return torch.where(kept, rows, torch.nan)[:, 0].double().cpu().numpy()

        for batch in batches(shown, 1):
            ((_, found[:, batch.first]),) = parts(batch, measured)
        return shown, found

    def _named(self, values: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum(list(self._rows.values()))
        return dict(zip(self._rows, np.split(values, ends[:-1]), strict=True))

    def eraser_sums(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the erasers write along the write (`opposed`), and because of its values (`caused`), with errors."""
        share, error = self._totals["erasers"].total().share()
        names = ("opposed", "caused")
        return {n: float(share[i, 0]) for i, n in enumerate(names)}, {
            n: float(error[i, 0]) for i, n in enumerate(names)
        }

    def gap_error(self, generic: np.ndarray, error: dict[str, np.ndarray]) -> np.ndarray:
        """Standard error of survival − a generic write's: over prompts, and over the draw of a direction.

        The write is one direction, so it is compared with the spread of single rotations, not of their mean.
        """
        return np.sqrt(error["survival"] ** 2 + generic.var(axis=0, ddof=1) * (1 + 1 / ROTATIONS))

    def can_read(self) -> Bool[np.ndarray, " node"]:
        """Which nodes could take in the write: later MLPs, and heads of later layers of which it is known."""
        later = [self.later(node) and node.kind in (*PROJECTED, *MLPS) for node in self.lm.parts]
        return np.array(later) & ~self.unseen()[0]

    def unseen(self) -> tuple[Bool[np.ndarray, " node"], Bool[np.ndarray, " location"]]:
        """Later mixers of which it is not known what they read through values; states that hold something of one."""
        lm, later = self.lm, range(self.writer.layer + 1, len(self.lm.layers))
        mixers = [i for i in later if lm.layers[i].mixes and not lm.carries(lm.layers[i])]
        first = min(mixers, default=len(lm.layers))
        nodes = np.array([node.kind == "mixer" and node.layer in mixers for node in lm.parts])
        return nodes, np.array([state.layer >= first for state in self.lm.states])

    def reads(self) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, "draw node"]]:
        """Energy that a node writes because it reads the write, over all it writes; the same for turned writes."""
        energy = self._totals["nodes"].total().cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            return energy[2] / energy[0], energy[3:] / energy[0]

    def spaces(self) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " location"]]:
        """Share of energy inside the head's own output space: of each node's write, and of the stream."""
        with np.errstate(divide="ignore", invalid="ignore"):
            nodes, states = (
                energy[1] / energy[0] if self._space.shape[1] else np.full(energy.shape[1], np.nan)
                for energy in (self._totals[name].total().cpu().numpy() for name in ("nodes", "states"))
            )
        return nodes, states


@dataclass(frozen=True, eq=False)
class Round:
    """One pass of `verify` over the prompts: what it measures, and what of the tally it fills."""

    tally: WithoutTally
    measure: Callable[[Batch], Measured]
    kept: Ledger

    def step(self, batch: Batch) -> None:
        """Measure one batch; nothing of prompts that only fill it up."""
        self.tally.add(batch, parts(batch, self._measured))

    def _measured(self, batch: Batch) -> Measured | None:
        part = self.measure(batch) if batch.real else None
        if part is not None:
            batch.require_sums(part.tensors(), "a run without the write")
        return part


def _space(tally: WithoutTally) -> Float[Tensor, "d_model rank"]:
    """An orthonormal basis of what a head can write; empty for a writer that is no head."""
    writer = tally.writer
    if writer.kind not in PROJECTED:
        return tally.folded[0].w_o.new_zeros(tally.lm.d_model, 0)
    return torch.linalg.qr(tally.folded[writer.layer].w_o[writer.head].t()).Q
