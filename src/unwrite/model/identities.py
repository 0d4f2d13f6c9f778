"""How far is each identity from holding on some prompts? Relative errors, of which the certificate is the judge.

heads      the heads' writes and the bias (from weights alone) sum to what each attention block really adds
stream     all nodes sum to the final state of the stream
locations  the nodes so far sum to every earlier state (in a parallel block, also to what its MLP reads), the first of
           which is what tokens give and what positions do, whatever the tokens are
logits     final norm and unembedding of that sum give the model's logits, small ones and such as reach a cap
values     with pattern and norm frozen, what all earlier nodes put into a head through its values is what it writes; so
           it is, with biases, of a mixer whose values are shown, all else that it makes of the stream frozen
mlp        what reads an MLP's hidden activation gives what the MLP writes, and a gated one has two factors
causal     another last token moves no logit before it
opened     attention that is computed openly, for patterns, gives the closed model's logits
reading    logit differences from the rows of the unembedding that methods read are the model's own
continued  a run continued from a later position, over the keys and values kept of it, is that run
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unwrite.errors import ModelError
from unwrite.model.attention import Patterns, around_attention, is_called, patterns
from unwrite.model.capture import Recording, evaluating, recording
from unwrite.model.continued import Calls, calls_of, continues, kept_run
from unwrite.model.fold import Folded, value_constant
from unwrite.model.hooks import Call, after, first_of, hooked, kept, read_of
from unwrite.model.inside import maybe
from unwrite.model.lengths import switches
from unwrite.model.mixer_values import EXACT, euler
from unwrite.model.mixers import mixers_called, shown, through_mixer
from unwrite.model.norms import norm_scale
from unwrite.model.placed import placed
from unwrite.model.projections import is_sized, projections_in, sizes
from unwrite.model.single import HALVES
from unwrite.model.unembedding import before_norm, bounded, finished, rows_of, unembedding
from unwrite.model.values import looked, of_biases, read_by, value_scale, values_of
from unwrite.model.view import Layer, Model
from unwrite.model.weights import offloaded, through, weight_of
from unwrite.model.writes import Writes, expand
from unwrite.nodes import PROJECTED, Location, Node

# So many of a vocabulary's logits are read from their rows.
_ROWS = 1024
# More than any cap in use; logits that are twice this show one.
_CAP = 60.0
# So many rows of a long prompt are compared.
_LAST = 4
Ids = Int[Tensor, "prompt position"]
Mask = Bool[Tensor, "prompt position"]
_Rows = Float[Tensor, "row vocabulary"]
Errors = Iterator[tuple[str, float]]


def added(lm: Model, folded: tuple[Folded, ...], ids: Ids, mask: Mask, dtype: torch.dtype) -> Errors:
    """Do the nodes add up? heads, stream, locations, logits and reading; then what rests on other passes.

    `dtype` is that in which the model computes now.
    """
    with ExitStack() as stack:
        record = stack.enter_context(recording(lm, folded, truth=True))
        ends, mixing = stack.enter_context(_ends_of_mlps(lm)), stack.enter_context(mixers_called(lm))
        whole = output_of(lm, ids, mask)
    if mask.all():
        _find_by_prompt(lm, *(calls_of(lm, part, (), 0, ids.shape[1]) for part in (ids, ids[:1])))
    logits = whole[mask]
    nodes = expand(lm, folded, _per_prompt(record, mask).map(lambda part: part[mask]))
    for layer in (layer for layer in lm.layers if layer.heads):
        yield "heads", relative(_attention_nodes(lm, nodes, layer), record.attention[layer.index][mask])
    yield from _states(lm, nodes, record, mask)
    stream = nodes.sum(0)
    yield from (("mlp", _mlp_error(lm, layer, ends)) for layer in lm.layers if layer.has_mlp)
    if dtype not in HALVES or offloaded(lm.hf):  # else it is float32 that says it: kernels round in ways of their own
        yield from _of_mixers(lm, record, mixing, mask)
    yield "logits" if lm.has_head else "stream", relative(finished(lm, stream, dtype)[None], logits)
    if lm.has_head:
        yield "reading", relative(*_read(lm, stream, logits))
    if lm.applies("opened"):
        yield from _opened(lm, folded, ids, mask, logits)
    if mask.all():
        yield from _of_positions(lm, ids, whole, dtype)


def _states(lm: Model, nodes: Float[Tensor, "node row d_model"], record: Recording, mask: Mask) -> Errors:
    """Do the nodes so far add up to every state, and are positions the same in every prompt?"""
    rows = {state: x[mask] for state, x in record.stream.items()}
    holds = lm.holds().to(nodes.device)
    for state, held in zip(lm.states, holds, strict=True):
        yield "stream" if state == lm.states[-1] else "locations", relative(nodes[held], rows[state])
    if lm.parallel:
        for layer in lm.layers:
            if (read := rows.get(Location("mid", layer.index))) is not None:
                yield "locations", relative(nodes[_earlier(lm, layer)], read)
    if (positions := record.vectors.get(Node("pos_embed"))) is not None:
        start = torch.stack([record.vectors[Node("embed")], positions.expand(*mask.shape, -1)])
        yield "locations", relative(start[:, mask], (start[0] + positions[:1])[mask])


def logits_of(lm: Model, ids: Ids, mask: Mask | None = None) -> Float[Tensor, "prompt position vocabulary"]:
    """The model's own logits. Raises ModelError for a model that gives none."""
    lm.require("logits")
    return output_of(lm, ids, mask)


