"""Does the scan find what was planted and only that, and does the audit say so, of prompts that chose nothing?"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pydoc_data.topics import topics as documentation
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tiny
import unwrite as uw
from test_report import OWN, Page
from unwrite.errors import NumericError, TokensError, plain
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.view import Model
from unwrite.nodes import Node, parse_node
from unwrite.prompts.texts import windows
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.report import page, terminal
from unwrite.report.scanned import rows
from unwrite.run.loop.trial import Taken
from unwrite.run.tally.gram import GramTally
from unwrite.studies import plan
from unwrite.studies.audit import demonstration

# `unwrite.studies.audit` as an attribute of the package is what an import statement would find, too.
AUDIT = importlib.import_module("unwrite.studies.audit")

PROSE = (
    "It was the best of times, it was the worst of times; 1775 was the year, and all of it was told by a clerk. " * 60
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def found(request: pytest.FixtureRequest) -> tuple[uw.Result, object]:
    model = planted(request.param, dtype=torch.float64)
    lm = view(model.hf, model.tokenizer)
    return uw.scan(lm, windows(PROSE, model.tokenizer, n=12, length=128)), model


@pytest.mark.promise("planted")
def test_every_planted_share_is_measured(found) -> None:
    result, model = found
    for pair in model.pairs:
        share = float(result["share"].sel(writer=pair.writer, node=pair.eraser))
        assert share == pytest.approx(pair.share, abs=0.02), pair


@pytest.mark.promise("planted")
def test_planted_opponents_and_only_they_stand_out(found) -> None:
    result, model = found
    shown, _ = rows(result.data)
    named = {(row.writer, node) for row in shown for node in opposed_by(result, row.writer)}
    can_read = {pair for pair in model.pairs if ".bias" not in pair.eraser}
    assert named == {(pair.writer, pair.eraser) for pair in can_read if pair.share < -0.1}


def opposed_by(result: uw.Result, writer: str) -> list[str]:
    return str(result["opposed_by"].sel(writer=writer).item()).split()


def test_readings_follow_the_planted_levels(found) -> None:
    result, _ = found
    first = {str(w): str(result["in_words"].sel(writer=w).item()).split()[0] for w in result["writer"].values}
    assert first["L0H0"] == "reverses"
    assert first["L0H1"] == first["L0H2"] == first["L0H4"] == "falls"
    assert first["L0H3"] == first["L0H5"] == "level"


@pytest.mark.promise("erased")
def test_a_scan_never_says_erased_or_kept(found) -> None:
    result, _ = found
    said = " ".join(map(str, result["in_words"].values))
    assert "erased" not in said
    assert "kept" not in said


def test_several_texts_stand_side_by_side_and_disagree_where_they_do() -> None:
    lm = uw.load("default")
    texts = uw.text({"prose": PROSE, "digits": "0123456789" * 300}, lm.tokenizer, n=4, length=64)
    both = uw.scan(lm, texts)
    assert list(both["text"].values) == ["prose", "digits"]
    for name in texts:
        alone = uw.scan(lm, texts[name])
        xr.testing.assert_equal(both["level"].sel(text=name, drop=True), alone["level"])
    assert set(both.table()["text"]) == {"prose", "digits"}


def test_a_failed_audit_leaves_no_folder(tmp_path) -> None:
    lm = uw.load("default")
    with pytest.raises(uw.errors.TokensError):
        uw.audit(lm, np.array([[10**6, 1, 2]]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_demonstration_needs_no_file_and_names_its_text() -> None:
    lm = uw.load("default")
    tokens = demonstration(lm, n=3)
    assert lm.certificate.ok
    assert tokens.ids.shape == (3, 48)
    assert tokens.source == "Python's documentation topics and asyncio"
    shown = lm.tokenizer.batch_decode(tokens.ids)
    assert shown[0].startswith('<|bos|>"""Base implementation of event loop.')
    assert len(set(tokens.cluster)) == 3


