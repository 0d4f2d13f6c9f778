"""When may a write be called erased? Rules as data, from sums by document: effect, interval, controls, many writers.

Documents are independent, prompts of one are not: every estimate has a jackknife over documents and a t interval. What
is ordinary at a depth is what becomes of decoys there, which are run exactly as writes are; how many writers would look
so special by chance is what decoys say, too (target–decoy competition). (facts: erasure on real models, §2 and §3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats

from unwrite.stats.jackknife import reach

BOUNDS = ("low", "median", "high")


def _rule(value: Any, why: str) -> Any:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Criteria:
    """What each word asks for. A word that does not get all that it asks for is not said."""

    documents: int = _rule(
        5, "documents are independent, prompts of one are not: fewer give no interval worth the name"
    )
    gap: float = _rule(0.1, "a difference to ordinary writes that is smaller is none, however sure it may be …")
    part: float = _rule(0.25, "… nor one that is a smaller part of what survives of ordinary writes")
    q: float = _rule(0.1, "so many of the writers that are called special may be so by chance")
    most: float = _rule(0.5, "of a write that is erased at most this survives, and at most this part of the ordinary")
    wide: float = _rule(1.0, "where ordinary writes end farther apart than this, they are no measure")
    more: float = _rule(1.1, "of a write that is amplified surely more than this survives")
    channels: int = _rule(3, "no word hangs on so few channels, those that hold most of all that is written …")
    rest: float = _rule(0.5, "… unless less of the write's energy than this is left without them")
    near: int = _rule(20, "so many decoys, of the nearest layers, say how far ordinary writes lie apart")
    middle: tuple[float, float] = _rule((0.05, 0.95), "between these quantiles of the decoys lies what is ordinary")


# What a verdict says, in the order in which it is asked; the first that holds is said.
WORDS = {
    "undecided": "fewer documents than it takes, or ordinary writes there are no measure; or none of what follows; or "
    "another word without the three channels that hold most",
    "filled in": "surely below ordinary writes by all controls, at that q; later nodes write it where it is missing",
    "erased": "as far below, little of it is left, and later nodes write against it because it is there",
    "reduced": "as far below, but much is left, or nodes and whole blocks do not both say which of the two it is",
    "amplified": "surely above ordinary writes by every control, at that q, and surely more of it than was written",
    "kept": "as far above, but no more than was written",
    "like others": "within what is ordinary, its interval no wider; or surely nearer than a difference that is one",
}


CRITERIA = Criteria()
# The median absolute deviation of a standard normal distribution.
_NORMAL = float(stats.norm.ppf(0.75))


@dataclass(frozen=True, eq=False)
class Interval:
    """A number for every writer, and its t interval over documents."""

    value: Float[np.ndarray, "*writer"]
    low: Float[np.ndarray, "*writer"]
    high: Float[np.ndarray, "*writer"]

    @property
    def ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The number, and from where to where it may be."""
        return self.value, self.low, self.high

    @property
    def excludes_0(self) -> Bool[np.ndarray, "*writer"]:
        """Does the interval lie on one side of 0?"""
        return (self.low > 0) | (self.high < 0)


def by_document(sums: Shaped[np.ndarray, "prompt ..."], cluster: Int[np.ndarray, " prompt"]) -> np.ndarray:
    """Sums over the prompts of every document."""
    found, which = np.unique(cluster, return_inverse=True)
    whole = np.zeros((len(found), *sums.shape[1:]))
    np.add.at(whole, which, sums)
    return whole


def left_out(sums: Float[np.ndarray, "document ..."]) -> Float[np.ndarray, "set ..."]:
    """Sums over all documents, and over all but each."""
    return np.concatenate([sums.sum(0, keepdims=True), sums.sum(0) - sums])


def estimate(sets: Float[np.ndarray, "set ..."]) -> Interval:
    """From a statistic of all documents and of all but each: its value and jackknife t interval at 95 %.

    None below two documents.
    """
    n = len(sets) - 1
    if n < 2:
        return Interval(sets[0], *(np.full(sets.shape[1:], np.nan),) * 2)
    half = reach(sets[1:])
    return Interval(sets[0], sets[0] - half, sets[0] + half)


