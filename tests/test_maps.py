"""Does a picture show the numbers of its variable, every one at its place, with colours that say what they say?"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import xarray as xr

import tiny
import unwrite as uw
from methods import IDS, PAIRS, few_draws
from test_report import HOSTILE, SVG, Page
from unwrite.errors import ResultError
from unwrite.model.load import view
from unwrite.report.figures import save
from unwrite.report.views import VIEWS, words
from unwrite.result import Result, build, quantity

NODES = ["embed", *(f"L{layer}{part}" for layer in (0, 1) for part in ("H0", "H1")), "MLP0", "MLP1"]


def made(**variables: Any) -> Result:
    data = xr.Dataset({name: quantity(*part, "logit", "how") for name, part in variables.items()}, {"node": NODES})
    return build("of tomorrow", data, {}, {"name": "m"}, {})


def cells(chart: Any) -> list[dict[str, Any]]:
    """What is drawn, of the layer that has most."""
    return max(drawn(chart.to_dict(validate=False)), key=len)


def drawn(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """All data of a chart, layer by layer."""
    if "datasets" in spec:
        return [*spec["datasets"].values()]
    own = [spec["data"]["values"]] if "data" in spec else []
    return [*own, *(data for layer in spec.get("layer", []) for data in drawn(layer))]


@pytest.fixture(scope="module")
def each() -> dict[str, Result]:
    """Name of a method -> its result on a tiny model: those that no audit is made of."""
    lm = view(tiny.model("gpt2", 3, num_hidden_layers=2, num_attention_heads=2))
    with few_draws():
        atp, exact = (uw.effects(lm, PAIRS, method=method) for method in ("atp", "exact"))
        whole = uw.effects(lm, PAIRS, at="all", method="atp")
        found = (
            exact, uw.agree(atp, exact), uw.compare(lm, PAIRS, methods=("atp", "exact")),
            uw.paths(lm, PAIRS, "heads", ["L1H0.v", "MLP1", "logits"], "frozen"),
            uw.bound(lm, PAIRS, atp, subsets=12, p=0.5), uw.survival(lm, IDS, ["L0H1", "MLP0"], decoys=1),
            uw.dla(lm, IDS[:2], 5, 9, total=False), uw.circuit(lm, PAIRS, ["L0H0", "MLP1"], draws=1),
            uw.Circuit(("L0H0", "MLP1"), scores=(1.0, -1.0)).result(), uw.overlap(whole, whole, 0.5),
            uw.readers(lm, IDS, "L0H0"), uw.self_repair(uw.dla(lm, IDS, 5, 9, at="position"), 0.5),
        )  # fmt: skip
    return {one.method: one for one in found}


def test_every_method_has_a_view() -> None:
    """Beside those here: what an audit is made of (test_page.py), a paper's claims, and images (test_localise.py)."""
    assert set(VIEWS) == {
        "effects", "agree", "compare", "paths", "bound", "survival", "dla",
        "scan", "verify", "audit", "adversarial", "corpus_dla", "reproduce", "lens", "attention", "solves",
        "circuit", "Circuit", "overlap", "beside", "mask", "readers", "subspace", "channels", "decode", "graph",
        "self_repair", "localise",
    }  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        "effects",
        "agree",
        "compare",
        "paths",
        "bound",
        "survival",
        "dla",
        "circuit",
        "Circuit",
        "overlap",
        "readers",
        "self_repair",
    ],
)
def test_every_method_has_a_picture_a_card_and_words(each, method: str) -> None:
    result = each[method]
    assert cells(result.figure())
    assert Page(result._repr_html_()).tags.count("svg") == 1
    first, table, *_ = repr(result).splitlines()
    assert first == f"uw.{method}: {words(result)}"
    assert table.startswith(f"table: {len(result.table()):,} × {result.table().shape[1]}, a row for each ")


def test_what_is_left_of_a_result_still_says_what_it_holds(each) -> None:
    part = Result(each["survival"].data[["acts"]])
    assert repr(part).startswith("uw.survival: a part of a result\ntable: none\naxes: writer 2, node ")
    assert cells(part.figure("matrix"))


def test_a_heat_map_has_each_number_at_its_place(each) -> None:
    result = each["effects"]
    shown = {(cell["y"], cell["x"]): cell["value"] for cell in cells(result.figure("heatmap"))}
    mean = result["effect"].mean("pair")
    assert len(shown) == mean.size
    for (node, position), value in shown.items():
        assert value == pytest.approx(float(mean.sel(node=node, position=int(position))))
    first = result.figure("heatmap", pair=0)
    tokens = [f"{i} {token}" for i, token in enumerate(result["effect"]["token"].sel(pair=0).values)]
    assert {cell["x"] for cell in cells(first)} == set(tokens)
    assert first.to_dict()["layer"][0]["encoding"]["x"]["sort"] == tokens


