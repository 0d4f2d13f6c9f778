"""What is another in two results, or in two models that read the same? Side by side, with intervals of the change.

change = b − a. Where both have a 95 % interval, that of the change is d − √((b − b_l)² + (a_u − a)²) to
d + √((b_u − b)² + (a − a_l)²) (Zou and Donner 2008, doi 10.1002/sim.3095): as if their prompts were others. On the same
prompts both err alike, so it is rather too wide. Effects are subtracted pair by pair, and their interval is of that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from unwrite.errors import ModelError, NumericError, ResultError, function, shown
from unwrite.methods.effects import effects
from unwrite.methods.scan import scan
from unwrite.methods.survival import survival
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.prompts.pairs import Pairs
from unwrite.result import Result, build
from unwrite.run.loop.stream import Listener, admit, admit_pairs

# What of each method is put side by side.
_LOOKED = {"scan": ("level_share", "change_share"), "survival": ("end", "gap"), "effects": ("effect",)}
_PAIRED = ("effects", "paths")


def diff(
    a: Model | Result,
    b: Model | Result,
    tokens: Any = None,
    pairs: Any = None,
    *,
    bos: int | bool | None = None,
    batch: int | None = None,
    listener: Listener | None = None,
) -> Result:
    """What is another in `b` than in `a`: two results of one method, or two models, such as a base and a tuned one.

    Arguments: of two results nothing else; of two models of one shape `tokens` as `uw.scan` takes them (levels, and
    survival of every write that is material in the first), `pairs` as `uw.effects` does (effects of heads), or both,
    read by the tokenizer of `a`. A long comparison is made of results: run each method with its `checkpoint`, and give
    what it found for both models.
    Returns a Result: for every number X that has an interval in both (of results that have none: for every number)
    `X_a`, `X_b`, `X_change` = b − a, and where there is one its 95 % interval `X_low`, `X_high`; of effects means over
    pairs. Nodes, locations and prompts that only one has are left out, and counted in the attributes `only_a` and
    `only_b`.
    Raises ResultError for results of two methods, or of pairs that are not the same, ModelError for models of two
    shapes, NumericError where there is nothing to compare. Estimators of one model are compared by `uw.compare`.

    Example: `uw.diff(base, tuned, uw.text("book.txt", base.tokenizer)).table()`
    """
    function("listener", listener)
    if isinstance(a, Result) and isinstance(b, Result):
        if any(part is not None for part in (tokens, pairs, bos, batch)):
            got = "tokens, pairs, bos or batch"
            raise ResultError("two results are compared as they are", got=got, fix="leave them out")
        return _of_results(a, b)
    if not isinstance(a, Model) or not isinstance(b, Model):
        raise ResultError(
            "two results, or two models, are put side by side", got=f"{shown(a)} and {shown(b)}",
            expected="uw.diff(scan_a, scan_b), or uw.diff(base, tuned, tokens)",
            fix="estimators of one model are compared by uw.compare(lm, pairs)",
        )  # fmt: skip
    return _of_models(a, b, tokens, pairs, bos, batch, listener)


def _of_models(a: Model, b: Model, tokens: Any, pairs: Any, bos: Any, batch: Any, listener: Any) -> Result:
    if a.nodes != b.nodes:
        raise ModelError("these models are not of one shape", got=f"{len(a.nodes)} and {len(b.nodes)} nodes")
    if tokens is None and pairs is None:
        raise NumericError("two models are compared on prompts", got="none", expected="tokens, pairs, or both")
    asked: dict[str, Any] = {"batch": batch, "listener": listener}
    parts: dict[str, xr.Dataset] = {}
    read: dict[str, Any] = {}
    if tokens is not None:
        text = admit(a, tokens, None, 1, bos)
        read[""] = text.about()
        parts["scan"] = _side_by_side(*(scan(lm, text, **asked) for lm in (a, b)))
        first = survival(a, text, **asked)
        writers = [str(writer) for writer in first["writer"].values]
        parts["survival"] = _side_by_side(first, survival(b, text, writers, **asked))
    if pairs is not None:
        both: Pairs = admit_pairs(a, pairs, bos)
        read["pairs"] = both.about()
        parts["effects"] = _side_by_side(*(effects(lm, both, "heads", "all", **asked) for lm in (a, b)))
    rows = {"effects": "node"}.get(next(iter(parts)), "writer")
    data = xr.merge(parts.values(), join="outer", compat="override", combine_attrs="drop")
    other = {name: provenance(b)[name] for name in ("weights", "dtype")} | {"name": str(b.about.get("name", b.family))}
    return build("diff", data.assign_attrs(row_axes=rows), {"b": other, "batch": batch}, provenance(a), read)


def _of_results(a: Result, b: Result) -> Result:
    if a.method != b.method:
        raise ResultError("results of two methods are not compared", got=f"a {a.method} and a {b.method}")
    data = _side_by_side(a, b)
    own = a.provenance
    settings = {"of": a.method, "b": {name: b.provenance[name] for name in ("settings", "model")}}
    return build("diff", data, settings, own["model"], own["tokens"])


def _side_by_side(a: Result, b: Result) -> xr.Dataset:
    """Both, aligned, and the change of every number that has an interval; or of every number."""
    if a.method in _PAIRED:
        return _paired(a, b)
    one, other = xr.align(a.data, b.data, join="inner")
    names = [name for name in _LOOKED.get(a.method, ()) if name in one and name in other] or _numbers(one, other)
    if not names or 0 in one.sizes.values():
        raise ResultError("these results have no number in common", got=f"two {a.method}s", expected="the same prompts")
    made: dict[str, xr.DataArray] = {}
    for name in names:
        made |= _change(name, one, other)
    left = {f"only_{which}": _beside(whole.data, one) for which, whole in (("a", a), ("b", b))}
    return xr.Dataset(made).assign_attrs(row_axes=" ".join(_rows(made)), **left)


def _numbers(one: xr.Dataset, other: xr.Dataset) -> list[str]:
    """Names of numbers that both have: of those with an interval, or of all where none has one."""
    shared = [str(name) for name, part in one.items() if name in other and part.dtype.kind == "f"]
    shared = [name for name in shared if one[name].dims == other[name].dims and one[name].shape == other[name].shape]
    return [name for name in shared if f"{name}_se" in one or f"{name}_low" in one] or shared


def _change(name: str, a: xr.Dataset, b: xr.Dataset) -> dict[str, xr.DataArray]:
    change = b[name] - a[name]
    about = {"units": a[name].attrs.get("units", "1")}
    found = {f"{name}_{which}": one.assign_attrs(a[name].attrs) for which, one in (("a", a[name]), ("b", b[name]))}
    found[f"{name}_change"] = change.assign_attrs(about, equation="b − a")
    of_a, of_b = _interval(name, a), _interval(name, b)
    if of_a is not None and of_b is not None:
        down = np.hypot(b[name] - of_b[0], of_a[1] - a[name])
        up = np.hypot(of_b[1] - b[name], a[name] - of_a[0])
        found[f"{name}_low"] = (change - down).assign_attrs(about, equation="2.5 % of the change")
        found[f"{name}_high"] = (change + up).assign_attrs(about, equation="97.5 % of the change")
    return found


def _interval(name: str, data: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray] | None:
    """A 95 % interval as the result has it, or by its standard error over clusters."""
    if f"{name}_low" in data:
        return data[f"{name}_low"], data[f"{name}_high"]
    if f"{name}_se" not in data:
        return None
    degrees = int(data["n_clusters"]) - 1 if "n_clusters" in data and data["n_clusters"].ndim == 0 else np.inf
    reach = data[f"{name}_se"] * (stats.t.ppf(0.975, degrees) if degrees > 0 else np.nan)
    return data[name] - reach, data[name] + reach


def _paired(a: Result, b: Result) -> xr.Dataset:
    """Effects of the same pairs: means over them, and a t interval of the mean of their differences."""
    if a.provenance["tokens"] != b.provenance["tokens"]:
        raise ResultError("effects of other pairs are not compared", expected="the same pairs, read by one tokenizer")
    one, other = xr.align(a["effect"], b["effect"], join="inner")
    each, about = other - one, {"units": one.attrs.get("units", "1")}
    n = each.notnull().sum("pair")
    reach = (
        each.std("pair", ddof=1) / np.sqrt(n) * xr.apply_ufunc(lambda n: stats.t.ppf(0.975, np.maximum(n - 1, 1)), n)
    )
    reach = reach.where(n > 1)
    made = {
        "effect_a": one.mean("pair"), "effect_b": other.mean("pair"), "effect_change": each.mean("pair"),
        "effect_low": each.mean("pair") - reach, "effect_high": each.mean("pair") + reach,
    }  # fmt: skip
    made = {name: part.assign_attrs(about, equation="mean over pairs; change: b − a") for name, part in made.items()}
    return xr.Dataset(made).assign_attrs(row_axes=" ".join(_rows(made)), only_a=0, only_b=0)


def _rows(made: dict[str, xr.DataArray]) -> tuple[str, ...]:
    """The axes of the number that has fewest: the rows of a table."""
    return min((tuple(map(str, part.dims)) for part in made.values()), key=len)


def _beside(whole: xr.Dataset, kept: xr.Dataset) -> int:
    """So many labels of one result the other does not have."""
    return sum(whole.sizes[axis] - kept.sizes[axis] for axis in whole.sizes)