@pytest.mark.parametrize(
    ("budget", "n", "length"), [(1e4, 96, 48), (200.0, 24, 48), (100.0, 12, 48), (70.0, 12, 32), (50.0, 12, 24)]
)
def test_an_audit_is_as_large_as_its_budget_allows_and_its_prompts_shorter_before_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, budget: float, n: int, length: int
) -> None:
    """Each prompt of a scan takes a third of a second a token, and nothing else takes any time."""
    names = ("survival", "verify", "steps", "dla", "dla found", "dla short")
    monkeypatch.setattr(plan, "material", lambda lm, tokens: 60)
    monkeypatch.setattr(
        plan,
        "stages",
        lambda lm, tokens, _: {name: Taken(0.0, 0.0) for name in names} | {"scan": Taken(0.0, tokens / 3)},
    )
    lm = uw.load("default")
    found = plan.planned(lm, lambda count, long: demonstration(lm, count, long), 48, budget)
    assert (found.n, found.length, found.writers) == (n, length, 60)
    assert found.total == pytest.approx(n / 2 * length / 3)
    with pytest.raises(NumericError, match="Expected: about 48 s for 12 prompts of 24 tokens"):
        plan.planned(lm, lambda count, long: demonstration(lm, count, long), 48, 10.0)


def test_doctor_measures_identities_memory_and_time() -> None:
    lm = uw.load("default")
    diagnosis = uw.doctor(lm, n=100, length=128)
    assert diagnosis.ok
    assert {check.name for check in diagnosis.checks} >= {f"identity {name}" for name in lm.certificate}
    row = next(check.found for check in diagnosis.checks if check.name == "row by hand")
    assert "write to one stream; heads (attn: values c_attn, out-projection c_proj) read ln_1; MLPs (mlp.c_proj)" in row
    assert diagnosis.memory > sum(parameter.nbytes for parameter in lm.hf.parameters())
    assert diagnosis.seconds > 0
    assert [need.stage for need in diagnosis.stages] == ["scan", "survival", "verify", "dla", "audit"]
    assert all(need.seconds > 0 and need.memory > 0 for need in diagnosis.stages)
    assert (diagnosis.stages[0].seconds, diagnosis.stages[0].memory) == (diagnosis.seconds, diagnosis.memory)
    assert uw.doctor(lm, n=100, length=10**6).length == lm.context


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def audited(request: pytest.FixtureRequest) -> tuple[uw.Result, Model, Tokens]:
    truth = planted(request.param, dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    tokens = windows(PROSE, truth.tokenizer, n=16, length=48)
    return uw.audit(lm, tokens), lm, tokens


def shown(result: uw.Result) -> str:
    """What a terminal shows, without its white space."""
    screen = terminal.console()
    with screen.capture() as seen:
        terminal.show(result, screen)
    return squeezed(seen.get())


def squeezed(text: str) -> str:
    return "".join(text.split())


def random_ids(lm: Model, prompts: int = 16, length: int = 9) -> np.ndarray:
    return torch.randint(lm.vocabulary, (prompts, length), generator=torch.Generator().manual_seed(1)).numpy()


@pytest.fixture(scope="module")
def known() -> dict[Any, uw.Result]:
    """What methods have said in this file."""
    return {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, known: dict[Any, uw.Result]) -> dict[str, list[Any]]:
    """Name of a method -> its arguments, in audits. Of one text it is run once, but for scans and given prompts."""
    seen: dict[str, list[Any]] = {
        name: [] for name in ("scan", "survival", "verify", "adversarial", "dla", "corpus_dla")
    }

    def ask(name: str, real: Any, *args: Any, **settings: Any) -> uw.Result:
        seen[name].append((args, settings))
        if name in ("scan", "dla"):
            return real(*args, **settings)
        if (name, args[1].hash) not in known:
            known[name, args[1].hash] = real(*args, **settings)
        return known[name, args[1].hash]

    for name in seen:
        monkeypatch.setattr(AUDIT, name, partial(ask, name, getattr(AUDIT, name)))
    return seen


def documents() -> tuple[Model, Tokens]:
    """A planted model, and windows of five documents."""
    truth = planted("gpt2")
    lm = view(truth.hf, truth.tokenizer, name="planted gpt2")
    text = "\n\n".join(documentation[name] for name in sorted(documentation))
    topics = windows(text, lm.tokenizer, n=12, length=32).named("Python's documentation topics")
    return lm, replace(topics, cluster=np.repeat([0, 1, 2, 3, 4], [4, 1, 3, 2, 2]))


@pytest.mark.promise("erased")
def test_prompts_that_chose_a_writer_never_judge_it(asked) -> None:
    """Two documents choose, three judge, and windows of one document stay together."""
    lm, tokens = documents()
    uw.audit(lm, tokens)
    choose, judge = tokens.take(range(5)), tokens.take(range(5, 12))
    assert [args[1].hash for args, _ in asked["scan"]] == [choose.hash]
    assert {tuple(row) for row in asked["survival"][0][0][1].ids.tolist()} <= {tuple(row) for row in judge.ids.tolist()}
    assert {args[1].hash for args, _ in asked["verify"]} == {judge.hash}
    assert [(args[1].hash, args[3].hash) for args, _ in asked["adversarial"]] == [(judge.hash, choose.hash)]
    assert [settings["texts"].hash for _, settings in asked["dla"]] == [judge.hash]
    assert [args[1].hash for args, _ in asked["corpus_dla"]] == [judge.hash]
    prompts = asked["dla"][0][0][1]
    own = {tuple(row[:n]) for row, n in zip(prompts.ids.tolist(), prompts.lengths, strict=True)}
    assert all(any(tuple(row[: len(one)]) == one for row in judge.ids.tolist()) for one in own)


@pytest.mark.parametrize("document", [[0, 1, 2], [0, 0, 0, 0, 1, 1, 2, 2]])
def test_fewer_than_four_independent_prompts_are_not_enough(document, tmp_path) -> None:
    lm = uw.load("default")
    tokens = Tokens(random_ids(lm, len(document)), np.full(len(document), 9), np.array(document))
    with pytest.raises(TokensError, match=r"3 independent prompts\. Expected: at least 4"):
        uw.audit(lm, tokens, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.promise("causal")
def test_an_audit_names_the_erased_writers_and_nobody_else(audited) -> None:
    result, _, _ = audited
    said = dict(zip(result["removed"].values.tolist(), result["removed_gap"].values.tolist(), strict=True))
    assert sorted(sorted(said, key=said.__getitem__)[:4]) == ["L0H0", "L0H1", "L0H2", "L0H3"]
    closely = dict(zip(result["verified"].values.tolist(), result["verdict"].values.tolist(), strict=True))
    planted = {w: "filled in" if w == "L0H3" else "erased" for w in ("L0H0", "L0H1", "L0H2", "L0H3")}
    lost = {writer: word for writer, word in closely.items() if word in ("erased", "filled in")}
    assert lost.items() <= planted.items()
    assert set(closely.values()) <= {*planted.values(), "like others"}
    assert len(closely) == 3
    assert "6 documents" in result.data.attrs["verdict"]
    for writer, erasers in (("L0H0", {"L1H0"}), ("L0H1", {"L1H1", "L1H2", "L1H3", "L1H4"}), ("L0H2", {"MLP1"})):
        acts = result["removed_acts"].sel(removed=writer).to_series()
        assert set(acts.index[acts < -0.1]) == erasers


def test_a_verification_in_an_audit_is_that_of_the_method(audited) -> None:
    result, lm, tokens = audited
    writer = str(result["verified"].values[0])
    taken, alone = set(result.data.data_vars), uw.verify(lm, tokens.take(range(8, 16)), writer).data
    one = result.data.sel(verified=writer)
    for name, part in alone.data_vars.items():
        mine = one[f"verified_{name}" if f"verified_{name}" in taken else name]
        np.testing.assert_array_equal(mine.values, part.values, err_msg=str(name))
        if part.dtype.kind in "fi":
            assert (mine.attrs["units"], mine.attrs["equation"]) == (part.attrs["units"], part.attrs["equation"])
    for name in ("verdict", "erasers", "readers", "read_note", "decodable_note", "causal_share_note"):
        assert one[name].item() == alone.attrs[name]


# Where a number may be missing; nowhere else.
BEFORE_THE_WRITE = {"survival", "survival_se", "generic", "gap", "gap_se", "v_survival"}
OF_HEADS = {"into_space", "space", "decodable"}
RATIOS = {"pr", "level", "change", "dilution", "norm", "relative_norm", "level_after", "level_end"}
SHARES = {"change_share", "change_share_se", "moved", "share", "share_se", "share_position", "share_token",
          "level_share", "level_share_se", "skipped_share"}  # fmt: skip
OF_READERS = {"read_generic", "one_reader_share", "one_reader_share_se"}


def may_be_missing(data: xr.Dataset, lm: Model, name: str) -> xr.DataArray:
    """Cells of a variable of an audit that have no number, for a reason."""
    verified, silent = data["verified"], (data["change_share"].isnull()).drop_vars("writer")
    nodes = [parse_node(writer) for writer in verified.values]
    if name.startswith(("removed_survival", "removed_rescaled")):
        writers = [parse_node(writer) for writer in data["removed"].values]
        early = [[not state.holds(node, lm.parallel) for state in lm.states] for node in writers]
        return xr.DataArray(early, dims=("removed", "location"))
    if name in BEFORE_THE_WRITE:
        early = [[not state.holds(node, lm.parallel) for state in lm.states] for node in nodes]
        return xr.DataArray(early, dims=("verified", "location"))
    if name.startswith(("strip_", "level_at", "survival_at")):  # the first position is not counted
        axis = "position" if name.startswith("strip_") else "place"
        return xr.DataArray(np.arange(data.sizes[axis]) == 0, dims=axis)
    if name == "attended_share":  # of nodes that look nowhere, of other prompts, and of rows with fewer keys
        return (data["attended_token"] == "").drop_vars("writer")
    if name in RATIOS:
        return (data["n_positions"] == 0).drop_vars("writer")
    if name in SHARES or name == "largest_norm":
        return silent
    if name in OF_READERS:
        able = [[is_reader(lm, node, e, name != "read_generic") for e in map(parse_node, lm.nodes)] for node in nodes]
        return ~xr.DataArray(able, dims=("verified", "node"))
    missing = xr.DataArray([name in OF_HEADS and node.kind != "head" for node in nodes], dims="verified")
    if name in ("read", "into_space"):
        return missing | silent.rename(writer="node")
    if name == "causal_share":
        return missing | (data["causal_share_note"] != "").drop_vars("verified")
    return missing | (data["direct"] == 0).drop_vars(["node", "prompt"]) if name == "invariance" else missing


def is_reader(lm: Model, writer: Node, node: Node, mlps_only: bool) -> bool:
    """Heads of later layers and MLPs after the writer; some numbers are of MLPs alone."""
    if node.kind == "head":
        return node.layer > writer.layer and not mlps_only
    beside = node.layer == writer.layer and writer.kind in ("head", "bias") and not lm.parallel
    return node.kind == "mlp" and (node.layer > writer.layer or beside)


def test_heads_say_from_where_they_bring_most_where_they_write_most(audited) -> None:
    result, lm, tokens = audited
    data, (first, _) = result.data, tokens.halves()
    looked = set()
    for node in map(str, data["writer"].values):
        one = data.sel(writer=node)
        assert bool(one["attended_text"] != "") == (parse_node(node).kind == "head")
        if not one["attended_text"].item():
            continue
        rank = one["largest_text"].values.tolist().index(one["attended_text"].item())
        prompt, place = (int(one[f"largest_{axis}"][rank]) for axis in ("prompt", "position"))
        brought = uw.attention(lm, first.take([prompt]), "value", [node])["weight"][0, 0, place].values[: place + 1]
        order = np.argsort(-brought, kind="stable")[:3]
        assert one["attended_share"].values[: len(order)] == pytest.approx(brought[order] / brought.sum())
        words = [lm.tokenizer.decode([int(first.ids[prompt, key])]) for key in order]
        assert one["attended_token"].values[: len(order)].tolist() == [plain(word) for word in words]
        looked.add(prompt)
    assert 1 <= len(looked) <= 8


def holes(result: uw.Result, lm: Model) -> list[str]:
    """Numeric variables of which a number is missing without a reason, or of which there is none."""
    found = []
    for name, part in result.data.data_vars.items():
        if part.dtype.kind == "f":
            there = np.isfinite(part.drop_vars(list(part.coords)))
            whole = bool((there | may_be_missing(result.data, lm, str(name))).all())
            found += [] if whole and (bool(there.any()) or name == "causal_share") else [str(name)]
    return found


def test_every_number_of_an_audit_is_there(audited) -> None:
    result, lm, _ = audited
    assert holes(result, lm) == []


WORDS = (
    "</td><script>alert({})</script>", "<img src=x onerror=alert({})>", "\x1b[2J\u202e{}", '=HYPERLINK("http://{}")',
    "&lt;{}\x07",
)  # fmt: skip


@pytest.fixture(scope="module")
def strange() -> tuple[uw.Result, Model, Tokens]:
    """Random weights, so few independent prompts that no interval excludes anything, and a malicious vocabulary."""
    hf = tiny.model("gpt2", 0)
    words = {WORDS[i % len(WORDS)].format(i): i for i in range(hf.config.vocab_size)}
    spelling = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token=next(iter(words)))))
    lm = view(hf, spelling, name="<b>model</b>\x1b[2J")
    tokens = Tokens(random_ids(lm), np.full(16, 9), np.repeat([0, 1, 2, 3], 4)).named("<i>\x1b[2Jtext</i>")
    return uw.audit(lm, tokens), lm, tokens


