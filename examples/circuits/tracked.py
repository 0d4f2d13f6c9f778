"""The tables of docs/entity-tracking.md, from what `tracking.py` kept; nothing is computed but intervals of counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

# What is patched, as a table says it.
SETS = {"nothing": "none", "chosen": "chosen", "the others": "complement", "all": "all"}
RESULTS = Path(__file__).parent / "results"


def kept(name: str) -> dict[str, Any]:
    """What was found of a run."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def share(part: float, n: int) -> str:
    """A part of n prompts with Wilson's 95 % interval."""
    low, high = binomtest(round(part * n), n).proportion_ci(method="wilson")
    return f"{part:.2f} [{low:.2f}, {high:.2f}]"


def spread(draws: Sequence[float]) -> str:
    """Of random sets the mean, the largest, and how many there are that differ."""
    return f"{sum(draws) / len(draws):.2f}, to {max(draws):.2f} ({len(draws)} sets)" if draws else "no other set"


def at_roles(own: Mapping[str, Sequence[str]]) -> str:
    """Heads by role in words."""
    return "; ".join(f"{role}: {', '.join(part)}" for role, part in own.items())


def solved(found: dict[str, Any]) -> pd.DataFrame:
    """How training went: part of the scenes that were solved, by step."""
    run = found["run"]
    return pd.DataFrame([part for _, part in run["solved"]], index=[f"step {step}" for step, _ in run["solved"]],
                        columns=["right"]).T  # fmt: skip


def groups(found: dict[str, Any], model: str) -> pd.DataFrame:
    """Who belongs to which group, by how much, and where it looks."""
    own, lines = found["found"][model], []
    for group, part in own["groups"].items():
        tried = own["tried"][group]
        if not part:
            lines.append({"group": group, "tried": tried, "head": "none"})
        for one in part:
            looks = own["looks"][group][one["head"]]
            seen = ", ".join(f"{role} {weight:.2f}" for role, weight in looks.items() if weight >= 0.1)
            lines.append({
                "group": group, "tried": tried, "head": one["head"],
                "of the logit difference": f"{one['mean']:+.0%} [{one['low']:+.0%}, {one['high']:+.0%}]",
                "of the probability": f"{one['prob']:+.0%}", "looks at": seen,
            })  # fmt: skip
    return pd.DataFrame(lines).fillna("").set_index("group")


def circuits(found: dict[str, Any]) -> pd.DataFrame:
    """What each circuit keeps, beside random ones."""
    lines = []
    for model, own in found["found"].items():
        for name, one in own["circuits"].items():
            n = one["pairs"]
            lines.append({
                "model": model, "circuit": name, "heads": sum(map(len, one["heads"].values())),
                "right": share(one["kept"], n), "model's": share(one["model"], n),
                "no head kept": share(one["none"], n),
                "of the model's": f"{one['kept'] / one['model']:.2f}",
                "random, as many a role": spread(one["random"]["roles"]),
                "random, of the same layers": spread(one["random"]["roles and layers"]),
            })  # fmt: skip
    return pd.DataFrame(lines).set_index(["model", "circuit"])


def complete(found: dict[str, Any], model: str = "model", circuit: str = "all groups") -> pd.DataFrame:
    """Right answers without each group, of the model and of the circuit."""
    one = found["found"][model]["circuits"][circuit]
    lines = {
        group: [share(whole, one["pairs"]), share(less, one["pairs"]), f"{abs(whole - less):.2f}"]
        for group, (whole, less) in one["complete"].items()
    }
    return pd.DataFrame(lines, index=["the model without it", "the circuit without it", "apart"]).T


def minimal(found: dict[str, Any], model: str = "model", circuit: str = "pruned") -> pd.DataFrame:
    """What each head of a circuit is worth in it."""
    one = found["found"][model]["circuits"][circuit]
    lines = {f"{part['head']} at {part['role']}": f"{part['']:.2f} [{part['_low']:.2f}, {part['_high']:.2f}]"
             for part in one["minimal"]}  # fmt: skip
    return pd.DataFrame(lines, index=["of what is kept"]).T