def output_of(lm: Model, ids: Ids, mask: Mask | None = None, **more: Any) -> Float[Tensor, "prompt position output"]:
    """What the model gives to whoever calls it: logits, or without a head what its final norm gives.

    `more` is what it reads beside token ids.
    """
    padded = {} if mask is None or bool(mask.all()) else {"attention_mask": mask.long()}
    with evaluating(lm.hf), placed(lm, ids) as written:
        return first_of(lm.hf(input_ids=written, use_cache=False, **padded, **more)).to(ids.device)


def _loud(lm: Model, ids: Int[Tensor, "1 position"], stream: Float[Tensor, "position d_model"], dtype: Any) -> float:
    """The same where the unembedding gives so much that a cap is reached, or would be: small logits show none."""
    raw = through(lm.head, through(lm.final_norm, stream.to(dtype)))
    scale = abs(lm.row.logit_scale(lm.config)) * raw.abs().amax().clamp_min(torch.finfo(raw.dtype).tiny)
    louder = 2 * (lm.row.logit_cap(lm.config) or _CAP) / scale
    with hooked([after(lm.head, lambda logits: logits * louder.to(logits))]):
        own = output_of(lm, ids)[0]
    return relative(bounded(lm, raw * louder)[None], own)


def _find_by_prompt(lm: Model, calls: Calls, alone: Calls) -> None:
    """Note which arguments of blocks are another one for another prompt: a run that begins at a block must bring them.

    `alone` is how blocks are called for the first prompt by itself. Raises ModelError for what has no axis of prompts
    and is not the same for all.
    """
    for layer in lm.layers:
        every, first, stream = *(_arguments(of[layer.index]) for of in (calls, alone)), read_of(calls[layer.index])
        for name, part in every.items():
            if part is stream or (how := _differs(part, first[name], len(stream))) is False:
                continue
            if how is None:
                raise ModelError(
                    f"the blocks of {lm.about.get('name', lm.family)} read something beside the stream",
                    got=f"layer {layer.index}, which is given argument {name}, another one for another prompt",
                    expected="what is the same for all prompts, or has one part for each",
                )  # fmt: skip
            lm.by_prompt.add(name)


def _arguments(call: Call) -> dict[str, Any]:
    return {**{str(i): part for i, part in enumerate(call[0])}, **call[1]}


def _differs(every: Any, first: Any, prompts: int) -> bool | None:
    """Is an argument another one for another prompt; None where that cannot be put apart by prompt."""
    if isinstance(every, Tensor):
        return _rows_differ(every, first, prompts) if isinstance(first, Tensor) else None
    if isinstance(every, MutableMapping):
        parts = [pair for key, own in every.items() for pair in _paired(own, first[key])]
        return bool(parts) and (None if any(len(a) != prompts or len(b) != 1 for a, b in parts) else True)
    pairs = _paired(every, first) if isinstance(every, tuple | list) else []
    return None if any(_rows_differ(*pair, prompts) is not False for pair in pairs) else False