def test_prompts_of_other_words_are_not_averaged_over() -> None:
    result = uw.lens(view(tiny.model("gpt2", 3, num_hidden_layers=2, num_attention_heads=2)), IDS[:2])
    first = result["followed_prob"].sel(prompt=0)
    shown = {cell["value"] for cell in cells(result.figure()) if cell["value"] is not None}
    assert shown <= {float(value) for value in first.values.ravel()}
    assert "prompt 0" in " ".join(result.figure().to_dict()["title"]["subtitle"])
    assert cells(result.figure(prompt=1)) != cells(result.figure(prompt=0)) == cells(result.figure())


def test_what_was_not_measured_is_grey_and_what_is_not_there_blank() -> None:
    values = np.array([9.0, 0.5, np.nan, -2.0, 0.0, 1.0, 0.25])
    chart = made(x=(("node",), values)).figure()
    shown = {(cell["y"], cell["x"]): cell["value"] for cell in cells(chart)}
    assert shown == {
        ("0", "H0"): 0.5, ("0", "H1"): None, ("1", "H0"): -2.0, ("1", "H1"): 0.0, ("0", "MLP"): 1.0, ("1", "MLP"): 0.25,
    }  # fmt: skip
    spec = chart.to_dict()
    assert spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == [-2.0, 0, 2.0]
    said = " ".join(spec["title"]["subtitle"])
    assert "logit; -2 to +1, grey: no number; outside of the layers: embed +9" in said
    fewer = made(x=(("node",), values)).data.isel(node=[1, 2, 3])
    some = Result(fewer).figure()
    assert len(cells(some)) == 3
    assert "blank: not asked or not there" in " ".join(some.to_dict()["title"]["subtitle"])


