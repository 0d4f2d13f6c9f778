"""What is an intervention? One formula, as a value: x' = x + g · P(α · source + β · x).

x is what is at a site, P keeps what lies in a subspace (all of it unless a basis is given), g is a gain. Patching is
(α, β) = (1, −1), ablation (0, −1), adding (1, 0), scaling by c (0, c − 1); a mask is a gain between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from unwrite.errors import NodeError, finite, several, shown
from unwrite.nodes import Site, parse_site, parse_sites
from unwrite.result import Result
from unwrite.run.edit import bases
from unwrite.run.edit.sae import Sae

Number = float | int
Made = Callable[[Tensor], Any]
Where = int | Sequence[int] | slice | Tensor | np.ndarray | None


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of what is at a site: x' = x + gain · P(alpha · source + beta · x). Given to `uw.trace`.

    Arguments: `site` a name ("L2H3.z", "resid_mid2", …), or one of several, each of which is edited ("L2.z": all heads
    of a layer, "resid_post*", …); `source` a number, a vector [d] for every row, a tensor of the site's own shape
    [prompt, position, d], such as one that another trace recorded (with `at`, also only the chosen positions [prompt,
    chosen, d], or [prompt, d] for one; for several sites, theirs as a trace stacks them), or a function of what is
    there at the chosen rows [prompt, chosen, d] (of a mask [row, d]) that gives a number or as many; `basis` one vector
    [d] or several [direction, d] that span what P keeps, a pair (read, write) of such tensors, P x = Σ (x · r_i) w_i,
    or an autoencoder of `uw.sae`: its features then take the place of x, and its decoder that of P; `gain` as `source`
    but no function, or [prompt, position]; `at` the rows: a position, several in increasing order, a slice, a mask
    [prompt, position], or for each prompt a row of its own, or several in increasing order, as integers [prompt] or
    [prompt, chosen] (such as `pairs.roles["S2"]`). Positions count
    from the start of the text also where a pass, in `generate`, brings only its newest token; negative ones count from
    the end of the text at each pass. The rows of a pattern are queries. Any tensor may require a gradient.
    Raises NodeError for a name, a basis or positions that mean nothing.

    Example: `uw.Edit("L2H3", source=v, alpha=1.0, gain=0.5, at=-1)`; most are said shorter by `set`, `add`, `scale` and
    `project_out`.
    """

    site: Any
    source: Tensor | Number | Made | None = None
    alpha: Number = 0.0
    beta: Number = 0.0
    basis: Tensor | bases.Oblique | Sae | None = None
    gain: Tensor | Number = 1.0
    at: Where = None

    def __post_init__(self) -> None:
        if parse_sites(self.site) is None:
            parse_site(self.site)
        for name in ("alpha", "beta"):
            finite(f"{name} is a factor", getattr(self, name))
        for name in ("source", "gain"):
            _check_value(name, getattr(self, name))
        if self.alpha != 0 and self.source is None:
            raise NodeError(f"the edit of {self.site} has no source", fix="give `source`, or leave `alpha` at 0")
        if self.basis is not None and not isinstance(self.basis, Sae):
            bases.check(self.basis)
        _check_rows(self)

    @classmethod
    def set(cls, site: Any, value: Tensor | Number | Made, **rest: Any) -> Edit:
        """Put `value`, or what it makes of what is there, in its place: (α, β) = (1, −1). With `basis`, only its part
        in the subspace.

        Example: `uw.Edit.set("L2H3.z", clean["L2H3.z"], at=-1)` patches in what another trace recorded;
        `uw.Edit.set("MLP2", 0.0)` removes what the node writes; `uw.Edit.set("MLP2", torch.relu)`.
        """
        return cls(site, value, 1.0, -1.0, **rest)

    @classmethod
    def mean(cls, site: Any, values: Tensor | None = None, **rest: Any) -> Edit:
        """Put a mean in place of what is there: of `values` [prompt, position, d] as a trace recorded them (for several
        sites as it stacks them) over prompts and positions, or without them of what the pass itself has at the edited
        rows.

        Example: `uw.Edit.mean("L2.z", clean["L2.z"])` silences a layer's heads at what they are on average.
        """
        if values is None:
            return cls.set(site, _mean_of_rows, **rest)
        if not isinstance(values, Tensor) or values.dim() not in (3, 4):
            raise NodeError("a mean is of recorded values", got=shown(values), expected="[prompt, position, d]")
        _check_value("values", values)
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        mean = exact.mean((0, 1)) if values.dim() == 3 else exact.mean((0, 2), keepdim=True)
        return cls.set(site, mean, **rest)

    @classmethod
    def add(cls, site: Any, value: Tensor | Number, **rest: Any) -> Edit:
        """Add `value` to what is there: (α, β) = (1, 0). Example: `uw.Edit.add("resid_post2", direction, gain=4.0)`."""
        return cls(site, value, 1.0, 0.0, **rest)

    @classmethod
    def scale(cls, site: Any, factor: Number, **rest: Any) -> Edit:
        """Multiply what is there by `factor`: (α, β) = (0, factor − 1). Example: `uw.Edit.scale("L2H3", 0.5)`."""
        finite("factor is what a value is multiplied by", factor)
        return cls(site, None, 0.0, factor - 1.0, **rest)

    @classmethod
    def project_out(cls, site: Any, basis: Tensor | bases.Oblique, **rest: Any) -> Edit:
        """Remove what lies in the span of `basis` ([d] or [direction, d]), or P x of a pair: (α, β) = (0, −1).

        Example: `uw.Edit.project_out("resid_mid2", directions)`.
        """
        bases.check(basis)
        return cls(site, None, 0.0, -1.0, basis, **rest)

    @classmethod
    def channel(
        cls, found: Result, writer: str, channels: int | Sequence[int], factor: Number = 0.0, **rest: Any
    ) -> Edit:
        """Multiply singular channels of a head, as `uw.channels` found them, by `factor`: 0 removes, −1 reverses.

        The same as the change of weights by `uw.rewritten`, also where a norm follows. Channels that are one subspace
        go together. Raises NodeError for what the result does not have, ResultError for another one.
        Example: `uw.Edit.channel(uw.channels(lm), "L2H3", 0, factor=-1.0, at=-1)`.
        """
        finite("factor is what a channel is multiplied by", factor)
        basis = bases.channels_of(found, writer, channels)
        return cls(f"{writer}.z", None, 0.0, factor - 1.0, basis, **rest)


