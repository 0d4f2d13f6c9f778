"""How much of a node's direct effect is not missed when it is taken away, and what makes up for it?

Self-repair (McGrath et al. 2023, arXiv 2307.15771; Rushing and Nanda 2024, arXiv 2402.15390) is a direct effect on a
logit less what the logit loses when the write is replaced. The exact account of that loss in a result of `uw.dla`,
total = direct + erased + filled in + norm, divides it without a further run: the scale of the final norm, later nodes
that write more of the same where the write is missing (less what they write of it because it is there, and so pass on),
and later nodes that no longer write against it ("anti-erasure"). The first two repair a loss; of the third there was
less to lose than direct says. (facts: measuring erasure, §6, §7)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from unwrite.errors import ResultError, number, shown
from unwrite.nodes import MLPS, PROJECTED
from unwrite.result import Result, build, quantity
from unwrite.stats.jackknife import FEWEST, ratio

ALL = "all"
PARTS = ("norm", "filled_in", "erased")
HEADS_EARLY, MLPS_EARLY = "heads before the last layer", "mlps before the last layer"
_CELLS = ("prompt", "node")
_SAYS = {
    "repair": ("logit", "direct − total (all) = −norm − filled_in − erased, parts of the account of total"),
    "direct": ("logit", "what the write does to the logits more than what replaces it, at the clean final scale"),
    "total": ("logit", "logit_diff − logit_diff with the write replaced, executed"),
    "mean_direct": ("logit", "mean of direct over the counted prompts"),
    "mean_total": ("logit", "mean of total over the counted prompts"),
    "share": ("1", "Σ repair / Σ direct over the counted prompts"),
    "share_low": ("1", "2.5 %: t interval on the jackknife over independent prompts, none below six of them"),
    "share_high": ("1", "97.5 %: as share_low"),
}


def self_repair(found: Result, top: float = 0.1) -> Result:
    """How much of each node's direct effect is repaired, by the norm and by nodes that fill in, or had been erased.

    Needs no model and no torch. Arguments: `found` a result of `uw.dla(…, at="position")` with executed totals, of a
    corpus; `top` the part of its prompts that is counted of each node: those of its largest direct effects, if they are
    above 0 (Rushing and Nanda count 2 % of many more tokens).
    Returns a Result with `repair[prompt, node, part]` in logits, part "all" = direct − total, "norm", "filled_in",
    "erased", beside `direct` and `total[prompt, node]`, and which prompts are `counted[prompt, node]`; of these
    `mean_direct` and `mean_total[node]`, and `share[node, part]` of direct with `share_low` and `share_high`; and
    `group_share[group, part]` with its interval, of heads and of MLPs before the last layer and of the heads of each
    layer. "filled_in" is below 0 where later nodes pass on more than they fill in, and "all" where total is above
    direct. Shares of a node without a direct effect above 0 are NaN.
    Raises ResultError for a result of another method, without totals, or of writes replaced at all rows; NumericError
    for a `top` that is no part.
    Source: Rushing and Nanda 2024, arXiv 2402.15390.

    Example: `uw.self_repair(uw.dla(lm, tokens, at="position", replace="resample")).figure()`
    """
    _require(found)
    number("top is a part of the prompts", top, "above 0, at most 1", lambda part: 0 < part <= 1)
    data = found.data
    why = data["why"].transpose(*_CELLS, "part")
    direct, made_up = why.sel(part="direct").values, -why.sel(part=[*PARTS]).values
    repair = np.concatenate([made_up.sum(2, keepdims=True), made_up], 2)
    counted, cluster = _largest(direct, top), np.unique(data["cluster"].values, return_inverse=True)[1]
    groups = _groups(data)
    cells: dict[str, tuple[tuple[str, ...], Any]] = {
        "repair": ((*_CELLS, "part"), repair), "direct": (_CELLS, direct), "total": (_CELLS, data["total"].values),
    }  # fmt: skip
    for name in ("direct", "total"):
        counts = np.where(counted, cells[name][1], 0).sum(0)
        with np.errstate(invalid="ignore"):
            cells[f"mean_{name}"] = ("node",), counts / counted.sum(0)
    for prefix, axis, members in (
        ("", "node", np.eye(data.sizes["node"], dtype=bool)),
        ("group_", "group", groups.values()),
    ):
        shares = _shares(repair, direct, counted, cluster, members)
        cells |= {f"{prefix}{name}": ((axis, "part"), part) for name, part in shares.items()}
    variables = {
        name: quantity(dims, part, *_SAYS[name.removeprefix("group_")]) for name, (dims, part) in cells.items()
    }
    axes = {name: data[name].values for name in _CELLS} | {"part": [ALL, *PARTS], "group": [*groups]}
    whole = xr.Dataset({**variables, "counted": (_CELLS, counted)}, axes)
    whole = whole.assign_attrs(clusters=int(cluster.max()) + 1, n_prompts=int(np.isfinite(direct).all(1).sum()))
    record = found.provenance
    return build("self_repair", whole, {"top": float(top)}, record["model"], record["tokens"])


def _require(found: Any) -> None:
    """Raises ResultError for anything but executed totals of writes that were replaced at the read row alone."""
    fix = 'uw.dla(lm, prompts, at="position")'
    if not isinstance(found, Result) or found.method != "dla":
        got = found.method if isinstance(found, Result) else shown(found)
        raise ResultError("self-repair is of attributions", got=got, expected="a result of uw.dla", fix=fix)
    if "total" not in found.data:
        raise ResultError("nothing was executed", got="total=False", expected="executed totals", fix=fix)
    if (at := found.provenance["settings"]["at"]) != "position":
        why = "writes were replaced at all rows, so that total holds what they moved to others"
        raise ResultError(why, got=f"at={at!r}", expected='at="position"', fix=fix)


def _largest(direct: Float[np.ndarray, "prompt node"], top: float) -> Bool[np.ndarray, "prompt node"]:
    """Of each node the prompts with the largest direct effects above 0."""
    known = np.isfinite(direct)
    size = np.where(known, direct, -np.inf)
    rank = np.argsort(np.argsort(-size, 0, kind="stable"), 0)
    return known & (rank < np.ceil(top * known.sum(0))) & (size > 0)


def _groups(data: xr.Dataset) -> dict[str, Bool[np.ndarray, " node"]]:
    """Nodes by kind but for the last layer, behind which nothing repairs; heads also by layer."""
    layer, last = data["layer"].values, int(data["layer"].max())
    head, mlp = (np.isin(data["kind"].values, kinds) for kinds in (PROJECTED, MLPS))
    groups = {HEADS_EARLY: head & (layer < last), MLPS_EARLY: mlp & (layer < last)}
    groups |= {f"L{one}.heads": head & (layer == one) for one in range(last + 1)}
    return {name: members for name, members in groups.items() if members.any()}


def _shares(
    repair: Float[np.ndarray, "prompt node part"],
    direct: Float[np.ndarray, "prompt node"],
    counted: Bool[np.ndarray, "prompt node"],
    cluster: Int[np.ndarray, " prompt"],
    members: Iterable[Bool[np.ndarray, " node"]],
) -> dict[str, Float[np.ndarray, "of part"]]:
    """Of each set of nodes Σ repair / Σ direct over counted cells, with its interval over clusters."""
    found = []
    for own in members:
        cells = counted & own
        above, below = np.where(cells[..., None], repair, 0).sum(1), np.where(cells, direct, 0).sum(1)
        there = np.unique(cluster[cells.any(1)], return_inverse=True)[1]
        if not len(there):
            found.append(np.full((3, repair.shape[2]), np.nan))
            continue
        whole, low, high = ratio(above[cells.any(1)], below[cells.any(1)], there)
        few = there.max() + 1 < FEWEST
        found.append(np.stack([whole, *(np.full_like(end, np.nan) if few else end for end in (low, high))]))
    return dict(zip(("share", "share_low", "share_high"), np.stack(found, 1), strict=True))
