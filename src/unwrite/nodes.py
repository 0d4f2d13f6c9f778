"""What are the parts of a decoder called?

The only place where "L2H3", "MLP2", "resid_mid2" or "L2H3.v" is parsed, printed or ordered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

from unwrite.errors import NodeError, several, shown

# No name is longer.
_LONGEST = 60


@dataclass(frozen=True)
class Kind:
    """One kind of what can be recorded or edited: how its sites are called, how many there are, what they can be.

    `printed` is their printed name, `also` other spellings as regular expressions; `per` says of what there is one:
    the "model", a "layer", a "head", "mixer", "kv_head" or "neuron" of a layer. `group` is what all of them are called
    together where they can be patched from another run; they `write` into the stream as nodes do, `send` or `receive`
    on a path.
    """

    printed: str
    per: str = "layer"
    group: str = ""
    also: tuple[str, ...] = ()
    writes: bool = False
    sends: bool = False
    receives: bool = False

    @cached_property
    def several(self) -> tuple[re.Pattern[str], ...]:
        """Everything that is read as several of this kind: a star for a number, no head ("L2.z"), no number ("z")."""
        forms = [form.pattern.replace(r"(\d+)", r"(\d+|\*)") for form in self.forms]
        without = [] if self.per == "kv_head" else [re.sub(r"(?<=\))[HM]\(\S+?\)(?=\\\.)", "", forms[0])]
        bare = re.sub(r"^(L\{layer\}((H|M|KV)\{head\})?|MLP\{layer\}(?=\.))\.?|\{layer\}", "", self.printed)
        every = (*forms, *without, *([bare] if bare.replace("_", "").isalpha() else []))
        return tuple(re.compile(form) for form in every)

    @cached_property
    def forms(self) -> tuple[re.Pattern[str], ...]:
        """Everything that is read as a name of this kind, with the numbers of layer and head."""
        printed = re.escape(self.printed).replace(r"\{layer\}", r"(\d+)").replace(r"\{head\}", r"(\d+)")
        return tuple(map(re.compile, (printed, *self.also)))


# (2, 3), as tuples are printed; 2.3 and a2.h3, as papers write it.
_PAIRS = (r"\(\s*(\d+)\s*,\s*(\d+)\s*\)", r"(\d+)\.(\d+)", r"a(\d+)\.h(\d+)")
# What holds all heads of a layer elsewhere.
_ALL_HEADS = re.compile(r"blocks\.(\d+|\*)\.attn\.hook_(q|k|v|z|pattern|result)")
# In the order in which a forward pass reaches them in a layer, which for nodes is that in which they write. In a
# parallel block the MLP comes when it likes.
KINDS: dict[str, Kind] = {
    "embed": Kind("embed", "model", "embed", ("hook_embed",), writes=True, sends=True),
    "pos_embed": Kind("pos_embed", "model", also=("hook_pos_embed",), writes=True),
    "pre": Kind("resid_pre{layer}", "model", "resid", (r"blocks\.(\d+)\.hook_resid_pre",)),
    "v_input": Kind("L{layer}.v_input"),
    "q": Kind("L{layer}H{head}.q", "head", "q", receives=True),
    "shared_k": Kind("L{layer}KV{head}.k", "kv_head", "shared_k", receives=True),
    "k": Kind("L{layer}H{head}.k", "head", "k", receives=True),
    "shared_v": Kind("L{layer}KV{head}.v", "kv_head", "shared_v", receives=True),
    "v": Kind("L{layer}H{head}.v", "head", "v", receives=True),
    "pattern": Kind("L{layer}H{head}.pattern", "head"),
    "z": Kind("L{layer}H{head}.z", "head"),
    "head": Kind("L{layer}H{head}", "head", "heads", _PAIRS, writes=True, sends=True, receives=True),
    "mixer_z": Kind("L{layer}M{head}.z", "mixer"),
    "mixer": Kind("L{layer}M{head}", "mixer", "heads", writes=True, sends=True, receives=True),
    "bias": Kind("L{layer}.bias", writes=True),
    "attn_out": Kind("L{layer}.attn_out", "layer", "attn_out", (r"blocks\.(\d+)\.hook_attn_out",), sends=True),
    "mid": Kind("resid_mid{layer}", "layer", "resid", (r"blocks\.(\d+)\.hook_resid_mid",)),
    "act": Kind("MLP{layer}.act", "layer", "act", (r"blocks\.(\d+)\.mlp\.hook_post",)),
    "neuron": Kind("MLP{layer}.act[{head}]", "neuron", "neurons"),
    "mlp": Kind(
        "MLP{layer}", "layer", "mlp_out", (r"blocks\.(\d+)\.hook_mlp_out",), writes=True, sends=True, receives=True
    ),
    "late": Kind("resid_mid{layer}.1"),
    "beside": Kind("MLP{layer}.1", "layer", "mlp_out", writes=True),
    "post": Kind("resid_post{layer}", "layer", "resid", (r"blocks\.(\d+)\.hook_resid_post",)),
}
_ORDER = {name: place for place, name in enumerate(KINDS)}
_STATES = ("pre", "mid", "late", "post")
# What writes through one projection of its layer: heads of attention, and those of a mixer, which has no pattern.
PROJECTED = ("head", "mixer")
# An MLP, and what another module adds beside it, as the experts that all tokens share, or after it.
MLPS = ("mlp", "beside")
_TOGETHER = "heads q k v shared_k shared_v attn_out mlp_out act neurons resid embed"
# What `uw.effects` can be asked of: a group and the kinds in it.
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(name for name, kind in KINDS.items() if kind.group == group) for group in _TOGETHER.split()
}


@dataclass(frozen=True)
class Node:
    """Anything that adds a vector to the residual stream. `str(node)` is its printed name."""

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        return KINDS[self.kind].printed.format(layer=self.layer, head=self.head)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: write order."""
        return (self.layer, _ORDER[self.kind], self.head)


