"""How large may the effect of a node still be that an estimate ranked low and nobody executed?

AtP*'s diagnostic (Kramár et al. 2024, arXiv 2403.00745): beyond the first k nodes of a guess, random sets of the rest
are patched at once; θ* = max_n (|d̂_n| + t_{ν,1−α} · se_n) of Welch's test between the sets with and without a node.
(facts: attribution, §2.8)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unwrite.errors import NumericError, ResultError, number, whole
from unwrite.model.load import provenance, weights_hash
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.positions import rows_at
from unwrite.result import Result, build, quantity, require_result
from unwrite.run.answer.metrics import METRICS, Custom, known, metric_of, name_of, unless_own
from unwrite.run.edit.slots import Slot, Values, slots
from unwrite.run.loop.finite import require_finite
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit_pairs, batch_size, stream
from unwrite.run.replay.clean import Base, base_of
from unwrite.run.replay.sweep import differing, placed
from unwrite.run.replay.walk import ROWS, patched_together
from unwrite.run.source.values import DONORS, Donor, donor
from unwrite.stats.random_sets import Contexts, Difference, subset
from unwrite.stats.ranks import by_size

ASSUMES = (
    "d is a node's effect averaged over random sets of the other unverified nodes being patched as well; it is the "
    "node's own effect, and theta bounds a missed one, only if effects add up"
)
_EQUATIONS = {
    "d": "mean of the metric's change over sets with the node − over sets without it",
    "se": "√(s₁²/n₁ + s₀²/n₀) of these two means",
    "df": "Welch's degrees of freedom ν",
    "upper": "|d| + t_{ν,1−α} · se",
}


@dataclass(frozen=True, eq=False)
class _Request:
    lm: Model
    pairs: Pairs
    slots: tuple[Slot, ...]
    guess: Result
    metric: str | Custom
    donor: Donor
    settings: dict[str, Any]

    @property
    def at(self) -> str:
        """RoleNames as the guess has them: a word, or a role."""
        return self.guess.provenance["settings"]["at"]

    @cached_property
    def rows(self) -> tuple[Int[np.ndarray, "pair role"], Int[np.ndarray, "pair role"]] | None:
        """The rows that a role names."""
        return self.pairs.rows(self.at)

    @cached_property
    def names(self) -> list[str]:
        """Names of the nodes, in the order in which a pass reaches them."""
        return [name for slot in self.slots for name in slot.names]

    @property
    def axes(self) -> tuple[str, ...]:
        """Of a cell: a node, or a node at a position."""
        return ("node", "position") if self.at == "each" else ("node",)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """How many there are."""
        return (len(self.names), *([self.pairs.base.length] if self.at == "each" else []))


@torch.no_grad()
def bound(
    lm: Model,
    pairs: Any,
    guess: Result,
    verified: int = 10,
    subsets: int = 400,
    p: float = 0.1,
    alpha: float = 0.05,
    seed: int = 0,
    *,
    metric: str | Custom | None = None,
    source: str | Model | None = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """The largest effect that a node may still have which a guess ranks below those that were executed.

    `θ* = max_n (|d̂_n| + t_{ν,1−α} · se_n)`: d̂_n how much larger the metric's change is over random sets with n than
    over those without it, se and ν those of Welch's test. It says: at confidence 1 − α no node that is left has
    `|d| ≥ θ*`. d is a node's average over random sets of the others being patched too; it is the node's own effect only
    if effects add up, which is an assumption, and the result says so. A small `p` brings it nearer, and raises se.

    Arguments: `pairs` and `guess`, a result of `uw.effects` of these pairs (with the same `bos`); `verified` the nodes
    first in its order (by the mean size over pairs; a node at a position where each is by itself) that count as
    executed; `subsets` random sets of the rest, each node in one with probability `p`; `alpha` one minus the
    confidence; `metric` and `source` those of the guess, to be given again where they are a function or a model.
    Returns a Result with `d`, `se`, `df` and `upper[pair, node, position]` (positions as in the guess; NaN for nodes
    that are verified, and for those whose values are the same in both runs, which do nothing); `n_in` and `n_out`
    [node, position], the sets with and without it; and of each pair `theta` (units of the metric), the node that sets
    it with its numbers (`by_node`, `by_d`, …) and `says`, all this in a sentence. The attribute `theta` is the largest
    over pairs, and just as valid. Cost: one patched pass for every set and pair.
    Raises ResultError for a guess of other pairs or another model, NumericError where no node is left, or one is in
    fewer than two sets.

    Example: `uw.bound(lm, pairs, uw.effects(lm, pairs, method="atp*"), verified=20).table()`
    """
    _require_numbers(verified, subsets, seed, p, alpha)
    chosen = {"verified": verified, "subsets": subsets, "p": p, "alpha": alpha, "seed": seed, "batch": batch}
    request = _request(lm, pairs := admit_pairs(lm, pairs, bos), guess, metric, source, chosen)
    size, read = batch_size(lm, pairs.base, batch, held=4), pairs.about()
    asked = {**chosen, "guess": guess.provenance["settings"]}
    order = hashlib.sha256(np.ascontiguousarray(guess["effect"].values).tobytes()).hexdigest()
    with opened(unless_own(checkpoint, request.metric), listener) as job:
        if done := job.begin("bound", lm, {"": read["hash"], "guess": order, **request.donor.read_by}, asked):
            return done
        differs = Rows(lambda part: {"moves": _moves(request, part)})
        stream(lm, pairs.base, differs, size, "bound: what differs", listener, job)
        moves = differs.whole()["moves"]
        sets = _sets(request, np.asarray(moves.any(0)))
        changes = Rows(partial(_measured, request, sets))
        stream(lm, pairs.base, changes, size, "bound", listener, job)
        data = _dataset(request, sets, moves, changes.whole())
        return job.signed(build("bound", data, asked, provenance(lm), {"": read}))


def _require_numbers(verified: Any, subsets: Any, seed: Any, p: Any, alpha: Any) -> None:
    for name, value, least in (("verified", verified, 0), ("subsets", subsets, 4), ("seed", seed, 0)):
        whole(f"{name} is a number", value, least)
    for name, value in (("p", p), ("alpha", alpha)):
        number(f"{name} is a probability", value, "above 0 and below 1", lambda value: 0 < value < 1)


def _request(lm: Model, pairs: Pairs, guess: Result, metric: Any, source: Any, chosen: dict[str, Any]) -> _Request:
    require_result("guess", guess, "effects")
    settings = guess.provenance["settings"]
    if guess.provenance["tokens"][""]["hash"] != pairs.about()["hash"]:
        raise ResultError("the guess is of other pairs", fix="give the pairs and bos that uw.effects was given")
    if guess.provenance["model"]["weights"] != weights_hash(lm):
        raise ResultError(
            "the guess is of another model", expected="one of this model", got=guess.provenance["model"].get("name")
        )
    for name, value, names in (("metric", metric, METRICS), ("source", source, DONORS)):
        if value is None and settings[name] not in names:
            raise NumericError(f"the guess has a {name} of its own", got=settings[name], fix=f"give {name} again")
    own = settings["metric"] if metric is None else known(metric, pairs)
    asked = slots(lm, [str(name) for name in guess["node"].values])
    if name_of(own) == "fldd" or not isinstance(settings["at"], str):
        got = "fldd" if name_of(own) == "fldd" else "several roles"
        raise NumericError("there is no bound of this", got=got, fix="ask for logit_diff, and for one role at a time")
    rows = pairs.rows(settings["at"])
    given = donor(lm, pairs, asked, settings["source"] if source is None else source, rows and rows[1])
    if (name := name_of(own)) != settings["metric"]:
        raise ResultError("the guess is of another metric", got=settings["metric"], expected=name)
    if given.name != settings["source"]:
        raise ResultError("the guess is of another source", got=settings["source"], expected=given.name)
    return _Request(lm, pairs, asked, guess, own, given, chosen)


def _base(request: _Request, batch: Batch) -> tuple[slice, Base, Values]:
    """The pairs of a batch, their base runs, and the values that nodes are set to."""
    rows = slice(batch.first, batch.first + batch.real)
    base, source = base_of(request.lm, request.pairs, rows, request.slots), request.donor.values(rows)
    return rows, base, source if request.rows is None else placed(base.values, source, request.rows[0][rows])


def _moves(request: _Request, batch: Batch) -> Bool[np.ndarray, "pair node *position"]:
    """Which cells have another value in the source run, where the read row can see it."""
    _, base, source = _base(request, batch)
    differs = differing(base, source, request.at if request.rows is None else "all")
    found = torch.cat([differs[slot] for slot in request.slots], -1).transpose(1, 2)
    return (found if request.at == "each" else found.any(-1)).cpu().numpy()


@dataclass(frozen=True, eq=False)
class _Sets:
    """The cells that are left, as indices into all of them, and the random sets of these."""

    left: np.ndarray
    seed: int
    p: float
    subsets: int
    counts: np.ndarray

    def chosen(self, sets: slice) -> Bool[np.ndarray, "set left"]:
        """Which of the cells that are left some sets hold."""
        made = [subset(self.seed, i, len(self.left), self.p) for i in range(sets.start, min(sets.stop, self.subsets))]
        return np.stack(made)


def _sets(request: _Request, moves: np.ndarray) -> _Sets:
    """Sets of what is neither verified nor known to do nothing."""
    settings = request.settings
    effect = request.guess["effect"].sel(node=request.names).transpose("pair", *request.axes).values
    left = moves.ravel().copy()
    left[by_size(effect)[1][: settings["verified"]]] = False
    index = np.flatnonzero(left)
    if not len(index):
        raise NumericError(
            "no node is left: all are verified, or have the same value in both runs",
            fix="verify fewer, or ask about more nodes",
        )
    counts = np.zeros(len(index), dtype=np.int64)
    for i in range(settings["subsets"]):
        counts += subset(settings["seed"], i, len(index), settings["p"])
    fewest = int(min(counts.min(), settings["subsets"] - counts.max()))
    if fewest < 2:
        raise NumericError(
            "a node is in, or out of, fewer than two of the sets", got=fewest, fix="use more subsets, or p nearer to ½"
        )
    return _Sets(index, settings["seed"], settings["p"], settings["subsets"], counts)


def _measured(request: _Request, sets: _Sets, batch: Batch) -> dict[str, np.ndarray]:
    """The metric of base runs, and what each cell that is left does to it on average over all sets."""
    rows, base, source = _base(request, batch)
    metric = metric_of(request.lm, request.pairs, request.metric, rows, base.final)
    clean = metric(base.final)
    start = _start(request, base, source)
    pairs = len(base.row)
    found = Contexts.empty(pairs, len(sets.left))
    each = max(1, ROWS // (pairs * (int(base.row.max()) + 1 - start)))
    for first in range(0, sets.subsets, each):
        chosen = sets.chosen(slice(first, first + each))
        pair = torch.arange(pairs, device=clean.device).repeat(len(chosen))
        final = patched_together(base, source, _masks(request, sets, chosen, base), pair, start)
        change = (metric(final, pair) - clean[pair]).double().cpu().numpy().reshape(len(chosen), pairs)
        finite = clean.isfinite().cpu().numpy() & np.isfinite(change).all(0)
        require_finite(finite, "the metric of {pair} is not finite", pair=batch.first)
        found = found + Contexts.of(change, chosen)
    return {"base": clean.double().cpu().numpy(), **vars(found.difference())}


def _start(request: _Request, base: Base, source: Values) -> int:
    """The first row that can change in any run."""
    if request.at == "last":
        return int(base.row.min())
    rows = torch.stack([part.flatten(2).any(-1).any(0) for part in differing(base, source).values()]).any(0)
    return int(rows.int().argmax())


def _masks(
    request: _Request, sets: _Sets, chosen: Bool[np.ndarray, "set left"], base: Base
) -> dict[Slot, Bool[Tensor, "run position unit"]]:
    """What is set in each run: all pairs of the first set, then of the next."""
    whole = np.zeros((len(chosen), int(np.prod(request.shape))), dtype=bool)
    whole[:, sets.left] = chosen
    length, pairs = base.ids.shape[1], len(base.row)
    cells = torch.from_numpy(whole).to(base.row.device).unflatten(1, request.shape)
    if request.at != "each":
        cells = cells[..., None].expand(*cells.shape, length)
    # Where a role is asked for, everything else is in both runs the same.
    at = request.at if request.rows is None else "all"
    where = rows_at(at, base.row, torch.arange(length, device=base.row.device))
    masks = cells.transpose(1, 2).repeat_interleave(pairs, 0) & where.repeat(len(chosen), 1)[..., None]
    return dict(zip(request.slots, masks.split([len(slot.units) for slot in request.slots], -1), strict=True))


def _dataset(
    request: _Request,
    sets: _Sets,
    moves: Bool[np.ndarray, "pair node *position"],
    whole: dict[str, np.ndarray],
) -> xr.Dataset:
    """Everything that was found, named."""
    base, still = whole["base"], moves.reshape(len(moves), -1)[:, sets.left]
    # What does nothing for a pair needs no estimate there.
    d, se, df = (np.where(still, whole[name], np.nan) for name in ("d", "se", "df"))
    found = {"d": d, "se": se, "df": df, "upper": Difference(d, se, df).upper(request.settings["alpha"])}
    unit = str(request.guess["effect"].attrs["units"])
    axes, units = ("pair", *request.axes), {"df": "1"}
    variables: dict[str, Any] = {
        name: quantity(axes, _spread(request, sets, part), units.get(name, unit), _EQUATIONS[name])
        for name, part in found.items()
    }
    for name, part in (("n_in", sets.counts), ("n_out", sets.subsets - sets.counts)):
        words = f"random sets {'with' if name == 'n_in' else 'without'} the node"
        variables[name] = quantity(request.axes, _spread(request, sets, part.astype(float)), "1", words)
    variables["base"] = quantity(("pair",), base, unit, "metric of the base run")
    variables |= _largest(request, sets, found, unit)
    coordinates: dict[str, Any] = {"pair": np.arange(len(base)), "node": request.names}
    if request.at == "each":
        coordinates["position"] = np.arange(request.pairs.base.length)
        coordinates |= request.pairs.each(request.lm.tokenizer)
    theta = variables["theta"].values
    data = xr.Dataset(variables, coordinates)
    known = theta[np.isfinite(theta)]
    return data.assign_attrs(
        theta=float(known.max()) if len(known) else 0.0, assumes=ASSUMES, cost=float(2 + sets.subsets)
    )


def _spread(request: _Request, sets: _Sets, part: Float[np.ndarray, "*pair left"]) -> np.ndarray:
    """Numbers of the cells that are left, among all cells."""
    whole = np.full((*part.shape[:-1], int(np.prod(request.shape))), np.nan)
    whole[..., sets.left] = part
    return whole.reshape(*part.shape[:-1], *request.shape)


def _largest(request: _Request, sets: _Sets, found: dict[str, np.ndarray], unit: str) -> dict[str, Any]:
    """θ* of each pair, the cell that sets it, and both in words; 0 for a pair in which nothing that is left moves."""
    upper = found["upper"]
    at, pair = np.nan_to_num(upper, nan=-1.0).argmax(1), np.arange(len(upper))
    some = np.asarray(np.isfinite(upper).any(1))
    theta = np.where(some, upper[pair, at], 0.0)
    where = np.unravel_index(sets.left[at], request.shape)
    names = [request.names[int(i)] for i in where[0]]
    alpha = request.settings["alpha"]
    equation = f"the largest of |d| + t_{{ν,1−α}} · se over nodes that are left, α = {alpha}"
    made: dict[str, Any] = {"theta": quantity(("pair",), theta, unit, equation)}
    made["by_node"] = ("pair", np.array([n if s else "" for n, s in zip(names, some, strict=True)], dtype=object))
    if len(where) > 1:
        made["by_position"] = quantity(("pair",), np.where(some, where[1], np.nan), "position", "of by_node")
    for name in ("d", "se", "df"):
        part = np.where(some, found[name][pair, at], np.nan)
        made[f"by_{name}"] = quantity(("pair",), part, "1" if name == "df" else unit, f"{_EQUATIONS[name]}: of by_node")
    for name, part in (("by_n_in", sets.counts[at]), ("by_n_out", sets.subsets - sets.counts[at])):
        made[name] = quantity(("pair",), np.where(some, part, np.nan), "1", "random sets with, or without, by_node")
    cells = [" at ".join([name, *map(str, place)]) for name, *place in zip(names, *where[1:], strict=True)]
    says = [
        f"If effects add up, with {100 * (1 - alpha):.4g} % confidence no node left moves {unit} by {value:.4g} or "
        f"more; {cell} sets this bound"
        if moved
        else "Nothing that is left moves"
        for value, cell, moved in zip(theta, cells, some, strict=True)
    ]
    made["says"] = ("pair", np.array(says, dtype=object))
    return made
