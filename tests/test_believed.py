"""Does a result of dla say no more than its cells do: which reading to go by, on how many prompts, in which columns?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tiny
import unwrite as uw
from unwrite.model.load import view
from unwrite.report import believed, terminal
from unwrite.result import Result
from unwrite.stats import jackknife, trust

NAN = float("nan")
AXES = ("reading", "group", "form", "replacement")
GROUPS = ["heads", "mlps", "L0.heads"]


def said(heads: list[tuple[float, float]], mlps: list[tuple[float, float]], clusters: int = 20) -> xr.Dataset:
    """Of each reading its correlation and the lower end of its interval, in two groups; of a layer what heads have."""
    cells = np.array([heads, mlps, heads]).swapaxes(0, 1)[:, :, None, None]
    middle, low = np.broadcast_to(cells, (4, 3, 1, 2, 2)).transpose(4, 0, 1, 2, 3)
    counts = np.full(middle.shape, clusters)
    parts = {"trust": middle, "trust_low": low, "trust_high": 2 * middle - low}
    parts |= {"trust_clusters": counts, "trust_n": 9 * counts}
    axes = {"reading": list(believed.READINGS), "group": GROUPS, "form": ["pooled"], "replacement": ["zero", "mean"]}
    return xr.Dataset({name: (AXES, part) for name, part in parts.items()}, axes)


SURE = [(0.3, 0.1), (0.5, 0.4), (0.7, 0.6), (0.93, 0.88)]


@pytest.mark.promise("estimates")
@pytest.mark.parametrize(
    ("heads", "mlps", "clusters", "words"),
    [
        (SURE, SURE[::-1], 20, "for heads read gradient (r 0.93 [0.88, 0.98], 20 prompts); for MLPs read direct (r"),
        # The lower end decides, not the middle.
        ([(0.9, 0.85), (0.95, 0.5), (0.1, 0.0), (NAN, NAN)], SURE, 20, "for heads read direct (r 0.90 [0.85"),
        ([(0.85, 0.79)] * 4, SURE, 6, "for heads no reading is good enough (the best is direct, r 0.85 [0.79, 0.91]"),
        ([(0.85, 0.79)] * 4, SURE, 6, "r should surely be at least 0.8): go by total; for MLPs read gradient"),
        ([(0.3, NAN), (0.9, NAN)] * 2, SURE, 1, "for heads, net is nearest to what happens (r 0.90; one prompt: "),
        ([(0.3, NAN), (0.9, NAN)] * 2, SURE, 1, "one prompt: indicative only, no interval)"),
        ([(0.3, NAN)] * 4, [(NAN, NAN)] * 4, 5, "5 prompts: indicative only, no interval)"),
        ([(NAN, NAN)] * 4, [(NAN, NAN)] * 4, 0, "too few cells to say which reading to go by"),
    ],
)  # fmt: skip
def test_one_reading_is_recommended_by_one_rule(heads: Any, mlps: Any, clusters: int, words: str) -> None:
    found = believed.belief(said(heads, mlps, clusters))
    assert words in found
    assert "nan" not in found


def test_nothing_is_recommended_without_an_interval() -> None:
    for clusters in (1, 5):
        assert " read " not in believed.belief(said([(0.99, NAN)] * 4, [(0.99, NAN)] * 4, clusters))


def test_a_layer_has_a_line_of_its_own_from_six_prompts_on() -> None:
    assert believed.FEWEST == jackknife.FEWEST
    for clusters in (1, 5, 6):
        groups = [row[0] for row in believed.trusted(said(SURE, SURE, clusters))]
        assert groups == (GROUPS if clusters == 6 else GROUPS[:2])
    assert "one prompt: indicative only, no interval" in believed.title(said(SURE, SURE, 1), "mean")
    assert "[95 %], 20 prompts" in believed.title(said(SURE, SURE), "mean")


def result(n: int, **asked: Any) -> Result:
    lm = view(tiny.model("llama", 2, torch.float64, num_hidden_layers=2, num_attention_heads=2))
    ids = torch.randint(3, 50, (n, 6), generator=torch.Generator().manual_seed(0))
    return uw.dla(lm, ids, 5, 9, **asked)


def shown(found: Result) -> str:
    screen = terminal.console()
    with screen.capture() as sent:
        terminal.show(found, screen)
    return sent.get()


def test_only_columns_that_say_something_are_shown() -> None:
    names = {n: [c.name for c in believed.header(result(1, **asked).data)] for n, asked in CASES.items()}
    assert names["all"] == ["node", "direct", "net", "relp", "gradient", "total"]
    assert names["none"] == ["node", "direct", "net", "relp", "gradient"]
    assert names["position"] == ["node", "direct", "net", "relp", "gradient", "total", "fate"]
    for one in (result(1, **asked) for asked in CASES.values()):
        lines = next(believed.asked(one.data)).rows
        assert {len(line) for line in lines} == {len(believed.header(one.data))}
        assert "<td" in one._repr_html_()


CASES: dict[str, dict[str, Any]] = {"all": {}, "none": {"total": False}, "position": {"at": "position"}}


def test_a_terminal_ends_with_what_to_go_by() -> None:
    few, many, none = (shown(result(n, **asked)) for n, asked in ((1, {}), (7, {}), (1, {"total": False})))
    assert "by the larger of |direct| and |total|" in few
    assert "L0.heads" not in few
    assert "L0.heads" in many
    last = [" ".join(text.strip().rsplit("\n\n", 1)[-1].split()) for text in (few, many, none)]
    assert last[0].startswith("For heads, ")
    assert "one prompt: indicative only, no interval" in last[0]
    assert last[1].startswith("For heads ")
    assert "7 prompts" in last[1]
    assert last[2] == "Nothing was executed, so which reading to go by is not known."
    assert "correlates" not in none


def test_clusters_are_those_that_have_a_total() -> None:
    reading = np.random.default_rng(0).normal(size=(8, 3))
    total = reading.copy()
    total[0, 0] = np.nan
    assert trust.trust(reading, total, np.arange(8), "pooled").clusters == 7
