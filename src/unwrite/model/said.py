"""What does a block say of the row of its model? Which module is its attention, or a mixer, which its MLP and norms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from unwrite.model.attending import Layout, attending
from unwrite.model.blocks import (
    SAME,
    Block,
    Unlike,
    below,
    is_projection,
    listed,
    norm_kinds,
    projection_of,
    without_norm,
    writer,
)
from unwrite.model.sums import (
    Op,
    Term,
    bare,
    behind,
    chain,
    is_product,
    merged_from,
    terms,
)
from unwrite.model.traced import Called, Looked, is_pattern


def _leads(root: str = "", always: bool = False) -> Any:
    """A path from the block or from the module of another path; `always`: a row names one, if no layer has it, too."""
    return field(metadata={"root": root, "always": always})


@dataclass(frozen=True, kw_only=True)
class Said:
    """What one block says of the row, under the names of its fields, and the norms that it was told from."""

    input_norm: str | None = _leads()
    attention: str | None = _leads(always=True)  # or a mixer
    mid: str | None = _leads()
    mlp: str | None = _leads(always=True)
    beside: str | None = _leads()
    late: str | None = _leads()
    post_attention_norm: str | None = _leads()
    post_mlp_norm: str | None = _leads()
    post_beside_norm: str | None = _leads()
    out_proj: str | None = _leads("attention", always=True)
    value: str | None = _leads("attention", always=True)
    value_norm: str | None = _leads("attention")
    latent: str | None = _leads("attention")
    latent_norm: str | None = _leads("attention")
    head_norm: str | None = _leads("attention")
    act: str | None = _leads("mlp", always=True)
    # None where there is nothing of which this could be said, as of a mixture of experts whether it is gated.
    gated_heads: bool | None = None
    sinks: bool | None = None
    value_layout: Layout | None = None
    value_factor: float | None = None
    heads: int | None = None
    kv_heads: int | None = None
    gated: bool | None = None
    interface: bool | None = None
    opened: Mapping[str, str] | None = None
    out_bias: str | None = None
    parallel: bool | None = None
    residual_scale: float
    gain: float
    mid_gain: float = 1.0
    shared: int | None = None  # the block whose keys and values its attention looks at
    norms: tuple[Called, ...]

    @classmethod
    def paths(cls) -> dict[str, Mapping[str, Any]]:
        """The fields that are paths: where each begins, and whether a row always names one."""
        return {part.name: part.metadata for part in fields(cls) if part.metadata}


def said(
    block: Block, look: Looked | None, mixes: Collection[str], earlier: Sequence[tuple[Block, Looked | None]] = ()
) -> Said:
    """What a block says that has `looked` so, where of what is `unseen` these `mixes` mix positions; one of the
    `earlier` blocks may have its values.

    Raises Unlike for what a row cannot say.
    """
    first, second, beside = _writers_of(block, look, mixes)
    (after, mixer), (last, mlp) = (
        (None, None) if part is None else without_norm(block, part.call) for part in (first, second)
    )
    path = "" if mixer is None else mixer.path if look is None else look.path
    found: dict[str, Any] = {}
    inside: list[Called | None] = []
    if look is not None and mixer is not None:
        shared, owner = _source(look, earlier)
        into, inside, found = attending(block, look, mixer, owner)
        into = into if shared is None else _norm_before(block, mixer)
        found["shared"] = shared
    elif mixer is not None:
        into, found = _norm_before(block, mixer), _mixer(block, mixer)
    else:
        into = None if mlp is None else _norm_before(block, mlp)
    if mixer is not None and mlp is not None:
        parallel, mid = _between(block, mixer, mlp, path, into)
        found |= {"parallel": parallel, "mid": block.name(mid), "mid_gain": _gain_at(block, mlp)}
    if mlp is not None:
        hidden, gated = _hidden(block, mlp)
        act = None if hidden is None else below(mlp.path, hidden.path)
        found.update(mlp=below(block.path, mlp.path), act=act, gated=gated)
        if beside is not None:
            named, norm = _beside(block, beside, mlp, mixes)
            found |= named
            inside.append(norm)
    found |= {
        "input_norm": block.name(into), "post_attention_norm": block.name(after), "post_mlp_norm": block.name(last),
        "attention": below(block.path, path) if path else None,
    }  # fmt: skip
    out_bias = None if first is None else _out_bias(block, first, after)
    scale = next(part.factor for part in (first, second) if part is not None)
    norms = tuple(call for call in (into, *inside, after, last) if call is not None)
    return Said(
        **{**dict.fromkeys(Said.paths()), **found},
        residual_scale=scale,
        gain=block.gain,
        out_bias=out_bias,
        norms=norms,
    )


def looked(block: Block) -> Looked | None:
    """The one call of attention in what writes in a block, if any."""
    roots = [root for part in block.writers for root in _roots(block, part.call)]
    found = [look for look in block.trace.looked if any(_in(look.path, root) for root in roots)]
    if len(found) > 1:
        raise Unlike(f"the block calls attention {len(found)} times")
    shown = [call for call in block.calls() if call.pattern is not None and any(_in(call.path, root) for root in roots)]
    if not found and not shown:
        return None
    if not found:
        inner = max(shown, key=lambda call: call.path.count("."))
        return Looked(inner.path, inner.shows, inner.pattern)
    if not (found[0].sinks or found[0].pattern is None or is_pattern(found[0].pattern)):
        raise Unlike("rows of the pattern do not sum to 1, and attention is given no sinks that say why")
    return found[0]


def _source(
    look: Looked, earlier: Sequence[tuple[Block, Looked | None]]
) -> tuple[int, tuple[Block, Looked]] | tuple[None, None]:
    """The first of earlier blocks whose attention was given the very values that this one is."""
    made = bare(look.reads)
    for i, (block, one) in enumerate(earlier):
        if one is not None and made is not None and look.value is not None and bare(one.reads) is made:
            return i, (block, one)
    return None, None


def unseen(block: Block, look: Looked | None) -> list[Called]:
    """What writes in a block, or reads a state of it, and has no attention that was seen: it may mix positions, or be
    an MLP or a part of one, which does not."""
    every = [writer(block, part) for part in block.writers]
    every += [call for call in block.calls() if call not in every and _reads_late(block, call)]
    return [call for call in every if look is None or not _in(look.path, call.path)]


def _reads_late(block: Block, call: Called) -> bool:
    return bare(call.reads) in block.states - {block.source} and not norm_kinds(call)


def _roots(block: Block, writer: Called) -> list[str]:
    """A writer's path, or that of what writes through the norm that it is."""
    below_it = (block.trace.maker(op, block.path) for op in chain(writer.reads)) if norm_kinds(writer) else ()
    return [writer.path, *(call.path for call in below_it if call is not None)]


