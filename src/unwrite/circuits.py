"""What is a circuit? Nodes of one model by name, everywhere or at a role, with scores; a value that knows no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from unwrite.errors import NodeError, ResultError, one_of, require, several, shown, whole
from unwrite.nodes import names_of, parse_site
from unwrite.result import Result, build, quantity, read, require_result

if TYPE_CHECKING:
    import altair as alt

# The method by whose name a saved circuit is known.
METHOD = "Circuit"
BY = ("absolute", "signed")


@dataclass(frozen=True)
class Circuit:
    """Nodes that belong together, the first ones first.

    Arguments: `nodes` names; `roles` of each the token at which it belongs, "" for every position; `scores` of each how
    much it helps (negative: it works against the answer), by default unknown; `looks` of each in words what it attends
    to; `model` its name and `weights` their hash, "" where nobody said; `of` how many cells (nodes, or nodes at roles)
    it was chosen from, 0 where nobody said. Sets of it: `a | b`, `a & b`, `a - b`, `"L2H3" in a`.
    Raises NodeError for what is no name and for a node named twice at one role, ResultError for parts of other lengths.

    Example: `uw.Circuit(("L2H3", "MLP4")) | other`
    """

    nodes: tuple[str, ...]
    roles: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    looks: tuple[str, ...] = ()
    model: str = ""
    weights: str = ""
    of: int = 0

    def __post_init__(self) -> None:
        nodes = tuple(str(parse_site(name)) for name in names_of("nodes", self.nodes))
        object.__setattr__(self, "nodes", nodes)
        for name, empty, kind in (("roles", "", str), ("scores", np.nan, Real), ("looks", "", str)):
            what = f"a circuit has {name} of each node"
            part = tuple(several(what, getattr(self, name), str(len(nodes)), ResultError)) or (empty,) * len(nodes)
            require(len(part) == len(nodes), ResultError, what, len(part), str(len(nodes)))
            for one in part:
                require(isinstance(one, kind), ResultError, what, one, "words" if kind is str else "numbers")
            object.__setattr__(self, name, part)
        for name in ("model", "weights"):
            require(isinstance(getattr(self, name), str), ResultError, f"{name} is a word", getattr(self, name), "text")
        if len(set(self.cells)) < len(nodes):
            twice = next(cell for cell in self.cells if self.cells.count(cell) > 1)
            raise NodeError("a circuit names every node once", got=" at ".join(filter(None, twice)))
        whole("of counts the cells that a circuit is chosen from", self.of, 0)

    @staticmethod
    def of_result(found: Result, order: str | None = None, by: str = BY[0], size: int | None = None) -> Circuit:
        """The first nodes of an order that `uw.circuit` followed.

        Arguments: `order` by its name (by default the first), `by` "absolute" or "signed", `size` how many (by default
        the fewest that were enough). Raises ResultError where the result does not hold them.
        """
        require_result("found", found, "circuit")
        if "sender" in found.data:
            raise ResultError("this circuit is one of edges", expected="one of nodes", fix="ask uw.circuit for nodes=")
        names = [str(name) for name in found.data["order"].values]
        one_of("order", order := names[0] if order is None else order, names)
        one_of("by", by, [str(name) for name in found.data["by"].values])
        one = found.data.sel(order=order, by=by)
        fewest = float(one["smallest"])
        if size is None and not np.isfinite(fewest):
            raise ResultError(f"no size of {order} was enough", got="no size", fix="say size=")
        ranked = one["rank"].transpose("node", ...)
        cells = int(ranked.notnull().sum())
        size = int(fewest) if size is None else whole("size is a number of nodes", size, 1, cells)
        rank, helps = ranked.values, one["score"].transpose(*ranked.dims).values
        places = np.argsort(np.where(np.isnan(rank), np.inf, rank), axis=None, kind="stable")[:size]
        at = [np.unravel_index(int(i), rank.shape) for i in places]
        model = found.provenance["model"]
        return Circuit(
            tuple(str(ranked["node"].values[i[0]]) for i in at),
            tuple(str(ranked["role"].values[i[1]]) for i in at) if rank.ndim == 2 else (),
            tuple(float(helps[i]) for i in at),
            model=str(model.get("name", "")), weights=str(model.get("weights", "")), of=cells,
        )  # fmt: skip

    @staticmethod
    def read(path: str | Path) -> Circuit:
        """A circuit that was saved. Raises ResultError where there is none, or another result."""
        found = read(path)
        require_result("this", found, METHOD)
        data, model = found.data, found.provenance["model"]
        words = {name: tuple(map(str, data[name].values)) for name in ("node", "role", "looks")}
        scores = tuple(map(float, data["score"].values))
        return Circuit(
            words["node"], words["role"], scores, words["looks"],
            str(model["name"]), str(model["weights"]), int(data.attrs["of"]),
        )  # fmt: skip

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """Each node with its role, "" for every position."""
        return tuple(zip(self.nodes, self.roles, strict=True))

    @property
    def ranked(self) -> tuple[str, ...]:
        """The nodes, each once, the first ones first: a circuit is an order, too."""
        return tuple(dict.fromkeys(self.nodes))

    @property
    def opponents(self) -> tuple[str, ...]:
        """The nodes whose score says that they work against the answer."""
        return tuple(node for node, score in zip(self.nodes, self.scores, strict=True) if score < 0)

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, name: object) -> bool:
        return name in self.nodes

    def __or__(self, other: Circuit) -> Circuit:
        """Cells of either: first one's own, then what the other one adds."""
        own, them = self._take(set(self.cells)), other._take(set(other.cells) - set(self.cells))
        parts = {name: getattr(own, name) + getattr(them, name) for name in ("nodes", "roles", "scores", "looks")}
        return replace(self._with(other), **parts)

    def __and__(self, other: Circuit) -> Circuit:
        """Cells of both, with this one's scores."""
        return self._with(other)._take(set(other.cells))

    def __sub__(self, other: Circuit) -> Circuit:
        """Cells that the other one does not have."""
        return self._with(other)._take(set(self.cells) - set(other.cells))

    def _with(self, other: Circuit) -> Circuit:
        """This circuit, known to be of the other one's model."""
        if not isinstance(other, Circuit):
            raise ResultError("a circuit is put together with a circuit", got=shown(other), expected="a uw.Circuit")
        if self.weights and other.weights and self.weights != other.weights:
            raise ResultError("these circuits are of two models", got=other.model, expected=self.model)
        known = self if self.weights else other
        return replace(self, model=known.model, weights=known.weights, of=self.of if self.of == other.of else 0)

    def _take(self, cells: set[tuple[str, str]]) -> Circuit:
        kept = [i for i, cell in enumerate(self.cells) if cell in cells]
        parts = {n: tuple(getattr(self, n)[i] for i in kept) for n in ("nodes", "roles", "scores", "looks")}
        return replace(self, **parts)

    def looking(self, attention: Result, roles: Mapping[str, Any]) -> Circuit:
        """The same, with what each head attends to most from the row that is read, in words: "S2 .78".

        Arguments: `attention` what `uw.attention` found on the base prompts of pairs, `roles` those of the pairs. A
        weight is the mean over prompts. Raises ResultError for another result, and for other prompts than the roles'.
        """
        found = attended(attention, roles)
        said = {head: in_words(*most(one)) for head, one in found.items()}
        return replace(self, looks=tuple(said.get(node, "") for node in self.nodes))

    def result(self) -> Result:
        """The circuit as a result, which is saved, tabled and drawn as all are."""
        if not self.nodes:
            raise ResultError("this circuit is empty", got="no node", expected="at least one")
        words = {"role": self.roles, "looks": self.looks}
        variables: dict[str, Any] = {name: ("node", np.array(part, dtype=object)) for name, part in words.items()}
        says = "how much the node helps, in units of its order; negative: it works against the answer"
        variables["score"] = quantity(("node",), np.array(self.scores, dtype=float), "of the order", says)
        data = xr.Dataset(variables, {"node": list(self.nodes)}).assign_attrs(of=self.of, row_axes="node")
        return build(METHOD, data, {}, {"name": self.model, "weights": self.weights}, {})

    def save(self, path: str | Path) -> Path:
        """Write it as results are written: whole or not at all. Raises ResultError where that is not possible."""
        return self.result().save(path)

    def figure(self) -> alt.TopLevelMixin:
        """Its nodes by layer, upwards: who helps, who works against, what each head looks at where that is known."""
        return self.result().figure("circuit")


