"""What does the survey say, in ten lines? Every number in them, and in all tables, is made of what is kept.

python examples/survey/lines.py
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from claims import held
from table import DEPTHS, TABLES, agreed, by_writer, models, shares, trusted, writers

TEXT = """
1. **Most writes that can be judged end as ordinary writes in their place do.** Of {tests} writers on texts {undecided}
   are undecided; of those that are decided {alike} are like others (the interval is over lineages).
2. **The loss of a single write is the exception.** {erased} are erased, {reduced} reduced, {filled} filled in, {above}
   kept or amplified; in {few} fewer than one in ten are surely below ordinary writes. On some text these are: {lost}.
3. **How much survives is a matter of the model more than of the text.** Where it is known, it correlates by {same}
   between two texts of one kind and by {other} between two kinds; least in {lowest}.
4. **Words repeat less than numbers.** Of the writers that either of two texts calls special {again_same} have the same
   word on both if these are of one kind, and {again_other} if they are of two; {side_same} and {side_other} lie on the
   same side of ordinary writes. That nearly all decided words agree says little: most are "like others".
5. **Who takes a write away is no matter of course.** Of {seen} lost writers of which it is seen who acts, an MLP acts
   most on {by_mlp} (in {mlp_models}), a head on {by_head} (in {head_models}).
6. **What acts most is often near, not always.** On {near} of these {seen} it lies in the same layer or the next.
7. **What is written later survives better**, in {rises}; and so do ordinary writes, in {ordinary}.
8. **It is not positions alone that are erased, nor tokens alone.** Of the energy of lost writes so much depends on the
   position alone, in the median: {position}.
9. **Lost writes are read; that their space is used again is hardly seen.** Of {closely} that were looked at {read} are
   surely read by somebody, {early} of them mostly before half of their erasure is done. That a space is used because it
   was freed is shown of {used} of {heads} heads{which}.
10. **Direct attribution of early heads is worth less than a gradient.** In the first third of the layers direct
    correlates with what happens by {direct}, a gradient by {gradient}; the gradient is better in {better}. For early
    MLPs RelP is better than direct in {relp}.
"""


def lines() -> str:
    """The ten lines, as Markdown."""
    return TEXT.format(**_words(), **_acts(), **_steps(), **_readings())


def _words() -> dict[str, Any]:
    frame, said = writers(), shares()
    counts = frame["verdict"].value_counts()
    once = by_writer()
    lost = once[once["below"]].groupby("model", sort=False)["writer"]
    return {
        "tests": len(frame), "undecided": counts["undecided"], "alike": said.iloc[:, 1]["like others"],
        **{name: counts.get(word, 0) for name, word in (("erased",) * 2, ("reduced",) * 2, ("filled", "filled in"))},
        "above": int(frame["above"].sum()),
        "few": _held("fewer than one writer in ten is surely below ordinary writes"),
        "lost": "; ".join(f"{model} {', '.join(names)}" for model, names in lost),
        "same": _range("same"), "other": _range("other"), "lowest": _correlations("other").idxmin(),
        **{f"again_{kind}": _total(f"special on either, the same word, {kind} kind") for kind in ("same", "other")},
        **{f"side_{kind}": _total(f"special on either, the same side, {kind} kind") for kind in ("same", "other")},
    }  # fmt: skip


def _acts() -> dict[str, Any]:
    once = by_writer()
    lost = once[once["below"]]
    seen = lost[lost["eraser"].notna()]
    by = {kind: seen[seen["eraser kind"] == kind] for kind in ("MLP", "head")}
    part = lost.groupby("model", sort=False)["position"].median()
    return {
        "seen": len(seen), "near": int((seen["behind"] <= 1).sum()),
        "by_mlp": len(by["MLP"]), "mlp_models": _names(by["MLP"]), "by_head": len(by["head"]),
        "head_models": _names(by["head"]), "rises": _held("what is written later survives better, third by third"),
        "ordinary": _held("and so do ordinary writes"),
        "position": "; ".join(f"{model} {value:.2f}" for model, value in part.items()),
    }  # fmt: skip


def _steps() -> dict[str, Any]:
    looked = [(f"{writer} of {one['name']}", part) for one in models() for writer, part in one["closely"].items()]
    gone = [[line[-1] for line in part["readers"] if line[-1] is not None] for _, part in looked]
    used = [name for name, part in looked if part["reused"] == "shown"]
    return {
        "closely": len(looked), "read": sum(part["read"] == "shown" for _, part in looked),
        "early": sum(sum(one < 0.5 for one in part) > len(part) / 2 for part in gone if part),
        "used": len(used), "heads": sum(part["reused"] in ("shown", "not shown") for _, part in looked),
        "which": f" ({', '.join(used)})" if used else "",
    }  # fmt: skip


def _readings() -> dict[str, Any]:
    r = trusted().loc[("heads", DEPTHS[1])]
    better = _held("of early heads, gradient predicts what happens better than direct")
    return {
        "direct": r["direct"],
        "gradient": r["gradient"],
        "better": better,
        "relp": _held("of early MLPs, RelP does"),
    }


def _held(claim: str) -> str:
    return held().loc[claim, "holds of"]


def _names(part: pd.DataFrame) -> str:
    return ", ".join(part["model"].unique()) or "none"


def _correlations(kind: str) -> pd.Series:
    return pd.to_numeric(agreed()[f"r of survival, {kind} kind"], errors="coerce").dropna()


def _range(kind: str) -> str:
    return f"{_correlations(kind).min():.2f} to {_correlations(kind).max():.2f}"


def _total(column: str) -> str:
    """k of n, over all models."""
    pairs = agreed()[column].str.extract(r"(\d+) of (\d+)").dropna().astype(int).sum()
    return f"{pairs[0]} of {pairs[1]}"


if __name__ == "__main__":
    for made in (*TABLES, held):
        print(f"{made.__doc__}\n{made().to_string()}\n")
    print(lines())