def _in(path: str, root: str) -> bool:
    """Is one of both inside of the other? BLOOM's attention is given the stream, and only its projection writes."""
    return f"{path}.".startswith(f"{root}.") or root.startswith(f"{path}.")


def _writers_of(
    block: Block, look: Looked | None, mixes: Collection[str]
) -> tuple[Term | None, Term | None, Term | None]:
    """What attention, or a mixer, writes, what the MLP does, and another module beside it; not all need be there."""
    made = None if look is None else look.made
    marks = block.states | ({made} if made is not None else set())
    attends = [one for one in block.writers if writer(block, one).path in mixes or made in behind(one.call.made, marks)]
    others = [part for part in block.writers if part not in attends]
    if len(attends) > 1 or len(others) > 2 or not block.writers:
        raise Unlike(f"not one attention and one MLP write in a block ({listed(block, block.writers)})")
    if any(abs(part.factor - block.writers[0].factor) > SAME * abs(part.factor) for part in block.writers):
        raise Unlike("what attention and MLP write is multiplied by different numbers")
    mlp, beside = (*others, None, None)[:2]
    return next(iter(attends), None), mlp, beside


def _beside(block: Block, part: Term, mlp: Called, mixes: Collection[str]) -> tuple[dict[str, Any], Called | None]:
    """What writes beside an MLP, from the same state, or after it, from the one that the MLP leaves; and its norm."""
    norm, own = without_norm(block, part.call)
    found = {"beside": block.name(own), "post_beside_norm": block.name(norm)}
    met, of_mlp = block.states_behind(own.made), block.states_behind(mlp.made)
    if met == of_mlp:
        return found, norm
    held = [call for state in met for call in _written(block, state)]
    readers = _readers(block, next(iter(met)), own) if len(met) == 1 else []
    if not readers or {*held} != {one.call for one in block.writers if one is not part}:
        raise Unlike(f"more than an MLP and what shares its input write in a block ({listed(block, block.writers)})")
    of_stream = [one for one in _factors(own.reads) if block.states_behind(one)]
    if abs(_gain_at(block, own) - 1) > SAME:
        raise Unlike(f"the block multiplies its stream before {block.name(own)} reads it")
    if len(of_stream) > 1 or any(call.path in mixes for call in readers):
        raise Unlike(f"what {block.name(own)} reads is no product of one thing in the stream with something beside it")
    return {**found, "late": block.name(min(readers, key=lambda call: call.path.count(".")))}, norm


