"""What is left of an answer when some edges alone carry the base run, and all others what is written in another run?

Every receiver reads a stream of its own: x_live − Σ_{u cut} (u_live − u_source), the sum over senders whose edge into
it is cut. What senders write is live, so that a change goes on along the edges that are kept; this is how circuits of
edges are judged (Hanna, Pezzelle and Belinkov 2024, arXiv 2403.17806, §4; Mueller et al. 2025, arXiv 2504.13151).
Nothing cut is the base run, everything the source run. Receivers of a layer that read the same are run once.

A head's write is what it adds to the stream in its own run: behind a post-norm it is scaled as that run's sum is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.errors import ModelError, NumericError
from unwrite.model.fold import folded
from unwrite.model.hooks import Leave
from unwrite.model.norms import norm_scale
from unwrite.model.projections import bias_of
from unwrite.model.view import Layer, Model
from unwrite.nodes import PROJECTED
from unwrite.run.edit.slots import Slot, Values, Visit, visiting
from unwrite.run.replay.clean import Base
from unwrite.run.replay.edges import ALL, Ends, ends, read_at, to_end
from unwrite.run.replay.paths import first_change
from unwrite.run.replay.walk import ROWS, Runs, Setting, visits_of


def edge_table(lm: Model) -> Ends:
    """All nodes as senders, and all that reads the stream as receivers: `joins` are the edges of the model.

    Raises ModelError where edges between these do not make up all that is read, naming the layer.
    """
    for layer in lm.layers:
        if (why := _other(lm, layer)) is not None:
            raise ModelError(
                f"layer {layer.index} of {lm.family} {why}, which no edge between heads and MLPs says",
                expected="a model whose nodes all read and write the stream by themselves",
                fix="ask for circuits of nodes",
            )
    return ends(lm, [ALL], [ALL])


def _other(lm: Model, layer: Layer) -> str | None:
    """What a layer does that is no edge of a table."""
    if layer.beside is not None:
        return "writes by a second module beside its MLP"
    if layer.values_of is not None:
        return f"looks at keys and values of layer {layer.values_of.index}"
    constant = layer.heads and layer.post_attention_norm is not None
    return "scales a bias by a post-norm" if constant and bias_of(lm, layer.out_proj) is not None else None


@torch.no_grad()
def kept_edges(
    base: Base, source: Values, table: Ends, kept: Bool[Tensor, "sender receiver"],
    pair: Int[Tensor, " run"] | None = None,
) -> Float[Tensor, "run d_model"]:  # fmt: skip
    """The final stream at the read rows, all edges cut but those that are kept; of all pairs, or of some.

    `table` is that of `edge_table`; `base` and `source` hold values of `table.sent`. Raises NumericError for a mask of
    another shape.
    """
    if kept.shape != table.joins.shape:
        raise NumericError(
            "a mask says of every edge whether it is kept", got=list(kept.shape), expected=list(table.joins.shape)
        )
    cut = (torch.from_numpy(table.joins).to(base.row.device) & ~kept.to(base.row.device)).T
    start = first_change(base, source)
    every = torch.arange(len(base.row), device=base.row.device) if pair is None else pair
    if start is None or not cut.any():
        return base.final[every]
    start, end = base.begin(start), base.end(base.row)
    calls = base.calls(start, end)
    some = every.split(max(1, ROWS // ((end - start) * _branches(table, cut))))
    runs = [Runs(base, pair, [0] * len(pair), start, end, calls) for pair in some]
    return torch.cat([one.finals(_Circuit.begun(one, source, table, cut).step) for one in runs])


@dataclass(frozen=True, eq=False)
class Cut:
    """Runs of base prompts in which the edges outside of sets carry what is written in `source`; asked as `Outside` is.

    Sets say what is kept, [set, sender, receiver].
    """

    base: Base
    source: Values
    table: Ends

    def parts(
        self, kept: Bool[Tensor, "set sender receiver"], asked: Bool[Tensor, "set pair"]
    ) -> Iterator[tuple[Int[Tensor, " run"], Int[Tensor, " run"]]]:
        """The runs that go up together, as sets and pairs: those of one set."""
        for i in range(len(kept)):
            pair = asked[i].nonzero()[:, 0]
            if len(pair):
                yield torch.full_like(pair, i), pair

    def final(
        self, kept: Bool[Tensor, "run sender receiver"], pair: Int[Tensor, " run"]
    ) -> Float[Tensor, "run d_model"]:
        """The final stream of runs that all keep the same edges, at the row that is read."""
        return kept_edges(self.base, self.source, self.table, kept[0], pair)


def _branches(table: Ends, cut: Bool[Tensor, "receiver sender"]) -> int:
    """How many streams a layer's receivers read, at most."""
    layers = torch.tensor([sites[0].layer for sites in table.receivers.values()], device=cut.device)
    return max(len(cut[layers == layer].unique(dim=0)) for layer in layers.unique())


