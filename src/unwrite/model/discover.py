"""Which row describes a model that has none? Found from one forward pass; the certificate decides whether it is true.

Autograd's graph says what is added, hooks say by whom: no module is known by its name. The row is kept with the model
and never written into the table, since it need not hold of another model of the same type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unwrite.errors import ModelError
from unwrite.model.blocks import SAME, Block, Unlike, below, norm_kinds
from unwrite.model.families import REST, Family, Where
from unwrite.model.hooks import first_of
from unwrite.model.inside import head_of, held, maybe, text_config
from unwrite.model.norms import NormKind
from unwrite.model.said import Said, looked, said, unseen
from unwrite.model.single import HALVES
from unwrite.model.sums import bare, behind, terms
from unwrite.model.traced import Called, Traced, mixing, traced
from unwrite.model.weights import offloaded, weight_of

# A number that was measured is one of the configuration within this; so much of a cap is told from logits below it.
_NAMED, _BELOW = 1e-5, 0.9
_NORMS = ("input_norm", "post_attention_norm", "post_mlp_norm", "post_beside_norm", "latent", "latent_norm",
          "value_norm", "head_norm")  # fmt: skip
# What is said of the row where no layer says it. A mixture of experts shows no product, and is one with its router's.
_UNKNOWN: dict[str, Any] = {
    "value_layout": (1, 0), "value_factor": 1.0, "interface": True, "opened": {}, "parallel": False,
    "gated": True,
    "gated_heads": False, "sinks": False,
}  # fmt: skip
# What is said of all layers where it is true of some.
_ANY = ("gated_heads", "sinks")
_STREAM = 3  # prompt, position, d_model


def discovered(hf: Any) -> Family:
    """The row of a decoder that has none in the table. Raises ModelError naming what in its structure no row can say.

    One forward pass of a few random tokens, or up to three where attention is not called by transformers' interface;
    in float32 where weights are in half precision.
    """
    kind = text_config(hf.config).model_type
    if offloaded(hf):
        _require_float32(hf, kind)
    try:
        return _row(traced(hf), hf)
    except Unlike as why:
        raise ModelError(
            f"{kind} has no row in the table of families, and none can be found: {why}",
            expected="blocks that add what attention and an MLP write to one stream",
            fix="see 'How to add a family' in CONTRIBUTING.md",
        ) from None


def _require_float32(hf: Any, kind: str) -> None:
    """Raise ModelError for half precision that cannot be lent as float32, and for weights that are nowhere."""
    weight = weight_of(hf.get_input_embeddings())
    if weight is not None and weight.dtype in HALVES:
        raise ModelError(
            f"{kind} has no row in the table of families, and one can be found in float32 alone",
            got="weights of half precision that are brought in for every pass", fix="load it with dtype='float32'",
        )  # fmt: skip


def _row(trace: Traced, hf: Any) -> Family:
    path, calls = _stack(trace, hf)
    blocks = [Block(trace, call) for call in calls]
    seen = [(block, looked(block)) for block in blocks]
    mixes = mixing(hf, [call for each in seen for call in unseen(*each)])
    found = [said(*each, mixes, seen[:i]) for i, each in enumerate(seen)]
    final, (embed, scale, positions) = _final_norm(trace, path, calls[-1]), _start(trace, calls[0])
    decoder = _around(trace, [path, final.path, *(part for part in (embed, positions) if part)])
    kind = _kind([call for part in found for call in part.norms] + [final])
    logit_scale, logit_cap = (1.0, None) if trace.loud is None else _logits(trace, trace.loud, final, hf)
    numbers = {"embed_scale": scale, "logit_scale": logit_scale, "logit_cap": logit_cap}
    return Family(
        decoder=decoder, blocks=below(decoder, path), embed=below(decoder, embed),
        pos_embed=positions and below(decoder, positions), final_norm=below(decoder, final.path),
        layer_norm=kind[0], norm_gain_offset=kind[1], **_settled(_agreed(blocks, found) | numbers, hf),
    )  # fmt: skip


# The blocks.


def _stack(trace: Traced, hf: nn.Module) -> tuple[str, list[Called]]:
    """The longest of the outermost lists of modules that ran one after the other, each reading and giving a stream."""
    found = {path: calls for path, part in hf.named_modules() if (calls := _chain(trace, path, part))}
    if not found:
        raise Unlike("no list of blocks that all ran, each reading and giving one stream")
    outermost = min(path.count(".") for path in found)
    path, calls = max(found.items(), key=lambda item: (item[0].count(".") == outermost, len(item[1])))
    if calls[0].gave.dim() != _STREAM:
        raise Unlike("it keeps several streams: its blocks read and give more than one vector at a position")
    for one, after in pairwise(calls):
        if bare(one.made) is not bare(after.reads):
            raise Unlike("something is done to the stream between its blocks")
    return path, calls


def _chain(trace: Traced, path: str, part: nn.Module) -> list[Called]:
    """The calls of a list's children, if each ran once, in order, on what has one shape."""
    if not isinstance(part, (nn.ModuleList, nn.Sequential)):
        return []
    each = [trace.of(f"{path}.{name}") for name, _ in part.named_children()]
    calls = [found[0] for found in each if len(found) == 1]
    shapes = {None if x is None else x.shape for call in calls for x in (call.read, call.gave)}
    in_order = calls == sorted(calls, key=trace.calls.index)
    streams = len(shapes) == 1 and calls[0].gave.dim() >= _STREAM
    return calls if streams and in_order and len(calls) == len(each) else []


