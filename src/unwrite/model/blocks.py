"""What writes into the stream in one block, and through which modules? Read off the trace of one pass, block by block.

What a row of the table cannot say raises `Unlike`, with the reason in the structure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import takewhile
from typing import Any

from torch import Tensor, nn

from unwrite.model.norms import NormKind, kinds
from unwrite.model.sums import (
    CONSTANT,
    Op,
    Term,
    bare,
    behind,
    chain,
    is_product,
    leading,
    merged_from,
    terms,
)  # fmt: skip
from unwrite.model.traced import Called, Looked, Traced, is_pattern
from unwrite.model.weights import weight_of

# Relative: what is the same in float32, where the sum is made in another order.
SAME = 1e-4
# Groups of a projection's outputs, and heads behind the values in each.
Layout = tuple[int, int]


class Unlike(Exception):
    """What in a model's structure no row can say."""


class Block:
    """One block: the state of the stream that it reads, those on the way, and what it adds."""

    def __init__(self, trace: Traced, call: Called):
        self.trace, self.path, self.module = trace, call.path, call.module
        source, out, maker = bare(call.reads), call.made, partial(trace.maker, within=call.path)
        if source is None or out is None:
            raise Unlike("a block is not given the stream, or gives none")
        leads = leading(out, source)
        if not leads.get(out, False):
            parts = _named(self, [*terms(out, None, partial(trace.innermost, within=call.path))])
            raise Unlike(f"the block's output is not a sum that holds its input (it is {parts})")
        self.source, self.states = source, {source, *(op for op, true in leads.items() if true)}
        parts = [*terms(out, source, maker)]
        self.writers, self.out_bias = _writers(parts), _constant(call, parts)

    def name(self, call: Called | None) -> str | None:
        """The path of a module from the block."""
        return None if call is None else below(self.path, call.path)

    def states_behind(self, op: Op | None) -> set[Op | None]:
        """The states of the stream that something rests on."""
        return {bare(met) for met in behind(op, self.states)}

    def calls(self, within: str = "") -> Iterator[Called]:
        """What ran inside of the block, or of a module of it."""
        return (call for call in self.trace.calls if call.within(within or self.path))


def below(root: str, path: str) -> str:
    """A path as it is from `root`, where it lies."""
    return path if not root else path.removeprefix(root).removeprefix(".")


def _writers(parts: list[Term]) -> list[Term]:
    gain = sum(part.factor for part in parts if part.call is None and not part.other)
    if abs(gain - 1) > SAME:
        raise Unlike(f"the block multiplies its stream by {gain:.3g}")
    if odd := [part.other for part in parts if part.other not in ("", CONSTANT)]:
        raise Unlike(f"the block adds what no module gives ({', '.join(odd)})")
    return _given(parts)


def _given(parts: list[Term]) -> list[Term]:
    return [part for part in parts if part.call is not None]


def _constant(call: Called, parts: list[Term]) -> tuple[float, str] | None:
    """The factor and the path of the parameter that a block adds to its stream; None where it adds none."""
    factors = [part.factor for part in parts if part.other == CONSTANT]
    if not factors:
        return None
    assert call.read is not None  # noqa: S101 (asked before)
    rest = call.gave - call.read - sum(part.factor * part.call.gave.view_as(call.gave) for part in _given(parts))
    for path, parameter in call.module.named_parameters():
        above, _, name = path.rpartition(".")
        module = call.module.get_submodule(above)
        # That of a module without others in it is the module's own.
        if len(factors) > 1 or parameter.shape != rest.shape[-1:] or next(module.children(), None) is None:
            continue
        value = weight_of(module, name)
        if value is not None and (rest - factors[0] * value.detach().to(rest)).norm() <= SAME * call.gave.norm():
            return factors[0], path
    raise Unlike("the block adds a constant that is none of its parameters")


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
    post_attention_norm: str | None = _leads()
    post_mlp_norm: str | None = _leads()
    out_proj: str | None = _leads("attention", always=True)
    value: str | None = _leads("attention", always=True)
    latent: str | None = _leads("attention")
    latent_norm: str | None = _leads("attention")
    head_norm: str | None = _leads("attention")
    act: str | None = _leads("mlp", always=True)
    # None where there is nothing of which this could be said, as of a mixture of experts whether it is gated.
    gated_heads: bool | None = None
    sinks: bool | None = None
    value_layout: Layout | None = None
    heads: int | None = None
    kv_heads: int | None = None
    gated: bool | None = None
    interface: bool | None = None
    opened: Mapping[str, str] | None = None
    out_bias: str | None = None
    parallel: bool | None = None
    residual_scale: float
    norms: tuple[Called, ...]

    @classmethod
    def paths(cls) -> dict[str, Mapping[str, Any]]:
        """The fields that are paths: where each begins, and whether a row always names one."""
        return {part.name: part.metadata for part in fields(cls) if part.metadata}


