"""What would the later layers do if the stream were different? A clean run, continued from any layer under an edit.

Only the layers from the edited one on are run again, with the arguments that their blocks were called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.model.attention import patterns
from unwrite.model.cache import Handed, of_prompts
from unwrite.model.capture import Recording, recording
from unwrite.model.continued import block
from unwrite.model.fold import centre
from unwrite.model.hooks import Visit, after, before, hooked
from unwrite.model.values import through_values
from unwrite.model.view import Layer, Model
from unwrite.nodes import Node
from unwrite.run.replay.clean import Clean


@torch.no_grad()
def added(run: Clean, node: Node, change: Float[Tensor, "prompt position d_model"]) -> Recording:
    """The run in which `change` is added to the stream right after `node` has written.

    Returns a Recording that is complete: what lies before the edit is that of the clean run.
    """
    return _continued(run, 0, change, {}) if node.layer < 0 else added_to_all(run, {node: change})


@torch.no_grad()
def added_to_all(run: Clean, changes: Mapping[Node, Float[Tensor, "prompt position d_model"]]) -> Recording:
    """The run in which to what each of these nodes writes its own change is added; none of them is an embedding."""
    of: dict[nn.Module, Layer] = {}
    parts: dict[nn.Module, list[Tensor]] = {}
    for node, change in changes.items():
        layer = run.lm.layers[node.layer]
        end = layer.end(node.kind)
        of[end] = layer
        parts.setdefault(end, []).append(change)
    visits = {end: partial(_plus, layer, partial(_sum, parts[end])) for end, layer in of.items()}
    return _continued(run, min(layer.index for layer in of.values()), None, visits)


@torch.no_grad()
def hidden(run: Clean, vector: Float[Tensor, "prompt position d_model"], layers: Sequence[int]) -> Recording:
    """The run in which `vector` is taken out of the value input of all heads in some layers, and of nothing else.

    Norms before these values and post-norms after them keep the scale of the clean run; queries and keys of these
    layers, and all layers after them, run freely. (Dao et al. 2023, Fig. 3)
    """
    lm = run.lm
    if not layers:
        return run.record
    taken: dict[int, Tensor] = {}
    with patterns(lm) as found:

        def carried(layer: Layer) -> Tensor:
            gate = found.gate.get(layer.index)
            through = through_values(lm, layer, found[layer.index], vector, run.scale(layer), gate)
            taken[layer.index] = run.post_scaled(layer, through)
            return -torch.einsum("bthk,hkd->btd", taken[layer.index], run.folded[layer.index].w_o)

        edited = [lm.layers[index] for index in layers]
        visits = {_attention_end(lm, layer): partial(_plus, layer, partial(carried, layer)) for layer in edited}
        record = _continued(run, min(layers), None, visits)
    for index, part in taken.items():
        record.z[index] = record.z[index] - part  # recorded before it was taken out
    return record


@torch.no_grad()
def one_reader(
    run: Clean, vector: Float[Tensor, "prompt position d_model"], mlps: Sequence[Node]
) -> dict[Node, Float[Tensor, "prompt position d_model"]]:
    """D = MLP(x) − MLP(x − vector), norms free: what each of these MLPs writes because `vector` is in what it reads.

    Each D is about one reader: every other node stays as it was, so what MLPs hand on to each other is in no D, and the
    D of all MLPs do not add up to what a run without the vector changes (facts: measuring erasure, §6 and §8). Each
    block is called as in the clean run. Where attention and MLP read one state the block takes in x − vector, and its
    attention is not looked at; elsewhere what stands between the two does, and its attention is the clean one.
    """
    lm, changes = run.lm, dict[Node, Tensor]()
    at = {node: _read_through(lm, node) for node in mlps}
    # What reads an MLP's write is asked by itself: in a run without the vector the MLP before it writes otherwise.
    for late in (False, True):
        here = [node for node, module in at.items() if (module is lm.layers[node.layer].late) is late]
        with recording(lm, run.folded) as record:
            for layer, module in {node.layer: at[node] for node in here}.items():
                own = lm.layers[layer]
                to_end = own.mid_to_end if module is own.mid else own.to_end
                with hooked([before(module, partial(_without, vector / to_end))]):
                    again(run, lm.layers[layer], Handed())
        changes |= {node: run.record.vectors[node] - record.vectors[node] for node in here}
    return {node: changes[node] for node in mlps}


def _read_through(lm: Model, node: Node) -> nn.Module:
    """The module whose input is the state that an MLP, or what writes beside or after it, reads."""
    layer = lm.layers[node.layer]
    if node.kind == "beside" and layer.late is not None:
        return layer.late
    return layer.block if lm.parallel or layer.mid is None else layer.mid


def _without(vector: Tensor, x: Tensor) -> Tensor:
    # OPT flattens prompts and positions before its MLP.
    return (x - vector.reshape(x.shape).to(x.device)).to(x.dtype)


def again(run: Clean, layer: Layer, handed: Handed, x: Tensor | None = None) -> Tensor:
    """A block of the clean run again, on another stream if one is given, with what earlier ones have `handed` on."""
    call, stream = run.calls[layer.index], run.input(layer.index)
    made = block(layer, of_prompts(call, torch.arange(len(stream), device=stream.device), handed), x)
    handed.keep()
    return made


def _attention_end(lm: Model, layer: Layer) -> nn.Module:
    """Where a layer's attention write can be changed and its pattern is already known."""
    if not lm.row.interface:  # the pattern comes out with the attention module's output
        return layer.attention
    return layer.attention_end


def _plus(layer: Layer, change: Callable[[], Tensor], written: Tensor) -> Tensor:
    """What a module writes with something added, in units of the final stream, which it reaches scaled."""
    return written + (change() / layer.into).reshape(written.shape).to(written)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _continued(run: Clean, start: int, change: Tensor | None, visits: Mapping[nn.Module, Visit]) -> Recording:
    """Run the blocks from `start` on, with edits of what some modules put out."""
    lm = run.lm
    with ExitStack() as stack:
        # Edits first: what a block's own nodes hand on after an edit is what is recorded.
        stack.enter_context(hooked(after(module, visit) for module, visit in visits.items()))
        record = stack.enter_context(recording(lm, run.folded, truth=True))
        x = run.input(start)
        x = x if change is None else x + (change / lm.layers[start].to_end).to(x)
        handed = Handed()
        for layer in lm.layers[start:]:
            x = again(run, layer, handed, x)
    record.stream[lm.states[-1]] = centre(x.to(lm.device, lm.compute_dtype), lm)
    return _completed(run.record, record)


def _completed(base: Recording, record: Recording) -> Recording:
    return Recording(
        {**base.z, **record.z},
        {**base.gain, **record.gain},
        {**base.vectors, **record.vectors},
        {**base.stream, **record.stream},
        {**base.attention, **record.attention},
    )