def _agreed(blocks: Sequence[Block], found: Sequence[Said]) -> dict[str, Any]:
    """What all blocks say alike; of paths, the names that lead to the right module in each."""
    agreed: dict[str, Any] = {name: _path(name, blocks, found) for name in Said.paths()}
    agreed["out_bias"] = _parameter(blocks, found)
    for name, unknown in _UNKNOWN.items():
        values = [value for part in found if (value := getattr(part, name)) is not None] or [unknown]
        if name in _ANY:
            values = [any(values)]
        if any(value != values[0] for value in values):
            raise Unlike(f"its layers differ in {name.replace('_', ' ')}")
        agreed[name] = values[0]
    shared = {i: part.shared for i, part in enumerate(found) if part.shared is not None}
    mixers = {
        i: part.heads for i, part in enumerate(found)
        if part.heads is not None and part.value is None and i not in shared
    }  # fmt: skip
    of_layers = {name: [getattr(part, name) or 0 for part in found] for name in ("heads", "kv_heads")}
    of_layers |= {name: [getattr(part, name) for part in found] for name in ("gain", "mid_gain", "residual_scale")}
    return {
        **agreed,
        "mixers": mixers,
        "shared": shared,
        **{name: _alike(numbers) for name, numbers in of_layers.items()},
    }


def _alike(numbers: list[Any]) -> Any:
    """The one number of all layers; else that of each."""
    return numbers[0] if len({*numbers}) == 1 else numbers


def _path(name: str, blocks: Sequence[Block], found: Sequence[Said]) -> Where:
    """The path of all blocks; where they differ, that of the first module of several that exists, else that of each."""
    start = Said.paths()[name]["root"]
    paths = [getattr(part, name) for part in found]
    distinct = [*dict.fromkeys(path for path in paths if path is not None)]
    if not distinct:
        return getattr(Family, name) if Said.paths()[name]["always"] else None
    joined = "|".join(distinct)
    for block, part, path in zip(blocks, found, paths, strict=True):
        root = maybe(block.module, getattr(part, start)) if start else block.module
        # What has no attention, or no MLP, is asked for none, so there may be a module of that name.
        asked = path is not None or (name in _NORMS and root is not None)
        if asked and maybe(root, joined) is not maybe(root, path):
            return tuple(paths)
    return joined


def _parameter(blocks: Sequence[Block], found: Sequence[Said]) -> str | None:
    """The parameter that blocks add to what attention writes; a layer that lacks it adds none."""
    paths = [*dict.fromkeys(part.out_bias for part in found if part.out_bias is not None)]
    for block, part in zip(blocks, found, strict=True):
        if any((held(block.module, path) is not None) != (path == part.out_bias) for path in paths):
            raise Unlike("its layers differ in what parameter they add")
    return paths[0] if paths else None


def _kind(norms: Sequence[Called]) -> NormKind:
    """The kind of norm that all of them are; that of the least error where several would do."""
    fits = [norm_kinds(call) for call in norms]
    common = reduce(lambda one, other: one & other, (set(fit) for fit in fits))
    if not common:
        raise Unlike("its norms are of several kinds")
    return min(sorted(common), key=lambda kind: max(fit[kind] for fit in fits))


# Before the blocks, and after them.


