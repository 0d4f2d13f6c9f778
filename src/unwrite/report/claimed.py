"""Which facts does a model state of claims, location by location? Tables and a sentence, from a saved result."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column, Line, Listing
from unwrite.result import Result

ANSWER = "answer"
_CLAIMS, _FACTS, _SNAPSHOTS = 3, 6, 24
_HEADER = (
    Column("location", holds="word"),
    Column("facts", holds="words"),
    Column("as before", "{new_edges}"),
    Column("as the answer", "{answer_edges}"),
    Column("entities as the answer", "{answer_nodes}"),
)


def parts(result: Result) -> Iterator[Line | Listing]:
    """Of the first claims, what is said of each location."""
    data = result.data
    yield Line(_failures(data), "dim")
    for claim in range(min(_CLAIMS, data.sizes["claim"])):
        one = data.isel(claim=claim)
        label = f", in truth {str(bool(one['label'])).lower()}" if "label" in one else ""
        title = f"{claim}: “{one['claim_text'].item()}”: the model says {one['verdict'].item()}{label}"
        rows = [_row(data, claim, i) for i in range(data.sizes["location"])]
        rows.append((ANSWER, said(data, claim, ANSWER), "", "", ""))
        yield Listing(title, _HEADER, rows, data, range(_SNAPSHOTS))


def _row(data: xr.Dataset, claim: int, i: int) -> tuple[str, ...]:
    one = data.isel(claim=claim, location=i)
    overlaps = (float(one[name]) for name in ("new_edges", "answer_edges", "answer_nodes"))
    where = str(one["location"].item())
    facts = said(data, claim, where) if bool(one["parsed"]) else "(no JSON)"
    return where, facts, *("" if np.isnan(part) else f"{part:.2f}" for part in overlaps)


def said(data: xr.Dataset, claim: int, at: str) -> str:
    """The first facts of a snapshot in words."""
    own = [*facts(data, claim, at)]
    words = "; ".join(f"{a} – {'not ' * negated}{p} – {b}" for a, p, b, negated in own[:_FACTS])
    return words + (f"; and {len(own) - _FACTS} more" if len(own) > _FACTS else "")


def facts(data: xr.Dataset, claim: int, at: str) -> Iterator[tuple[str, str, str, bool]]:
    """Subject, predicate, object, negated: of one snapshot."""
    own = np.flatnonzero((data["of_claim"].values == claim) & (data["at"].values == at))
    names = ("subject", "predicate", "object")
    for i in own.tolist():
        a, p, b = (str(data[name].values[i]) for name in names)
        yield a, p, b, bool(data["negated"].values[i])


def _failures(data: xr.Dataset) -> str:
    parsed, echo = data["parsed"].values, data["echo"].values[data["at"].values != ANSWER]
    mended = int((data["repairs"].values[parsed] > 0).sum())
    repeated = f"; {int(echo.sum())} of {echo.size} facts repeat predicates of the examples" if echo.size else ""
    return (
        f"{parsed.sum()} of {parsed.size} texts could be read, {mended} of them "
        f"after repairs{repeated}; words that count: by {data.attrs['words']}"
    )


def sentence(result: Result) -> str:
    """How often the verdict is right, and where snapshots are most like the answer."""
    data = result.data
    n = data.sizes["claim"]
    verdicts = f"{int((data['verdict'].values != 'none').sum())} of {n} claims got a verdict"
    if "right" in data:
        rate = f"{data.attrs['accuracy']:.2f} (95 % {data.attrs['lower']:.2f} to {data.attrs['upper']:.2f})"
        verdicts = f"The model's verdict is right on {int(data['right'].sum())} of {n} claims, {rate}"
    like = data["answer_nodes"].mean("claim", skipna=True).values if n else np.array([])
    if not np.isfinite(like).any():
        return f"{verdicts}; no location states facts that could be compared with its answers."
    best = int(np.nanargmax(like))
    where = data["location"].values[best]
    return f"{verdicts}; {where} shares most entities with its answers, {like[best]:.2f} of them on average."
