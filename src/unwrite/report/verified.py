"""What does a verification say about its writer, in rows and in one sentence?"""

from __future__ import annotations

import numpy as np

from unwrite.report.columns import Column
from unwrite.result import Result

_NAMED = 5  # of the readers
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
    data, end = result.data, result.data.isel(location=-1)
    low, mean, high = (float(end["generic"].sel(bound=bound)) for bound in ("low", "mean", "high"))
    text = result.provenance["tokens"][""]
    survival = f"{float(end['survival']):.2f} ± {float(end['survival_se']):.2f}"
    words = (
        f"{data.attrs['writer']} on {text['source']} ({text['prompts']} × {text['length']} tokens): "
        f"{data.attrs['verdict']}. Of the write {survival} survives to the end, of randomly turned writes {mean:.2f} "
        f"({low:.2f} to {high:.2f}); later nodes erase {float(data['erased'].sum()):+.2f} and fill in "
        f"{float(data['filled_in'].sum()):+.2f}.{_readers(result)}{_decodable(result)}"
    )
    names = data.attrs["erasers"]
    if not names:
        return f"{words} No later head could read it through values."
    share = float(data["causal_share"])
    causal = f", {share:.0%} of it" if share == share else f" ({data.attrs['causal_share_note']})"
    opposed, caused = float(data["opposed"]), float(data["caused"])
    return f"{words} {names} write {opposed:+.2f} along it, and {caused:+.2f} because their values read it{causal}."


def _readers(result: Result) -> str:
    """Who reads the write more than a turned one; nothing where nobody comes after it."""
    data = result.data
    if data["read_generic"].isnull().all():
        return ""
    names = data.attrs["readers"].split()
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f" {', '.join(names[:_NAMED])}{more} read it more than they would a turned write."
    # What reads every direction also reads this one.
    acts = any(str(how).startswith("reads it") for how in data["class"].values)
    return " No later node reads it more than it would a turned write" + ("." if acts else ": nobody uses it.")


def _decodable(result: Result) -> str:
    """How much a linear map finds of what the write says, where it could be measured."""
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


def actors(result: Result) -> list[tuple[str, ...]]:
    """Later nodes with a share, a change or a value path worth naming, the strongest change first."""
    data, names = result.data, ("share", "share_without", "erased", "filled_in", "v_share", "one_reader_share")
    nodes, how = data["node"].values, data["class"].values
    shares = np.column_stack([data[name].values for name in names]).tolist()
    order = [i for i in np.argsort(data["acts"].values, kind="stable") if how[i]]
    return [(str(nodes[i]), *map(_signed, shares[i]), str(how[i])) for i in order]


def _signed(value: float) -> str:
    return f"{value:+.2f}" if value == value else "–"
