"""Does the scan find what was planted and only that, and does the audit say so, of prompts that chose nothing?"""

from __future__ import annotations

import importlib
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
from test_report import Page
from unwrite.combined.audit import demonstration
from unwrite.errors import NumericError, TokensError
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.view import Model
from unwrite.nodes import parse_node
from unwrite.report import page, terminal
from unwrite.report.rows import rows
from unwrite.tokens import Tokens, from_ids, windows

# `unwrite.combined.audit` as an attribute of the package is what an import statement would find, too.
AUDIT = importlib.import_module("unwrite.combined.audit")

PROSE = (
    "It was the best of times, it was the worst of times; 1775 was the year, and all of it was told by a clerk. " * 60
)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def found(request: pytest.FixtureRequest) -> tuple[uw.Result, object]:
    model = planted(request.param, dtype=torch.float64)
    lm = view(model.hf, model.tokenizer)
    return uw.scan(lm, windows(PROSE, model.tokenizer, n=12, length=128)), model


def test_every_planted_share_is_measured(found) -> None:
    result, model = found
    for pair in model.pairs:
        share = float(result["share"].sel(writer=pair.writer, node=pair.eraser))
        assert share == pytest.approx(pair.share, abs=0.02), pair


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


def test_a_scan_never_says_erased_or_kept(found) -> None:
    result, _ = found
    said = " ".join(map(str, result["in_words"].values))
    assert "erased" not in said
    assert "kept" not in said


def test_several_texts_stand_side_by_side_and_disagree_where_they_do() -> None:
    lm, _ = demonstration(n=4, length=64)
    texts = uw.text({"prose": PROSE, "digits": "0123456789" * 300}, lm.tokenizer, n=4, length=64)
    both = uw.scan(lm, texts)
    assert list(both["text"].values) == ["prose", "digits"]
    for name in texts:
        alone = uw.scan(lm, texts[name])
        xr.testing.assert_equal(both["level"].sel(text=name, drop=True), alone["level"])
    assert set(both.table()["text"]) == {"prose", "digits"}


