"""What holds of all models that were surveyed, and what does not? Statements, each asked of every model by its numbers.

`lines.py` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pandas as pd
from table import DEPTHS, agreed, by_writer, correlations, lineage, writers

Claim = Callable[[str, pd.DataFrame], bool | None]


@cache
def held() -> pd.DataFrame:
    """Of which models a statement holds, and of which it does not; of the others there is nothing to say."""
    parts = dict(iter(writers().groupby("model", sort=False)))
    rows = {}
    for text, claim in CLAIMS.items():
        said = {model: claim(model, part) for model, part in parts.items()}
        yes, no = ([model for model, one in said.items() if one is answer] for answer in (True, False))
        known = {lineage(model) for model in (*yes, *no)}
        rows[text] = {
            "holds of": f"{len(yes)} of {len(yes) + len(no)} models",
            "lineages": f"{len(known - {lineage(model) for model in no})} of {len(known)}",
            "not of": ", ".join(no) or "–",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("statement")


def _repeats(kind: str, least: float) -> Claim:
    def claim(model: str, _: pd.DataFrame) -> bool | None:
        r = agreed().loc[model].get(f"r of survival, {kind}", "–")
        return None if r == "–" else float(r) >= least

    return claim


def _rises(name: str) -> Claim:
    """Before the last layer, whose heads are acted on by one MLP alone."""

    def claim(_: str, part: pd.DataFrame) -> bool:
        thirds = part[part["depth"].isin(DEPTHS[1:4])].groupby("depth")[name].median()
        return bool(thirds.reindex(DEPTHS[1:4]).dropna().is_monotonic_increasing)

    return claim


def _of_lost(claim: Callable[[pd.DataFrame], bool]) -> Claim:
    """Asked of the writers that are lost and of which some node is surely seen to act against them."""

    def asked(model: str, _: pd.DataFrame) -> bool | None:
        once = by_writer()
        known = once[(once["model"] == model) & once["below"] & once["eraser"].notna()]
        return claim(known) if len(known) else None

    return asked


def _predicts(kind: str, better: str, worse: str) -> Claim:
    def claim(model: str, _: pd.DataFrame) -> bool | None:
        known = correlations()
        known = known[(known["model"] == model) & (known["kind"] == kind) & (known["depth"] == DEPTHS[1])]
        mean = known.groupby("reading")["r"].mean()
        return bool(mean[better] > mean[worse]) if len(mean) else None

    return claim


def _most(part: pd.Series) -> bool:
    return bool(part.mean() > 0.5)


def _any(name: str) -> Claim:
    return lambda _, part: bool(part.groupby("text")[name].any().all())


CLAIMS: dict[str, Claim] = {
    "known survivals of two texts of one kind correlate by .95 or more": _repeats("same kind", 0.95),
    "and those of texts of two kinds by .9": _repeats("other kind", 0.9),
    "fewer than one writer in ten is surely below ordinary writes": lambda _, part: bool(part["below"].mean() < 0.1),
    "some writer is, on every text": _any("below"),
    "some writer is surely above ordinary writes, on every text": _any("above"),
    "what is written later survives better, third by third": _rises("end"),
    "and so do ordinary writes": _rises("ordinary"),
    "of most writes MLPs take away more than heads do": lambda _, part: _most(part["mlps"] < part["heads"]),
    "what acts most on a lost write is an MLP, of most": _of_lost(lambda lost: _most(lost["eraser kind"] == "MLP")),
    "and lies at most one layer behind it, of most": _of_lost(lambda lost: _most(lost["behind"] <= 1)),
    "of early heads, gradient predicts what happens better than direct": _predicts("heads", "gradient", "direct"),
    "of early MLPs, RelP does": _predicts("MLPs", "relp", "direct"),
}
