"""How is a result of each method shown? One view each: words, tables, pictures and alerts, for all that show results.

Terminal, page, card, events and the live screen ask the view; a method's name stands here and nowhere else among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import xarray as xr

from unwrite.errors import ResultError, plain
from unwrite.report import alerts as careful
from unwrite.report import (
    aligned,
    audited,
    believed,
    channels,
    claimed,
    decoded,
    found,
    kept,
    localised,
    looked,
    masked,
    patched,
    repaired,
    steps,
    survived,
    verdict,
    verified,
)
from unwrite.report.alerts import Alert
from unwrite.report.columns import Column, Line, Listing, listed
from unwrite.report.scanned import HEADER, disagreements, folded_line, rows, soundness, texts
from unwrite.result import Result

_Parts = Iterator[Line | Listing]
_TURNS, _NAMED, _LOOKED = 12, 12, 24


@dataclass(frozen=True)
class MethodView:
    """How results of one method are shown; what a method does not say is as for a method that has no view.

    `words` is the finding; `parts` tables and lines before it, of which a card shows the `foremost`-th table. `picture`
    is the main figure (None: what fits the variables), `small` that of a card; `of` are the variables that it draws,
    the first one there is on a map, where colours are `full` at so much; `matrix` the one of writers × nodes. `alerts`
    are beside those of every result, `numbers` for other programs, `heard` and `row` what a finished part of a run
    says; `claims` what a page in a browser claims, each with what it rests on (None: there is no page).
    """

    words: Callable[[Result], str] = lambda result: result.data.attrs.get("verdict") or result.method
    parts: Callable[[Result], _Parts] = lambda result: iter([listed(result)])
    foremost: int = 0
    picture: str | None = None
    small: str | None = None
    of: tuple[str, ...] = ()
    full: float | None = None
    apart: tuple[str, ...] = ()
    matrix: str | None = None
    alerts: tuple[Callable[[Result], Iterable[Alert]], ...] = ()
    numbers: Callable[[Result], dict[str, Any]] = lambda _: {}
    heard: Callable[[Result], str] = lambda _: ""
    row: Callable[[Result], tuple[str, ...]] = lambda _: ()
    claims: Callable[[Result], list[verdict.Claimed]] | None = None


def view(result: Result) -> MethodView:
    """The view of a result's method."""
    return VIEWS.get(result.method, MethodView())


def words(result: Result) -> str:
    """What the result amounts to: of a scan or an audit its paragraph, of the others a sentence."""
    return view(result).words(result)


def alerts(result: Result) -> list[Alert]:
    """What should make a reader careful, in the order of doubt: the run, the sample, the text, what is concluded."""
    return [alert for find in (careful.precision, *view(result).alerts) for alert in find(result)]


def listings(result: Result) -> list[Listing]:
    """The tables of a result."""
    return [part for part in view(result).parts(result) if isinstance(part, Listing)]


def _one(header: Iterable[Column], lines: Callable[[xr.Dataset], list[tuple[str, ...]]], whole: bool = False) -> Any:
    """Of a result that is one table."""

    def parts(result: Result) -> _Parts:
        listing = Listing("", header, lines(result.data), result.data)
        yield Listing("", header, listing.rows, result.data, None) if whole else listing

    return parts


def _scan(result: Result) -> _Parts:
    for name, data, read in texts(result):
        shown, folded = rows(data)
        title = f"{name or read['source']}: {read['prompts']} × {read['length']} tokens"
        yield Listing(title, HEADER, [row.cells for row in shown], data, None)
        if folded:
            yield Line(folded_line(folded), "dim")
        yield Line(soundness(data, result.provenance["settings"]), "dim")
    for line in disagreements(result):
        yield Line(f"texts disagree: {line}", "yellow")
    yield Line("")


def _verify(result: Result) -> _Parts:
    data, turns = result.data, verified.turns(result, _TURNS)
    yield Listing("", verified.TRAJECTORY, verified.trajectory(result), data, turns)
    yield Listing("later nodes that act on it", verified.ACTORS, verified.actors(result), data)


def _dla(result: Result) -> _Parts:
    yield from _attribution(result.data)
    yield Line("")


def _attribution(data: xr.Dataset) -> _Parts:
    for one in believed.asked(data):
        yield Line(one.title)
        yield Line(one.sums, "dim")
        yield Listing("", believed.header(data), list(one.rows), data, None)
    for replacement in believed.REPLACEMENTS if "trust" in data else ():
        if lines := believed.trusted(data, replacement):
            yield Listing(believed.title(data, replacement), believed.TRUST_HEADER, lines, data, None)
    yield Line(believed.added(data), "dim")


def _audit(result: Result) -> _Parts:
    for name, data, read in texts(result):
        yield Line(f"{name or read['source']}: {read['prompts']} × {read['length']} tokens")
        yield Line(soundness(data, result.provenance["settings"]), "dim")
    left, proofs = audited.removed(result), list(audited.verified(result))
    title = "what survives of every material write, by runs without it"
    yield Listing(title, survived.HEADER, survived.rows(left), left)
    title = "writers verified, by runs without them"
    yield Listing(title, audited.HEADER, [*map(audited.row, proofs)], proofs[0], None)
    yield from map(Line, audited.stories(result))
    yield from _attribution(result.data)
    yield Line(audited.search(result))
    yield Line("")


def _patched(result: Result) -> _Parts:
    data = result.data
    for one in patched.shown(data):
        yield Line(one.title)
        yield Line(one.sums, "dim")
        yield Listing("", one.header, one.rows, data, None)
    if more := patched.left_out(data):
        yield Line(more, "dim")
    if lines := patched.agreement(data):
        yield Listing("how estimates agree with what was executed", patched.AGREEMENT, lines, data, None)


