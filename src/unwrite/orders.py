"""Which nodes come first? One number for each node from whatever has one, its sign turned to what helps; no torch.

A node helps by what the metric loses without it. Effects are metric(node replaced) − metric, so they are turned round;
readings of an attribution are parts of the metric, and are not. (facts: systems on real models, §3.2)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from unwrite.errors import NodeError, NumericError, ResultError, several, shown, whole
from unwrite.nodes import names_of, nearest, parse_site
from unwrite.result import Result

# Readings of one attribution, each an order of its own.
READINGS = ("direct", "net", "relp", "gradient", "total")
# A larger number of these is a worse answer.
_LOSSES = ("kl", "restricted", "match", "fldd")
_EXPECTED = "a result with a number for each node, a list of names, or {name: one of these}"
_MEAN = ("pair", "prompt")
# Parts of all nodes that a curve is executed at (MIB's), where no sizes are given.
GRID = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# What is kept: places are the roles, and the last one is everywhere else.
Set = Bool[np.ndarray, "node place"]


@dataclass(frozen=True, eq=False)
class Order:
    """Nodes with a number each: `helps` is larger the more a node helps, `size` the more it does either way.

    Both are [node], or [node, role] where `roles` are named. `model` is the hash of the weights that the numbers are
    of, "" where nobody said. Nodes that are `listed` have places and no numbers: what comes first helps most. `over` is
    the axis that numbers are means over, "" where there is none.
    """

    name: str
    nodes: tuple[str, ...]
    helps: Float[np.ndarray, "node ..."]
    size: Float[np.ndarray, "node ..."]
    roles: tuple[str, ...] = ()
    model: str = ""
    listed: bool = False
    over: str = ""


def orders(given: Any, edges: bool = False) -> tuple[Order, ...]:
    """The orders that `given` names: one of a result with one number a node, one of each reading or estimator.

    Of `edges`, nodes are senders and roles are receivers. Raises ResultError for a result with more, or no, numbers of
    each node, and for what is none of these; NodeError for a list with a name that is none, or twice the same.
    """
    if isinstance(given, Mapping):
        found = tuple(one for name, part in given.items() for one in _called(str(name), part, edges))
    else:
        found = tuple(_each(given, edges))
    if not found:
        raise ResultError("no order was given", got=shown(given), expected=_EXPECTED)
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ResultError("two orders have one name", got=twice[0], fix='name them: {"one": …, "other": …}')
    return found


def of_edges(given: Any) -> bool:
    """Is every order that of all edges of a model, as `uw.paths` finds it?"""
    every = [*given.values()] if isinstance(given, Mapping) else [given]
    return bool(every) and all(isinstance(one, Result) and _all_edges(one) for one in every)


def _all_edges(result: Result) -> bool:
    settings = result.provenance["settings"]
    return result.method == "paths" and settings["senders"] == settings["receivers"] == ["all"]


def _called(name: str, given: Any, edges: bool) -> Iterator[Order]:
    found = tuple(_each(given, edges))
    for one in found:
        yield replace(one, name=name if len(found) == 1 else f"{name} {one.name}")


def _each(given: Any, edges: bool) -> Iterator[Order]:
    if edges:
        yield _of_edges(given)
    elif isinstance(given, Result):
        yield from _of_result(given)
    elif hasattr(given, "ranked"):  # a circuit by its scores, or a list
        yield replace(listed(given.ranked), model=given.weights)
    elif isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        yield listed(given)
    else:
        raise ResultError("this is no order of nodes", got=shown(given), expected=_EXPECTED)


def listed(names: Any) -> Order:
    """The order of a list of names. Raises NodeError for what is no name, twice the same, and an empty list."""
    found = tuple(str(parse_site(name)) for name in names_of("nodes", names))
    if not found or len(set(found)) < len(found):
        twice = next((name for name in found if found.count(name) > 1), "none")
        raise NodeError("an order names every node once", got=twice, expected="different names of nodes")
    place = np.arange(len(found), 0, -1, dtype=float)
    return Order("listed", found, place, place, listed=True)


def _of_result(result: Result) -> Iterator[Order]:
    data, method, settings = result.data, result.method, result.provenance["settings"]
    if method == "dla":
        for name in (name for name in READINGS if name in data and data[name].notnull().any()):
            yield _order(result, name, data[name], data[name])
    elif method == "compare":
        for name in map(str, data["estimator"].values):
            yield _order(result, name, -_sign(settings) * data[name], data[name])
    elif method == "mask":
        gains = (
            data["mean_gain"].sel(penalty=data.attrs["best"], drop=True) if "role" in data.dims else data["best_gain"]
        )
        yield _order(result, method, gains, gains)
    elif method in ("effects", "paths"):
        signed = data["signed"] if "signed" in data else data["effect"]
        name = str(settings.get("method", "paths"))
        yield _order(result, name, -_sign(settings) * signed, data["effect"])
    else:
        raise ResultError(
            f"a {method} has no number that says how much a node helps", got=f"a result of uw.{method}",
            expected="a result of uw.effects, compare, paths, mask or dla, or a list of names",
        )  # fmt: skip


def _of_edges(given: Any) -> Order:
    if not isinstance(given, Result) or given.method != "paths":
        raise ResultError(
            "this is no order of edges", got=shown(given), expected='uw.paths(lm, pairs, "all", "all", method="eap-ig")'
        )
    part, settings = given.data["effect"], given.provenance["settings"]
    if "role" in part.dims:
        raise ResultError(
            "these paths have a number of each role",
            got=", ".join(map(str, part["role"].values)),
            expected="one of each edge",
            fix='ask for at="all"',
        )
    mean = part.mean("pair").transpose("sender", "receiver")
    nodes, receivers = (tuple(map(str, mean[axis].values)) for axis in mean.dims)
    weights = str(given.provenance["model"].get("weights", ""))
    name = str(settings.get("method", "paths"))
    return Order(name, nodes, -_sign(settings) * mean.values, np.abs(mean.values), receivers, weights, over="pair")


def _sign(settings: Mapping[str, Any]) -> int:
    return -1 if settings["metric"] in _LOSSES else 1


def _order(result: Result, name: str, helps: xr.DataArray, size: xr.DataArray) -> Order:
    """Means over pairs; the size is that of the mean, as circuit benchmarks have it, and not the mean of sizes."""
    over = next((axis for axis in _MEAN if axis in helps.dims), "")
    helps, size = _one_number(result, helps), abs(_one_number(result, size))
    roles = tuple(map(str, helps["role"].values)) if "role" in helps.dims else ()
    weights = str(result.provenance["model"].get("weights", ""))
    nodes = tuple(map(str, helps["node"].values))
    return Order(name, nodes, helps.values, size.values, roles, weights, over=over)


def _one_number(result: Result, part: xr.DataArray) -> xr.DataArray:
    """Of each node, and role where there are some: the mean over pairs or prompts, NaN where none has any."""
    if "sender" in part.dims:
        part = _one_receiver(result, part).rename(sender="node")
    if "position" in part.dims:
        raise ResultError(
            f"this {result.method} has a number of each position", expected="one of each node", fix='ask for at="all"'
        )
    part = part.mean([axis for axis in _MEAN if axis in part.dims])
    if odd := [str(axis) for axis in part.dims if axis not in ("node", "role")]:
        raise ResultError(f"this {result.method} has more than one number of each node", got=", ".join(odd))
    return part.transpose("node", ...)


def _one_receiver(result: Result, part: xr.DataArray) -> xr.DataArray:
    """Of one receiver what it is; of slopes of all of them their sum, which is the slope of all that is written (AtP).

    Edges that are executed do not add up.
    """
    if part.sizes["receiver"] == 1:
        return part.isel(receiver=0, drop=True)
    settings, every = result.provenance["settings"], result.data.attrs.get("readers")
    if (
        settings.get("method", "exact") != "exact"
        and settings["receivers"] == ["all"]
        and part.sizes["receiver"] == every
    ):
        return part.sum("receiver", min_count=1)
    some = str(part["receiver"].values[0])
    raise ResultError(
        "paths to several receivers are several numbers of each sender", got=f"{part.sizes['receiver']}",
        expected='one receiver, or "all" by slopes (eap, eap-ig), whose sum is that of the node',
        fix=f"choose one: uw.Result(found.data.sel(receiver=[{some!r}]))",
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Cells:
    """What a circuit is chosen from: every node, or nodes at roles where `may` says so; as numbers, in write order.

    A set says what is kept, [node, place]: places are the roles, and the last one is everywhere else. Of `edges`, nodes
    are senders, roles and places receivers.
    """

    nodes: tuple[str, ...]
    roles: tuple[str, ...]
    may: Bool[np.ndarray, "node role"]
    edges: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of a number for each cell."""
        return ("sender", "receiver") if self.edges else ("node", "role") if self.roles else ("node",)

    @property
    def unit(self) -> str:
        """What cells are."""
        return "edges" if self.edges else "nodes"

    def called(self, cell: int) -> str:
        """A cell in words."""
        node, place = self.places[cell]
        return (" → " if self.edges else " at ").join([self.nodes[node], *self.roles[place : place + 1]])

    @cached_property
    def places(self) -> Int[np.ndarray, "cell 2"]:
        """Node and place of each cell."""
        return np.argwhere(self.may)

    def __len__(self) -> int:
        return len(self.places)

    def kept(self, cells: Sequence[int]) -> Set:
        """The set that keeps these alone."""
        return ~self.without(cells)

    def without(self, cells: Sequence[int]) -> Set:
        """The set that keeps everything but these."""
        made = np.ones((len(self.nodes), len(self.roles) + (not self.edges)), dtype=bool)
        node, place = self.places[list(cells)].T
        made[node, place] = False
        return made

    def of(self, nodes: Sequence[str]) -> list[int]:
        """The cells of some nodes, at every role at which they may be."""
        return [cell for name in nodes for cell in np.flatnonzero(self.places[:, 0] == self.nodes.index(name)).tolist()]

    def spread(self, values: Float[np.ndarray, "*axes cell"]) -> Float[np.ndarray, "*axes node *role"]:
        """Numbers of cells by node, and role where there are some; NaN where there is no cell."""
        made = np.full((*values.shape[:-1], *self.may.shape), np.nan)
        made[..., self.places[:, 0], self.places[:, 1]] = values
        return made if self.roles else made[..., 0]

    def helps(self, order: Order, of: str = "helps") -> Float[np.ndarray, " cell"]:
        """The numbers of an order for each cell, NaN where it has none.

        Raises ResultError for numbers of roles that are not asked for, NodeError for a listed node that is none here
        and for an order of other nodes altogether.
        """
        if order.roles and (not self.roles or {*self.roles} - {*order.roles}):
            raise ResultError(
                f"the order {order.name} is of other {'receivers' if self.edges else 'roles'}",
                got=", ".join(order.roles[:9]),
                expected="all receivers" if self.edges else ", ".join(self.roles) or "numbers of every position",
                fix="give all that uw.paths found" if self.edges else f"ask for roles={[*order.roles]}",
            )  # fmt: skip
        strange = [name for name in order.nodes if name not in self.nodes]
        if strange and (order.listed or len(strange) == len(order.nodes)):
            raise NodeError(
                f"the order {order.name} has a node that is not among those that are replaced", got=strange[0],
                fix=nearest(strange[0], self.nodes),
            )  # fmt: skip
        made = np.full(self.may.shape, np.nan)
        rows = [i for i, name in enumerate(order.nodes) if name in self.nodes]
        own = getattr(order, of)[rows]
        own = own[:, [order.roles.index(role) for role in self.roles]] if order.roles else own[:, None]
        made[[self.nodes.index(order.nodes[i]) for i in rows]] = own
        return made[self.places[:, 0], self.places[:, 1]]

    def ranked(self, order: Order, by: str, given: Sequence[int]) -> list[int]:
        """The cells that an order knows, the first ones first: what is given, then by size or by what helps most."""
        value = self.helps(order, "size" if by == "absolute" else "helps")
        sorted_ = np.argsort(np.where(np.isnan(value), np.inf, -value), kind="stable")
        return [*given, *(cell for cell in sorted_.tolist() if np.isfinite(value[cell]) and cell not in given)]


