"""How do the guesses at a patch's effect look beside what it does? Several estimators of one quantity, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from unwrite.errors import ModelError, NumericError, several, shown
from unwrite.methods.agree import agree
from unwrite.methods.effects import METHODS, effects
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import names_of
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.positions import RoleNames
from unwrite.result import Result, build, quantity
from unwrite.run.answer.metrics import known, name_of, unless_own
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit_pairs, batch_size

SIDE_BY_SIDE = ("direct", "net", "atp", "relp", "exact")


def compare(
    lm: Model,
    pairs: Any,
    nodes: str | Iterable[str] = "heads",
    at: RoleNames = "all",
    methods: Sequence[str] = SIDE_BY_SIDE,
    metric: Any = "logit_diff",
    *,
    bos: int | bool | None = None,
    batch: int | None = None,
    checkpoint: Job | str | Path | None = None,
    listener: Listener | None = None,
) -> Result:
    """Every node's effect by several estimators, and how well each predicts the executed one (see `uw.effects`).

    Arguments as in `uw.effects`; `methods` any of its methods. Returns a Result with a variable for each method,
    [pair, node] (and position for at="each", or role), of AtP* the signed one; by `estimator` the `pearson` (with
    `_low` and `_high`, 95 % over pairs) and `spearman` correlations with "exact" over all cells, where it is among
    them, and `cost`, the passes over one prompt.
    Raises NumericError for a method that there is none of, and as `uw.effects` does.

    Example: `uw.compare(lm, pairs, "mlp_out").table()`
    """
    if isinstance(lm, Result) or isinstance(pairs, Model):
        raise ModelError(
            "estimators of one model are compared here", got=f"{shown(lm)} and {shown(pairs)}",
            expected="a model and pairs", fix="two results, or two models, are put side by side by uw.diff",
        )  # fmt: skip
    expected = f"some of {', '.join(METHODS)}"
    methods = several("methods are names of estimators", methods, expected, NumericError)
    if not methods or not all(isinstance(name, str) and name in METHODS for name in methods):
        raise NumericError("methods are names of estimators", got=shown(methods), expected=expected)
    pairs = admit_pairs(lm, pairs, bos)
    metric = known(metric, pairs)
    pairs.rows(at)
    batch_size(lm, pairs.base, batch)
    chosen = nodes if isinstance(nodes, str) else names_of("nodes", nodes)
    where = at if isinstance(at, str) else [*at]
    asked = {
        "nodes": chosen,
        "at": where,
        "methods": [*dict.fromkeys(methods)],
        "metric": name_of(metric),
        "batch": batch,
    }
    with opened(unless_own(checkpoint, metric), listener) as job:
        if done := job.begin("compare", lm, {"": pairs.about()["hash"]}, asked):
            return done
        found = {
            name: effects(lm, pairs, chosen, where, name, metric, batch=batch, checkpoint=job, listener=listener)
            for name in asked["methods"]
        }
        return job.signed(_side_by_side(lm, pairs, found))


def _side_by_side(lm: Model, pairs: Pairs, found: dict[str, Result]) -> Result:
    first = next(iter(found.values()))
    axes = tuple(map(str, first["effect"].dims))
    variables = {
        name: quantity(axes, _signed(one), first["effect"].attrs["units"], one["effect"].attrs["equation"])
        for name, one in found.items()
    }
    own = ("effect", "signed", "inputs", "mean", "mean_low", "mean_high")
    rest = first.data.drop_vars([name for name in own if name in first.data])
    data = rest.assign(variables).assign_coords(estimator=list(found)).assign(_agreement(found))
    settings = first.provenance["settings"] | {"methods": list(found)}
    return build("compare", data, settings, provenance(lm), {"": pairs.about()})


def _signed(one: Result) -> np.ndarray:
    return one["signed" if "signed" in one.data else "effect"].values


def _agreement(found: dict[str, Result]) -> dict[str, xr.Variable]:
    costs = np.array([one.data.attrs["cost"] for one in found.values()])
    variables = {
        "cost": quantity(
            ("estimator",), costs, "passes over one prompt", "forward passes and backward passes, to activations alone"
        )
    }
    if "exact" in found:
        every = [agree(one, found["exact"]).data.sel(group="all").isel(reading=-1) for one in found.values()]
        for name in ("pearson", "pearson_low", "pearson_high", "spearman"):
            values = np.array([float(one[name]) for one in every])
            variables[name] = quantity(("estimator",), values, "1", every[0][name].attrs["equation"])
    return variables