def _start(trace: Traced, first: Called) -> tuple[str, float, str | None]:
    """Which module gives the embedding of tokens, its factor, and which that of positions; REST where no one does."""
    assert first.reads is not None  # noqa: S101 (a block that reads nothing is refused before)
    parts = list(terms(first.reads, None, partial(trace.maker, within="")))
    tokens = [part for part in parts if part.call is not None and behind(part.call.made, {trace.start})]
    others = [part for part in parts if part not in tokens]
    if trace.start is None:
        raise Unlike("its embedding of tokens is not called")
    if len(tokens) != 1:
        odd = ", ".join(part.other or part.call.path for part in others)
        raise Unlike(f"the stream starts with {len(tokens)} embeddings of tokens" + (f", and {odd}" if odd else ""))
    (token,) = tokens
    if len(trace.of(token.call.path)) > 1 and not others:
        return REST, 1.0, None
    _once(trace, token.call)
    if not others:
        return token.call.path, token.factor, None
    one = others[0].call if len(others) == 1 and others[0].factor == 1 else None
    if one is None or len(trace.of(one.path)) > 1 or one.gave.dim() != _STREAM:
        return token.call.path, token.factor, REST
    return token.call.path, token.factor, one.path


def _once(trace: Traced, call: Called) -> None:
    if len(trace.of(call.path)) > 1:
        raise Unlike(f"one module, {call.path}, is called in several places")


def _final_norm(trace: Traced, path: str, last: Called) -> Called:
    out = bare(last.made)
    for call in trace.calls:
        if bare(call.reads) is out and not call.within(path) and norm_kinds(call):
            # Where it ran before, on the embedding, it is its last run that is the final one.
            if call is not trace.of(call.path)[-1]:
                _once(trace, call)
            return call
    raise Unlike("no norm reads what its last block gives")


def _around(trace: Traced, paths: Sequence[str]) -> str:
    """The innermost module that was called and holds all of these."""
    parts = [path.split(".")[:-1] for path in paths]
    common = [names[0] for names in zip(*parts, strict=False) if len({*names}) == 1]
    while common and not trace.of(".".join(common)):
        common.pop()
    return ".".join(common)


def _logits(trace: Traced, loud: Tensor, final: Called, hf: Any) -> tuple[float, float | None]:
    """Scale and cap of the logits: what the model makes of loud ones. A cap is a number of the configuration."""
    head = next(call for call in reversed(trace.calls) if call.module is head_of(hf))
    got, raw = (x.detach().cpu().double().flatten() for x in (first_of(trace.output), loud))
    if head.read is None or head.read.shape != final.gave.shape or got.shape != raw.shape:
        raise Unlike("the unembedding does not read what the final norm gives")
    before, rest = _fitted(head.read.double().flatten(), final.gave.double().flatten())
    if rest > SAME:
        raise Unlike("something stands between the final norm and the unembedding")
    for cap in (None, *(number for number in _numbers(hf) if bool((got.abs() <= number).all()))):
        scale, rest = _fitted(got, raw) if cap is None else _capped(got, raw, cap)
        if rest <= SAME:
            return before * scale, cap
    raise Unlike("the logits are no scaled or capped unembedding of the final norm")


def _fitted(got: Tensor, raw: Tensor) -> tuple[float, float]:
    """The factor of the least squares, and the relative error that is left."""
    factor = (raw @ got) / (raw @ raw)
    return float(factor), float((got - factor * raw).norm() / got.norm())


def _capped(got: Tensor, raw: Tensor, cap: float) -> tuple[float, float]:
    below_it = got.abs() < _BELOW * cap
    factor, _ = _fitted(cap * torch.atanh(got[below_it] / cap), raw[below_it])
    return factor, float((got - cap * torch.tanh(factor * raw / cap)).norm() / got.norm())


def _numbers(hf: Any) -> list[float]:
    """The positive numbers that stand in a configuration."""
    values = [value for config in (hf.config, text_config(hf.config)) for value in config.to_dict().values()]
    return sorted({float(value) for value in values if type(value) in (int, float) and value > 0})


def _settled(found: dict[str, Any], hf: Any) -> dict[str, Any]:
    """The fields of a row, numbers as the configuration has them where it does, functions where a row has functions."""
    for name in ("embed_scale", "residual_scale", "logit_scale", "value_factor"):
        found[name] = _named(found[name], hf) if isinstance(found[name], float) else found[name]
    functions = {part.name for part in fields(Family) if callable(getattr(Family, part.name, None))}
    return {name: _always(value) if name in functions else value for name, value in found.items()}


def _named(number: float, hf: Any) -> float:
    known = [1.0, *(side for value in _numbers(hf) for side in (value, 1 / value))]
    return next((value for value in known if abs(number - value) <= _NAMED * value), number)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda config: value
