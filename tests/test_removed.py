"""Are many runs in one batch, each with one write changed, the runs that are executed one by one?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from executed import exact
from unwrite.model.capture import Recording
from unwrite.model.fold import fold
from unwrite.model.view import Model
from unwrite.nodes import Node
from unwrite.run.replay import edited
from unwrite.run.replay.clean import Clean, clean
from unwrite.run.replay.removed import Changed, alone, changed, in_order

PINNED: dict[str, dict[str, Any]] = {"opt": {"word_embed_proj_dim": None}}


def together(run: Clean, ids: Tensor, nodes: list[Node]) -> tuple[Changed, Tensor, dict[Any, Tensor]]:
    """All runs in one batch, their final streams, and whatever was recorded of them, by what and where."""
    prompt = torch.arange(len(nodes)) % len(ids)
    change = torch.stack([-run.write(node)[i] for node, i in zip(nodes, prompt, strict=True)])
    change[:, 0] = 0.0  # as in a method that skips what stands first
    runs, seen = Changed(nodes, prompt, change), {}

    def keep(layer: int, n: int, record: Recording) -> None:
        for name in ("z", "gain", "vectors", "stream"):
            for key, part in getattr(record, name).items():
                assert len(part) == n
                seen[name, key] = part.clone()

    return runs, changed(run, alone(run.lm, ids), runs, keep), seen


def ordered(lm: Model, times: int) -> list[Node]:
    nodes = list(lm.parts) * times
    return [nodes[i] for i in in_order(lm, nodes)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
# Scores in float32 round otherwise in a larger batch: on one machine, not on another.
@exact()
def test_every_changed_write_is_executed_as_if_alone(family: str) -> None:
    lm = uw.load(tiny.model(family, 0, torch.float64, **PINNED.get(family, {})))
    ids = torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    run, nodes = clean(lm, ids, fold(lm)), ordered(lm, 2)
    runs, final, seen = together(run, ids, nodes)
    for i, node in enumerate(nodes):
        whole = torch.zeros_like(run.write(node))
        whole[runs.prompt[i]] = runs.change[i]
        want = edited.added(run, node, whole)
        torch.testing.assert_close(final[i], want.stream[lm.states[-1]][runs.prompt[i]], rtol=0, atol=1e-12)
        for (name, key), part in seen.items():
            # What the changed node itself wrote is recorded before the change.
            if i < len(part) and key != node:
                torch.testing.assert_close(part[i], getattr(want, name)[key][runs.prompt[i]], rtol=0, atol=1e-12)
    states = {key for name, key in seen if name == "stream"}
    assert states == set(lm.states[1:])