def test_where_nothing_is_out_of_the_ordinary_the_lowest_is_looked_at(strange, tmp_path) -> None:
    result, lm, tokens = strange
    scanned = uw.scan(lm, tokens.take(range(8))).data
    material = set(scanned["writer"].values[scanned["material"].values])
    # Without the embedding nothing is left; what the last MLP writes nobody reads.
    assert set(result["removed"].values) == {
        name for name in material if name not in ("embed", f"MLP{len(lm.layers) - 1}") and ".bias" not in name
    }
    assert set(result["removed_verdict"].values) == {"undecided"}  # two documents judge
    gap = result["removed_gap"].to_series()
    assert result["verified"].values[0] == gap.idxmin()
    assert "All are undecided: 2 documents give no interval" in result.data.attrs["verdict"]
    assert holes(result, lm) == []
    assert uw.read(result.save(tmp_path)).data.identical(result.data)


@pytest.mark.promise("hostile")
def test_hostile_tokens_are_no_markup_and_no_commands(strange, tmp_path) -> None:
    result, _, _ = strange
    for name in ("prompt_text", "answer", "against"):
        assert any("<" in word for word in result[name].values.tolist())
    page.save_all(result, tmp_path)
    source = (tmp_path / "report.html").read_text("utf-8")
    parsed = Page(source)
    assert set(parsed.tags) <= OWN
    assert parsed.tags.count("script") == 2
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert not [
        to
        for name, to in parsed.attributes
        if name == "href" and to not in ("result.nc", "table.csv") and str(to)[0] != "#"
    ]
    assert "alert(" in parsed.text
    assert "&amp;lt;" in source
    screen = terminal.console()
    with screen.capture() as seen:
        terminal.show(result, screen)
    for text in (source, seen.get(), (tmp_path / "table.csv").read_text("utf-8")):
        assert not {"\x1b", "\u202e", "\x07"} & set(text)


