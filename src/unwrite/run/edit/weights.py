"""What if some weights of a model were others, by a low rank, for a while? The one place where a weight is changed.

W' = W + Σ_i read_i write_iᵀ, for a W [d_in, d_out] through which a node writes: what it reads along `read_i` it also
writes along `write_i`. An edit that is linear in what such a W reads is a change of that kind: x' = x + g·β·P x at its
input is W' = W + g·β·P W. One fact is a change of rank 1 of an MLP (ROME: Meng et al. 2022, arXiv 2202.05262; its link
to a patched direction: Makelov et al. 2023, arXiv 2311.17030); so is a singular channel of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.errors import ModelError, NodeError, several, shown
from unwrite.model.fold import value_columns
from unwrite.model.hooks import Point
from unwrite.model.projections import is_plain, matrix_of
from unwrite.model.view import Layer, Model, require_model
from unwrite.nodes import PROJECTED, Site
from unwrite.run.edit import bases
from unwrite.run.edit.edits import Edit
from unwrite.run.edit.sae import Sae
from unwrite.run.edit.sites import all_named, last_projection, named, place
from unwrite.run.edit.trace import require_free

Changes = Mapping[str, bases.Oblique] | Sequence[Edit] | Edit
_EXPECTED = 'uw.Edit, several, or {"L2H3": (read, write)}, such as "MLP2" or "L2KV1.v"'


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of one projection's weight: rows and columns of it as [input, output]."""

    module: nn.Module
    rows: slice
    columns: slice

    def of(self, lm: Model) -> Float[Tensor, "d_in d_out"]:
        """The numbers themselves, through which they can be changed."""
        return matrix_of(lm, self.module).detach()[self.rows, self.columns]


@dataclass(frozen=True, eq=False)
class _Change:
    """W' = W + readᵀ write; of an edit `write` is what it puts into W's input, and `factor` its g·β."""

    part: _Part
    read: Float[Tensor, "rank d_in"]
    write: Float[Tensor, "rank d"]
    factor: float | None = None


@contextmanager
def rewritten(lm: Model, changes: Changes) -> Iterator[None]:
    """Inside the `with`, some weights are others by a low rank; afterwards, however it ends, they are what they were.

    Arguments: `changes` names and pairs (read, write) of tensors [d] or [rank, d]: W' = W + Σ read_i write_iᵀ, where W
    is what the named node writes through: of "L2H3" its rows of W_O, of "MLP2" the last projection; of "L2KV1.v" (also
    "L2H3.v" where no head shares it) its columns of W_V. Or an `Edit`, or several, of what such a projection reads
    ("L2H3.z", "MLP2.act"), of all rows, without a source, its gain one number: what they would do at run time. What is
    read of the model inside the `with`, also its hash, is of the changed weights; they come back bit for bit.
    Raises NodeError for a name that is not there, an edit that no weights can say, and directions of another width or
    that depend on each other; ModelError inside of a `uw.trace`, for weights that are quantised, offloaded, or another
    module's as well, and where a changed one is not finite.

    Example: `with uw.rewritten(lm, uw.Edit.channel(uw.channels(lm), "L2H3", 0)): found = uw.solves(lm, pairs)`
    """
    require_model(lm)
    require_free(lm)
    asked = list(_asked(lm, changes))
    for one in asked:
        _require_own(lm, one.part.module)
    with ExitStack() as stack:
        # What a later edit makes of x passes last, so it is the first to become a part of W.
        for one in reversed(asked):
            stack.callback(_set, lm, one.part, one.part.of(lm).clone())
            _set(lm, one.part, _changed(lm, one))
        yield


def _asked(lm: Model, changes: Any) -> Iterator[_Change]:
    """Each change that is asked for, checked."""
    if isinstance(changes, Mapping):
        if not changes:
            raise NodeError("no change was named", got=shown(changes), expected=_EXPECTED)
        for name, pair in changes.items():
            site = named(lm, name)
            part = _written_through(lm, site)
            if not isinstance(pair, tuple):
                raise NodeError(f"the change of {site} is no pair", got=shown(pair), expected="(read, write)")
            yield _Change(part, *_directions(site, pair, part.of(lm).shape))
        return
    edits = [changes] if isinstance(changes, Edit) else several("these are no changes", changes, _EXPECTED, NodeError)
    if not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise NodeError("these are no changes", got=shown(changes), expected=_EXPECTED)
    for edit in edits:
        for site in all_named(lm, edit.site):
            yield _of_edit(lm, site, edit)


def _written_through(lm: Model, site: Site) -> _Part:
    """The part of a weight that a name stands for. Raises NodeError for one that stands for none."""
    place(lm, site)  # is it there?
    layer, every = lm.layers[site.layer], slice(None)
    if site.kind in PROJECTED:
        return _Part(layer.out_proj, slice(site.head * layer.head_dim, (site.head + 1) * layer.head_dim), every)
    if site.kind == "mlp" and (last := last_projection(lm, layer)) is not None:
        return _Part(last, every, every)
    if site.kind in ("v", "shared_v"):
        return _Part(layer.value, every, _values(lm, layer, site))
    raise NodeError(f"{site} stands for no weight", expected="L2H3, MLP2 with one last projection, or L2KV1.v")


