"""What would a state of one model be in another? An affine map by least squares, judged on text that it has not seen.

y ≈ [x, 1] W, W = argmin Σ ‖y − [x, 1] W‖² over positions of the text that is learned from; r2 = 1 − Σ ‖y − [x, 1] W‖² /
Σ ‖y − ȳ‖² over the rest. First positions are left out: in many models they hold a vector far larger than all others,
which would be all that is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import TokensError, counted
from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens
from unwrite.run.edit.trace import recorded
from unwrite.run.loop.job import Job
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.stream import Batch, Listener, batch_size, parts, stream

# Below so small a part of the largest eigenvalue, a direction of the states is taken for none.
_RCOND = 1e-12


@dataclass(frozen=True, eq=False)
class Translation:
    """By place, what makes a state of one model one of the other, and how well that goes on unseen text."""

    weight: Float[Tensor, "place width other"]
    r2: Float[Tensor, " place"]

    def of(self, place: int, states: Float[Tensor, "run d"]) -> Float[Tensor, "run other"]:
        """States at a place, as the other model's."""
        weight = self.weight[place].to(states.device)
        return (states.double() @ weight[:-1] + weight[-1]).to(states)


class _Sums:
    """Sums of products of two models' states, by which a map is fitted or judged."""

    def __init__(self, lm: Model, other: Model, names: Sequence[str], theirs: Sequence[str]):
        self._lm, self._other, self._names, self._theirs = lm, other, names, theirs
        wide, far, n = lm.d_model + 1, other.d_model, len(names)
        self.xx, self.xy = torch.zeros(n, wide, wide).double(), torch.zeros(n, wide, far).double()
        self.yy = torch.zeros(n).double()
        self.kept = Ledger({"xx": self.xx, "xy": self.xy, "yy": self.yy})

    @property
    def count(self) -> int:
        """Positions that were counted."""
        return int(self.xx[0, -1, -1])

    def step(self, batch: Batch) -> None:
        for _, (xx, xy, yy) in parts(batch, self._measured):
            self.xx += xx
            self.xy += xy
            self.yy += yy

    def _measured(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        real = batch.beyond(1)
        mine, yours = recorded(self._lm, batch.ids, self._names), recorded(self._other, batch.ids, self._theirs)
        found = []
        for name, other in zip(self._names, self._theirs, strict=True):
            x, y = mine[name].cpu()[real].double(), yours[other].cpu()[real].double()
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            found.append((x.t() @ x, x.t() @ y, (y * y).sum()))
        xx, xy, yy = (torch.stack(part) for part in zip(*found, strict=True))
        batch.require_sums([xx, xy, yy], "a state")
        return xx, xy, yy

    def r2(self, weight: Tensor) -> Tensor:
        """What part of the variance a map explains."""
        left = self.yy - 2 * (weight * self.xy).sum((1, 2)) + (weight * (self.xx @ weight)).sum((1, 2))
        mean = self.xy[:, -1] / self.xx[:, -1, -1, None]
        return 1 - left / (self.yy - self.count * (mean * mean).sum(-1))


def translation(
    lm: Model, other: Model, tokens: Tokens, names: Sequence[str], theirs: Sequence[str], listener: Listener | None,
    job: Job,
) -> Translation:  # fmt: skip
    """Maps from states of `lm` at `names` to those of `other` at `theirs`, learned from the first half of a text.

    Raises TokensError where the text has too few tokens, or too few documents to judge by others.
    """
    learned, judging = tokens.halves()
    sums, judged = (_Sums(lm, other, names, theirs) for _ in range(2))
    size = min(batch_size(part, tokens, held=2) for part in (lm, other))
    for name, part, tally in (("fit", learned, sums), ("fit judged", judging, judged)):
        stream(lm, part, tally, size, name, listener, job)
    if sums.count <= lm.d_model:
        raise TokensError(
            "too little text to fit a map between two models", got=counted(sums.count, "token") + " to learn from",
            expected=f"more than {lm.d_model + 1}, better ten times as many", fix="give more text as fit",
        )  # fmt: skip
    found = [torch.linalg.lstsq(xx, xy, rcond=_RCOND, driver="gelsd").solution
             for xx, xy in zip(sums.xx, sums.xy, strict=True)]  # fmt: skip
    weight = torch.stack(found)
    return Translation(weight, judged.r2(weight))
