"""Which heads of a small model that tracks entities do what? The protocol of Prakash et al. 2024, with all its numbers.

    python examples/circuits/tracking.py TOY --name entity-tracking

TOY is what `toy.py` trained. Path patching finds groups of heads (A → logits, B → A's queries, C → B's values, D → C's
values), masks say what each position carries, and executed runs how much the groups keep: in the model that is done, in
the one that was half-way, and each with the other's values (CMAP). Heads are chosen on some scenes and judged on
others. What was found is kept as `results/NAME.json` beside this file, from which docs/entity-tracking.md is made.
(arXiv 2402.14811; the words are theirs)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import masks
import numpy as np
import torch
from measure import write
from toy import BOXES, LETTERS, THINGS

import unwrite as uw

# Groups by what their heads write to, and the token at which they do: from "contains" back to where the letter stood
# first. "K" and "V" are not of the paper, in which objects are fetched from where they stand.
GROUPS = {"A": "end", "B": "end", "C": "query", "D": "label", "K": "label", "V": "label"}
WRITES_TO = {"B": ("A", "q"), "C": ("B", "v"), "D": ("C", "v"), "K": ("A", "k"), "V": ("A", "v")}
ROLES = ("end", "query", "label")
# What source prompts have otherwise, and by that what a set of heads carries.
CARRIED = {"object": "objects", "letter": "letter", "position": "position"}
PENALTIES, STEPS = (1.0, 0.3, 0.1, 0.03, 0.01), 60
# From which token at which heads are kept from looking; "random": the letter of another box.
KNOCKED = (("end", "label"), ("end", "object"), ("end", "query"), ("query", "label"), ("label", "object"),
           ("end", "random"), ("query", "random"))  # fmt: skip
CHOSEN_OF, JUDGED_BY, LEARNED_FROM, HELD, DRAWS = 200, 300, 100, 200, 12
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
        torch.from_numpy(pairs.base.ids), torch.from_numpy(source), pairs.answer.tolist(),
        np.asarray(pairs.against).tolist(), choices=pairs.choices,
        roles={role: pairs.roles[role].tolist() for role in ("query", "label", "object")},
        source_roles={"label": other.tolist()},
    )  # fmt: skip


# --- which heads ------------------------------------------------------------------------------------------------------


def found_groups(lm: Any, pairs: uw.Pairs) -> dict[str, list[dict[str, Any]]]:
    """The heads of each group with the part of the logit difference that they take away along their path.

    `prob` is the part of the answer's probability, which is the paper's score.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for group, role in GROUPS.items():
        after, side = WRITES_TO.get(group, ("", ""))
        receivers = "+".join(f"{one['head']}.{side}" for one in found[after]) if after else "logits"
        senders = tried(lm, found, group)
        found[group] = chosen(lm, pairs, senders, receivers, role) if senders else []
        if group == "B":  # a head of both is kept in B
            both = {one["head"] for one in found["B"]}
            found["A"] = [one for one in found["A"] if one["head"] not in both]
    return found


def tried(lm: Any, found: Mapping[str, Sequence[Any]], group: str) -> list[str]:
    """The heads that may belong to a group: all, or those of layers before the heads that they are to write to."""
    if group not in WRITES_TO:
        return heads(lm)
    end = max((layer(one["head"]) for one in found[WRITES_TO[group][0]]), default=0)
    return [head for head in heads(lm) if layer(head) < end]


def chosen(lm: Any, pairs: uw.Pairs, senders: Sequence[str], receivers: str, role: str) -> list[dict[str, Any]]:
    """Those that take away enough, beyond doubt."""
    lines, prob = (along(lm, pairs, senders, receivers, role, metric) for metric in ("logit_diff", "prob"))
    of = {one["head"]: one["mean"] for one in prob}
    return [one | {"prob": of[one["head"]]} for one in lines if one["mean"] < -LEAST and one["high"] < 0]


def along(
    lm: Any, pairs: uw.Pairs, senders: Sequence[str], receivers: str, role: str, metric: str
) -> list[dict[str, Any]]:
    """Each head set to its value where nothing can be answered, through these receivers alone, the largest loss first.

    As parts of the metric of base runs, with 95 % intervals of the mean over pairs.
    """
    one = uw.paths(lm, pairs, senders, receivers, metric=metric, at=[role]).data.isel(receiver=0, role=0)
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
    """In which it lies."""
    return int(head[1:].partition("H")[0])


