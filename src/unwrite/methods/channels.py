"""Which singular channel of a head is read by which later head, by the weights alone, and what do runs say to it?

score[writer, channel, reader, side] = ‖v_i M‖ / ‖M‖: v_i what channel i writes (`model/channels.py`), M what the reader
compares by its queries or keys, or moves by its values; the composition score (Elhage et al. 2021) of one channel.
whole² = Σ_i s_i² / Σ s² · score_i² is that of the head (Merullo, Eickhoff and Pavlick 2024, arXiv 2406.09519), kernel
the mean cos² of the principal angles between what the head can write and what the reader can read (arXiv 2601.10266).
generic is the score of random directions in the place of v_i, by the same reader: it is not 1/√d where a reader reads
some directions more than others. Weights propose, runs decide: `executed` puts what edges do beside what they score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from unwrite.errors import NodeError, NumericError, ResultError, shown, whole
from unwrite.model.channels import Listening, channels_in, readings
from unwrite.model.load import provenance
from unwrite.model.onednn import fast
from unwrite.model.view import Model, require_model
from unwrite.nodes import Node, choose
from unwrite.result import Result, build, quantity
from unwrite.stats.ranks import spearman

SIDES = "qkv"
_QUANTILES, _DRAWS = (0.5, 0.95, 0.99), 64
# Nearer than this part of the larger one, a thousandth of the weights turns two channels by a tenth of a radian.
_NEAR = 0.01
_EDGES, _CHANNEL, _RANDOM = ("writer", "reader", "side"), ("writer", "channel"), ("generic", "generic_best")
_AXES = {
    "singular": _CHANNEL, "block": _CHANNEL, "score": ("writer", "channel", "reader", "side"),
    **dict.fromkeys(("read", "write"), (*_CHANNEL, "d_model")),
    **dict.fromkeys(("z_read", "z_write"), (*_CHANNEL, "d_head")),
    **dict.fromkeys(_RANDOM, ("quantile", "reader", "side")),
    **dict.fromkeys(("agreement", "agreement_whole"), ("reader", "side")),
}  # fmt: skip
_SAYS = {
    "singular": ("activation", "s_i of OV = Σ_i s_i u_i v_iᵀ, norms' gains folded, their scales held"),
    "read": ("1", "u_i: what the channel reads of the stream, as the norm before values leaves it"),
    "write": ("1", "v_i: what the channel writes into the stream"),
    "z_read": ("1", "W_O v_i: of z, how much of v_i the head writes"),
    "z_write": ("1", "u_i W_V / s_i: what of z is written as v_i"),
    "block": ("1", "the first of the channels whose singular values lie one by one within 1 % of each other"),
    "score": ("1", "‖v_i M‖ / ‖M‖, M = W_Q T W_Kᵀ by its side, or W_V W_O, of the reader"),
    "whole": ("1", "√(Σ_i s_i² score_i² / Σ_i s_i²)"),
    "kernel": ("1", "mean cos² of the principal angles between what the head writes and the side reads"),
    "best": ("1", "the largest score of a channel"),
    "best_channel": ("1", "the channel that has it"),
    "rank": ("1", "1 + writers whose best channel scores more with this side of this reader"),
    "generic": ("1", "the score of random unit vectors by this side of this reader"),
    "generic_best": ("1", "the largest score of as many random orthonormal directions as a head has channels"),
    "agreement": ("1", "Spearman's correlation, over writers, of best and |effect|"),
    "agreement_whole": ("1", "the same of whole and |effect|"),
}  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def channels(
    lm: Model,
    writers: Any = "heads",
    readers: Any = "heads",
    sides: str = SIDES,
    offset: int = 0,
    executed: Result | None = None,
) -> Result:
    """Singular channels of heads, and how much each is read by the queries, keys and values of later heads.

    OV = Σ_i s_i u_i v_iᵀ for W_V W_O with all norms' gains folded and their scales held (positive factors, which move
    with the prompt): channel i reads u_i and writes v_i. A reader's side is W_Q T W_Kᵀ, by its queries ("q") or keys
    ("k"), T what norms and rotary positions make of both where the query is `offset` tokens behind the key; or its own
    W_V W_O ("v"). Nothing is run but one pass that shows T.

    Arguments: `writers` and `readers` "heads" (of attention) or names; `sides` some of "qkv"; `offset` in tokens;
    `executed` what `uw.paths` found of edges from these writers into "L2H3.q", ".k" or ".v", to stand beside scores.
    Returns a Result with `singular[writer, channel]`, `read` and `write[writer, channel, d_model]`, `z_read` and
    `z_write[writer, channel, d_head]` (for `uw.Edit.channel`), `block[writer, channel]`: channels of one block are one
    subspace; `score[writer, channel, reader, side]`, `whole`, `kernel`, `best`, `best_channel` and `rank[writer,
    reader, side]`, beside `generic` and `generic_best[quantile, reader, side]` of random directions; NaN where the
    reader lies before the writer. With `executed`, `effect[writer, reader, side]` and `agreement[reader, side]`,
    Spearman's correlation of best and |effect| over writers, and over all edges the attributes `agreement` and
    `agreement_whole`.
    Raises NodeError for a node that is no head of attention, a head whose OV is no fixed matrix, and a side that a
    layer lacks; NumericError for unknown sides and offsets; ResultError for edges of another model, or of others.
    Source: Merullo, Eickhoff and Pavlick 2024, arXiv 2406.09519; Elhage et al. 2021 for the score.

    Example: `uw.channels(lm, readers=["L23H0"], sides="q")["best"].to_series().nlargest(5)`
    """
    require_model(lm)
    send, read = _heads(lm, "writers", writers), _heads(lm, "readers", readers)
    sides = _sides(sides)
    whole("offset is a number of tokens", offset, 0, (lm.context or 2**20) - 1)
    effect = None if executed is None else _executed(lm, executed, send, read, sides)
    with fast(lm.hf):
        found = _written(lm, send)
        found |= _read(lm, send, read, sides, offset, torch.from_numpy(found["write"]))
    found |= _of_heads(found["score"], found["singular"])
    axes = {"writer": [*map(str, send)], "reader": [*map(str, read)], "side": [*sides], "quantile": [*_QUANTILES]}
    named = {name: quantity(_AXES.get(name, _EDGES), part, *_SAYS[name]) for name, part in found.items()}
    data = xr.Dataset(named, axes).assign_attrs(offset=offset)
    settings = {"writers": axes["writer"], "readers": axes["reader"], "sides": sides, "offset": offset}
    settings |= {"executed": None if executed is None else executed.provenance["settings"]}
    return build("channels", data if effect is None else _beside(data, effect), settings, provenance(lm), {})


def _heads(lm: Model, what: str, names: Any) -> tuple[Node, ...]:
    """The heads of attention asked for. Raises NodeError for any other node."""
    every = tuple(node for node in lm.parts if node.kind == "head")
    chosen = every if isinstance(names, str) and names == "heads" else choose(names, lm.parts)
    if others := [str(node) for node in chosen if node.kind != "head"] or ([] if chosen else ["heads"]):
        raise NodeError(f"{what} are heads of attention", got=", ".join(others[:8]), expected="names such as L2H3")
    return chosen


def _sides(sides: Any) -> str:
    """In one order. Raises NumericError for anything but some of "qkv"."""
    if not isinstance(sides, str) or not sides or set(sides) - set(SIDES):
        raise NumericError("sides are by what a head reads", got=shown(sides), expected=f"some of {SIDES!r}")
    return "".join(side for side in SIDES if side in sides)


def _written(lm: Model, heads: tuple[Node, ...]) -> dict[str, np.ndarray]:
    """The channels of these heads; NaN beyond those that one has."""
    layers = {layer: channels_in(lm, lm.layers[layer]) for layer in sorted({node.layer for node in heads})}
    names = ("singular", "read", "write", "z_read", "z_write")
    each = {name: [getattr(layers[node.layer], name)[node.head].cpu() for node in heads] for name in names}
    found = {name: _stacked(parts) for name, parts in each.items()}
    return {**found, "block": _blocks(found["singular"])}


def _stacked(parts: list[Tensor]) -> np.ndarray:
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    whole_ = torch.full((len(parts), *shape), torch.nan, dtype=parts[0].dtype)
    for one, part in zip(whole_, parts, strict=True):
        one[tuple(map(slice, part.shape))] = part
    return whole_.numpy()


def _blocks(singular: np.ndarray) -> np.ndarray:
    """The first channel of each one's block; −1 where there is no channel."""
    apart = singular[:, :-1] - singular[:, 1:] > _NEAR * singular[:, :-1]
    begins = np.concatenate([np.ones((len(singular), 1), bool), apart], 1)
    first = np.maximum.accumulate(np.where(begins, np.arange(singular.shape[1]), 0), 1)
    return np.where(np.isfinite(singular), first, -1)