def ratio(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Σ⟨·, o_w⟩ / Σ‖o_w‖²; NaN where nothing was written."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x > 0, y / x, np.nan)


@dataclass(frozen=True, eq=False)
class Ordinary:
    """What becomes of ordinary writes in the place of each writer: the level of its decoys, and how far they lie apart.

    `level` the median of a writer's own decoys, which have its place and its size; `low` and `high` where the middle of
    decoys lies about theirs, in the nearest layers, and `spread` their scaled median absolute deviation.
    """

    level: Float[np.ndarray, "set writer"]
    low: Float[np.ndarray, " writer"]
    high: Float[np.ndarray, " writer"]
    spread: Float[np.ndarray, " writer"]

    @property
    def range(self) -> Float[np.ndarray, "writer bound"]:
        """What is ordinary, as `BOUNDS` names it."""
        return np.stack([self.low, self.level[0], self.high], -1)

    @staticmethod
    def of(
        decoys: Float[np.ndarray, "set writer draw"], depth: Int[np.ndarray, " writer"], rules: Criteria
    ) -> Ordinary:
        """From the survival of every writer's decoys."""
        level, apart = np.median(decoys, -1), from_others(decoys[0])
        low, high, spread = (np.full(len(depth), np.nan) for _ in range(3))
        for w in range(len(depth)):
            pool = apart[_near(depth, w, apart.shape[1], rules.near)].ravel()
            if len(pool := pool[np.isfinite(pool)]):
                low[w], high[w] = np.quantile(pool, rules.middle) + level[0, w]
                spread[w] = np.median(np.abs(pool - np.median(pool))) / _NORMAL
        return Ordinary(level, low, high, spread)


def _near(depth: Int[np.ndarray, " writer"], w: int, draws: int, enough: int) -> Bool[np.ndarray, " writer"]:
    """Writers of a writer's own layer, and of so many around it that their decoys are enough."""
    away = np.abs(depth - depth[w])
    counts = np.cumsum(np.bincount(away)) * draws
    reach = int(np.argmax(counts >= enough)) if counts[-1] >= enough else int(away.max())
    return away <= reach


def from_others(decoys: Float[np.ndarray, "*set writer draw"]) -> Float[np.ndarray, "*set writer draw"]:
    """How far every decoy is from the median of the other decoys of its writer; NaN of a single one."""
    draws = decoys.shape[-1]
    if draws == 1:
        return np.full(decoys.shape, np.nan)
    others = [np.median(np.delete(decoys, i, -1), -1) for i in range(draws)]
    return decoys - np.stack(others, -1)


def special(writers: Float[np.ndarray, " writer"], decoys: Float[np.ndarray, " decoy"]) -> Float[np.ndarray, " writer"]:
    """q of every writer by target–decoy competition: how many as low as it are so by chance, of those as low as it.

    q = min over thresholds t ≥ z of (1 + decoys ≤ t) / decoys · writers / (writers ≤ t).
    """
    q = np.full(len(writers), np.nan)
    known, against = np.isfinite(writers), np.sort(decoys[np.isfinite(decoys)])
    z = writers[known]
    if not len(z) or not len(against):
        return q
    order = np.argsort(z, kind="stable")
    at = z[order]
    as_low = np.searchsorted(at, at, side="right")
    rate = (1 + np.searchsorted(against, at, side="right")) / len(against) * len(at) / as_low
    best = np.minimum.accumulate(rate[::-1])[::-1].clip(max=1.0)
    q[np.flatnonzero(known)[order]] = best
    return q


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums by document of what survives of writes and of stand-ins for them.

    `y` and `x` [document, writer, stand-in], the write itself first; `columns`: which stand-ins are each control's;
    `depth` the layer of each writer. `along` and `acts` [document, writer, node]: what each later node writes along
    the write, and how much of that because it is there; `block` the layer of each node.
    """

    y: Float[np.ndarray, "document writer put"]
    x: Float[np.ndarray, "document writer put"]
    columns: dict[str, slice]
    depth: Int[np.ndarray, " writer"]
    along: Float[np.ndarray, "document writer node"]
    acts: Float[np.ndarray, "document writer node"]
    block: Int[np.ndarray, " node"]

    @property
    def documents(self) -> int:
        """Number of independent documents."""
        return len(self.y)

    def of(self, documents: Sequence[int]) -> Sums:
        """The same of some of the documents."""
        parts = {name: getattr(self, name)[[*documents]] for name in ("y", "x", "along", "acts")}
        return replace(self, **parts)

    def survival(self) -> Float[np.ndarray, "set writer put"]:
        """Of all documents, and of all but each."""
        return ratio(left_out(self.y), left_out(self.x))


@dataclass(frozen=True, eq=False)
class Judged:
    """What is said of every writer, and from what."""

    survival: Interval
    gap: dict[str, Interval]
    ordinary: dict[str, Ordinary]
    z: Float[np.ndarray, " writer"]
    q: Float[np.ndarray, " writer"]
    q_above: Float[np.ndarray, " writer"]
    cause: Int[np.ndarray, " writer"]
    verdict: list[str]
    hangs: Bool[np.ndarray, " writer"]


def judge(sums: Sums, rules: Criteria = CRITERIA, fewer: Sums | None = None) -> Judged:
    """A verdict on every writer; where `fewer` are the same sums without a few channels, only what holds of both."""
    found = _judged(sums, rules)
    if fewer is None:
        return found
    left = ratio(fewer.x[..., 0].sum(0), sums.x[..., 0].sum(0))
    other = np.array(found.verdict) != np.array(_judged(fewer, rules).verdict)
    hangs = other & (left >= rules.rest) & (np.array(found.verdict) != "undecided")
    words = zip(found.verdict, hangs, strict=True)
    return replace(found, verdict=["undecided" if hang else word for word, hang in words], hangs=hangs)


def _judged(sums: Sums, rules: Criteria) -> Judged:
    whole = sums.survival()
    ordinary = {name: Ordinary.of(whole[..., part], sums.depth, rules) for name, part in sums.columns.items()}
    gap = {name: estimate(whole[..., 0] - part.level) for name, part in ordinary.items()}
    first = next(iter(sums.columns))
    # Where ordinary writes are no measure, neither is a distance from them: nobody there competes.
    spread = np.where(ordinary[first].high - ordinary[first].low <= rules.wide, ordinary[first].spread, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = gap[first].value / spread
        against = (from_others(whole[0, :, sums.columns[first]]) / spread[:, None]).ravel()
    nobody = np.zeros(len(sums.depth), dtype=bool)
    found = Judged(
        estimate(whole[..., 0]), gap, ordinary, z, special(z, against), special(-z, -against), by_erasing(sums), [],
        nobody,
    )  # fmt: skip
    for w in range(len(sums.depth)):
        found.verdict.append(_word(found, w, sums.documents, rules))
    return found


def with_decoy(sums: Sums, control: str, draw: int) -> Sums:
    """The same question with one decoy of every writer asked as if it were the writer, and as a decoy left out."""
    part = sums.columns[control]
    chosen, others = part.start + draw, [i for i in range(part.start, part.stop) if i != part.start + draw]
    order = [chosen, *others, *(i for i in range(1, sums.y.shape[2]) if not part.start <= i < part.stop)]
    columns, at = {}, len(others) + 1
    for name, own in sums.columns.items():
        n = own.stop - own.start
        columns[name] = slice(1, len(others) + 1) if name == control else slice(at, at + n)
        at += 0 if name == control else n
    return replace(sums, y=sums.y[..., order], x=sums.x[..., order], columns=columns)


def cuts(along: np.ndarray, acts: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(erased, filled in) [set, writer] of sums by set of documents: what is written against the write because it is
    there, min(a, 0) − min(b, 0), and what is written along it only when it is gone, max(a, 0) − max(b, 0).

    a = `along`, b = a − `acts`. Their sum is Σ acts whichever way nodes are put together; they themselves are not.
    """
    erased, filled_in = (part.sum(-1) for part in parted(along, acts))
    return ratio(erased, x), ratio(filled_in, x)


def parted(along: np.ndarray, acts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of every node, and as sums."""
    a, b = along, along - acts
    return np.minimum(a, 0) - np.minimum(b, 0), np.maximum(a, 0) - np.maximum(b, 0)


def together(part: Float[np.ndarray, "*rest node"], block: Int[np.ndarray, " node"]) -> np.ndarray:
    """Sums over the nodes of every block."""
    return np.stack([part[..., block == layer].sum(-1) for layer in np.unique(block)], -1)


def by_erasing(sums: Sums) -> Int[np.ndarray, " writer"]:
    """−1: later nodes write against the write because it is there; +1: they fill in for it when it is gone; 0: neither.

    Said only where the interval of the difference of both parts excludes 0 and whole blocks say the same.
    """
    x, along, acts = (left_out(part) for part in (sums.x[..., 0], sums.along, sums.acts))
    of_nodes, of_blocks = (
        estimate(erased - filled_in)
        for erased, filled_in in (
            cuts(along, acts, x), cuts(together(along, sums.block), together(acts, sums.block), x)
        )
    )  # fmt: skip
    agree = np.sign(of_nodes.value) == np.sign(of_blocks.value)
    return np.where(of_nodes.excludes_0 & agree, np.sign(of_nodes.value), 0).astype(int)


def _word(found: Judged, w: int, documents: int, rules: Criteria) -> str:
    first = next(iter(found.ordinary))
    ordinary, value, low, high = (
        found.ordinary[first], *(part[w] for part in (found.survival.value, found.survival.low, found.survival.high)),
    )  # fmt: skip
    if documents < rules.documents or not ordinary.high[w] - ordinary.low[w] <= rules.wide or not np.isfinite(high):
        return "undecided"
    if _apart(found, w, -1, rules) and found.q[w] <= rules.q:
        if found.cause[w] > 0:
            return "filled in"
        little = high <= rules.most and value <= rules.most * max(ordinary.level[0, w], 0)
        return "erased" if found.cause[w] < 0 and little else "reduced"
    if _apart(found, w, 1, rules) and found.q_above[w] <= rules.q:
        return "amplified" if low > rules.more else "kept"
    gap, enough = found.gap[first], _enough(ordinary, w, rules)
    # As certain as ordinary writes are alike, it is one of them.
    among = ordinary.low[w] <= value <= ordinary.high[w] and high - low <= ordinary.high[w] - ordinary.low[w]
    return "like others" if among or max(-gap.low[w], gap.high[w]) < enough else "undecided"


def _apart(found: Judged, w: int, side: int, rules: Criteria) -> bool:
    """Is the write on this side of what is ordinary by every control, by enough, and surely so?"""
    for control, gap in found.gap.items():
        enough = _enough(found.ordinary[control], w, rules)
        if not (side * gap.value[w] >= enough and side * (gap.low if side > 0 else gap.high)[w] > 0):
            return False
    return True


def _enough(ordinary: Ordinary, w: int, rules: Criteria) -> float:
    """A difference to ordinary writes that is one."""
    return max(rules.gap, rules.part * abs(float(ordinary.level[0, w])))