@pytest.mark.promise("read-back")
def test_an_audit_is_kept_printed_and_drawn_whole(audited, tmp_path) -> None:
    result, _, tokens = audited
    page.save_all(result, tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, result.data)
    parsed = Page((tmp_path / "report.html").read_text("utf-8"))
    # Of four prompts each; and a terminal says how far readings are from them.
    for text, times in ((shown(again), 5), (squeezed(parsed.text), 4)):
        assert squeezed(result.data.attrs["verdict"]) in text
        for i, writer in enumerate(result["verified"].values):
            survival, error = (float(result[name][i, -1]) for name in ("survival", "survival_se"))
            assert squeezed(f"{writer} {result['verdict'].values[i]} {survival:.2f} ± {error:.2f}") in text
        assert "headsbeforethelastlayer" in text
        rate = float(result["found_rate"].sel(found_text="searched", source="writer"))
        assert squeezed(f"{rate:.2%} of positions searched") in text
        assert text.count("logitdifference") == times
    folded = len(result["node"]) > page.OPEN
    # The picture, all writers, those verified, trust twice, four prompts, and how it was made; of each verified two.
    assert parsed.tags.count("table") == 1 + 1 + folded + 1 + 2 + 4 + 2 + 2 * len(result["verified"])
    table = pd.read_csv(tmp_path / "table.csv")
    assert set(table["writer"]) == set(result["writer"].values)
    assert result.provenance["settings"]["judged"]["hash"] == tokens.take(range(8, 16)).hash
    assert result.provenance["tokens"][""]["hash"] == tokens.take(range(8)).hash


