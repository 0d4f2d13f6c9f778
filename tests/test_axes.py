"""Do the axes of a result say where things lie, however it came about, and does a grid put each number there?"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import tiny
import unwrite as uw
from methods import IDS, PAIRS
from unwrite.errors import ResultError
from unwrite.model.load import view
from unwrite.nodes import KINDS, Site
from unwrite.result import Result, build, quantity, read

NAMES = ["embed", "L0H0", "L0H1", "L0.bias", "MLP0", "L1H1", "L2M0", "MLP2", "MLP2.1"]
VALUES = np.arange(18.0).reshape(2, 9) - 4


def made(**more: object) -> Result:
    """Two prompts; nodes of every kind that writes."""
    data = {"effect": quantity(("pair", "node"), VALUES, "logit_diff", "of the test")}
    return build("effects", xr.Dataset(data | more, {"node": NAMES}), {}, {"name": "m"}, {})  # pyright: ignore


def test_an_axis_of_nodes_says_kind_layer_and_head() -> None:
    node = made()["effect"]
    assert node["layer"].values.tolist() == [-1, 0, 0, 0, 0, 1, 2, 2, 2]
    assert node["head"].values.tolist() == [-1, 0, 1, -1, -1, 1, 0, -1, -1]
    assert node["kind"].values.tolist() == ["embed", "head", "head", "bias", "mlp", "head", "mixer", "mlp", "beside"]
    by_layer = node.groupby("layer").sum()
    assert by_layer.sel(layer=0).values.tolist() == VALUES[:, 1:5].sum(1).tolist()
    assert node.set_xindex("layer").sel(layer=2)["node"].values.tolist() == ["L2M0", "MLP2", "MLP2.1"]
    assert (node - node.isel(node=slice(2, 4))).sizes["node"] == 2
    assert node[{"node": node["kind"].values == "head"}]["node"].values.tolist() == ["L0H0", "L0H1", "L1H1"]


def test_other_axes_are_named_with_what_they_say() -> None:
    values = quantity(("sender", "receiver", "location", "reading"), np.zeros((2, 3, 1, 1)), "1", "")
    axes = {
        "sender": ["embed", "L1H2"], "receiver": ["L3H1.q", "L2KV1.k", "logits"], "location": ["resid_mid4"],
        "reading": ["direct"],
    }  # fmt: skip
    data = build("paths", xr.Dataset({"effect": values}, axes), {}, {}, {}).data
    assert data["sender_layer"].values.tolist() == [-1, 1]
    assert data["receiver_head"].values.tolist() == [1, 1, -1]
    assert data["receiver_kind"].values.tolist() == ["q", "shared_k", "logits"]
    assert (data["location_layer"].item(), data["location_kind"].item()) == (4, "mid")
    assert not [name for name in data.coords if str(name).startswith("reading_")]


def test_a_variable_or_an_axis_of_another_sense_is_left_alone() -> None:
    data = xr.Dataset(
        {"effect": (("node", "layer"), np.ones((1, 2)))}, {"node": ["L1H0"], "layer": [7, 8]}, {"provenance": "{}"}
    )
    placed = Result(data).data
    assert placed["layer"].values.tolist() == [7, 8]
    assert placed["node_layer"].values.tolist() == [1]


@pytest.mark.promise("read-back")
@pytest.mark.parametrize("how", ["before", "lying"])
def test_where_things_lie_is_made_of_their_names_whatever_a_file_says(how: str, tmp_path: Path) -> None:
    found = made().data
    older = found.drop_vars(["kind", "layer", "head"])
    lying = found.assign_coords(layer=("node", np.full(9, 99)), kind=("node", np.full(9, "</script>")))
    (older if how == "before" else lying).to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    assert read(tmp_path)["effect"].identical(made()["effect"])


def test_a_grid_has_each_number_at_its_layer_and_head() -> None:
    grid = made().grid("effect")
    assert grid["head"].values.tolist() == ["H0", "H1", "M0", "bias", "MLP", "MLP.1"]
    assert grid.attrs == {"units": "logit_diff", "equation": "of the test"}
    frame = grid.to_pandas()
    for name, mean in zip(NAMES, VALUES.mean(0), strict=True):
        layer = re.search(r"[LP](\d+)", name)
        if layer is None:
            continue
        column = name.replace(f"L{layer[1]}.", "").replace(f"L{layer[1]}", "").replace(f"MLP{layer[1]}", "MLP")
        assert frame.loc[int(layer[1]), column] == mean
    assert int(frame.notna().sum().sum()) == len(NAMES) - 1
    assert made().grid("effect", pair=1).sel(layer=2, head="MLP.1") == VALUES[1, 8]


def test_no_two_kinds_of_a_layer_have_one_column() -> None:
    """So a grid never puts one number over another."""
    names = [
        Site(kind, 3, head).within for kind, one in KINDS.items() for head in ((0, 1) if "head" in one.per else (0,))
    ]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "3" in name]


def test_with_positions_a_grid_has_layers_or_names_and_tokens() -> None:
    lm = view(tiny.model("gpt2", 0))
    states = uw.effects(lm, PAIRS, ["L0.attn_out", "L1.attn_out"], method="atp")
    one = states.grid("effect", pair=0)
    assert one.dims == ("layer", "position")
    assert one.values.tolist() == states["effect"].sel(pair=0).values.tolist()
    # Without a tokenizer a token is its id; behind the row that is read there is none.
    assert one["token"].values.tolist() == [str(i) for i in IDS[0].tolist()]
    assert states["effect"]["source_token"].sel(pair=1).values.tolist() == [str(i) for i in IDS[3].tolist()]
    assert "token" not in states.grid("effect").coords
    several = uw.effects(lm, PAIRS, ["L0H0", "L0H1"], method="atp").grid("effect")
    assert several.dims == ("node", "position")
    alike = uw.effects(lm, uw.pairs(IDS[[0, 0]], IDS[2:], 5, 9, position=3), ["L0.attn_out"], method="atp")
    said = alike.grid("effect")["token"].values.tolist()
    assert said == [*(str(i) for i in IDS[0, :4].tolist()), "", ""]


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("name", "chosen", "says"),
    [
        ("effect", {"writer": "L0H0"}, "no such axis. Got: 'writer'. Expected: pair, node"),
        ("effect", {"pair": "x\x1b"}, "no such pair"),
        ("effect", {"node": "L9H9"}, "no such node.*embed, L0H0"),
        ("words", {}, "holds no numbers"),
        ("base", {}, "is not of nodes"),
        ("both", {}, "Next: pick on another, as writer=embed"),
        ("efect", {}, "no such variable"),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused(name: str, chosen: dict, says: str) -> None:
    both = made(base=("pair", [0.5, 1.0]), words=("node", NAMES), both=(("writer", "node"), np.ones((9, 9))))
    result = Result(both.data.assign_coords(writer=NAMES))
    with pytest.raises(ResultError, match=says):
        result.grid(name, **chosen)
    assert result.grid("both", writer="L0H1").sizes == {"layer": 3, "head": 6}
