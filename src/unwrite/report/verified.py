"""What does a verification say about its writer, in rows and in one sentence?"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from unwrite.errors import counted
from unwrite.report.columns import Column
from unwrite.report.survived import between, number
from unwrite.result import Result

_NAMED = 3  # of the readers, and of the erasers
TRAJECTORY = (
    Column("location", holds="word"),
    Column("level", "{level_share}"),
    Column("background", "{background}"),
    Column("survival ± SE", "{survival} ± standard error, {survival_se}"),
    Column("generic", "the mean of {generic}"),
    Column("decodable", "{decodable}"),
)
ACTORS = (
    Column("node", holds="word"),
    Column("share", "{share}"),
    Column("without", "{share_without}"),
    Column("erased", "{erased}; {share}, {share_without}"),
    Column("filled in", "{filled_in}; {share}, {share_without}"),
    Column("through values", "{v_share}"),
    Column("one-reader", "{one_reader_share}"),
    Column("how", "through values: v_share beyond its 95 % interval; another way: {acts}; without it: {share}", "word"),
)


def sentence(result: Result) -> str:
    """The verdict with the numbers it rests on."""
    data = result.data
    text, documents = result.provenance["tokens"][""], counted(int(data.attrs["n_clusters"]), "document")
    turned = float(data["generic"].isel(location=-1).sel(bound="mean"))
    low, middle, high = (
        float(data["ordinary"].isel(control=0).sel(range=bound)) for bound in ("low", "median", "high")
    )
    return (
        f"{data.attrs['writer']} on {text['source']} ({text['prompts']} × {text['length']} tokens, {documents}): "
        f"{data.attrs['verdict']}. Of the write {between(data, 'weighed', '')} survives to the end, of ordinary writes "
        f"there {number(middle)} ({number(low)} to {number(high)}), of randomly turned ones {number(turned)}."
        f"{_acts(data)}{_readers(result)}{_decodable(result)}"
    )


def _acts(data: xr.Dataset) -> str:
    """What later nodes do because of the write, and what of that goes through the values of its erasers."""
    done = f" Later nodes erase {float(data['erased'].sum()):+.2f} and fill in {float(data['filled_in'].sum()):+.2f}"
    names = data.attrs["erasers"].split()
    if not names:
        return f"{done}; no later head could read it through values."
    share = float(data["causal_share"])
    causal = f", {share:.2f} of it" if share == share else f" ({data.attrs['causal_share_note']})"
    opposed, caused = float(data["opposed"]), float(data["caused"])
    return (
        f"{done}; {some(names)} write {opposed:+.2f} along it, and {caused:+.2f} because their values read it{causal}."
    )


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _readers(result: Result) -> str:
    """Who reads the write more than a turned one; nothing where nobody comes after it."""
    data = result.data
    if data["read_generic"].isnull().all():
        return ""
    if note := data.attrs["read_note"]:
        return f" Who reads it is not measurable: {note}."
    names = data.attrs["readers"].split()
    if names:
        return f" {some(names)} read it more than they would a turned write."
    # What reads every direction also reads this one.
    acts = any(str(how).startswith("reads it") for how in data["class"].values)
    return " No later node reads it more than it would a turned write" + ("." if acts else ": nobody uses it.")


def _decodable(result: Result) -> str:
    """How much a linear map finds of what the write says, or why that is not measurable."""
    if result["decodable"].isnull().all() and (note := result.data.attrs["decodable_note"]):
        return f" What a linear map finds of it is not measurable: {note}."
    found = result["decodable"].values[result["survival"].notnull().values]
    if found[0] != found[0] or found[-1] != found[-1]:
        return ""
    return f" Held out, a linear map finds {found[0]:.2f} of its token part right after it, {found[-1]:.2f} at the end."


def trajectory(result: Result) -> list[tuple[str, ...]]:
    """Location by location: level, background, survival, generic, decodable."""
    lines = []
    data = result.data[["level_share", "background", "survival", "survival_se", "generic", "decodable"]]
    for location in data["location"].values:
        at = data.sel(location=location)
        survival = float(at["survival"])
        written, decodable = survival == survival, float(at["decodable"])
        lines.append(
            (
                str(location),
                f"{float(at['level_share']):.2f}",
                f"{float(at['background']):.2f}",
                f"{survival:.2f} ± {float(at['survival_se']):.2f}" if written else "–",
                f"{float(at['generic'].sel(bound='mean')):.2f}" if written else "–",
                f"{decodable:.2f}" if decodable == decodable else "–",
            )
        )
    return lines


def turns(result: Result, most: int) -> list[int]:
    """Where something happens: the location of the write, the end, and those at which most of it is lost or added."""
    survival = result["survival"].values
    written = np.flatnonzero(np.isfinite(survival))
    if len(written) == 0:
        return [len(survival) - 1]
    steps = np.abs(np.diff(survival[written]))
    foremost = np.argsort(-steps, kind="stable")[: most - 2] + 1
    return sorted({int(written[0]), int(written[-1]), *map(int, written[foremost])})


def actors(result: Result) -> list[tuple[str, ...]]:
    """Later nodes with a share, a change or a value path worth naming, the strongest change first."""
    data, names = result.data, ("share", "share_without", "erased", "filled_in", "v_share", "one_reader_share")
    nodes, how = data["node"].values, data["class"].values
    shares = np.column_stack([data[name].values for name in names]).tolist()
    order = [i for i in np.argsort(data["acts"].values, kind="stable") if how[i]]
    return [(str(nodes[i]), *map(_signed, shares[i]), str(how[i])) for i in order]


def _signed(value: float) -> str:
    return f"{value:+.2f}" if value == value else "–"


# At the end of the stream, and summed over nodes.
_AT_THE_END, _SUMMED = ("survival", "survival_se", "gap", "gap_se"), ("erased", "filled_in")


def numbers(result: Result) -> dict[str, Any]:
    """Writer, erasers, and the numbers at the end, for another program."""
    data = result.data
    end = data.isel(location=-1)
    return {
        "writer": data.attrs["writer"],
        "erasers": data.attrs["erasers"].split(),
        **{name: float(end[name]) for name in _AT_THE_END},
        "generic": {str(bound): float(end["generic"].sel(bound=bound)) for bound in end["bound"].values},
        **{name: float(data[name].sum()) for name in _SUMMED},
    }