def _masked(result: Result) -> _Parts:
    data = result.data
    yield Line(masked.ends(data), "dim")
    yield Listing("by penalty, on held-out pairs", masked.PATH, masked.path(data), data, None)
    if lines := masked.chosen(data):
        yield Listing("chosen at the best penalty", masked.CHOSEN, lines, data)


def _by_prompt(
    header: Iterable[Column],
    lines: Callable[[xr.Dataset], Iterator[tuple[str, list[tuple[str, ...]]]]],
    foremost: Callable[[xr.Dataset], Iterable[int]],
) -> Any:
    """A table for each of the first prompts."""

    def parts(result: Result) -> _Parts:
        for title, rows_ in lines(result.data):
            yield Listing(title, header, rows_, result.data, foremost(result.data))

    return parts


def _judged(result: Result) -> str:
    return result.data.attrs.get("verdict") or verdict.of_audit(result)


_EFFECTS = MethodView(patched.sentence, _patched, picture="heatmap", of=("effect", "exact"))
VIEWS: dict[str, MethodView] = {
    "scan": MethodView(
        verdict.of_scan, _scan, picture="levels", of=("relative_norm",), matrix="share",
        alerts=(careful.sample, careful.reading), heard=verdict.levels, claims=verdict.claims_of_scan,
    ),
    "survival": MethodView(
        survived.sentence, _one(survived.HEADER, survived.rows), picture="heatmap", of=("end",), full=1.0,
        matrix="acts",
    ),
    "verify": MethodView(
        verified.sentence, _verify, 1, picture="fig1", of=("acts",), matrix="acts", numbers=verified.numbers,
        row=lambda result: audited.row(result.data),
    ),
    "dla": MethodView(believed.sentence, _dla, picture="bars", of=("total", "direct")),
    "audit": MethodView(
        _judged, _audit, 1, picture="levels", small="fig1", of=("removed_end",), full=1.0, matrix="removed_acts",
        alerts=(careful.sample, careful.reading, careful.writers, careful.attribution),
        claims=verdict.claims_of_audit,
    ),
    "lens": MethodView(
        looked.first_choice, _by_prompt(looked.LENS, looked.lenses, lambda data: looked.foremost(data, _LOOKED)),
        of=("followed_prob",), apart=("prompt",),
    ),
    "decode": MethodView(
        decoded.sentence, decoded.parts, picture="precision", of=("prob",), apart=("prompt",)
    ),
    "graph": MethodView(claimed.sentence, claimed.parts, picture="graph"),
    "attention": MethodView(
        looked.looks_most, _by_prompt(looked.ATTENTION, looked.looks, lambda _: range(_LOOKED)), picture="attention",
        of=("weight",),
    ),
    "effects": _EFFECTS,
    "compare": _EFFECTS,
    "circuit": MethodView(kept.sentence, kept.curves, picture="curve", of=("faithfulness",)),
    "channels": MethodView(
        channels.sentence, _one(channels.HEADER, channels.lines), picture="bars", of=("best",)
    ),
    "Circuit": MethodView(kept.listed, picture="circuit", of=("score",)),
    "beside": MethodView(kept.opposing, kept.beside, picture="bars", of=("direct", "total")),
    "overlap": MethodView(
        kept.sharing, lambda result: iter([Listing("", kept.SHARED, kept.shared(result), result.data, None)]),
        picture="bars", of=("jaccard", "expected"),
    ),
    "self_repair": MethodView(repaired.sentence, repaired.parts, 1, picture="scatter"),
    "solves": MethodView(patched.solving, _one(patched.RATES, patched.rates, True), picture="bars", of=("accuracy",)),
    "mask": MethodView(masked.sentence, _masked, picture="heatmap", of=("best_gain",), full=1.0),
    "localise": MethodView(localised.sentence, localised.parts, picture="images", of=("image",)),
    "readers": MethodView(steps.sentence, steps.parts, picture="heatmap", of=("wrote_all",), full=1.0),
    "subspace": MethodView(aligned.sentence, aligned.parts, picture="bars", of=("fldd", "kept")),
    "agree": MethodView(patched.agreed, picture="bars", of=("pearson",)),
    "bound": MethodView(patched.bounded, picture="heatmap", of=("upper",)),
    "paths": MethodView(patched.along, _one(patched.EDGES, patched.edges), picture="matrix", matrix="effect"),
    "adversarial": MethodView(found.sentence, _one(found.HEADER, found.rows), picture="bars", of=("rate",)),
    "corpus_dla": MethodView(found.corpus_sentence, _one(found.CORPUS_HEADER, found.corpus_rows), picture="fig5"),
    "reproduce": MethodView(
        found.claims_sentence, _one(found.CLAIMS_HEADER, found.claims, True), picture="bars", of=("ours", "paper")
    ),
}  # fmt: skip


def described(result: Result) -> str:
    """A result for whoever types its name: the finding, the shape of its table, what it holds."""
    data, names = result.data, [str(name) for name in result.data.data_vars]
    try:
        finding = words(result)
    except (KeyError, ValueError, IndexError):  # someone has cut a part of it out
        finding = "a part of a result"
    try:
        lines, columns = result.table().shape
        shape = f"{lines:,} × {columns}, a row for each {', '.join(result.row_axes)}"
    except ResultError:
        shape = "none"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "\n".join(
        map(plain, (
            f"uw.{result.method}: {finding}",
            f"table: {shape}",
            f"axes: {', '.join(f'{axis} {size:,}' for axis, size in data.sizes.items())}",
            f"variables: {', '.join(names[:_NAMED])}{more}",
        ))
    )  # fmt: skip
