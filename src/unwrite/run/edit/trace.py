"""What is at a site in the user's own forward pass, and what if it were something else?

The one open door to a model: every site can be recorded and edited inside one `with`, under plain hooks and
transformers' AttentionInterface. After the `with`, however it ends, the model is bit for bit what it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from unwrite.errors import ModelError, NodeError, require, several, shown
from unwrite.model.attention import Attend, Attended, around_attention, implementation
from unwrite.model.capture import evaluating, uncompiled
from unwrite.model.hooks import Call, Handle, Point, called, ended, given, hooked, listeners, visited
from unwrite.model.placed import decode
from unwrite.model.softmax import per_query_head
from unwrite.model.view import Model, require_model
from unwrite.model.weights import followed
from unwrite.nodes import MLPS, Site, nearest, parse_site, parse_sites
from unwrite.run.edit.edits import Edit, Pending, of_one
from unwrite.run.edit.place import Inner, Pass, Place, by_row
from unwrite.run.edit.sae import Sae
from unwrite.run.edit.sites import all_named, place

_EDITS = "uw.Edit, or several"


@dataclass(frozen=True, eq=False)
class Trace:
    """What a trace has recorded: `t["L2H3.z"]` is the tensor of the latest forward pass."""

    sites: tuple[Site, ...]
    _run: _Run

    def __getitem__(self, name: object) -> Tensor:
        """The tensor at a site that was asked for; of a name of several ("L2.pattern") theirs, stacked as axis 1.

        Raises NodeError for another, where no pass has reached it, and for several that differ in shape.
        """
        return self._in(self._run.values, name)

    def passes(self, name: object) -> tuple[Tensor, ...]:
        """The same of every forward pass that has reached the site, for a trace that was told `every_pass`.

        In `generate`, `torch.cat(t.passes("resid_post2"), 1)` is all positions of the text. Raises NodeError as above.
        """
        if not self._run.every_pass:
            raise NodeError("only the latest pass was kept", expected="uw.trace(…, every_pass=True)")
        self[name]
        sites = self._asked(name)
        return tuple(self._in(one, name) for one in self._run.history if all(site in one for site in sites))

    def _asked(self, name: object) -> tuple[Site, ...]:
        several = parse_sites(name) is not None
        sites = all_named(self._run.lm, name) if several else (parse_site(name),)
        for site in sites:
            if site not in self.sites:
                raise NodeError(
                    f"{site} was not asked for",
                    expected=", ".join(map(str, self.sites)) or "a site named in `uw.trace`",
                    fix=nearest(site, self.sites),
                )
        return sites

    def _in(self, values: Mapping[Site, Tensor], name: object) -> Tensor:
        sites = self._asked(name)
        for site in sites:
            if site not in values:
                none = "no forward pass has run inside the `with`"
                raise NodeError(
                    f"nothing was recorded at {site}",
                    got="a forward pass that did not reach it" if self._run.passes else none,
                )
        if parse_sites(name) is None:
            return values[sites[0]]
        if len({values[site].shape for site in sites}) > 1:
            raise NodeError(f"the sites of {name} differ in shape", fix=f"ask for them one by one, as {sites[0]}")
        return torch.stack([values[site].to(self._run.lm.device) for site in sites], 1)

    def __repr__(self) -> str:
        return f"Trace({', '.join(map(str, self.sites))}; {self._run.passes} forward passes)"


@contextmanager
def trace(lm: Model, *sites: object, edits: Sequence[Edit] | Edit = (), every_pass: bool = False) -> Iterator[Trace]:
    """Inside the `with`, every forward pass of `lm.hf` or `lm.decoder` is edited, and `t[site]` holds what it used.

    x' = x + g · P(α · source + β · x) at each edited site (see `uw.Edit`); edits of one site are applied in the order
    given, and sites in the order in which the pass reaches them. What is recorded is what later modules used: after
    the edits. Shapes, with d that of the site:

        "L2H3", "L2H3.out", "L2.bias", "MLP2", "embed", "pos_embed"   [prompt, position, d_model], as the nodes sum up
        "resid_pre0", "resid_mid2", "resid_post2", "L2.v_input"       [prompt, position, d_model], the model's own
        "L2H3.q", ".k", ".v" (after rotation), ".z"; "L2KV1.k", ".v"  [prompt, position, d_head]
        "L2H3.pattern"                                                [prompt, query, key]
        "L2.attn_out"                                                 [prompt, position, d_model]
        "MLP2.act", "MLP2.act[17]"                                    [prompt, position, d_mlp], [prompt, position, 1]

    "L2.v_input" is the stream as all values of layer 2 read it, before the norm: queries, keys and the stream itself
    stay. ".k" and ".v" of a query head are its copy of what its group shares as "L2KV1.k". ".z" and ".act" are what the
    last projections read; writes and states are under the model's `convention`, in `lm.compute_dtype`. Where blocks
    multiply all that they give, writes (also "L2.attn_out") are given, and edited, as they arrive at the end, states as
    the model has them there: the nodes that a state holds add up to `lm.to_end(location)` times it. With a cache, a
    pass brings only its new positions; keys and values are all that attention sees.
    A name may stand for several: "L2.pattern" and "L2H*.pattern" (all heads of a layer), "L*.z", "L*H0", "resid_post*",
    "MLP*", "nodes", "heads" and the other kinds of `uw.effects`; `t["L2.pattern"]` is theirs, stacked as axis 1:
    [prompt, head, query, key].
    Gradients flow through recorded tensors and edits wherever autograd is on: `t[site].grad` is there after `backward`.

    Arguments: `lm` a model; `sites` their names; `edits` one `Edit` or several; with `every_pass`, what every pass has
    shown stays, and not that of the latest alone (`t.passes(site)`; in `generate` there are many). Yields a `Trace`.
    Raises NodeError for an unknown site, one that this model does not have or that cannot be edited, a value of another
    shape, and, at the end of the `with`, an edit that touched nothing; ModelError for a model that is already traced,
    and where dropout or gradient checkpointing would make what is recorded untrue.

    Example: `with uw.trace(lm, "resid_post3", edits=[uw.Edit.set("L2H3", 0.0)]) as t: lm.hf(ids)`; `t["resid_post3"]`
    """
    require_model(lm)
    require_free(lm)
    edits = [edits] if isinstance(edits, Edit) else several("these are no edits", edits, _EDITS, NodeError)
    require(isinstance(every_pass, bool), NodeError, "every_pass is a yes or no", every_pass, "True or False")
    run = _Run(lm, _wanted(lm, sites), _grouped(lm, edits), every_pass)
    with ExitStack() as stack:
        stack.enter_context(uncompiled(lm.hf))
        stack.enter_context(followed(lm.hf))
        stack.callback(run.end)
        for opened in _opened(run):
            stack.enter_context(opened)
        stack.enter_context(hooked(_hooks(run)))
        yield Trace(tuple(run.wanted), run)
    # Only where nothing was raised: an error is never hidden by this one.
    for pending in run.pending:
        pending.require()


@torch.no_grad()
def recorded(lm: Model, ids: Int[Tensor, "prompt position"], sites: Sequence[object]) -> Trace:
    """What is at these sites in one pass over left-aligned prompts, which computes no logits."""
    with evaluating(lm.hf), trace(lm, *sites) as found:
        decode(lm, ids, use_cache=False)
    return found


def _wanted(lm: Model, sites: Sequence[object]) -> dict[Site, Place]:
    return {site: place(lm, site) for name in sites for site in all_named(lm, name)}


def _grouped(lm: Model, edits: Sequence[Edit]) -> dict[Site, list[Pending]]:
    grouped: dict[Site, list[Pending]] = {}
    for edit in edits:
        if not isinstance(edit, Edit):
            raise NodeError("this is no edit", got=shown(edit), expected=_EDITS)
        sites = all_named(lm, edit.site)
        for i, site in enumerate(sites):
            place(lm, site, edited=True)
            own = edit if parse_sites(edit.site) is None else of_one(edit, i, len(sites))
            grouped.setdefault(site, []).append(Pending(own, site))
    return grouped


@dataclass(eq=False)
class _Run:
    """A trace that is open: what is wanted, what is edited, and what the pass under way has shown."""

    lm: Model
    wanted: dict[Site, Place]
    edits: dict[Site, list[Pending]]
    every_pass: bool = False
    history: list[dict[Site, Tensor]] = field(default_factory=lambda: [{}])
    passes: int = 0
    now: Pass | None = None
    places: dict[Site, Place] = field(init=False)
    at: dict[Point | Inner, list[Site]] = field(init=False)
    keep: set[Point] = field(init=False)
    reads: dict[Site, Point] = field(init=False)

    def __post_init__(self) -> None:
        edited = {site: place(self.lm, site) for site in self.edits}
        self.places = dict(sorted((self.wanted | edited).items(), key=lambda item: item[0].order))
        self.reads = {site: _read_by(self.lm, site) for site, own in self.edits.items() if any(map(_transcodes, own))}
        self.keep = {point for found in self.places.values() for point in found.keep} | {*self.reads.values()}
        self.at = {point: [] for point in self.keep}
        for site, found in self.places.items():
            self.at.setdefault(found.point, []).append(site)

    @property
    def values(self) -> dict[Site, Tensor]:
        """What the latest pass has shown."""
        return self.history[-1]

    @property
    def pending(self) -> list[Pending]:
        """All edits."""
        return [pending for waiting in self.edits.values() for pending in waiting]

    def begin(self, call: Call) -> None:
        """A forward pass starts: what the last one showed is gone, unless every pass is kept."""
        args, kwargs = call
        _require_plain(self)
        _require_itself(self.lm, kwargs)
        self.history = [*(self.history if self.every_pass and self.passes else ()), {}]
        self.passes += 1
        given = next(
            (part for part in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if part is not None),
            None,
        )
        if given is not None:  # the model itself says what it misses
            cache = next((part for part in (*args, *kwargs.values()) if hasattr(part, "get_seq_length")), None)
            self.now = Pass(given.shape[0], given.shape[1], 0 if cache is None else int(cache.get_seq_length()))

    def end(self) -> None:
        """A forward pass is over: a module that the user calls by hand is no part of one."""
        self.now = None

    def visit(self, point: Point | Inner, tensor: Tensor) -> Tensor:
        """Edit and record the sites at a point, keep its tensor for later ones; returns what the model goes on with."""
        if (now := self.now) is None or point not in self.at:
            return tensor
        if point in now.seen:
            what = ", ".join(map(str, self.at[point])) or "a site"
            raise ModelError(
                f"the module that shows {what} ran twice in one forward pass, so there is no one value",
                expected="each module once in a pass",
            )
        now.seen.add(point)
        for site in self.at[point]:
            tensor = self._visit(site, tensor, now)
        if point in self.keep:
            # A copy of what a module puts out: some go on to multiply it where it is.
            now.kept[point] = tensor if point.before else tensor.clone()
        return tensor

    def _visit(self, site: Site, tensor: Tensor, now: Pass) -> Tensor:
        found = self.places[site]
        x = new = found.read(tensor, now)
        for pending in self.edits.get(site, ()):
            read = now.kept[self.reads[site]] if _transcodes(pending) else None
            new = pending.of(new, now.past + now.positions, None if read is None else by_row(read, now.prompts))
        changed = new is not x
        if site in self.wanted:
            # What the model goes on with is made from what is recorded, so that gradients arrive there.
            self.values[site] = new = new if changed else x.clone()
            if new.requires_grad:
                new.retain_grad()
                changed = True
        return found.write(tensor, x, new, now) if changed and found.editable else tensor

    def attend(self, layer: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Attended:
        """One layer's attention, with the sites inside of it."""
        query = self.visit(Inner(layer, "q"), query)
        key, value = self.visit(Inner(layer, "shared_k"), key), self.visit(Inner(layer, "shared_v"), value)
        if self._own_copies(layer, key, value):
            key, value = per_query_head(key, query), per_query_head(value, query)
        key, value = self.visit(Inner(layer, "k"), key), self.visit(Inner(layer, "v"), value)
        out, pattern = attend(query, key, value)
        if pattern is None:
            return out, None
        changed = self.visit(Inner(layer, "pattern"), pattern)
        if changed is not pattern:
            out = (changed @ per_query_head(value, query)).transpose(1, 2).contiguous()
        return out, changed

    def _own_copies(self, layer: int, key: Tensor, value: Tensor) -> bool:
        """Must every query head get a key and value of its own: is one of them edited, or its gradient wanted?"""
        sites = [site for kind in ("k", "v") for site in self.at.get(Inner(layer, kind), ())]
        follows = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
        return any(follows or site in self.edits for site in sites)