def _paired(every: Iterable[Any], first: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    return [pair for pair in zip(every, first, strict=True) if isinstance(pair[0], Tensor)]


def _rows_differ(every: Tensor, first: Tensor, prompts: int) -> bool | None:
    # Keys that another layer has chosen, of so few all, come in an order of its own; of more see `apart`.
    if not (every.is_floating_point() or every.is_complex() or every.dtype == torch.bool):
        every, first = every.sort(-1).values, first.sort(-1).values
    if every.shape == first.shape:
        return False if torch.equal(every, first) else None
    if every.shape == (prompts, *first.shape[1:]):
        return not torch.equal(every, every[:1].expand_as(every))
    whole = every.numel() == prompts * first.numel()  # as ALiBi, whose prompts and heads are one axis
    return False if whole and torch.equal(every.flatten(), first.flatten().repeat(prompts)) else None


def relative(parts: Float[Tensor, "part row d"], truth: Float[Tensor, "row d"]) -> float:
    """Worst over rows: ‖Σ parts − truth‖ relative to the larger of ‖truth‖ and the largest part.

    Rounding is as large as the largest part, which may dwarf a sum that cancels.
    """
    exact = torch.promote_types(parts.dtype, torch.float32)
    parts, truth = parts.to(exact), truth.to(exact)
    size = torch.maximum(truth.norm(dim=-1), parts.norm(dim=-1).amax(0)).clamp_min(torch.finfo(parts.dtype).tiny)
    error = (parts.sum(0) - truth).norm(dim=-1) / size
    return float(error.amax()) if error.isfinite().all() else float("nan")


def _read(lm: Model, stream: Float[Tensor, "row d_model"], logits: _Rows) -> tuple[Tensor, Tensor]:
    """Differences of some logits to their mean, as methods read them from weights, and as the model has them."""
    weight, bias = unembedding(lm)
    count = min(len(weight), logits.shape[-1])
    ids = torch.arange(0, count, -(-count // _ROWS), device=stream.device)
    r, constant = before_norm(lm, *rows_of(weight, bias, ids, lm.compute_dtype))
    scale = norm_scale(stream, lm.final_norm, lm.row.layer_norm)
    read, own = bounded(lm, scale[:, None] * (stream @ r.t()) + constant), logits[:, ids].to(stream)
    return (read - read.mean(-1, keepdim=True))[None], own - own.mean(-1, keepdim=True)


@contextmanager
def _ends_of_mlps(lm: Model) -> Iterator[dict[nn.Module, Tensor]]:
    """Inside the `with`, what every MLP puts out, and what the last projection in it does."""
    found: dict[nn.Module, Tensor] = {}
    ends = {part for layer in lm.layers if layer.has_mlp for part in (layer.mlp, *_last(lm, layer))}
    with hooked(after(part, kept(found, part, copied=True)) for part in ends):
        yield found


def _last(lm: Model, layer: Layer) -> Iterable[nn.Module]:
    """The last projection of an MLP; where there seems to be none, whatever could be it."""
    last = maybe(layer.mlp, lm.row.of_layer(layer.index).act)
    return projections_in(layer.mlp) if last is None else [last]


def _mlp_error(lm: Model, layer: Layer, ends: Mapping[nn.Module, Tensor]) -> float:
    last, whole = maybe(layer.mlp, lm.row.of_layer(layer.index).act), ends[layer.mlp]
    if last is None:  # a mixture of experts, of which no projection gives the whole
        every = [ends[part] for part in _last(lm, layer) if part in ends]
        whole_itself = is_sized(layer.mlp) or any(torch.equal(part, whole) for part in every)
        return float("inf") if whole_itself else 0.0
    into = sum(sizes(part)[1] for part in projections_in(layer.mlp) if part is not last)
    got, want = (part.flatten(0, -2) for part in (ends[last], whole))
    # Both factors of a gated one read the stream, so twice as much goes in.
    if not hasattr(last, "weight") or got.shape != want.shape or (into >= 2 * sizes(last)[0]) != lm.row.gated:
        return float("inf")
    return relative(got[None], want)


def _opened(lm: Model, folded: tuple[Folded, ...], ids: Ids, mask: Mask, closed: _Rows) -> Errors:
    if not mask.all() and is_called(lm):
        # The function of the family, which attends where a pattern is traced, also under a mask of the caller's.
        with around_attention(lm, lambda _, attend, *seen: attend(*seen), eager=True):
            yield "opened", relative(output_of(lm, ids, mask)[mask][None], closed)
        return
    with patterns(lm) as found, recording(lm, folded, truth=True) as record:
        logits = output_of(lm, ids, mask)[mask]
    yield "opened", relative(logits[None], closed)
    yield "values", _values_error(lm, folded, mask, record, found)


def _of_positions(
    lm: Model, ids: Ids, logits: Float[Tensor, "prompt position vocabulary"], dtype: torch.dtype
) -> Errors:
    """The last of the prompts is the first one but for its last token."""
    yield "causal", relative(logits[-1:, :-1], logits[0, :-1])
    inputs, cached = kept_run(lm, ids[:1])
    if lm.has_head:
        yield "logits", _loud(lm, ids[:1], inputs[-1][0], dtype)
    if not lm.applies("continued"):
        return
    yield "continued", relative(finished(lm, inputs[-1][0], dtype)[None], logits[0])
    # Early rows alone are fewer than the switch of a model that computes otherwise beyond it.
    for start in {ids.shape[1] // 2 + 1, *([1] if switches(lm) else [])}:
        yield "continued", continues(lm, ids[:1], inputs, cached, start, min(2, ids.shape[1] - start))


def _per_prompt(record: Recording, mask: Tensor) -> Writes:
    return record.writes.map(lambda part: part.expand(len(mask), *part.shape[1:]))


def _earlier(lm: Model, layer: Layer) -> list[int]:
    return [i for i, node in enumerate(lm.parts) if node.layer < layer.index]


def _attention_nodes(lm: Model, nodes: Tensor, layer: Layer) -> Tensor:
    kept = [i for i, node in enumerate(lm.parts) if node.layer == layer.index and node.kind in (*PROJECTED, "bias")]
    return nodes[kept]


def beyond(lm: Model, folded: tuple[Folded, ...], ids: Int[Tensor, "1 position"]) -> Errors:
    """The same of the last rows of one long prompt, as far as another length could change it."""
    last = slice(-_LAST, None)
    with recording(lm, folded) as record:
        own = first_of(lm.decoder(input_ids=ids, use_cache=False))[0, last].to(ids.device)
    stream = expand(lm, folded, record.writes.map(lambda part: part[0, last])).sum(0)
    yield "stream", relative(through(lm.final_norm, stream.to(lm.dtype))[None], own)
    if not lm.applies("opened"):
        return
    with patterns(lm):
        opened = first_of(lm.decoder(input_ids=ids, use_cache=False))[0, last].to(ids.device)
    yield "opened", relative(opened[None], own)
    if not lm.applies("continued"):
        return
    inputs, cached = kept_run(lm, ids)
    for start in (1, ids.shape[1] - 2):
        yield "continued", continues(lm, ids, inputs, cached, start, 2)


def _values_error(lm: Model, folded: tuple[Folded, ...], mask: Mask, record: Recording, found: Patterns) -> float:
    everywhere = expand(lm, folded, _per_prompt(record, mask).map(lambda part: part.flatten(0, 1)))
    worst = 0.0
    for layer, folds in zip(lm.layers, folded, strict=True):
        if not layer.attends:
            continue
        stream = everywhere[_earlier(lm, layer.makes_values)].sum(0).unflatten(0, mask.shape)
        gain = record.gain.get(layer.index)
        z = record.z[layer.index] if gain is None else record.z[layer.index] / gain[..., None, None]
        constant = value_constant(lm, layer)
        if constant is not None and folds.constant is None:
            z = z - constant
        error = _head_error(lm, layer, stream, found, z, constant, mask)
        worst = error if not error <= worst else worst
    return worst


def _of_mixers(lm: Model, record: Recording, mixing: Calls, mask: Mask) -> Errors:
    """What mixers carry. One of which it is not true of these prompts shows no values from here on."""
    for layer in [*shown(lm)]:
        error = _mixer_error(lm, layer, record, mixing[layer.index], mask)
        if error <= EXACT:
            yield "values", error
        else:
            del lm.mixed[layer.index]


def _mixer_error(lm: Model, layer: Layer, record: Recording, call: Call, mask: Mask) -> float:
    """Worst ‖slope along the stream and biases − z‖ of a mixer's head, relative to its largest z (Euler's theorem)."""
    stream, beta = record.stream[layer.reads], weight_of(layer.input_norm, "bias")
    read = read_by(lm, layer, stream, value_scale(lm, layer, stream))
    z, gain = record.z[layer.index], record.gain.get(layer.index)
    slope = through_mixer(lm, layer, call, read if beta is None else read + beta.to(read), biases=True)
    return euler((z if gain is None else z / gain[..., None, None])[mask], slope[mask])


def _head_error(
    lm: Model, layer: Layer, stream: Tensor, found: Patterns, z: Tensor, constant: Tensor | None, mask: Tensor
) -> float:
    """Worst ‖g ⊙ A · (x · W_V + rest) − z‖ of a head, relative to |g| ⊙ A · (|x| · |W_V| + |rest|), what is summed.

    x is the normed stream, g what heads are multiplied by (or 1), `rest` what biases put there beside the constant.
    """
    scale = value_scale(lm, layer, stream)
    values, summed = (values_of(lm, layer, stream, scale, sizes_alone) for sizes_alone in (False, True))
    if (rest := of_biases(lm, layer, stream)) is not None:
        values, summed = values + rest, summed + rest.abs()
    through, summed = (looked(found[layer.index], part)[mask] for part in (values, summed))
    if (gate := found.gate.get(layer.index)) is not None:
        through, summed = through * gate[mask], summed * gate[mask].abs()
    size = summed.norm(dim=-1) + (0.0 if constant is None else constant.norm(dim=-1))
    error = (through - z[mask]).norm(dim=-1) / size.clamp_min(torch.finfo(z.dtype).tiny)
    return float(error.amax()) if error.isfinite().all() else float("nan")
