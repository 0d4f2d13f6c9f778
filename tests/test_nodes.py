"""Is a name read the same way everywhere, printed as it was read, and never guessed?"""

from __future__ import annotations

import random
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from unwrite.errors import NodeError
from unwrite.nodes import Location, Node, choose, parse_location, parse_node, parse_site, parse_sites, reads

NUMBER = st.integers(0, 300)
NODES = st.one_of(
    st.sampled_from([Node("embed"), Node("pos_embed")]),
    st.builds(Node, st.just("head"), NUMBER, NUMBER),
    st.builds(Node, st.sampled_from(["bias", "mlp"]), NUMBER),
)
LOCATIONS = st.builds(Location, st.sampled_from(["pre", "mid", "post"]), NUMBER)

# A model of 12 layers with 2 heads each.
PARTS = [parse_node(name) for name in ("embed", "pos_embed")] + [
    parse_node(form.format(layer=layer))
    for layer in range(12)
    for form in ("L{layer}H0", "L{layer}H1", "L{layer}.bias", "MLP{layer}")
]


@given(NODES)
def test_a_printed_node_reads_back_as_itself(node: Node) -> None:
    assert parse_node(str(node)) == parse_node(node) == node


@given(LOCATIONS)
def test_a_printed_location_reads_back_as_itself(location: Location) -> None:
    assert parse_location(str(location)) == parse_location(location) == location


@pytest.mark.parametrize(
    ("name", "kind", "layer", "head"),
    [
        ("embed", "embed", -1, -1),
        ("pos_embed", "pos_embed", -1, -1),
        ("L0H0", "head", 0, 0),
        ("L2H3", "head", 2, 3),
        ("L12H103", "head", 12, 103),
        ("L10.bias", "bias", 10, -1),
        ("MLP0", "mlp", 0, -1),
        ("MLP47", "mlp", 47, -1),
    ],
)
def test_a_node_is_what_its_name_says(name: str, kind: str, layer: int, head: int) -> None:
    node = parse_node(name)
    assert (node.kind, node.layer, node.head) == (kind, layer, head)
    assert str(node) == name


@pytest.mark.parametrize(
    ("spelling", "short"),
    [
        ((2, 3), "L2H3"),
        ((11, 10), "L11H10"),
        ("(2, 3)", "L2H3"),
        ("2.3", "L2H3"),
        ("a2.h3", "L2H3"),
        ("(2,3)", "L2H3"),
        ("blocks.2.hook_mlp_out", "MLP2"),
        ("blocks.31.hook_mlp_out", "MLP31"),
        ("hook_embed", "embed"),
        ("hook_pos_embed", "pos_embed"),
    ],
)
def test_a_transformer_lens_spelling_is_printed_short(spelling: object, short: str) -> None:
    assert str(parse_node(spelling)) == short


@pytest.mark.parametrize(
    ("spelling", "short"),
    [
        ("resid_pre0", "resid_pre0"),
        ("resid_mid12", "resid_mid12"),
        ("blocks.0.hook_resid_pre", "resid_pre0"),
        ("blocks.2.hook_resid_mid", "resid_mid2"),
        ("blocks.10.hook_resid_post", "resid_post10"),
    ],
)
def test_a_location_is_printed_short(spelling: str, short: str) -> None:
    assert str(parse_location(spelling)) == short


WRONG = ["", "L2", "H3", "L2H", "l2h3", "L2H3 ", "L2H3\n", "xL2H3", "L-1H0", "L1.5H0", "MLP", "MLP-1", "mlp2", "L2bias",
         "Embed", "resid_mid", "resid_end2", "blocks.x.hook_mlp_out", "blocks.2.hook_attn_out", None, 2, 2.5, (2,),
         (2, 3, 4), (2, -3), [2, 3], b"L2H3"]  # fmt: skip


@pytest.mark.parametrize("name", [*WRONG, "resid_mid2", "blocks.2.hook_resid_mid"], ids=repr)
def test_what_is_no_node_is_refused_by_name(name: object) -> None:
    with pytest.raises(NodeError, match="not a node name") as caught:
        parse_node(name)
    assert repr(name).replace("\\", "") in str(caught.value).replace("\\", "")


