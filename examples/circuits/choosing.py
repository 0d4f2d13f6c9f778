"""How does the right text become the right letter? Multiple choice taken apart, as in Lieberum et al. 2023.

    python examples/circuits/choosing.py TOY --name multiple-choice       the protocol, for a run of choice.py
    python examples/circuits/choosing.py MODEL --name NAME                does a real model do it at all?

What was found is kept as `results/NAME-mcqa.json` beside this file, from which docs/multiple-choice.md is made. (arXiv
2307.09458; Chinchilla of 70 billion weights there)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from choice import CAPITALS, LETTERS
from measure import keep, model_of
from scipy.stats import binomtest

import unwrite as uw
from unwrite.studies.output_nodes import output_nodes

WORDS = {"country": [list(one) for one in CAPITALS], "letter": LETTERS}
LABELS = ("labels", "shuffled", "following", "digits")
RANKED, JUDGED, REAL = 128, 240, 60
# A head looks at the right option with so much of its attention.
LOOKS, RANKS, DRAWS = 0.4, range(5), 5
# Below so many nats there is nothing to recover.
LOST = 0.05
FORMS, SHOTS = {"mcqa": ("(A)", "[A]", "A."), "copy_colour": ("(A)", "A.")}, (0, 3)
OPTIONS = ("option", "option2", "option3", "option4")


def prompts(lm: Any, n: int, seed: int, change: str = "place") -> uw.Pairs:
    """Pairs of the task in the words of the toy."""
    return uw.tasks.mcqa(n, lm.tokenizer, seed, change, words=WORDS, bos=False)


def measured(model: str) -> dict[str, Any]:
    """The protocol where a toy lies, else whether the task is solved."""
    return toy(Path(model)) if (Path(model) / "run.json").exists() else real(model)


# --- does it do it? ---------------------------------------------------------------------------------------------------


def real(model: str) -> dict[str, Any]:
    """Right answers of a model by form and number of worked examples."""
    lm, lines = uw.load(model, dtype="float32"), []
    for task, forms in FORMS.items():
        for form in forms:
            for shots in SHOTS:
                pairs = getattr(uw.tasks, task)(REAL, lm.tokenizer, shots=shots, form=form)
                found = uw.solves(lm, pairs)
                lines.append({
                    "task": task, "form": form, "shots": shots, "n": len(pairs), "verdict": found.data.attrs["verdict"],
                    "right": int(found["solved"].sum()), "top": int(found["top"].sum()),
                })  # fmt: skip
    return {**model_of(found), "lines": lines}


def answered(lm: Any) -> list[dict[str, Any]]:
    """Right answers under other labels, and how often it says the letter that would stand there without them."""
    lines = []
    for change in ("", *LABELS):
        pairs = prompts(lm, JUDGED, 3, change or "place")
        mutated = pairs.source if change else pairs.base
        top = logits(lm, mutated).argmax(-1).numpy()
        right = np.asarray(pairs.against) if change else pairs.answer
        lines.append({
            "labels": change or "A to D", "n": len(pairs), "right": int((top == right).sum()),
            "by place": int((top == pairs.answer).sum()),
        })  # fmt: skip
    return lines


def logits(lm: Any, tokens: Any, edits: Sequence[uw.Edit] = ()) -> torch.Tensor:
    """[prompt, word] at the last token; all prompts are equally long."""
    with torch.no_grad(), uw.trace(lm, edits=list(edits)):
        return lm.hf(torch.from_numpy(tokens.ids)).logits[:, -1]


# --- who does it, and by what? ----------------------------------------------------------------------------------------


def toy(place: Path) -> dict[str, Any]:
    """Everything of a run."""
    lm, young = uw.load(place / "model"), uw.load(place / "young")
    record = json.loads((place / "run.json").read_text("utf-8"))
    table = output_nodes(lm, prompts(lm, RANKED, 0), prompts(lm, JUDGED, 1))
    names = (
        "node",
        "direct",
        "direct_low",
        "direct_high",
        "executed",
        "executed_low",
        "executed_high",
        "looks",
        "category",
    )
    lines = [{name: part.item() for name, part in table.data.isel(node=i)[[*names]].variables.items()}
             for i in range(table.data.sizes["node"])]  # fmt: skip
    about = {
        name: table.data.attrs[name]
        for name in ("output", "explains", "recovered", "recovered_low", "recovered_high", "solves")
    }
    looking = lookers(lm)
    return {
        **model_of(table), "run": {name: record[name] for name in ("settings", "young", "seconds")}, "about": about,
        "nodes": lines, "by answer": {str(node): table["by_answer"].sel(node=node).values.tolist()
                                      for node in table.data["node"].values},
        "answers": [*map(str, table.data["answer"].values)],
        "answered": {"model": answered(lm), "young": answered(young)},
        "looking": looking, "seen": {change or "A to D": seen(lm, looking, change) for change in ("", *LABELS)},
        "ranks": {side: ranks(lm, looking, side) for side in ("q", "k")},
    }  # fmt: skip


def at_options(lm: Any, heads: Sequence[str], tokens: Any, pairs: uw.Pairs) -> dict[str, list[float]]:
    """Mean attention of heads from the end to the right option and, on average, to one of the others."""
    weight, prompt = uw.attention(lm, tokens, heads=[*heads])["weight"], np.arange(len(pairs))
    found = {}
    for head in heads:
        one = weight.sel(head=head).values[prompt, pairs.row]
        right, *others = (one[prompt, pairs.roles[role]] for role in OPTIONS)
        found[head] = [float(right.mean()), float(np.mean(others))]
    return found


def lookers(lm: Any) -> list[str]:
    """Heads that look from the end at the right option, of prompts that nothing else is judged by."""
    pairs = prompts(lm, RANKED, 0)
    every = [str(node) for node in lm.nodes if "H" in node]
    return [head for head, (right, _) in at_options(lm, every, pairs.base, pairs).items() if right >= LOOKS]


def seen(lm: Any, heads: Sequence[str], change: str) -> dict[str, list[float]]:
    """Do these heads find the right option under other labels, too?"""
    pairs = prompts(lm, JUDGED, 3, change or "place")
    return at_options(lm, heads, pairs.source if change else pairs.base, pairs)


def ranks(lm: Any, heads: Sequence[str], side: str) -> dict[str, Any]:
    """The loss over the choices with the queries at the end, or the keys at the options, in k directions alone.

    Directions by SVD of other prompts with the letters A to D: of queries less their mean, of the keys of a prompt less
    the mean of its four. What is left out of queries is set to the mean, of keys to that of the four.
    """
    first, judged = prompts(lm, RANKED, 0), prompts(lm, JUDGED, 1)
    other = prompts(lm, JUDGED, 3, "following")
    with uw.trace(lm, *(f"{head}.{side}" for head in heads)) as found:
        lm.hf(torch.from_numpy(first.base.ids))
    vectors = {head: centred(found[f"{head}.{side}"], first, side) for head in heads}
    bases = {head: torch.linalg.svd(part, full_matrices=True)[2] for head, (part, _) in vectors.items()}
    share = {head: spread(part) for head, (part, _) in vectors.items()}
    means = {head: mean for head, (_, mean) in vectors.items()}

    def lost(pairs: uw.Pairs, tokens: Any, right: np.ndarray, made: Mapping[str, torch.Tensor]) -> list[float]:
        return [float(loss(lm, pairs, tokens, right, kept(pairs, side, made, means, k)).mean()) for k in RANKS]

    drawn = [{head: random(head, draw, basis) for head, basis in bases.items()} for draw in range(DRAWS)]
    return {
        "whole": float(loss(lm, judged, judged.base, judged.answer, []).mean()),
        "svd": lost(judged, judged.base, judged.answer, bases), "spread": share,
        "random": [lost(judged, judged.base, judged.answer, made) for made in drawn],
        "following": {"whole": float(loss(lm, other, other.source, np.asarray(other.against), []).mean()),
                      "svd": lost(other, other.source, np.asarray(other.against), bases)},
    }  # fmt: skip


def rows(pairs: uw.Pairs, side: str) -> torch.Tensor:
    """Where queries, or keys, stand [prompt, place]."""
    return torch.from_numpy(np.stack([pairs.roles[role] for role in (["end"] if side == "q" else OPTIONS)], 1))


def centred(site: torch.Tensor, pairs: uw.Pairs, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [vector, d] less their mean, and the mean of queries."""
    own = site.detach()[torch.arange(len(pairs))[:, None], rows(pairs, side)]
    mean = own.mean((0, 1)) if side == "q" else own.mean(1, keepdim=True)
    return (own - mean).flatten(0, 1), own.mean((0, 1))


