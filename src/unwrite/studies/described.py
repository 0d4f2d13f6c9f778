"""Where are heads, mixers, MLPs and norms of a model taken to be, and what is done to what they write? In words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from unwrite.model.families import REST
from unwrite.model.layers import Layer
from unwrite.model.view import Model
from unwrite.run.edit.sites import last_projection

Pick = Callable[[Layer], nn.Module | None]


def described(lm: Model) -> str:
    """The row of a model, by the names that its modules have in their blocks."""
    row = lm.row
    attending, mixing, mlps = (
        [layer for layer in lm.layers if layer.attends],
        [layer for layer in lm.layers if layer.mixes],
        [layer for layer in lm.layers if layer.has_mlp],
    )
    said = [f"{len(lm.layers)} blocks ({row.decoder}.{row.blocks}) write to one stream"]
    said += [*_attention(lm, attending)] if attending else []
    said += [_mixers(lm, mixing)] if mixing else []
    said += [_mlps(lm, mlps)] if mlps else []
    said += [f"{what} times {by}" for what, by in _factors(lm).items() if by != "1"]
    said += [*_beyond(lm)]
    said += ["positions are what else the first block reads"] if row.pos_embed == REST else []
    said += [f"attention adds {row.out_bias}"] if row.out_bias else []
    cap = row.logit_cap(lm.config)
    return "; ".join(said + ([] if cap is None else [f"logits are capped at {cap:g}"]))


def _factors(lm: Model) -> dict[str, str]:
    row, config = lm.row, lm.config
    numbers = {
        "the embedding is": [row.embed_scale(config)], "writes of blocks are": [x.residual_scale for x in lm.layers],
        "values are": [row.value_factor(config)], "logits are": [row.logit_scale(config)],
    }  # fmt: skip
    return {what: _span(by) for what, by in numbers.items()}


def _span(numbers: Sequence[float]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _beyond(lm: Model) -> Iterator[str]:
    """What blocks do beside adding to one stream what is made of it."""
    gains = [layer.gain for layer in lm.layers if layer.gain != 1]
    if gains:
        by = f"{len(gains)} blocks multiply their stream by {_span(gains)}"
        yield f"{by}: what nodes write is given as it arrives at the end"
    if behind := _names(lm.layers, lambda layer: layer.beside if layer.late else None):
        yield f"after the MLP writes {behind}, which reads the stream that it leaves"
    if beside := sorted(lm.by_prompt):
        yield f"blocks are given something of the prompt beside the stream (argument {', '.join(beside)})"


def _attention(lm: Model, layers: Sequence[Layer]) -> Iterator[str]:
    attention = _names(layers, lambda layer: layer.attention)
    made = f"values {_names(layers, lambda layer: layer.value, within=True)}"
    out = f"out-projection {_names(layers, lambda layer: layer.out_proj, within=True)}"
    read = _names(layers, lambda layer: layer.input_norm) or "the bare stream"
    yield f"heads ({attention}: {made}, {out}) read {read}{_through(layers, lambda layer: layer.post_attention_norm)}"
    if first := _names(layers, lambda layer: layer.latent, within=True):
        norm = _names(layers, lambda layer: layer.latent_norm, within=True)
        yield f"values take two steps, through {first} and the norm {norm}"
    if norm := _names(layers, lambda layer: layer.value_norm, within=True):
        yield f"values are normed ({norm})"
    if shared := {layer.index: layer.values_of.index for layer in layers if layer.values_of is not None}:
        pairs = ", ".join(f"{layer} of {source}" for layer, source in shared.items())
        yield f"layers have keys and values of an earlier one ({pairs})"
    if norm := _names(layers, lambda layer: layer.head_norm, within=True):
        yield f"what heads give goes through the norm {norm}"
    if lm.row.gated_heads:
        yield "what heads give is multiplied by gates"
    if lm.row.sinks:
        yield "attention has sinks: rows of its patterns sum to less than 1"


def _mixers(lm: Model, layers: Sequence[Layer]) -> str:
    heads = " or ".join(dict.fromkeys("one node" if layer.heads == 1 else f"{layer.heads} heads" for layer in layers))
    kind = _names(layers, lambda layer: layer.attention)
    read = _names(layers, lambda layer: layer.input_norm) or "the bare stream"
    through = _through(layers, lambda layer: layer.post_attention_norm)
    return (
        f"in {len(layers)} of the layers a mixer ({kind}, {heads}) reads {read}{through.replace('write', 'writes')}: "
        f"it shows no pattern, and {_carried(lm, layers)}"
    )


def _carried(lm: Model, layers: Sequence[Layer]) -> str:
    def makes(layer: Layer) -> nn.Module | None:
        values = lm.mixed.get(layer.index, {})
        return next((part for part, columns in values.items() if columns.any()), None)

    unknown = [str(layer.index) for layer in layers if not lm.carries(layer)]
    if len(unknown) == len(layers):
        return "what it carries through values is not shown"
    but = f" (not shown in layers {', '.join(unknown)})" if unknown else ""
    return f"values, which {_names(layers, makes, within=True)} gives, carry what they do with all else in it held{but}"


def _mlps(lm: Model, layers: Sequence[Layer]) -> str:
    last = _names(layers, lambda layer: last_projection(lm, layer)) or _names(layers, lambda layer: layer.mlp)
    beside = _names(layers, lambda layer: None if layer.late else layer.beside)
    with_it = f", and beside it {beside}" if beside else ""
    reads = _names(layers, lambda layer: layer.mid or layer.input_norm)
    read = "beside attention" if lm.parallel else f"what {reads} is given"
    return f"MLPs ({last}{with_it}) read {read}{_through(layers, lambda layer: layer.post_mlp_norm)}"


def _through(layers: Sequence[Layer], norm: Pick) -> str:
    names = _names(layers, norm)
    return f" and write through {names}" if names else ""


def _names(layers: Sequence[Layer], pick: Pick, within: bool = False) -> str:
    """What a module is called in its block, or within the block's attention; if it has several names, all of them."""
    found: dict[str, None] = {}
    for layer in layers:
        module, root = pick(layer), layer.attention if within else layer.block
        found |= {name: None for name, part in root.named_modules() if part is module and name}
    return " or ".join(found)
