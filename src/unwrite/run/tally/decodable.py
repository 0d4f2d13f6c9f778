"""How much of a write's token part does a linear map still find in the stream? Ridge regression on held-out prompts.

A token part is what is left of a vector without its mean at the same position over the prompts of its half: y of the
write, x of the stream. ŷ = xB, B = (X'X + λ)⁻¹ X'Y on one half, R² = 1 − Σ‖y − ŷ‖² / Σ‖y‖² on the other; each half is
predicted from the other once, and errors and energies are summed over both. Halves are whole documents, taken in turns.
λ is RIDGE times the mean eigenvalue of X'X: it only keeps the inverse stable, and is fixed so that nothing is chosen on
held-out prompts. Everything needed is a sum over rows, so prompts stream by. A vector may go while what it says stays,
and the other way round. (facts: measuring erasure, §8)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unwrite.errors import counted
from unwrite.model.view import Model
from unwrite.nodes import Location, Node
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch

RIDGE = 0.01
_BYTES = 2**30


@dataclass(frozen=True)
class Moments:
    """Sums over the rows of each half, in float64: of states x and of the write w, the latter in `rank` coordinates."""

    xx: Float[Tensor, "half state d_model d_model"]
    xw: Float[Tensor, "half state d_model rank"]
    x: Float[Tensor, "half state position d_model"]
    w: Float[Tensor, "half position rank"]
    ww: Float[Tensor, " half"]

    @staticmethod
    def zero(states: int, length: int, d_model: int, rank: int, device: torch.device) -> Moments:
        """Sums over no rows."""
        shapes = ((states, d_model, d_model), (states, d_model, rank), (states, length, d_model), (length, rank), ())
        return Moments(*(torch.zeros(2, *shape, dtype=torch.float64, device=device) for shape in shapes))

    def take(self, other: Moments) -> None:
        """Add other rows in place: a fixed tree of sums would keep many copies of matrices this large."""
        for name, total in vars(self).items():
            total += getattr(other, name)


class Decoding:
    """The moments of one writer at as many states of the stream as memory has room for."""

    def __init__(self, lm: Model, tokens: Tokens, writer: Node, skip: int, basis: Float[Tensor, "d_model rank"]):
        """`basis` spans what the writer can write; without a column everything."""
        self.lm, self.basis = lm, basis if basis.shape[1] else None
        self._half = np.unique(tokens.cluster, return_inverse=True)[1] % 2
        position = np.arange(tokens.length)
        counted = (position < tokens.lengths[:, None]) & (position >= skip)
        count = np.stack([counted[self._half == half].sum(0) for half in (0, 1)])
        # A position that one prompt of a half reaches has no mean over others: its rows are left out.
        self._count = torch.from_numpy(np.where(count < 2, 0, count)).to(lm.device)
        rank = basis.shape[1] or lm.d_model
        # Twice: the sums so far, and those of the batch that is being computed.
        each = 2 * 2 * 8 * lm.d_model * (lm.d_model + rank + tokens.length)
        self.states = _spread(lm, writer, _BYTES // each) if self._rows > lm.d_model else ()
        self._shape = (len(self.states), tokens.length, lm.d_model, rank, lm.device)
        self._total = Moments.zero(*self._shape)
        self.kept = Ledger(vars(self._total))

    @property
    def _rows(self) -> int:
        """Rows that a map is fitted to, or judged by: the fewer of the two."""
        return int(self._count.sum(1).min())

    @property
    def note(self) -> str:
        """Why something is NaN, "" if nothing is."""
        if not self._rows:
            return "two prompts and two held-out prompts of other documents are needed at one position"
        if self._rows <= self.lm.d_model:
            return f"{counted(self._rows, 'row')} of each half of the documents, {self.lm.d_model} channels"
        left_out = len(self.lm.states) - len(self.states)
        return f"{left_out} locations left out: their matrices would pass {_BYTES / 2**30:.0f} GiB" if left_out else ""

    def measure(
        self,
        batch: Batch,
        stream: Mapping[Location, Tensor],
        write: Float[Tensor, "prompt position d_model"],
        kept: Bool[Tensor, "prompt position"],
    ) -> Moments:
        """The moments of one batch. Nothing is added yet."""
        found = Moments.zero(*self._shape)
        own = torch.zeros(len(kept), dtype=torch.long, device=kept.device)
        own[: batch.real] = torch.from_numpy(self._half[batch.first : batch.first + batch.real]).to(own)
        written = (write if self.basis is None else write @ self.basis).double()
        for half in (0, 1):
            rows = kept & (own == half)[:, None] & (self._count[half] > 0)
            # Masked and summed, not added to an index, which an accelerator does in any order.
            found.w[half] = (written * rows[..., None]).sum(0)
            w = written[rows]
            found.ww[half] = w.pow(2).sum()
            for i, state in enumerate(self.states):
                whole = stream[state].double()
                found.x[half, i] = (whole * rows[..., None]).sum(0)
                x = whole[rows]
                found.xx[half, i], found.xw[half, i] = x.t() @ x, x.t() @ w
        return found

    def add(self, moments: Moments) -> None:
        """Take in what `measure` found."""
        self._total.take(moments)

    def found(self) -> Float[np.ndarray, " location"]:
        """Held-out R² by location; NaN where nothing was kept, or where the write has no token part."""
        r2 = np.full(len(self.lm.states), np.nan)
        for i, state in enumerate(self.states):
            r2[self.lm.states.index(state)] = _held_out(self._total, i, self._count.double(), self._least)
        return r2

    @property
    def _least(self) -> float:
        """A token part with less energy than this is rounding."""
        return torch.finfo(self.lm.compute_dtype).eps * float(self._total.ww.sum())


def _spread(lm: Model, writer: Node, fit: int) -> Sequence[Location]:
    """All states, or where they are too many, as many as fit from right after the write to the end, evenly spread."""
    if fit >= len(lm.states):
        return lm.states
    after = lm.states.index(lm.after(writer))
    places = np.linspace(len(lm.states) - 1, after, max(fit, 0)).round().astype(int)
    return tuple(lm.states[i] for i in sorted(set(places.tolist())))


def _held_out(total: Moments, i: int, count: Float[Tensor, "half position"], least: float) -> float:
    xx, xy, yy = _token_parts(total, i, count)
    error = energy = 0.0
    for train, test in ((0, 1), (1, 0)):
        ridge = (RIDGE * xx[train].diagonal().mean()).clamp_min(torch.finfo(xx.dtype).tiny)
        found = torch.linalg.solve(xx[train] + ridge * torch.eye(len(xx[train])).to(xx), xy[train])
        error += float(yy[test] - 2 * (found * xy[test]).sum() + (found * (xx[test] @ found)).sum())
        energy += float(yy[test])
    return 1 - error / energy if energy > least else float("nan")


def _token_parts(
    total: Moments, i: int, count: Float[Tensor, "half position"]
) -> tuple[Float[Tensor, "half d_model d_model"], Float[Tensor, "half d_model rank"], Float[Tensor, " half"]]:
    """X'X, X'Y and Σ‖y‖² of both halves: what the means at each position make up is taken out of the sums."""
    x, each = total.x[:, i], count.clamp_min(1)[..., None]
    xx = total.xx[:, i] - x.transpose(1, 2) @ (x / each)
    xy = total.xw[:, i] - x.transpose(1, 2) @ (total.w / each)
    return xx, xy, total.ww - (total.w.pow(2) / each).sum((1, 2))
