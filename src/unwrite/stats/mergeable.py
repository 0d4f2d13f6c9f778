"""How are quantiles, sums and intervals kept so that any order, any sharding and any resume give the same bits?

Quantiles come from integer counts on a fixed grid: integers add in any order. Float sums are added pairwise along a
fixed binary tree over the batch index, so the tree, not the order of arrival, decides every rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# A float32 keeps 23 bits of mantissa; with 17 dropped, every octave of |x| + offset has 2^6 equal bins.
_DROPPED_BITS = 17
_STASH_ROWS = 256
# So many of the largest are kept.
MOST = 3


@dataclass(frozen=True)
class Grid:
    """A fixed grid of bins on the real line, symmetric about 0, finest near 0.

    The bin of x is read off the bits of the float32 |x| + offset: 64 bins to the octave, so a bin is never wider than
    (|x| + offset) / 64. Beyond the bin that holds `limit` there is one to either side, whose value is ±inf.
    """

    offset: float
    limit: float

    @property
    def reach(self) -> int:
        """Number of bins from 0 to one end; the grid has 2 * reach + 1 of them."""
        return _code(self.offset + self.limit) - _code(self.offset) + 1

    @property
    def values(self) -> Float[np.ndarray, " bins"]:
        """The middle of every bin, in float64; -inf and inf at the ends."""
        codes = np.arange(1, self.reach, dtype=np.int32) + _code(self.offset)
        low = (codes << _DROPPED_BITS).view(np.float32).astype(np.float64)
        high = ((codes + 1) << _DROPPED_BITS).view(np.float32).astype(np.float64)
        side = np.append((low + high) / 2 - self.offset, np.inf)
        return np.concatenate([-side[::-1], [0.0], side])

    def index(self, x: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The bin of every x: 0 … 2 * reach, int32. NaN lands beyond the limit: count it before, not here."""
        bits = x.float().view(torch.int32)
        sign = bits.bitwise_right_shift(31)
        code = x.abs().float().add_(self.offset).view(torch.int32).bitwise_right_shift_(_DROPPED_BITS)
        code.sub_(_code(self.offset)).clamp_(max=self.reach)
        return code.bitwise_xor_(sign).sub_(sign).add_(self.reach)


def _code(value: float) -> int:
    return int(np.float32(value).view(np.int32) >> _DROPPED_BITS)


# Half a bin is at most 0.01 · max(1, |x|) (a test walks over every bin). The offset puts 0 and ±1, where exact
# cancellation and lone writers put many values, in the middle of a bin, and no round number on an edge.
RATIO = Grid(offset=0.4302, limit=100.0)
# Lengths of vectors up to 2^40: relative error at most (1 + 2^-40/x) / 128, so 1/128 for all but the tiniest.
LENGTH = Grid(offset=2.0**-40, limit=2.0**40)


