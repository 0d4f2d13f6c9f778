"""How much of a behaviour does a set of nodes, or edges, keep, when everything else is set to another run's values?

faithfulness f(C) = (m(C) − m(∅)) / (m(M) − m(∅)), m(C) the mean metric of runs in which all nodes outside C are
replaced, or all edges outside C carry what is written in the other run (MIB: Mueller et al. 2025, arXiv 2504.13151);
completeness and minimality after Wang et al. 2022 (arXiv 2211.00593). Every number is of executed runs. (facts: systems
on real models, §3.2)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float

from unwrite.circuits import BY
from unwrite.errors import NodeError, NumericError, ResultError, number, one_of, require, several, shown, whole
from unwrite.model.load import provenance, weights_hash
from unwrite.model.view import Model
from unwrite.nodes import names_of, nearest
from unwrite.orders import Cells, Growing, halves, of_edges, orders, sizes_of
from unwrite.prompts.pairs import Pairs
from unwrite.result import Result, build, quantity
from unwrite.run.answer.metrics import Custom, known, name_of, unit_of_base, unless_own
from unwrite.run.edit.slots import slots
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit_pairs, batch_size
from unwrite.run.pairs.circuits import FEW, Cutting, Executed, Replacing, cutting, replacing
from unwrite.stats.curves import Shares, areas, between, falls_again
from unwrite.stats.jackknife import ratio
from unwrite.stats.rates import said

NODES = ("heads", "mlp_out")
EDGES = "edges"
# A node without which less than so much is kept is a gate; one without which more is kept of a few pairs is none.
GATE, _CLEAR = 0.1, 0.5
_MOST = 5000
# Below this part of the metric itself a difference is rounding.
_NONE = 1e-9
_SAYS = {
    "faithfulness": "(m(C) − m(∅)) / (m(M) − m(∅)), C the first nodes, all others replaced",
    "complement": "f of everything but C, which is replaced",
    "random": "f of as many nodes in an order of chance, after those given",
    "area": "CPR: ∫ f over the part of nodes that is kept, by trapezoids",
    "distance": "CMD: ∫ |1 − f| over the part of nodes that is kept, by trapezoids",
    "minimality": "f(C) − f(C without the node), C the circuit that is chosen",
    "completeness": "f(C∖K) − f(M∖K), K a random half of the circuit that is chosen",
    "gate": "f of everything but the node, which is replaced",
}
# The same of edges, where it reads otherwise.
_OF_EDGES = {
    "faithfulness": "(m(C) − m(∅)) / (m(M) − m(∅)), C the first edges; all others carry the other run's writes",
    "complement": "f of everything but C, which carries the other run's writes",
    "random": "f of as many edges in an order of chance",
    "area": "CPR: ∫ f over the part of edges that is kept, by trapezoids",
    "distance": "CMD: ∫ |1 − f| over the part of edges that is kept, by trapezoids",
    "minimality": "f(C) − f(C without the edge), C the circuit that is chosen",
    "gate": "f of everything but the edge",
}
# So many names stand in an attribute, which a file holds up to 64 KiB of.
_NAMED = 1000


@torch.no_grad()
def circuit(
    lm: Model, pairs: Any, order: Any, sizes: Iterable[int] | None = None, replace: str | Model = "source",
    by: str | Iterable[str] = BY, given: Iterable[str] = (), roles: Mapping[str, Any] | Sequence[str] | None = None,
    draws: int = 10, *, nodes: str | Iterable[str] | None = None, metric: str | Custom = "logit_diff",
    enough: float = 0.85, choose: int | None = None, gates: bool | None = None, seed: int = 0,
    bos: int | bool | None = None, batch: int | None = None, checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:  # fmt: skip
    """How much of a metric the first nodes, or edges, of an order keep when all others are replaced: executed.

    `f(C) = (m(C) − m(∅)) / (m(M) − m(∅))`, of means over pairs; embeddings are the base prompt's in every run. If all
    orders are `uw.paths(lm, pairs, "all", "all", …)`, and no `nodes` named, it is one of edges: all others, embeddings'
    too, carry what is written in the other run (Hanna et al. 2024, arXiv 2403.17806).

    Arguments: `pairs` and `bos` as in `uw.effects`, better not those that made the order; `order` a result of
    `uw.effects`, `compare`, `paths` (one receiver, or all by slopes, which add up), `mask` or `dla` (an order of each
    reading), a list of names, a `uw.Circuit`, or {name: one of these}; `sizes` how many nodes are kept, by default
    MIB's parts of all, none and all always beside them; `replace` where other nodes' values come from, as `source` of
    `uw.effects`; `by` "absolute" (by size) and "signed" (what helps most first, opponents last); `given` nodes that
    every set begins with; `roles` names of tokens: a cell is then a node at one of them, of all nodes or of those in
    {role: names}, and everything at other tokens is replaced; `draws` random orders, and random parts of the chosen
    circuit; `nodes` what is replaced where it is not kept, by default heads and MLPs; `metric` as in `uw.effects` but
    "fldd"; `enough` the faithfulness that `smallest` asks for; `choose` the size of the first order's circuit that is
    looked into, by default its smallest; `gates` whether runs without each single node are executed, by default not of
    edges, which then have no `minimality` either; `seed` of draws; `checkpoint` as in `uw.scan`.
    Returns a Result with `faithfulness` and `complement` (f of everything but C) [order, by, size], `random[draw,
    size]`, `area` (CPR) and `distance` (CMD) [order, by], each with `_low` and `_high` (95 %, jackknife over templates
    or pairs; NaN for fewer than three); `random_area[draw]`; `smallest[order, by]`, the fewest nodes that are enough,
    by bisection between executed sizes; of the chosen circuit `minimality[node]` (f(C) − f(C without it)) and
    `completeness[draw]` (f(C∖K) − f(M∖K), K a random half); `gate[node]` (f of everything but it; of `gate_pairs`
    pairs); `rank` and `score`; `base`, `empty` and `solved[pair]`. Attributes say in words what is chosen, what gates
    there are, what is assumed, and whether the pairs are solved. Of edges [sender, receiver] stands for [node].
    Raises ModelError for edges that do not make up all that is read; NodeError for a node that is not there;
    NumericError for impossible sizes and a metric that never changes; ResultError for an order of another model;
    TokensError for prompts that do not differ.

    Example: `uw.circuit(lm, test, uw.effects(lm, train, ["heads", "mlp_out"], at="all", method="relp"))`
    """
    nodes, runs = _runs(lm, pairs := admit_pairs(lm, pairs, bos, sees=True), order, nodes, roles, replace, metric)
    growing = _growing(runs, order, sizes, by, given, roles)
    cells = growing.cells
    gates = not cells.edges if gates is None else gates
    _require_numbers(growing, draws, enough, choose, seed, gates)
    settings = {
        "order": growing.names, "sizes": [*growing.sizes], "replace": runs.donor.name, "by": [*growing.by],
        "given": [cells.nodes[cells.places[i, 0]] for i in growing.given], "roles": [*runs.roles], "draws": draws,
        "nodes": nodes if isinstance(nodes, str) else [*nodes], "metric": name_of(metric), "enough": enough,
        "choose": choose, "gates": gates, "seed": seed, "batch": batch,
    }  # fmt: skip
    read, size = pairs.about(), batch_size(lm, pairs.base, batch, held=4)
    with opened(unless_own(checkpoint, metric), listener) as job:
        if done := job.begin("circuit", lm, {"": read["hash"], "rank": growing.digest, **runs.donor.read_by}, settings):
            return done
        data = _dataset(growing, _Stages(growing, Executed(runs, size, job, listener), settings), settings)
        return job.signed(build("circuit", data, settings, provenance(lm), {"": read}))


def _runs(
    lm: Model, pairs: Pairs, order: Any, nodes: Any, roles: Any, replace: Any, metric: str | Custom
) -> tuple[str | Iterable[str], Replacing | Cutting]:
    """What circuits are of, and in which runs the rest is replaced."""
    nodes = (EDGES if of_edges(order) else NODES) if nodes is None else nodes
    if isinstance(nodes, str) and nodes == EDGES:
        return nodes, cutting(lm, pairs, roles, replace, known(metric, pairs))
    return nodes, replacing(lm, pairs, nodes, roles, replace, known(metric, pairs))


def _growing(runs: Replacing | Cutting, order: Any, sizes: Any, by: Any, given: Any, roles: Any) -> Growing:
    """Which sets are kept."""
    signs = tuple(several("by is a list of signs", [by] if isinstance(by, str) else by, " or ".join(BY), NumericError))
    for sign in signs:
        one_of("by", sign, BY)
    if not signs or len({*signs}) < len(signs):
        raise NumericError("by names each sign once", got=shown(by), expected=" or ".join(BY))
    cells = runs.cells(roles if isinstance(roles, Mapping) else None)
    asked, weights = orders(order, cells.edges), weights_hash(runs.lm)
    if wrong := next((one for one in asked if one.model not in ("", weights)), None):
        raise ResultError(f"the order {wrong.name} is of another model", fix="make the order with this model")
    kept = _given(runs, cells, names_of("given", given))
    most = max(len(cells.ranked(one, sign, kept)) for one in asked for sign in signs)
    return Growing(cells, asked, signs, kept, sizes_of(sizes, asked, len(cells), most))


def _given(runs: Replacing | Cutting, cells: Cells, named: Sequence[str]) -> tuple[int, ...]:
    """The cells that every set begins with."""
    if cells.edges and named:
        raise NodeError("edges are kept by their order alone", got=f"given {named[0]}", fix="leave given out")
    first = [name for slot in slots(runs.lm, named) for name in slot.names] if named else []
    if strange := [name for name in first if name not in cells.nodes]:
        raise NodeError(
            f"{strange[0]} is given, and none of the nodes that are replaced", fix=nearest(strange[0], cells.nodes)
        )
    return tuple(cells.of(first))


def _require_numbers(growing: Growing, draws: Any, enough: Any, choose: Any, seed: Any, gates: Any) -> None:
    whole("draws is a number", draws, 0)
    whole("seed is a number", seed, 0)
    require(isinstance(gates, bool), NumericError, "gates is a choice", gates, "True, False or None")
    number("enough is a faithfulness", enough, "above 0, below 1", lambda value: 0 < value < 1)
    if gates and len(growing.cells) > _MOST:
        got = f"{len(growing.cells):,}, each left out by itself"
        raise NumericError(f"these are many {growing.cells.unit} to find gates among", got=got, fix="say gates=False")
    if choose is not None:
        whole(f"choose is a number of {growing.cells.unit}", choose, 1, len(growing.ranked[0][0]))


class _Stages:
    """What is executed, stage by stage: curves with their controls, how few are enough, the circuit that is chosen."""

    def __init__(self, growing: Growing, runs: Executed, settings: Mapping[str, Any]):
        self.growing, self.runs, self.settings = growing, runs, settings
        cells, sizes, draws = growing.cells, len(growing.sizes), settings["draws"]
        curves, left = growing.sets(cells.kept), growing.sets(cells.without)
        random = growing.random(draws, settings["seed"])
        self._one_out = [cells.without([i]) for i in range(len(cells))] if settings["gates"] else []
        runs.execute([runs.asked.nothing, *curves, *left, *random], "curves", self._one_out)
        self._require_difference()
        self.faithfulness, self.complement = (runs.shares(part).shaped(*growing.axes) for part in (curves, left))
        self.random = runs.shares(random).shaped(draws, sizes) if draws else None
        self.smallest = self._fewest(self.faithfulness.whole)
        self.chosen = self._first_ones(self.smallest[0, 0])
        self._inside()

    def _require_difference(self) -> None:
        base, empty = self.runs.about["base"], self.runs.value(self.runs.asked.nothing)
        if not abs((base - empty).sum()) > _NONE * (np.abs(base) + np.abs(empty)).sum():
            raise NumericError(
                f"the metric is the same when all {self.growing.cells.unit} are replaced",
                got=f"{base.mean():.3g} and {empty.mean():.3g}",
                fix="ask about pairs on which the model answers otherwise, or replace otherwise",
            )  # fmt: skip

    def _fewest(self, f: Float[np.ndarray, "order by size"]) -> Float[np.ndarray, "order by"]:
        """The fewest nodes that are enough, between executed sizes by bisection; NaN where no size is."""
        growing, sizes, enough = self.growing, np.array(self.growing.sizes), self.settings["enough"]
        found = {at: between(sizes, f[at] >= enough) for at in np.ndindex(*f.shape[:2])}
        ends = {at: pair for at, pair in found.items() if pair is not None}
        while middle := {at: sum(pair) // 2 for at, pair in ends.items() if pair[1] - pair[0] > 1}:
            sets = [growing.cells.kept(growing.ranked[o][b][:size]) for (o, b), size in middle.items()]
            self.runs.execute(sets, "smallest")
            for (at, size), share in zip(middle.items(), self.runs.shares(sets).whole, strict=True):
                ends[at] = (ends[at][0], size) if share >= enough else (size, ends[at][1])
        made = np.full(f.shape[:2], np.nan)
        for at, (_, high) in ends.items():
            made[at] = high
        return made

    def _first_ones(self, smallest: float) -> list[int]:
        """The circuit that is looked into: of the size that is asked for, or enough, or all that the order knows."""
        ranked, size = self.growing.ranked[0][0], self.settings["choose"]
        return ranked[: size or (int(smallest) if np.isfinite(smallest) else len(ranked))]

    def _inside(self) -> None:
        """What each node of the circuit, and random halves of it, are worth; and gates again, of all pairs."""
        cells, chosen, runs = self.growing.cells, self.chosen, self.runs
        parts = halves(chosen, self.settings["draws"], self.settings["seed"])
        alone = chosen if self.settings["gates"] or not cells.edges else []
        fewer = [cells.kept([other for other in chosen if other != cell]) for cell in alone]
        inside = [cells.kept([cell for cell in chosen if cell not in half]) for half in parts]
        outside = [cells.without(half) for half in parts]
        self.few = runs.shares(self._one_out, few=True).whole
        self.doubted: list[int] = np.flatnonzero(self.few < _CLEAR).tolist()
        sure = [self._one_out[i] for i in self.doubted]
        runs.execute([cells.kept(chosen), *fewer, *inside, *outside, *sure], "inside")
        self.minimality = runs.shares([cells.kept(chosen)]) - runs.shares(fewer) if alone else None
        self.completeness = runs.shares(inside) - runs.shares(outside)
        self.gate = runs.shares(sure)

    def falls(self) -> list[str]:
        """Curves that fall below what is enough again, in words."""
        growing, enough, made = self.growing, self.settings["enough"], []
        for o, b in np.ndindex(*growing.axes[:2]):
            f = self.faithfulness.whole[o, b]
            there = np.isfinite(f)
            size = falls_again(np.array(growing.sizes)[there], f[there] >= enough)
            made += [] if size is None else [f"{growing.names[o]} {growing.by[b]} at {size}"]
        return made


def _dataset(growing: Growing, found: _Stages, settings: Mapping[str, Any]) -> xr.Dataset:
    """Everything that was found, named."""
    cells, about, pairs = growing.cells, found.runs.about, found.runs.asked.pairs
    at = cells.axes
    curve, part = ("order", "by", "size"), np.array(growing.sizes) / len(cells)
    variables: dict[str, Any] = {}
    says = _SAYS | (_OF_EDGES if cells.edges else {})
    for name, axes, shares in (
        ("faithfulness", curve, found.faithfulness), ("complement", curve, found.complement),
        ("completeness", ("draw",), found.completeness),
        ("minimality", at, None if found.minimality is None else _spread(cells, found.chosen, found.minimality)),
        *zip(("area", "distance"), (curve[:2],) * 2, areas(part, found.faithfulness), strict=True),
    ):  # fmt: skip
        if shares is not None and shares.whole.size:
            variables |= _with_interval(name, axes, shares, says)
    if found.random is not None:
        variables |= _with_interval("random", ("draw", "size"), found.random, says)
        variables["random_area"] = quantity(("draw",), areas(part, found.random)[0].whole, "1", says["area"])
    variables["smallest"] = quantity(
        curve[:2], found.smallest, cells.unit, f"the fewest with f ≥ {settings['enough']:g}"
    )
    for name in ("area", "distance"):
        variables[name].attrs |= {
            "axis": f"{cells.unit}, each counting the same", "grid": " ".join(map(str, growing.sizes)),
            "sign": " ".join(growing.by), "ablation": settings["replace"], "given": " ".join(settings["given"]),
        }  # fmt: skip
    variables |= _gates(cells, found, says) if settings["gates"] else {}
    rank = np.full((*growing.axes[:2], len(cells)), np.nan)
    for o, b in np.ndindex(*rank.shape[:2]):
        rank[o, b, growing.ranked[o][b]] = np.arange(len(growing.ranked[o][b]))
    score = np.stack([cells.helps(one) for one in growing.orders])
    variables["rank"] = quantity((*curve[:2], *at), cells.spread(rank), "1", "place in the order, the first is 0")
    variables["score"] = quantity(
        ("order", *at), cells.spread(score), "of the order", f"how much {cells.unit[:-1]}s help"
    )
    unit = unit_of_base(found.runs.asked.metric)
    variables["base"] = quantity(("pair",), about["base"], unit, "m(M), the metric of the base run")
    variables["empty"] = quantity(
        ("pair",), found.runs.value(found.runs.asked.nothing), unit, f"m(∅), all {cells.unit} replaced"
    )
    solved = about["solved"] > 0
    variables["solved"] = quantity(("pair",), solved, "1", "does the answer beat all choices in the base run?")
    axes = {
        "order": growing.names, "by": [*growing.by], "size": [*growing.sizes], "draw": np.arange(settings["draws"]),
        at[0]: [*cells.nodes], at[-1] if cells.roles else "role": [*cells.roles], "pair": np.arange(len(pairs)),
    }  # fmt: skip
    used = {axis for one in variables.values() for axis in one.dims}
    data = xr.Dataset(variables, {name: names for name, names in axes.items() if name in used})
    return data.assign_attrs(
        **_words(growing, found, settings), clusters=int(pairs.cluster.max()) + 1, cost=float(found.runs.cost),
        solves=said(int(solved.sum()), len(solved), pairs.chance),
    )  # fmt: skip


def _with_interval(name: str, axes: tuple[str, ...], shares: Shares, says: Mapping[str, str]) -> dict[str, xr.Variable]:
    parts = {name: shares.whole, **dict(zip((f"{name}_low", f"{name}_high"), shares.interval, strict=True))}
    ends = "its 95 % interval, jackknife over templates, or pairs"
    return {key: quantity(axes, part, "1", says[name] if key == name else ends) for key, part in parts.items()}


def _spread(cells: Cells, own: Sequence[int], shares: Shares) -> Shares:
    """Of some cells, among all."""

    def whole(part: np.ndarray) -> np.ndarray:
        made = np.full((*part.shape[:-1], len(cells)), np.nan)
        made[..., list(own)] = part
        return cells.spread(made)

    return Shares(whole(shares.whole), whole(shares.without))


def _gates(cells: Cells, found: _Stages, says: Mapping[str, str]) -> dict[str, Any]:
    """Of a few pairs, but of all where little is kept without a node."""
    at, made = cells.axes, _with_interval("gate", cells.axes, _spread(cells, found.doubted, found.gate), says)
    value, pairs = found.few.copy(), np.full(len(cells), float(min(FEW, len(found.runs.about["base"]))))
    value[found.doubted], pairs[found.doubted] = found.gate.whole, len(found.runs.about["base"])
    made["gate"].values = cells.spread(value)
    return made | {"gate_pairs": quantity(at, cells.spread(pairs), "1", "pairs that gate is of")}


def _words(growing: Growing, found: _Stages, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is chosen, which gates there are, and what is assumed."""
    cells, enough = growing.cells, settings["enough"]
    gates = [
        cells.called(i) for i, f in zip(found.doubted, found.gate.whole, strict=True)
        if f < GATE and i not in growing.given
    ]  # fmt: skip
    do = "" if cells.edges else ": pass it as given"
    notes = [f"{name} decides everything{do}" for name in gates[:_NAMED]]
    notes += [f"{falls} falls below {enough:g} again: smallest is its first crossing" for falls in found.falls()]
    base, empty = found.runs.about["base"], found.runs.value(found.runs.asked.nothing)
    _, low, high = ratio(base - empty, np.ones(len(base)), found.runs.asked.pairs.cluster)
    notes += ["m(M) − m(∅) is not told apart from 0: what is kept of it means little"] * bool(low <= 0 <= high)
    return {
        "chosen": ", ".join([cells.called(i) for i in found.chosen[:_NAMED]] + ["…"] * (len(found.chosen) > _NAMED)),
        "chosen_order": f"{growing.names[0]} {growing.by[0]}", "chosen_size": len(found.chosen), "of": len(cells),
        "gates": ", ".join(gates[:_NAMED]), "notes": "; ".join(notes),
        "assumes": "smallest: faithfulness crosses once between the executed sizes around it (bisection)",
    }  # fmt: skip
