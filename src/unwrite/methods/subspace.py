"""Which directions of a site carry a variable, and are they an illusion? Learned or given, and executed with controls.

x' = x + BᵀB (source − x), B [direction, d] orthonormal: the base prompt's run with the source prompt's value along B
(Geiger et al. 2023, arXiv 2303.02536). A direction with a part that nothing reads and one that hardly varies can turn
answers without carrying anything (Makelov et al. 2023, arXiv 2311.17030): both parts are executed by themselves. With
`restrict`, x' = mean + BᵀB (x − mean): how few directions are enough (Lieberum et al. 2023, arXiv 2307.09458).
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from unwrite.errors import ModelError, NodeError, NumericError, number, one_of, several, shown, whole
from unwrite.model.load import provenance, untrained
from unwrite.model.view import Model
from unwrite.nodes import Site
from unwrite.prompts.pairs import Pairs, learned_from
from unwrite.prompts.positions import END, asked_roles
from unwrite.result import Result, build, quantity
from unwrite.run.backward.seen import EVERY, reading_slots
from unwrite.run.edit.sites import named
from unwrite.run.edit.slots import Slot, slots
from unwrite.run.edit.subspace import Basis, alike, given
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.stream import Listener, Progress, admit_pairs, batch_size, stream
from unwrite.run.pairs.exchanges import Sample, arbitrary
from unwrite.run.pairs.subspaces import OWN, UNTRAINED, Subspaces, SubspaceTally, cost
from unwrite.stats.curves import faithfulness
from unwrite.stats.rates import said
from unwrite.stats.subspaces import CONTROLS, PARTS, PATCHES, WORDS, Numbers, because, classes_of, evidence, word

METHODS = ("das", "mean", "svd", "gradient")
# What a head hands on is called by the node's own name, too.
_HANDED = {"z": "head", "mixer_z": "mixer"}


@torch.inference_mode(False)  # backward passes are needed, also where the caller has none in mind
def subspace(
    lm: Model, pairs: Any, site: str | Sequence[str], k: int = 1, at: str = END, method: str | Tensor = "das",
    readers: Sequence[str] | None = None, restrict: bool = False, seeds: int = 3, steps: int = 100, lr: float = 0.02,
    *, held: Any = "template", classes: Sequence[Hashable] | None = None, controls: Sequence[str] = CONTROLS,
    draws: int = 10, bos: int | bool | None = None, batch: int | None = None,
    checkpoint: Job | str | Path | None = None, listener: Listener | None = None,
) -> Result:  # fmt: skip
    """Directions of a site along which the source prompt's value turns the answer of the base prompt to `against`.

    Arguments: `pairs` and `bos` as in `uw.effects`, `against` being what a base prompt must say once the variable has
    its source value; `site` a name ("resid_post21", "MLP20.act", "L20H0.z"), several units of a layer taken together
    ("L23H0.q+L23H1.q", in the order of heads), or a list of such, each with a subspace of its own; `k` directions; `at`
    a role of the pairs; `method` "das" (learned, the best of `seeds`, by `steps` and `lr` of Adam), "mean" (what the
    means of classes of source − base span), "svd" (where values vary most), "gradient" (the same as "mean" of slopes of
    the answer), or directions [direction, d]; `readers` who reads a state of the stream: queries, keys or values of
    later heads; `held` which pairs judge and nothing is made of: half of the templates ("template"), half of all
    ("pair"), or other pairs; `classes` a label for each pair, alike where the same change is made: by default the order
    in which roles stand, or if all have one order answer and `against`; `controls` some of "random" (as many
    directions, each pair moved exactly as far, `draws` times), "arbitrary" (learned of other tokens in the place of
    every answer) and "untrained" (learned in a model of the same configuration that is not trained); the last two of
    "das" alone.
    Returns a Result; with several sites each variable has an axis `site`. `basis[direction, coordinate]`, `bases[seed,
    …]`, `agreement[seed, other_seed]` (mean cos² of principal angles, k/d by chance), `loss[seed, step]`; of held-out
    pairs by what is patched (patch: clean, full, subspace, its row and null part, renormalised and raw, mean, gradient,
    and the controls) `logit_diff[patch, pair]`, `match[patch, pair]` (`against` is the top of the vocabulary), `fldd`,
    `rate` and `share` (of the subspace's effect) with intervals; `norm[part]`, `spread[part]` (SD of values along it)
    and `moved[part]` of the row and null part, `verdict` and `because`, by the attribute `rule`. Parts are NaN where
    nobody is known who reads.
    With `restrict` (not "das"): the site keeps its value along the first directions alone, and its mean elsewhere;
    `kept[rank]`, the part of the logit difference from all set to the mean to the clean run, `top[rank]`,
    `variance[rank]`, and `random_kept[draw, rank]`.
    Raises NodeError for sites and readers that are none, and directions that depend on each other; NumericError for
    unknown settings; TokensError for pairs without `against` or a template to hold out, or that are alike at a site.
    Source: Geiger et al. 2023, arXiv 2303.02536; Makelov et al. 2023, arXiv 2311.17030.

    Example: `uw.subspace(lm, uw.tasks.ioi(112, lm.tokenizer, change="order"), "MLP20.act")`
    """
    pairs = admit_pairs(lm, pairs, bos, sees=True)
    held = held if isinstance(held, str) else admit_pairs(lm, held, bos, sees=True)
    readers, classes = _listed("readers", readers, NodeError), _listed("classes", classes, NumericError)
    basis = None if isinstance(method, str) else _basis(lm, method)
    settings = _settings(method, k, restrict, seeds, steps, lr, controls, draws)
    request = _request(lm, pairs, held, site, at, readers, classes, basis, settings)
    read = {"": pairs.about()} | ({} if isinstance(held, str) else {"held": held.about()})
    asked = {
        "site": site if isinstance(site, str) else [*request.sites], "at": at, "batch": batch, "readers": readers,
        "held": held if isinstance(held, str) else "pairs", "classes": classes, **settings,
    }  # fmt: skip
    hashes = {name: str(part["hash"]) for name, part in read.items()} | _digest(basis)
    most = batch_size(lm, pairs.base, batch, held=4)
    with opened(checkpoint, listener) as job:
        if done := job.begin("subspace", lm, hashes, asked):
            return done
        found = _found(request, most, isinstance(site, str), job, listener)
        return job.signed(build("subspace", found, asked, provenance(lm), read))


def _listed(name: str, part: Any, error: Any) -> list[Any] | None:
    return part if part is None else several(f"{name} are listed", part, "one after the other", error)


def _settings(
    method: Any, k: Any, restrict: Any, seeds: Any, steps: Any, lr: Any, controls: Any, draws: Any
) -> dict[str, Any]:
    """What is a number or a name. Raises NumericError for what cannot be."""
    if isinstance(method, str):
        one_of("method", method, METHODS, also="directions [direction, d]")
    name = method if isinstance(method, str) else "given"
    listed = several("controls are names", controls, ", ".join(CONTROLS), NumericError)
    for one in listed:
        one_of("a control", one, CONTROLS)
    if not isinstance(restrict, bool):
        raise NumericError("restrict is a truth", got=shown(restrict), expected="True or False")
    if restrict and name == "das":
        raise NumericError(
            "restrict keeps the first directions of an order, and those that are learned have none", got="method='das'",
            fix="method='svd', 'mean' or 'gradient', or give directions",
        )  # fmt: skip
    number("lr is a rate", lr, "above 0, at most 1", lambda lr: 0 < lr <= 1)
    return {
        "method": name, "k": whole("k is a number of directions", k, 1), "restrict": restrict,
        "seeds": whole("seeds is a number of fits", seeds, 1), "steps": whole("steps is a number of steps", steps, 1),
        "lr": float(lr), "controls": listed, "draws": whole("draws is a number of random bases", draws, 1),
    }  # fmt: skip


def _basis(lm: Model, directions: Any) -> Basis:
    """An orthonormal basis of directions of the caller's. Raises NodeError for what are none."""
    fits = isinstance(directions, Tensor) and directions.is_floating_point() and directions.layout is torch.strided
    rows = torch.atleast_2d(directions) if fits and not directions.is_meta and 0 < directions.dim() <= 2 else None
    if rows is None or not 0 < len(rows) <= rows.shape[1] or not rows.isfinite().all():
        raise NodeError("not a basis", got=shown(directions), expected="a tensor [d] or [direction, d] of numbers")
    return given(rows.detach().to(lm.device, lm.compute_dtype))


def _digest(basis: Basis | None) -> dict[str, str]:
    return {} if basis is None else {"basis": hashlib.sha256(basis.cpu().numpy().tobytes()).hexdigest()}


def _request(
    lm: Model, pairs: Pairs, held: str | Pairs, site: Any, at: Any, readers: Any, classes: Any,
    basis: Basis | None, settings: dict[str, Any],
) -> Subspaces:  # fmt: skip
    sites = [site] if isinstance(site, str) else several("site is a name, or several", site, "names", NodeError)
    first, other = _parted(pairs, held, settings["restrict"])
    judged = pairs if isinstance(held, str) else held
    role = _role(pairs, at)
    odd = arbitrary(lm.vocabulary, pairs, judged)
    samples = [Sample.of(one, which, role, odd) for one, which in ((pairs, first), (judged, other))]
    units = [_units(lm, one) for one in sites]
    if len({*sites}) < len(sites) or not sites:
        raise NodeError("site names each once", got=shown(sites), expected="different names")
    k = settings["k"] if basis is None else len(basis)
    if readers is not None and not sum(len(reading_slots(lm, slot, readers)) for _, slot in units):
        raise NodeError("readers read states of the stream", got=shown(sites), expected="such as resid_post5")
    given_ = classes_of(pairs.roles, np.stack([pairs.answer, _against(pairs)], 1), classes)
    return Subspaces(
        {OWN: lm}, tuple(sites), tuple(names for names, _ in units), *samples,
        label=[given_[i] for i in samples[0].number], k=k, method=settings["method"], basis=basis, readers=readers,
        controls=tuple(settings["controls"]), restrict=settings["restrict"],
        **{name: settings[name] for name in ("seeds", "steps", "lr", "draws")},
    )  # fmt: skip


def _against(pairs: Pairs) -> Int[np.ndarray, " pair"]:
    return pairs.answer if pairs.against is None else pairs.against


def _parted(pairs: Pairs, held: Any, restrict: bool) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Which pairs bases are made of, and which judge. Raises TokensError where there are none."""
    first = learned_from(pairs, held, "a subspace is", against=not restrict)
    return np.flatnonzero(first), np.flatnonzero(~first) if isinstance(held, str) else np.arange(len(held))


def _role(pairs: Pairs, at: Any) -> str:
    """The one role that `at` names. Raises NumericError for several, and for rows that are no role."""
    if isinstance(at, str) and at == "last":
        return END
    roles = asked_roles(at, [*pairs.roles])
    if len(roles) != 1:
        expected = f"one of {', '.join(pairs.roles)}"
        raise NumericError("a subspace is of one row of each prompt", got=shown(at), expected=expected)
    return roles[0]


def _units(lm: Model, name: Any) -> tuple[tuple[str, ...], Slot]:
    """The nodes that make up a site, and their slot. Raises NodeError for units of several kinds or layers."""
    if not isinstance(name, str):
        raise NodeError("site is a name", got=shown(name), expected='"resid_post5", "MLP5.act", "L5H0.q+L5H1.q"')
    parts = [named(lm, part.strip()) for part in name.split("+")]
    nodes = [str(Site(_HANDED.get(one.kind, one.kind), one.layer, one.head)) for one in parts]
    slot, *others = slots(lm, nodes)
    if others or len({*nodes}) < len(nodes):
        expected = "different units of one kind in one layer"
        raise NodeError("a site is one, or units that lie side by side", got=name, expected=expected)
    return slot.names, slot


def _found(request: Subspaces, most: int, single: bool, job: Job, listener: Listener | None) -> xr.Dataset:
    models, why = dict(request.models), ""
    if request.method == "das" and UNTRAINED in request.controls:
        try:
            models[UNTRAINED] = untrained(request.lm)
        except ModelError as error:
            why = str(error)
    request = replace(request, models=models)
    tally, base, passes = SubspaceTally(request, most, job), request.learned.pairs.base, cost(request)
    stage = f"subspace, {passes:,.0f} passes"
    if listener is not None:  # what it will take is said before it starts
        listener(Progress(stage, 0, len(base), 0, 0.0))
    stream(request.lm, base, tally, len(base), stage, listener, job)
    every = [(_restricted if request.restrict else _exchanged)(request, tally, i) for i in range(len(request.sites))]
    data = _together(request, every, single)
    pairs, solved = _judging(request), tally.found["solved"] > 0
    about = {"row": ("pair", pairs.row), "template": ("pair", _texts(pairs.template or ["all"] * len(pairs)))}
    about |= {name: ("pair", _texts(part)) for name, part in pairs.words(request.lm.tokenizer).items()}
    return data.assign(about).assign_attrs(
        cost=passes / len(base), learned_from=len(request.learned.pairs), templates=int(pairs.cluster.max()) + 1,
        solves=said(int(solved.sum()), len(solved), pairs.chance), looks=len(request.sites),
        rule="; ".join(f"{name}: {rule}" for name, rule in WORDS.items()), **({"untrained": why} if why else {}),
    )  # fmt: skip


def _judging(request: Subspaces) -> Pairs:
    """The pairs that judge, in their own order."""
    return request.judged.pairs.take(np.argsort(request.judged.number))


# Of every variable its axes behind that of sites, its unit, and its equation.
_SAYS: dict[str, tuple[str, str, str]] = {
    "basis": ("direction coordinate", "1", "B, orthonormal; of a smaller site NaN behind its last coordinate"),
    "bases": ("seed direction coordinate", "1", "B of each fit"),
    "agreement": ("seed other_seed", "1", "mean cos² of the principal angles of two fits' subspaces; by chance k/d"),
    "loss": ("seed step", "nats", "mean softplus(ℓ[answer] − ℓ[against]) before each step"),
    "logit_diff": (
        "patch pair", "logits", "ℓ[answer] − ℓ[against] with this patch; of arbitrary that of its own tokens, of "
        "untrained that of its own model, of random the mean over draws",
    ),
    "match": (
        "patch pair", "1", "is `against` (of arbitrary its own token) the top of the vocabulary? Of random: how often"
    ),
    "fldd": ("patch", "%", "100 · Σ (clean − patched) / Σ clean of the logit difference; of arbitrary and untrained "
             "from their own clean runs, beside the same Σ clean"),
    "rate": ("patch", "1", "part of the pairs that match"),
    "share": ("patch", "1", "effect of this patch / effect of the subspace, Σ over pairs"),
    "random_fldd": ("draw", "%", "fldd of each random basis, every pair moved as far as by the subspace"),
    "norm": ("part", "1", "√(Σ ‖part of b_i‖² / k)"),
    "spread": ("part", "1", "SD of the site's values along the part, of both prompts of the pairs that judge"),
    "moved": ("part", "1", "mean length of source − base along the part"),
    "verdict": ("", "", "by the attribute `rule`"),
    "because": ("", "", "the numbers behind the verdict"),
    "kept_diff": ("rank pair", "logits", "ℓ[answer] − ℓ[against] with the value along the first directions alone"),
    "kept": ("rank", "1", "(Σ kept_diff − Σ kept_diff[0]) / (Σ clean − Σ kept_diff[0])"),
    "random_kept": ("draw rank", "1", "the same of random directions"),
    "top": ("rank", "1", "part of the pairs in which the answer is the top of the vocabulary"),
    "variance": ("rank", "1", "part of Σ ‖x − mean‖² along the first directions, of pairs they come from"),
}  # fmt: skip
_INTERVAL = "95 % interval over templates that held pairs are of, so wide that those of all sites hold together"


def _exchanged(request: Subspaces, tally: SubspaceTally, i: int) -> dict[str, Any]:
    """Everything that was found of a site by exchanging values, by name."""
    pairs, odd = (part.take(np.argsort(request.judged.number)) for part in (request.judged.pairs, request.judged.odd))
    assert pairs.against is not None and odd.against is not None  # noqa: S101, PT018 (refused before)
    logit_diff, turned, match = (np.full((len(PATCHES), len(pairs)), np.nan) for _ in range(3))
    made = {name: tally.sets(i, name) for name in request.models}
    own = made[OWN]
    for j, patch in enumerate(PATCHES):
        kind, against = ("odd", odd.against) if patch == "arbitrary" else ("logit_diff", pairs.against)
        sets = own if patch != UNTRAINED else made.get(UNTRAINED, {})
        name = "subspace" if patch == UNTRAINED else patch
        if name in sets:
            logit_diff[j] = sets[name][kind].mean(0)
            turned[j] = sets["clean"][kind][0] - logit_diff[j]
            match[j] = (sets[name]["top"] == against).mean(0)
    clean, who = own["clean"]["logit_diff"][0], str(tally.of(i, "who"))
    spread = tally.of(i, "spread")
    found = evidence(turned, clean, match, pairs.cluster, spread, who == EVERY, len(request.sites))
    random = 100 * (clean - own["random"]["logit_diff"]).sum(1) / clean.sum() if "random" in own else np.zeros(0)
    return {
        **_bases(request, tally, i), "logit_diff": logit_diff, "match": match, "random_fldd": random,
        **_shown("fldd", found.effect, 100.0), **_shown("rate", found.rate), **_shown("share", found.share),
        **{name: tally.of(i, name) for name in ("norm", "spread", "moved")},
        "verdict": np.array(word(found), dtype=object), "because": np.array(because(found, who), dtype=object),
    }  # fmt: skip


def _restricted(request: Subspaces, tally: SubspaceTally, i: int) -> dict[str, Any]:
    """Everything that was found of a site by keeping directions alone."""
    pairs, own = _judging(request), tally.sets(i, OWN)
    clean, kept = own["clean"]["logit_diff"][0], own["subspace"]["logit_diff"]
    found = faithfulness(kept.T, kept[0], clean, pairs.cluster)
    low, high = found.interval
    random = own["random"]["logit_diff"].reshape(request.draws, len(kept), -1).sum(-1)
    best = float(found.whole[-1])
    words = f"{len(kept) - 1} of {tally.basis(i).shape[1]} directions keep {best:.2f} [{low[-1]:.2f}, {high[-1]:.2f}]"
    others = (random - random[:, :1]) / (clean.sum() - random[:, :1])
    beside = f"as many random ones {others[:, -1].mean():.2f}, at most {others[:, -1].max():.2f}"
    return {
        **_bases(request, tally, i), "kept_diff": kept, "kept": found.whole, "kept_low": low, "kept_high": high,
        "top": (own["subspace"]["top"] == pairs.answer).mean(1), "random_kept": others,
        "variance": tally.of(i, "variance"),
        "verdict": np.array(words, dtype=object), "because": np.array(beside, dtype=object),
    }  # fmt: skip


def _bases(request: Subspaces, tally: SubspaceTally, i: int) -> dict[str, np.ndarray]:
    found = {"basis": tally.basis(i)}
    if request.method == "das":
        bases = torch.from_numpy(tally.of(i, f"{OWN} bases")[: request.seeds])
        found["agreement"] = np.array([[alike(one, other) for other in bases] for one in bases])
        found |= {"bases": bases.numpy(), "loss": tally.of(i, f"{OWN} losses")[: request.seeds]}
    return found


def _shown(name: str, of: Numbers, times: float = 1.0) -> dict[str, np.ndarray]:
    return {f"{name}{end}": times * part for end, part in (("", of.value), ("_low", of.low), ("_high", of.high))}


def _together(request: Subspaces, every: list[dict[str, Any]], single: bool) -> xr.Dataset:
    """All sites, each variable on its axes, the one of sites first; without it where there is one alone."""
    variables = {}
    for name in every[0]:
        stem, _, end = name.rpartition("_")
        plain, end = (stem, end) if end in ("low", "high") else (name, "")
        axes, unit, equation = _SAYS[plain]
        parts = _padded([one[name] for one in every])
        equation = f"{'from' if end == 'low' else 'to'}: {_INTERVAL}" if end else equation
        own = tuple(axes.split())
        parts = parts.reshape(parts.shape[1:]) if single else parts
        variables[name] = quantity(own if single else ("site", *own), parts, unit, equation)
    sizes = {axis: size for one in variables.values() for axis, size in zip(one.dims, one.shape, strict=True)}
    axes = {axis: np.arange(size) for axis, size in sizes.items()}
    named_ = {"site": [*request.sites], "patch": [*PATCHES], "part": [*PARTS], "pair": np.sort(request.judged.number)}
    found = xr.Dataset(variables, axes | {axis: part for axis, part in named_.items() if axis in sizes})
    return found.assign_attrs(site=request.sites[0]) if single else found


def _padded(parts: list[np.ndarray]) -> np.ndarray:
    """Arrays of several sites together, smaller ones with NaN behind their last coordinates."""
    shape = np.max([part.shape for part in parts], 0)
    if parts[0].dtype == object or all(part.shape == tuple(shape) for part in parts):
        return np.stack(parts)
    whole_ = np.full((len(parts), *shape), np.nan)
    for one, part in zip(whole_, parts, strict=True):
        one[tuple(map(slice, part.shape))] = part
    return whole_


def _texts(words: Sequence[str]) -> np.ndarray:
    return np.array(words, dtype=object)