@pytest.mark.parametrize("name", [*WRONG, "L2H3", "MLP2", "embed"], ids=repr)
def test_what_is_no_location_is_refused_by_name(name: object) -> None:
    with pytest.raises(NodeError, match="not a location") as caught:
        parse_location(name)
    assert repr(name).replace("\\", "") in str(caught.value).replace("\\", "")


def test_nodes_are_ordered_as_they_write() -> None:
    written = "embed pos_embed L0H0 L0H1 L0H10 L0.bias MLP0 L1H0 L1.bias MLP1 L2H0 MLP2 L9H1 MLP9 L10H0 L10.bias MLP10"
    shuffled = random.Random(0).sample(written.split(), len(written.split()))
    assert [str(node) for node in sorted(map(parse_node, shuffled), key=lambda node: node.order)] == written.split()


def test_locations_are_ordered_as_they_are_reached() -> None:
    reached = "resid_pre0 resid_mid0 resid_post0 resid_pre1 resid_mid1 resid_post1 resid_mid9 resid_pre10 resid_mid10"
    shuffled = random.Random(0).sample(reached.split(), len(reached.split()))
    ordered = sorted(map(parse_location, shuffled), key=lambda location: location.order)
    assert [str(location) for location in ordered] == reached.split()


# Who can read whom, worked by hand. A column for each writer:
WRITERS = ["embed", "pos_embed", "L0H0", "L0.bias", "MLP0", "L1H0", "L1H1", "L1.bias", "MLP1", "L2H0"]
SEQUENTIAL_READS = {
    "embed": "..........",
    "pos_embed": "..........",
    "L0H0": "11........",
    "L0.bias": "..........",
    "MLP0": "1111......",
    "L1H0": "11111.....",
    "L1H1": "11111.....",
    "L1.bias": "..........",
    "MLP1": "11111111..",
    "L2H0": "111111111.",
}
PARALLEL_READS = {
    **SEQUENTIAL_READS,
    "MLP0": "11........",
    "MLP1": "11111.....",
}
# What a state of the stream holds; in a parallel block there is nothing between the state before it and that after it.
PARALLEL_HOLDS = {
    "resid_pre0": "11........",
    "resid_mid0": "11........",
    "resid_post0": "11111.....",
    "resid_pre1": "11111.....",
    "resid_post1": "111111111.",
    "resid_pre2": "111111111.",
    "resid_post2": "1111111111",
}
SEQUENTIAL_HOLDS = {
    **PARALLEL_HOLDS,
    "resid_mid0": "1111......",
    "resid_mid1": "11111111..",
    "resid_mid2": "1111111111",
}
BLOCKS = [False, True]


def cells(sequential: dict[str, str], parallel: dict[str, str]) -> list[tuple[bool, str, str, bool]]:
    tables = ((False, sequential), (True, parallel))
    return [
        (block, row, writer, cell == "1")
        for block, table in tables
        for row, line in table.items()
        for writer, cell in zip(WRITERS, line, strict=True)
    ]


@pytest.mark.parametrize("parallel", BLOCKS, ids=["sequential", "parallel"])
def test_who_reads_whom_is_as_worked_by_hand(parallel: bool) -> None:
    for block, reader, writer, expected in cells(SEQUENTIAL_READS, PARALLEL_READS):
        if block is parallel:
            assert reads(parse_node(reader), parse_node(writer), parallel) is expected, (reader, writer)


@pytest.mark.parametrize("parallel", BLOCKS, ids=["sequential", "parallel"])
def test_what_a_location_holds_is_as_worked_by_hand(parallel: bool) -> None:
    for block, location, writer, expected in cells(SEQUENTIAL_HOLDS, PARALLEL_HOLDS):
        if block is parallel:
            assert parse_location(location).holds(parse_node(writer), parallel) is expected, (location, writer)


@given(NODES, NODES, st.booleans())
def test_nobody_reads_what_is_written_later(reader: Node, writer: Node, parallel: bool) -> None:
    if reads(reader, writer, parallel):
        assert writer.order < reader.order
        assert not reads(writer, reader, parallel)


@given(NODES, NODES, st.booleans())
def test_a_node_reads_what_the_state_before_it_holds(reader: Node, writer: Node, parallel: bool) -> None:
    if reader.kind in ("head", "mlp"):
        before = Location("mid" if reader.kind == "mlp" and not parallel else "pre", reader.layer)
        assert reads(reader, writer, parallel) == before.holds(writer, parallel)