def _transcodes(pending: Pending) -> bool:
    return isinstance(pending.edit.basis, Sae) and pending.edit.basis.transcodes


def _read_by(lm: Model, site: Site) -> Point:
    """Where is seen what a transcoder of a site reads? Raises NodeError for what is no MLP."""
    if site.node is None or site.node.kind not in MLPS:
        raise NodeError("a transcoder writes what an MLP does", got=str(site), expected="a site such as MLP2")
    return Point(lm.layers[site.layer].modules[site.kind], before=True)


def _opened(run: _Run) -> Iterator[AbstractContextManager[None]]:
    """What opens attention, where a site lies inside."""
    kinds = {point.kind for point in run.at if isinstance(point, Inner)}
    if kinds:
        yield around_attention(run.lm, run.attend, eager="pattern" in kinds)
    elif any(site.kind == "pattern" for site in run.places):
        yield implementation(run.lm.config, "eager")


def _hooks(run: _Run) -> Iterator[Handle]:
    yield called(run.lm.decoder, run.begin)
    yield ended(run.lm.decoder, run.end)
    # A model around a decoder embeds by itself, and may put images there.
    if (start := Point(run.lm.hf.get_input_embeddings(), before=False)) in run.at:
        yield given(run.lm.decoder, "inputs_embeds", partial(run.visit, start))
    for point in run.at:
        if isinstance(point, Point):
            yield visited(point, partial(run.visit, point))