def _read(
    lm: Model, send: tuple[Node, ...], read: tuple[Node, ...], sides: str, offset: int, write: Tensor
) -> dict[str, np.ndarray]:
    """All scores, of channels that a reader's side can see."""
    kinds = {"score": write.shape[:2], "kernel": write.shape[:1], **dict.fromkeys(_RANDOM, (len(_QUANTILES),))}
    found = {name: np.full((*axes, len(read), len(sides)), np.nan, write.numpy().dtype) for name, axes in kinds.items()}
    layers, random = [lm.layers[i] for i in sorted({node.layer for node in read})], _random(lm, write)
    for j, side in enumerate(sides):
        by_layer = readings(lm, layers, side, offset)
        for i, reader in enumerate(read):
            layer, one = lm.layers[reader.layer], by_layer[reader.layer]
            state = (layer if side == "q" else layer.makes_values).reads
            before = [k for k, writer in enumerate(send) if state.holds(writer, lm.parallel)]
            found["score"][before, :, i, j], found["kernel"][before, i, j] = _scored(write[before], one, reader.head)
            generic = _scored(random, one, reader.head)[0]
            for name, part in zip(_RANDOM, (generic.ravel(), generic.max(1)), strict=True):
                found[name][:, i, j] = np.quantile(part, _QUANTILES)
    return found


