"""Which nodes do two results share, against chance and against the most that could be expected?

J = |A ∩ B| / |A ∪ B| of the k largest of n nodes in each. By chance they share k²/n, so J is about k/(2n − k) (ratio of
the means), and how many they share is hypergeometric. No two measurements agree wholly: the ceiling is J between random
halves of one result's own pairs. (Merullo, Eickhoff, Pavlick 2024, arXiv 2310.08744; facts: systems, §7.3)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import hypergeom

from unwrite.circuits import Circuit
from unwrite.errors import NumericError, ResultError, number, several, shown, whole
from unwrite.nodes import parse_site
from unwrite.orders import Order, orders
from unwrite.result import Result, build, quantity
from unwrite.stats.ranks import spearman

# So many times the pairs of a result are halved for its ceiling.
_SPLITS = 20
_ALL = "all"
_EQUATIONS = {
    "shared": "|A ∩ B|, of the k largest nodes in each",
    "union": "|A ∪ B|",
    "jaccard": "|A ∩ B| / |A ∪ B|",
    "expected": "what chance gives: mean |A ∩ B| / mean |A ∪ B|, for equal k: k / (2n − k)",
    "p": "how often chance shares as many or more, hypergeometric; of all stages as if they were independent",
    "ceiling_a": "mean jaccard between random halves of A's own pairs: fewer pairs, so rather too low",
    "ceiling_b": "mean jaccard between random halves of B's own pairs: fewer pairs, so rather too low",
}


@dataclass(frozen=True)
class _Side:
    """One of the two at one stage: an order with the result that it is of, or a circuit."""

    order: Order | None
    result: Result | None
    circuit: Circuit | None

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """Nodes with their roles, in write order."""
        assert self.order is not None  # noqa: S101 (asked of orders alone)
        return tuple((node, role) for node in self.order.nodes for role in self.order.roles or ("",))

    @property
    def size(self) -> np.ndarray:
        """How much each cell does."""
        assert self.order is not None  # noqa: S101 (asked of orders alone)
        return np.nan_to_num(self.order.size.ravel())

    def first(self, k: int) -> frozenset[tuple[str, str]]:
        """The k cells that do most, or the circuit."""
        if self.circuit is not None:
            return frozenset(self.circuit.cells)
        cells = self.cells
        return frozenset(cells[i] for i in np.argsort(-self.size, kind="stable")[:k])


def overlap(a: Any, b: Any, top: Any = 0.02, *, seed: int = 0) -> Result:
    """Which of their largest nodes two results share, stage by stage where several are given of each; needs no torch.

    Arguments: `a` and `b` results with one number for each node (`uw.effects` or `uw.paths` at="all", `uw.mask`, …), of
    which the part `top` with the largest size of the mean is compared (several parts: each by itself), two lists or
    mappings of such results, stage by stage, or two circuits as they are; `seed` of the halves of ceilings.
    Returns a Result with `shared`, `union`, `jaccard`, `expected`, `p`, `ceiling_a`, `ceiling_b` [top, stage] (a stage
    "all" at the end where there are several; ceilings are NaN where there are no pairs to halve), `spearman[stage]`
    of the sizes of all nodes, and in words `both`, `only_a`, `only_b`.
    Raises ResultError for results of two models, of other nodes, with several numbers for each node, or unequal numbers
    of stages; NumericError for a part that is none.

    Example: `uw.overlap(uw.read("ioi"), uw.read("laundry"), top=[0.05, 0.1]).table()`
    """
    parts = _parts(top)
    whole("seed is a number", seed, 0)
    stages = _stages(a, b)
    circuits = any(one.circuit is not None for pair in stages.values() for one in pair)
    if circuits:
        parts = (np.nan,)
    found = [[_compared(*pair, part, seed) for pair in stages.values()] for part in parts]
    names = [*stages]
    if len(names) > 1:
        found, names = [[*row, _pooled(row)] for row in found], [*names, _ALL]
    axes = ("top", "stage")
    variables: dict[str, Any] = {
        name: quantity(axes, np.array([[one[name] for one in row] for row in found], dtype=float), "1", how)
        for name, how in _EQUATIONS.items()
    }
    for name in ("both", "only_a", "only_b"):
        variables[name] = (axes, np.array([[one[name] for one in row] for row in found], dtype=object))
    ranks = [_ranks(*pair) for pair in stages.values()] + [np.nan] * (len(names) - len(stages))
    variables["spearman"] = quantity(("stage",), np.array(ranks), "1", "correlation of the ranks of all nodes' sizes")
    data = xr.Dataset(variables, {"top": [*parts], "stage": names}).assign_attrs(n=_n(*next(iter(stages.values()))))
    one = next(iter(stages.values()))[0]
    model = one.result.provenance["model"] if one.result is not None else _model(one)
    return build("overlap", data, {"top": [*map(float, parts)], "seed": seed}, model, {})


def _parts(top: Any) -> tuple[float, ...]:
    what = "top is a part of the nodes"
    listed = [top] if isinstance(top, Real) else several(what, top, "such as 0.02", NumericError)
    for part in listed:
        number(what, part, "above 0, below 1", lambda part: 0 < part < 1)
    if not listed or len(set(listed)) < len(listed):
        raise NumericError("top names each part once", got=shown(top), expected="such as [0.02, 0.05]")
    return tuple(map(float, listed))


def _stages(a: Any, b: Any) -> dict[str, tuple[_Side, _Side]]:
    """Both sides of each stage, known to be of one model and of the same nodes."""
    first, other = _listed(a), _listed(b)
    if len(first) != len(other) or not first:
        raise ResultError(
            "stages are compared one by one", got=f"{len(first)} and {len(other)}", expected="as many of each"
        )
    if isinstance(a, Mapping) and isinstance(b, Mapping) and [*first] != [*other]:
        raise ResultError("these stages have other names", got=", ".join(other), expected=", ".join(first))
    made = {name: (_side(one), _side(two)) for (name, one), two in zip(first.items(), other.values(), strict=True)}
    if _ALL in made and len(made) > 1:
        raise ResultError("a stage has the name of all stages together", got=_ALL, fix="call it otherwise")
    for one, two in made.values():
        _require_alike(one, two)
    return made


def _listed(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return {str(name): one for name, one in given.items()}
    return {str(i): one for i, one in enumerate(given)} if isinstance(given, (list, tuple)) else {"0": given}


def _side(given: Any) -> _Side:
    if isinstance(given, Circuit):
        return _Side(None, None, given)
    if not isinstance(given, Result):
        raise ResultError("two results, or circuits, are compared", got=shown(given), expected="a Result or a Circuit")
    found = orders(given)
    if len(found) != 1:
        names = ", ".join(one.name for one in found)
        raise ResultError(
            f"a {given.method} has several numbers for each node", got=names, expected="one",
            fix="keep one: uw.Result(found.data[[name]])",
        )  # fmt: skip
    return _Side(found[0], given, None)


def _model(side: _Side) -> dict[str, str]:
    if side.circuit is not None:
        return {"name": side.circuit.model, "weights": side.circuit.weights}
    assert side.order is not None  # noqa: S101 (one of the two)
    return {"name": "", "weights": side.order.model}


def _require_alike(a: _Side, b: _Side) -> None:
    one, two = _model(a)["weights"], _model(b)["weights"]
    if one and two and one != two:
        raise ResultError("these results are of two models", got=f"weights {two[:12]}", expected=f"weights {one[:12]}")
    if (a.circuit is None) != (b.circuit is None):
        raise ResultError("a circuit is compared with a circuit", got="a circuit and a result", fix="Circuit.of_result")
    if a.circuit is not None and b.circuit is not None:
        if not a.circuit.of or a.circuit.of != b.circuit.of:
            raise ResultError(
                "circuits are compared that were chosen from the same nodes", got=f"{a.circuit.of}, {b.circuit.of}",
                fix="say of how many: uw.Circuit(nodes, of=300)",
            )  # fmt: skip
        return
    if odd := sorted({*a.cells} ^ {*b.cells}):
        raise ResultError("these results are of other nodes", got=" at ".join(filter(None, odd[0])) + " in one alone")


def _n(a: _Side, b: _Side) -> int:
    return a.circuit.of if a.circuit is not None else len(a.cells)


def _compared(a: _Side, b: _Side, part: float, seed: int) -> dict[str, Any]:
    """One stage at one part."""
    n = _n(a, b)
    k = 0 if a.circuit is not None else max(1, int(np.ceil(part * n - 1e-9)))
    first, other = a.first(k), b.first(k)
    both, sizes = first & other, (len(first), len(other))
    by_chance = sizes[0] * sizes[1] / n
    shares = np.arange(min(sizes) + 1)
    pmf = hypergeom.pmf(shares, n, *sizes)
    return {
        "shared": len(both), "union": len(first | other), "jaccard": len(both) / max(1, len(first | other)),
        "expected": by_chance / max(1, sum(sizes) - by_chance), "p": float(pmf[len(both) :].sum()), "pmf": pmf,
        "chance": (by_chance, sum(sizes) - by_chance),
        "ceiling_a": _ceiling(a, k, seed), "ceiling_b": _ceiling(b, k, seed),
        "both": _called(both), "only_a": _called(first - other), "only_b": _called(other - first),
    }  # fmt: skip


def _pooled(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All stages together: sums above and below the line."""
    shared, union = (sum(one[name] for one in stages) for name in ("shared", "union"))
    above, below = (sum(one["chance"][i] for one in stages) for i in (0, 1))
    pmf = reduce(np.convolve, [one["pmf"] for one in stages])
    empty = dict.fromkeys(("both", "only_a", "only_b"), "")
    return {
        "shared": shared, "union": union, "jaccard": shared / union, "expected": above / below,
        "p": float(pmf[shared:].sum()), "ceiling_a": np.nan, "ceiling_b": np.nan, **empty,
    }  # fmt: skip