@dataclass(frozen=True)
class Location:
    """A state of the residual stream: before a layer, between two that write in it, or after it."""

    state: str
    layer: int

    def __str__(self) -> str:
        return KINDS[self.state].printed.format(layer=self.layer)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the order in which a forward pass reaches the states."""
        return (self.layer, _STATES.index(self.state))

    def holds(self, node: Node, parallel: bool) -> bool:
        """Has `node` written before the stream is in this state?

        In a parallel block attention and MLP write at one time step, so there is no state between them.
        """
        if node.layer != self.layer:
            return node.layer < self.layer
        if self.state == "late":
            return node.kind != "beside"
        return self.state == "post" or (self.state == "mid" and not parallel and node.kind not in MLPS)


@dataclass(frozen=True)
class Site:
    """Anything that can be recorded or edited: what a node writes, a state of the stream, or a tensor inside a layer.

    `kind` is the kind of a node, a state of a location, or the part of the layer; `head` a query head, the key/value
    head of a shared part, or the index of a neuron.
    """

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        return KINDS[self.kind].printed.format(layer=self.layer, head=self.head)

    @property
    def node(self) -> Node | None:
        """The node whose write this is, if it is one's."""
        return Node(self.kind, self.layer, self.head) if KINDS[self.kind].writes else None

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: the order in which a forward pass reaches sites."""
        return (self.layer, _ORDER[self.kind], self.head)

    @property
    def within(self) -> str:
        """Its name without the layer's number, the same in every layer: H3, MLP, bias, H3.q, resid_mid."""
        printed = KINDS[self.kind].printed.replace("L{layer}.", "").replace("L{layer}", "").replace("{layer}", "")
        return printed.format(head=self.head)


@dataclass(frozen=True)
class Sites:
    """Several sites by one name: those of some kinds, in one layer or (None) any, of one head (or neuron) or any."""

    kinds: tuple[str, ...]
    layer: int | None = None
    head: int | None = None

    def __contains__(self, one: Node | Site) -> bool:
        return one.kind in self.kinds and self.layer in (None, one.layer) and self.head in (None, one.head)