def test_found_prompts_are_asked_about_as_they_were_found(audited) -> None:
    result, lm, tokens = audited
    data, judge = result.data, tokens.take(range(8, 16))
    assert data.sizes["hit"] == 4
    assert data["prompt_kind"].values.tolist() == ["found"] * 2 + ["window"] * 6
    for i in range(2):
        row = int(data["found_row"][i])
        assert int(data["row"][i]) == row
        for name in ("answer_id", "against_id"):
            assert int(data[name][i]) == int(data[f"found_{name}"][i])
        direct = float(data["direct"].sel(node=data.attrs["searched"])[i])
        assert direct == pytest.approx(float(data["found_direct"][i]), rel=1e-9)
        assert float(data["logit_diff"][i]) == pytest.approx(float(data["found_logit_diff"][i]), rel=1e-9)
        ids = judge.ids[int(data["found_prompt"][i]), : row + 1]
        assert str(data["prompt_text"][i].item()) == lm.tokenizer.decode(ids.tolist())
    others = {lm.tokenizer.decode(row[:12].tolist()) for row in judge.ids}
    assert set(data["prompt_text"].values[2:].tolist()) <= others
    assert (data["row"].values[2:] == 11).all()


def test_several_texts_are_scanned_the_first_judges_and_everything_is_written(asked, tmp_path) -> None:
    lm, topics = documents()
    texts = {topics.source: topics, "digits": windows("0123456789" * 300, lm.tokenizer, n=8, length=32)}
    result = uw.audit(lm, texts, prompts=["It was the age", "of wisdom"], out=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.html", "result.nc", "table.csv"]
    data = uw.read(tmp_path / "out").data
    xr.testing.assert_identical(data, result.data)
    assert "L0H0" in data.attrs["verdict"]
    assert list(data["text"].values) == ["Python's documentation topics", "digits"]
    assert data["share"].dims == ("text", "writer", "node")
    first = {topics.source: topics.take(range(5)), "digits": texts["digits"].take(range(4))}
    digits = data["level_share"].sel(text="digits", drop=True)
    xr.testing.assert_allclose(digits, uw.scan(lm, first["digits"])["level_share"])
    assert {name: read["hash"] for name, read in result.provenance["tokens"].items()} == {
        name: part.hash for name, part in first.items()
    }
    judge = topics.take(range(5, 12)).hash
    assert {args[1].hash for name in ("verify", "adversarial", "corpus_dla") for args, _ in asked[name]} == {judge}
    assert result.provenance["settings"]["judged"]["hash"] == judge
    assert data["found_hits"].dims == ("found_text", "source")
    assert {"L0H0", "L0H2"} <= set(data["verified"].values.tolist())
    drawn = Page((tmp_path / "out" / "report.html").read_text("utf-8")).text
    for text in (shown(result), squeezed(drawn)):
        assert "topics:5×32tokens" in text
        assert "digits:4×32tokens" in text
        assert "givenprompt1:“ofwisdom”" in text


@pytest.mark.parametrize("given", ["It was the age", ["It was the age", "of wisdom"], np.array([[72, 84], [72, 83]])])
def test_prompts_can_be_given(given, asked) -> None:
    lm, tokens = documents()
    data = uw.audit(lm, tokens, prompts=given).data
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, np.ndarray):
        texts = lm.tokenizer.batch_decode(texts)
    assert data["prompt_text"].values.tolist() == list(texts)
    assert data["prompt_kind"].values.tolist() == ["given"] * len(texts)
    assert data["row"].values.tolist() == [len(lm.tokenizer(text)["input_ids"]) - 1 for text in texts]
    assert [len(args[1]) for args, _ in asked["dla"]] == [len(texts)]


