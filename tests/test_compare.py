"""Do guesses stand beside the executed truth, from pairs in a file, through a stop, and safe to print?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import unwrite as uw
from test_cli import folder, run  # noqa: F401 - a fixture
from unwrite.errors import NumericError, ResultError, TokensError
from unwrite.methods import effects as module
from unwrite.model.load import view
from unwrite.prompts.given_pairs import read_pairs


@pytest.fixture(scope="module")
def lm() -> Any:
    return view(tiny.model("gpt2", 0))


@pytest.fixture(scope="module")
def asked() -> uw.Pairs:
    draw = torch.Generator().manual_seed(0)
    base = torch.randint(3, 50, (5, 9), generator=draw)
    source = base.clone()
    source[:, 2] = torch.randint(3, 50, (5,), generator=draw)
    return uw.pairs(base, source, 5, 6)


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """The planted model reads characters."""
    lines = ["base,source,answer,against,position", '"a man, so","a men, so",d,e,', "so it is,so at is,x,y,-2"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    return tmp_path / "pairs.csv"


@pytest.mark.promise("estimates")
def test_every_estimator_is_what_it_is_alone(lm, asked) -> None:
    found = uw.compare(lm, asked, "mlp_out", methods=("relp", "atp*", "exact"))
    exact = uw.effects(lm, asked, "mlp_out", at="all")
    star = uw.effects(lm, asked, "mlp_out", at="all", method="atp*")
    assert np.array_equal(found["exact"], exact["effect"])
    assert np.array_equal(found["atp*"], star["signed"])
    at = found["estimator"].values.tolist().index("atp*")
    flat = [np.asarray(one).ravel() for one in (star["signed"], exact["effect"])]
    assert float(found["pearson"][at]) == pytest.approx(np.corrcoef(*flat)[0, 1])
    assert float(found["pearson"][-1]) == pytest.approx(1.0)
    assert set(found.table().columns) == {"pair", "node", "relp", "atp*", "exact", "kind", "layer", "head"}


@pytest.mark.parametrize("methods", ["exact", (), ("exact", "guess")])
def test_unknown_estimators_are_refused(lm, asked, methods) -> None:
    with pytest.raises(NumericError, match="names of estimators"):
        uw.compare(lm, asked, methods=methods)


def test_the_command_prints_what_it_saves(folder, pairs_file, monkeypatch, capsys, tmp_path) -> None:  # noqa: F811
    arguments = ("effects", folder / "model", "--pairs", pairs_file, "--nodes", "heads", "--out", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    assert "exact, " in shown.err
    assert " passes" in shown.err
    saved = uw.read(tmp_path / "out")
    effect = saved["exact"].values[0]
    foremost = np.abs(effect).argmax()
    number = f"{effect[foremost]:+.3f}"
    assert f"{saved['node'].values[foremost]} " in shown.out
    assert number in shown.out
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["result.nc", "table.csv"]
    assert run(monkeypatch, "show", tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() in shown.out


def test_events_hold_the_sentence(folder, pairs_file, monkeypatch, capsys) -> None:  # noqa: F811
    assert run(monkeypatch, "effects", folder / "model", "--pairs", pairs_file, "--methods", "exact", "--json") == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["event"] == "result"
    assert "does most" in last["words"]


def test_pairs_are_read_alike_from_both_kinds_of_file(folder, pairs_file, tmp_path) -> None:  # noqa: F811
    tokenizer = uw.load(folder / "model").tokenizer
    lines = [
        {"base": "a man, so", "source": "a men, so", "answer": "d", "against": "e"},
        {"base": "so it is", "source": "so at is", "answer": "x", "against": "y", "position": -2},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = [read_pairs(file, tokenizer) for file in (pairs_file, tmp_path / "pairs.jsonl")]
    assert read[0].about()["hash"] == read[1].about()["hash"]
    assert read[0].row.tolist() == [read[0].base.lengths[0] - 1, read[0].base.lengths[1] - 2]


@pytest.mark.promise("tokens")
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no pair"),
        ("base,source\na,b", "line 2 .* is not a pair. Got: answer"),
        ("base,source,answer,colour\na,b,c,red", "is not a pair. Got: colour"),
        ("base,source,answer\na,b,c,d,e", "is not a pair"),
        ("base,source,answer,position\na,b,c,last", "has no position. Got: 'last'"),
        ("base,source,answer\nab,b,c", "pair 0 have unequal numbers"),
        ("base,source,answer\na,b,cd", "'cd' is not one token"),
    ],
)
def test_a_file_that_holds_no_pairs_says_where(folder, tmp_path, text, says) -> None:  # noqa: F811
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(TokensError, match=says):
        read_pairs(tmp_path / "pairs.csv", uw.load(folder / "model").tokenizer)


@pytest.mark.parametrize("line", ["{", "[1]", '{"base": 3, "source": "b", "answer": "c"}', '{"base": "a"}'])
def test_lines_that_are_no_pairs_are_refused(folder, tmp_path, line) -> None:  # noqa: F811
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(TokensError, match=r"line 1|not prompts|pairs"):
        read_pairs(tmp_path / "pairs.jsonl", uw.load(folder / "model").tokenizer)


@pytest.mark.promise("resumed")
def test_a_stopped_sweep_goes_on_where_it_was(lm, asked, tmp_path, monkeypatch) -> None:
    whole = uw.effects(lm, asked, batch=2)
    begun: list[int] = []
    real, last = module.patched, 9

    def stopping(*arguments: Any) -> Any:
        if len(begun) == last:
            raise KeyboardInterrupt
        begun.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(module, "patched", stopping)
    with pytest.raises(KeyboardInterrupt):
        uw.effects(lm, asked, batch=2, checkpoint=uw.Job(tmp_path, every=0.0))
    assert len(begun) == last
    begun.clear()
    last = 99
    with pytest.raises(ResultError, match="checkpoint of another run"):
        uw.effects(lm, asked, batch=2, metric="prob", checkpoint=tmp_path)
    again = uw.effects(lm, asked, batch=2, checkpoint=tmp_path)
    assert np.array_equal(again["effect"], whole["effect"], equal_nan=True)
    assert len(begun) == 3 * 7 - 9  # three batches, positions 2 to 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("damaged")
def test_a_damaged_checkpoint_is_no_number(lm, asked, tmp_path) -> None:
    (tmp_path / "00-effects-atp.npz").write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(ResultError, match="no readable checkpoint"):
        uw.effects(lm, asked, method="atp", checkpoint=tmp_path)


def test_what_no_file_could_know_again_is_not_kept(lm, asked, tmp_path) -> None:
    with pytest.raises(NumericError, match="no checkpoint is kept"):
        uw.effects(lm, asked, checkpoint=tmp_path, metric=lambda logits: logits[:, 0])


@pytest.mark.promise("hostile")
def test_hostile_prompts_are_plain_in_a_terminal(lm, asked, capsys) -> None:
    from test_report import HOSTILE
    from unwrite.report import terminal
    from unwrite.result import Result

    found = uw.compare(lm, asked, "heads", methods=("atp", "exact"))
    words = {
        name: ("pair", np.full(5, HOSTILE.replace("\ud800", ""), dtype=object))
        for name in ("base_text", "source_text", "answer")
    }
    terminal.show(Result(found.data.assign(words)), terminal.console())
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