def parse_sites(name: object) -> Sites | None:
    """What a name stands for that names several: "L2.pattern" and "L2H*.pattern" (all heads of a layer), "L*H0.z",
    "resid_post*" and "resid_post", "MLP*", "MLP2.act[*]", "nodes", "heads" and the other GROUPS,
    "blocks.2.attn.hook_z". None for any other name.
    """
    text = _spelled(name).removesuffix(".out")
    if len(text) > _LONGEST or _found(text, KINDS) is not None:
        return None
    if text in GROUPS or text == "nodes":
        return Sites(GROUPS.get(text) or tuple(kind for kind in KINDS if KINDS[kind].writes))
    if (elsewhere := _ALL_HEADS.fullmatch(text)) is not None:
        layer, part = elsewhere.groups()
        return Sites(("head" if part == "result" else part,), _number(layer))
    found: dict[tuple[int | None, ...], tuple[str, ...]] = {}
    for kind in KINDS:
        if numbers := next((form.groups() for it in KINDS[kind].several if (form := it.fullmatch(text))), None):
            key = tuple(map(_number, numbers))
            found[key] = (*found.get(key, ()), kind)
        elif any(it.fullmatch(text) for it in KINDS[kind].several):
            found[()] = (*found.get((), ()), kind)
    return next((Sites(kinds, *numbers) for numbers, kinds in found.items()), None)


def _number(text: str) -> int | None:
    return None if text == "*" else int(text)


def parse_node(name: object) -> Node:
    """A `Node` from "L2H3", "(2, 3)", (2, 3), "L2.bias", "MLP2", "blocks.2.hook_mlp_out", "embed" or "pos_embed".

    Raises NodeError for anything else.
    """
    if isinstance(name, Node):
        return name
    if (found := _found(name, (kind for kind in KINDS if KINDS[kind].writes))) is not None:
        return Node(*found)
    raise NodeError("not a node name", got=shown(name), expected="L2H3, L2.bias, MLP2, embed or pos_embed")


def parse_location(name: object) -> Location:
    """A `Location` from "resid_mid2" or "blocks.2.hook_resid_mid". Raises NodeError for anything else."""
    if isinstance(name, Location):
        return name
    if (found := _found(name, _STATES)) is not None:
        return Location(*found)
    raise NodeError("not a location", got=shown(name), expected="resid_pre0, resid_mid2 or resid_post2")


def parse_site(name: object) -> Site:
    """A `Site` from "L2H3.z" (.q, .k, .v, .pattern), "L2KV1.k" (.v), "L2.v_input", "L2.attn_out", "MLP2.act",
    "MLP2.act[17]", a node or a location.

    "L2H3.out" is "L2H3", "resid_pre2" is "resid_post1". Raises NodeError for anything else.
    """
    if isinstance(name, Site) and name.kind != "pre":
        return name
    found = _found(name.removesuffix(".out") if isinstance(name, str) else name, KINDS)
    if found is None or (_spelled(name).endswith(".out") and not KINDS[found[0]].writes):
        if parse_sites(name) is not None:
            raise NodeError(f"{name} names several sites", expected="one, such as L2H0.z")
        raise NodeError(
            "not a site",
            got=shown(name),
            expected="a node, a location, L2H3.q, .k, .v, .z or .pattern, L2KV1.k or .v, L2.v_input or MLP2.act",
        )
    kind, *numbers = found
    return Site("post", numbers[0] - 1) if kind == "pre" and numbers[0] > 0 else Site(kind, *numbers)


def _found(name: object, kinds: Iterable[str]) -> tuple[str, *tuple[int, ...]] | None:
    """The kind of a name, and its layer and head; None where it is no name of these kinds."""
    text = _spelled(name)
    for kind in kinds if len(text) <= _LONGEST else ():
        for form in KINDS[kind].forms:
            if found := form.fullmatch(text):
                return (kind, *map(int, found.groups()))
    return None