def of_one(edit: Edit, i: int, count: int) -> Edit:
    """Of an edit of several sites the edit of the i-th. Raises NodeError for values of another number of sites."""
    source = edit.source
    if not isinstance(source, Tensor) or source.dim() != 4:
        return edit
    if source.shape[1] != count:
        what = f"the source of the edit of {edit.site} is of other sites"
        raise NodeError(what, got=source.shape[1], expected=count)
    own = source[:, i]
    return replace(edit, source=own[0, 0] if own.shape[:2] == (1, 1) else own)


def _mean_of_rows(x: Tensor) -> Tensor:
    return x.mean(tuple(range(x.dim() - 1)), keepdim=True).expand_as(x)


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not (value.is_meta or value.is_complex() or value.dtype == torch.bool)
        if not plain:
            got = f"{shown(value)} on {value.device.type}"
            raise NodeError(f"{name} is no value", got=got, expected="a tensor of real numbers, or one number")
    elif not (name == "source" and (value is None or callable(value))):
        finite(f"{name} is neither a number nor a tensor", value)


def _check_rows(edit: Edit) -> None:
    at, wrong = edit.at, f"the edit of {edit.site} chooses no rows"
    if isinstance(at, Tensor | np.ndarray):
        if not _own_rows(at) and not _is_mask(at):
            expected = "a mask [prompt, position], true somewhere, or integers [prompt] or [prompt, chosen]"
            raise NodeError(wrong, got=shown(at), expected=expected)
    elif isinstance(at, slice):
        parts = [part for part in (at.start, at.stop, at.step) if part is not None]
        if not all(map(_is_position, parts)) or (at.step is not None and at.step < 1):
            raise NodeError(wrong, got=shown(at), expected="a slice that goes forward")
    elif at is not None and not _is_position(at):
        listed = several(wrong, at, "positions, a slice, or a mask", NodeError)
        if not listed or not all(map(_is_position, listed)):
            raise NodeError(wrong, got=shown(at), expected="at least one position")


def _own_rows(at: Any) -> bool:
    """Is this a row, or several, for each prompt?"""
    if isinstance(at, np.ndarray):
        return at.dtype.kind in "iu" and at.ndim in (1, 2) and at.size > 0
    plain = isinstance(at, Tensor) and at.layout is torch.strided and not (at.is_meta or at.is_complex())
    return plain and not at.is_floating_point() and at.dtype != torch.bool and at.dim() in (1, 2) and at.numel() > 0


def _is_mask(at: Tensor | np.ndarray) -> bool:
    if isinstance(at, np.ndarray):
        return at.dtype == bool and at.ndim == 2 and bool(at.any())
    return at.dtype == torch.bool and at.dim() == 2 and not at.is_meta and bool(at.any())


