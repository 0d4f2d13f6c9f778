"""Which directions of a site does what reads it see at all? The column space of a reader; all else is its kernel.

Of hidden activations, and of what heads hand on, the reader is a matrix of the weights. Of a state of the stream it is
whichever queries, keys or values are named: their slopes, with the scale of the norm before them held, at a few tokens
of any text (norms and rotations behind the matrix turn what comes out of it, and see nothing else of what goes in).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import NodeError
from unwrite.model.hooks import Point, before, hooked, leaf
from unwrite.model.placed import decode
from unwrite.model.projections import is_sized, matrix_of
from unwrite.model.view import Model
from unwrite.run.backward.rules import RULES, put
from unwrite.run.backward.slopes import reading, sloping
from unwrite.run.edit.slots import Slot, slots
from unwrite.run.edit.subspace import spanned

# Who reads a site of which all readers are known.
EVERY = "the projection behind it"
_ATTENDED = ("q", "k", "v", "shared_k", "shared_v")
# The norm of a query hides the direction that the query has; another token's has another one.
_TOKENS = 4


def reading_slots(lm: Model, slot: Slot, readers: Sequence[str] | None) -> tuple[Slot, ...]:
    """The slots of the readers that are named of a slot in the stream; of any other none.

    Raises NodeError for those that do not read it.
    """
    if readers is None or not slot.streams:
        return ()
    asked = slots(lm, readers)
    for one in asked:
        if one.kind not in _ATTENDED or one.layer < slot.layer + (slot.at is not None):
            raise NodeError(
                f"{one.names[0]} is no reader of {slot.sites[0]}", expected="queries, keys or values of later heads",
                fix=f"such as L{len(lm.layers) - 1}H0.q",
            )  # fmt: skip
    return asked


def seen(lm: Model, slot: Slot, readers: Sequence[str] | None) -> tuple[Float[Tensor, "column d"] | None, str]:
    """An orthonormal basis of what is seen of a slot's units, and who sees it; None, and why, where nobody is known.

    Raises NodeError for readers that do not read the slot.
    """
    own = _projection(lm, slot)
    if own is not None:
        return spanned(own.mT), EVERY
    asked = reading_slots(lm, slot, readers)
    if not asked:
        return None, "no readers of the stream are named" if slot.streams else "its reader is no matrix"
    return spanned(torch.cat([_slopes(lm, one) for one in asked])), ", ".join(n for one in asked for n in one.names)


def _projection(lm: Model, slot: Slot) -> Float[Tensor, "d out"] | None:
    """The matrix that reads all units of a slot, one behind another, where they are what a projection is given."""
    if not isinstance(slot.at, Point) or not slot.at.before or not is_sized(slot.at.module):
        return None
    matrix = matrix_of(lm, slot.at.module).detach().to(lm.device, lm.compute_dtype)
    number = torch.arange(len(matrix), device=lm.device, dtype=torch.float64)
    return matrix[slot.view(number[None, None], 1)[0, 0, slot.units].flatten().long()]


def _slopes(lm: Model, slot: Slot) -> Float[Tensor, "row d_model"]:
    """The slope of every coordinate of queries, keys or values at the state that their layer reads."""
    width = lm.head_dim
    ids = (torch.arange(_TOKENS) + lm.vocabulary // 2).expand(width, -1).to(lm.device)
    block = lm.layers[slot.layer].block
    with sloping(lm), ExitStack() as stack:
        stack.enter_context(hooked(put(lm, RULES["relp"])))
        stack.enter_context(hooked([before(block, leaf())]))
        tensors = stack.enter_context(reading(lm, {0: block}, [slot]))
        decode(lm, ids, use_cache=False)
        shown = slot.view(tensors[slot], width)
        # Prompt i asks for coordinate i; one token at a time, of a key that is no other's.
        each = torch.diagonal(shown[:, :, slot.units.to(shown.device)], dim1=0, dim2=-1)
        units = range(len(slot.units))
        found = [torch.autograd.grad(each[:, i].sum(), tensors[0], retain_graph=True)[0] for i in units]
    return torch.cat([one.flatten(0, 1).to(lm.device, lm.compute_dtype) for one in found])
