"""How large is the effect of a patch, as backward passes guess it? AtP, RelP, AtP* and integrated gradients.

AtP and RelP: ⟨n_source − n_base, slope⟩, the slope under the rules of `rules.py`. AtP* (Kramár et al. 2024, arXiv
2403.00745) takes the step of queries and keys through the softmax exactly, and averages magnitudes over variants of the
slope that each leave one layer out, so that effects that cancel are seen. Integrated gradients follow the slope while
the embeddings go from base to source. (facts: attribution, §2–4)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.model.attention import Scored, scoring
from unwrite.model.capture import evaluating
from unwrite.model.hooks import before, hooked, leaf
from unwrite.model.placed import decode
from unwrite.model.view import Model
from unwrite.run.backward.rules import RULES, Rules
from unwrite.run.backward.saturation import of_keys, of_queries
from unwrite.run.backward.slopes import Graph, MetricOf, Slopes, graph
from unwrite.run.edit.slots import SCORED, Slot, Values, slots, values

Estimate = dict[Slot, Float[Tensor, "pair position _unit"]]
Summed = dict[Slot, Float[Tensor, "pair _ _unit"]]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Base prompts of some pairs, the nodes that are asked for, and the metric of what the final norm gives."""

    lm: Model
    ids: Int[Tensor, "pair position"]
    slots: Sequence[Slot]
    metric: MetricOf


def attributed(asked: Contrast, source: Values, rules: Rules) -> Estimate:
    """⟨n_source − n_base, slope⟩ of every node at every position, under any rules."""
    made = graph(asked.lm, asked.ids, asked.slots, rules, asked.metric)
    return _products(asked.lm, made.values, source, made.slopes)


def _products(lm: Model, base: Values, source: Values, slopes: Slopes) -> Estimate:
    """Σ (source − base) · slope of every node, in float32 or better also where the model computes in half precision."""
    exact = lm.compute_dtype
    return {
        slot: ((source[slot].to(exact) - base[slot].to(exact)) * slope.to(exact)).sum(-1)
        for slot, slope in slopes.items()
        if slot in source
    }


def star(asked: Contrast, source: Values, summed: Callable[[Tensor], Tensor]) -> tuple[Summed, Estimate]:
    """AtP*: (magnitude, signed) of every node. `summed` takes positions together, before magnitudes are.

    signed is AtP with the QK fix; magnitude is GradDrop's, Σ_l |signed without layer l| / (L − 1), where the node's own
    layer counts 0; a node of no layer has L variants that count.
    """
    lm, fixed = asked.lm, [slot for slot in asked.slots if slot.kind in SCORED]
    heads = {slot.layer: slot for slot in slots(lm, "heads")} if fixed else {}
    inner = [heads[layer] for layer in sorted({slot.layer for slot in fixed}) if heads[layer] not in asked.slots]
    calls = _calls(asked) if fixed else {}
    made = graph(lm, asked.ids, [*asked.slots, *inner], RULES["gradient"], asked.metric, keep=True)

    def effects(slopes: Slopes) -> Estimate:
        found = _products(lm, made.values, source, slopes)
        for slot in fixed:
            if slot in slopes:
                fix = _through_softmax(calls[slot.layer], slot, source[slot], slopes[heads[slot.layer]])
                # The scores come from another run than the values, whose rounding is no difference.
                found[slot] = fix.masked_fill((source[slot] == made.values[slot]).all(-1), 0.0)
        return found

    signed = effects(made.slopes)
    return _dropped(made, signed, effects, len(lm.layers), summed), signed


def _dropped(
    made: Graph,
    signed: Estimate,
    effects: Callable[[Slopes], Estimate],
    layers: int,
    summed: Callable[[Tensor], Tensor],
) -> Summed:
    whole = {slot: summed(part).abs() for slot, part in signed.items()}
    # Variants before a node's own layer leave its slope as it is.
    total = {slot: slot.layer * part for slot, part in whole.items()}
    for layer in range(layers):
        for slot, part in effects(made.without(layer)).items():
            total[slot] = total[slot] + summed(part).abs()
    return {slot: part / max(1, layers - (not _of_no_layer(slot))) if layers > 1 else whole[slot]
            for slot, part in total.items()}  # fmt: skip


def _of_no_layer(slot: Slot) -> bool:
    return slot.at is None or slot.joined


@torch.no_grad()
def _calls(asked: Contrast) -> dict[int, Scored]:
    with evaluating(asked.lm.hf), scoring(asked.lm) as calls:
        decode(asked.lm, asked.ids, use_cache=False)
    return calls


def _through_softmax(
    call: Scored,
    slot: Slot,
    source: Float[Tensor, "pair position unit d"],
    slope: Float[Tensor, "pair position head d"],
) -> Float[Tensor, "pair position unit"]:
    """The QK fix of a layer's queries or keys; that of a shared key is the sum over the heads of its group."""
    each = call.query.shape[1] // call.shared if slot.kind == "shared_k" else 1
    heads = (slot.units[:, None] * each + torch.arange(each, device=slot.units.device)).flatten()
    sink = None if call.sink is None else call.sink[heads]
    own = replace(call, query=call.query[:, heads], key=call.key[:, heads], value=call.value[:, heads], sink=sink)
    moved = source.repeat_interleave(each, 2).transpose(1, 2)
    at_z = slope[:, :, heads].transpose(1, 2)
    found = of_queries(own, moved, at_z) if slot.kind == "q" else of_keys(own, moved, at_z)
    return found.unflatten(1, (-1, each)).sum(2).transpose(1, 2)


def integrated(asked: Contrast, source_ids: Int[Tensor, "pair position"], steps: int) -> tuple[Estimate, Estimate]:
    """Integrated gradients over the embeddings, midpoint rule: (conductance, inputs) of every node at every position.

    Conductance Σ_k ⟨n(α_k) − n(α_{k−1}), slope at the midpoint⟩ adds up to the metric's change on every cut of the
    network; inputs, ⟨n_source − n_base, mean slope⟩ (EAP-IG's), on the cut of the embeddings alone.
    """
    start, end = (embedded(asked.lm, ids) for ids in (asked.ids, source_ids))
    between = [start + (end - start) * (k / (2 * steps)) for k in range(2 * steps + 1)]
    ends = [_values_at(asked, x) for x in between[::2]]
    conductance: Estimate = {slot: torch.zeros(()) for slot in asked.slots}
    mean: Slopes = {slot: torch.zeros(()) for slot in asked.slots}
    for k, x in enumerate(between[1::2]):
        made = graph(asked.lm, asked.ids, asked.slots, RULES["gradient"], asked.metric, embedded=x)
        for slot, part in _products(asked.lm, ends[k], ends[k + 1], made.slopes).items():
            conductance[slot] = conductance[slot] + part
            mean[slot] = mean[slot] + made.slopes[slot].to(asked.lm.compute_dtype) / steps
    return conductance, _products(asked.lm, ends[0], ends[-1], mean)


def embedded(lm: Model, ids: Tensor) -> Float[Tensor, "pair position d_model"]:
    """What the first block reads of these prompts."""
    slot = slots(lm, "embed")
    return values(lm, ids, slot)[slot[0]][:, :, 0].to(lm.compute_dtype)


def _values_at(asked: Contrast, start: Tensor) -> Values:
    with hooked([before(asked.lm.layers[0].block, leaf(start))]):
        return values(asked.lm, asked.ids, asked.slots)
