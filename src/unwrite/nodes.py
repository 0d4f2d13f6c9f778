"""What are the parts of a decoder called?

The only place where "L2H3", "MLP2", "resid_mid2" or "L2H3.v" is parsed, printed or ordered.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unwrite.errors import NodeError

# Write order inside a layer: the heads, then the attention's constant part, then the MLP.
_KINDS = ("embed", "pos_embed", "head", "bias", "mlp")
_STATES = ("pre", "mid", "post")
# The order in which a forward pass reaches the sites of a layer. In a parallel block the MLP comes when it likes.
_SITES = (
    *("embed", "pos_embed", "pre", "v_input", "q", "shared_k", "k", "shared_v", "v"),
    *("pattern", "z", "head", "bias", "attn_out", "mid", "act", "neuron", "mlp", "post"),
)

_NODE_FORMS = (
    ("head", re.compile(r"L(\d+)H(\d+)")),
    ("head", re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)")),
    ("bias", re.compile(r"L(\d+)\.bias")),
    ("mlp", re.compile(r"MLP(\d+)")),
    ("mlp", re.compile(r"blocks\.(\d+)\.hook_mlp_out")),
    ("embed", re.compile(r"(?:hook_)?embed")),
    ("pos_embed", re.compile(r"(?:hook_)?pos_embed")),
)
_LOCATION_FORMS = (re.compile(r"resid_(pre|mid|post)(\d+)"), re.compile(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)"))
_SITE_FORMS = (
    *((part, re.compile(rf"L(\d+)H(\d+)\.{part}")) for part in ("q", "k", "v", "z", "pattern")),
    *((f"shared_{part}", re.compile(rf"L(\d+)KV(\d+)\.{part}")) for part in ("k", "v")),
    ("v_input", re.compile(r"L(\d+)\.v_input")),
    ("attn_out", re.compile(r"L(\d+)\.attn_out")),
    ("attn_out", re.compile(r"blocks\.(\d+)\.hook_attn_out")),
    ("neuron", re.compile(r"MLP(\d+)\.act\[(\d+)\]")),
    ("act", re.compile(r"MLP(\d+)\.act")),
    ("act", re.compile(r"blocks\.(\d+)\.mlp\.hook_post")),
)


@dataclass(frozen=True)
class Node:
    """Anything that adds a vector to the residual stream. `str(node)` is its printed name."""

    kind: str
    layer: int = -1
    head: int = -1

    def __str__(self) -> str:
        return {
            "head": f"L{self.layer}H{self.head}",
            "bias": f"L{self.layer}.bias",
            "mlp": f"MLP{self.layer}",
        }.get(self.kind, self.kind)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: write order."""
        return (self.layer, _KINDS.index(self.kind), self.head)


