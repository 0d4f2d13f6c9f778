"""What would each MLP alone write if a vector were not in the stream that it reads?

An MLP is no linear map, so it is run again without the vector: D = MLP(x) − MLP(x − vector), its own norms free. Each D
is about one reader: every other node stays as it was, so what MLPs hand on to each other is in no D, and the D of all
MLPs do not add up to what a run without the vector changes. (facts: measuring erasure, §6 and §8)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.model.capture import recording
from unwrite.model.hooks import before, hooked
from unwrite.nodes import Node
from unwrite.run.replay.clean import Clean


@torch.no_grad()
def one_reader(
    run: Clean, vector: Float[Tensor, "prompt position d_model"], layers: Sequence[int]
) -> dict[int, Float[Tensor, "prompt position d_model"]]:
    """D: what the MLP of each of these layers writes because `vector` is in the stream that it reads.

    Each block is called as in the clean run. Where attention and MLP read one state the block takes in x − vector, and
    its attention is not looked at; elsewhere what stands between the two does, and its attention is the clean one.
    """
    lm = run.lm
    with ExitStack() as stack:
        record = stack.enter_context(recording(lm, run.folded))
        for layer in (lm.layers[index] for index in layers):
            module = layer.block if lm.parallel or layer.mid is None else layer.mid
            stack.enter_context(hooked([before(module, partial(_without, vector))]))
            args, kwargs = run.calls[layer.index]
            layer.block(*args, **kwargs)
    names = {index: Node("mlp", index) for index in layers}
    return {index: run.record.vectors[node] - record.vectors[node] for index, node in names.items()}


def _without(vector: Tensor, x: Tensor) -> Tensor:
    # OPT flattens prompts and positions before its MLP.
    return (x - vector.reshape(x.shape).to(x.device)).to(x.dtype)
