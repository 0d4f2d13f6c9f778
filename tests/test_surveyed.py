"""Does examples/survey keep what the methods found, and do its tables say what is kept? By hand, and by identities."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import tiny
import unwrite as uw

EXAMPLE = Path(__file__).parents[1] / "examples" / "survey"
KEPT = sorted((EXAMPLE / "results").glob("*.json"))


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The scripts, which call each other by names that tests have, too."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("survey", "table", "claims", "lines", "bandwidth"):
            spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            found[name] = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, found[name])
            spec.loader.exec_module(found[name])
        yield found


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_what_is_kept_of_a_model_fits_together(file) -> None:
    found = json.loads(file.read_text())
    assert found["name"] == file.stem
    assert len(found["model"]["weights"]) == len(found["tokenizer"]) == 64
    assert len({text["hash"] for text in found["texts"]}) == len(found["texts"]) == len(found["writers"])
    for row in [row for part in found["writers"] for row in part if row["end"] is not None]:
        # What all later nodes do to a write is all that happens to it; a bias does nothing because of it.
        assert row["heads"] + row["mlps"] == pytest.approx(row["end"] - 1, abs=2e-3 * max(1, abs(row["end"])))
        listed = sum(value for value, *_ in row["acts"].values())
        assert abs(listed - (row["end"] - 1)) < 0.05 * found["model"]["layers"] * (found["model"]["heads"] + 2)
        below = row["verdict"] in ("erased", "reduced", "filled in")
        if below or row["verdict"] in ("kept", "amplified"):
            assert min(q for q in (row["q"], row["q_above"]) if q is not None) <= 0.1
            assert (row["gap_high"] < 0) if below else (row["gap_low"] > 0)


def test_documents_of_a_text_that_is_named_again_are_others(scripts, tmp_path) -> None:
    survey = scripts["survey"]
    lm = uw.load("default")
    first, again = survey.texts(("python", "python"), lm.tokenizer, 3)
    assert (first.source, again.source) == ("python", "python, other 3")
    assert len(first) == len(again) == 3
    assert not {tuple(row) for row in first.ids} & {tuple(row) for row in again.ids}
    (tmp_path / "short.txt").write_text("too short\n" * 100)
    with pytest.raises(SystemExit, match="0 documents"):
        survey.texts((str(tmp_path / "short.txt"),), lm.tokenizer, 3)
    line = "".join(f"line {i}\n" for i in range(40_000))
    (tmp_path / "long.txt").write_text(line)
    cut = survey.documents(str(tmp_path / "long.txt"))
    assert len(cut) == survey.STRETCHES
    assert all(text.startswith("line ") for text in cut)  # at a line's beginning


def test_who_is_looked_at_closely_is_judged_by_a_text_that_did_not_choose_it(scripts) -> None:
    def text(*rows: tuple[str, str, float]) -> list[dict[str, Any]]:
        return [{"writer": writer, "verdict": verdict, "gap": gap} for writer, verdict, gap in rows]

    one = text(("A", "erased", -0.3), ("B", "reduced", -0.9), ("C", "like others", -2.0), ("D", "kept", 2.0))
    two = text(("A", "erased", -0.2), ("B", "undecided", -0.1), ("E", "filled in", -0.1))
    assert scripts["survey"].lost([one, two]) == {"A": 1, "B": 1, "E": 0}


@pytest.mark.slow
def test_a_survey_of_a_tiny_model_is_kept_once(scripts, tmp_path, monkeypatch, capsys) -> None:
    """Its numbers are those of the methods, asked by themselves; what is kept is not measured again."""
    survey = scripts["survey"]
    hf, tokenizer = tiny.model("gpt2", 0, vocab_size=4096, n_positions=64), uw.load("default").tokenizer
    hf.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(survey, "RESULTS", tmp_path / "results")
    command = ["survey.py", str(tmp_path / "tiny"), "--documents", "6", "--decoys", "4", "--work", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    survey.main()
    assert " s" in capsys.readouterr().out.split("about")[1]  # what it takes is said
    kept = tmp_path / "results" / "tiny.json"
    found = json.loads(kept.read_text())
    lm = uw.load(tmp_path / "tiny")
    tokens = survey.texts(("python", "python"), lm.tokenizer, 6)[1]
    assert found["texts"][1]["hash"] == tokens.hash
    left = uw.survival(lm, tokens, decoys=4).data
    rows = {row["writer"]: row for row in found["writers"][1]}
    assert [*rows] == [str(writer) for writer in left["writer"].values]
    for writer, row in rows.items():
        assert row["end"] == pytest.approx(float(left["end"].sel(writer=writer)), abs=1e-3)
        assert row["verdict"] == left["verdict"].sel(writer=writer).item()
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(survey, "surveyed", None)
    survey.main()
    assert kept.stat().st_mtime_ns == before


# --- tables -----------------------------------------------------------------------------------------------------------


def row(
    writer: str, verdict: str, end: float, gap: float, acts: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    return {
        "writer": writer, "verdict": verdict, "end": end, "end_low": end - 0.1, "end_high": end + 0.1, "gap": gap,
        "gap_low": gap - 0.1, "gap_high": gap + 0.1, "q": 0.05, "q_above": 0.05, "ordinary": [0.1, end - gap, 0.9],
        "position": 0.25, "heads": 0.0, "mlps": end - 1, "acts": acts or {},
    }  # fmt: skip


@pytest.fixture
def made(scripts, tmp_path, monkeypatch) -> ModuleType:
    """Two models of two texts each, whose tables can be made by hand."""
    texts = [{"text": name, "hash": name * 64, "documents": 6, "loss": 2.0} for name in ("books", "python")]
    shape = {"family": "gpt2", "layers": 4, "heads": 1, "d_model": 8, "weights": "0" * 64}
    against = {"MLP0": [-0.6, -0.7, -0.5], "L1H0": [-0.7, -1.5, 0.1], "MLP3": [0.1, 0.0, 0.2]}
    first = [
        row("L0H0", "erased", 0.1, -0.4, against),
        row("L1H0", "like others", 0.5, 0.0),
        row("MLP0", "kept", 0.9, 0.5),
    ]
    second = [
        row("L0H0", "reduced", 0.2, -0.3, against),
        row("L1H0", "like others", 0.6, 0.1),
        row("MLP0", "kept", 0.9, 0.4),
    ]
    trust = [{"kind": "heads", "depth": "first third", "reading": reading, "r": r, "low": 0, "high": 1, "n": 6}
             for reading, r in (("direct", 0.2), ("net", 0.3), ("relp", 0.4), ("gradient", 0.8))]  # fmt: skip
    readers = [["L2H0", "k", 0.3, 0.1, 0.05, 0.8, 0.2], ["L3H0", "v", 0.2, 0.1, 0.05, 0.1, 0.9]]
    steps = {"verdict": "erased", "read": "shown", "erased": "shown", "reused": "not shown", "erasers": "MLP0",
             "text": 1, "asked": 20, "end": 0.1, "readers": readers}  # fmt: skip
    for name, parts in (("one", [first, second]), ("two", [first[1:], second[1:]])):
        kept = {"name": name, "model": shape, "tokenizer": "0" * 64, "texts": texts, "writers": parts, "seconds": 1,
                "trust": [trust, trust], "closely": {"L0H0": steps} if name == "one" else {}}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
    table = scripts["table"]
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    read_once = (table.every, table.agreed, scripts["claims"].held)
    for one in read_once:
        one.cache_clear()
    yield table
    for one in read_once:
        one.cache_clear()


def test_words_are_counted_by_text(made) -> None:
    assert made.counted().loc["one", ["writers", "erased", "reduced", "kept", "like others"]].tolist() == [
        "3 · 3", "1 · 0", "0 · 1", "1 · 1", "1 · 1",
    ]  # fmt: skip


def test_agreement_is_that_of_hand(made) -> None:
    one = made.agreed().loc["one"]
    # Two of three words are the same; by chance 0 · 0 + 0 · 1/3 + 1/3 · 1/3 + 1/3 · 1/3.
    assert one["same word, other kind"].startswith("2 of 3 ")
    assert one["by chance, other kind"] == "0.22"
    ends = np.corrcoef([0.1, 0.5, 0.9], [0.2, 0.6, 0.9])[0, 1]
    assert one[["r of survival, other kind", "over so many, other kind"]].tolist() == [f"{ends:.2f}", "3 of 3"]
    assert one["special on either, the same word, other kind"].startswith("1 of 2 ")
    assert one["special on either, the same side, other kind"].startswith("2 of 2 ")


def test_the_strongest_is_the_one_that_surely_acts_against(made) -> None:
    frame = made.strongest().set_index(["model", "text", "writer"])
    assert frame.loc[("one", 0, "L0H0"), ["eraser", "eraser kind", "behind"]].tolist() == ["MLP0", "MLP", 0]
    assert frame["eraser"].isna().tolist().count(False) == 2  # of all others nobody is sure


def test_a_writer_that_is_lost_on_two_texts_is_one_writer(made) -> None:
    one = made.acted().loc["one"]
    assert one["lost, of heads"].startswith("1 of 2 ")
    assert one["an MLP acts most"].startswith("1 of 1 ")
    assert made.acted().loc["two", "lost, of heads"].startswith("0 of 1 ")


def test_statements_are_asked_of_every_model(made, scripts) -> None:
    held = scripts["claims"].held()
    assert held.loc["some writer is, on every text"].tolist() == ["1 of 2 models", "1 of 2", "two"]
    # Nothing is lost in the other one, so nobody acts on that.
    assert held.loc["what acts most on a lost write is an MLP, of most", "holds of"] == "1 of 1 models"
    assert held.loc["known survivals of two texts of one kind correlate by .95 or more", "holds of"] == "0 of 0 models"


def test_intervals_are_those_of_other_formulas(made) -> None:
    # Wilson 1927: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n).
    p, n, z = 0.3, 10, 1.959964
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle + np.array([-half, half])) / (1 + z * z / n)
    assert made.wilson(3, 10) == f"3 of 10 [{low:.2f}, {high:.2f}]"
    # Of lineages a, b and c 1 of 2, 3 of 4 and 0 of 2: without each 3/6, 1/4, 4/6; pseudo-values 3 · 1/2 − 2 · that.
    frame = pd.DataFrame({"lineage": [*"aabbbbcc"], "yes": [1, 0, 1, 1, 1, 0, 0, 0]})
    without = np.array([3 / 6, 1 / 4, 4 / 6])
    pseudo = 3 * 4 / 8 - 2 * without
    half = stats.t.ppf(0.975, 2) * pseudo.std(ddof=1) / np.sqrt(3)
    low, high = np.clip(pseudo.mean() + np.array([-half, half]), 0, 1)
    assert made.over_lineages(frame, "yes") == f"0.50 [{low:.2f}, {high:.2f}]"


def test_readings_and_readers_stand_as_they_are_kept(made) -> None:
    assert made.trusted().loc[("heads", "first third"), "gradient"] == "0.80 [0.80, 0.80] of 2"
    line = made.read().loc[("one", "L0H0")]
    assert line[["readers", "before half is erased", "the first"]].tolist() == ["2 of 20", 1, "L2H0.k, L3H0.v"]


# --- what docs/bandwidth.md says --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(scripts) -> pd.DataFrame:
    """The numbers of each seed of each width, and of the bundled model, at the end of training."""
    bandwidth = scripts["bandwidth"]
    rows = bandwidth.rows()
    last = rows[~rows["model"].str.fullmatch(r"w\d+-s\d+-\d+")]
    named = {"heads": bandwidth.HEADS, "positions": bandwidth.POSITIONS}
    table = {
        model: {f"{kind}: {said}": column(part) for kind, columns in named.items() for said, column in columns.items()}
        | {"width": part["width"].iloc[0], "shipped": part["shipped"].iloc[0]}
        for model, part in last.groupby("model")
    }
    return pd.DataFrame.from_dict(table, orient="index")


def test_narrower_streams_lose_more_to_mlps_and_so_do_ordinary_writes(ends) -> None:
    young = ends[~ends["shipped"].astype(bool)]
    narrow, wide = (young[young["width"] == width].astype(float) for width in (32, 128))
    for name in ("heads: MLPs act on them", "positions: MLPs act on it", "heads: survives", "heads: ordinary"):
        assert narrow[name].max() < wide[name].min(), name
    assert ((young["heads: survives"] - young["heads: ordinary"]).astype(float).abs() < 0.1).all()
    assert (young["heads: surely below"] < 1).all()


def test_heads_take_over_with_age(ends, scripts) -> None:
    young, old = (ends[ends["shipped"].astype(bool) == shipped].astype(float) for shipped in (False, True))
    assert (young["positions: MLPs act on it"] < 3 * young["positions: heads act on it"]).all()
    assert float(old["positions: heads act on it"].iloc[0]) < -1
    assert abs(float(old["positions: MLPs act on it"].iloc[0])) < 0.1
    assert float(old["heads: heads act on them"].iloc[0]) < young["heads: heads act on them"].min() - 0.2
    lost = scripts["bandwidth"].rows().query("model == 'bundled' and below")
    assert lost["writer"].tolist() == ["L1H5"] * 3
    assert lost["verdict"].tolist() == ["erased"] * 3
    assert (lost["position"] > 0.95).all()
    rows = scripts["bandwidth"].rows()
    first = rows[rows["tokens, millions"] == rows["tokens, millions"].min()]
    assert (first.loc[first["kind"] == "head"].groupby("model")["end"].median() > 0.9).all()