def cells(found: Mapping[str, Sequence[Any]], groups: Iterable[str]) -> dict[str, list[str]]:
    """The heads of some groups, each once at its role."""
    made: dict[str, list[str]] = {}
    for group in groups:
        own = made.setdefault(GROUPS[group], [])
        own += [head for one in found[group] if (head := one["head"]) not in own]
    return {role: own for role, own in made.items() if own}


# --- what they keep ---------------------------------------------------------------------------------------------------


def right(lm: Any, pairs: uw.Pairs, own: Cells, source: Any = "mean", what: str = "faithfulness") -> float:
    """Part of the answers that are right with these heads alone ("complement": with all but these), others replaced."""
    return value(circuit(lm, pairs, own, source, 0, choose=1), what)


def circuit(lm: Any, pairs: uw.Pairs, own: Cells, source: Any, draws: int, choose: int) -> Any:
    """`uw.circuit` of heads at their roles; everything else is replaced. `choose` of them are looked into."""
    named = sorted({head for part in own.values() for head in part})
    return uw.circuit(
        lm, pairs, named, [1], source, "absolute", roles=own, nodes="heads", metric="top", draws=draws, gates=False,
        choose=choose,
    ).data.isel(order=0, by=0)  # fmt: skip


def value(found: Any, what: str) -> float:
    """The metric itself where all of the circuit is kept, or replaced."""
    whole, empty = (float(found[name].mean()) for name in ("base", "empty"))
    return empty + float(found[what].isel(size=-1)) * (whole - empty)


def pruned(lm: Any, pairs: uw.Pairs, own: Cells) -> dict[str, list[str]]:
    """Without the heads that are not missed, the least one first, until each takes away `MINIMAL` of the answers."""
    own = {role: [*part] for role, part in own.items()}
    while sum(map(len, own.values())) > 1:
        now = right(lm, pairs, own)
        fewer = [without(own, {role: [head]}) for role, part in own.items() for head in part]
        kept = [right(lm, pairs, one) for one in fewer]
        best = int(np.argmax(kept))
        if now - kept[best] >= MINIMAL * now:
            break
        own = fewer[best]
    return own


def without(own: Cells, left: Cells) -> dict[str, list[str]]:
    """Some heads fewer."""
    made = {role: [head for head in part if head not in left.get(role, ())] for role, part in own.items()}
    return {role: part for role, part in made.items() if part}


def only(own: Cells, group: Cells) -> dict[str, list[str]]:
    """Those that are in both."""
    return without(own, without(own, group))


def alike(lm: Any, own: Cells, layers: bool) -> list[dict[str, list[str]]]:
    """Other sets of as many heads at every role, and of every layer if asked for; no two are the same."""
    made = []
    for draw in range(DRAWS):
        random, one = np.random.default_rng([draw, layers]), {}
        for role, part in own.items():
            shuffled = random.permutation(heads(lm)).tolist()
            counts = [sum(layer(head) == at for head in part) for at in range(len(lm.layers))]
            by_layer = [head for at, n in enumerate(counts) for head in [h for h in shuffled if layer(h) == at][:n]]
            one[role] = sorted(by_layer if layers else shuffled[: len(part)])
        made += [one] if one not in [*made, {role: sorted(part) for role, part in own.items()}] else []
    return made


def evaluated(lm: Any, pairs: uw.Pairs, found: Mapping[str, Any], own: Cells) -> dict[str, Any]:
    """A circuit on scenes that it was not chosen on: what it keeps, what others keep, and what it is missing."""
    whole = circuit(lm, pairs, own, "mean", DRAWS, sum(map(len, own.values())))
    groups = {group: only(own, cells(found, [group])) for group in found}
    groups = {group: part for group, part in groups.items() if part}
    complete = {
        group: [right(lm, pairs, part, what="complement"), right(lm, pairs, without(own, part))]
        for group, part in groups.items()
        if without(own, part)
    }
    minimal = [
        {"head": str(head), "role": str(role), **{
            end: float(whole[f"minimality{end}"].sel(node=head, role=role)) for end in ("", "_low", "_high")}}
        for role, part in own.items() for head in part
    ]  # fmt: skip
    return {
        "heads": {role: [*part] for role, part in own.items()}, "pairs": len(pairs),
        "model": float(whole["base"].mean()), "none": float(whole["empty"].mean()),
        "kept": value(whole, "faithfulness"),
        "f": [float(whole[f"faithfulness{end}"].isel(size=-1)) for end in ("", "_low", "_high")],
        "random": {
            name: [right(lm, pairs, one) for one in alike(lm, own, layers)]
            for name, layers in (("roles", False), ("roles and layers", True))
        },
        "groups": {group: right(lm, pairs, part) for group, part in groups.items()},
        "complete": complete, "halves": whole["completeness"].values.tolist(), "minimal": minimal,
    }  # fmt: skip