def test_audit_writes_everything_it_promises(tmp_path) -> None:
    lm, tokens = demonstration(n=6, length=64)
    result = uw.audit(lm, tokens, out=tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.html", "result.nc", "table.csv"]
    again = uw.read(tmp_path / "out")
    xr.testing.assert_identical(again.data, result.data)
    assert "L0H0 reverses" in again.data.attrs["verdict"]
    assert again.provenance["tokens"][""]["source"] == "Python's documentation topics"


def test_a_failed_audit_leaves_no_folder(tmp_path) -> None:
    lm, _ = demonstration(n=2, length=64)
    with pytest.raises(uw.errors.TokensError):
        uw.audit(lm, np.array([[10**6, 1, 2]]), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_demonstration_needs_no_file_and_names_its_text() -> None:
    lm, tokens = demonstration(n=3)
    assert lm.certificate.ok
    assert tokens.ids.shape == (3, 256)
    assert tokens.source == "Python's documentation topics"


def test_doctor_measures_identities_memory_and_time() -> None:
    lm, _ = demonstration(n=2, length=64)
    diagnosis = uw.doctor(lm, n=100, length=128)
    assert diagnosis.ok
    assert {check.name for check in diagnosis.checks} >= {f"identity {name}" for name in lm.certificate}
    assert diagnosis.memory > sum(parameter.nbytes for parameter in lm.hf.parameters())
    assert diagnosis.seconds > 0
    assert uw.doctor(lm, n=100, length=10**6).length == lm.context


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def audited(request: pytest.FixtureRequest) -> tuple[uw.Result, Model, Tokens]:
    truth = planted(request.param, dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    tokens = windows(PROSE, truth.tokenizer, n=16, length=48)
    return uw.audit(lm, tokens), lm, tokens


def shown(result: uw.Result) -> str:
    """What a terminal shows, in one line."""
    screen = terminal.console()
    with screen.capture() as seen:
        terminal.show(result, screen)
    return " ".join(seen.get().split())


def random_ids(lm: Model, prompts: int = 16, length: int = 9) -> np.ndarray:
    return torch.randint(lm.vocabulary, (prompts, length), generator=torch.Generator().manual_seed(1)).numpy()


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Name of a method -> what it was given to read, as an audit goes on."""
    seen: dict[str, list[Any]] = {}
    for name in ("scan", "verify", "adversarial", "dla", "corpus_dla"):
        real, asked = getattr(AUDIT, name), seen.setdefault(name, [])

        def record(*args: Any, real: Any = real, asked: list[Any] = asked, **settings: Any) -> uw.Result:
            asked.append((args, settings))
            return real(*args, **settings)

        monkeypatch.setattr(AUDIT, name, record)
    return seen


def test_prompts_that_chose_a_writer_never_judge_it(monkeypatch) -> None:
    """Five documents: two choose, three judge, and windows of one document stay together."""
    lm, _ = demonstration(n=4, length=64)
    ids, document = windows(PROSE, lm.tokenizer, n=14, length=32).ids, np.repeat([0, 1, 2, 3, 4], [4, 1, 3, 4, 2])
    tokens = Tokens(ids, np.full(14, 32), document)
    seen = recorded(monkeypatch)
    uw.audit(lm, tokens)
    choose, judge = tokens.take(range(5)), tokens.take(range(5, 14))
    assert [args[1].hash for args, _ in seen["scan"]] == [choose.hash]
    assert len(seen["verify"]) >= 3
    assert {args[1].hash for args, _ in seen["verify"]} == {judge.hash}
    assert [(args[1].hash, args[3].hash) for args, _ in seen["adversarial"]] == [(judge.hash, choose.hash)]
    assert [settings["texts"].hash for _, settings in seen["dla"]] == [judge.hash]
    assert [args[1].hash for args, _ in seen["corpus_dla"]] == [judge.hash]
    asked = seen["dla"][0][0][1]
    own = {tuple(row[:n]) for row, n in zip(asked.ids.tolist(), asked.lengths, strict=True)}
    assert all(any(tuple(row[: len(one)]) == one for row in judge.ids.tolist()) for one in own)


@pytest.mark.parametrize("document", [[0, 1, 2], [0, 0, 0, 0, 1, 1, 2, 2]])
def test_fewer_than_four_independent_prompts_are_not_enough(document, tmp_path) -> None:
    lm, _ = demonstration(n=4, length=64)
    tokens = Tokens(random_ids(lm, len(document)), np.full(len(document), 9), np.array(document))
    with pytest.raises(TokensError, match="3 independent prompts. Expected: at least 4"):
        uw.audit(lm, tokens, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_audit_names_the_erased_writers_and_nobody_else(audited) -> None:
    result, _, _ = audited
    said = dict(zip(result["verified"].values.tolist(), result["verdict"].values.tolist(), strict=True))
    assert {writer for writer, word in said.items() if word == "erased"} == {"L0H0", "L0H1", "L0H2"}
    lead = result.data.attrs["verdict"].partition("Erased: ")[2].partition(", judged")[0]
    named, _, others = lead.partition(" (")
    assert sorted(named.split(", ")) == ["L0H0", "L0H1", "L0H2"]
    assert "L0H4" in others  # mimicked by a decoy, so it was verified
    assert "kept: L0H4" in others
    assert "on 8 prompts that did not choose them" in result.data.attrs["verdict"]
    # Who erases, by its name: neither the decoys nor the backup.
    erasers = " ".join(result["erasers"].sel(verified=[*named.split(", ")]).values.tolist()).split()
    assert {"L1H0", "L1H1", "L1H2", "L1H3", "L1H4"} <= set(erasers)
    assert result.data.attrs["searched"] in named


def test_a_verification_in_an_audit_is_that_of_the_method(audited) -> None:
    result, lm, tokens = audited
    judge, taken = tokens.take(range(8, 16)), set(result.data.data_vars)
    for writer in ("L0H0", "L0H4"):
        alone = uw.verify(lm, judge, writer).data
        one = result.data.sel(verified=writer)
        for name, part in alone.data_vars.items():
            mine = one[f"verified_{name}" if f"verified_{name}" in taken else name]
            np.testing.assert_array_equal(mine.values, part.values, err_msg=str(name))
            assert part.dtype.kind not in "fi" or mine.attrs["equation"] == part.attrs["equation"]
            assert part.dtype.kind not in "fi" or mine.attrs["units"] == part.attrs["units"]
        for name in ("verdict", "erasers", "readers", "decodable_note", "causal_share_note"):
            assert one[name].item() == alone.attrs[name]


# What may be without a number, and where: nothing else may.
BEFORE_THE_WRITE = {"survival", "survival_se", "generic", "gap", "gap_se", "v_survival"}
OF_HEADS = {"into_space", "space", "decodable"}
OF_SILENT = {"change_share", "change_share_se", "moved", "pr", "level", "change", "dilution", "share", "share_se",
             "share_position", "share_token", "level_share", "level_share_se", "norm", "relative_norm", "level_after",
             "level_end", "skipped_share"}  # fmt: skip


def holes(result: uw.Result, lm: Model) -> dict[str, Any]:
    """Numeric variables that are not finite where they should be, with the share that is."""
    data, found = result.data, {}
    after = {str(w): next(i for i, s in enumerate(lm.states) if s.holds(parse_node(w), lm.parallel))
             for w in data["verified"].values}  # fmt: skip
    silent = [str(w) for w in data["writer"].values if "never writes" in str(data["in_words"].sel(writer=w).item())]
    for name, part in data.data_vars.items():
        if part.dtype.kind != "f":
            continue
        good = part.notnull() & (np.abs(part) < np.inf)
        if name in BEFORE_THE_WRITE:
            early = np.array([np.arange(part.sizes["location"]) < after[str(w)] for w in data["verified"].values])
            assert not good.transpose("verified", "location", ...).values[early].any(), name
            good |= xr.DataArray(early, dims=("verified", "location"))
        if name in OF_HEADS:
            no_head = np.array([parse_node(w).kind != "head" for w in data["verified"].values])
            good |= xr.DataArray(no_head, dims="verified")
        if name in OF_SILENT:
            good |= data["writer"].isin(silent)
        if name == "causal_share":
            good |= data["causal_share_note"] != ""
        if name in ("read_generic", "one_reader_share", "one_reader_share_se"):
            later = xr.DataArray([[reads(lm, str(e), str(w), str(name)) for e in data["node"].values]
                                  for w in data["verified"].values], dims=("verified", "node"))  # fmt: skip
            good |= ~later
        if name in ("read", "into_space"):
            good |= data["node"].isin(silent)
        if name == "invariance":
            good |= data["direct"] == 0
        if not bool(good.all()):
            found[str(name)] = float(good.mean())
    return found


def reads(lm: Model, node: str, writer: str, name: str) -> bool:
    """Is there a number for this pair? Heads of later layers and MLPs after the writer read it; some are of MLPs alone."""
    e, w = parse_node(node), parse_node(writer)
    if e.kind == "head":
        return e.layer > w.layer and name == "read_generic"
    return e.kind == "mlp" and (e.layer > w.layer or (e.layer == w.layer and w.kind in ("head", "bias")))


def test_every_number_of_an_audit_is_there(audited) -> None:
    result, lm, _ = audited
    assert holes(result, lm) == {}
    for name, part in result.data.data_vars.items():
        assert not (part.dtype.kind == "f" and part.isnull().all()), name


@pytest.fixture(scope="module")
def nothing_erased() -> tuple[uw.Result, Model, Tokens]:
    """Random weights, and so few independent prompts that no interval excludes anything."""
    lm = view(tiny.model("gpt2", 0))
    tokens = Tokens(random_ids(lm), np.full(16, 9), np.repeat([0, 1, 2, 3], 4))
    return uw.audit(lm, tokens), lm, tokens


def test_where_nothing_is_erased_the_lowest_ends_are_verified(nothing_erased, tmp_path) -> None:
    result, lm, tokens = nothing_erased
    assert not result["eraser"].any()
    scanned = uw.scan(lm, tokens.take(range(8))).data
    end = scanned["level_end"].sel(quantile=0.5).to_series()[scanned["material"].values.astype(bool)]
    # Nobody reads what the last MLP or a bias or head of the last layer could only hand to that MLP: the MLP reads them.
    end = end.drop(["embed", f"MLP{len(lm.layers) - 1}"], errors="ignore")
    assert result["verified"].values.tolist() == end.sort_values().index[:3].tolist()
    assert "erased" not in result["verdict"].values
    assert "No writer is erased (" in result.data.attrs["verdict"]
    assert holes(result, lm) == {}
    assert uw.read(result.save(tmp_path)).data.identical(result.data)
    assert "No writer is erased" in shown(result)


def test_an_audit_is_kept_printed_and_drawn_whole(audited, tmp_path) -> None:
    result, _, tokens = audited
    page.save_all(result, tmp_path)
    again = uw.read(tmp_path)
    xr.testing.assert_identical(again.data, result.data)
    seen, parsed = shown(again), Page((tmp_path / "report.html").read_text("utf-8"))
    drawn = " ".join(parsed.text.split())
    for text in (seen, drawn):
        assert " ".join(result.data.attrs["verdict"].split()) in text
        for i, writer in enumerate(result["verified"].values):
            survival, error = (float(result[name][i, -1]) for name in ("survival", "survival_se"))
            assert f"{writer} {result['verdict'].values[i]} {survival:.2f} ± {error:.2f}" in text
        assert "heads before the last layer" in text
        rate = float(result["found_rate"].sel(found_text="searched", source="writer"))
        assert f"{rate:.2%} of positions searched" in text
        assert text.count("logit difference") == 4
    # Two of the scan, one of the verified, two of trust, four prompts, and how it was made.
    assert parsed.tags.count("table") == 2 + 1 + 2 + 4 + 1
    table = pd.read_csv(tmp_path / "table.csv")
    assert set(table["writer"]) == set(result["writer"].values)
    assert result.provenance["settings"]["judged"]["hash"] == tokens.take(range(8, 16)).hash
    assert result.provenance["tokens"][""]["hash"] == tokens.take(range(8)).hash


def test_found_prompts_are_asked_about_as_they_were_found(audited) -> None:
    result, lm, tokens = audited
    data, judge = result.data, tokens.take(range(8, 16))
    kinds = data["prompt_kind"].values.tolist()
    hits = data.sizes["hit"]
    assert hits == 4
    assert kinds == ["found"] * 4 + ["window"] * 4
    worst = data.attrs["searched"]
    for i in range(hits):
        row = int(data["found_row"][i])
        assert int(data["row"][i]) == row
        for name in ("answer_id", "against_id"):
            assert int(data[name][i]) == int(data[f"found_{name}"][i])
        for name in ("direct", "logit_diff"):
            cell = data[name].isel(prompt=i)
            value = float(cell.sel(node=worst) if "node" in cell.dims else cell)
            assert value == pytest.approx(float(data[f"found_{name}"][i]), rel=1e-9)
        ids = judge.ids[int(data["found_prompt"][i]), : row + 1]
        assert str(data["prompt_text"][i].item()) == lm.tokenizer.decode(ids.tolist())
    others = {lm.tokenizer.decode(row.tolist()) for row in judge.ids}
    assert set(data["prompt_text"].values[hits:].tolist()) <= others
    assert (data["row"].values[hits:] == 47).all()


WORDS = (
    "</td><script>alert({})</script>",
    "<img src=x onerror=alert({})>",
    "\x1b[2J\u202e{}",
    '=HYPERLINK("http://{}")',
    "&lt;{}\x07",
)


@pytest.fixture(scope="module")
def hostile() -> uw.Result:
    """An audit of a model whose every token is spelled by somebody malicious."""
    hf = tiny.model("gpt2", 0)
    words = {WORDS[i % len(WORDS)].format(i): i for i in range(hf.config.vocab_size)}
    spelling = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token=next(iter(words)))))
    lm = view(hf, spelling, name="<b>model</b>\x1b[2J")
    return uw.audit(lm, from_ids(random_ids(lm)).named("<i>\x1b[2Jtext</i>"))


def test_hostile_tokens_are_no_markup_and_no_commands(hostile, audited, tmp_path) -> None:
    assert any("<script>" in word for word in hostile["prompt_text"].values.tolist())
    page.save_all(hostile, tmp_path)
    source, plain = (tmp_path / "report.html").read_text("utf-8"), Page(page.page(audited[0]))
    parsed = Page(source)
    assert set(parsed.tags) == set(plain.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")]
    assert "alert(" in parsed.text
    assert "&amp;lt;" in source
    for text in (source, shown(hostile), (tmp_path / "table.csv").read_text("utf-8")):
        assert not {"\x1b", "\u202e", "\x07"} & set(text)
    for line in (tmp_path / "table.csv").read_text("utf-8").splitlines():
        assert not any(cell.strip('"').startswith(("=", "@")) for cell in line.split(","))


def test_several_texts_are_scanned_and_the_first_judges(tmp_path) -> None:
    lm, _ = demonstration(n=4, length=64)
    texts = uw.text({"prose": PROSE, "digits": "0123456789" * 300}, lm.tokenizer, n=8, length=32)
    result = uw.audit(lm, texts, out=tmp_path)
    data = result.data
    assert list(data["text"].values) == ["prose", "digits"]
    assert data["share"].dims == ("text", "writer", "node")
    first = {name: part.take(range(4)) for name, part in texts.items()}
    xr.testing.assert_allclose(
        data["level_share"].sel(text="digits", drop=True), uw.scan(lm, first["digits"])["level_share"]
    )
    assert {name: read["hash"] for name, read in result.provenance["tokens"].items()} == {
        name: part.hash for name, part in first.items()
    }
    assert result.provenance["settings"]["judged"]["hash"] == texts["prose"].take(range(4, 8)).hash
    assert data["found_hits"].dims == ("found_text", "source")
    assert {"L0H0", "L0H2"} <= set(data["verified"].values.tolist())
    seen, drawn = shown(uw.read(tmp_path)), Page((tmp_path / "report.html").read_text("utf-8")).text
    for text in (seen, drawn):
        assert "prose: 4 × 32 tokens" in text
        assert "digits: 4 × 32 tokens" in text


def test_prompts_can_be_given(monkeypatch) -> None:
    lm, _ = demonstration(n=4, length=64)
    tokens, seen = windows(PROSE, lm.tokenizer, n=8, length=40), recorded(monkeypatch)
    data = uw.audit(lm, tokens, prompts=["It was the age", "of wisdom, it was"]).data
    assert data["prompt_text"].values.tolist() == ["It was the age", "of wisdom, it was"]
    assert data["prompt_kind"].values.tolist() == ["given", "given"]
    assert uw.audit(lm, tokens, prompts="It was the age").data.sizes["prompt"] == 1
    ids = np.array([[72, 84, 220], [72, 84, 83]])
    assert uw.audit(lm, tokens, prompts=ids).data["row"].values.tolist() == [2, 2]
    assert [len(args[1]) for args, _ in seen["dla"]] == [2, 1, 2]
    with pytest.raises(TokensError, match="a prompt needs a tokenizer"):
        uw.audit(view(lm.hf), tokens, prompts="It was the age")


@pytest.mark.parametrize("stage", ["verify", "adversarial", "dla", "corpus_dla"])
def test_an_error_in_the_middle_leaves_no_folder(stage, monkeypatch, tmp_path) -> None:
    lm, tokens = demonstration(n=4, length=32)

    def fails(*_: Any, **__: Any) -> None:
        raise NumericError("planted failure")

    monkeypatch.setattr(AUDIT, stage, fails)
    with pytest.raises(NumericError, match="planted failure"):
        uw.audit(lm, tokens, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.xfail(reason="texts given to dla are shorter than the prompts found in them", strict=True)
def test_prompts_of_unequal_length_are_audited() -> None:
    lm = view(tiny.model("gpt2", 0))
    mask = np.arange(9) < np.tile([9, 7, 8, 9], 4)[:, None]
    assert uw.audit(lm, from_ids(random_ids(lm), mask)).data.sizes["prompt"] == 8


@pytest.mark.xfail(reason="groups of nodes before the last layer are empty; nobody reads anybody", strict=True)
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_model_of_one_layer_is_audited_or_refused_in_words(family) -> None:
    lm = view(tiny.model(family, 0, num_hidden_layers=1))
    try:
        uw.audit(lm, random_ids(lm))
    except uw.errors.UnwriteError:
        assert family == "gptj"