def test_no_names_means_all() -> None:
    assert choose(None, PARTS) == tuple(PARTS)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["MLP1"], "MLP1"),
        (["L10H0", "L2H1", "embed"], "embed L2H1 L10H0"),
        (["L0H1", (0, 1), "(0, 1)"], "L0H1"),
        (["blocks.11.hook_mlp_out", "hook_embed"], "embed MLP11"),
        ({"MLP3": 0, "L3.bias": 1}, "L3.bias MLP3"),
        ("L2H1", "L2H1"),
        (Node("mlp", 2), "MLP2"),
    ],
    ids=repr,
)
def test_named_nodes_come_once_and_in_write_order(names: list, expected: str) -> None:
    assert " ".join(map(str, choose(names, PARTS))) == expected


@pytest.mark.parametrize("name", ["L12H0", "L0H2", "MLP12", "L12.bias"])
def test_a_missing_node_is_named_with_the_nearest(name: str) -> None:
    with pytest.raises(NodeError) as caught:
        choose(["L0H0", name], PARTS)
    said = str(caught.value)
    assert f"no node {name}." in said
    assert "from embed to MLP11" in said
    near = re.search(r"nearest: (.+)\.$", said)
    assert near is not None
    assert {parse_node(other) for other in near[1].split(", ")} <= set(PARTS)
    assert parse_node(near[1].split(", ")[0]).kind == parse_node(name).kind


def test_the_first_of_several_missing_nodes_is_named() -> None:
    with pytest.raises(NodeError, match="no node L12H0"):
        choose(["MLP30", "L12H0", "L20H1"], PARTS)


@pytest.mark.parametrize("names", [[], (), set()])
def test_naming_none_is_an_error(names: object) -> None:
    with pytest.raises(NodeError, match="no node was named"):
        choose(names, PARTS)


def test_a_wrong_name_is_refused_even_beside_good_ones() -> None:
    with pytest.raises(NodeError, match="'L1H'"):
        choose(["L0H0", "L1H"], PARTS)


@pytest.mark.parametrize(
    ("name", "also", "without"),
    [
        ("L2.pattern", "L2H3.pattern", "L1H3.pattern"),
        ("L2H*.pattern", "L2H3.pattern", "L2H3.z"),
        ("blocks.2.attn.hook_pattern", "L2H3.pattern", "L2H3.z"),
        ("blocks.*.attn.hook_result", "L2H3", "L2H3.z"),
        ("pattern", "L2H3.pattern", "L2H3"),
        ("L*H0", "L7H0", "L7H1"),
        ("L*.z", "L2M3.z", "L2H3"),
        ("L2KV*.k", "L2KV1.k", "L2H1.k"),
        ("resid_post*", "resid_post2", "resid_mid2"),
        ("resid_mid", "resid_mid2", "resid_post2"),
        ("blocks.*.hook_resid_mid", "resid_mid2", "resid_post2"),
        ("MLP*", "MLP2", "MLP2.act"),
        ("act", "MLP2.act", "MLP2.act[3]"),
        ("MLP2.act[*]", "MLP2.act[3]", "MLP3.act[3]"),
        ("nodes", "L2.bias", "L2.attn_out"),
        ("heads", "L2M1", "MLP2"),
        ("(2, *)", "L2H5", "L3H5"),
    ],
)
def test_a_name_of_several_holds_what_it_says(name: str, also: str, without: str) -> None:
    several = parse_sites(name)
    assert several is not None
    assert parse_site(also) in several
    assert parse_site(without) not in several
    with pytest.raises(NodeError, match="names several sites"):
        parse_site(name)


@pytest.mark.parametrize(
    "name", ["L2H3", "embed", "MLP2", "L2.attn_out", "L2", "L*", "**", "L2H**", "", "L2..z", None, 3]
)
def test_any_other_name_holds_nothing(name: object) -> None:
    assert parse_sites(name) is None


def test_writers_are_named_together() -> None:
    assert [*map(str, choose(["L3H*", "L0.bias"], PARTS))] == ["L0.bias", "L3H0", "L3H1"]
    with pytest.raises(NodeError, match="no node L12H\\*"):
        choose(["L12H*"], PARTS)