def said(block: Block, mixes: Collection[str]) -> Said:
    """What a block says, where of what writes without attention these `mixes` mix positions.

    Raises Unlike for what a row cannot say.
    """
    look = looked(block)
    first, second = _pair(block, look, mixes)
    (after, mixer), (last, mlp) = (
        (None, None) if part is None else _without_norm(block, part.call) for part in (first, second)
    )
    path = "" if mixer is None else mixer.path if look is None else look.path
    found: dict[str, Any] = {}
    inside: list[Called | None] = []
    if look is not None and mixer is not None:
        into, inside, found = _attending(block, look, mixer)
    elif mixer is not None:
        into, found = _norm_before(block, mixer), _mixer(block, mixer)
    else:
        into = None if mlp is None else _norm_before(block, mlp)
    if mixer is not None and mlp is not None:
        parallel, mid = _between(block, mixer, mlp, path, into)
        found |= {"parallel": parallel, "mid": block.name(mid)}
    if mlp is not None:
        hidden, gated = _hidden(block, mlp)
        act = None if hidden is None else below(mlp.path, hidden.path)
        found.update(mlp=below(block.path, mlp.path), act=act, gated=gated)
    found |= {
        "input_norm": block.name(into), "post_attention_norm": block.name(after), "post_mlp_norm": block.name(last),
        "attention": below(block.path, path) if path else None,
    }  # fmt: skip
    out_bias = None if first is None else _out_bias(block, first, after)
    scale = next(part.factor for part in (first, second) if part is not None)
    norms = tuple(call for call in (into, *inside, after, last) if call is not None)
    return Said(**{**dict.fromkeys(Said.paths()), **found}, residual_scale=scale, out_bias=out_bias, norms=norms)


def _attending(block: Block, look: Looked, writer: Called) -> tuple[Called | None, list[Called | None], dict[str, Any]]:
    """The norm before attention, those on the way through it, and what is said of it."""
    out, value, kv_heads, layout, heads = _attention(block, look, writer)
    head_norm, gated_heads = _between_heads(block, look, out)
    latent, latent_norm = _latent(block, look, value)
    paths = {"out_proj": out, "value": value, "latent": latent, "latent_norm": latent_norm, "head_norm": head_norm}
    return _input_norm(block, look, latent or value), [latent_norm, head_norm], {
        **{name: call and below(look.path, call.path) for name, call in paths.items()},
        "value_layout": layout, "kv_heads": kv_heads, "heads": heads, "interface": look.interface,
        "opened": _opened(block, look, value), "gated_heads": gated_heads, "sinks": look.sinks,
    }  # fmt: skip


# What writes.


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


def _roots(block: Block, writer: Called) -> list[str]:
    """A writer's path, or that of what writes through the norm that it is."""
    below_it = (block.trace.maker(op, block.path) for op in chain(writer.reads)) if norm_kinds(writer) else ()
    return [writer.path, *(call.path for call in below_it if call is not None)]


def _in(path: str, root: str) -> bool:
    """Is one of both inside of the other? BLOOM's attention is given the stream, and only its projection writes."""
    return f"{path}.".startswith(f"{root}.") or root.startswith(f"{path}.")


def _named(block: Block, parts: list[Term]) -> str:
    names = [part.other or f"{block.name(part.call)}: {type(part.call.module).__name__}" for part in parts]
    return " + ".join(names) or "nothing"


def _pair(block: Block, look: Looked | None, mixes: Collection[str]) -> tuple[Term | None, Term | None]:
    """What attention, or a mixer, writes, and what the MLP does; not both need be there."""
    made = None if look is None else look.made
    marks = block.states | ({made} if made is not None else set())
    attends = [one for one in block.writers if writer(block, one).path in mixes or made in behind(one.call.made, marks)]
    others = [part for part in block.writers if part not in attends]
    if len(attends) > 1 or len(others) > 1 or not block.writers:
        raise Unlike(f"not one attention and one MLP write in a block ({_named(block, block.writers)})")
    if len(block.writers) > 1 and abs(attends[0].factor - others[0].factor) > SAME * abs(others[0].factor):
        raise Unlike("what attention and MLP write is multiplied by different numbers")
    return next(iter(attends), None), next(iter(others), None)