# --- what they carry, and for whom ------------------------------------------------------------------------------------


def carried(lm: Any, nodes: Sequence[str], role: str, change: str) -> list[dict[str, Any]]:
    """The path over penalties of masks over heads at a role, judged by other scenes."""
    learned, held = scenes(lm, LEARNED_FROM, 10, change), scenes(lm, HELD, 11, change)
    return masks.paths(change, uw.mask(lm, learned, nodes, role, penalty=PENALTIES, held=held, steps=STEPS))


def slopes(lm: Any, nodes: Sequence[str], role: str, change: str) -> dict[str, list[float]]:
    """What each head by itself does to ℓ[answer] − ℓ[against]: guessed by the slope that a gain begins on, executed."""
    pairs = scenes(lm, LEARNED_FROM, 10, change)
    both = [uw.effects(lm, pairs, nodes, [role], method).data["mean"].isel(role=0) for method in ("atp", "exact")]
    return {head: [float(one.sel(node=head)) for one in both] for head in nodes}


def across(lm: Any, other: Any, pairs: uw.Pairs, own: Mapping[str, Cells]) -> dict[str, Any]:
    """Right answers of a model whose heads have another model's values for the same prompts, set by set."""
    found = circuit(lm, pairs, own["all"], other, 0, choose=1)
    lines = {group: right(lm, pairs, part, other, "complement") for group, part in own.items()}
    random = {
        group: [right(lm, pairs, one, other, "complement") for one in alike(lm, part, layers=True)]
        for group, part in own.items()
    }
    return {
        "itself": float(found["base"].mean()), "every head everywhere": float(found["empty"].mean()), "sets": lines,
        "random": random, "pairs": len(pairs),
    }  # fmt: skip


def knocked(lm: Any, pairs: uw.Pairs) -> dict[str, list[float]]:
    """Right answers where no head of a layer or a later one looks from one token at another, by the first such layer.

    "random": at the label of another box.
    """
    labels = np.stack([pairs.roles[role] for role in pairs.roles if role.startswith("label")], 1)
    own, draw = pairs.roles["label"], np.random.default_rng(0)
    other = np.array([draw.choice(row[row != mine]) for row, mine in zip(labels, own, strict=True)])
    places = {name: pairs.roles[name] for name in ("end", "query", "label", "object")} | {"random": other}
    return {
        f"{query} → {key}": [
            answered(lm, pairs, dict.fromkeys(range(first, len(lm.layers)), places[query]), places[key])
            for first in range(len(lm.layers) + 1)
        ]
        for query, key in KNOCKED
    }  # fmt: skip


def answered(lm: Any, pairs: uw.Pairs, query: Mapping[int, np.ndarray], key: np.ndarray) -> float:
    """Part of the answers that are right where layers do not look from these rows at those; patterns still sum to 1."""
    prompt = np.arange(len(pairs))

    def cut(rows: np.ndarray, pattern: torch.Tensor) -> torch.Tensor:
        made = pattern.clone()
        made[prompt, rows, key] = 0.0
        made[prompt, rows] /= made[prompt, rows].sum(-1, keepdim=True)
        return made

    edits = [uw.Edit.set(f"L{at}.pattern", partial(cut, rows)) for at, rows in query.items()]
    with torch.no_grad(), uw.trace(lm, edits=edits):  # all scenes are equally long
        logits = lm.hf(input_ids=torch.from_numpy(pairs.base.ids)).logits
    return float((logits[prompt, pairs.row].argmax(-1).numpy() == np.asarray(pairs.answer)).mean())


def same(pairs: uw.Pairs) -> uw.Pairs:
    """Both prompts are the base prompt."""
    ids, roles = torch.from_numpy(pairs.base.ids), {role: rows.tolist() for role, rows in pairs.roles.items()}
    return uw.pairs(
        ids, ids, pairs.answer.tolist(), np.asarray(pairs.against).tolist(), roles=roles, choices=pairs.choices
    )  # fmt: skip


# --- all of it --------------------------------------------------------------------------------------------------------


