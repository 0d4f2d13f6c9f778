"""Which heads of a small model that tracks entities do what? The protocol of Prakash et al. 2024, with all its numbers.

    python examples/circuits/tracking.py TOY --name entity-tracking

TOY is what `toy.py` trained. Path patching finds groups of heads (A → logits, B → A's queries, C → B's values, D → C's
values), masks say what each position carries, and executed runs how much the groups keep: in the model that is done, in
the one that was half-way, and each with the other's values (CMAP). Heads are chosen on some scenes and judged on others.
What was found is kept as `results/NAME.json` beside this file, from which docs/entity-tracking.md is made.
(arXiv 2402.14811; the words are theirs)
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from toy import BOXES, LETTERS, THINGS

import unwrite as uw

RESULTS = Path(__file__).parent / "results"
# Groups by what their heads write to, and the token at which they do: from "contains" back to where the letter stood
# first. "V" is not of the paper, in which objects are fetched from where they stand.
GROUPS = {"A": "end", "B": "end", "C": "query", "D": "label", "V": "label"}
WRITES_TO = {"B": ("A", "q"), "C": ("B", "v"), "D": ("C", "v"), "V": ("A", "v")}
ROLES = ("end", "query", "label")
# What source prompts have otherwise, and by that what a set of heads carries.
CARRIED = {"object": "objects", "letter": "letter", "position": "position"}
PENALTIES, STEPS = (1.0, 0.3, 0.1, 0.03, 0.01), 60
CHOSEN_OF, JUDGED_BY, DRAWS = 200, 500, 20
# A head of a group takes away more than so much of the right answer's probability, or of right answers.
LEAST, MINIMAL = 0.02, 0.01
Cells = Mapping[str, Sequence[str]]  # heads by role


def scenes(lm: Any, n: int, seed: int, change: str) -> uw.Pairs:
    """Pairs of the task; every scene is drawn by itself, so that pairs and not places are independent evidence."""
    words = {"thing": THINGS, "letter": LETTERS}
    return replace(uw.tasks.boxes(n, lm.tokenizer, seed, change, k=BOXES, words=words, bos=False), template=None)


def unanswerable(lm: Any, n: int, seed: int) -> uw.Pairs:
    """Source prompts are other scenes that ask for a letter which is in neither; of labels a random one is meant."""
    pairs, random = scenes(lm, n, seed, "position"), np.random.default_rng(seed)
    labels = [role for role in pairs.roles if role.startswith("label")]
    rows = np.stack([pairs.source_roles[role] for role in labels], 1)
    letters = lm.tokenizer.convert_tokens_to_ids(LETTERS)
    source, other = pairs.source.ids.copy(), np.zeros(n, dtype=int)
    for i in range(n):
        seen = {*source[i, rows[i]].tolist(), *pairs.base.ids[i, rows[i]].tolist()}
        source[i, pairs.source_roles["query"][i]] = random.choice([one for one in letters if one not in seen])
        other[i] = random.choice(rows[i])
    return uw.pairs(
        torch.from_numpy(pairs.base.ids), torch.from_numpy(source), pairs.answer.tolist(), choices=pairs.choices,
        roles={role: pairs.roles[role].tolist() for role in ("query", "label", "object")},
        source_roles={"label": other.tolist()},
    )  # fmt: skip


# --- which heads ------------------------------------------------------------------------------------------------------


def found_groups(lm: Any, pairs: uw.Pairs) -> dict[str, list[dict[str, Any]]]:
    """The heads of each group with what of the answer's probability they take away along their path; empty ones too."""
    found: dict[str, list[dict[str, Any]]] = {}
    for group, role in GROUPS.items():
        after, side = WRITES_TO.get(group, ("", ""))
        receivers = "logits" if not after else "+".join(f"{one['head']}.{side}" for one in found[after])
        tried = heads_before(lm, max((layer(one["head"]) for one in found[after]), default=0)) if after else heads(lm)
        lines = along(lm, pairs, tried, receivers, role) if receivers and tried else []
        found[group] = [one for one in lines if one["mean"] < -LEAST and one["high"] < 0]
    return found


def along(lm: Any, pairs: uw.Pairs, senders: Sequence[str], receivers: str, role: str) -> list[dict[str, Any]]:
    """Each head set to its value where nothing can be answered, through these receivers alone: the largest loss first."""
    one = uw.paths(lm, pairs, senders, receivers, metric="prob", at=[role]).data.isel(receiver=0, role=0)
    base = float(one["base"].mean())
    ends = {"mean": "mean", "low": "mean_low", "high": "mean_high"}
    lines = [
        {"head": str(head), **{key: float(one[name].sel(sender=head)) / base for key, name in ends.items()}}
        for head in one["sender"].values
    ]
    return sorted((line for line in lines if np.isfinite(line["mean"])), key=lambda line: line["mean"])


def heads(lm: Any) -> list[str]:
    """All of them."""
    return [str(node) for node in lm.nodes if "H" in node]


def layer(head: str) -> int:
    return int(head[1:].partition("H")[0])


def heads_before(lm: Any, end: int) -> list[str]:
    return [head for head in heads(lm) if layer(head) < end]


def cells(found: Mapping[str, Sequence[Any]], groups: Iterable[str]) -> dict[str, list[str]]:
    """The heads of some groups, each once at its role."""
    made: dict[str, list[str]] = {}
    for group in groups:
        own = made.setdefault(GROUPS[group], [])
        own += [head for one in found[group] if (head := one["head"]) not in own]
    return {role: own for role, own in made.items() if own}


# --- what they keep ---------------------------------------------------------------------------------------------------


def right(lm: Any, pairs: uw.Pairs, own: Cells, source: Any, what: str = "faithfulness", metric: str = "top") -> float:
    """Part of the answers that are right where these heads alone are kept ("complement": where they are replaced)."""
    named = sorted({head for part in own.values() for head in part})
    found = uw.circuit(lm, pairs, named, [1], source, "absolute", roles=own, nodes="heads", metric=metric, draws=0,
                       gates=False).data  # fmt: skip
    whole, empty = (float(found[name].mean()) for name in ("base", "empty"))
    return empty + float(found[what].isel(order=0, by=0, size=-1)) * (whole - empty)
