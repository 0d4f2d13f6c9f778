"""What is said after a prompt that holds a state of another run? Placed at one token, in the first pass alone.

States are the model's own, bit for bit: not centred, as they are under the convention "paper".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.view import Model
from unwrite.nodes import Site
from unwrite.run.answer.spoken import Spoken, spoken
from unwrite.run.edit.edits import Edit
from unwrite.run.edit.trace import recorded

# Where the stream begins, and what a token alone brings to it.
START, EMBED = Site("pre", 0), "embed"


def as_it_is(lm: Model) -> Model:
    """The same model, whose states are not centred."""
    return replace(lm, convention="raw")


def embedded(lm: Model, ids: Int[Tensor, "prompt position"], node: str = EMBED) -> Float[Tensor, "prompt position d"]:
    """What tokens bring to the stream where it begins, or (`pos_embed`) their positions."""
    return recorded(lm, ids, [node])[node] / lm.to_end(lm.states[0])


@dataclass(frozen=True, eq=False)
class Target:
    """A prompt in which a state is put at `row`. `lm` is `as_it_is`."""

    lm: Model
    written: Int[np.ndarray, " position"]
    row: int

    @property
    def ids(self) -> Int[Tensor, "1 position"]:
        """The prompt as a model reads it."""
        return torch.from_numpy(self.written)[None]

    @cached_property
    def positions(self) -> Float[Tensor, " d"] | None:
        """What its position brings to the placeholder, where positions are embedded."""
        if "pos_embed" not in self.lm.nodes:
            return None
        return embedded(self.lm, self.ids, "pos_embed")[0, self.row]

    def own(self, sites: Sequence[Site | str]) -> Float[Tensor, "site d"]:
        """What the placeholder itself has at the sites."""
        there = [site for site in sites if isinstance(site, Site)]
        found = recorded(self.lm, self.ids, [*dict.fromkeys(map(str, there))])
        alone = embedded(self.lm, self.ids)[0, self.row] if EMBED in sites else None
        each = [found[str(site)][0, self.row] if isinstance(site, Site) else alone for site in sites]
        return torch.stack([part for part in each if part is not None])

    def said(
        self, sites: Sequence[Site | str], values: Float[Tensor, "run d"], steps: int, hear: Callable[[int], object]
    ) -> Spoken:
        """What follows where run i has values[i] at sites[i], of which "embed" is the token's place before positions
        are added."""
        if self.positions is not None and EMBED in sites:
            is_alone = torch.tensor([site == EMBED for site in sites], device=values.device)
            values = torch.where(is_alone[:, None], values + self.positions, values)
        real: list[Site] = [START if not isinstance(site, Site) else site for site in sites]

        def edits(length: int) -> list[Edit]:
            return [_set(site, [own == site for own in real], self.row, values, length) for site in dict.fromkeys(real)]

        return spoken(self.lm, self.ids.expand(len(real), -1), steps, edits, hear)


def _set(site: Site, runs: list[bool], row: int, values: Float[Tensor, "run d"], length: int) -> Edit:
    at = torch.zeros(len(runs), length, dtype=torch.bool)
    at[:, row] = torch.tensor(runs)
    return Edit.set(str(site), values, at=at)