def _is_position(at: Any) -> bool:
    return isinstance(at, Integral) and not isinstance(at, bool)


def _listed(at: Any) -> tuple[int, ...]:
    """The positions that were named one by one."""
    if at is None or isinstance(at, Tensor | np.ndarray | slice):
        return ()
    return tuple(int(position) for position in ((at,) if isinstance(at, Integral) else at))


@dataclass(frozen=True)
class _Rows:
    """The rows of a pass that an edit touches: `index` takes them out of x, whose first row is at position `offset`.

    Where positions are named one by one or as a slice: how many are `named` in the text so far, and which are `picked`.
    Where each prompt has rows of its `own`: of which prompt each is, and which of those that are named for it.
    """

    index: tuple[Any, ...]
    offset: int
    named: int = 0
    picked: tuple[int, ...] = ()
    own: tuple[Tensor, Tensor] | None = None


@dataclass(eq=False)
class Pending:
    """An edit inside a trace, and what it has touched so far."""

    edit: Edit
    site: Site
    reached: bool = False
    touched: bool = False
    missing: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.missing = set(_listed(self.edit.at))
        if _own_rows(self.edit.at):
            self.missing = {int(row) for row in np.unique(np.asarray(torch.as_tensor(self.edit.at).cpu()))}

    def of(self, x: Tensor, total: int, read: Tensor | None = None) -> Tensor:
        """x' of x [prompt, position, d], whose last row is at position total − 1; x itself if no row is edited.

        `read` is what a transcoder reads there, in place of x.
        """
        self.reached = True
        rows = self._rows(x, max(0, total - x.shape[1]), total)
        if rows is None:
            return x
        self.touched = True
        basis = self.edit.basis
        # What an autoencoder is edited in: its features.
        seen = basis.encode(_exact(x if read is None else read)) if isinstance(basis, Sae) else x
        fitted = partial(self._fitted, x=x, seen=seen, rows=rows)
        new = _formula(self.edit, x[rows.index], seen[rows.index], fitted)
        if self.edit.at is None:
            return new
        out = x.clone()
        out[rows.index] = new
        return out

    def require(self) -> None:
        """Raise NodeError unless every row that was asked for was there in some forward pass."""
        what = f"the edit of {self.site} touched nothing"
        if not self.reached:
            raise NodeError(what, got="no forward pass inside the `with` that reached it")
        if not self.touched:
            raise NodeError(what, got=f"at={shown(self.edit.at)}", expected="positions that the text has")
        if self.missing:
            what = f"the edit of {self.site} did not touch all of its positions"
            raise NodeError(what, got=sorted(self.missing), expected="positions that the text has")

    def _rows(self, x: Tensor, offset: int, total: int) -> _Rows | None:
        at = self.edit.at
        if at is None:
            return _Rows((slice(None),), offset) if x.numel() else None
        if _own_rows(at):
            return self._own(torch.as_tensor(at), x, offset, total)
        if isinstance(at, Tensor | np.ndarray):
            mask = self._mask(torch.as_tensor(at), x, offset, total)
            return _Rows((mask,), offset) if bool(mask.any()) else None
        names = list(range(*at.indices(total))) if isinstance(at, slice) else list(_listed(at))
        places = [name + total * (name < 0) for name in names]
        picked = tuple(i for i, place in enumerate(places) if offset <= place < offset + x.shape[1])
        self.missing -= {names[i] for i in picked}
        rows = [places[i] - offset for i in picked]
        if any(first >= second for first, second in pairwise(rows)):
            raise NodeError(f"positions of the edit of {self.site} are not in increasing order", got=f"at={shown(at)}")
        return _Rows((slice(None), rows), offset, len(names), picked) if rows else None

    def _own(self, at: Int[Tensor, "prompt ..."], x: Tensor, offset: int, total: int) -> _Rows | None:
        """Rows that each prompt has for itself, those of them that this pass brings."""
        named = at.long().reshape(len(at), -1)
        places = torch.where(named < 0, named + total, named)
        if len(at) != len(x) or bool((places[:, 1:] <= places[:, :-1]).any()):
            what = f"rows of the edit of {self.site} are for each prompt its own, in increasing order"
            raise NodeError(what, got=list(at.shape), expected=f"one, or several, for each of {len(x)} prompts")
        prompt, which = ((places >= offset) & (places < total)).nonzero(as_tuple=True)
        self.missing -= set(named[prompt, which].tolist())
        if not len(prompt):
            return None
        rows = places[prompt, which] - offset
        prompt, which, rows = (part.to(x.device) for part in (prompt, which, rows))
        return _Rows((prompt, rows), offset, named.shape[1], own=(prompt, which))

    def _mask(self, mask: Tensor, x: Tensor, offset: int, total: int) -> Tensor:
        # Text that generation has added lies beyond the mask; a shorter mask is a mistake as long as there is none.
        grown = self.touched and mask.shape[1] < total
        if mask.shape[0] != x.shape[0] or (mask.shape[1] != total and not grown):
            what = f"the mask of the edit of {self.site} has another shape"
            raise NodeError(what, got=list(mask.shape), expected=[len(x), total])
        full = mask.new_zeros(len(x), offset + x.shape[1])
        full[:, : mask.shape[1]] = mask
        return full[:, offset:].to(x.device)

    def _fitted(self, name: str, value: Any, x: Tensor, seen: Tensor, rows: _Rows) -> Any:
        """A source or gain as it goes with the chosen rows of x. Raises NodeError for any shape but those allowed."""
        if callable(value) and not isinstance(value, Tensor):
            return self._made(value(seen[rows.index]), seen[rows.index])
        if not isinstance(value, Tensor):
            return value
        value = value.to(x.device)
        if value.dim() == 0:
            return value
        fits = self._fits(name, value, seen if name == "source" else x, rows)
        if tuple(value.shape) in fits:
            return fits[tuple(value.shape)]()
        raise NodeError(
            f"the {name} of the edit of {self.site} has another shape than the site, or comes from another prompt",
            got=list(value.shape),
            expected=" or ".join(["a number", *(str(list(shape)) for shape in fits)]),
        )

    def _made(self, value: Any, seen: Tensor) -> Any:
        """What a function gave. Raises NodeError for anything but a number, or as many as it was given."""
        fits = isinstance(value, Tensor) and value.shape == seen.shape
        if not fits and (isinstance(value, bool) or not isinstance(value, Number)):
            expected = f"a number, or a tensor {list(seen.shape)}"
            raise NodeError(
                f"the function of the edit of {self.site} gave another thing", got=shown(value), expected=expected
            )
        return value.to(seen.device) if isinstance(value, Tensor) else value

    def _fits(self, name: str, value: Tensor, x: Tensor, rows: _Rows) -> dict[tuple[int, ...], Callable[[], Tensor]]:
        """The shapes that go with the chosen rows of x, and how each does; of two that are alike the later one."""
        prompts, positions, width = x.shape
        text = rows.offset + positions
        fits: dict[tuple[int, ...], Callable[[], Tensor]] = {(width,): lambda: value}
        if name == "source" and isinstance(self.edit.at, Tensor | np.ndarray):
            fits[prompts, width] = lambda: value[:, None].expand(-1, positions, -1)[rows.index]
        if name == "source" and rows.picked and isinstance(self.edit.at, Integral):
            fits[prompts, width] = lambda: value[:, None]
        if name == "gain":
            fits[prompts, text] = lambda: value[:, rows.offset :][rows.index][..., None]
        fits[prompts, text, width] = lambda: value[:, rows.offset :][rows.index]
        if rows.picked or rows.own is not None:
            chosen = rows.own or (slice(None), list(rows.picked))
            fits[prompts, rows.named, width] = lambda: value[chosen]
            if name == "gain":
                fits[prompts, rows.named] = lambda: value[chosen][..., None]
        return fits


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _formula(edit: Edit, x: Tensor, seen: Tensor, fitted: Callable[[str, Any], Any]) -> Tensor:
    # In half precision 1 + g·β and a projection lose more than the result does.
    exact = torch.promote_types(x.dtype, torch.float32)
    old, gain = x.to(exact), fitted("gain", edit.gain)
    source = None if edit.alpha == 0 else fitted("source", edit.source)
    if isinstance(edit.basis, Sae):
        given = torch.zeros_like(seen) if source is None else torch.zeros_like(seen) + source * edit.alpha
        return (old + gain * edit.basis.decode(given + seen * edit.beta)).to(x.dtype)
    if edit.basis is None:
        keep, give = 1 + gain * edit.beta, None if source is None else source * (gain * edit.alpha)
        # An infinite x times 0 is not 0: what is replaced is not looked at.
        new = torch.zeros_like(old) if isinstance(keep, Number) and keep == 0 else old * keep
        return (new if give is None else new + give).to(x.dtype)
    if (wide := bases.width(edit.basis)) != x.shape[-1]:
        raise NodeError(f"the basis of the edit of {edit.site} has another width", got=wide, expected=x.shape[-1])
    given = torch.zeros_like(old) if source is None else (torch.zeros_like(old) + source * edit.alpha).to(exact)
    part = given + old * edit.beta if edit.beta else given
    return (old + gain * bases.inside(edit.basis, part)).to(x.dtype)
