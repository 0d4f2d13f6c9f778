"""Are verdicts on real models no more often wrong than stated? Do they hang on documents, channels, or single rows?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import unwrite as uw
from unwrite.model.fold import fold
from unwrite.model.readers import weights
from unwrite.model.view import Model
from unwrite.nodes import choose
from unwrite.prompts.tokens import Tokens
from unwrite.run.loop.job import Job
from unwrite.run.loop.stream import batches, stream
from unwrite.run.replay.clean import clean
from unwrite.run.tally import survives
from unwrite.run.tally.survives import FEWER, Removals, SurvivalTally
from unwrite.stats.verdicts import CRITERIA, Sums, judge, with_decoy

DOCUMENTS, LENGTH = 10, 40
DECOYS = {"typical": 4, "signs": 2}
pytestmark = [pytest.mark.slow, pytest.mark.shared]
ORDINARY = {"like others", "undecided"}
TOP = 3
MODELS = [
    "default", "stories260K", *(pytest.param(name, marks=pytest.mark.real) for name in ("gemma3-270m", "smollm2-135m")),
]  # fmt: skip

REAL = os.environ.get("UNWRITE_REAL")
SHARED = Path(__file__).resolve().parents[2] / "shared"


class Measured(NamedTuple):
    """Sums of one model: as they are; without the channels that hold most, as many again, and without any tenth of
    all; without the rows that stick out most."""

    name: str
    whole: Sums
    fewer: Sums
    fewest: Sums
    tenths: list[Sums]
    fewer_rows: Sums


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    name = request.param
    lm = uw.load(_place(name), **({} if name == "default" else {"dtype": "float32"}))
    tokens = uw.text(_documents(name), lm.tokenizer, n=DOCUMENTS, length=LENGTH)
    assert len(set(tokens.cluster)) == DOCUMENTS
    writers = choose(_material(lm, tokens), lm.parts)
    folded, own = fold(lm), weights(lm, writers)
    held, apart = _clean(lm, tokens, writers)
    loudest = held.argsort(descending=True).tolist()
    # Stand-ins are as large as the write in the first weights, in which all others see the same runs.
    weighed = {"readers": own, "fewest": _without(own, loudest[: 2 * TOP])}
    weighed |= {f"tenth {part}": _without(own, range(part, lm.d_model, 10)) for part in range(10)}
    asked = Removals(lm, folded, tokens, 1, writers, weighed, DECOYS, tuple(loudest[:TOP]))
    with pytest.MonkeyPatch.context() as patch, Job(tmp_path_factory.mktemp(name), every=120.0) as job:
        # So that the hundredth of all rows that sticks out most is what is left out.
        patch.setattr(survives, "SINK", float(apart.quantile(0.99)))
        job.begin("survival", lm, {"": tokens.hash}, {})
        tally = SurvivalTally(asked, job)
        stream(lm, tokens, tally, 1, name, None, job)
        whole = tally.whole()
        assert 0 < whole["sinks"].sum() <= 0.02 * whole["counted"].sum()
        parts = [asked.sums(whole, weigh) for weigh in ("readers", FEWER, "fewest")]
        tenths = [asked.sums(whole, f"tenth {part}") for part in range(10)]
        return Measured(name, *parts, tenths, asked.sums(whole, without_sinks=True))
    raise AssertionError


def _without(weigh: Tensor, channels: Iterable[int]) -> Tensor:
    fewer = weigh.clone()
    fewer[:, [*channels]] = 0.0
    return fewer


def _place(name: str) -> str:
    if name == "default":
        return name
    return str(SHARED / "models" / name if name == "stories260K" else Path(str(REAL)) / name)


def _documents(name: str) -> list[str]:
    if name in ("default", "stories260K"):
        text = (SHARED / "corpus" / "tinystories.txt").read_text()
        return [text[at : at + 20 * LENGTH] for at in range(0, DOCUMENTS * 90_000, 90_000)]
    books = sorted((SHARED / "corpus" / "books").glob("*.txt"))[::4][:DOCUMENTS]
    return [book.read_text()[100_000:][: 20 * LENGTH] for book in books]


def _material(lm: Model, tokens: Tokens) -> list[str]:
    scan = uw.scan(lm, tokens)
    return [str(name) for name in scan["writer"].values[scan["material"].values] if not str(name).endswith(".bias")]


def _clean(lm: Model, tokens: Tokens, writers: tuple) -> tuple[Tensor, Tensor]:
    """How much of the writes' energy each channel holds, each write's being 1; how long rows are, in medians."""
    held, apart = torch.zeros(len(writers), lm.d_model), []
    for batch in batches(tokens, 1):
        run, kept = clean(lm, batch.ids, fold(lm)), batch.beyond(1)
        for i, writer in enumerate(writers):
            held[i] += (run.write(writer) * kept[..., None]).float().pow(2).sum((0, 1))
        lengths = torch.stack([run.record.stream[state].norm(dim=-1)[0] for state in lm.states])[:, kept[0]]
        apart.append((lengths / lengths.median(1, keepdim=True).values).amax(0))
    return (held / held.sum(1, keepdim=True)).sum(0), torch.cat(apart)


def _words(about: Sums, fewer: Sums) -> np.ndarray:
    return np.array(judge(about, fewer=fewer).verdict)


def _changes(one: np.ndarray, other: np.ndarray) -> str:
    moved = Counter((a, b) for a, b in zip(one.tolist(), other.tolist(), strict=True) if a != b)
    return ", ".join(f"{n} × {a} → {b}" for (a, b), n in moved.most_common()) or "none"


@pytest.fixture
def says(measured: Measured, record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Numbers that stand at the end of the run."""
    return lambda text: record_property("measured", f"{measured.name}: {text}")


