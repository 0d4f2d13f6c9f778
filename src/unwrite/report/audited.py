"""What does an audit say of the writers that it verified? A result of one method out of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.axes import bare
from unwrite.report.columns import Column, spanned
from unwrite.report.found import rates
from unwrite.report.verified import some
from unwrite.result import Result

_SHARES = "{share}, {share_without}"
HEADER = (
    Column("writer", holds="word"),
    Column("verdict", holds="word"),
    Column("survival", "{survival} at the end of the stream ± standard error, {survival_se}"),
    Column("generic", "{generic}, at the end of the stream"),
    Column("erased", f"Σ over later nodes of {{erased}}; {_SHARES}"),
    Column("filled in", f"Σ over later nodes of {{filled_in}}; {_SHARES}"),
    Column("opposed", "{opposed}; {share}"),
    Column("through values", "{caused}: {v_share} (as a part of opposed)"),
    Column("erasers", holds="words"),
)
# What is an attribute of one result, and in an audit, of several of them, a variable; and what is told of all writers.
WORDS = ("verdict", "erasers", "causal_share_note", "readers", "read_note", "decodable_note", "n_clusters")
TOLD = ("documents", "rows", "sinks", "weigh")


def verified(result: Result) -> Iterator[xr.Dataset]:
    """Of every verified writer, the variables and attributes that `uw.verify` gives, under the names it gives."""
    for writer in result.data["verified"].values:
        yield proof(result, str(writer))


def proof(result: Result, writer: str) -> xr.Dataset:
    """The same of one verified writer."""
    whole = bare(result.data)
    own = [name for name, part in whole.variables.items() if "verified" in part.dims and name != "verified"]
    one = whole[own].sel(verified=writer)
    data = one.rename({name: str(name).removeprefix("verified_") for name in own})
    words = {name: str(data[name].item()) for name in WORDS}
    return data.assign_attrs(words, writer=writer)


def alone(result: Result, data: xr.Dataset) -> Result:
    """One verified writer as a result of its own."""
    record = result.provenance
    record |= {"method": "verify", "tokens": {"": record["settings"]["judged"]}}
    return Result(data.assign_attrs(schema=result.data.attrs["schema"], provenance=json.dumps(record)))


def removed(result: Result) -> xr.Dataset:
    """What `uw.survival` says of every material writer, under the names it gives."""
    data = bare(result.data)
    own = [name for name, part in data.variables.items() if "removed" in part.dims and name != "removed"]
    names = {str(name): str(name).removeprefix("removed_") for name in own}
    found = data[own].rename({**names, "removed": "writer", "removed_bound": "bound", "removed_control": "control"})
    return found.assign_attrs({name: data.attrs[f"removed_{name}"] for name in TOLD})


def row(data: xr.Dataset) -> tuple[str, ...]:
    """One verified writer in one line."""
    end = data.isel(location=-1)
    generic = end["generic"]
    low, mean, high = (float(generic.sel(bound=bound)) for bound in ("low", "mean", "high"))
    values = f"{float(data['caused']):+.2f}"
    if np.isfinite(data["causal_share"]):
        values += f" ({float(data['causal_share']):.2f} of it)"
    return (
        data.attrs["writer"],
        data.attrs["verdict"],
        f"{float(end['survival']):.2f} ± {float(end['survival_se']):.2f}",
        spanned(mean, low, high),
        f"{float(data['erased'].sum()):+.2f}",
        f"{float(data['filled_in'].sum()):+.2f}",
        f"{float(data['opposed']):+.2f}",
        values,
        some(data.attrs["erasers"].split()) or "–",
    )


def stories(result: Result) -> list[str]:
    """Of every verified writer who read it, who erased it and who used its space."""
    data = result.data
    return [str(story) for story in data["verified_story"].values] if "verified_story" in data else []


def search(result: Result) -> str:
    """How often the search found a misleading prompt, and how often it would for a random direction."""
    data = result.data[["found_rate"]].rename({"found_rate": "rate", "found_text": "text"})
    return rates(data, result.data.attrs["searched"])
