"""What do the paper's five figures look like for this model? Altair charts of one writer, from a saved result alone.

After Dao, Lau, Rager and Janiak 2023 (arXiv 2310.07325), Figures 1 to 5, at the width of a column. Bands and rules are
the middle half of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from unwrite.errors import ResultError, plain
from unwrite.report import audited
from unwrite.report.scanned import texts
from unwrite.result import Result

# Told apart by colour-blind readers too; the same thing has the same colour in every figure.
COLOURS = {"level": "#2166ac", "survival": "#d95f02", "hidden from values": "#1b9e77", "total": "#7b3294"}
GREY = "#888888"
WIDTH, HEIGHT = 330, 180
_MOST, _NAMED = 40, 17
_MIDDLE = {0.25: "low", 0.5: "middle", 0.75: "high"}
_ALONG = "⟨·, w⟩ / ‖w‖²"
# What a mark says on hover, and to a screen reader.
SAYS = {"tooltip": alt.Tooltip("says:N"), "description": alt.Description("says:N")}


def of_writer(result: Result, writer: str | None = None) -> xr.Dataset:
    """What a result knows of one writer, under the names that `uw.verify` gives; by default its foremost writer.

    Raises ResultError where the result has nothing of this writer.
    """
    data = result.data
    if "writer" in data.attrs and "survival" in data:
        _require(data.attrs["writer"] == (writer or data.attrs["writer"]), "result", writer, [data.attrs["writer"]])
        return data
    if "writer" not in data.dims:
        raise ResultError(f"a {result.method} has no writers to draw", expected="a scan, a verification or an audit")
    if "verified" in data.dims:
        names = [str(name) for name in data["verified"].values]
        chosen = writer or names[int(data["gap"].values[:, -1].argmin())]
        if chosen in names:
            return audited.proof(result, chosen)
    _, first, _ = next(texts(result))
    names = [str(name) for name in first["writer"].values]
    chosen = writer or names[int(first["moved"].fillna(-1).values.argmax())]
    _require(chosen in names, "result", chosen, names)
    one = first[["level", "pr", "share", "eraser"]].sel(writer=chosen, drop=True)
    clean = one[["level", "pr"]].expand_dims(condition=["clean"])
    return one[["share", "eraser"]].merge(clean).assign_attrs(writer=chosen)


def of_verified(result: Result, writer: str | None = None) -> xr.Dataset:
    """The same of a writer that was verified. Raises ResultError for one that was not."""
    data = of_writer(result, writer)
    if "survival" not in data:
        raise ResultError(f"{data.attrs['writer']} was not verified", fix=f"run uw.verify(…, {data.attrs['writer']!r})")
    return data


def _require(there: bool, where: str, what: object, known: list[str]) -> None:
    if not there:
        listed = ", ".join(known[:12]) + (" …" if len(known) > 12 else "")
        raise ResultError(f"this {where} has nothing of {plain(what)}", expected=f"one of {plain(listed)}")


def fig1(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """The stream along one write, state by state: level, and where it was verified survival beside turned writes."""
    data = of_writer(result, writer)
    level = _quantiles(data["level"].sel(condition="clean"), "location", "level")
    x = _states(data)
    y = alt.Y("middle:Q", title=_ALONG)
    layers = []
    if "survival" in data:
        bound = data["generic"].to_series().unstack("bound").reset_index().dropna()
        layers.append(_band(alt.Chart(bound), x, GREY, 0.35))
        kept = data[["survival", "survival_se"]].to_dataframe()[["survival", "survival_se"]].dropna().reset_index()
        kept["says"] = [f"survival, {place}: {value:+.2f} ± {error:.2f}" for place, value, error in kept.to_numpy()]
        level = pd.concat([level, kept.rename(columns={"survival": "middle"}).assign(what="survival")])
    base = alt.Chart(level)
    layers.append(_band(base.transform_filter("datum.what == 'level'"), x, COLOURS["level"], 0.2))
    lines = base.mark_line(point={"size": 28}).encode(x=x, y=y, color=series(level["what"].unique()), **SAYS)
    said = f": {data.attrs['verdict']} (grey: randomly turned writes)" if "survival" in data else ""
    return finish(alt.layer(*layers, lines), f"The stream along {data.attrs['writer']}{said}")


def fig2(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """What every node writes along one write; erasers stand out."""
    data = of_writer(result, writer)
    pr = _quantiles(data["pr"].sel(condition="clean"), "node", "what it writes")
    pr = pr[pr["node"] != data.attrs["writer"]]
    opposes = set(_erasers(data))
    size = np.nan_to_num(np.abs(np.asarray(pr["middle"], dtype=float)))
    shown = pr.iloc[np.argsort(-size, kind="stable")[:_MOST]]
    shown = shown.assign(role=np.where(shown["node"].isin(opposes), "writes against it", "other"))
    shown = shown.sort_index()  # as nodes write
    x = alt.X("node:N", sort=list(shown["node"]), title=None, axis=alt.Axis(labelAngle=-90, labelOverlap=False))
    colour = alt.Color(
        "role:N", title=None, scale=alt.Scale(domain=["writes against it", "other"], range=[COLOURS["survival"], GREY])
    )
    base = alt.Chart(shown).encode(x=x, **SAYS)
    bars = base.mark_bar().encode(y=alt.Y("middle:Q", title=_ALONG), color=colour)
    rules = base.mark_rule().encode(y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))
    left = f" (top {len(shown)} of {len(pr)} nodes)" if len(pr) > len(shown) else ""
    return finish(
        alt.layer(bars, rules), f"What nodes write along {data.attrs['writer']}{left}", max(WIDTH, 11 * len(shown))
    )


def fig3(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """The stream and the erasers with the write, and with it hidden from the erasers' values.

    Raises ResultError for a writer that was not verified.
    """
    data = of_verified(result, writer)
    words = {"clean": "level", "patched": "hidden from values"}
    level = pd.concat([_quantiles(data["level"].sel(condition=c), "location", word) for c, word in words.items()])
    lines = alt.Chart(level).mark_line(point={"size": 28}).encode(
        x=_states(data), y=alt.Y("middle:Q", title=_ALONG), color=series(words.values()), **SAYS
    )  # fmt: skip
    erasers = [str(node) for node in data["node"].values if str(node) in _erasers(data)]
    pr = pd.concat([_quantiles(data["pr"].sel(condition=c), "node", word) for c, word in words.items()])
    bars = alt.Chart(pr[pr["node"].isin(erasers)]).mark_bar().encode(
        x=alt.X("node:N", sort=erasers, title=None), xOffset=alt.XOffset("what:N"),
        y=alt.Y("middle:Q", title=_ALONG), color=series(words.values()), **SAYS,
    )  # fmt: skip
    parts = alt.vconcat(lines.properties(width=WIDTH, height=HEIGHT), bars.properties(width=WIDTH, height=HEIGHT // 2))
    return finish(parts, f"{data.attrs['writer']}, and hidden from the values of its erasers' layers", None)


def fig4(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """A node's direct attribution on every prompt, with its inputs from other texts, and the executed truth.

    Raises ResultError for a result that has no prompts or no such node.
    """
    data = result.data
    if "other_direct" not in data:
        raise ResultError(f"a {result.method} has no attributions", expected="a result of uw.dla or uw.audit")
    node = writer or str(
        data.attrs.get("searched") or data["node"].values[np.abs(data["direct"].values).sum(0).argmax()]
    )
    _require(node in data["node"].values, "result", node, [str(name) for name in data["node"].values])
    one = data.sel(node=node)
    asked = [f"{int(p)}: {harmless(one['answer'].values[i])}" for i, p in enumerate(one["prompt"].values)]
    other = one["other_direct"].median("quartile").to_series().unstack("replaced")
    frame = pd.DataFrame({"prompt": asked, "direct": one["direct"].values, "total": one["total"].values})
    others = {f"direct, other {harmless(kind)}": other[kind].values for kind in other.columns}
    frame, kinds = frame.assign(**others), ["direct", *others, "total"]
    long = frame.head(12).melt("prompt", var_name="what", value_name="logits")
    long["says"] = [f"{what}, prompt {prompt}: {logits:+.3f}" for prompt, what, logits in long.to_numpy()]
    colour = alt.Color("what:N", title=None, sort=kinds, scale=alt.Scale(domain=kinds, range=_FOUR))
    chart = alt.Chart(long).mark_bar().encode(
        x=alt.X("prompt:N", sort=asked, title=None, axis=alt.Axis(labelAngle=-30)),
        xOffset=alt.XOffset("what:N", sort=kinds), y=alt.Y("logits:Q", title="logits"), color=colour, **SAYS,
    )  # fmt: skip
    return finish(chart, f"What {node} is credited with, and what it does", max(WIDTH, 46 * min(len(asked), 12)))


_FOUR = [COLOURS["level"], "#67a9cf", "#b3cde3", COLOURS["total"]]


def fig5(result: Result, writer: str | None = None) -> alt.TopLevelMixin:
    """A writer's direct attribution and what its erasers take back because their values read it, at many positions.

    Raises ResultError for a result without a corpus, or another writer than its own.
    """
    data = result.data
    prefix = "corpus_" if "corpus_sample_x" in data else ""
    if f"{prefix}sample_x" not in data:
        raise ResultError(f"this {result.method} has no attributions of a corpus", expected="a result of uw.corpus_dla")
    own = str(data.attrs["searched" if prefix else "writer"])
    _require(writer in (None, own), "corpus", writer, [own])
    one = data.sel(path="values")
    frame = pd.DataFrame({"x": one[f"{prefix}sample_x"].values, "y": one[f"{prefix}sample_y"].values})
    frame["says"] = [f"credited {x:+.2f}, taken back {y:+.2f}" for x, y in frame.to_numpy()]
    slope, base, r = (float(one[f"{prefix}{name}"]) for name in ("slope", "intercept", "correlation"))
    ends = np.array([frame["x"].min(), frame["x"].max()])
    lines = pd.DataFrame({"x": [*ends, *ends], "y": [*(base + slope * ends), *-ends]})
    lines["what"] = ["fit", "fit", "perfect clean-up", "perfect clean-up"]
    x, y = alt.X("x:Q", title=f"direct({harmless(own)}), logits"), alt.Y("y:Q", title="direct(erasers), through values")
    dots = alt.Chart(frame).mark_circle(size=9, opacity=0.35, color=COLOURS["level"]).encode(x=x, y=y, **SAYS)
    scale = alt.Scale(domain=["fit", "perfect clean-up"], range=[COLOURS["survival"], GREY])
    drawn = alt.Chart(lines).mark_line().encode(x=x, y=y, color=alt.Color("what:N", title=None, scale=scale))
    n = int(data[f"{prefix}n"])
    return finish(alt.layer(dots, drawn), f"r = {r:+.2f}, slope {slope:+.2f} (−1: all taken back), {n:,} positions")


FIGURES: dict[str, Callable[..., alt.TopLevelMixin]] = {
    "fig1": fig1, "fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5,
}  # fmt: skip


def _erasers(data: xr.Dataset) -> list[str]:
    """Nodes that write against the writer: as a verification names them, or as a scan does."""
    if "erasers" in data.attrs:
        return str(data.attrs["erasers"]).split()
    return [str(node) for node in data["node"].values[data["eraser"].values.astype(bool)]]


def _quantiles(part: xr.DataArray, axis: str, what: str) -> pd.DataFrame:
    """A row for each place or node, with the middle half of positions and what it says on hover."""
    names = part[axis].values
    numbers = part.sel(quantile=list(_MIDDLE)).transpose(axis, "quantile").values
    frame = pd.DataFrame(numbers, columns=list(_MIDDLE.values())).assign(**{axis: names, "what": what})
    frame["says"] = [
        f"{what}, {name}: {middle:+.2f}, middle half of positions {low:+.2f} to {high:+.2f}"
        for name, (low, middle, high) in zip(names, numbers, strict=True)
    ]
    return frame


def _states(data: xr.Dataset) -> alt.X:
    """The states of the stream in order, of which no more are named than there is room for."""
    places = list(data["location"].values)
    named = places[:: -(-len(places) // _NAMED)]
    return alt.X("location:N", sort=places, title=None, axis=alt.Axis(labelAngle=-45, values=named))


def _band(base: alt.Chart, x: alt.X, colour: str, opacity: float) -> alt.Chart:
    return base.mark_area(color=colour, opacity=opacity).encode(x=x, y=alt.Y("low:Q"), y2=alt.Y2("high:Q"))


def series(names: Iterable[str]) -> alt.Color:
    """The colours of what is drawn as lines or bars side by side."""
    names = list(names)
    return alt.Color("what:N", title=None, scale=alt.Scale(domain=names, range=[COLOURS[name] for name in names]))


def harmless(text: object) -> str:
    """Words of a stranger on one line, as no tag: a chart's own HTML holds them in a script, which `</script>` ends."""
    return plain(text).replace("<", "‹")


def finish(chart: alt.TopLevelMixin, title: str, width: int | None = WIDTH) -> alt.TopLevelMixin:
    """Size, title and fonts that can be read in a column."""
    if width is not None:
        chart = chart.properties(width=width, height=HEIGHT)
    return chart.properties(title=alt.Title(harmless(title), anchor="start", fontSize=12)).configure(
        font="sans-serif",
        background="white",
        axis=alt.AxisConfig(labelFontSize=11, titleFontSize=11, grid=False),
        legend=alt.LegendConfig(orient="bottom", labelFontSize=11),
        view=alt.ViewConfig(stroke=None),
    )