def _scored(write: Float[Tensor, "writer channel d_model"], by: Listening, head: int) -> tuple[np.ndarray, np.ndarray]:
    """The score of every channel, NaN of none, and the kernel of all that a writer can write."""
    space, weight = by.space[head], by.weight[head]
    along = write.to(space).nan_to_num() @ space
    there = ~write[..., 0].isnan().to(space.device)
    score = (along @ weight).norm(dim=-1).where(there, torch.nan)
    fewer = there.sum(1).clamp(max=int(space.any(0).sum()))
    return score.cpu().numpy(), (along.square().sum((1, 2)) / fewer).cpu().numpy()


def _random(lm: Model, write: Tensor) -> Float[Tensor, "draw channel d_model"]:
    """Random orthonormal directions, as many as a head has channels, of what heads can write."""
    shape = (_DRAWS, lm.d_model, min(write.shape[1], lm.d_model - lm.centred))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = drawn - drawn.mean(1, keepdim=True) if lm.centred else drawn
    return torch.linalg.qr(drawn).Q.mT.to(write.dtype)


def _of_heads(score: np.ndarray, singular: np.ndarray) -> dict[str, np.ndarray]:
    """What the scores of channels make of a head, and its place among writers."""
    there = np.isfinite(score).any(1)
    energy = np.nan_to_num(singular**2)
    # A head may write nothing at all.
    energy = (energy / energy.sum(1, keepdims=True).clip(np.finfo(energy.dtype).tiny))[..., None, None]
    whole_, best = np.sqrt(np.nansum(energy * score**2, 1)), np.nan_to_num(score, nan=-1.0)
    most = best.max(1)
    found = {"whole": whole_, "best": most, "best_channel": best.argmax(1), "rank": rankdata(-most, "min", axis=0)}
    return {name: np.where(there, part, np.nan) for name, part in found.items()}


def _executed(lm: Model, executed: Any, send: tuple[Node, ...], read: tuple[Node, ...], sides: str) -> xr.DataArray:
    """What executed edges do. Raises ResultError for another result, another model, and where there is none of them."""
    if not isinstance(executed, Result) or not {"sender", "receiver"} <= {*executed.data.dims}:
        got = executed.method if isinstance(executed, Result) else shown(executed)
        raise ResultError("executed is no result of uw.paths", got=got, fix="pass what uw.paths returns")
    if executed.provenance["model"]["weights"] != provenance(lm)["weights"]:
        raise ResultError("these edges are of another model", got="other weights", fix="run uw.paths with this one")
    mean = executed.data["mean"]
    if "role" in mean.dims:
        raise ResultError("these edges are by roles", got=shown([*mean["role"].values]), fix="choose one: at='S2'")
    names = [[f"{node}.{side}" for node in read] for side in sides]
    parts = [mean.reindex(sender=[*map(str, send)], receiver=own).transpose("sender", "receiver") for own in names]
    effect = np.stack([part.values for part in parts], -1)
    if not np.isfinite(effect).any():
        raise ResultError(
            "none of these edges was executed", got=f"receivers {shown([*mean['receiver'].values][:4])}",
            expected="receivers such as L2H3.q, and senders that are among the writers",
        )  # fmt: skip
    words = {"units": mean.attrs["units"], "equation": f"mean over pairs; {executed.data['effect'].attrs['equation']}"}
    return xr.DataArray(effect, dims=_EDGES, attrs=words)


def _beside(data: xr.Dataset, effect: xr.DataArray) -> xr.Dataset:
    """The same with what edges do, and how well their scores foretell how much."""
    found = {"effect": effect}
    attrs: dict[str, float] = {"edges": int((effect.notnull() & data["best"].notnull()).sum())}
    readers, sides = (range(data.sizes[axis]) for axis in ("reader", "side"))
    for name, of in (("agreement", "best"), ("agreement_whole", "whole")):
        score = data[of].values
        attrs[name] = _agree(score, effect.values)
        each = [[_agree(score[:, i, j], effect.values[:, i, j]) for j in sides] for i in readers]
        found[name] = xr.DataArray(np.array(each), dims=_AXES[name], attrs={"units": "1", "equation": _SAYS[name][1]})
    return data.assign(found).assign_attrs(attrs)


def _agree(score: np.ndarray, effect: np.ndarray) -> float:
    """Spearman's correlation with the size of effects, of edges that have both; NaN of fewer than three."""
    both = np.isfinite(score) & np.isfinite(effect)
    return spearman(score[both], np.abs(effect[both])) if both.sum() > 2 else float("nan")