def _ceiling(side: _Side, k: int, seed: int) -> float:
    """Mean Jaccard between halves of the pairs; NaN where there are none to halve."""
    found = [len(one & two) / len(one | two) for one, two in ((x.first(k), y.first(k)) for x, y in _halved(side, seed))]
    return float(np.mean(found)) if found else np.nan


def _halved(side: _Side, seed: int) -> Iterator[tuple[_Side, _Side]]:
    result, axis = side.result, "" if side.order is None else side.order.over
    if result is None or not axis or result.data.sizes[axis] < 2:
        return
    for split in range(_SPLITS):
        drawn = np.random.default_rng([seed, split]).permutation(result.data.sizes[axis])
        parts = (drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :])
        one, two = (_side(Result(result.data.isel({axis: part}))) for part in parts)
        yield one, two


def _ranks(a: _Side, b: _Side) -> float:
    if a.circuit is not None:
        return np.nan
    own, place = b.size, {cell: i for i, cell in enumerate(b.cells)}
    return spearman(a.size, own[[place[cell] for cell in a.cells]])


def _called(cells: frozenset[tuple[str, str]]) -> str:
    listed = sorted(cells, key=lambda cell: (parse_site(cell[0]).order, cell[1]))
    return ", ".join(" at ".join(filter(None, cell)) for cell in listed)
