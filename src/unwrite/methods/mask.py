"""Which nodes carry a variable? A gain for each, learned so that the base prompt's answer becomes the other one.

Loss = mean(ℓ[answer] − ℓ[against]) + mean Huber(change of what is to be kept) + λ Σ g, x' = x + g (source − x) at every
node and place, g in [0, 1] from 0 on. Prakash et al. 2024 (arXiv 2402.14811, DCM, with m = 1 − g) minimise −ℓ[against],
for which a node that only pushes the old answer has no use. (facts: systems on real models, §2.3)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int

from unwrite.errors import NumericError, TokensError, number, several, shown, whole
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import names_of
from unwrite.prompts.pairs import Pairs, learned_from, parted
from unwrite.prompts.positions import RoleNames
from unwrite.result import Result, build, quantity
from unwrite.run.edit.slots import Slot, slots
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, Progress, admit_pairs, batch_size, stream
from unwrite.run.pairs.masks import Masks, MaskTally, Side, cost
from unwrite.run.source.values import donor
from unwrite.stats.jackknife import ratio
from unwrite.stats.masks import HALF, SETS, WORDS, arranged, foremost, jaccard, matched, word
from unwrite.stats.rates import said

_MOST_GATES = 100_000


@torch.inference_mode(False)  # backward passes are needed, also where the caller has none in mind
def mask(
    lm: Model, pairs: Any, nodes: str | Iterable[str] = "heads", at: RoleNames = "end", keep: Any = None,
    penalty: float | Sequence[float] = (0.3, 0.1, 0.03), source: str | Model = "source", seeds: int = 3,
    steps: int = 100, lr: float = 0.1, *, held: Any = "template", draws: int = 20, bos: int | bool | None = None,
    batch: int | None = None, checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """The nodes that carry what base and source prompts differ in: set to their source values, `against` is said.

    Arguments: `pairs`, `nodes`, `source` and `bos` as in `uw.effects`, `against` being what a base prompt must say once
    the variable has its source value; `at` a role of the pairs, several, "last", "all" rows with one gate a node, or
    "each"; `keep` more pairs, with the same roles, which must go on as they did; `penalty` logits that a node costs,
    one or several, each a mask of its own; `seeds` masks of each, the first learned from all pairs, each other from as
    many drawn with replacement; `steps` and `lr` of Adam; `held` which pairs judge and are not learned from: half of
    the templates ("template"), half of all pairs ("pair"), or other pairs; `draws` random sets, with as many nodes of
    every layer as the chosen one (those that are that very set are left out). Another model as `source` is cross-model
    activation patching (CMAP): its values, read by this model's weights. A node is found as a slope leads to it: one
    behind a saturated softmax, or whose effect begins the wrong way, is not.
    Returns a Result with `gain[penalty, seed, node]` (and role or position), 0 as in the base run, 1 as in the source
    run; `mean_gain` over seeds, `chosen` (above ½), `size`, `stable` (Jaccard over seeds), `loss[penalty, seed, step]`;
    of held-out pairs, by what is patched (set: none, all, chosen, complement, random), `match` (`against` is the top of
    the vocabulary), `restricted` (above the answer and all choices), `difference` (ℓ[against] − ℓ[answer], logits),
    `rate` and `mean_difference` over pairs with 95 % intervals, `random_match[penalty, draw]`, and of `keep`
    `kept_same` (the top stays) and `kept_change` (logits). The attribute `best` is the penalty with the most matches on
    the held-out pairs (of several the fewest nodes), so its own rate flatters a little; `best_gain[node]` are its
    gains; `found` is "found", "nothing found" or "undecided" by `rule`, `solves` whether the model does the task.
    Raises NodeError for a node that is not there; NumericError for unknown settings, a penalty that is not above 0, or
    more than 100,000 gates; TokensError for pairs without `against` or a template to hold out, or of another model.
    Source: Prakash et al. 2024, arXiv 2402.14811; the gain is 1 − m of theirs.

    Example: `uw.mask(lm, uw.tasks.ioi(96, lm.tokenizer, change="names+order"))`
    """
    pairs = admit_pairs(lm, pairs, bos, sees=True)
    kept = None if keep is None else admit_pairs(lm, keep, bos, sees=True)
    held = held if isinstance(held, str) else admit_pairs(lm, held, bos, sees=True)
    nodes = nodes if isinstance(nodes, str) else names_of("nodes", nodes)
    request = _request(lm, pairs, kept, held, nodes, at, source, _settings(penalty, seeds, steps, lr, draws))
    size, given = batch_size(lm, pairs.base, batch, held=4), request.learned[0].donor
    named = {"": pairs, "keep": kept, "held": None if isinstance(held, str) else held}
    read = {name: part.about() for name, part in named.items() if part is not None}
    settings = {
        "nodes": nodes, "at": at if isinstance(at, str) else [*at], "penalty": [*request.penalty], "source": given.name,
        "seeds": seeds, "steps": steps, "lr": lr, "held": held if isinstance(held, str) else "pairs", "draws": draws,
        "batch": batch,
    }  # fmt: skip
    hashes = {name: str(part["hash"]) for name, part in read.items()} | given.read_by
    with opened(checkpoint, listener) as job:
        if done := job.begin("mask", lm, hashes, {**settings, "nodes": request.names}):
            return done
        return job.signed(build("mask", _found(request, size, job, listener), settings, provenance(lm), read))


def _settings(penalty: Any, seeds: int, steps: int, lr: float, draws: int) -> dict[str, Any]:
    """All that are numbers. Raises NumericError for those that cannot be."""
    what = "penalty is what a node costs, in logits"
    listed: list[Any] = (
        [penalty] if isinstance(penalty, Real) else several(what, penalty, "numbers above 0", NumericError)
    )
    for one in listed or [None]:
        number(what, one, "above 0, and finite", lambda one: 0 < one <= sys.float_info.max)
    if len({*listed}) < len(listed):
        raise NumericError("penalty names each once", got=shown(listed), expected="different numbers")
    number("lr is a rate", lr, "above 0, at most 1", lambda lr: 0 < lr <= 1)
    return {
        "penalty": tuple(map(float, listed)), "seeds": whole("seeds is a number of masks", seeds, 1),
        "steps": whole("steps is a number of steps", steps, 1), "lr": float(lr),
        "draws": whole("draws is a number of random sets", draws, 1),
    }  # fmt: skip


def _request(
    lm: Model, pairs: Pairs, kept: Pairs | None, held: str | Pairs, nodes: Any, at: Any, source: Any,
    settings: dict[str, Any],
) -> Masks:  # fmt: skip
    asked, first = slots(lm, nodes), learned_from(pairs, held, "a mask is learned")
    other = (pairs, ~first) if isinstance(held, str) else (held, np.ones(len(held), dtype=bool))
    sides = [[(pairs, first)], [other]]
    if kept is not None:
        own = _first_kept(kept, held, pairs.take(first))
        sides[0].append((kept, own))
        sides[1].append((kept, ~own))
    made = [tuple(_side(lm, own, which, asked, at, source) for own, which in side) for side in sides]
    n = max(int(side.gate.max()) for side in (*made[0], *made[1])) + 1
    if (gates := n * sum(len(slot.units) for slot in asked)) > _MOST_GATES:
        raise NumericError("a mask of so many gates", got=gates, expected=f"at most {_MOST_GATES:,}", fix="name roles")
    places = ("" if isinstance(at, str) else "role", [at] if isinstance(at, str) else [*at])
    return Masks(lm, asked, ("position", range(n)) if at == "each" else places, made[0], made[1], **settings)


def _first_kept(kept: Pairs, held: str | Pairs, learned: Pairs) -> Bool[np.ndarray, " pair"]:
    """The same of pairs that stay as they are: no template that judges is learned from."""
    if held != "template":
        return parted(kept, "pair")
    own = np.array([label in {*(learned.template or ())} for label in kept.template or [""] * len(kept)])
    if own.all() or not own.any():
        raise TokensError("keep has pairs of the templates that are learned from, and of others", got="only one sort")
    return own


def _side(
    lm: Model, pairs: Pairs, which: Bool[np.ndarray, " pair"], asked: tuple[Slot, ...], at: Any, source: Any
) -> Side:
    number = np.flatnonzero(which)
    pairs = pairs.take(number)
    rows, gate = pairs.rows(at), _gate(pairs, at)
    if isinstance(source, str) and source == "source" and not (rows and (rows[0] != rows[1]).any()):
        pairs.require_differences()  # the same prompt at another row is another value
    order = np.lexsort(((gate >= 0).argmax(1), pairs.row))
    pairs = pairs.take(order)
    given = donor(lm, pairs, asked, source, rows and rows[1][order])
    return Side(pairs, number[order], given, rows and rows[0][order], gate[order])


def _gate(pairs: Pairs, at: Any) -> Int[np.ndarray, "pair position"]:
    """Which place each row of the base prompts is, −1: none. Raises NumericError for two roles that are one token."""
    position, read = np.arange(pairs.base.length), pairs.row[:, None]
    if (rows := pairs.rows(at)) is None:
        place = {"each": position, "all": 0 * position, "last": np.where(position == read, 0, -1)}[at]
        return np.where(position <= read, place, -1)
    if any(len({*own}) < len(own) for own in rows[0].tolist()):
        raise NumericError("two roles are one token, which has one gate", got=str(at), fix="ask for one of them")
    place = np.full((len(pairs), pairs.base.length), -1)
    np.put_along_axis(place, rows[0], np.arange(rows[0].shape[1])[None], 1)
    return place


def _found(request: Masks, size: int, job: Job, listener: Listener | None) -> xr.Dataset:
    tally, base, passes = MaskTally(request, size, job), request.learned[0].pairs.base, cost(request)
    stage = f"mask, {passes:,.0f} passes"
    if listener is not None:  # what it will take is said before it starts
        listener(Progress(stage, 0, len(base), 0, 0.0))
    stream(request.lm, base, tally, len(base), stage, listener, job)
    return _dataset(request, tally.found).assign_attrs(cost=passes / len(base))


_EQUATIONS = {
    "gain": ("1", "g of x + g · (source − x) as it was learned: 0 the base run, 1 the source run"),
    "mean_gain": ("1", "mean of gain over seeds"),
    "chosen": ("1", "is mean_gain above ½?"),
    "best_gain": ("1", "mean_gain at the best penalty, of several places the largest"),
    "size": ("1", "nodes, at all places, that are chosen"),
    "stable": ("1", "mean over pairs of seeds of |both| / |either| of what is above ½"),
    "loss": ("logits", "mean(ℓ[answer] − ℓ[against]) + Huber of what is kept + penalty · Σ gain, before each step"),
    "match": ("1", "is `against` the top of the whole vocabulary? Of random sets: in which part of them"),
    "restricted": ("1", "is `against` above the answer and every other choice? Of random sets: in which part of them"),
    "difference": ("logits", "ℓ[against] − ℓ[answer] with this set patched; of random sets the mean over them"),
    "rate": ("1", "part of the pairs that match"),
    "restricted_rate": ("1", "part of the pairs in which `against` is above the answer and every other choice"),
    "mean_difference": ("logits", "mean of difference over pairs"),
    "random_match": ("1", "rate of each random set of as many nodes of every layer; NaN where it is the chosen one"),
    "kept_same": ("1", "is the top of the vocabulary what it is without a patch? Of random sets: in which part"),
    "kept_change": ("logits", "what the patch does to ℓ[answer] − ℓ[against] of a pair that is to stay"),
}


_INTERVALS = {
    "rate": "95 % interval, the wider of Wilson's over pairs and the jackknife's over templates; of random sets of all",
    "mean": "95 % interval, jackknife over templates",
}
_AXES: dict[str, tuple[str, ...]] = {
    "gain": ("penalty", "seed", "node", "place"), "mean_gain": ("penalty", "node", "place"), "best_gain": ("node",),
    "chosen": ("penalty", "node", "place"), "size": ("penalty",), "stable": ("penalty",),
    "loss": ("penalty", "seed", "step"), "random_match": ("penalty", "draw"), "kept_same": ("penalty", "set", "kept"),
    "kept_change": ("penalty", "set", "kept"),
    **dict.fromkeys(("match", "restricted", "difference"), ("penalty", "set", "pair")),
}  # fmt: skip


def _dataset(request: Masks, found: Arrays) -> xr.Dataset:
    """Everything that was found, named."""
    side, gain = request.judged[0], found["gain"]
    pairs, penalties = side.pairs.take(np.argsort(side.number)), len(request.penalty)
    named, drawn = {}, {}
    for name in ("match", "restricted", "difference"):
        named[name], drawn[name] = _by_set(found[name], found["own"])
    size, mean = found["chosen"].sum((1, 2)), gain.mean(1)
    rates = _rates(named, drawn, pairs.cluster)
    best = foremost(rates["rate"][:, SETS.index("chosen")], size)
    values = {
        "gain": gain, "mean_gain": mean, "chosen": found["chosen"], "best_gain": mean[best].max(-1), "size": size,
        "stable": np.array([jaccard(one.reshape(len(one), -1) > HALF) for one in gain]),
        "loss": found["loss"].reshape(penalties, request.seeds, -1), **named, **rates,
        "random_match": drawn["match"].mean(-1), **_kept(found),
    }  # fmt: skip
    variables = {name: _named(request, name, part) for name, part in values.items()}
    variables |= {"row": ("pair", pairs.row), "template": ("pair", _texts(pairs.template or ["all"] * len(pairs)))}
    variables |= {name: ("pair", _texts(part)) for name, part in pairs.words(request.lm.tokenizer).items()}
    axes = {
        "penalty": [*request.penalty], "seed": np.arange(request.seeds), "node": request.names, "set": [*SETS],
        "pair": np.sort(side.number), "draw": np.arange(request.draws), "step": np.arange(request.steps),
    } | ({request.places[0]: [*request.places[1]]} if request.places[0] else {})  # fmt: skip
    axes |= {"kept": np.sort(request.judged[1].number)} if len(request.judged) > 1 else {}
    solved = found["solved"] > 0
    low, high = (float(rates[f"rate_{end}"][best, SETS.index("chosen")]) for end in ("low", "high"))
    none, random = (float(rates["rate"][best, SETS.index(name)]) for name in ("none", "random"))
    return xr.Dataset(variables, axes).assign_attrs(
        best=request.penalty[best], at=", ".join(map(str, request.places[1])),
        found=word(low, high, int(size[best]), none, random),
        rule="; ".join(f"{name}: {rule}" for name, rule in WORDS.items()), templates=int(pairs.cluster.max()) + 1,
        learned_from=len(request.learned[0].pairs), solves=said(int(solved.sum()), len(solved), pairs.chance),
    )  # fmt: skip


def _by_set(part: np.ndarray, own: Bool[np.ndarray, "penalty draw"]) -> tuple[np.ndarray, np.ndarray]:
    """[penalty, set, pair], random sets being one, and [penalty, draw, pair], NaN of those that are the chosen one."""
    others, random = arranged(part.astype(float), len(own))
    random = np.where(own[..., None], np.nan, random)
    counts = (~own).sum(1)[:, None]
    mean = np.where(counts > 0, np.nansum(random, 1) / np.maximum(counts, 1), np.nan)
    return np.concatenate([others, mean[:, None]], 1), random


def _rates(named: Arrays, drawn: Arrays, cluster: Int[np.ndarray, " pair"]) -> Arrays:
    """Means over pairs, and their intervals; of random sets from the least to the most of them."""
    made: Arrays = {}
    for name, rate in (("match", "rate"), ("restricted", "restricted_rate")):
        others, random = named[name][:, :-1], drawn[name].mean(-1)
        last = (named[name][:, -1].mean(-1), np.fmin.reduce(random, 1), np.fmax.reduce(random, 1))
        ends = zip(("", "_low", "_high"), matched(others > 0, cluster), last, strict=True)
        made |= {f"{rate}{end}": np.concatenate([one, two[:, None]], 1) for end, one, two in ends}
    means = ratio(np.moveaxis(named["difference"], -1, 0), np.ones(named["difference"].shape[-1]), cluster)
    return made | {f"mean_difference{end}": part for end, part in zip(("", "_low", "_high"), means, strict=True)}


def _kept(found: Arrays) -> Arrays:
    """What becomes of pairs that are to stay as they are."""
    if "kept_top" not in found:
        return {}
    same, change = found["kept_top"] == found["kept_top"][:1], found["kept_difference"] - found["kept_difference"][:1]
    return {"kept_same": _by_set(same, found["own"])[0], "kept_change": -_by_set(change, found["own"])[0]}


def _named(request: Masks, name: str, part: np.ndarray) -> xr.Variable:
    """A variable on its axes, the one of places last where there are several."""
    stem, _, end = name.rpartition("_")
    whole, end = (stem, end) if end in ("low", "high") else (name, "")
    unit, equation = _EQUATIONS[whole]
    if end:
        which = "mean" if whole == "mean_difference" else "rate"
        equation = f"{'from' if end == 'low' else 'to'}: {_INTERVALS[which]}"
    axes = _AXES.get(whole, ("penalty", "set"))
    if axes[-1] == "place":
        single = not request.places[0]
        axes, part = (axes[:-1], part[..., 0]) if single else ((*axes[:-1], request.places[0]), part)
    return quantity(axes, part, unit, equation)


def _texts(words: Sequence[str]) -> np.ndarray:
    return np.array(words, dtype=object)
