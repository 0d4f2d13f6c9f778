"""Where in a text does a write survive? By position, over all prompts, and token by token in a few of them.

The few are the prompts whose survival lies at fixed quantiles of all prompts: what is typical is shown beside what is
extreme. (facts: position is part of what a ratio depends on)
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unwrite.stats.mergeable import ClusterSums

# Positions are gathered into at most so many neighbouring groups; of a prompt so many tokens are shown.
GROUPS = 32
SHOWN = 256
EXAMPLES = (0.05, 0.25, 0.5, 0.75, 0.95)


def at_the_end(
    end: Float[Tensor, "prompt position d"], without: Float[Tensor, "prompt position d"], write: Tensor
) -> Float[Tensor, "what prompt position"]:
    """Row by row, at the end of the stream: ⟨x, o_w⟩, ⟨x − x^{−w}, o_w⟩ and ‖o_w‖²."""
    return torch.stack([(end * write).sum(-1), ((end - without) * write).sum(-1), write.pow(2).sum(-1)])


def first_of_groups(length: int) -> Int[np.ndarray, " group"]:
    """The first position of every group of neighbouring positions."""
    return np.arange(0, length, -(-length // GROUPS))


def by_position(rows: Float[Tensor, "what prompt position"], clusters: np.ndarray) -> ClusterSums:
    """Sums of level and survival over the positions of each group, prompt by prompt."""
    length, groups = rows.shape[-1], len(first_of_groups(rows.shape[-1]))
    size = -(-length // GROUPS)
    sums = nn.functional.pad(rows.double(), (0, groups * size - length)).unflatten(2, (groups, size)).sum(3)
    return ClusterSums.over(clusters, sums[:2].transpose(0, 1), sums[2])


def typical(survival: Float[np.ndarray, " prompt"]) -> Int[np.ndarray, " example"]:
    """The prompts at the quantiles; the same one again where there are fewer."""
    order = np.argsort(survival, kind="stable")
    order = order[: int(np.isfinite(survival).sum())]
    return order[[round(q * (len(order) - 1)) for q in EXAMPLES]]