def test_a_few_large_numbers_do_not_pale_the_others() -> None:
    names = [f"L{layer}H{head}" for layer in range(30) for head in range(9)]
    values = np.linspace(-1, 1, len(names))
    values[5] = 50.0
    data = xr.Dataset({"x": quantity(("node",), values, "1", "")}, {"node": names})
    spec = build("of tomorrow", data, {}, {}, {}).figure().to_dict()
    low, _, high = spec["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert low == -high
    assert 0.9 < high < 1
    assert f"-1 to +50, colours end at ±{high:.3g}" in " ".join(spec["title"]["subtitle"])


def test_nothing_but_zeros_is_drawn() -> None:
    chart = made(x=(("node",), np.zeros(7)), y=(("node",), np.full(7, np.nan))).figure("heatmap", of="x")
    assert {cell["number"] for cell in cells(chart)} == {"0"}
    none = made(x=(("node",), np.full(7, np.nan))).figure("heatmap", of="x").to_dict()
    assert "no number was measured" in " ".join(none["title"]["subtitle"])


def test_a_large_model_fits(tmp_path: Path) -> None:
    names = [f"L{layer}H{head}" for layer in range(80) for head in range(64)]
    data = xr.Dataset({"x": quantity(("node",), np.arange(5120.0), "1", "")}, {"node": names})
    chart = build("of tomorrow", data, {}, {}, {}).figure()
    spec = chart.to_dict(validate=False)
    assert len(cells(chart)) == 5120
    axes = spec["encoding"] if "encoding" in spec else spec["layer"][0]["encoding"]
    # Labels have room, and cells are less than a screen.
    assert len(axes["y"]["axis"]["values"]) == 40
    assert 64 * spec["width"]["step"] < 1000
    assert 80 * spec["height"]["step"] < 1000


def test_a_matrix_shows_the_rows_and_columns_with_the_largest_numbers(each) -> None:
    paths = each["paths"]["effect"].mean("pair")
    shown = {(cell["y"], cell["x"]): cell["value"] for cell in cells(each["paths"].figure())}
    for (sender, receiver), value in shown.items():
        expected = float(paths.sel(sender=sender, receiver=receiver))
        assert value is None if np.isnan(expected) else value == pytest.approx(expected)
    assert len(shown) == paths.size
    names = [f"L0H{i}" for i in range(70)]
    values = np.abs(np.random.default_rng(0).normal(size=(70, 70)))
    data = xr.Dataset({"acts": quantity(("writer", "node"), values, "1", "")}, {"writer": names, "node": names})
    few = build("survival", data, {}, {}, {}).figure("matrix")
    kept = {cell["y"] for cell in cells(few)}, {cell["x"] for cell in cells(few)}
    assert kept[0] == {names[i] for i in np.argsort(-values.max(1))[:40]}
    assert kept[1] == {names[i] for i in np.argsort(-values.max(0))[:60]}
    assert "40 of 70 writers and 60 of 70 nodes" in " ".join(few.to_dict()["title"]["subtitle"])


def test_bars_are_ranked_by_size_with_their_intervals() -> None:
    values = np.array([0.5, -3.0, np.nan, 2.0, 0.0, 1.0, -0.25])
    ends = {f"x_{end}": (("node",), values + by) for end, by in (("low", -1.0), ("high", 1.0))}
    chart = made(x=(("node",), values), **ends).figure("bars")
    ranked = [NODES[i] for i in (1, 3, 5, 0, 6, 4)]
    spec = chart.to_dict()
    bars, rules = drawn(spec)
    assert [bar["y"] for bar in bars] == ranked == [rule["y"] for rule in rules]
    assert [(rule["low"] + rule["high"]) / 2 for rule in rules] == [bar["value"] for bar in bars]
    assert all(layer["encoding"]["y"]["sort"] == ranked for layer in spec["layer"])


def attention(*tokens: str) -> Result:
    """Two heads on a prompt of a stranger's tokens, by a model whose name is the first one."""
    n = len(tokens)
    pattern = torch.tril(torch.ones(2, n, n)).numpy() / np.arange(1, n + 1)[:, None]
    pattern[1] *= 0.5
    words_ = {f"{axis}_token": (axis, np.array(tokens, dtype=object)) for axis in ("query", "key")}
    axes = {"node": ["L0H0", "L1H0"], "query": range(n), "key": range(n), **words_}
    data = xr.Dataset({"pattern": quantity(("node", "query", "key"), pattern, "1", tokens[0])}, axes)
    return build("of tomorrow", data, {}, {"name": tokens[0]}, {})


def test_queries_and_keys_are_drawn_as_attention() -> None:
    result = attention("cat", "cat", "cat")
    for writer, factor in ((None, 1.0), ("L1H0", 0.5)):
        shown = {(cell["y"], cell["x"]): cell["value"] for cell in cells(result.figure(writer=writer))}
        assert shown["2 cat", "1 cat"] == pytest.approx(factor / 3)
        assert shown["0 cat", "2 cat"] == 0


@pytest.mark.promise("hostile")
def test_tokens_of_strangers_are_labels_and_nothing_else(tmp_path: Path) -> None:
    harmless = (r"$\frac{x}{0}$", "datum.value", "‹b>", "^_x^")
    texts = (HOSTILE.replace("\ud800", ""), "x\ny", *harmless)
    charts = [attention(*tokens).figure() for tokens in (["cat"] * len(texts), texts)]
    charts[1].to_dict()  # checked by the schema
    pages = [save(chart, tmp_path / f"{i}.html").read_text("utf-8") for i, chart in enumerate(charts)]
    assert Page(pages[0]).tags == Page(pages[1]).tags
    svg = save(charts[1], tmp_path / "x.svg").read_text("utf-8")
    parsed = ElementTree.fromstring(svg)
    assert {element.tag.partition("}")[2].lower() for element in parsed.iter()} <= SVG
    assert not {"\x1b", "\u202e"} & {*svg}
    shown = {element.text for element in parsed.iter()}
    assert {f"{i} {text}" for i, text in enumerate(harmless, start=2)} <= shown


@pytest.mark.promise("errors")
@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("matrix", {}, "no variable of two axes of nodes"),
        ("attention", {}, "no such attention"),
        ("attention", {"of": "x"}, "no such attention"),
        ("heatmap", {"of": "y"}, "no such variable"),
        ("heatmap", {"writer": "L0H0"}, "is not of one writer"),
        ("heatmap", {"pair": 3}, "no such axis"),
        ("bars", {"node": "MLP0"}, "is one number"),
        ("matrix", {"of": "x", "node": "MLP0"}, "is no matrix"),
        ("fig1", {"of": "x"}, "variables of its own"),
        ("levels", {"pair": 0}, "variables of its own"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(name: str, settings: dict, says: str) -> None:
    with pytest.raises(ResultError, match=says):
        made(x=(("node",), np.ones(7))).figure(name, **settings)
