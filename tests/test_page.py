"""Does the page of an audit work in a real browser, without one, of a large model, and with hostile text in it?"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import tiny
import unwrite as uw
from test_report import HOSTILE, OWN, SVG, Page
from unwrite.errors import ResultError
from unwrite.model.load import view
from unwrite.report import events, page, terminal
from unwrite.report.audited import verified
from unwrite.report.figures import save
from unwrite.report.pictures import picture
from unwrite.report.views import alerts, words
from unwrite.result import Result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
METHODS = ("scan", "verify", "dla", "audit", "adversarial", "corpus_dla")


@pytest.fixture(scope="module")
def every() -> dict[str, uw.Result]:
    """Name of a method -> its result: an audit, and those that it was made of."""
    heard: list[Any] = []
    lm = view(tiny.model("gpt2", 3))
    ids = torch.randint(lm.vocabulary, (12, 16), generator=torch.Generator().manual_seed(1))
    whole = uw.audit(lm, ids, most=2, listener=heard.append)
    return {part.method: part for part in (*(step.result for step in heard if step.result is not None), whole)}


@pytest.fixture(scope="module")
def audited(every) -> uw.Result:
    return every["audit"]


@pytest.fixture(scope="module")
def source(audited) -> str:
    return page.page(audited)


def poisoned(result: uw.Result) -> uw.Result:
    """The same with hostile text wherever a model, a text or a token could have brought it."""
    # xarray holds no lone surrogates; they come through names.
    data, record, text = result.data.copy(), result.provenance, '=HYPERLINK("x")' + HOSTILE.replace("\ud800", "")
    for name in {"prompt_text", "answer", "against", "strip_token", "found_answer", "prompt_kind"} & set(data):
        data[name] = (data[name].dims, np.full(data[name].shape, text, dtype=object))
    record["model"]["name"] = record["model"]["family"] = HOSTILE
    for read in (*record["tokens"].values(), record["settings"].get("judged", {})):
        read["source"] = HOSTILE
    return Result(data.assign_attrs(provenance=json.dumps(record), verdict=text))


@pytest.fixture(scope="module")
def hostile(audited) -> uw.Result:
    return poisoned(audited)


@pytest.fixture(scope="module")
def large(audited) -> uw.Result:
    """An audit as large as that of Llama-3.1-8B (1,057 nodes, 65 states) on long prompts: the small one, stretched."""
    layers, data, record = range(32), audited.data, audited.provenance
    nodes = ["embed", *(f"L{i}H{head}" for i in layers for head in range(32)), *(f"MLP{i}" for i in layers)]
    states = ["resid_pre0", *(f"resid_{kind}{i}" for i in layers for kind in ("mid", "post"))]
    longer = {"writer": nodes, "node": nodes, "verified": nodes[1:7], "location": states}
    longer |= {"group": [f"L{i}.heads" for i in layers]}
    longer |= {"prompt": range(20), "place": range(32), "position": range(64), "point": range(2000)}
    for axis, names in longer.items():
        # What there was keeps its name, since other things are called by it; all of it is repeated.
        known = list(data[axis].values) if axis in data.coords else []
        every = [*known, *(name for name in names if name not in known)][: max(len(names), len(known))]
        data = data.isel({axis: np.arange(len(every)) * data.sizes[axis] // len(every)}).assign_coords({axis: every})
    record["model"] |= {"layers": 32, "heads": 32}
    return Result(data.assign_attrs(provenance=json.dumps(record)))


@pytest.mark.promise("offline")
def test_the_only_script_is_the_one_that_the_policy_names(source) -> None:
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", source, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source
    assert "default-src 'none'" in source


@pytest.mark.promise("offline")
def test_every_verified_writer_is_there_without_a_script(audited, source) -> None:
    text = Page(source).text
    for writer in audited["verified"].values:
        one = audited.data.sel(verified=writer)
        assert f"{writer}: {one['verdict'].item()}" in text
        assert f"{float(one['survival'][-1]):.2f} ± {float(one['survival_se'][-1]):.2f}" in text
        assert f'id="{writer}"' in source
    for prompt in range(audited.data.sizes["prompt"]):
        assert f"{float(audited['total'][prompt, 3]):+.3f}" in text
    assert source.count("<svg") == source.count('role="img"') >= 4 * audited.data.sizes["verified"]


def test_numbers_say_on_hover_how_they_came_about(audited, source) -> None:
    hovered = {html.unescape(says) for says in re.findall(r'title="([^"]*)"', source)}
    for name in ("level", "survival", "share", "v_share", "total", "trust"):
        assert any(audited[name].attrs["equation"] in says for says in hovered), name
    writer = str(audited["writer"].values[int(audited["material"].values.argmax())])
    n, low, high = (
        int(audited["n_positions"].sel(writer=writer)),
        *audited["level"].isel(location=-1).sel(writer=writer, quantile=[0.25, 0.75]).values,
    )
    assert {f"{n} positions of 6 independent prompts", f"{low:.2f} to {high:.2f}"} <= hovered


def test_every_mark_of_a_picture_says_on_hover_what_it_is(audited) -> None:
    proof = next(verified(audited))
    drawn = ElementTree.fromstring(picture(audited.figure("fig1", proof.attrs["writer"])).svg)
    marks = {title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")}
    for place in audited["location"].values:
        low, middle, high = proof["level"].sel(condition="clean", location=place, quantile=[0.25, 0.5, 0.75]).values
        assert f"level, {place}: {middle:+.2f}, middle half of positions {low:+.2f} to {high:+.2f}" in marks
    end = proof.isel(location=-1)
    assert f"survival, {place}: {float(end['survival']):+.2f} ± {float(end['survival_se']):.2f}" in marks
    assert {
        name for element in drawn.iter() for name in element.attrib if name == "role" or name[:4] == "aria"
    } == set()


def test_tokens_are_coloured_by_their_level(audited, source) -> None:
    writer = audited["verified"].values[0]
    one = audited.data.sel(verified=writer, example=0.5)
    level, survival = float(one["strip_level"][5]), float(one["strip_survival"][5])
    assert f"level {level:+.2f}, survival {survival:+.2f}" in source
    assert "not counted" in source  # the first position


def test_a_page_is_small_and_the_same_again(audited, source, tmp_path) -> None:
    assert len(source.encode()) < 3 * 2**20
    audited.save(tmp_path)
    again = page.page(uw.read(tmp_path))
    strip = lambda text: re.sub(r"base64,[^\"]*|clip\d+|gradient_\d+", "", text)  # noqa: E731
    assert strip(again) == strip(source)


@pytest.mark.promise("no-torch")
def test_a_page_is_made_where_torch_is_not_installed(audited, tmp_path) -> None:
    audited.save(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import unwrite as uw; from unwrite.report import page\n"
        f"print(len(page.page(uw.read({str(tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10_000


@pytest.fixture(scope="module")
def hostile_source(hostile) -> str:
    return page.page(hostile)


@pytest.mark.promise("hostile")
def test_hostile_text_is_text(hostile_source) -> None:
    made = hostile_source
    parsed = Page(made)
    assert set(parsed.tags) <= OWN
    assert parsed.tags.count("script") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on") and name != "on"]
    for sign in ("\x1b", "\u202e", "<img", "<script>alert"):
        assert sign not in made
    made.encode("utf-8")


@pytest.fixture(scope="module")
def large_source(large) -> tuple[str, float]:
    """Its page, and how many seconds it took to draw."""
    began = time.perf_counter()
    return page.page(large), time.perf_counter() - began


def test_a_large_model_is_shown_by_its_foremost_writers_and_the_page_says_so(large, large_source) -> None:
    made, _ = large_source
    assert len(made.encode()) < 3 * 2**20
    (where,) = re.findall(r'<section id="where">.*?</section>', made, re.DOTALL)
    (left,) = re.findall(r"(\d+) more writers", where)
    assert where.count('<th scope="row"') + int(left) == int(large["material"].sum())
    assert f"top 40 of {large.data.sizes['node'] - 1} nodes" in made


@pytest.mark.promise("hostile")
@pytest.mark.parametrize("method", METHODS)
def test_hostile_text_reaches_no_terminal_no_program_and_no_spreadsheet(every, method, capsys, tmp_path) -> None:
    worse, screen = poisoned(every[method]), terminal.console()
    with screen.capture() as seen:
        terminal.show(worse, screen)
    events.say("part", **events.found(worse))
    (event,) = capsys.readouterr().out.splitlines()
    assert json.loads(event)["method"] == method
    assert not {"\x1b", "\u202e", "\ud800"} & {*seen.get(), *event}
    with worse.save_table(tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        cells = {cell for row in csv.reader(file) for cell in row}
    assert not [cell for cell in cells if cell.startswith(("=", "@", "\t")) or {"\x1b", "\u202e"} & set(cell)]


@pytest.mark.parametrize("method", METHODS)
def test_a_notebook_shows_a_card(every, method) -> None:
    result = every[method]
    parsed = Page(result._repr_html_())
    assert "".join(words(result).split()) in "".join(parsed.text.split())
    assert result.provenance["model"]["family"] in parsed.text
    assert parsed.tags.count("svg") == 1
    assert parsed.tags.count("tr") <= 6
    assert f"{len(alerts(result))} alert" in parsed.text.replace("No alerts", "0 alerts")
    assert not {"script", "link", "img", "iframe", "html"} & set(parsed.tags)
    worse = poisoned(result)._repr_html_()
    assert set(Page(worse).tags) <= {*parsed.tags, "i"}
    assert not [name for name, _ in Page(worse).attributes if name.startswith("on") or name in ("src", "href")]
    assert not {"\x1b", "\u202e", "\ud800"} & set(worse)
    assert len(worse.encode()) < 2**18


def test_a_notebook_shows_a_card_of_a_method_that_has_no_words_of_its_own(every) -> None:
    scan = every["scan"]
    record = scan.provenance | {"method": "of tomorrow"}
    parsed = Page(Result(scan.data.assign_attrs(provenance=json.dumps(record)))._repr_html_())
    assert "of tomorrow" in parsed.text
    assert str(scan.table()["writer"].iloc[0]) in parsed.text


@pytest.mark.parametrize("name", [None, "levels", "fig1", "fig2", "fig3", "fig4", "fig5", "positions"])
def test_figures_are_valid_and_export_without_a_browser(audited, name, tmp_path) -> None:
    chart = audited.figure(name)
    chart.to_dict()
    chart.save(str(tmp_path / "x.svg"))
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    if name == "fig1":
        for kind, sign in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
            chart.save(str(tmp_path / f"x.{kind}"))
            assert (tmp_path / f"x.{kind}").read_bytes().startswith(sign)


@pytest.mark.promise("hostile")
@pytest.mark.parametrize("name", ["levels", "fig4"])
def test_hostile_text_in_a_figure_is_text(audited, hostile, name, tmp_path) -> None:
    pages = [
        save(one.figure(name), tmp_path / f"{i}.html").read_text("utf-8") for i, one in enumerate((audited, hostile))
    ]
    clean, drawn = (Page(made) for made in pages)
    assert drawn.tags == clean.tags
    assert "alert(1)" in pages[1]
    svg = save(hostile.figure(name), tmp_path / "x.svg").read_text("utf-8")
    assert {element.tag.partition("}")[2].lower() for element in ElementTree.fromstring(svg).iter()} <= SVG
    assert not {"\x1b", "\u202e", "\ud800"} & {*svg, *pages[1].partition("</head>")[2]}
    assert save(hostile.figure(name), tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


def test_figure_1_draws_the_quantiles_survival_and_generic(audited) -> None:
    writer = str(audited["verified"].values[0])
    one = audited.data.sel(verified=writer)
    spec = audited.figure("fig1", writer).to_dict()
    rows = [row for part in spec["datasets"].values() for row in part]
    for place in audited["location"].values:
        level = one["verified_level"].sel(location=place, condition="clean")
        (drawn,) = [row for row in rows if row.get("location") == place and row.get("what") == "level"]
        for quantile, side in ((0.25, "low"), (0.5, "middle"), (0.75, "high")):
            assert drawn[side] == pytest.approx(float(level.sel(quantile=quantile)))
        kept = [row["middle"] for row in rows if row.get("location") == place and row.get("what") == "survival"]
        expected = float(one["survival"].sel(location=place))
        assert kept == ([] if np.isnan(expected) else [pytest.approx(expected)])


def test_figure_5_draws_what_the_corpus_kept(audited) -> None:
    rows = max(audited.figure("fig5").to_dict()["datasets"].values(), key=len)
    assert [row["x"] for row in rows] == pytest.approx(list(audited["corpus_sample_x"].values))
    assert [row["y"] for row in rows] == pytest.approx(list(audited["corpus_sample_y"].sel(path="values").values))


@pytest.mark.parametrize(
    ("name", "writer", "says"),
    [("fig9", None, "no such figure"), ("fig1", "L9H9", "nothing of L9H9"), ("fig5", "L9H9", "nothing of L9H9"),
     ("fig4", "L9H9", "nothing of L9H9"), ("levels", "L0H1", "map of levels is of all writers")],
)  # fmt: skip
def test_a_figure_that_cannot_be_drawn_says_why(audited, name, writer, says) -> None:
    with pytest.raises(ResultError, match=says):
        audited.figure(name, writer)


def test_a_scan_has_no_causal_figure() -> None:
    scan = uw.scan(view(tiny.model("gpt2", 3)), torch.arange(32).reshape(4, 8))
    assert scan.figure("fig2").to_dict()
    for name, says in (("fig3", "was not verified"), ("fig4", "has no attributions"), ("positions", "not verified")):
        with pytest.raises(ResultError, match=says):
            scan.figure(name)


def test_alerts_name_what_should_make_careful(audited) -> None:
    kinds = {alert.kind: alert.words for alert in alerts(audited)}
    assert "6 independent prompts" in kinds["sample"]
    record = audited.provenance
    record["model"]["certificate"]["heads"] = 0.5 * record["model"]["certificate_limit"]
    worse = Result(audited.data.assign_attrs(provenance=json.dumps(record)))
    assert "identity “heads”" in {alert.kind: alert.words for alert in alerts(worse)}["precision"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Seen:
    """A page opened from a file, with everything that it asked of the network and said to the console."""

    def __init__(self, browser: Any, source: str, folder: Path, fragment: str = "", **settings: Any):
        file = folder / "report.html"
        file.write_text(source, encoding="utf-8")
        self.page = browser.new_context(offline=True, **settings).new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(f"{file.as_uri()}{fragment}")

    def shown(self) -> set[str]:
        """Of which writers is anything visible?"""
        return set(
            self.page.eval_on_selector_all(
                "[data-writer]", "all => all.filter(x => x.checkVisibility()).map(x => x.dataset.writer)"
            )
        )


@pytest.mark.promise("offline")
def test_a_click_a_key_a_choice_and_a_link_move_all_panels(audited, source, browser, tmp_path) -> None:
    order = np.argsort(audited["gap"].isel(location=-1).values)
    first, second = (str(name) for name in audited["verified"].values[order][:2])
    seen = Seen(browser, source, tmp_path)
    assert seen.shown() == {first}
    seen.page.click(f'a[data-pick="{second}"]')
    assert seen.shown() == {second}
    assert seen.page.url.endswith(f"#{second}")
    assert seen.page.input_value("#choice") == second
    seen.page.select_option("#choice", first)
    assert seen.shown() == {first}
    order = seen.page.eval_on_selector_all("a[data-pick]", "all => all.map(x => x.dataset.pick)")
    seen.page.focus(f'a[data-pick="{order[0]}"]')
    seen.page.keyboard.press("ArrowDown")
    assert seen.shown() == {order[1]}
    panels = seen.page.eval_on_selector_all(f'[data-writer="{second}"]', "all => all.map(x => x.closest('section').id)")
    assert {"one", "who", "causal", "attribution", "positions", "show"} <= set(panels)
    linked = Seen(browser, source, tmp_path, f"#{second}")
    assert linked.shown() == {second}
    assert Seen(browser, source, tmp_path, "#nobody").shown() == {first}
    assert seen.said == linked.said == []
    assert [url for url in seen.asked if not url.startswith("file:")] == []
    assert len(seen.asked) == 1


@pytest.mark.promise("offline")
def test_everything_is_drawn_at_load_and_readable_without_a_script(audited, source, browser, tmp_path) -> None:
    plain = Seen(browser, source, tmp_path, java_script_enabled=False)
    sizes = plain.page.locator("figure svg").all()
    assert len(sizes) == source.count("<svg")
    assert all(box.bounding_box()["width"] > 100 for box in sizes)
    assert plain.page.locator("#choice").is_visible() is False


@pytest.mark.parametrize("width", [400, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_out_of_the_page(source, browser, tmp_path, width, scheme) -> None:
    seen = Seen(browser, source, tmp_path, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = seen.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] < light[1]) == (scheme == "light")


@pytest.mark.promise("hostile")
def test_hostile_text_does_nothing_in_a_browser(hostile_source, browser, tmp_path) -> None:
    seen = Seen(browser, hostile_source, tmp_path)
    seen.page.wait_for_timeout(200)
    assert seen.said == []
    assert len(seen.asked) == 1
    assert seen.page.locator("img").count() == 0


def test_a_large_page_opens(large, large_source, browser, tmp_path, record_property) -> None:
    made, seconds = large_source
    seen = Seen(browser, made, tmp_path)
    assert len(seen.shown()) == 1
    assert seen.said == []
    loaded = seen.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    size, n = len(made.encode()) / 2**20, large.data.sizes["node"]
    words = f"the page of an audit of {n:,} nodes: {size:.2f} MiB, drawn in {seconds:.1f} s, open after {loaded:.0f} ms"
    record_property("measured", words)