def halved(found: dict[str, Any], model: str = "model", circuit: str = "all groups") -> str:
    """Completeness at random halves of a circuit: how far apart the model and the circuit without them are."""
    apart = [abs(one) for one in found["found"][model]["circuits"][circuit]["halves"]]
    return f"random halves, of what is kept: {sum(apart) / len(apart):.2f} apart, to {max(apart):.2f} ({len(apart)})"


def most(found: dict[str, Any], what: str) -> str:
    """Of all sets of heads that were patched for a variable, by role and by group, the one that matches most often."""
    rates = [
        (one["rates"][which][0], f"{'all heads' if which == 'all' else which} at {place}")
        for by in found["carried"].values() for place, changes in by.items() for one in changes[what]
        for which in ("chosen", "complement", "all")
    ]  # fmt: skip
    rate, where = max(rates)
    return f"{what}: of {len(rates)} sets the one that matches most often does so in {rate:.2f} ({where})"


def carried(found: dict[str, Any], by: str) -> pd.DataFrame:
    """Masks by role or group, and what source prompts have otherwise: of penalties the one that matches most often."""
    lines = []
    for place, changes in found["carried"][by].items():
        for what, paths in changes.items():
            best = max(paths, key=lambda one: (one["rates"]["chosen"][0], -len(one["chosen"])))
            rates = best["rates"]
            rate, low, high = rates["chosen"]
            lines.append({
                by.removesuffix("s"): place, "other": what, "match": f"{rate:.2f} [{low:.2f}, {high:.2f}]",
                "heads": ", ".join(best["chosen"]), "penalty": best["penalty"],
                "all of them": f"{rates['all'][0]:.2f}", "the others": f"{rates['complement'][0]:.2f}",
                "random, to the most": "no other set" if rates["random"][0] is None
                else f"{rates['random'][0]:.2f}, to {best['random_most']:.2f}",
                "stable": f"{best['stable']:.2f}",
            })  # fmt: skip
    return pd.DataFrame(lines).set_index([by.removesuffix("s"), "other"])


def across(found: dict[str, Any]) -> pd.DataFrame:
    """Right answers of a model with the other one's values in each group."""
    lines: dict[str, dict[str, str]] = {}
    for name, one in found["across"].items():
        n = one["pairs"]
        lines[name] = {"nothing": share(one["itself"], n)}
        lines[name] |= {group: share(part, n) for group, part in one["sets"].items()}
        lines[name] |= {"every head, everywhere": share(one["every head everywhere"], n)}
        lines[f"{name}, random of the same layers"] = {group: spread(part) for group, part in one["random"].items()}
    return pd.DataFrame(lines).fillna("")


def slopes(found: dict[str, Any]) -> pd.DataFrame:
    """What each head of a group does to the difference of logits: as its slope at no change has it → executed."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for group, changes in found["slopes"].items():
        for what, each in changes.items():
            for head, (guess, executed) in each.items():
                lines.setdefault((group, head), {})[what] = f"{guess:+.2f} → {executed:+.2f}"
    return pd.DataFrame(lines).T.rename_axis(["group", "head"])


def path(found: dict[str, Any], by: str, place: str, what: str) -> pd.DataFrame:
    """One of these masks at every penalty: what it chooses, what that does, and what all the others do."""
    lines = {
        one["penalty"]: {
            "heads": ", ".join(one["chosen"]),
            **{f"match, {name}": f"{one['rates'][key][0]:.2f}" for name, key in SETS.items()},
            **{f"logits, {name}": f"{one['logits'][key]:+.1f}" for name, key in SETS.items()},
        }
        for one in found["carried"][by][place][what]
    }
    return pd.DataFrame(lines).T.rename_axis("penalty")


def knocked(found: dict[str, Any]) -> pd.DataFrame:
    """Right answers where no head of a layer or a later one looks from one token at another."""
    lines = {}
    for model, own in found["knocked"].items():
        for name, parts in own.items():
            n = found["across"]["young with the model's values"]["pairs"]
            lines[model, name] = [share(part, n) for part in parts]
    width = max(map(len, lines.values()))
    return pd.DataFrame(lines, index=[*(f"from layer {at} on" for at in range(width - 1)), "nowhere"]).T
