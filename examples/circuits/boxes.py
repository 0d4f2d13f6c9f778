"""How does a real model know which box is asked about: by its place, by its letter, and which heads hand that on?

    python examples/circuits/boxes.py MODEL --name NAME

MODEL is a folder or a hub name (google/gemma-3-270m). Boxes are named before what is in them, in three wordings that
share no object. A mask is learned in one of them, its penalty chosen in another, and the heads that it names are judged
in the third; then the first two change places. What was found is kept as `results/NAME-boxes.json` beside this file,
from which docs/masks.md is made.

A patch that merely destroys an answer makes the model name one of the other two things, the right one of them in half
of the cases. So what is said is counted: the base prompt's own thing, the one that the source prompt's variable
demands, the third one, or anything else; and what is demanded is compared to the third.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from masks import heads_from
from measure import kept, model_and_name, model_of, write
from scipy.stats import binomtest

import unwrite as uw

# Learned in the first, chosen by the second; judged in the last one.
WORDINGS, JUDGED = (("colon", "box first"), ("box first", "colon")), "in box"
THINGS = ["pen", "cup", "book", "ball", "key", "phone", "hat", "bag", "ring", "box", "plate", "bottle", "shirt", "toy",
          "lamp", "clock", "knife", "bowl", "jacket", "card", "flag"]  # fmt: skip
# What source prompts have otherwise, at which token.
ASKED = (("position", "query"), ("position", "end"), ("letter", "end"), ("objects", "end"))
PAIRS, MOST, BOXES, PLACED = 100, 48, 3, 96
PENALTIES, STEPS, DRAWS = (0.3, 0.1), 45, 5


def solved(lm: Any, change: str, form: str, seed: int) -> tuple[uw.Pairs, dict[str, float]]:
    """Pairs whose base prompt the model gets right, each evidence by itself, and how often it does by place."""
    own = {"thing": THINGS[seed::3]}
    pairs = uw.tasks.boxes(PAIRS, lm.tokenizer, seed, change, k=BOXES, form=form, words=own)
    found = uw.solves(lm, pairs)
    places = {str(place): float(rate) for place, rate in found["accuracy"].to_series().items()}
    return replace(pairs.take(found["solved"].values), template=None), places


def measured(model: str) -> dict[str, Any]:
    """Every change at every token, learned in either wording."""
    lm = uw.load(model, dtype="float32")
    heads, lines, right = heads_from(lm, 0), [], {}
    for change, at in ASKED:
        judged, right[JUDGED] = solved(lm, change, JUDGED, 2)
        judged = judged.take(range(min(MOST, len(judged))))
        for forms in WORDINGS:
            (learned, right[forms[0]]), (held, right[forms[1]]) = (
                solved(lm, change, form, seed) for seed, form in enumerate(forms)
            )
            found = uw.mask(
                lm, learned, heads, at, penalty=PENALTIES, seeds=1, steps=STEPS, held=held, draws=DRAWS
            )  # fmt: skip
            best = found.data.sel(penalty=found.data.attrs["best"])
            chosen = [str(head) for head in best["node"].values[best["chosen"].values]]
            lines.append({
                "change": change, "at": at, "learned in": forms[0], "of": len(learned), "penalty": best.penalty.item(),
                "chosen by": float(best["rate"].sel(set="chosen")), "chosen": chosen, "pairs": len(judged),
                "says": said(lm, judged, at, sets(heads, chosen)),
            })  # fmt: skip
    return {**model_of(found), "heads": len(heads), "right": right, "lines": lines}


def sets(heads: Sequence[str], chosen: Sequence[str]) -> dict[str, list[str]]:
    """What is patched: nothing, all heads, those chosen, all others, and random ones of the same layers or of any."""
    made = {"none": [], "all": [*heads], "chosen": [*chosen], "others": [head for head in heads if head not in chosen]}
    rest = made["others"]
    for draw in range(DRAWS):
        random = np.random.default_rng(draw)
        shuffled = random.permutation([*heads]).tolist()
        layers = [head.partition("H")[0] for head in chosen]
        same = [
            head for layer in dict.fromkeys(layers)
            for head in [one for one in shuffled if one.partition("H")[0] == layer][: layers.count(layer)]
        ]  # fmt: skip
        if {*same} != {*chosen}:
            made[f"same layers {draw}"] = same
        made[f"any {draw}"] = random.permutation(rest).tolist()[: len(chosen)]
    return made


@torch.no_grad()
def said(lm: Any, pairs: uw.Pairs, at: str, patched: dict[str, list[str]]) -> dict[str, list[int]]:
    """How often each of the four is said, by what is patched at a role."""
    prompt, every = np.arange(len(pairs)), patched["all"]
    with uw.trace(lm, *(f"{head}.z" for head in every)) as seen:
        read(lm, pairs.source)
    values = {head: seen[f"{head}.z"][prompt, pairs.source_roles[at]] for head in every}
    rows, made = torch.from_numpy(pairs.roles[at]), {}
    for name, heads in patched.items():
        with uw.trace(lm, edits=[uw.Edit.set(f"{head}.z", values[head], at=rows) for head in heads]):
            top = read(lm, pairs.base).argmax(-1).numpy()
        own, demanded = pairs.answer, np.asarray(pairs.against)
        third = np.asarray(pairs.choices)[:, 2]
        counts = [int((top == one).sum()) for one in (own, demanded, third)]
        made[name] = [*counts, len(pairs) - sum(counts)]
    return made


def read(lm: Any, tokens: Any) -> torch.Tensor:
    """Logits [prompt, word] at the last token of prompts that are equally long, as those of one wording are."""
    if (tokens.lengths < tokens.length).any():
        raise ValueError("these prompts are not equally long")
    return lm.hf(torch.from_numpy(tokens.ids), logits_to_keep=1).logits[:, 0]


# --- what is a place? -------------------------------------------------------------------------------------------------

# Source prompts that ask for a place otherwise: in another wording, with more boxes, or behind more text.
VARIANTS: dict[str, tuple[str, int, str]] = {
    "as the base prompt": (JUDGED, 3, ""), "fewer words": ("colon", 3, ""), "other words": ("box first", 3, ""),
    "things first": ("object first", 3, ""), "text before": (JUDGED, 3, "Somebody put these things away last night. "),
    "four boxes": (JUDGED, 4, ""), "five boxes": (JUDGED, 5, ""), "four boxes, fewer words": ("colon", 4, ""),
    "five boxes, fewer words": ("colon", 5, ""),
}  # fmt: skip


def placed(model: str, name: str) -> dict[str, Any]:
    """Which place is said when heads have their values in prompts of other kinds: counted from the first, or the last?

    The heads are those that both wordings named for the position at the end.
    """
    lm, own = uw.load(model, dtype="float32"), [
        one["chosen"] for one in kept(name, "boxes")["lines"] if (one["change"], one["at"]) == ("position", "end")
    ]  # fmt: skip
    heads = [head for head in own[0] if head in own[1]]
    base, _ = solved(lm, "position", JUDGED, 2)
    lines = [
        {"variant": variant, **by_place(lm, base, asking(lm, *how), heads)} for variant, how in VARIANTS.items()
    ]  # fmt: skip
    return {"heads": heads, "lines": lines}


def asking(lm: Any, form: str, k: int, before: str) -> list[tuple[torch.Tensor, int]]:
    """Ids of prompts of k boxes, and which place is asked for, from 0."""
    own = {"thing": THINGS[1::3]}
    pairs = uw.tasks.boxes(PLACED, lm.tokenizer, 3, "query", k=k, form=form, words=own)
    made = []
    for ids, n, label in zip(pairs.base.ids, pairs.base.lengths, pairs.template or (), strict=True):
        text = lm.tokenizer.decode(ids[:n], skip_special_tokens=True)
        made.append((lm.tokenizer(before + text, return_tensors="pt")["input_ids"], int(label.split()[1]) - 1))
    return made


@torch.no_grad()
def by_place(
    lm: Any, base: uw.Pairs, sources: Sequence[tuple[torch.Tensor, int]], heads: Sequence[str]
) -> dict[str, int]:
    """What is said: the thing at the place counted from the first box, at that counted from the last, or others.

    A base prompt is asked for neither of the two places, or for none that is there.
    """
    things = np.stack([base.roles[f"object{i}"] for i in ("", *range(2, BOXES + 1))], 1)
    own = (things < things[:, :1]).sum(1)
    counts = dict.fromkeys(("pairs", "both", "first", "last", "own", "third", "else"), 0)
    for number, (ids, place) in enumerate(sources):
        boxes = max(at for _, at in sources) + 1
        first, last = place, place - (boxes - BOXES)
        fits = [i for i in range(len(base)) if own[i] not in (first, last)]
        if not (0 <= first < BOXES and 0 <= last < BOXES) or not fits:
            continue
        i = fits[number % len(fits)]
        with uw.trace(lm, *(f"{head}.z" for head in heads)) as seen:
            lm.hf(ids, logits_to_keep=1)
        edits = [uw.Edit.set(f"{head}.z", seen[f"{head}.z"][:, -1], at=-1) for head in heads]
        with uw.trace(lm, edits=edits):
            top = int(lm.hf(torch.from_numpy(base.base.ids[i : i + 1]), logits_to_keep=1).logits[0, 0].argmax())
        order = np.argsort(things[i])
        said = {int(np.asarray(base.choices)[i, order[j]]): j for j in range(BOXES)}.get(top)
        found = {first: "first", last: "last"} if first != last else {first: "both"}
        counts["pairs"] += 1
        counts["else" if said is None else "own" if said == own[i] else found.get(said, "third")] += 1
    return counts


# --- tables -----------------------------------------------------------------------------------------------------------


def kept_boxes(found: dict[str, Any]) -> pd.DataFrame:
    """What is said in the judged wording: own thing / what is demanded / the third, by what is patched."""
    lines = []
    for one in found["lines"]:
        says, n = one["says"], one["pairs"]
        own, demanded, third, _ = says["chosen"]
        lines.append({
            "pairs": one["change"], "at": one["at"], "learned in": one["learned in"], "heads": ", ".join(one["chosen"]),
            "demanded": _rate(demanded, n), "own": f"{own / n:.2f}",
            "third": f"{third / n:.2f}", "p, demanded = third": f"{_p(demanded, third):.1g}",
            "all heads": _shares(says["all"], n), "the others": _shares(says["others"], n),
            "random, same layers": _most(says, "same layers", n), "random": _most(says, "any", n),
        })  # fmt: skip
    return pd.DataFrame(lines)


def kept_places(found: dict[str, Any]) -> pd.DataFrame:
    """Parts of the prompts in which each place is said, by what source prompts are like.

    `p` is of a sign test of the same place and the third, or of the place from the first and that from the last.
    """
    lines = {}
    for one in found["lines"]:
        n = one["pairs"]
        moved = "both" if one["first"] + one["last"] == 0 else ""
        named = {"both": "the same"} if moved else {"first": "from the first", "last": "from the last"}
        lines[one["variant"]] = {
            "prompts": str(n), **{name: _rate(one[key], n) for key, name in named.items()},
            **{key: f"{one[key] / n:.2f}" for key in ("own", "third", "else")},
            "p": f"{_p(one['both'], one['third']) if moved else _p(one['first'], one['last']):.1g}",
        }  # fmt: skip
    return pd.DataFrame(lines).T.fillna("")


def _p(one: int, other: int) -> float:
    """A sign test of two counts."""
    return binomtest(one, one + other).pvalue if one + other else 1.0


def _rate(hits: int, n: int) -> str:
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return f"{hits / n:.2f} [{low:.2f}, {high:.2f}]"


def _shares(counts: Sequence[int], n: int) -> str:
    """Demanded, and the third beside it."""
    return f"{counts[1] / n:.2f} ({counts[2] / n:.2f})"


def _most(says: dict[str, list[int]], which: str, n: int) -> str:
    """Of random sets the one that says most often what is demanded; and how many there are that differ."""
    drawn = [counts for name, counts in says.items() if name.startswith(which)]
    return f"to {_shares(max(drawn, key=lambda one: one[1]), n)} of {len(drawn)}" if drawn else "no other set"


if __name__ == "__main__":
    asked = model_and_name(__doc__)
    write(measured(asked.model), asked.name, "boxes")
    write(placed(asked.model, asked.name), asked.name, "places")
