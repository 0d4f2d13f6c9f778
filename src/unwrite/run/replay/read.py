"""What does a reader make of the stream if a vector is missing from its input alone? Queries, keys, values, MLPs.

Every answer is about one reader: all other nodes stay as they are in the clean run, so what a head reads through its
query is measured with the clean keys and values, norms evaluated anew. What one block reads at once tells the same of
each of its queries, keys and values, which know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import ModelError, NodeError
from unwrite.model.cache import Handed
from unwrite.model.capture import Recording, recording
from unwrite.model.hooks import Leave, Visit, after, hooked
from unwrite.model.view import Layer, Model
from unwrite.run.edit.slots import Slot, slots, visiting
from unwrite.run.replay.clean import Clean
from unwrite.run.replay.edited import again

# Through what a head reads; "all" is every way at once, and the only one of an MLP or a mixer.
PARTS = ("all", "q", "k", "v")
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Attention:
    """What the heads of one layer make of what they read, in some run.

    `made` are queries, keys and values by name [prompt position head d], keys and values as each query head's own copy;
    `z` what the heads hand to W_O, `pattern` [prompt head query key] of attention that shows it.
    """

    made: Mapping[str, Float[Tensor, "prompt position head _d"]]
    z: Float[Tensor, "prompt position head d_head"]
    pattern: Float[Tensor, "prompt head query key"] | None


@contextmanager
def reading(run: Clean) -> Iterator[Callable[[Layer], Readers]]:
    """Inside the `with`, the heads of any layer can be asked, of a clean run with patterns: hooks are put once."""
    with recording(run.lm, run.folded) as record:
        yield partial(Readers, run, record)


class Readers:
    """The heads of one layer, which read one way at a time.

    Raises ModelError where the layer, run by itself, does not hand over what it did in the whole run.
    """

    def __init__(self, run: Clean, record: Recording, layer: Layer):
        self._run, self._record, self._layer = run, record, layer
        self._slots = read_through(run.lm, layer)
        self.clean = self._attended(None, {})
        whole = run.record.z[layer.index]
        limit = run.lm.certificate.allowed("opened")
        if not (error := float((self.clean.z - whole).norm() / whole.norm().clamp_min(_TINY))) <= limit:
            raise ModelError(
                f"the heads of layer {layer.index} do not do by themselves what they do in a whole run",
                got=f"relative error {error:.1e}", expected=f"at most {limit:.0e}", fix="report this family",
            )  # fmt: skip

    @property
    def ways(self) -> tuple[str, ...]:
        """Through what these heads read."""
        return tuple(self._slots)

    def without(
        self, vector: Float[Tensor, "prompt position d_model"]
    ) -> Iterator[tuple[str, Float[Tensor, "prompt position head _d"], Attention]]:
        """(way, change of what is read that way, attention) with the vector, in units of the final stream, missing from
        what is read that way alone."""
        x = self._run.input(self._layer.index)
        every = self._attended((x - (vector / self._layer.to_end).to(x)), {})
        yield PARTS[0], every.z - self.clean.z, every
        for way, slot in self._slots.items():
            alone = self._attended(None, {slot: partial(_instead, slot, every.made[way])})
            yield way, every.made[way] - self.clean.made[way], alone

    def _attended(self, x: Tensor | None, visits: Mapping[Slot, Visit]) -> Attention:
        found: dict[str, Tensor] = {}
        run, layer = self._run, self._layer
        keep = {slot: partial(_kept, found, way, slot) for way, slot in self._slots.items() if slot not in visits}
        shown: dict[int, Tensor] | None = {} if run.lm.applies("opened") else None
        with ExitStack() as stack:
            stack.enter_context(visiting(run.lm, {**keep, **visits}, shown))
            # What stands behind the heads is not asked about.
            stack.enter_context(hooked([after(layer.attention_end, _leave)]))
            stack.enter_context(suppress(Leave))
            again(run, layer, Handed(), x)
        return Attention(found, self._record.z.pop(layer.index), (shown or {}).get(layer.index))


def read_through(lm: Model, layer: Layer) -> dict[str, Slot]:
    """By q, k and v: where what each head of a layer makes of the stream that way can be put in; none of a mixer."""
    found: dict[str, Slot] = {}
    for way in PARTS[1:] if layer.attends else ():
        try:
            (found[way],) = slots(lm, [f"L{layer.index}H*.{way}"])
        except NodeError:
            continue  # this family has no such thing
    return found


def changed_pattern(clean: Attention, other: Attention, way: str) -> Float[Tensor, "prompt head query"] | None:
    """½ Σ_j |A_ij − A'_ij|, the total variation of what each query attends to.

    None where no pattern is shown, or values are another one, of which it knows nothing.
    """
    if clean.pattern is None or other.pattern is None or way == "v":
        return None
    return (clean.pattern - other.pattern).abs().sum(-1).float() / 2


def _kept(found: dict[str, Tensor], way: str, slot: Slot, tensor: Tensor) -> Tensor:
    found[way] = slot.view(tensor, len(tensor)).index_select(2, slot.units).clone()
    return tensor


def _leave(_: Tensor) -> Tensor:
    raise Leave


def _instead(slot: Slot, value: Tensor, tensor: Tensor) -> Tensor:
    changed = tensor.clone(memory_format=torch.contiguous_format)
    slot.view(changed, len(value))[:, :, slot.units] = value.to(changed.dtype)
    return changed
