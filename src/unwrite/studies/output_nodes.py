"""Which nodes write the answer's label, how, and which only help others to? The output nodes of a task with choices.

Net direct effect: what a node writes at the end to the answer's centred logit (less the mean of all choices), the final
norm's scale held, as a mean over prompts; if every label is right as often, what always raises the same label adds
nothing. Total effect: what is lost of it in executed runs when the node has its value in another prompt of the task
(resample ablation). The output nodes are the fewest whose net direct effects add up to a share of the whole; how much
of the loss over the choices their direct edges alone keep is executed, on other prompts. (Lieberum et al. 2023, arXiv
2307.09458)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unwrite.circuits import Circuit
from unwrite.errors import NumericError, TokensError, number
from unwrite.methods.attention import attention
from unwrite.methods.dla import dla
from unwrite.methods.effects import effects
from unwrite.methods.paths import paths
from unwrite.model.view import Model
from unwrite.nodes import MLPS, PROJECTED, parse_node
from unwrite.prompts.pairs import Pairs
from unwrite.result import Result
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, admit_pairs
from unwrite.stats.jackknife import ratio
from unwrite.studies.beside import beside

# Of few output nodes so many others stand beside them.
BESIDE = 5


def output_nodes(
    lm: Model, ranking: Pairs, judged: Pairs, share: float = 0.8, *, seed: int = 0,
    checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """The output nodes that `ranking` pairs name, with what `judged` pairs say of each, as of `uw.beside`.

    Beside them stand as many other nodes, at least five, whose total effects are largest: what works through others.
    Arguments: pairs of a task with choices (`uw.tasks.mcqa`, …); `share` of all net direct effects that the nodes add
    up to; `seed` of the order in which other prompts lend values. Totals are of the end alone, attention is weighed by
    value. Where templates say no more than which answer is right, pairs are independent evidence. Attributes: `output`
    (the output nodes), `share`, `explains` (the share that it is of the judged pairs), `recovered` with `recovered_low`
    and `recovered_high` (95 %, jackknife: 1 − the loss over the choices gained when the direct edges of all other heads
    and MLPs into the logits are those of another prompt / the same of all of them), `solves`.
    Raises TokensError for pairs without choices; NumericError for a share that is none, and where nodes together do not
    write for the answer; what the methods raise.
    """
    number("share is a part of all direct effects", share, "above 0, at most 1", lambda share: 0 < share <= 1)
    ranking, judged = (admit_pairs(lm, pairs, None, sees=True) for pairs in (ranking, judged))
    if ranking.choices is None or judged.choices is None:
        raise TokensError("output nodes write to one of several choices", got="no choices", fix="give choices=")
    ranking, judged = (_mixed(pairs, seed) for pairs in (ranking, judged))
    with opened(checkpoint, listener) as job:
        read = {name: part.about()["hash"] for name, part in (("ranking", ranking), ("judged", judged))}
        if done := job.begin("nodes", lm, read, {"share": share}):
            return done
        return job.signed(_found(lm, ranking, judged, share, {"checkpoint": job, "listener": listener}))


def _mixed(pairs: Pairs, seed: int) -> Pairs:
    """In an order in which what the next pair is says nothing: values come from there."""
    pairs = pairs.take(np.random.default_rng(seed).permutation(len(pairs)))
    labels = pairs.template or ()
    by_answer = len({*labels}) == len({*zip(labels, pairs.answer.tolist(), strict=False)})
    return replace(pairs, template=None) if by_answer else pairs


def _found(lm: Model, ranking: Pairs, judged: Pairs, share: float, said: dict[str, Any]) -> Result:
    nodes = [str(node) for node in lm.parts if node.kind in (*PROJECTED, *MLPS)]
    (first, lost_first), (found, lost) = (
        (
            dla(lm, part.base, part.answer, part.choices, part.row, total=False, **said),
            effects(lm, part, nodes, "end", "exact", "centred", "resample", **said),
        )
        for part in (ranking, judged)
    )
    output = _fewest(first, share)
    others = "+".join(node for node in nodes if node not in output)
    sets = [*filter(None, [others]), "+".join(nodes)]
    edges = paths(lm, judged, sets, "logits", "frozen", "restricted", "resample", at="last", **said)
    seen = attention(lm, judged.base, "value", **said)
    table = beside(output | _through(first, lost_first, output), found, effects=lost, attention=seen, pairs=judged)
    about = {"output": ", ".join(output.nodes), "share": share, "explains": _explains(found, output)}
    return Result(table.data.assign_attrs(**about, **_recovered(edges, judged), solves=lost.data.attrs["solves"]))


def _net(found: Result) -> dict[str, float]:
    """The mean over prompts of what each head and MLP writes to the answer."""
    able = [name for name in map(str, found["node"].values) if parse_node(name).kind in (*PROJECTED, *MLPS)]
    return found["direct"].mean("prompt").sel(node=able).to_series().to_dict()


def _fewest(found: Result, share: float) -> Circuit:
    """The largest net direct effects, as few as add up to a share of all of them."""
    net = _net(found)
    if not (whole := sum(net.values())) > 0:
        raise NumericError(
            "heads and MLPs together do not write for the answer", got=f"{whole:.3g} logits", expected="more than 0",
            fix="ask whether the model does the task at all: uw.solves",
        )  # fmt: skip
    ranked = sorted(net, key=lambda name: -net[name])
    n = int((np.cumsum([net[name] for name in ranked]) < share * whole * (1 - 1e-12)).sum()) + 1
    return _circuit(found, ranked[:n])


def _through(found: Result, lost: Result, output: Circuit) -> Circuit:
    """As many other nodes, or `BESIDE`, of which the answer loses most when they are executed otherwise."""
    total = {str(name): -float(one) for name, one in lost["mean"].to_series().items()}
    ranked = sorted((name for name in total if name not in output), key=lambda name: -total[name])
    return _circuit(found, [name for name in ranked[: max(len(output), BESIDE)] if total[name] > 0])


def _circuit(found: Result, nodes: list[str]) -> Circuit:
    net, model = _net(found), found.provenance["model"]
    scores = tuple(net[name] for name in nodes)
    return Circuit((*nodes,), scores=scores, model=str(model["name"]), weights=model["weights"], of=len(net))


def _explains(found: Result, chosen: Circuit) -> float:
    """The share of all net direct effects that these nodes are."""
    net = _net(found)
    return sum(net[name] for name in chosen.nodes) / sum(net.values())


def _recovered(edges: Result, pairs: Pairs) -> dict[str, float]:
    """How much of the loss over the choices is not lost with the edges of all other nodes."""
    lost = edges["effect"].transpose("pair", "sender", "receiver").values[..., 0]
    other, whole = lost[:, 0] if lost.shape[1] > 1 else np.zeros(len(lost)), lost[:, -1]
    names = ("recovered", "recovered_low", "recovered_high")
    return dict(zip(names, map(float, ratio(whole - other, whole, pairs.cluster)), strict=True))