def spread(vectors: torch.Tensor) -> list[float]:
    """Which part of all variance lies in the first directions."""
    size = torch.linalg.svdvals(vectors) ** 2
    return (size.cumsum(0) / size.sum())[: len(RANKS) - 1].tolist()


def random(head: str, draw: int, basis: torch.Tensor) -> torch.Tensor:
    """Directions that know nothing."""
    seed = torch.Generator().manual_seed(1000 * draw + sum(map(ord, head)))
    return torch.linalg.qr(torch.randn(basis.shape, generator=seed))[0].T


def kept(
    pairs: uw.Pairs, side: str, bases: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor], k: int
) -> list[uw.Edit]:
    """Edits that leave these heads k directions."""
    place, prompt = rows(pairs, side), torch.arange(len(pairs))[:, None]

    def within(head: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def made(x: torch.Tensor) -> torch.Tensor:
            own, few = x[prompt, place], bases[head][:k].to(x)
            mean = means[head].to(x) if side == "q" else own.mean(1, keepdim=True)
            new = x.clone()
            new[prompt, place] = mean + (own - mean) @ few.T @ few
            return new

        return made

    return [uw.Edit.set(f"{head}.{side}", within(head)) for head in bases]


def loss(lm: Any, pairs: uw.Pairs, tokens: Any, right: np.ndarray, edits: Sequence[uw.Edit]) -> np.ndarray:
    """Over the four labels that stand in these prompts."""
    prompt = np.arange(len(pairs))
    labels = np.stack([tokens.ids[prompt, pairs.roles[role.replace("option", "label")]] for role in OPTIONS], 1)
    said = logits(lm, tokens, edits).double().numpy()
    chosen = said[prompt[:, None], labels]
    return np.log(np.exp(chosen - chosen.max(1, keepdims=True)).sum(1)) + chosen.max(1) - said[prompt, right]


# --- tables -----------------------------------------------------------------------------------------------------------


def share(hits: int, n: int) -> str:
    """A part of n prompts with Wilson's 95 % interval."""
    low, high = binomtest(hits, n).proportion_ci(method="wilson")
    return f"{hits / n:.2f} [{low:.2f}, {high:.2f}]"


def kept_solves(found: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """Right answers of real models, of four choices, by form and worked examples."""
    lines: dict[str, dict[str, str]] = {}
    for name, one in found.items():
        for line in one["lines"]:
            key = f"{line['task']}, {line['form']}, {line['shots']} shots"
            lines.setdefault(key, {})[name] = f"{share(line['right'], line['n'])} {line['verdict']}"
    return pd.DataFrame(lines).T


def kept_answers(found: dict[str, Any]) -> pd.DataFrame:
    """Right answers by labels, and how often it says what would be right without them."""
    return pd.DataFrame({
        (model, what): {one["labels"]: share(one[what], one["n"]) for one in lines}
        for model, lines in found["answered"].items() for what in ("right", "by place")
    })  # fmt: skip


def kept_nodes(found: dict[str, Any]) -> pd.DataFrame:
    """The output nodes and those that help through others."""
    lines = []
    for one in found["nodes"]:
        each = ", ".join(
            f"{a} {v:+.1f}" for a, v in zip(found["answers"], found["by answer"][one["node"]], strict=True)
        )
        lines.append({
            "node": one["node"], "output": one["node"] in found["about"]["output"].split(", "),
            **{name: interval(one, name) for name in ("direct", "executed")},
            "looks at": one["looks"], "writes for": one["category"], "direct by answer": each,
        })  # fmt: skip
    return pd.DataFrame(lines).set_index("node")


def interval(one: Mapping[str, Any], name: str) -> str:
    """A number in logits with its interval."""
    return f"{one[name]:+.2f} [{one[f'{name}_low']:+.2f}, {one[f'{name}_high']:+.2f}]"


def kept_seen(found: dict[str, Any]) -> pd.DataFrame:
    """Attention to the right option, and to one of the others on average, by labels."""
    return pd.DataFrame({
        labels: {head: f"{right:.2f}, others {other:.2f}" for head, (right, other) in one.items()}
        for labels, one in found["seen"].items()
    })  # fmt: skip


def kept_ranks(found: dict[str, Any]) -> pd.DataFrame:
    """The loss over the labels with k directions, and which part k directions recover of what is lost without any."""
    lines: dict[str, list[str]] = {}
    for side, one in found["ranks"].items():
        name, other = {"q": "queries", "k": "keys"}[side], one["following"]
        drawn = [recovered(losses, one["whole"]) for losses in one["random"]]
        lines[f"{name}, SVD"] = told(one["svd"], one["whole"])
        lines[f"{name}, random: mean, most of {len(drawn)}"] = [
            f"{np.mean(part):.2f}, {np.max(part):.2f}" if np.isfinite(part).all() else ""
            for part in zip(*drawn, strict=True)
        ] + [""]
        lines[f"{name}, the same SVD, other runs of letters"] = told(other["svd"], other["whole"])
    return pd.DataFrame(lines, index=[*(f"k = {k}" for k in RANKS), "whole"]).T.fillna("")


def told(losses: Sequence[float], whole: float) -> list[str]:
    """Each loss with the part that is recovered, and the loss of the model itself."""
    parts = recovered(losses, whole)
    return [
        f"{one:.3f}" + (f" ({part:.2f})" if np.isfinite(part) else "")
        for one, part in zip(losses, parts, strict=True)
    ] + [f"{whole:.3f}"]  # fmt: skip


def recovered(losses: Sequence[float], whole: float) -> np.ndarray:
    """(L_0 − L_k) / (L_0 − L_whole); none where hardly anything is lost without any direction."""
    lost = losses[0] - whole
    return (losses[0] - np.array(losses)) / lost if lost > LOST else np.full(len(losses), np.nan)


if __name__ == "__main__":
    keep(__doc__, measured, "mcqa")