def found_in(lm: Any) -> dict[str, Any]:
    """Groups and circuits of one model, chosen, pruned and judged on three sets of scenes."""
    chosen_of, pruned_on, judged_by = (
        unanswerable(lm, n, seed) for seed, n in enumerate((CHOSEN_OF, CHOSEN_OF, JUDGED_BY))
    )
    groups = found_groups(lm, chosen_of)
    every = cells(groups, groups)
    named = {"A to D": cells(groups, "ABCD"), "all groups": every, "pruned": pruned(lm, pruned_on, every)}
    return {
        "solves": uw.solves(lm, judged_by).data.attrs["solves"], "groups": groups,
        "tried": {group: len(tried(lm, groups, group)) for group in GROUPS},
        "looks": {group: looks(lm, judged_by, groups[group], role) for group, role in GROUPS.items()},
        "circuits": {name: evaluated(lm, judged_by, groups, own) for name, own in named.items() if own},
        "scenes": [str(part.about()["hash"]) for part in (chosen_of, pruned_on, judged_by)],
    }  # fmt: skip


def looks(lm: Any, pairs: uw.Pairs, group: Sequence[Any], role: str) -> dict[str, dict[str, float]]:
    """How much each head of a group looks from its role at the thing, its letter, the letter asked for, and itself."""
    if not (named := [one["head"] for one in group]):
        return {}
    weight = uw.attention(lm, pairs.base, heads=named)["weight"].transpose("head", "prompt", "query", "key").values
    prompt, seen = np.arange(len(pairs)), ("object", "label", "query", "end")
    return {
        head: {key: float(own[prompt, pairs.roles[role], pairs.roles[key]].mean()) for key in seen}
        for head, own in zip(named, weight, strict=True)
    }


def measured(place: Path) -> dict[str, Any]:
    """The whole protocol for a run of `toy.py`."""
    young, lm = uw.load(place / "young"), uw.load(place / "model")
    found = {"young": found_in(young), "model": found_in(lm)}
    groups, judged_by = found["model"]["groups"], unanswerable(lm, JUDGED_BY, 2)
    own = {group: cells(groups, [group]) for group in groups if groups[group]}
    roles = {
        role: {what: carried(lm, heads(lm), role, change) for what, change in CARRIED.items()} for role in ROLES
    }  # fmt: skip
    by_group = {
        group: {what: carried(lm, named, role, change) for what, change in CARRIED.items()}
        for group, part in own.items()
        for role, named in part.items()
    }
    flat = {
        group: {what: slopes(lm, named, role, change) for what, change in CARRIED.items()}
        for group, part in own.items()
        for role, named in part.items()
    }
    circuits = {name: cells(part["groups"], GROUPS) for name, part in found.items()}
    prompts, every = same(scenes(lm, JUDGED_BY, 20, "position")), own | {"all": circuits["model"]}
    moved = {"young's, in the model": (lm, circuits["young"]), "the model's, in young": (young, circuits["model"])}
    record = json.loads((place / "run.json").read_text("utf-8"))
    return {
        "run": {name: record[name] for name in ("settings", "torch", "step", "young", "seconds", "solved")},
        "weights": {name: one.provenance["model"]["weights"] for name, one in
                    (("young", uw.solves(young, prompts)), ("model", uw.solves(lm, prompts)))},
        "versions": uw.solves(lm, prompts).provenance["versions"], "found": found,
        "moved": {name: right(one, judged_by, part) for name, (one, part) in moved.items() if part},
        "carried": {"roles": roles, "groups": by_group}, "slopes": flat,
        "knocked": {name: knocked(one, prompts) for name, one in (("young", young), ("model", lm))},
        "across": {"young with the model's values": across(young, lm, prompts, every),
                   "model with young's values": across(lm, young, prompts, every)},
    }  # fmt: skip


def main() -> None:
    """Measure a run and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("toy", type=Path)
    parser.add_argument("--name", required=True)
    asked = parser.parse_args()
    write(rounded(measured(asked.toy)), asked.name)


def rounded(part: Any) -> Any:
    """Numbers to four digits behind the point; none for what is no number."""
    if isinstance(part, Mapping):
        return {key: rounded(one) for key, one in part.items()}
    if isinstance(part, (list, tuple)):
        return [rounded(one) for one in part]
    if isinstance(part, float):
        return round(part, 4) if np.isfinite(part) else None
    return part


if __name__ == "__main__":
    main()