def names_of(what: str, sites: object) -> list[str]:
    """Several sites by their names. Raises NodeError, which says `what` they are, for no list, and as `parse_site`."""
    listed = several(f"{what} are names", sites, "names such as L2H3, or a kind such as heads", NodeError)
    return [name if isinstance(name, str) else str(parse_site(name)) for name in listed]


def _spelled(name: object) -> str:
    """What may be a name, as text. A number is none: it has lost its zeros, and the head 2.10 would be the head 2.1."""
    if isinstance(name, tuple) and len(name) == 2 and all(isinstance(part, Integral) for part in name):
        return f"({name[0]:d}, {name[1]:d})"
    return str(name) if isinstance(name, (str, Node, Location, Site)) else ""


def nearest(name: object, available: Iterable[object]) -> str | None:
    """The few names most like `name`, as a hint to the user; None where nothing is."""
    near = difflib.get_close_matches(_spelled(name)[:_LONGEST], map(str, available), n=4, cutoff=0.3)
    return f"choose from the nearest: {', '.join(near)}" if near else None


def reads(reader: Node, writer: Node, parallel: bool, late: bool = False) -> bool:
    """Can `reader`'s input contain what `writer` wrote?

    Only a head, mixer or MLP reads; it reads earlier layers, and in a sequential block the MLP its layer's attention.
    `late`: what writes beside an MLP reads what that wrote.
    """
    if reader.kind not in (*PROJECTED, *MLPS):
        return False
    if writer.layer < reader.layer:
        return True
    if writer.layer == reader.layer and reader.kind == "beside" and late:
        return writer.kind != "beside"
    own = writer.layer == reader.layer and writer.kind in (*PROJECTED, "bias")
    return not parallel and reader.kind in MLPS and own


def choose(names: Iterable[object] | Node | None, available: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes called `names` (or the one), in write order; all of `available` for None.

    Raises NodeError for a name that this model does not have, with the nearest ones.
    """
    if names is None:
        return tuple(available)
    listed = [names] if isinstance(names, (str, Node)) else [*names] if isinstance(names, dict) else names
    each = several("nodes are names", listed, "names such as L2H3, or L2H* for several", NodeError)
    chosen = {node for name in each for node in _each(name, available)}
    if not chosen:
        raise NodeError("no node was named", expected="at least one node name", fix="leave the argument out for all")
    for node in sorted(chosen - set(available), key=lambda node: node.order):
        raise NodeError(f"this model has no node {node}", expected=_span(available), fix=nearest(node, available))
    return tuple(sorted(chosen, key=lambda node: node.order))


def _each(name: object, available: Sequence[Node]) -> Iterable[Node]:
    """The node of a name, or the nodes. Raises NodeError for a name of several of which there is none."""
    group = parse_sites(name)
    if group is None:
        return [parse_node(name)]
    if not (found := [node for node in available if node in group]):
        raise NodeError(f"this model has no node {name}", expected=_span(available), fix=nearest(name, available))
    return found


def require_readers(erasers: tuple[Node, ...], writer: Node, layers: Sequence[int]) -> tuple[Node, ...]:
    """`erasers` again, heads of these `layers`. Raises NodeError for one that cannot read `writer` through values."""
    early = [str(node) for node in erasers if node.kind != "head" or node.layer not in layers]
    if early:
        spans = "" if not layers else f"heads of layers {layers[0]} to {layers[-1]}"
        if layers and len(layers) <= layers[-1] - layers[0]:
            spans = f"heads of layers {', '.join(map(str, layers))}"
        expected = spans or "heads whose values are made after it; there are none"
        raise NodeError(f"{', '.join(early)} cannot read {writer} through values of attention", expected=expected)
    return erasers


def _span(available: Sequence[Node]) -> str:
    return f"one of {len(available)} nodes from {available[0]} to {available[-1]}"