def test_a_string_needs_a_tokenizer(asked) -> None:
    lm, tokens = documents()
    with pytest.raises(TokensError, match="a prompt needs a tokenizer"):
        uw.audit(view(lm.hf), tokens, prompts="It was the age")


@pytest.mark.parametrize("stage", ["verify", "adversarial", "dla", "corpus_dla"])
def test_an_error_in_the_middle_leaves_no_result_and_what_was_done(stage, asked, monkeypatch, tmp_path) -> None:
    lm, tokens = documents()

    def fails(*_: Any, **__: Any) -> None:
        raise NumericError("planted failure")

    monkeypatch.setattr(page, "page", lambda *_: "pages are drawn elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(AUDIT, stage, fails)
        with pytest.raises(NumericError, match="planted failure"):
            uw.audit(lm, tokens, prompts="It", out=tmp_path / "out")
    assert asked["scan"]
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".npz"}
    with monkeypatch.context() as patch:
        patch.setattr(GramTally, "step", fails)  # the scan is not made again
        uw.audit(lm, tokens, prompts="It", out=tmp_path / "out")
    assert (tmp_path / "out" / "result.nc").exists()


def test_prompts_of_unequal_length_are_audited(asked) -> None:
    lm = view(tiny.model("gpt2", 0))
    mask = np.arange(9) < np.tile([9, 7, 8, 9], 2)[:, None]
    assert uw.audit(lm, from_ids(random_ids(lm, 8), mask)).data.sizes["prompt"] == 4


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_model_of_one_layer_is_audited_or_refused_in_words(family, asked) -> None:
    lm = view(tiny.model(family, 0, num_hidden_layers=1))
    try:
        uw.audit(lm, random_ids(lm, 8, 5))
    except uw.errors.UnwriteError:
        assert family == "gptj"
