"""What changes downstream when one write is taken away? Sums and histograms over clean runs and runs without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from unwrite.model.capture import Recording
from unwrite.model.values import through_values
from unwrite.model.view import Model, fold
from unwrite.nodes import Node
from unwrite.result import quantity
from unwrite.run.rerun import Clean, added, clean, hidden
from unwrite.run.stats import RATIO, ClusterSums, Histogram, Tree
from unwrite.run.stream import Batch
from unwrite.tokens import Tokens

ROTATIONS = 20
CONDITIONS = ("clean", "patched")


class WithoutTally:
    """Everything that `verify` keeps about one writer while prompts stream by."""

    def __init__(self, lm: Model, tokens: Tokens, writer: Node, skip: int, floor: float):
        self.lm, self.tokens, self.writer, self.skip, self.floor = lm, tokens, writer, skip, floor
        self.folded, self.index = fold(lm), lm.parts.index(writer)
        rows, n = int(np.maximum(tokens.lengths - skip, 0).sum()), len(lm.parts)
        self.ratios = {name: Histogram(n + len(lm.states), RATIO, rows, lm.device) for name in CONDITIONS}
        self.v_ratios = Histogram(n, RATIO, rows, lm.device)
        self._rotations = list(_rotations(lm))
        self._space = _space(self)
        self._sums: Tree[ClusterSums] = Tree(add)
        self._erasers: Tree[ClusterSums] = Tree(add)
        self._energies: Tree[Tensor] = Tree(add)
        self._rows: dict[str, int] = {}
        self.n_positions = 0

    def later(self, node: Node) -> bool:
        """Does `node` write after the writer, so that it can act because of it?"""
        if node.layer != self.writer.layer:
            return node.layer > self.writer.layer
        return node.kind == "mlp" and self.writer.kind != "mlp" and not self.lm.parallel

    def step(self, batch: Batch) -> None:
        """One clean run, one without the write, one for every rotation, and the algebra through values."""
        run, kept = self._clean(batch), self._kept(batch)
        nodes = run.nodes(run.record)
        prompt, place = kept.nonzero(as_tuple=True)
        batch.require_finite(self.lm, nodes[:, prompt, place].isfinite().all(-1).t(), prompt, place)
        write = nodes[self.index] * kept[..., None]
        sums: dict[str, Tensor] = self._executed(run, nodes, write, kept)
        for number, rotation in enumerate(self._rotations):
            turned = write @ rotation
            sums[f"rotation {number}"] = self._survival(run.record, added(run, self.writer, -turned), turned)
        sums |= self._through_values(batch, write, kept)
        self._rows = {name: part.shape[1] for name, part in sums.items()}
        self._sums.add(batch.index, self._clusters(batch, torch.cat(list(sums.values()), 1), write.pow(2).sum((1, 2))))

    def hide(self, batch: Batch, erasers: Sequence[Node]) -> None:
        """The paper's intervention: the write hidden from the values of all heads in the erasers' layers."""
        run, kept = self._clean(batch, with_patterns=True), self._kept(batch)
        nodes = run.nodes(run.record)
        write = nodes[self.index] * kept[..., None]
        patched = hidden(run, write, sorted({node.layer for node in erasers}))
        self._count(CONDITIONS[1], run.nodes(patched), patched, write, kept)
        sums = write.new_zeros(len(write), 2)
        for node in erasers:
            sums[:, 0] += _dot(nodes[self.lm.parts.index(node)], write)
            sums[:, 1] += _dot(self._carried(run, node.layer, write)[:, :, node.head], write)
        self._erasers.add(batch.index, self._clusters(batch, sums, write.pow(2).sum((1, 2))))

    def _clean(self, batch: Batch, with_patterns: bool = False) -> Clean:
        return clean(self.lm, batch.ids, self.folded, with_patterns)

    def _kept(self, batch: Batch) -> Tensor:
        return batch.beyond(self.skip).to(self.lm.device)

    def _executed(self, run: Clean, nodes: Tensor, write: Tensor, kept: Tensor) -> dict[str, Tensor]:
        without = added(run, self.writer, -write)
        changed = run.nodes(without)
        self._count(CONDITIONS[0], nodes, run.record, write, kept)
        share, share_without = _along(nodes, write), _along(changed, write)
        levels = torch.stack([_dot(run.record.stream[state], write) for state in self.lm.states], 1)
        return {
            "level": levels,
            "survival": self._survival(run.record, without, write),
            "share": share,
            "share_without": share_without,
            "acts": share - share_without,
        }

    def _survival(self, record: Recording, without: Recording, write: Tensor) -> Float[Tensor, "prompt location"]:
        return torch.stack([_dot(record.stream[s] - without.stream[s], write) for s in self.lm.states], 1)

    def _count(self, condition: str, nodes: Tensor, record: Recording, write: Tensor, kept: Tensor) -> None:
        """Ratios onto the clean write, where it is above the floor."""
        stream = torch.stack([record.stream[state] for state in self.lm.states])
        energy = write.pow(2).sum(-1)
        there = kept & (energy > self.floor**2 * stream.pow(2).sum(-1).amax(0))
        ratios = torch.einsum("ebtd,btd->bte", torch.cat([nodes, stream]), write)[there] / energy[there][:, None]
        self.ratios[condition].add(ratios)
        if condition == CONDITIONS[0]:
            self.n_positions += len(ratios)

    def _through_values(self, batch: Batch, write: Tensor, kept: Tensor) -> dict[str, Tensor]:
        """C of every pair, and the write propagated layer by layer: x ← x + Σ_e C_e(x)."""
        run, lm = self._clean(batch, with_patterns=True), self.lm
        by_node = torch.zeros(len(lm.parts), *write.shape, dtype=write.dtype, device=write.device)
        carried, survival = write, []
        for state in lm.states:
            reads = state.state == ("post" if lm.parallel else "mid")
            if reads and state.layer > self.writer.layer:
                layer = lm.layers[state.layer]
                first = next(i for i, node in enumerate(lm.parts) if node.kind == "head" and node.layer == state.layer)
                by_node[first : first + lm.n_heads] = self._carried(run, layer.index, write).movedim(2, 0)
                carried = carried + self._carried(run, layer.index, carried).sum(2)
            survival.append(_dot(carried, write))
        nodes = run.nodes(run.record) * kept[..., None]
        self._energies.add(batch.index, self._energy(by_node, nodes, run.record, kept))
        energy = write.pow(2).sum(-1)
        self.v_ratios.add(torch.einsum("ebtd,btd->bte", by_node, write)[energy > 0] / energy[energy > 0][:, None])
        return {"v_share": _along(by_node, write), "v_survival": torch.stack(survival, 1)}

    def _carried(self, run: Clean, layer: int, vector: Tensor) -> Float[Tensor, "prompt position head d_model"]:
        block = self.lm.layers[layer]
        through = run.post_scaled(block, through_values(self.lm, block, run.patterns[layer], vector, run.scale(block)))
        return torch.einsum("bthk,hkd->bthd", through, self.folded[layer].w_o)

    def _energy(self, by_node: Tensor, nodes: Tensor, record: Recording, kept: Tensor) -> Tensor:
        """Σ‖·‖² of C, of nodes, of nodes inside the head's space; of the stream, and inside: one vector."""
        stream = torch.stack([record.stream[state] for state in self.lm.states]) * kept[..., None]
        inside = [part @ self._space for part in (nodes, stream)]
        parts = (by_node, nodes, inside[0], stream, inside[1])
        return torch.cat([part.pow(2).sum((1, 2, 3), dtype=torch.float64) for part in parts])

    def _clusters(self, batch: Batch, sums: Tensor, energy: Tensor) -> ClusterSums:
        clusters = self.tokens.cluster[batch.first : batch.first + batch.real]
        of_prompts = zip(clusters, sums[: batch.real].double(), energy[: batch.real].double(), strict=True)
        return reduce(add, (ClusterSums.of(int(cluster), y[:, None], x[None]) for cluster, y, x in of_prompts))

    @property
    def n_clusters(self) -> int:
        """Independent prompts or documents."""
        return self._sums.total().closed().n

    def shares(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Every sum over Σ‖o_w‖², by name, and its standard error."""
        value, error = (self._named(part[:, 0]) for part in self._sums.total().share())
        return value, error

    def _named(self, values: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum(list(self._rows.values()))
        return dict(zip(self._rows, np.split(values, ends[:-1]), strict=True))

    def eraser_sums(self) -> tuple[dict[str, float], dict[str, float]]:
        """What the erasers write along the write (`opposed`), and because of its values (`caused`), with errors."""
        share, error = self._erasers.total().share()
        names = ("opposed", "caused")
        return {n: float(share[i, 0]) for i, n in enumerate(names)}, {
            n: float(error[i, 0]) for i, n in enumerate(names)
        }

    def gap_error(self, generic: np.ndarray, error: dict[str, np.ndarray]) -> np.ndarray:
        """Standard error of survival − a generic write's: over prompts, and over the draw of a direction.

        The write is one direction, so it is compared with the spread of single rotations, not of their mean.
        """
        return np.sqrt(error["survival"] ** 2 + generic.var(axis=0, ddof=1) * (1 + 1 / ROTATIONS))

    def spaces(self) -> dict[str, xr.Variable]:
        """Who reads the write, and who uses the space that the head writes into."""
        n, states = len(self.lm.parts), len(self.lm.states)
        parts = np.split(self._energies.total().cpu().numpy(), np.cumsum([n, n, n, states]))
        with np.errstate(divide="ignore", invalid="ignore"):
            read, into, space = parts[0] / parts[1], parts[2] / parts[1], parts[4] / parts[3]
        into = into if self._space.shape[1] else np.full(n, np.nan)
        space = space if self._space.shape[1] else np.full(states, np.nan)
        return {
            "read": quantity(("node",), read, "1", "Σ‖C‖² / Σ‖o_e‖²"),
            "into_space": quantity(("node",), into, "1", "Σ‖P o_e‖² / Σ‖o_e‖², P onto the writer's W_O"),
            "space": quantity(("location",), space, "1", "Σ‖P x‖² / Σ‖x‖²; by chance d_head / d_model"),
        }


def _dot(x: Float[Tensor, "prompt position d"], write: Float[Tensor, "prompt position d"]) -> Float[Tensor, " prompt"]:
    return torch.einsum("btd,btd->b", x, write)


def _along(nodes: Float[Tensor, "node prompt position d"], write: Tensor) -> Float[Tensor, "prompt node"]:
    return torch.einsum("ebtd,btd->be", nodes, write)


def _rotations(lm: Model) -> Iterator[Float[Tensor, "d_model d_model"]]:
    """Fixed random rotations; of the mean-free subspace where writes are centred, so that readers see all of it."""
    generator = torch.Generator().manual_seed(0)
    d = lm.d_model
    ones = torch.ones(d, 1, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, torch.eye(d, dtype=torch.float64)[:, 1:]], 1)).Q
    free = basis[:, 1:] if lm.centred else torch.eye(d, dtype=torch.float64)
    for _ in range(ROTATIONS):
        normal = torch.randn(free.shape[1], free.shape[1], generator=generator, dtype=torch.float64)
        turn, triangle = torch.linalg.qr(normal)
        yield (free @ (turn * triangle.diagonal().sign()) @ free.t()).to(lm.device, lm.compute_dtype)


def _space(tally: WithoutTally) -> Float[Tensor, "d_model rank"]:
    """An orthonormal basis of what a head can write; empty for a writer that is no head."""
    writer = tally.writer
    if writer.kind != "head":
        return tally.folded[0].w_o.new_zeros(tally.lm.d_model, 0)
    return torch.linalg.qr(tally.folded[writer.layer].w_o[writer.head].t()).Q