def _reading(lm: Model, site: Site) -> _Part | None:
    """The part of a projection's weight that reads what is at a site; None where none does."""
    point, layer, every = place(lm, site).point, lm.layers[site.layer], slice(None)
    if not isinstance(point, Point) or not point.before:
        return None
    if layer.heads and point.module is layer.out_proj:
        return _written_through(lm, Site(layer.kind, site.layer, site.head))
    if not layer.has_mlp or point.module is not last_projection(lm, layer):
        return None
    return _Part(point.module, slice(site.head, site.head + 1) if site.head >= 0 else every, every)


def _values(lm: Model, layer: Layer, site: Site) -> slice:
    """Which columns of what makes values are a head's. Raises NodeError for shared ones, and those of another layer."""
    group = site.head if site.kind == "shared_v" else site.head * layer.kv_heads // layer.heads
    if site.kind == "v" and layer.kv_heads < layer.heads:
        raise NodeError(f"{site} is shared by its group", fix=f"change L{site.layer}KV{group}.v")
    if layer.values_of is not None:
        of = layer.values_of.index
        raise NodeError(f"{site} is that of layer {of}", fix=f"change L{of}KV{group}.v")
    first = int(value_columns(lm, layer).nonzero()[group * layer.head_dim])
    return slice(first, first + layer.head_dim)


def _directions(site: Site, pair: bases.Oblique, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Directions as rows. Raises NodeError for what are none, for another width, and for other numbers of them."""
    for part in pair:
        bases.orthonormal(part)
    rows = [torch.atleast_2d(part).detach() for part in pair]
    if len(rows) != 2 or [part.shape[1] for part in rows] != [*shape] or len(rows[0]) != len(rows[1]):
        got = " and ".join(str(list(part.shape)) for part in rows)
        raise NodeError(
            f"the change of {site} has another shape", got=got,
            expected=f"[{shape[0]}] and [{shape[1]}], or as many rows of both",
        )  # fmt: skip
    return rows[0], rows[1]


def _of_edit(lm: Model, site: Site, edit: Edit) -> _Change:
    """What an edit of a projection's input is as a change of its weight. Raises NodeError for one that is none."""
    linear = edit.at is None and not edit.alpha and not isinstance(edit.basis, Sae)
    if (part := _reading(lm, site)) is None or not linear or isinstance(edit.gain, Tensor):
        raise NodeError(
            f"no weights can say the edit of {site}", expected="one of L2H3.z or MLP2.act, of all rows (at=None), "
            "without a source, its gain a number", fix="make it at run time, by uw.trace",
        )  # fmt: skip
    wide = len(part.of(lm))
    read, write = _as_pair(edit.basis, wide)
    if read.shape[1] != wide:
        raise NodeError(f"the basis of the edit of {site} has another width", got=read.shape[1], expected=wide)
    return _Change(part, read, write, float(edit.gain * edit.beta))


def _as_pair(basis: Any, wide: int) -> bases.Oblique:
    """What P reads and writes."""
    if basis is None:
        return (every := torch.eye(wide, dtype=torch.float64)), every
    pair = basis if isinstance(basis, tuple) else (bases.orthonormal(basis).mT,) * 2
    read, write = (torch.atleast_2d(part).detach() for part in pair)
    return read, write


def _require_own(lm: Model, module: nn.Module) -> None:
    """Raise ModelError for a weight that is not here as plain numbers, or that is another module's as well."""
    weight, kind, fix = getattr(module, "weight", None), type(module).__name__, "make the edit at run time, by uw.trace"
    if isinstance(weight, Tensor) and weight.is_meta:
        what = f"the weight of a {kind} is kept elsewhere, and brought in at each pass"
        raise ModelError(what, expected="weights on a device", fix=f"load the model without device_map, or {fix}")
    if not is_plain(module) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        what = f"the weight of a {kind} is quantised, or made of others"
        raise ModelError(what, expected="plain numbers", fix=f"dequantise it, merge adapters, or {fix}")
    every = (part for _, one in lm.hf.named_modules(remove_duplicate=False) for part in one._parameters.values())
    owners = sum(type(part) is type(weight) and part.data_ptr() == weight.data_ptr() for part in every)
    if owners > 1:
        what = f"the weight of a {kind} is tied: it is used in {owners} places"
        raise ModelError(what, expected="a weight of this node alone", fix=fix)


def _changed(lm: Model, one: _Change) -> Tensor:
    """The numbers of a part as they are now, changed, in its dtype."""
    old = one.part.of(lm)
    weight = old.to(lm.compute_dtype)
    read, write = one.read.to(weight), one.write.to(weight)
    write = write if one.factor is None else one.factor * (write @ weight)
    new = (weight + read.mT @ write).to(old.dtype)
    if not bool(new.isfinite().all()):
        raise ModelError(f"a changed weight of a {type(one.part.module).__name__} is not finite", got=str(old.dtype))
    return new


def _set(lm: Model, part: _Part, values: Tensor) -> None:
    """Put numbers in the place of a part's: counted as a change, so that the weights' hash is computed anew."""
    held = part.of(lm)
    with torch.no_grad(), torch.inference_mode(held.is_inference()):
        held.copy_(values)
