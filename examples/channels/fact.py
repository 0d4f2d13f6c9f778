"""Is a fact that is patched in along one direction of an MLP the same as a change of rank one of its weights?

    python examples/channels/fact.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct). What was found is kept as
`results/NAME-fact.json` beside this file, from which docs/channels.md is made. In a capital's prompt the hidden
activation of one MLP, at the country, is moved along v, the unit vector of u_B − u_A, from what it is (u_A) to what it
is for another country (u_B): a run's edit. W + b aᵀ writes the same there, a = ((u_B − u_A) · v) W v,
b = Σ⁻¹ u_A / (u_Aᵀ Σ⁻¹ u_A), Σ the second moment of the activation on other prompts (Makelov, Lange and Nanda 2023,
arXiv 2311.17030; ROME: Meng et al. 2022, arXiv 2202.05262). With Σ = 1 the key is u_A itself. Layers are chosen on
other facts than those that are shown: the first of all, and the first behind MLP 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pandas as pd
import torch
from kept import keep, model_of
from torch import Tensor

import unwrite as uw

FACTS, CHOOSE, SEED = 24, 8, 0
TASKS = ("ioi", "agreement", "pronoun", "docstring", "greater_than", "laundry", "boxes")
EACH, ASKED = 24, 4  # prompts of each, and so many apart those that are asked what has changed
RIDGE = 0.01  # of the mean of Σ's diagonal, so that it has an inverse
WAYS = ("clean", "patched", "rank one, Σ", "rank one, 1")


def measured(model: str) -> dict[str, Any]:
    """Facts that the model knows: each patched, each written into the weights by two keys, and what else changes."""
    lm = uw.load(model, dtype="float32")
    facts, others = known(lm), unrelated(lm)
    shown, effects = facts.take(range(CHOOSE, len(facts))), by_layer(lm, facts.take(range(CHOOSE)))
    lines, plain = [], at_end(lm, others)
    for layer in (int(np.argmin(effects)), 1 + int(np.argmin(effects[1:]))):
        site = f"MLP{layer}.act"
        moment = second_moment(lm, site, others)
        lines += [fact(lm, shown.take([i]), site, moment, shown, others, plain) for i in range(len(shown))]
    about = {"chosen_on": CHOOSE, "by_layer": effects, "prompts": sum(map(len, others)), "asked": len(plain)}
    return {**model_of(uw.solves(lm, facts)), **about, "facts": lines}


def known(lm: Any) -> uw.Pairs:
    """Capitals that are said at the plain prompt, each once, base and source of one length."""
    pairs = uw.tasks.capitals(8 * FACTS, lm.tokenizer, SEED, bos=False)
    plain = np.array(pairs.template) == (pairs.template or [""])[0]
    pairs = pairs.take(plain & (pairs.base.lengths == pairs.source.lengths) & uw.solves(lm, pairs)["solved"].values)
    _, first = np.unique(pairs.answer, return_index=True)
    return pairs.take(sorted(first)[:FACTS])


def unrelated(lm: Any) -> list[Tensor]:
    """Prompts of other tasks, those of one length together."""
    made = [getattr(uw.tasks, name)(EACH, lm.tokenizer, SEED, bos=False).base for name in TASKS]
    return [
        torch.from_numpy(part.ids[part.lengths == length, :length])
        for part in made
        for length in np.unique(part.lengths)
    ]


@torch.no_grad()
def by_layer(lm: Any, facts: uw.Pairs) -> list[float]:
    """By how much moving each MLP's activation moves the logit difference, on facts of their own."""
    sites, moved = [f"MLP{layer}.act" for layer in range(len(lm.layers))], torch.zeros(len(lm.layers))
    for one in (facts.take([i]) for i in range(len(facts))):
        both, clean = activations(lm, one, *sites), difference(lm, one)
        for i, site in enumerate(sites):
            with uw.trace(lm, edits=patch(one, site, *both[site])):
                moved[i] += (difference(lm, one) - clean)[0] / len(facts)
    return moved.tolist()


def patch(one: uw.Pairs, site: str, base: Tensor, source: Tensor) -> uw.Edit:
    """The edit of a run: along u_B − u_A at the country."""
    return uw.Edit.set(site, source, basis=source - base, at=int(one.roles["country"][0]))