def _mixer(block: Block, mixer: Called) -> dict[str, Any]:
    """The projection through which a mixer writes, and its heads: the axis that was apart before; else it is one."""
    out = _projection(block, mixer.made, mixer.path)
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


def writer(block: Block, term: Term) -> Called:
    """The module that writes a term, before a norm through which it does."""
    return _without_norm(block, term.call)[1]


def _without_norm(block: Block, call: Called) -> tuple[Called | None, Called]:
    """A norm through which a writer writes, and the writer before it."""
    if not norm_kinds(call):
        return None, call
    for op in chain(call.reads):
        if (writer := block.trace.maker(op, block.path)) is not None:
            return call, writer
    raise Unlike(f"{block.name(call)} is a norm of what no module gives")


def _out_bias(block: Block, attends: Term, norm: Called | None) -> str | None:
    """The parameter that is added to what attention writes, multiplied as this is."""
    if block.out_bias is None:
        return None
    factor, path = block.out_bias
    if norm is not None or abs(factor - attends.factor) > SAME * abs(factor):
        raise Unlike(f"the block adds {path} otherwise than what attention writes")
    return path


def norm_kinds(call: Called) -> dict[NormKind, float]:
    """The kinds of norm that a module is, with the relative error of each; none for what is no norm."""
    return {} if call.read is None else kinds(call.module, call.read, call.gave)


# Attention.


def _attention(block: Block, look: Looked, writer: Called) -> tuple[Called, Called, int, Layout, int]:
    """Its out-projection, what makes its values, of how many heads, and how these lie there; its own heads."""
    out = _projection(block, writer.made, look.path)
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
    return (out, *_values(block, look, z), heads)


def _between_heads(block: Block, look: Looked, out: Called) -> tuple[Called | None, bool]:
    """Through which norm does the out-projection read what attention gives, and is that multiplied on its way?"""
    if look.z is None or out.read is None or _same(look.z.flatten(), out.read.flatten()):
        return None, False
    end, op, norm, gated = bare(look.made), out.reads, None, False
    while bare(op) is not end:
        same = [*chain(op)]
        call = next((call for at in same for call in block.trace.makers(at, look.path) if norm_kinds(call)), None)
        held = [] if op is None else [part for part, _ in same[-1].next_functions if behind(part, {end})]
        product = op is not None and same[-1].name() == "MulBackward0" and len(held) == 1
        if not product and (call is None or all(mean for mean, _ in norm_kinds(call))):
            raise Unlike("the out-projection reads something else of what attention gives than a product with it")
        norm, gated, op = call or norm, gated or call is None, held[0] if call is None else call.reads
    return norm, gated


def _projection(block: Block, op: Op | None, within: str) -> Called | None:
    """The linear map that gave what an operation made, in another shape perhaps."""
    for at in chain(op):
        for call in block.trace.makers(at, within):
            if _is_projection(call.module):
                return call
    return None


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Embedding)
    return matrix or all(isinstance(getattr(module, f"{side}_features", None), int) for side in ("in", "out"))


def _same(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= SAME * want.norm())


def _values(block: Block, look: Looked, z: Tensor) -> tuple[Called, int, Layout]:
    """The projection among whose outputs are what attention carries, of how many heads, and where they lie there."""
    for call in reversed([*block.calls(look.path)]):
        if not _is_projection(call.module) or call.gave.numel() % (z.shape[0] * z.shape[1]):
            continue
        rows = call.gave.reshape(*z.shape[:2], -1)
        each = (_first_column(rows, look, z, head) for head in range(z.shape[2]))
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
    return first if _same(carried[..., first : first + width], want) else None


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
        if reader := next((call for call in readers if _is_projection(call.module)), None):
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
            wide = _is_projection(call.module) and call.gave.shape[-1] >= width
            if wide and _same(call.gave[..., :width].flatten(), norm.read.flatten()):
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


# The MLP.


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
    last = mlp if _is_projection(mlp.module) else _projection(block, mlp.made, mlp.path)
    if last is None:
        return None, None
    within = block.path if last is mlp else mlp.path
    makers = [call for op in chain(last.reads) if (call := block.trace.maker(op, within)) is not None]
    normed = next((call.reads for call in makers if norm_kinds(call)), None)
    return last, is_product(normed) if normed is not None else is_product(last.reads) and not makers
