"""Through which modules does attention of a block write, and which make its values? Read off the trace of one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import Tensor

from unwrite.model.blocks import (
    Block,
    Unlike,
    below,
    is_projection,
    norm_kinds,
    projection_of,
    same,
)
from unwrite.model.sums import (
    Op,
    bare,
    behind,
    chain,
    factor_of,
)
from unwrite.model.traced import Called, Looked, is_pattern

# Groups of a projection's outputs, and heads behind the values in each.
Layout = tuple[int, int]


def attending(
    block: Block, look: Looked, writer: Called, source: tuple[Block, Looked] | None
) -> tuple[Called | None, list[Called | None], dict[str, Any]]:
    """The norm before values, those on the way through attention, and what is said of it.

    `source`: the earlier block, and its attention, whose values these are. The row says of that one how it makes them.
    """
    if source is not None and not look.interface:
        raise Unlike("its attention has keys and values of an earlier block and is called by no interface")
    out, z = _attention(block, look, writer)
    head_norm, gated_heads = _between_heads(block, look, out)
    made, normed = source or (block, look), _normed(*(source or (block, look)))
    seen = look if normed is None else _before(normed, look)
    value, kv_heads, layout = _values(made[0], replace(seen, path=made[1].path), z)
    latent, latent_norm = _latent(made[0], made[1], value)
    into, paths = None, {"out_proj": out, "head_norm": head_norm}
    if source is None:
        into = _input_norm(block, look, latent or value)
        paths |= {"value": value, "value_norm": normed, "latent": latent, "latent_norm": latent_norm}
    return into, [latent_norm, head_norm, normed], {
        **{name: call and below(look.path, call.path) for name, call in paths.items()},
        "value_layout": layout, "value_factor": factor_of(seen.reads), "kv_heads": kv_heads, "heads": z.shape[2],
        "interface": look.interface,
        "opened": _opened(block, look, value), "gated_heads": gated_heads, "sinks": look.sinks,
    }  # fmt: skip


def _normed(block: Block, look: Looked) -> Called | None:
    """The norm through which attention is given values, those of each head by themselves."""
    for call in (call for op in chain(look.reads) for call in block.trace.makers(op, look.path)):
        by_itself = look.value is not None and call.gave.shape == look.value.transpose(1, 2).shape
        if by_itself and any(not mean for mean, _ in norm_kinds(call)):
            return call
    return None


def _before(norm: Called, look: Looked) -> Looked:
    """The same as if attention were given what this norm reads."""
    assert norm.read is not None  # noqa: S101 (it was found by what it read)
    return replace(look, value=norm.read.transpose(1, 2), reads=norm.reads)


def _attention(block: Block, look: Looked, writer: Called) -> tuple[Called, Tensor]:
    """Its out-projection, and what this reads of every head [prompt, position, head, d_head]."""
    out = projection_of(block, writer.made, look.path)
    if out is None or out.read is None:
        raise Unlike(f"what attention writes ({block.name(writer)}) comes out of no projection in it")
    seen = look.z if look.z is not None else look.pattern
    assert seen is not None  # noqa: S101 (one of both was seen)
    heads = seen.shape[2 if look.z is not None else 1]
    if out.read.shape[-1] % heads:
        raise Unlike(f"what its out-projection reads does not divide into {heads} heads")
    z = out.read.reshape(*out.gave.shape[:2], heads, -1)
    if look.z is not None and look.z.shape != z.shape:
        raise Unlike("the out-projection reads something else than the output of every head")
    return out, z


def _between_heads(block: Block, look: Looked, out: Called) -> tuple[Called | None, bool]:
    """Through which norm does the out-projection read what attention gives, and is that multiplied on its way?"""
    if look.z is None or out.read is None or same(look.z.flatten(), out.read.flatten()):
        return None, False
    end, op, norm, gated = bare(look.made), out.reads, None, False
    while bare(op) is not end:
        alike = [*chain(op)]
        call = next((call for at in alike for call in block.trace.makers(at, look.path) if norm_kinds(call)), None)
        held = [] if op is None else [part for part, _ in alike[-1].next_functions if behind(part, {end})]
        product = op is not None and alike[-1].name() == "MulBackward0" and len(held) == 1
        if not product and (call is None or all(mean for mean, _ in norm_kinds(call))):
            raise Unlike("the out-projection reads something else of what attention gives than a product with it")
        norm, gated, op = call or norm, gated or call is None, held[0] if call is None else call.reads
    return norm, gated


def _values(block: Block, look: Looked, z: Tensor) -> tuple[Called, int, Layout]:
    """The projection among whose outputs are what attention carries, of how many heads, and where they lie there."""
    for call in reversed([*block.calls(look.path)]):
        if not is_projection(call.module) or call.gave.numel() % (z.shape[0] * z.shape[1]):
            continue
        rows = call.gave.reshape(*z.shape[:2], -1)
        each = (_first_column(rows * factor_of(look.reads), look, z, head) for head in range(z.shape[2]))
        firsts = [*takewhile(lambda first: first is not None, each)]  # the first that fails ends it
        if len(firsts) == z.shape[2] and (found := _layout(firsts, z.shape[3], rows.shape[2])) is not None:
            return call, *found
    raise Unlike(_why(block, look, look.reads))


def _first_column(rows: Tensor, look: Looked, z: Tensor, head: int) -> int | None:
    """Where in what a projection puts out [prompt, key, output] the values of a head begin."""
    if look.value is not None:
        carried, want = rows, look.value[:, head * look.value.shape[1] // z.shape[2]]
    else:
        pattern = look.pattern
        assert pattern is not None  # noqa: S101 (one of both was seen)
        if pattern.shape[1] != z.shape[2]:
            return None
        carried, want = pattern[:, head] @ rows, z[:, :, head]
    width = want.shape[-1]
    if carried.shape[-1] < width:
        return None
    # By one prompt where the first column lies, by all whether they all do.
    first = int((carried[0, :, : carried.shape[-1] - width + 1] - want[0, :, :1]).abs().amax(0).argmin())
    return first if same(carried[..., first : first + width], want) else None


def _layout(firsts: Sequence[int | None], width: int, outputs: int) -> tuple[int, Layout] | None:
    """How many key/value heads there are, and the layout in which their values begin at these columns."""
    own = [first for first in dict.fromkeys(firsts) if first is not None]
    kv, heads = len(own), len(firsts)
    if heads % kv or firsts != [own[head * kv // heads] for head in range(heads)]:
        return None
    for groups in (groups for groups in range(1, kv + 1) if kv % groups == outputs % groups == 0):
        size, each = outputs // groups, kv // groups
        behind = (size - own[0]) // width - each
        begins = size - (behind + each) * width
        if own == [group * size + begins + head * width for group in range(groups) for head in range(each)]:
            return kv, (groups, behind)
    return None


def _why(block: Block, look: Looked, op: Op | None) -> str:
    """What stands between the stream and the values."""
    norms = {call.made: call for call in block.calls(look.path) if norm_kinds(call) and call.made is not None}
    if met := behind(op, {*norms, *block.states}) & norms.keys():
        norm = norms[next(iter(met))]
        readers = [call for call in block.calls(look.path) if bare(call.reads) is bare(norm.made)]
        if reader := next((call for call in readers if is_projection(call.module)), None):
            between = f"{below(look.path, reader.path)} reads the norm {below(look.path, norm.path)}"
            return f"its values are made in more steps than two projections and a norm between them ({between})"
        return f"values are normed: attention carries what {below(look.path, norm.path)} gives"
    if op is not None and block.states_behind(op) != {block.source}:
        return "values of an earlier layer, or of another state than the block reads"
    return "no projection of its attention gives the values that it carries"


def _latent(block: Block, look: Looked, value: Called) -> tuple[Called, Called] | tuple[None, None]:
    """Where values are made in two steps: the projection whose first outputs are normed for the one that gives them."""
    inside = [*block.calls(look.path)]
    for norm in (call for op in chain(value.reads) for call in block.trace.makers(op, look.path)):
        if norm.read is None or value.read is None or not norm_kinds(norm):
            continue
        width = norm.read.shape[-1]
        for call in inside:
            wide = is_projection(call.module) and call.gave.shape[-1] >= width
            if wide and same(call.gave[..., :width].flatten(), norm.read.flatten()):
                return call, norm
    return None, None


def _input_norm(block: Block, look: Looked, value: Called) -> Called | None:
    """The norm between the stream that the block reads and its values; None where they read it bare."""
    if bare(value.reads) is block.source:
        return None
    for op in chain(value.reads):
        for call in reversed(block.trace.makers(op, block.path)):
            if bare(call.reads) is block.source and norm_kinds(call):
                return call
    raise Unlike("values do not read a norm of what the block reads")


def _opened(block: Block, look: Looked, value: Called) -> dict[str, str]:
    """Which modules put out values and pattern just as attention uses them, where no function can be put in."""
    if look.interface:
        return {}
    shown = [call for call in block.calls(look.path) if is_pattern(call.gave)]
    return {"v": below(look.path, value.path)} | ({"pattern": below(look.path, shown[-1].path)} if shown else {})