class Histogram:
    """Counts of many channels on one grid; memory does not depend on how many values are counted."""

    def __init__(self, channels: int, grid: Grid, rows: int, device: torch.device | str = "cpu"):
        """`rows`: an upper bound of the values per channel, merged histograms included; it decides a count's bits."""
        self.grid = grid
        self._bins = 2 * grid.reach + 1
        width = next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if rows <= torch.iinfo(dtype).max)
        # The extra bin takes what is left out: counted, never mixed in.
        self._counts = torch.zeros(channels, self._bins + 1, dtype=width, device=device)
        self._stash = torch.empty(channels, min(rows, _STASH_ROWS), dtype=torch.int16, device=device)
        self._stashed = 0

    def add(self, values: Float[Tensor, "rows channels"], keep: Bool[Tensor, "rows channels"] | None = None) -> None:
        """Count `values`; those where `keep` is False go to the left-out bin."""
        index = self.grid.index(values)
        if keep is not None:
            index.masked_fill_(~keep, self._bins)
        for part in index.split(self._stash.shape[1]):
            if self._stashed + len(part) > self._stash.shape[1]:
                self._flush()
            self._stash[:, self._stashed : self._stashed + len(part)].copy_(part.t())
            self._stashed += len(part)

    @property
    def counts(self) -> Int[np.ndarray, "channels bins"]:
        """Counts in every bin of the grid."""
        self._flush()
        return self._counts[:, : self._bins].cpu().numpy()

    @property
    def beyond(self) -> Int[np.ndarray, " channels"]:
        """How many values of every channel lie beyond the grid's limit."""
        counts = self.counts
        return counts[:, 0] + counts[:, -1]

    @property
    def left_out(self) -> Int[np.ndarray, " channels"]:
        """How many values of every channel were left out."""
        self._flush()
        return self._counts[:, self._bins].cpu().numpy()

    def take(self, state: Mapping[str, Int[np.ndarray, "channels bins"]]) -> None:
        """Add the `state` of a histogram of the same channels, grid and rows."""
        self._counts += torch.from_numpy(state[""]).to(self._counts)

    def state(self) -> dict[str, Int[np.ndarray, "channels bins"]]:
        """All counts, with that of what is left out."""
        self._flush()
        return {"": self._counts.cpu().numpy()}

    def quantiles(self, q: tuple[float, ...]) -> Float[np.ndarray, "channels q"]:
        """Quantiles of every channel, interpolated between neighbouring order statistics; NaN where nothing counts.

        An order statistic beyond the grid's limit is ±inf, and so is what is interpolated with it.
        """
        counts = self.counts
        # Blocks keep the cumulative sums, twice as wide as the counts, from doubling the memory.
        blocks = np.array_split(counts, max(1, counts.size >> 22))
        return np.concatenate([_quantiles(block, self.grid.values, q) for block in blocks])

    def _flush(self) -> None:
        if self._stashed:
            # 2^20 indices at a time: scatter wants them as int64, four times as wide as the stash.
            for block in torch.arange(len(self._counts)).split(max(1, 2**20 // self._stashed)):
                rows = slice(int(block[0]), int(block[-1]) + 1)
                index = self._stash[rows, : self._stashed].long()
                self._counts[rows].scatter_add_(1, index, torch.ones_like(index, dtype=self._counts.dtype))
            self._stashed = 0


def _quantiles(
    counts: Int[np.ndarray, "channels bins"], values: Float[np.ndarray, " bins"], q: tuple[float, ...]
) -> Float[np.ndarray, "channels q"]:
    # One running count over all channels: a search for (all before this channel) + rank finds a bin of this channel.
    below = counts.ravel().cumsum(dtype=np.int64)
    n = counts.sum(axis=1, dtype=np.int64)
    start = (below[counts.shape[1] - 1 :: counts.shape[1]] - n)[:, None]
    rank = np.maximum(n - 1, 0)[:, None] * np.array(q)
    low, high = (
        values[np.searchsorted(below, start + end(rank).astype(np.int64), side="right") % counts.shape[1]]
        for end in (np.floor, np.ceil)
    )
    weight = rank - np.floor(rank)
    with np.errstate(invalid="ignore"):  # 0 · inf, and -inf + inf, where the neighbours lie beyond opposite limits
        mixed = np.where((weight == 0) | (low == high), low, (1 - weight) * low + weight * high)
    return np.where(n[:, None] > 0, mixed, np.nan)


V = TypeVar("V")


class Tree(Generic[V]):
    """A fold over batches 0, 1, 2, … whose association is fixed: batches 2i and 2i+1 are combined, then their parents.

    Parts may arrive in any order and in several trees that are merged; the total has the same bits. In order, at most
    log2(n) parts are alive. `tensors` takes a value apart by name, `of_tensors` makes it of those; else it is a Tensor.
    """

    def __init__(
        self,
        combine: Callable[[V, V], V],
        tensors: Callable[[V], Mapping[str, Tensor]] = lambda value: {"": cast(Any, value)},
        of_tensors: Callable[[dict[str, Tensor]], V] = lambda named: cast(Any, named[""]),
        device: torch.device | str = "cpu",
    ):
        self._combine, self._tensors, self._of_tensors, self._device = combine, tensors, of_tensors, device
        self._parts: dict[tuple[int, int], V] = {}

    def add(self, batch: int, value: V, level: int = 0) -> None:
        """Put in the value of one batch (or, at a higher level, of 2^level batches)."""
        sibling = self._parts.pop((level, batch ^ 1), None)
        if sibling is None:
            self._parts[level, batch] = value
        else:
            pair = (sibling, value) if batch & 1 else (value, sibling)
            self.add(batch >> 1, self._combine(*pair), level + 1)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays by level, batch and what `tensors` calls the parts of a value."""
        return {
            f"{level}/{batch}/{name}": part.cpu().numpy()
            for (level, batch), value in self._parts.items()
            for name, part in self._tensors(value).items()
        }

    def take(self, state: Mapping[str, np.ndarray]) -> None:
        """Put in the `state` of a tree over other batches."""
        groups: dict[tuple[int, int], dict[str, Tensor]] = {}
        for path, part in state.items():
            level, batch, name = path.split("/", 2)
            groups.setdefault((int(level), int(batch)), {})[name] = torch.from_numpy(part.copy()).to(self._device)
        for (level, batch), tensors in groups.items():
            self.add(batch, self._of_tensors(tensors), level)

    def total(self) -> V:
        """The fold over everything put in. Raises KeyError on an empty tree."""
        parts: Iterator[V] = (self._parts[key] for key in sorted(self._parts, key=lambda key: key[1] << key[0]))
        try:
            total = next(parts)
        except StopIteration:
            raise KeyError("an empty tree has no total") from None
        for part in parts:
            total = self._combine(total, part)
        return total


@dataclass(frozen=True)
class ClusterSums:
    """Sums over clusters (prompts, or documents of several prompts) from which a ratio gets its standard error.

    For pairs (e, w) with per-cluster sums Y = Σ⟨o_e, o_w⟩ and X = Σ‖o_w‖²: n, ΣY, ΣX, ΣY², ΣXY, ΣX² over clusters that
    are complete, and the first and last cluster of the range apart, since a neighbouring range may continue them.
    """

    n: int
    y: Float[Tensor, "node writer"]
    yy: Float[Tensor, "node writer"]
    xy: Float[Tensor, "node writer"]
    x: Float[Tensor, " writer"]
    xx: Float[Tensor, " writer"]
    open: tuple[tuple[int, Tensor, Tensor], ...]

    @staticmethod
    def of(cluster: int, y: Float[Tensor, "node writer"], x: Float[Tensor, " writer"]) -> ClusterSums:
        """The sums of one prompt of `cluster`."""
        zero, none = torch.zeros_like(y), torch.zeros_like(x)
        return ClusterSums(0, zero, zero, zero, none, none, ((cluster, y, x),))

    @staticmethod
    def over(
        clusters: Int[np.ndarray, " prompt"], y: Float[Tensor, "prompt node writer"], x: Float[Tensor, "prompt writer"]
    ) -> ClusterSums:
        """The sums of neighbouring prompts, each of its own cluster."""
        return reduce(add, (ClusterSums.of(int(c), *sums) for c, *sums in zip(clusters, y, x, strict=True)))

    def __add__(self, other: ClusterSums) -> ClusterSums:
        """Sums of two neighbouring ranges of prompts, `self` first."""
        runs = list(self.open)
        for cluster, y, x in other.open:
            if runs[-1][0] == cluster:
                runs[-1] = (cluster, runs[-1][1] + y, runs[-1][2] + x)
            else:
                runs.append((cluster, y, x))
        closed, ends = runs[1:-1], runs[:1] + runs[1:][-1:]
        return ClusterSums(
            self.n + other.n, self.y + other.y, self.yy + other.yy, self.xy + other.xy,
            self.x + other.x, self.xx + other.xx, tuple(ends),
        )._close(closed)  # fmt: skip

    def _close(self, runs: list[tuple[int, Tensor, Tensor]]) -> ClusterSums:
        n, y, yy, xy, x, xx = self.n, self.y, self.yy, self.xy, self.x, self.xx
        for _, run_y, run_x in runs:
            n, y, yy, xy = n + 1, y + run_y, yy + run_y * run_y, xy + run_y * run_x
            x, xx = x + run_x, xx + run_x * run_x
        return ClusterSums(n, y, yy, xy, x, xx, self.open)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {name: getattr(self, name) for name in ("y", "yy", "xy", "x", "xx")}
        for i, (cluster, y, x) in enumerate(self.open):
            named |= {f"open{i}": torch.tensor(cluster), f"open{i}y": y, f"open{i}x": x}
        return {"n": torch.tensor(self.n), **named}

    @staticmethod
    def of_tensors(named: Mapping[str, Tensor]) -> ClusterSums:
        """What `tensors` was made of."""
        ends = [i for i in range(2) if f"open{i}" in named]
        runs = tuple((int(named[f"open{i}"]), named[f"open{i}y"], named[f"open{i}x"]) for i in ends)
        return ClusterSums(int(named["n"]), *(named[name] for name in ("y", "yy", "xy", "x", "xx")), open=runs)

    def closed(self) -> ClusterSums:
        """The same sums when no prompt is to follow: every cluster is complete."""
        return ClusterSums(self.n, self.y, self.yy, self.xy, self.x, self.xx, ())._close(list(self.open))

    def share(self) -> tuple[Float[np.ndarray, "node writer"], Float[np.ndarray, "node writer"]]:
        """ΣY / ΣX and its standard error; NaN where ΣX is 0, no error below two clusters, 0 for one of rounding alone.

        SE² = n/(n-1) · (ΣY² - 2β ΣXY + β² ΣX²) / (ΣX)², the delta-method error of a ratio of sums over independent
        clusters.
        """
        done = self.closed()
        x, y, yy, xy, xx = (part.double().cpu().numpy() for part in (done.x, done.y, done.yy, done.xy, done.xx))
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(x > 0, y / x, np.nan)
            parts = np.stack([yy, -2 * share * xy, share**2 * xx])
            # The root of what rounding leaves of three sums that cancel would be 1e-8, on one machine or another.
            least = np.finfo(float).smallest_subnormal * (1 + xx)  # Squares of less than 1e-154 lose their digits.
            resolved = parts.sum(0) > done.n * (np.finfo(float).eps * np.abs(parts).sum(0) + least)
            spread = np.where(resolved, parts.sum(0), 0.0)
            correction = done.n / (done.n - 1) if done.n > 1 else math.nan
            return share, np.sqrt(correction * spread) / x


@dataclass(frozen=True)
class Largest:
    """Where the largest values of each column were met, at most one of each prompt, the largest first.

    Of equal ones the first; −1 where there was none.
    """

    size: Float[Tensor, "most column"]
    prompt: Int[Tensor, "most column"]
    place: Int[Tensor, "most column"]

    @staticmethod
    def of(prompt: int, size: Float[Tensor, " column"], place: Int[Tensor, " column"]) -> Largest:
        """Of one prompt."""
        return Largest(size[None], torch.where(place < 0, -1, prompt)[None], place[None])

    def __add__(self, other: Largest) -> Largest:
        """Of two ranges of prompts, `self` first."""
        both = [torch.cat(parts) for parts in zip(self._parts, other._parts, strict=True)]
        order = both[0].argsort(dim=0, descending=True, stable=True)[:MOST]
        return Largest(*(part.take_along_dim(order, 0) for part in both))

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.size, self.prompt, self.place

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        return dict(zip(("size", "prompt", "place"), self._parts, strict=True))

    @staticmethod
    def of_tensors(named: Mapping[str, Tensor]) -> Largest:
        """What `tensors` was made of."""
        return Largest(named["size"], named["prompt"], named["place"])
