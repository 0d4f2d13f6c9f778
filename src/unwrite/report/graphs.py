"""How does the graph of a claim change over layers? Its entities over locations, and one snapshot at a time."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

import altair as alt
import xarray as xr

from unwrite.errors import ResultError, shown
from unwrite.report.claimed import ANSWER, facts
from unwrite.report.paper import COLOURS, GREY, SAYS, harmless
from unwrite.result import Result

_ENTITIES = 40


def over_layers(result: Result, _: str | None, of: str | None, chosen: dict[str, Any]) -> alt.TopLevelMixin:
    """Entities of a claim over locations: where each stands in the graph, how joined it is, and its facts on hover."""
    data, claim = result.data, _claim(result, of, chosen)
    places = [*map(str, data["location"].values), ANSWER]
    marks = []
    for at in places:
        own = [*facts(data, claim, at)]
        for name in dict.fromkeys(part.casefold() for a, _, b, _ in own for part in (a, b)):
            lines = [f"{a} {'not ' * no}{p} {b}" for a, p, b, no in own if name in (a.casefold(), b.casefold())]
            marks.append({"entity": harmless(name), "at": at, "n": len(lines),
                          "says": harmless(f"{at}: {'; '.join(lines)}")})  # fmt: skip
    seen = [one["entity"] for one in marks]
    kept = sorted(set(seen), key=lambda name: (-seen.count(name), seen.index(name)))[:_ENTITIES]
    base = alt.Chart(alt.Data(values=[one for one in marks if one["entity"] in kept])).encode(
        x=alt.X("at:N", sort=places, title=None, scale=alt.Scale(domain=places), axis=alt.Axis(labelAngle=-40)),
        y=alt.Y("entity:N", sort=kept, title="entity (in most graphs first)"),
    )
    size = alt.Size("n:Q", title="facts", scale=alt.Scale(range=[30, 200]))
    dots = base.mark_circle(color=COLOURS["level"]).encode(size=size, **SAYS)
    return _titled(dots.properties(width=alt.Step(22), height=alt.Step(15)), data, claim)


def snapshots(result: Result, _: str | None, of: str | None, chosen: dict[str, Any]) -> alt.TopLevelMixin:
    """The graph of a claim at one location at a time; saved as .html, a slider goes through them."""
    data, claim = result.data, _claim(result, of, chosen)
    places = [*map(str, data["location"].values), ANSWER]
    own = {at: [*facts(data, claim, at)] for at in places}
    names = list(dict.fromkeys(part.casefold() for one in own.values() for a, _, b, _ in one for part in (a, b)))
    where = {name: (cos(2 * pi * i / len(names)), sin(2 * pi * i / len(names))) for i, name in enumerate(names)}
    edges, nodes, titles = [], [], [{"step": i, "at": harmless(at)} for i, at in enumerate(places)]
    for step, at in enumerate(places):
        for a, p, b, no in own[at]:
            (x, y), (x2, y2) = where[a.casefold()], where[b.casefold()]
            says = harmless(f"{a} {'not ' * no}{p} {b}")
            ends = {"x": x, "y": y, "x2": x2, "y2": y2, "mx": (x + x2) / 2, "my": (y + y2) / 2}
            word = {"word": harmless(f"{'not ' * no}{p}"), "kind": "no" if no else "yes"}
            edges.append({"step": step, "says": says, **ends, **word})
        there = dict.fromkeys(part.casefold() for a, _, b, _ in own[at] for part in (a, b))
        nodes += [{"step": step, "x": where[one][0], "y": where[one][1], "word": harmless(one)} for one in there]
    return _titled(_layered(edges, nodes, titles, len(places) - 1), data, claim)


def _layered(edges: list[dict[str, Any]], nodes: list[dict[str, Any]], titles: list[dict[str, Any]], last: int) -> Any:
    """Lines, dots and words of the snapshot that the slider stands at; first the answer."""
    slider = alt.param(name="step", value=last, bind=alt.binding_range(min=0, max=last, step=1, name="snapshot "))
    plain = alt.Axis(labels=False, ticks=False, grid=False, domain=False, title=None)
    near = alt.Scale(domain=[-1.35, 1.35])
    x, y = alt.X("x:Q", axis=plain, scale=near), alt.Y("y:Q", axis=plain, scale=near)

    def shown_of(values: list[dict[str, Any]]) -> alt.Chart:
        return alt.Chart(alt.Data(values=values)).transform_filter("datum.step == step")

    colour = alt.Color(
        "kind:N", legend=None, scale=alt.Scale(domain=["yes", "no"], range=[COLOURS["level"], COLOURS["survival"]])
    )
    lines = shown_of(edges).mark_rule(strokeWidth=1.5).encode(x=x, y=y, x2="x2:Q", y2="y2:Q", color=colour, **SAYS)
    says = shown_of(edges).mark_text(fontSize=9, color=GREY, dy=-7).encode(x="mx:Q", y="my:Q", text="word:N")
    dots = shown_of(nodes).mark_circle(size=90, color=GREY).encode(x=x, y=y)
    names = shown_of(nodes).mark_text(dy=-11, fontSize=11).encode(x=x, y=y, text="word:N")
    title = shown_of(titles).mark_text(fontSize=13, fontWeight="bold", y=12).encode(text="at:N")
    return alt.layer(lines, says, dots, names, title).add_params(slider).properties(width=520, height=420)


def _claim(result: Result, of: str | None, chosen: dict[str, Any]) -> int:
    """Which claim is drawn. Raises ResultError for another result, and for what is no number of a claim."""
    if result.method != "graph":
        raise ResultError(f"a {result.method} has no graph of facts", expected="a result of uw.graph")
    n = result.data.sizes["claim"]
    claim = {"claim": 0, **chosen}.pop("claim")
    if of is not None or set(chosen) - {"claim"} or type(claim) is not int or not 0 <= claim < n:
        got = shown(of) if of is not None else ", ".join(f"{key}={shown(value)}" for key, value in chosen.items())
        raise ResultError("a graph is of one claim", got=got, expected=f"claim=0 to {n - 1}")
    return claim


def _titled(chart: Any, data: xr.Dataset, claim: int) -> alt.TopLevelMixin:
    one = data.isel(claim=claim)
    says = f"the model says {one['verdict'].item()}" + (
        f", in truth {str(bool(one['label'])).lower()}" if "label" in one else ""
    )
    title = alt.Title(harmless(one["claim_text"].item()), subtitle=[harmless(says)], anchor="start")
    return chart.properties(title=title)