def require_free(lm: Model) -> None:
    """Raise ModelError inside of a trace of this model."""
    if any(isinstance(listener, _Run) for listener in listeners(lm.decoder)):
        fix = "give all sites and edits to one `uw.trace`, and change weights around it"
        raise ModelError("this model is being traced already", fix=fix)


def _require_itself(lm: Model, kwargs: Mapping[str, Any]) -> None:
    """Raise ModelError where blocks write what no node does: passes of the certificate had no states of an encoder."""
    if isinstance(states := kwargs.get("encoder_hidden_states"), Tensor):
        raise ModelError(
            f"what {lm.about.get('name', lm.family)} writes because of an encoder is no node's",
            got=f"encoder_hidden_states {tuple(states.shape)}", expected="a pass of the decoder alone",
        )  # fmt: skip


def _require_plain(run: _Run) -> None:
    """Raise ModelError where what is recorded would not be what the model uses."""
    training = [module for module in run.lm.hf.modules() if module.training]
    if not training:
        return
    rates = {name: rate for name, rate in run.lm.config.to_dict().items() if "drop" in name and isinstance(rate, float)}
    dropout = [name for name, rate in rates.items() if rate and not name.startswith(("summary", "classifier"))]
    if dropout and (site := next((site for site, found in run.places.items() if found.adds), None)):
        raise ModelError(
            f"dropout lies between what is written at {site} and the stream",
            got=", ".join(dropout),
            fix="call `lm.hf.eval()`",
        )
    if torch.is_grad_enabled() and any(getattr(module, "gradient_checkpointing", False) for module in training):
        raise ModelError("gradient checkpointing runs layers a second time, outside of the trace", fix="switch it off")