def test_a_decoy_that_is_asked_as_a_writer_is_special_no_more_often_than_stated(
    measured: Measured, says: Callable[[str], None]
) -> None:
    said = []
    for draw in range(DECOYS["typical"]):
        # Without the words that hang on a few channels, and with them: both must hold.
        as_writers = [with_decoy(part, "typical", draw) for part in (measured.whole, measured.fewer)]
        said.append([_words(*as_writers), np.array(judge(as_writers[0]).verdict)])
    for words in np.concatenate(said, 1):
        special = Counter(word for word in words if word not in ORDINARY)
        says(f"{special.total()} of {len(words)} decoys are special {dict(special)}")
        assert special.total() <= CRITERIA.q * len(words)


def test_halves_of_the_documents_agree(measured: Measured, says: Callable[[str], None]) -> None:
    halves = [range(first, DOCUMENTS, 2) for first in (0, 1)]
    one, other = (_words(measured.whole.of(half), measured.fewer.of(half)) for half in halves)
    _require_agreement(one, other, 0.9, "halves", says)


def test_no_word_hangs_on_a_hundredth_of_the_rows(measured: Measured, says: Callable[[str], None]) -> None:
    one, other = (np.array(judge(sums).verdict) for sums in (measured.whole, measured.fewer_rows))
    says(f"without a hundredth of the rows {(one != other).sum()} of {len(one)} change: {_changes(one, other)}")
    assert (one != other).sum() < 0.05 * len(one)


def test_words_do_not_hang_on_which_channels_are_looked_at(measured: Measured, says: Callable[[str], None]) -> None:
    """Whether a writer is *decided* does change, as much without any tenth of the channels as without those that hold
    most; what is said of it does not."""
    words, plain = _words(measured.whole, measured.fewer), np.array(judge(measured.whole).verdict)
    counts = [dict(Counter(part.tolist())) for part in (words, plain)]
    says(f"words {counts[0]}, and with those that hang on {TOP} channels {counts[1]}")
    says(f"without {TOP} channels, any words: {_changes(plain, np.array(judge(measured.fewer).verdict))}")
    _require_agreement(words, _words(measured.fewer, measured.fewest), 0.95, f"without {TOP} channels", says)
    for part, sums in enumerate(measured.tenths):
        _require_agreement(words, np.array(judge(sums).verdict), 0.95, f"without tenth {part}", says)


def _require_agreement(one: np.ndarray, other: np.ndarray, least: float, what: str, says: Callable) -> None:
    decided = (one != "undecided") & (other != "undecided")
    agree = (one == other)[decided].sum()
    says(f"{what}: {agree} of {decided.sum()} decided agree; {_changes(one, other)}")
    assert agree >= least * decided.sum()
