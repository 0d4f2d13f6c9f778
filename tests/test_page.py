"""Does the page of an audit work in a real browser, without one, of a large model, and with hostile text in it?"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import html
import io
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
from test_report import HOSTILE, OWN, SVG, Page, carried
from unwrite.errors import ResultError
from unwrite.model.load import view
from unwrite.report import events, page, terminal
from unwrite.report.audited import removed, verified
from unwrite.report.believed import READINGS
from unwrite.report.figures import save
from unwrite.report.pictures import picture, scatters
from unwrite.report.survived import number
from unwrite.report.views import alerts, words
from unwrite.result import Result
from unwrite.stats.verdicts import WORDS

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


def banded(given: list[list[int]]) -> list[list[int]]:
    """Low, middle and high, of which a page holds steps, and how far the ends are from the middle."""
    below, middle, above = (np.cumsum(row).tolist() for row in given)
    ends = zip(below, middle, above, strict=True)
    return [list(row) for row in zip(*((m - b, m, m + a) for b, m, a in ends), strict=True)]


@pytest.fixture(scope="module")
def hostile(audited) -> uw.Result:
    return poisoned(audited)


@pytest.fixture(scope="module")
def large(audited) -> uw.Result:
    """An audit as large as that of Llama-3.1-8B (1,058 nodes, 65 states) on long prompts: the small one, repeated."""
    layers, data, record = range(32), audited.data, audited.provenance
    inner = [name for i in layers for name in (*(f"L{i}H{head}" for head in range(32)), f"MLP{i}")]
    states = ["resid_pre0", *(f"resid_{kind}{i}" for i in layers for kind in ("mid", "post"))]
    own = [str(name) for name in data["verified"].values]
    longer = {"writer": ["embed", "pos_embed", *inner], "removed": ["pos_embed", *inner], "location": states}
    longer |= {"verified": own, "group": ["heads", "mlps", *(f"L{i}.heads" for i in layers)]}
    longer |= {"node": longer["writer"], "prompt": range(20), "place": range(32), "position": range(64)}
    longer |= {"point": range(2000)}
    for axis, names in longer.items():
        known = data[axis].values.tolist() if axis in data.coords else range(data.sizes[axis])
        # What is there by this name stays, and the rest is repeated.
        taken = [known.index(name) if name in known else i % len(known) for i, name in enumerate(names)]
        data = data.isel({axis: taken}).assign_coords({axis: list(names)})
    record["model"] |= {"layers": 32, "heads": 32}
    return Result(data.assign_attrs(provenance=json.dumps(record)))


@pytest.mark.promise("offline")
def test_the_only_script_and_style_are_those_that_the_policy_names(source) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', source)
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "style=" not in re.sub(r"<(script|style).*?</\1>", "", source, flags=re.DOTALL)


@pytest.mark.promise("offline")
def test_picture_table_and_verified_writers_are_there_without_a_script(audited, source) -> None:
    parsed = Page(source)
    text, left = parsed.text, removed(audited)
    for one in (left.isel(writer=i) for i in range(left.sizes["writer"])):
        name, end, verdict = str(one["writer"].item()), float(one["end"]), str(one["verdict"].item())
        (cell,) = re.findall(
            rf'<td id="{re.escape(name)}"[^>]*class="(\w+)[^"]*" title="([^"]*)"><span>([^<]*)', source
        )
        steps = round(10 * min(1, abs(end)))
        assert cell == (f"{'d' if steps and end < 0 else 'u'}{steps}", f"{name}: {verdict}", f"{end:.2f}")
        assert f"{number(end)} [{number(float(one['end_low']))}, {number(float(one['end_high']))}]" in text
    for writer in audited["verified"].values:
        one = audited.data.sel(verified=writer)
        assert f"{writer}: {one['verdict'].item()}" in text
        assert f"{float(one['survival'][-1]):.2f} ± {float(one['survival_se'][-1]):.2f}" in text
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(map(str, audited["node"].values)) <= set(ids)
    assert source.count("<svg") == source.count('role="img"') >= 4


def test_the_script_is_given_the_numbers_of_the_result(audited, source) -> None:
    data, given = audited.data, carried(source)
    assert given["nodes"] == data["node"].values.tolist()
    for measure in given["measures"]:
        assert len(measure["values"]) == len(given["nodes"])
    by_name = {
        measure["name"]: dict(zip(given["nodes"], measure["values"], strict=True)) for measure in given["measures"]
    }
    left = removed(audited)
    same = functools.partial(pytest.approx, abs=0.0051)  # what has two digits
    places = data["location"].values.tolist()
    for i, name in enumerate(left["writer"].values.tolist()):
        one, own = left.isel(writer=i), given["writers"][name]
        assert by_name["survival"][name] == pytest.approx(float(one["end"]), rel=0.006)
        for row, end in zip(banded(own["kept"]), ("_low", "", "_high"), strict=True):
            expected = one[f"survival{end}"].isel(weigh=0).values[own["begin"] :]
            assert [value / 100 for value in row] == same(expected)
        assert not np.isfinite(one["survival"].isel(weigh=0).values[: own["begin"]]).any()
        assert own["begin"] == places.index(str(data["right_after"].sel(writer=name).item()))
        acts = one["acts"].values
        largest = np.sort(np.abs(acts[np.abs(acts) >= 0.005]))[::-1]
        assert [abs(row[0]) / 100 for row in own["acts"]["rows"]] == same(largest[:8])
        assert [acts[k] for k in own["acts"]["nodes"]] == same([row[0] / 100 for row in own["acts"]["rows"]])
        total = sum(row[0] for row in own["acts"]["rows"]) + own["acts"]["sum"]
        assert total / 100 == pytest.approx(np.nansum(acts), abs=0.05)
    for name in given["nodes"]:
        own = given["writers"][name]
        for reading, row in zip((*READINGS, "total"), own["given"], strict=True):
            assert [value / 100 for value in row] == same(data[reading].sel(node=name).values)
            assert by_name[next(key for key in by_name if key.startswith(reading))][name] == pytest.approx(
                float(data[reading].sel(node=name).mean()), rel=0.006
            )
        middle = data["level"].sel(writer=name, quantile=0.5).values[own["from"] :]
        assert [value / 100 for value in banded(own["level"])[1]] == same(np.clip(middle, -100, 100))


def test_a_scatter_has_a_dot_for_every_cell(audited) -> None:
    data = audited.data
    for one in scatters(data):
        x, y = (np.clip(data[name].values / one.limit, -1, 1) for name in (one.name, "total"))
        dots = {tuple(map(int, dot)) for _, path in one.paths for dot in re.findall(r"M(\d+) (\d+)h0", path)}
        assert dots == {
            (120 + round(112 * a), 120 + round(-112 * b))
            for a, b in zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)
        }
        beyond = (np.maximum(np.abs(data[one.name]), np.abs(data["total"])) > one.limit).sum()
        assert (one.cells, one.beyond) == (data["total"].size, int(beyond))


def test_every_word_of_a_verdict_is_explained(source) -> None:
    (words,) = re.findall(r'<dl id="words">(.*?)</dl>', source, re.DOTALL)
    assert {*re.findall(r"<dt>(.*?)</dt>", words)} == {*WORDS, "not taken out"}


def test_numbers_say_on_hover_how_they_came_about(audited, source) -> None:
    hovered = {html.unescape(says) for says in re.findall(r'title="([^"]*)"', source)}
    for name in (
        "removed_end",
        "removed_gap",
        "removed_acts",
        "survival",
        "v_share",
        "total",
        "trust",
        "relative_norm",
    ):
        assert any(audited[name].attrs["equation"] in says for says in hovered), name
    writer = str(audited["writer"].values[int(audited["material"].values.argmax())])
    n = int(audited["n_positions"].sel(writer=writer))
    assert f"{n} positions of 6 independent prompts" in hovered


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
    strip = lambda text: re.sub(r"clip\d+|gradient_\d+", "", text)  # noqa: E731
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
    assert parsed.tags.count("script") == 2
    assert not [name for name, _ in parsed.attributes if name.startswith("on") and name != "on"]
    assert HOSTILE[:30] in " ".join(carried(made)["prompts"])
    for sign in ("\x1b", "\u202e", "<img", "<script>alert"):
        assert sign not in made
    made.encode("utf-8")


@pytest.fixture(scope="module")
def large_source(large) -> tuple[str, float]:
    """Its page, and how many seconds it took to draw."""
    began = time.process_time()
    return page.page(large), time.process_time() - began


def test_a_large_model_fits_into_a_page(large, large_source) -> None:
    made, _ = large_source
    assert len(made.encode()) < 3_000_000
    assert made.count("<td id=") == large.data.sizes["node"]
    assert made.count("data-kind=") == large.data.sizes["node"] + len({*map(str, removed(large)["verdict"].values)}) + 1


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
    """One page of a browser without network: what it shows, what it asked for, and what it said to the console."""

    def __init__(self, browser: Any, folder: Path, **settings: Any):
        self.page = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}, **settings).new_page()
        self.folder, self.asked, self.said = folder, [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def open(self, source: str, fragment: str = "") -> Seen:
        file = self.folder / "report.html"
        file.write_text(source, encoding="utf-8")
        self.page.goto("about:blank")
        self.asked.clear()
        self.said.clear()
        self.page.goto(f"{file.as_uri()}{fragment}")
        return self

    def chosen(self) -> str:
        """The writer that all panels say they show."""
        (cell,) = self.page.eval_on_selector_all("#picture [aria-selected=true]", "all => all.map(x => x.id)")
        assert self.page.inner_text("#who").partition(":")[0] == cell
        assert self.page.eval_on_selector_all("#picture td[tabindex='0']", "all => all.map(x => x.id)") == [cell]
        return cell

    def listed(self) -> list[str]:
        """The writers in the table, from the first to the last that is shown."""
        return self.page.eval_on_selector_all("#writers tbody th", "all => all.map(x => x.textContent)")


@pytest.fixture(scope="module")
def seen(browser, tmp_path_factory) -> Seen:
    return Seen(browser, tmp_path_factory.mktemp("page"))


@pytest.mark.promise("offline")
def test_a_click_a_key_and_a_link_choose_a_writer(audited, source, seen) -> None:
    seen.open(source)
    assert seen.chosen() == seen.listed()[0]
    seen.page.click("#L1H0")
    assert seen.chosen() == "L1H0"
    assert seen.page.url.endswith("#L1H0")
    way = ["ArrowRight", "ArrowUp", "ArrowLeft", "End", "ArrowDown", "Home", "Control+Home", "ArrowDown", "ArrowUp"]
    assert [seen.page.keyboard.press(key) or seen.chosen() for key in way] == [
        "L1H1", "L0H1", "L0H0", "MLP0", "MLP1", "L1H0", "embed", "pos_embed", "embed",
    ]  # fmt: skip
    seen.page.keyboard.press("ArrowUp")
    assert seen.chosen() == "embed"
    link = seen.page.locator("#writers tbody a").nth(1)
    name = link.inner_text()
    link.click()
    assert seen.chosen() == name
    assert [url for url in seen.asked if not url.startswith("file:")] == []
    assert len(seen.asked) == 1
    assert seen.open(source, "#L1H1").chosen() == "L1H1"
    assert seen.open(source, "#%F0%28").chosen() == seen.listed()[0]
    assert seen.said == []


def test_the_panel_says_what_was_measured(audited, source, seen) -> None:
    left = removed(audited)
    one = left.isel(writer=0)
    name = str(one["writer"].item())
    seen.open(source, f"#{name}")
    assert seen.page.inner_text("#who") == f"{name}: {one['verdict'].item()}"
    said = {
        title.strip() for title in seen.page.eval_on_selector_all("#way title", "all => all.map(x => x.textContent)")
    }
    for place in left["location"].values[-2:]:
        low, value, high = (
            float(one[f"survival{end}"].isel(weigh=0).sel(location=place)) for end in ("_low", "", "_high")
        )
        assert f"survival, {place}: {value:.2f} [{low:.2f}, {high:.2f}]" in said
    low, value, high = (float(one["ordinary"].isel(control=0).sel(bound=bound)) for bound in ("low", "median", "high"))
    assert f"ordinary writes (typical): {value:.2f} [{low:.2f}, {high:.2f}]" in said
    first = seen.page.inner_text("#acts tr:first-child")
    strongest = int(np.nanargmax(np.abs(one["acts"].values)))
    assert first.split()[:2] == [str(left["node"].values[strongest]), f"{float(one['acts'][strongest]):+.2f}"]
    total = audited["total"].sel(node=name).values
    shown = seen.page.eval_on_selector_all("#gives td:last-child", "all => all.map(x => Number(x.textContent))")
    assert all(np.abs(total - value).min() < 0.0051 for value in shown)
    verified = str(audited["verified"].values[0])
    seen.page.click(f"#{verified}")
    assert seen.page.locator("#text .strip span").count() > 5
    assert not seen.page.locator("#panel :text('NaN'), #panel :text('undefined'), #panel :text('Infinity')").count()
    assert seen.said == []


def test_the_picture_shows_what_is_asked_for(audited, source, seen) -> None:
    seen.open(source)
    names = [one["name"] for one in carried(source)["measures"]]
    for name in names:
        seen.page.select_option("#measure", label=name)
        assert seen.page.inner_text("#says").startswith(name)
    seen.page.select_option(
        "#measure", label="total, executed, mean of 12 prompts".replace("12", str(audited.data.sizes["prompt"]))
    )
    shown = dict(seen.page.eval_on_selector_all("#picture td[id]", "all => all.map(x => [x.id, x.textContent])"))
    for name, text in shown.items():
        assert float(text) == pytest.approx(float(audited["total"].sel(node=name).mean()), abs=0.0051)
    assert seen.said == []


def test_the_table_is_searched_filtered_sorted_turned_and_saved(audited, source, seen) -> None:
    seen.open(source)
    every, left = audited.data.sizes["node"], removed(audited)
    assert len(seen.listed()) == min(20, every)
    seen.page.fill("#search", "mlp1")
    assert "MLP1" in seen.listed()
    assert all("mlp1" in row.lower() for row in seen.page.locator("#writers tbody tr").all_inner_texts())
    seen.page.fill("#search", "")
    word, names = "not taken out", {*map(str, audited["node"].values)} - {*map(str, left["writer"].values)}
    seen.page.click(f"#filters button[data-kind='{word}']")
    assert {*seen.listed()} == names
    seen.page.click(f"#filters button[data-kind='{word}']")
    for descending in (True, False):
        seen.page.click("#writers thead button:has-text('survives')")
        ordered = left["writer"].values[np.argsort(left["end"].values * (-1 if descending else 1), kind="stable")]
        assert seen.listed()[0] == str(ordered[0])
    with seen.page.expect_download() as saved:
        seen.page.click("#csv")
    rows = list(csv.DictReader(io.StringIO(Path(saved.value.path()).read_text("utf-8"))))
    assert len(rows) == every
    kept = {row["writer"]: row["survival"] for row in rows if row["survival"]}
    assert {name: float(value) for name, value in kept.items()} == pytest.approx(
        dict(zip(left["writer"].values.tolist(), left["end"].values.tolist(), strict=True)), rel=0.006
    )
    for row in rows:
        assert not [
            text for text in row.values() if text[:1] in "=@+" and text and not re.fullmatch(r"[+-]?[\d.e-]+", text)
        ]
    with seen.page.expect_download() as saved:
        seen.page.click("#json")
    whole = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert [one["writer"] for one in whole["writers"]] == [row["writer"] for row in rows]
    assert seen.said == []


@pytest.mark.promise("offline")
def test_everything_can_be_read_without_a_script(audited, source, browser, tmp_path) -> None:
    plain = Seen(browser, tmp_path, java_script_enabled=False).open(source).page
    assert plain.locator("#picture td[id]").count() == audited.data.sizes["node"]
    assert plain.locator("#picture").is_visible()
    assert plain.locator("#writers tbody tr").count() == audited.data.sizes["node"]
    assert all(row.is_visible() for row in plain.locator("#writers tbody tr").all()[:3])
    assert all(box.bounding_box()["width"] > 100 for box in plain.locator("#truth svg").all())
    assert not [one for one in plain.locator(".scripted-only").all() if one.is_visible()]


@pytest.mark.parametrize("width", [400, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_runs_out_of_the_page(source, seen, width, scheme) -> None:
    seen.open(source)
    seen.page.set_viewport_size({"width": width, "height": 900})
    seen.page.emulate_media(color_scheme=scheme)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = seen.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] < light[1]) == (scheme == "light")
    faults = accessible(seen.page) if (width, scheme) in ((400, "dark"), (1400, "light")) else []
    seen.page.set_viewport_size({"width": 1400, "height": 900})
    seen.page.emulate_media(color_scheme="light")
    assert faults == []


def accessible(page: Any) -> list[str]:
    """What axe-core finds serious or worse, by rule and element; nothing where it is not installed."""
    axe = pytest.importorskip("axe_playwright_python.base", reason="axe-playwright-python is not installed")
    page.evaluate(axe.AXE_SCRIPT)
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    return [f"{one['id']}: {node['html'][:120]}" for one in serious for node in one["nodes"]]


def test_a_page_is_printed(source, seen) -> None:
    seen.open(source)
    assert seen.page.pdf().startswith(b"%PDF")
    seen.page.emulate_media(media="print")
    assert not [one for one in seen.page.locator(".controls, nav").all() if one.is_visible()]
    assert seen.page.locator("#picture").is_visible()
    assert seen.page.locator("#panel").is_visible()
    seen.page.emulate_media(media="screen")


def test_the_page_of_a_scan_shows_levels_and_who_writes_against_a_write(every, seen) -> None:
    data = every["scan"].data
    seen.open(page.page(every["scan"]))
    seen.page.click("#L0H1")
    assert seen.page.inner_text("#acting").startswith("Who writes against it")
    middle = float(data["level"].sel(writer="L0H1", quantile=0.5).isel(location=-1))
    titles = seen.page.eval_on_selector_all("#way title", "all => all.map(x => x.textContent)")
    assert titles[-1].startswith(f"level, {data['location'].values[-1]}: {number(middle)} [")
    against = data["node"].values[data["eraser"].sel(writer="L0H1").values]
    assert seen.page.locator("#acts tr").count() == min(8, len(against))
    assert not seen.page.locator("#truth, #verified").count()
    assert seen.said == []


@pytest.mark.promise("hostile")
def test_hostile_text_does_nothing_in_a_browser(hostile_source, seen) -> None:
    seen.open(hostile_source)
    seen.page.click("#L1H0")
    seen.page.wait_for_timeout(100)
    assert seen.said == []
    assert len(seen.asked) == 1
    assert seen.page.locator("img").count() == 0
    assert "<script>alert(1)" in seen.page.inner_text("#gives")
    with pytest.raises(Exception, match="TrustedHTML"):
        seen.page.evaluate("document.body.innerHTML = '<b>x</b>'")


def test_a_large_page_opens(large, large_source, seen, record_property) -> None:
    made, seconds = large_source
    seen.open(made)
    assert seen.chosen()
    assert seen.said == []
    first = seen.listed()
    seen.page.click("#after")
    assert len({*seen.listed(), *first}) == 40
    loaded = seen.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    high = seen.page.evaluate("document.documentElement.scrollHeight")
    assert high <= 4000
    assert (
        max(seen.page.eval_on_selector_all("table:not(details table, #picture)", "all => all.map(x => x.rows.length)"))
        <= 41
    )
    size, n = len(made.encode()) / 2**20, large.data.sizes["node"]
    words = f"the page of an audit of {n:,} nodes: {size:.2f} MiB, {high} px, drawn in {seconds:.1f} s of one core"
    record_property("measured", f"{words}, open after {loaded:.0f} ms")