@torch.no_grad()
def activations(lm: Any, one: uw.Pairs, *sites: str) -> dict[str, tuple[Tensor, Tensor]]:
    """u_A and u_B."""
    both = []
    for part, roles in ((one.base, one.roles), (one.source, one.source_roles)):
        with uw.trace(lm, *sites) as run:
            lm.decoder(torch.from_numpy(part.ids))
        both.append([run[site][0, int(roles["country"][0])] for site in sites])
    return dict(zip(sites, zip(*both, strict=True), strict=True))


@torch.no_grad()
def second_moment(lm: Any, site: str, others: list[Tensor]) -> Tensor:
    """Σ over all positions of other prompts, with a ridge."""
    rows = []
    for ids in others:
        with uw.trace(lm, site) as run:
            lm.decoder(ids)
        rows.append(run[site].flatten(0, 1).double())
    every = torch.cat(rows)
    moment = every.T @ every / len(every)
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def difference(lm: Any, of: uw.Pairs) -> Tensor:
    """ℓ[answer] − ℓ[against] of each pair's base prompt."""
    found = torch.zeros(len(of))
    for length in np.unique(of.base.lengths):
        rows = np.flatnonzero(of.base.lengths == length)
        logits = lm.hf(torch.from_numpy(of.base.ids[rows, :length]), logits_to_keep=1).logits[:, -1]
        answer, against = (torch.from_numpy(np.asarray(part)[rows])[:, None] for part in (of.answer, of.against))
        found[rows] = (logits.gather(1, answer) - logits.gather(1, against))[:, 0]
    return found


@torch.no_grad()
def at_end(lm: Any, others: list[Tensor]) -> Tensor:
    """The log-probabilities of what comes next after some of the other prompts."""
    return torch.cat([lm.hf(ids[::ASKED], logits_to_keep=1).logits[:, -1].double().log_softmax(-1) for ids in others])


@torch.no_grad()
def fact(
    lm: Any, one: uw.Pairs, site: str, moment: Tensor, shown: uw.Pairs, others: list[Tensor], plain: Tensor
) -> dict[str, Any]:
    """One fact: patched in a run, and written by two keys; what becomes of other facts and of other prompts."""
    given = activations(lm, one, site)[site]
    base, source = (part.double() for part in given)
    rest = shown.take(shown.answer != one.answer[0])
    moved = patch(one, site, *given)
    asked: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "clean": lambda: uw.trace(lm), "patched": lambda: uw.trace(lm, edits=moved),
    }  # fmt: skip
    for name, key in (("Σ", torch.linalg.solve(moment, base)), ("1", base)):
        edit = uw.Edit(site, beta=1.0, basis=(key / (key @ base), source - base))
        asked[f"rank one, {name}"] = lambda edit=edit: uw.rewritten(lm, edit)
    words = one.words(lm.tokenizer)
    found: dict[str, Any] = {"site": site, "answer": words["answer"][0], "against": words["against"][0]}
    for name, opened in asked.items():
        with opened():
            found[name] = {"difference": float(difference(lm, one)[0])}
            if name.startswith("rank"):
                apart = (plain.exp() * (plain - at_end(lm, others))).sum(1).mean()
                right = (difference(lm, rest) > 0).double().mean()
                found[name] |= {"others right": float(right), "kl": float(apart)}
    return found


def kept_facts(found: dict[str, Any]) -> pd.DataFrame:
    """Means over facts: the logit difference, whether the other capital is said instead, and what else changes."""
    lines = []
    for site in dict.fromkeys(one["site"] for one in found["facts"]):
        facts = [one for one in found["facts"] if one["site"] == site]
        for name in WAYS:
            moved, patched = (np.array([one[which]["difference"] for one in facts]) for which in (name, "patched"))
            spread = 1.96 * moved.std(ddof=1) / np.sqrt(len(moved))
            right, kl = (
                f"{np.mean([one[name][part] for one in facts]):.3f}" if part in facts[0][name] else ""
                for part in ("others right", "kl")
            )
            lines.append({
                "at": site, "run or weights": name, "logit difference": f"{moved.mean():+.2f} ± {spread:.2f}",
                "other capital above": f"{(moved < 0).mean():.2f}",
                "from the patch, mean |Δ|": f"{np.abs(moved - patched).mean():.2f}", "other facts right": right,
                "KL elsewhere": kl,
            })  # fmt: skip
    return pd.DataFrame(lines)


if __name__ == "__main__":
    keep(__doc__ or "", measured, "fact")
