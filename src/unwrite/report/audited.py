"""What does an audit say of the writers that it verified? A result of one method out of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import xarray as xr

from unwrite.report.columns import Column
from unwrite.report.found import rates
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
_WORDS = ("verdict", "erasers", "causal_share_note", "readers", "decodable_note")


def verified(result: Result) -> Iterator[xr.Dataset]:
    """Of every verified writer, the variables and attributes that `uw.verify` gives, under the names it gives."""
    for writer in result.data["verified"].values:
        yield proof(result, str(writer))


def proof(result: Result, writer: str) -> xr.Dataset:
    """The same of one verified writer."""
    own = [name for name, part in result.data.variables.items() if "verified" in part.dims and name != "verified"]
    one = result.data[own].sel(verified=writer)
    data = one.rename({name: str(name).removeprefix("verified_") for name in own})
    words = {name: str(data[name].item()) for name in _WORDS}
    return data.assign_attrs(words, writer=writer)


def alone(result: Result, data: xr.Dataset) -> Result:
    """One verified writer as a result of its own."""
    record = result.provenance
    record |= {"method": "verify", "tokens": {"": record["settings"]["judged"]}}
    return Result(data.assign_attrs(schema=result.data.attrs["schema"], provenance=json.dumps(record)))


def row(data: xr.Dataset) -> tuple[str, ...]:
    """One verified writer in one line."""
    end = data.isel(location=-1)
    generic = end["generic"]
    low, mean, high = (float(generic.sel(bound=bound)) for bound in ("low", "mean", "high"))
    values = f"{float(data['caused']):+.2f}"
    if np.isfinite(data["causal_share"]):
        values += f" ({float(data['causal_share']):.0%})"
    return (
        data.attrs["writer"],
        data.attrs["verdict"],
        f"{float(end['survival']):.2f} ± {float(end['survival_se']):.2f}",
        f"{mean:.2f} [{low:.2f}, {high:.2f}]",
        f"{float(data['erased'].sum()):+.2f}",
        f"{float(data['filled_in'].sum()):+.2f}",
        f"{float(data['opposed']):+.2f}",
        values,
        data.attrs["erasers"] or "–",
    )


def summary(result: Result) -> str:
    """Which verified writers were erased, and what became of the others."""
    by: dict[str, list[str]] = {}
    for data in verified(result):
        by.setdefault(data.attrs["verdict"], []).append(data.attrs["writer"])
    judged = result.provenance["settings"]["judged"]
    lead = "No writer is erased" if "erased" not in by else f"Erased: {', '.join(by.pop('erased'))}"
    rest = "; ".join(f"{verdict}: {', '.join(writers)}" for verdict, writers in by.items())
    tail = f" ({rest})" if rest else ""
    return f"{lead}{tail}, judged by executed runs on {judged['prompts']} prompts that did not choose them."


def search(result: Result) -> str:
    """How often the search found a misleading prompt, and how often it would for a random direction."""
    data = result.data[["found_rate"]].rename({"found_rate": "rate", "found_text": "text"})
    return rates(data, result.data.attrs["searched"])