def cells_at(nodes: tuple[str, ...], roles: tuple[str, ...], only: Mapping[str, Any] | None) -> Cells:
    """Every node everywhere, or at every role, or only those that are named there.

    Raises NodeError for a name that is none of the nodes, and where there is none at all.
    """
    may = np.ones((len(nodes), max(1, len(roles))), dtype=bool)
    for i, role in enumerate(roles if only is not None else ()):
        named = names_of(f"the nodes at {role}", only[role])  # pyright: ignore[reportOptionalSubscript]
        if strange := [name for name in named if name not in nodes]:
            raise NodeError(f"{strange[0]} is none of the nodes that are replaced", fix=nearest(strange[0], nodes))
        may[:, i] = [name in named for name in nodes]
    if not may.any():
        raise NodeError("no node was named at any role", expected="at least one")
    return Cells(nodes, roles, may)


@dataclass(frozen=True, eq=False)
class Growing:
    """Sets that grow along orders, by each sign: what is `given`, then the first ones, at each of the `sizes`."""

    cells: Cells
    orders: tuple[Order, ...]
    by: tuple[str, ...]
    given: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """Of the orders."""
        return [one.name for one in self.orders]

    @property
    def axes(self) -> tuple[int, int, int]:
        """How many orders, signs and sizes."""
        return len(self.orders), len(self.by), len(self.sizes)

    @cached_property
    def ranked(self) -> list[list[list[int]]]:
        """The cells of each order by each sign, the first ones first."""
        return [[self.cells.ranked(one, by, self.given) for by in self.by] for one in self.orders]

    @property
    def digest(self) -> str:
        """A hash of what may be kept, and in which orders."""
        return hashlib.sha256(repr((self.cells.may.tolist(), self.ranked)).encode()).hexdigest()

    def sets(self, made: Callable[[Sequence[int]], Set]) -> list[Set | None]:
        """What is `made` of the first cells of each order, sign and size; None where an order knows fewer."""
        each = [(self.ranked[o][b], self.sizes[s]) for o, b, s in np.ndindex(*self.axes)]
        return [made(ranked[:size]) if size <= len(ranked) else None for ranked, size in each]

    def random(self, draws: int, seed: int) -> list[Set | None]:
        """Of each draw and size: what is given, then the others in an order of chance."""
        rest = np.setdiff1d(np.arange(len(self.cells)), self.given)
        drawn = [[*self.given, *np.random.default_rng([seed, i]).permutation(rest).tolist()] for i in range(draws)]
        return [self.cells.kept(one[:size]) for one in drawn for size in self.sizes]


def halves(cells: Sequence[int], draws: int, seed: int) -> list[list[int]]:
    """A random half of some cells for each draw; none of fewer than two."""
    many = draws if len(cells) > 1 else 0
    return [np.random.default_rng([seed, 1, i]).permutation(cells)[: len(cells) // 2].tolist() for i in range(many)]


def sizes_of(sizes: Any, asked: Sequence[Order], cells: int, most: int) -> tuple[int, ...]:
    """None, all, and those that are asked for between; all are as many as an order knows.

    Raises NumericError for sizes that are none.
    """
    if sizes is None:
        grid = {max(1, round(part * cells)) for part in GRID} | {len(one.nodes) for one in asked if one.listed}
        return tuple(sorted({0, most, *(size for size in grid if size <= most)}))
    found = several("sizes are numbers of nodes", sizes, "such as [10, 20, 40]", NumericError)
    if not found:
        raise NumericError("no size was given", got="none", fix="leave sizes out, or name some")
    return tuple(sorted({0, most, *(whole("a size is a number of nodes", size, 0, most) for size in found)}))