def _gain_at(block: Block, reader: Called) -> float:
    """By what the block has multiplied its stream where this is read."""
    (state,) = block.states_behind(reader.made)
    maker = partial(block.trace.maker, within=block.path)
    parts = [] if state is None or state is block.source else [*terms(state, block.source, maker)]
    return sum(part.factor for part in parts if part.call is None and not part.other) if parts else 1.0


def _written(block: Block, state: Op | None) -> list[Called]:
    """What has been written where the stream is in a state of the block."""
    maker = partial(block.trace.maker, within=block.path)
    return [] if state is None else [part.call for part in terms(state, block.source, maker) if part.call is not None]


def _readers(block: Block, state: Op | None, writer: Called) -> list[Called]:
    """The modules on the way to a writer that read a state of the stream."""
    every = {call.made: call for call in block.calls() if bare(call.reads) is state}.values()
    return [call for call in every if call is writer or call.made in behind(writer.made, block.states | {call.made})]


def _factors(op: Op | None) -> list[Op | None]:
    """What something is the product of."""
    op = bare(op)
    return [part for part, _ in op.next_functions] if op is not None and op.name() == "MulBackward0" else [op]


def _mixer(block: Block, mixer: Called) -> dict[str, Any]:
    """The projection through which a mixer writes, and its heads: the axis that was apart before; else it is one."""
    out = projection_of(block, mixer.made, mixer.path)
    if out is None or out.read is None:
        raise Unlike(f"what a mixer writes ({block.name(mixer)}) comes out of no projection in it")
    width = out.read.shape[-1]
    heads = width // (merged_from(out.reads, width) or width)
    return {"out_proj": below(mixer.path, out.path), "heads": heads}


def _norm_before(block: Block, writer: Called) -> Called | None:
    """The norm through which a writer reads what the block reads; None where it reads that bare."""
    norms = [call for call in block.calls() if bare(call.reads) is block.source and norm_kinds(call)]
    used = [call for call in norms if call.made in behind(writer.made, block.states | {call.made})]
    return used[0] if used else None


def _out_bias(block: Block, attends: Term, norm: Called | None) -> str | None:
    """The parameter that is added to what attention writes, multiplied as this is."""
    if block.out_bias is None:
        return None
    factor, path = block.out_bias
    if norm is not None or abs(factor - attends.factor) > SAME * abs(factor):
        raise Unlike(f"the block adds {path} otherwise than what attention writes")
    return path


def _between(
    block: Block, attention: Called, mlp: Called, attends: str, into: Called | None
) -> tuple[bool, Called | None]:
    """Do both read one state of the stream, and which module reads the one before the MLP (beside what both share)?"""
    if block.states_behind(attention.made) != {block.source}:
        raise Unlike("attention does not read the stream as the block reads it")
    met = block.states_behind(mlp.made)
    if len(met) != 1:
        raise Unlike(f"the MLP reads {len(met)} states of the stream")
    (state,) = met
    makers = {call.made: call for call in block.calls() if not call.path.startswith(f"{attends}.")}
    readers = [call for call in makers.values() if bare(call.reads) is state and call.path != attends]
    used = [call for call in readers if call is mlp or call.made in behind(mlp.made, block.states | {call.made})]
    if state is block.source:
        return True, next((call for call in used if into is None or call.path != into.path), None)
    if not used:
        raise Unlike("no module reads the stream between attention and MLP")
    return False, min(used, key=lambda call: call.path.count("."))


def _hidden(block: Block, mlp: Called) -> tuple[Called | None, bool | None]:
    """The projection that reads the MLP's hidden activations, and are they a product? None in a mixture of experts."""
    last = mlp if is_projection(mlp.module) else projection_of(block, mlp.made, mlp.path)
    if last is None:
        return None, None
    within = block.path if last is mlp else mlp.path
    makers = [call for op in chain(last.reads) if (call := block.trace.maker(op, within)) is not None]
    normed = next((call.reads for call in makers if norm_kinds(call)), None)
    return last, is_product(normed) if normed is not None else is_product(last.reads) and not makers