@dataclass(frozen=True, eq=False)
class _Circuit:
    """Runs in which receivers read streams of their own; `changes` are u_live − u_source of the senders so far."""

    runs: Runs
    source: Values
    table: Ends
    cut: Bool[Tensor, "receiver sender"]
    changes: Float[Tensor, "sender run row d_model"]

    @staticmethod
    def begun(runs: Runs, source: Values, table: Ends, cut: Bool[Tensor, "receiver sender"]) -> _Circuit:
        """Nothing has written but the embeddings."""
        lm, rows = table.lm, (len(runs.pair), runs.end - runs.start)
        changes = torch.zeros(len(table.senders), *rows, lm.d_model, dtype=lm.compute_dtype, device=cut.device)
        made = _Circuit(runs, source, table, cut, changes)
        slot = next(slot for slot in table.sent if slot.kind == "embed")
        live = runs.of_base(runs.base.inputs[0], len(runs.pair))
        made.write(slot, live[:, :, None], lm.to_end(lm.states[0]))
        return made

    def step(self, index: int, x: Float[Tensor, "run row d_model"]) -> Tensor:
        """What a block makes of the stream, and of the final stream what is read."""
        receivers = [i for i, sites in enumerate(self.table.receivers.values()) if sites[0].layer == index]
        if index == len(self.table.lm.layers):
            return x - self.gone(self.cut[receivers], 3 * index)[0].to(x.dtype)
        settings, found = self.attended(index, x, receivers), {}
        mlp = next((slot for slot in self.table.received if slot.kind == "mlp" and slot.layer == index), None)
        z, held = self.table.z.get(index), self.table.held.get(index)
        watched = {slot: partial(_keep, found, slot) for slot in (z, held, mlp) if slot is not None}
        with visiting(self.table.lm, visits_of(self.runs, settings, index, x)), visiting(self.table.lm, watched):
            out = self.runs.block(index, x).clone()
        if z is not None:
            self.write_heads(index, self.runs.rows_of(z, found[z], len(x)))
        return out if mlp is None else out + self.through_mlp(mlp, held, x, found).to(out.dtype)

    def gone(self, cut: Bool[Tensor, "stream sender"], place: int) -> Float[Tensor, "stream run row d_model"]:
        """Σ over cut senders of what the stream holds of them, less what they write in the source run."""
        some = cut.any(0).nonzero()[:, 0]
        total = torch.einsum("us,snrd->unrd", cut[:, some].to(self.changes), self.changes[some])
        return total / to_end(self.table.lm, place)

    def attended(self, index: int, x: Tensor, receivers: Sequence[int]) -> list[Setting]:
        """Queries, keys and values (or heads) of a layer that read another stream than that of the run."""
        slots = [slot for slot in self.table.received if slot.layer == index and slot.kind != "mlp"]
        names = [*self.table.receivers.values()]
        sites = {names[i][0]: self.cut[i] for i in receivers if names[i][0].kind != "mlp" and self.cut[i].any()}
        if not sites:
            return []
        streams, which = torch.stack([*sites.values()]).unique(dim=0, return_inverse=True)
        branch = (x - self.gone(streams, 3 * index).to(x.dtype)).flatten(0, 1)
        at = torch.arange(len(x), device=x.device).repeat(len(streams))
        found = self.received(index, slots, branch, at)
        of, settings = dict(zip(sites, which.tolist(), strict=True)), []
        for slot in slots:
            rows = self.runs.rows_of(slot, found[slot], len(at))[:, :, slot.units].unflatten(0, (-1, len(x)))
            unit = torch.arange(len(slot.units), device=x.device)
            own = rows[torch.tensor([of.get(site, 0) for site in slot.sites], device=x.device), :, :, unit]
            there = torch.tensor([site in of for site in slot.sites], device=x.device)
            values = own.permute(1, 2, 0, 3)
            settings.append(Setting(slot, there.expand(len(x), 1, -1), lambda values=values: values))
        return settings

    def received(
        self, index: int, slots: Sequence[Slot], x: Float[Tensor, "_ row d_model"], at: Int[Tensor, " _"]
    ) -> dict[Slot, Tensor]:
        """What slots are where a block reads these streams. What lies behind the last of them is not run."""
        found: dict[Slot, Tensor] = {}

        def keep(slot: Slot, tensor: Tensor) -> Tensor:
            _keep(found, slot, tensor)
            if len(found) == len(slots):
                raise Leave
            return tensor

        with suppress(Leave), visiting(self.table.lm, {slot: partial(keep, slot) for slot in slots}):
            self.runs.block(index, x, at)
        return found

    def through_mlp(
        self, slot: Slot, held: Slot | None, x: Tensor, found: Mapping[Slot, Tensor]
    ) -> Float[Tensor, "run row d_model"]:
        """What the block puts out more because its MLP reads a stream of its own; and what the MLP writes, noted."""
        (row,) = [i for i, sites in enumerate(self.table.receivers.values()) if sites == slot.sites]
        layer, live = self.table.lm.layers[slot.layer], slot.view(found[slot], len(x))
        again = live
        if self.cut[row].any():
            place = read_at(self.table.lm, slot.sites[0])
            branch, new = x - self.gone(self.cut[row][None], place)[0].to(x.dtype), {}
            hold: dict[Slot, Visit] = {} if held is None else {held: lambda tensor: found[held].reshape(tensor.shape)}
            with visiting(self.table.lm, {**hold, slot: partial(_keep, new, slot)}):
                self.runs.block(slot.layer, branch, torch.arange(len(x), device=x.device))
            again = slot.view(new[slot], len(x))
        self.write(next(one for one in self.table.sent if one.sites == slot.sites), again, layer.into)
        return (again - live)[:, :, 0] * layer.residual_scale * layer.gain

    def write(self, slot: Slot, live: Float[Tensor, "run row 1 d_model"], into: float) -> None:
        """Note what the sender of a slot writes now and not in the source run."""
        source = self.runs.of_base(self.source[slot], len(live))
        self.changes[self._sender(slot.names[0])] = (live - source)[:, :, 0].to(self.changes) * into

    def write_heads(self, index: int, z: Float[Tensor, "run row head d_head"]) -> None:
        """The same of all heads of a layer."""
        lm, layer = self.table.lm, self.table.lm.layers[index]
        slot = next(one for one in self.table.sent if one.kind in PROJECTED and one.layer == index)
        parts = (z, self.runs.of_base(self.source[slot], len(z)))
        live, source = (part.to(self.changes) * _post_scale(lm, layer, part).to(self.changes) for part in parts)
        first, w_o = self._sender(slot.names[0]), folded(lm, layer).w_o
        self.changes[first : first + len(w_o)] = torch.einsum("nrhk,hkd->hnrd", live - source, w_o)

    def _sender(self, name: str) -> int:
        return [*self.table.senders].index(name)


def _post_scale(lm: Model, layer: Layer, z: Float[Tensor, "run row head d_head"]) -> Tensor:
    """By what a post-norm multiplies all that heads with these z write, beside its gain; 1 without one."""
    if layer.post_attention_norm is None:
        return torch.ones(())
    out = layer.out_proj.forward(z.flatten(2))  # no hook of anyone sees it
    return norm_scale(out.to(lm.compute_dtype), layer.post_attention_norm, lm.row.layer_norm)[..., None, None]


def _keep(found: dict[Slot, Tensor], slot: Slot, tensor: Tensor) -> Tensor:
    found[slot] = tensor.clone()
    return tensor
