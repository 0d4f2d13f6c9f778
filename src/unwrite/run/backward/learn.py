"""Which numbers make a loss small? One optimiser for whatever is learned: gains of a mask, the basis of a subspace.

Adam (Kingma and Ba 2015, arXiv 1412.6980) with a rate that falls linearly to 0; after each step the numbers are put
back to where they may lie (a clamp, a QR). Several fits are learned side by side: the first axis of every parameter is
theirs, and no fit sees another. Of each the best iterate stays, not the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NumericError
from unwrite.run.loop.checkpoint import Arrays

Parameters = dict[str, Float[Tensor, "fit ..."]]
# A part of the loss of each fit, and its slope at the parameters.
Sloped = tuple[Float[Tensor, " fit"], Parameters]


@dataclass(frozen=True, eq=False)
class Problem:
    """What is learned: `start` at the first step, and the parts of the `loss` and their slopes at any parameters.

    `allowed` puts parameters where they may lie; `score` says how good each fit is, the more the better, by what its
    loss does not see (None: by the loss).
    """

    start: Parameters
    loss: Callable[[Parameters], Iterable[Sloped]]
    allowed: Callable[[Parameters], Parameters] = lambda parameters: parameters
    score: Callable[[Parameters], Float[Tensor, " fit"]] | None = None


def sloped(parameters: Parameters, loss: Callable[[Parameters], Float[Tensor, " fit"]]) -> Sloped:
    """A part of the loss of each fit, and its slope: one forward pass and one backward."""
    with torch.enable_grad():
        leaves = {name: part.detach().requires_grad_() for name, part in parameters.items()}
        value = loss(leaves)
        found = torch.autograd.grad(value.sum(), [*leaves.values()], allow_unused=True)
    slopes = [torch.zeros_like(x) if slope is None else slope for x, slope in zip(leaves.values(), found, strict=True)]
    return value.detach(), dict(zip(leaves, slopes, strict=True))


class Learning:
    """`steps` steps of Adam. `kept` is all that another process needs to go on to the same bits."""

    def __init__(self, problem: Problem, steps: int, rate: float):
        self._problem, self._steps, self._rate = problem, steps, rate
        self._now = _cloned(problem.allowed(problem.start))
        self._best = _cloned(self._now)
        self._adam = torch.optim.Adam([*self._now.values()], lr=rate)
        fits = next(iter(self._now.values()))
        self._score = fits.new_full((len(fits),), -torch.inf)
        self._losses: list[Tensor] = []
        self.kept: Arrays = {}

    @property
    def done(self) -> int:
        """Steps that are done."""
        return len(self._losses)

    def run(self, tick: Callable[[int], object] = lambda _: None) -> tuple[Parameters, Float[Tensor, "fit step"]]:
        """The best parameters of each fit, and its loss before every step. Goes on from what is `kept`.

        `tick` is told how many steps are done. Raises NumericError where a loss or its slope is no number.
        """
        if self.kept:
            self._take(self.kept)
        while self.done < self._steps:
            self._step()
            self._keep()
            tick(self.done)
        self._choose(self._total()[0])
        return self._best, torch.stack(self._losses, 1)

    def _step(self) -> None:
        loss, slopes = self._total()
        self._choose(loss)
        for group in self._adam.param_groups:
            group["lr"] = self._rate * (1 - self.done / self._steps)
        for name, part in self._now.items():
            part.grad = slopes[name]
        self._adam.step()
        allowed = self._problem.allowed({name: part.detach() for name, part in self._now.items()})
        for name, part in self._now.items():
            part.copy_(allowed[name])
        self._losses.append(loss)

    def _total(self) -> Sloped:
        """The whole loss of every fit and its slope, all parts added up in their order."""
        loss, slopes = reduce(_plus, self._problem.loss(_cloned(self._now)))
        if not all(part.isfinite().all() for part in (loss, *slopes.values())):
            raise NumericError(
                f"the loss or its slope is not finite at step {self.done}", fix="load the model in float32, or lower lr"
            )
        return loss, slopes

    def _choose(self, loss: Float[Tensor, " fit"]) -> None:
        """Keep what is best so far of each fit."""
        score = self._problem.score
        found = -loss if score is None else score(_cloned(self._now))
        better = found > self._score
        self._score = torch.where(better, found, self._score)
        for name, part in self._now.items():
            self._best[name] = torch.where(_along(better, part), part, self._best[name])

    def _keep(self) -> None:
        self.kept.clear()
        whole: dict[str, Tensor] = {"score": self._score, "losses": torch.stack(self._losses)}
        for name, part in self._now.items():
            whole |= {f"now {name}": part, f"best {name}": self._best[name]}
            whole |= {f"adam {name} {of}": one for of, one in self._adam.state[part].items()}
        self.kept |= {name: part.detach().cpu().numpy().copy() for name, part in whole.items()}

    def _take(self, kept: Mapping[str, Any]) -> None:
        found = {name: torch.from_numpy(part.copy()) for name, part in kept.items()}
        self._score = found["score"].to(self._score)
        self._losses = [*found["losses"].to(self._score).unbind(0)]
        for name, part in self._now.items():
            part.copy_(found[f"now {name}"])
            self._best[name] = found[f"best {name}"].to(part)
            own = f"adam {name} "
            moments = {path[len(own) :]: one for path, one in found.items() if path.startswith(own)}
            # Adam counts its steps where they are cheap to read.
            self._adam.state[part] = {of: one if of == "step" else one.to(part) for of, one in moments.items()}


def _plus(one: Sloped, other: Sloped) -> Sloped:
    return one[0] + other[0], {name: part + other[1][name] for name, part in one[1].items()}


def _cloned(parameters: Mapping[str, Tensor]) -> Parameters:
    return {name: part.detach().clone() for name, part in parameters.items()}


def _along(fit: Tensor, like: Tensor) -> Tensor:
    """A truth of each fit, beside a parameter."""
    return fit.view(-1, *[1] * (like.dim() - 1))
