"""How well does an estimate of effects predict the executed ones, and what does it cost to find the largest with it?

Pearson's r and Spearman's ρ over cells (pair, node, position); recall of the true top k while nodes are executed in the
order of the guess, against cost = the estimator's own passes + one for each verified node (Kramár et al. 2024,
arXiv 2403.00745). (facts: attribution, §2.6)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata

from unwrite.errors import ResultError, whole
from unwrite.nodes import KINDS, parse_site
from unwrite.result import Result, build, quantity, require_result
from unwrite.stats.bootstrap import interval, moments
from unwrite.stats.ranks import by_size, pearson, same_sign, spearman, spearman_interval, standard

_FORMS = {
    "pearson": "correlation of guess and exact effects over cells",
    "pearson_low": "2.5 % over resampled pairs",
    "pearson_high": "97.5 % over resampled pairs",
    "pearson_median": "median over pairs of the correlation within a pair",
    "spearman": "correlation of the ranks of guess and exact effects over cells",
    "spearman_low": "2.5 % over resampled pairs",
    "spearman_high": "97.5 % over resampled pairs",
    "spearman_median": "median over pairs of the correlation of ranks within a pair",
    "same_sign": "cells whose signs agree, of those whose exact effect is at least 5 % of the pair's largest",
    "n": "cells",
}
# A curve has every step at which recall rises, and about this many points to an octave beside them.
_POINTS = 16


def agree(guess: Result, exact: Result, k: int = 10) -> Result:
    """How well an estimate of effects predicts the executed effects of the same pairs, nodes and metric.

    Arguments: `guess` a result of `uw.effects` by any method; `exact` one by method "exact", else alike; `k` how many
    of the largest effects are to be found (at most as many as there are nodes).
    Returns a Result. Over cells, for each `reading` of the guess ("effect", and "signed" of atp* or "inputs" of ig) and
    each `group` ("all", and each kind of node where there are several): `pearson`, `spearman`, each with `_low` and
    `_high` (95 % by resampling pairs; pairs that share a prompt are taken together; NaN for a lone one) and `_median`
    over pairs; `same_sign`; `n`. The `effect` of atp* is a magnitude: it is compared with magnitudes and has no sign. A
    column that does not vary has no correlation: NaN. `miss`: the cells that are worst misjudged, by the size of their
    exact effect times how often its rank is doubled, log2(rank_guess / rank_exact); ranks are of sizes, over all cells.
    `recall[top, executed]`: how much of the true top nodes (a node at a position where each is by itself; by the mean
    size over pairs) is seen when so many are executed in the order of the guess, at `cost[executed]` forward passes a
    pair; `verified_cost[top]` is what it takes to see them all; NaN beyond the nodes that do anything.
    Raises ResultError for results that are not of the same pairs, nodes, positions, metric, source and model.

    Example: `uw.agree(uw.effects(lm, pairs, method="relp"), uw.effects(lm, pairs)).table()`
    """
    whole("k is a number of nodes", k, 1)
    _require_alike(guess, exact)
    both = _Both(guess, exact)
    data = xr.Dataset({**both.correlations(), **both.misses(k), **both.recall(k)}, both.coordinates(k))
    data = data.assign_attrs(independent=int(both.cluster.max()) + 1, cost=float(guess.data.attrs["cost"]))
    settings = {"k": k, "guess": guess.provenance["settings"], "exact": exact.provenance["settings"]}
    return build("agree", data, settings, exact.provenance["model"], exact.provenance["tokens"])


def _require_alike(guess: Result, exact: Result) -> None:
    for name, part in (("guess", guess), ("exact", exact)):
        require_result(name, part, "effects")
    given = {name: part.provenance for name, part in (("guess", guess), ("exact", exact))}
    if (method := given["exact"]["settings"]["method"]) != "exact":
        raise ResultError(
            "exact is not executed, but an estimate", got=method, expected="uw.effects(…, method='exact')"
        )
    asked = {
        "pairs": lambda part: part["tokens"][""]["hash"],
        "weights": lambda part: part["model"]["weights"],
        **{name: lambda part, name=name: part["settings"][name] for name in ("at", "metric", "source")},
    }
    for name, read in asked.items():
        if (one := read(given["guess"])) != (other := read(given["exact"])):
            raise ResultError(f"guess and exact are not of the same {name}", got=one, expected=other)
    nodes = [[str(node) for node in part["node"].values] for part in (guess, exact)]
    if nodes[0] != nodes[1]:
        odd = sorted(set(nodes[0]) ^ set(nodes[1]))
        raise ResultError(
            "guess and exact are not of the same nodes", got=f"{', '.join(odd[:4])} in one of them only ({len(odd)})"
        )


@dataclass(frozen=True, eq=False)
class _Both:
    """An estimate and the truth, cell by cell."""

    guess: Result
    exact: Result

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Of a cell."""
        dims = self.exact["effect"].dims
        return ("pair", "node", *(axis for axis in ("position", "role") if axis in dims))

    @property
    def _places(self) -> np.ndarray:
        """Names of positions or roles."""
        return self.exact["effect"][self.axes[2]].values

    @cached_property
    def truth(self) -> Float[np.ndarray, "pair node *position"]:
        """Executed effects; NaN behind the row that is read."""
        return self.exact["effect"].transpose(*self.axes).values.astype(float)

    @cached_property
    def there(self) -> Bool[np.ndarray, "pair node *position"]:
        """Cells that there are."""
        return np.isfinite(self.truth)

    @cached_property
    def readings(self) -> dict[str, np.ndarray]:
        """What the estimate says, by the name of its variable."""
        found = {}
        for name in ("effect", "signed", "inputs"):
            if name in self.guess.data:
                found[name] = self.guess[name].transpose(*self.axes).values.astype(float)
                bad = np.argwhere(self.there & ~np.isfinite(found[name]))
                if len(bad):
                    pair, node = (int(i) for i in bad[0, :2])
                    raise ResultError(f"{name} of the guess is not finite", got=f"{self.nodes[node]} of pair {pair}")
        return found

    @property
    def unsigned(self) -> bool:
        """Is the effect of the estimate a magnitude?"""
        return "signed" in self.guess.data

    @cached_property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [str(node) for node in self.exact["node"].values]

    @cached_property
    def groups(self) -> dict[str, Bool[np.ndarray, " node"]]:
        """All nodes, and those of each kind where there are several."""
        kinds = np.array([KINDS[parse_site(node).kind].group for node in self.nodes], dtype=object)
        named = {kind: kinds == kind for kind in dict.fromkeys(kinds)}
        return {"all": np.ones(len(kinds), dtype=bool)} | (named if len(named) > 1 else {})

    @cached_property
    def cluster(self) -> Int[np.ndarray, " pair"]:
        """Pairs that share a base or a source prompt are not independent: they are of one cluster."""
        texts = [*self.exact["base_text"].values, *self.exact["source_text"].values]
        prompts, pair = np.unique(texts, return_inverse=True)[1], np.arange(self.truth.shape[0])
        size = len(pair) + int(prompts.max()) + 1
        links = coo_array((np.ones(len(texts)), (np.tile(pair, 2), len(pair) + prompts)), shape=(size, size))
        return np.unique(connected_components(links)[1][: len(pair)], return_inverse=True)[1]

    def correlations(self) -> dict[str, Any]:
        """Over cells, for each reading and group."""
        found = {name: np.full((len(self.readings), len(self.groups)), np.nan) for name in _FORMS}
        for i, name in enumerate(self.readings):
            for j, group in enumerate(self.groups.values()):
                for form, value in self._correlated(name, group).items():
                    found[form][i, j] = value
        return {form: quantity(("reading", "group"), found[form], "1", words) for form, words in _FORMS.items()}

    def _correlated(self, name: str, group: Bool[np.ndarray, " node"]) -> dict[str, float]:
        magnitude = name == "effect" and self.unsigned
        kept = self.there & group.reshape(1, -1, *[1] * (self.there.ndim - 2))
        x, y = self.readings[name][kept], self.truth[kept]
        y = np.abs(y) if magnitude else y
        pair = np.broadcast_to(np.arange(len(kept)).reshape(-1, *[1] * (kept.ndim - 1)), kept.shape)[kept]
        each = [np.flatnonzero(pair == i) for i in range(len(kept))]
        low, high = interval(_sums(x, y, self.cluster[pair]))
        rank_low, rank_high = spearman_interval(x, y, self.cluster[pair])
        return {
            "pearson": pearson(x, y), "pearson_low": low, "pearson_high": high,
            "pearson_median": _median([pearson(x[rows], y[rows]) for rows in each]),
            "spearman": spearman(x, y), "spearman_low": rank_low, "spearman_high": rank_high,
            "spearman_median": _median([spearman(x[rows], y[rows]) for rows in each]),
            "same_sign": np.nan if magnitude else same_sign(x, y, pair),
            "n": float(len(x)),
        }  # fmt: skip

    def misses(self, k: int) -> dict[str, Any]:
        """The cells that the effect of the estimate misjudges most."""
        where = np.argwhere(self.there)
        values = {"exact": self.truth[self.there], "guess": self.readings["effect"][self.there]}
        ranks = {name: rankdata(-np.abs(value)) for name, value in values.items()}
        missed = np.abs(values["exact"]) * np.log2(ranks["guess"] / ranks["exact"])
        worst = np.argsort(-missed, kind="stable")[:k]
        worst = worst[missed[worst] > 0]
        unit = self.exact["effect"].attrs["units"]
        words = np.array(self.nodes, dtype=object)[where[worst, 1]]
        found: dict[str, Any] = {"miss_node": ("miss", words), "miss_pair": ("miss", where[worst, 0])}
        if len(self.axes) == 3:
            found[f"miss_{self.axes[2]}"] = ("miss", self._places[where[worst, 2]])
        for name in values:
            found[f"miss_{name}"] = quantity(("miss",), values[name][worst], unit, f"{name} effect of the cell")
            words = f"rank of |{name}| over all cells, 1 the largest"
            found[f"miss_rank_{name}"] = quantity(("miss",), ranks[name][worst], "1", words)
        return found

    @cached_property
    def _order(self) -> tuple[Float[np.ndarray, " cell"], Int[np.ndarray, " cell"], Int[np.ndarray, " cell"]]:
        """True importance of every node (at every position), the true order, and the place of each in the guess's."""
        (importance, true), (_, guessed) = by_size(self.truth), by_size(self.readings["effect"])
        place = np.empty(len(true), dtype=int)
        place[guessed] = np.arange(len(true))
        return importance, true, place

    def _needed(self, k: int) -> Float[np.ndarray, " top"]:
        """How many nodes must be executed until the true top 1, 2, … are seen; NaN beyond those that do anything."""
        importance, true, place = self._order
        top = true[: min(k, len(true))]
        return np.where(importance[top] > 0, np.maximum.accumulate(place[top] + 1), np.nan)

    def _executed(self, k: int) -> Int[np.ndarray, " executed"]:
        """Points of the curve: where recall rises, and points between."""
        _, true, place = self._order
        n = len(true)
        between = np.unique(np.geomspace(1, n, max(2, int(_POINTS * np.log2(n + 1)))).round().astype(int))
        return np.unique(np.concatenate([[0], between, place[true[: min(k, n)]] + 1]))

    def recall(self, k: int) -> dict[str, Any]:
        """What is found when nodes are executed in the order of the guess."""
        place, needed, executed = self._order[2] + 1, self._needed(k), self._executed(k)
        top = self._order[1][: len(needed)]
        seen = np.cumsum(place[top][:, None] <= executed, 0) / np.arange(1, len(top) + 1)[:, None]
        seen = np.where(np.isnan(needed)[:, None], np.nan, seen)
        cost = float(self.guess.data.attrs["cost"])
        unit, words = "forward passes per pair", "passes of the estimator and one for each verified node"
        return {
            "recall": quantity(("top", "executed"), seen, "1", "part of the true top nodes among those executed"),
            "cost": quantity(("executed",), cost + executed, unit, words),
            "verified_cost": quantity(("top",), cost + needed, unit, f"{words}, until all are seen"),
            "top_node": ("top", np.array([self._named(int(cell)) for cell in top], dtype=object)),
        }

    def _named(self, cell: int) -> str:
        node, *places = np.unravel_index(cell, self.truth.shape[1:])
        return self.nodes[int(node)] + "".join(f" at {self._places[place]}" for place in places)

    def coordinates(self, k: int) -> dict[str, Any]:
        """Labels of the axes."""
        return {
            "reading": [*self.readings], "group": [*self.groups], "executed": self._executed(k),
            "top": np.arange(1, len(self._needed(k)) + 1),
        }  # fmt: skip


def _sums(x: np.ndarray, y: np.ndarray, cluster: np.ndarray) -> Float[np.ndarray, "moment cluster 1"]:
    """Moments summed over the cells of every cluster."""
    if not len(x):
        return np.zeros((6, 0, 1))
    cells = moments(standard(x)[:, None], standard(y)[:, None])[..., 0]
    return np.stack([np.bincount(cluster, part) for part in cells])[..., None]


def _median(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else np.nan