@dataclass(frozen=True)
class Location:
    """A state of the residual stream: before a layer, between its attention and MLP, or after it."""

    state: str
    layer: int

    def __str__(self) -> str:
        return f"resid_{self.state}{self.layer}"

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
        return self.state == "post" or (self.state == "mid" and not parallel and node.kind != "mlp")


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
        if self.kind in _STATES:
            return str(Location(self.kind, self.layer))
        if (node := self.node) is not None:
            return str(node)
        part = self.kind.removeprefix("shared_")
        return {
            "v_input": f"L{self.layer}.v_input",
            "attn_out": f"L{self.layer}.attn_out",
            "act": f"MLP{self.layer}.act",
            "neuron": f"MLP{self.layer}.act[{self.head}]",
            f"shared_{part}": f"L{self.layer}KV{self.head}.{part}",
        }.get(self.kind, f"L{self.layer}H{self.head}.{part}")

    @property
    def node(self) -> Node | None:
        """The node whose write this is, if it is one's."""
        return Node(self.kind, self.layer, self.head) if self.kind in _KINDS else None

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: the order in which a forward pass reaches sites."""
        return (self.layer, _SITES.index(self.kind), self.head)


def parse_node(name: object) -> Node:
    """A `Node` from "L2H3", "(2, 3)", (2, 3), "L2.bias", "MLP2", "blocks.2.hook_mlp_out", "embed" or "pos_embed".

    Raises NodeError for anything else.
    """
    if isinstance(name, Node):
        return name
    for kind, form in _NODE_FORMS:
        if found := form.fullmatch(str(name)):
            return Node(kind, *(int(number) for number in found.groups()))
    raise NodeError("not a node name", got=repr(name), expected="L2H3, L2.bias, MLP2, embed or pos_embed")


def parse_location(name: object) -> Location:
    """A `Location` from "resid_mid2" or "blocks.2.hook_resid_mid". Raises NodeError for anything else."""
    if isinstance(name, Location):
        return name
    for form in _LOCATION_FORMS:
        if found := form.fullmatch(str(name)):
            state, layer = sorted(found.groups(), key=str.isdigit)
            return Location(state, int(layer))
    raise NodeError("not a location", got=repr(name), expected="resid_pre0, resid_mid2 or resid_post2")


def parse_site(name: object) -> Site:
    """A `Site` from "L2H3.z" (.q, .k, .v, .pattern), "L2KV1.k" (.v), "L2.v_input", "L2.attn_out", "MLP2.act",
    "MLP2.act[17]", a node or a location.

    "L2H3.out" is "L2H3", "resid_pre2" is "resid_post1". Raises NodeError for anything else.
    """
    if isinstance(name, Site) and name.kind != "pre":
        return name
    text = str(name)
    for kind, form in _SITE_FORMS:
        if found := form.fullmatch(text):
            return Site(kind, *(int(number) for number in found.groups()))
    if any(form.fullmatch(text) for form in _LOCATION_FORMS):
        state = parse_location(text)
        before = state.state == "pre" and state.layer > 0
        return Site("post", state.layer - 1) if before else Site(state.state, state.layer)
    try:
        node = parse_node(text.removesuffix(".out"))
    except NodeError:
        raise NodeError(
            "not a site",
            got=repr(name),
            expected="a node, a location, L2H3.q, .k, .v, .z or .pattern, L2KV1.k or .v, L2.v_input or MLP2.act",
        ) from None
    return Site(node.kind, node.layer, node.head)


def nearest(name: object, available: Iterable[object]) -> str | None:
    """The few names most like `name`, as a hint to the user; None where nothing is."""
    near = difflib.get_close_matches(str(name), map(str, available), n=4, cutoff=0.3)
    return f"nearest: {', '.join(near)}" if near else None


def reads(reader: Node, writer: Node, parallel: bool) -> bool:
    """Can `reader`'s input contain what `writer` wrote?

    Only a head or MLP reads; it reads earlier layers, and in a sequential block the MLP reads its layer's attention.
    """
    if reader.kind not in ("head", "mlp"):
        return False
    if writer.layer < reader.layer:
        return True
    return not parallel and reader.kind == "mlp" and writer.layer == reader.layer and writer.kind in ("head", "bias")


def choose(names: Iterable[object] | Node | None, available: Sequence[Node]) -> tuple[Node, ...]:
    """The nodes called `names` (or the one), in write order; all of `available` for None.

    Raises NodeError for a name that this model does not have, with the nearest ones.
    """
    if names is None:
        return tuple(available)
    chosen = {parse_node(name) for name in ([names] if isinstance(names, (str, Node)) else names)}
    if not chosen:
        raise NodeError("no node was named", expected="at least one node name", fix="leave the argument out for all")
    for node in sorted(chosen - set(available), key=lambda node: node.order):
        raise NodeError(f"this model has no node {node}", expected=_span(available), fix=nearest(node, available))
    return tuple(sorted(chosen, key=lambda node: node.order))


def require_readers(erasers: tuple[Node, ...], writer: Node, layers: int) -> tuple[Node, ...]:
    """`erasers` again. Raises NodeError for one that cannot read `writer` through values."""
    early = [str(node) for node in erasers if node.kind != "head" or node.layer <= writer.layer]
    if early:
        raise NodeError(
            f"{', '.join(early)} cannot read {writer} through values",
            expected=f"heads of layers {writer.layer + 1} to {layers - 1}",
        )
    return erasers


def _span(available: Sequence[Node]) -> str:
    return f"one of {len(available)} nodes from {available[0]} to {available[-1]}"