def attended(attention: Result, roles: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What each head of `uw.attention` gives the tokens of each role from the row "end", as means over prompts.

    As shares of what it brings from all tokens, where it is weighed by value. Raises ResultError for another result,
    and for other prompts than the roles'.
    """
    require_result("attention", attention, "attention")
    weight = attention["weight"].transpose("prompt", "head", "query", "key")
    n, length = weight.sizes["prompt"], weight.sizes["key"]
    if not isinstance(roles, Mapping):
        raise ResultError("roles are rows by name", got=shown(roles), expected="those of pairs", fix="pairs.roles")
    rows = {str(name): _rows(part, n, length) for name, part in roles.items()}
    if "end" not in rows or any(part is None for part in rows.values()):
        raise ResultError(
            "attention is of other prompts than the roles", got=f"{n} prompts",
            fix="give uw.attention(lm, pairs.base) and pairs.roles",
        )  # fmt: skip
    prompt = np.arange(n)
    seen = weight.values.swapaxes(0, 1)[:, prompt, rows["end"]]
    if attention.provenance["settings"]["weigh"] == "value":
        seen = seen / np.maximum(np.nansum(seen, -1, keepdims=True), np.finfo(float).tiny)
    return {
        str(head): {name: float(one[prompt, part].mean()) for name, part in rows.items()}
        for head, one in zip(weight["head"].values, seen, strict=True)
    }


def most(weights: Mapping[str, float]) -> tuple[str, float]:
    """The role that gets most, and how much that is."""
    name = max(weights, key=weights.__getitem__)
    return name, weights[name]


def in_words(role: str, weight: float) -> str:
    """What a head attends to: "S2 .78"."""
    return f"{role} {weight:.2f}".replace(" 0.", " .")


def _rows(part: Any, n: int, length: int) -> np.ndarray | None:
    """A row of each of n prompts of so many tokens; None where these are none."""
    try:
        found = np.asarray(part)
    except Exception:  # noqa: BLE001 - whatever a stranger's own array raises means the same
        return None
    fits = found.dtype.kind in "iu" and found.shape == (n,)
    return found if fits and ((found >= -length) & (found < length)).all() else None
