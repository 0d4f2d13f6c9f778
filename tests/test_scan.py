"""Does a scan report what its equations say? Against a twin written from them, on models run prompt by prompt."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats

import tiny
import twin
import unwrite as uw
from unwrite.errors import NodeError, NumericError, TokensError
from unwrite.methods import scan as method
from unwrite.model.load import view
from unwrite.nodes import parse_node, reads
from unwrite.prompts.tokens import Tokens, from_ids
from unwrite.result import Result
from unwrite.run.loop import stream
from unwrite.run.tally import gram
from unwrite.run.tally import position_part as positions

QUANTILES = [0.125, 0.25, 0.5, 0.75, 0.875]
# Beyond, a ratio is reported as infinite.
LIMIT = 100.0


class Case(NamedTuple):
    """A model, and how it is scanned."""

    family: str
    settings: dict[str, Any]
    skip: int
    floor: float
    batch: int
    cluster: tuple[int, ...]


SINGLE, PAIRS = (0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 2, 2)
LENGTHS = np.array([7, 9, 4, 9, 1, 6])
CASES = [
    Case("gpt2", {}, 0, 1e-4, 1, SINGLE),
    Case("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, 1, 0.3, 2, PAIRS),
    Case("gpt_neox", {"use_parallel_residual": True}, 3, 1e-4, 4, SINGLE),
    Case("gemma2", {}, 1, 0.3, 6, PAIRS),
    Case("cohere", {}, 0, 0.2, 3, SINGLE),
    Case("granite", {"attention_bias": True}, 1, 1e-4, 5, PAIRS),
]
case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)


@cache
def _model(family: str, settings: tuple[tuple[str, Any], ...] = ()) -> Any:
    return uw.load(tiny.model(family, 7, **dict(settings)))


def model(case: Case) -> Any:
    return _model(case.family, tuple(case.settings.items()))


def tokens(cluster: tuple[int, ...] = SINGLE) -> Tokens:
    ids = np.random.default_rng(0).integers(3, 50, (len(LENGTHS), LENGTHS.max()))
    return Tokens(ids, LENGTHS, np.array(cluster))


@cache
def rows(family: str, settings: tuple[tuple[str, Any], ...]) -> twin.Rows:
    return twin.Rows.of(_model(family, settings).hf, tokens().ids, LENGTHS)


def everywhere(case: Case) -> twin.Rows:
    return rows(case.family, tuple(case.settings.items()))


def counted(case: Case) -> twin.Rows:
    all_rows = everywhere(case)
    return all_rows.where(all_rows.place >= case.skip)


def run(case: Case, **options: Any) -> Result:
    settings = {"skip": case.skip, "floor": case.floor, "batch": case.batch, **options}
    return uw.scan(model(case), tokens(case.cluster), **settings)


def many(case: Case) -> Result:
    """A scan of so many prompts that some candidates are found."""
    return uw.scan(model(case), np.random.default_rng(2).integers(3, 50, (80, 6)))


def near(got: np.ndarray, values: np.ndarray, is_length: bool) -> bool:
    """Are these the quantiles of `values`, as exactly as the grid keeps them?"""
    if not len(values):
        return bool(np.isnan(got).all())
    if not is_length:
        values = np.where(np.abs(values) > LIMIT, np.copysign(np.inf, values), values)
    low, high = (np.quantile(values, QUANTILES, method=end) for end in ("lower", "higher"))
    unknown = np.isinf(low) | np.isinf(high)
    size = np.maximum(np.abs(low), np.abs(high))
    bound = size / 128 if is_length else 0.01 * np.maximum(1, size)
    with np.errstate(invalid="ignore"):
        want = np.quantile(values, QUANTILES)
        return (
            bool(np.all(unknown | (np.abs(got - want) <= bound)))
            and not np.isfinite(got[np.isinf(low) & np.isinf(high)]).any()
        )


@pytest.mark.promise("statistics")
@case
def test_quantiles_are_those_of_the_literal_ratios(case: Case) -> None:
    result, these = run(case), counted(case)
    assert list(result["quantile"].values) == QUANTILES
    assert list(result["node"].values) == list(result["writer"].values) == list(these.writes)
    assert list(result["location"].values) == list(these.states)
    beyond_floor = 0
    for writer in these.writes:
        keep = twin.kept(these, writer, case.floor)
        beyond_floor += int((~keep).sum())
        assert result["n_positions"].sel(writer=writer) == keep.sum()
        assert result["n_below_floor"].sel(writer=writer) == (~keep).sum()
        beyond = 0
        for name, parts in twin.ratios(these.where(keep), writer).items():
            got = result[name].sel(writer=writer).values.reshape(len(parts), -1)
            for quantiles, values in zip(got, parts.values(), strict=True):
                assert near(quantiles, values, "norm" in name), (name, writer)
                beyond += int((np.abs(values) > LIMIT).sum()) if name in ("pr", "level", "change") else 0
        assert result["n_beyond_grid"].sel(writer=writer) == beyond
    # The case is worth its while: a floor of a fifth or more leaves something out, and not everything.
    assert (beyond_floor > 0) == (case.floor > 0.1)


@pytest.mark.promise("statistics")
@case
def test_shares_are_the_literal_sums_with_their_standard_errors(case: Case) -> None:
    result, these, cluster = run(case), counted(case), np.array(case.cluster)
    energy = (these.states[these.end] ** 2).sum()
    start = {writer: these.states[these.after(writer)] for writer in these.writes}
    for writer, o in these.writes.items():
        here = result.data.sel(writer=writer)
        for node, e in these.writes.items():
            want = twin.share(these, e, writer, cluster)
            assert _both(here, "share", node=node) == pytest.approx(want, abs=2e-6, rel=1e-5)
        for location, x in these.states.items():
            want = twin.share(these, x, writer, cluster)
            assert _both(here, "level_share", location=location) == pytest.approx(want, abs=2e-6, rel=1e-5)
        change = these.states[these.end] - start[writer]
        assert _both(here, "change_share") == pytest.approx(
            twin.share(these, change, writer, cluster), abs=2e-6, rel=1e-5
        )
        assert float(here["moved"]) == pytest.approx(abs((change * o).sum()) / energy, abs=2e-6)
        assert here["right_after"] == these.after(writer)
    assert result["n_clusters"] == len(set(case.cluster))


@case
def test_where_writes_are_largest_is_said_once_for_a_prompt(case: Case) -> None:
    result, these = run(case), counted(case)
    for writer, o in these.writes.items():
        here, length = result.data.sel(writer=writer), np.linalg.norm(o, axis=-1)
        of_prompt = sorted((length[these.prompt == p].max() for p in np.unique(these.prompt)), reverse=True)
        assert here["largest_norm"].values == pytest.approx(of_prompt[:3], rel=1e-5, abs=1e-6)
        found = list(zip(here["largest_prompt"].values, here["largest_position"].values, strict=True))
        assert len({prompt for prompt, _ in found}) == 3
        for (prompt, place), norm, says in zip(
            found, here["largest_norm"].values, here["largest_text"].values, strict=True
        ):
            at = (these.prompt == prompt) & (these.place == place)
            assert length[at] == pytest.approx(norm, rel=1e-5, abs=1e-6)
            assert says.endswith(f"[{tokens().ids[prompt, place]}]")  # ids, where there is no tokenizer


def test_fewer_prompts_have_fewer_places() -> None:
    case = CASES[1]
    here = uw.scan(model(case), tokens().ids[:2, :1].repeat(4, 1), skip=1).data.isel(writer=0)
    assert (here["largest_prompt"].values >= 0).tolist() == [True, True, False]
    assert np.isnan(here["largest_norm"].values).tolist() == [False, False, True]
    assert here["largest_text"].values[2] == ""


def _both(here: xr.Dataset, name: str, **place: str) -> tuple[float, float]:
    return float(here[name].sel(place)), float(here[f"{name}_se"].sel(place))


@case
def test_skipped_positions_are_reported_apart(case: Case) -> None:
    result, all_rows = run(case), everywhere(case)
    skipped = all_rows.where(all_rows.place < case.skip)
    for writer, o in skipped.writes.items():
        here, energy = result.data.sel(writer=writer), (o**2).sum()
        size = np.sqrt(energy / len(o)) if case.skip else np.nan
        assert float(here["skipped_norm"]) == pytest.approx(size, rel=1e-5, nan_ok=True)
        for location, x in skipped.states.items():
            want = (x * o).sum() / energy if case.skip else np.nan
            got = float(here["skipped_share"].sel(location=location))
            assert got == pytest.approx(want, abs=2e-6, rel=1e-5, nan_ok=True)


@case
def test_what_is_derived_agrees_with_what_it_is_derived_from(case: Case) -> None:
    data = many(case).data
    assert len(np.unique(data["opposed_by"])) > 1
    for writer in data["writer"].values:
        here = data.sel(writer=writer)
        after = here["level"].sel(location=str(here["right_after"].values))
        np.testing.assert_array_equal(here["level_after"].values, after.values)
        assert here["level_end"].equals(here["level"].isel(location=-1, drop=True))
        assert bool(here["material"]) == (float(here["relative_norm"].sel(quantile=0.5)) >= 0.05)
        erasers = here["share"][here["eraser"].values].sortby(here["share"][here["eraser"].values])
        assert str(here["opposed_by"].values).split() == list(erasers["node"].values)


# In words: (level right after, level at the end, its error, change, its error, median dilution) with t = 2.
READINGS = [
    ((1.0, 0.5, 0.1, -0.5, 0.1, 0.0), "falls 1.00 → 0.50"),
    ((1.0, 0.5, 0.1, -0.5, 0.3, 0.0), "level 1.00 → 0.50"),
    ((1.0, -0.5, 0.1, -1.5, 0.1, 0.0), "reverses 1.00 → -0.50"),
    ((1.0, -0.5, 0.3, -1.5, 0.1, 0.0), "falls 1.00 → -0.50"),
    ((-1.0, -2.0, 0.1, -1.0, 0.1, 0.0), "falls -1.00 → -2.00"),
    ((1.0, 1.5, 0.1, 0.5, 0.1, 0.0), "rises 1.00 → 1.50"),
    ((1.0, 1.5, 0.1, 0.5, 0.2, 0.0), "level 1.00 → 1.50"),
    ((1.0, 1.0, 0.1, 0.0, 0.1, -1.0), "level 1.00 → 1.00, diluted ×2.7"),
    ((1.0, 1.0, 0.1, 0.0, 0.1, -0.6), "level 1.00 → 1.00"),
    ((np.nan, np.nan, np.nan, np.nan, np.nan, np.nan), "never writes"),
]


@pytest.mark.promise("erased")
@pytest.mark.parametrize(("numbers", "words"), READINGS)
def test_a_level_is_read_with_its_interval_and_never_as_erased(numbers: tuple[float, ...], words: str) -> None:
    assert method._in_words(*numbers, 2.0) == words


@pytest.mark.parametrize("buckets", [1, 3, 9])
@case
def test_the_position_part_is_the_literal_sum_over_pairs_of_prompts(
    case: Case, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "_buckets", lambda *_: buckets)
    result, these = run(case), counted(case)
    bucket = np.arange(LENGTHS.max()) * buckets // LENGTHS.max()
    writers = list(these.writes)[:: 1 if buckets == 9 else 4]
    for writer in writers:
        for node in these.writes:
            got = float(result["share_position"].sel(writer=writer, node=node))
            assert got == pytest.approx(twin.position_part(these, node, writer, bucket), abs=2e-6, rel=1e-5)


def test_a_small_budget_makes_buckets_and_none_leaves_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _model("llama")
    assert positions._buckets(lm, 9, 1) == 9
    monkeypatch.setattr(positions, "_BYTES", 0)
    assert positions._buckets(lm, 9, 1) == 1


@case
def test_shares_add_up_to_levels_and_their_parts_to_shares(case: Case) -> None:
    data = run(case).data
    held = xr.DataArray(model(case).holds().numpy(), dims=("location", "node"), coords=[data["location"], data["node"]])
    np.testing.assert_allclose((data["share"] * held).sum("node").T, data["level_share"].T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(data["share_position"] + data["share_token"], data["share"], rtol=1e-14, atol=1e-14)
    assert np.allclose([data["share"].sel(writer=w, node=w) for w in data["writer"].values], 1)


class Kept(gram.GramTally):
    """A tally that stays to be looked at."""

    last: gram.GramTally

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        Kept.last = self


def counts(monkeypatch: pytest.MonkeyPatch, lm: Any, these: Tokens, **options: Any) -> tuple[list[np.ndarray], Result]:
    """All integers that a scan counts, and its result."""
    monkeypatch.setattr(method, "GramTally", Kept)
    result = uw.scan(lm, these, **{"floor": 0.1, **options})
    return [part.counts.copy() for part in (Kept.last.ratios, Kept.last.sizes, Kept.last.dilution)], result


def same(left: tuple[list[np.ndarray], Result], right: tuple[list[np.ndarray], Result]) -> None:
    """The same integers, and the same sums to rounding."""
    for a, b in zip(left[0], right[0], strict=True):
        assert a.sum() > 0
        assert np.array_equal(a, b)
    for name in ("share", "share_se", "share_position", "level_share", "change_share", "moved", "skipped_share"):
        np.testing.assert_allclose(left[1][name], right[1][name], rtol=1e-9, atol=1e-7)


INVARIANT = pytest.mark.parametrize("family", ["gpt2", "falcon", "stablelm"])


@pytest.mark.promise("batches")
@INVARIANT
@pytest.mark.parametrize("batch", [2, 4, 5, 6, 100])
def test_counts_do_not_depend_on_the_batch_size(family: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = _model(family)
    same(counts(monkeypatch, lm, tokens(), batch=1), counts(monkeypatch, lm, tokens(), batch=batch))


@INVARIANT
@pytest.mark.parametrize("size", [1, 2**16, 2**40])
def test_counts_do_not_depend_on_the_chunk_size(family: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = counts(monkeypatch, _model(family), tokens())
    monkeypatch.setattr(gram, "_CHUNK_BYTES", size)
    same(before, counts(monkeypatch, _model(family), tokens()))


@pytest.mark.promise("batches")
@INVARIANT
def test_counts_do_not_depend_on_the_order_of_prompts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    these, order = tokens(), [3, 0, 5, 4, 2, 1]
    turned = Tokens(these.ids[order], these.lengths[order], np.arange(6))
    lm = _model(family)
    same(counts(monkeypatch, lm, these, batch=2), counts(monkeypatch, lm, turned, batch=2))


@pytest.mark.promise("memory")
@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 10), (2, [2, 2, 1] * 2), (3, [3, 2] * 2)])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_running_out_of_memory_halves_the_batch_and_changes_no_count(
    most: int, sizes: list[int], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, real, seen = _model("gpt2"), stream.run, []
    before = counts(monkeypatch, lm, tokens(), batch=5)

    def small(lm: Any, ids: torch.Tensor, *rest: Any) -> Any:
        if len(ids) > most:
            raise error
        seen.append(len(ids))
        return real(lm, ids, *rest)

    monkeypatch.setattr(stream, "run", small)
    same(before, counts(monkeypatch, lm, tokens(), batch=5))
    assert seen == sizes


@pytest.mark.promise("memory")
def test_a_prompt_that_does_not_fit_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stream.run

    def full(lm: Any, ids: torch.Tensor, *rest: Any) -> Any:
        if (ids[:, 0] == int(tokens().ids[3, 0])).any():
            raise torch.OutOfMemoryError("full")
        return real(lm, ids, *rest)

    monkeypatch.setattr(stream, "run", full)
    with pytest.raises(NumericError, match="prompt 3 does not fit into memory"):
        uw.scan(_model("gpt2"), tokens(), batch=2)


def test_another_error_than_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(stream, "run", broken)
    with pytest.raises(RuntimeError, match="planted"):
        uw.scan(_model("gpt2"), tokens())


@case
def test_some_writers_give_the_same_rows_as_all(case: Case) -> None:
    all_ = run(case)
    names = list(all_["writer"].values[all_["n_positions"] > 0])[::2]
    some, full = run(case, writers=names[::-1]), all_.data.sel(writer=names)
    assert list(some["writer"].values) == names
    for name in ("pr", "level", "change", "norm", "n_positions", "n_below_floor"):
        assert some[name].equals(full[name])
    for name in ("share", "share_se", "share_position", "share_token", "moved", "level_share", "skipped_share"):
        np.testing.assert_allclose(some[name], full[name], rtol=1e-9, atol=1e-12)


@pytest.mark.promise("batches")
def test_prompts_with_a_mask_are_those_without_their_padding() -> None:
    lm, these = _model("gpt_neox"), tokens()
    for left in (False, True):
        ids, mask = np.full_like(these.ids, 2), np.zeros_like(these.ids)
        for prompt, length in enumerate(LENGTHS):
            place = slice(-length, None) if left else slice(length)
            ids[prompt, place], mask[prompt, place] = these.ids[prompt, :length], 1
        assert uw.scan(lm, torch.tensor(ids), mask=torch.tensor(mask)).data.equals(uw.scan(lm, these).data)


def test_several_texts_stand_side_by_side() -> None:
    lm, these = _model("llama"), tokens()
    half = Tokens(these.ids[:3], LENGTHS[:3], np.arange(3))
    both = uw.scan(lm, {"whole": these, "half": half})
    assert list(both["text"].values) == ["whole", "half"]
    for name, part in (("whole", these), ("half", half)):
        alone = uw.scan(lm, part).data
        for variable in alone:
            xr.testing.assert_equal(both[variable].sel(text=name, drop=True), alone[variable])


@pytest.mark.promise("statistics")
def test_the_standard_error_is_that_of_a_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(1)
    lm, ids = _model("gpt2"), rng.integers(3, 50, (60, 6))
    result = uw.scan(lm, torch.tensor(ids), writers=["L0H1"], skip=0)
    these = twin.Rows.of(lm.hf, ids, [6] * 60)
    o = these.writes["L0H1"]
    draws = rng.integers(0, 60, (4000, 60))
    for node in ("MLP0", "L1H0", "pos_embed"):
        y, x = ((these.writes[name] * o).sum(-1).reshape(60, 6).sum(1) for name in (node, "L0H1"))
        spread = (y[draws].sum(1) / x[draws].sum(1)).std()
        assert float(result["share_se"].sel(node=node, writer="L0H1")) == pytest.approx(spread, rel=0.15)


def test_one_prompt_has_no_interval_and_names_no_eraser() -> None:
    result = uw.scan(_model("gpt2"), torch.tensor(tokens().ids[:1]))
    assert result["share_se"].isnull().all()
    assert not result["eraser"].any()
    assert all("no interval" in words for words in result["in_words"].values)


def benjamini_hochberg(p: np.ndarray, rate: float) -> np.ndarray:
    """Which hypotheses are rejected: the k smallest p, for the largest k with p_(k) ≤ k/m · rate."""
    m, order = len(p), np.argsort(p)
    passing = [k for k in range(1, m + 1) if p[order[k - 1]] <= k / m * rate]
    rejected = np.zeros(m, dtype=bool)
    rejected[order[: max(passing, default=0)]] = True
    return rejected


@pytest.mark.promise("planted")
@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_those_of_a_hand_written_benjamini_hochberg(seed: int) -> None:
    rng = np.random.default_rng(seed)
    share, error, can_read = rng.normal(-0.05, 0.1, (7, 9)), rng.uniform(0.005, 0.05, (7, 9)), rng.random((7, 9)) < 0.7
    share[0, 0], error[1, 1] = np.nan, np.nan
    found = method.candidates(share, error, can_read, 11)
    tested = can_read & ~np.isnan(share + error)
    want = np.zeros_like(tested)
    want[tested] = benjamini_hochberg(stats.t(11).cdf((share[tested] + 0.02) / error[tested]), 0.05)
    assert np.array_equal(found, want & (share < -0.02))
    assert 0 < found.sum() < tested.sum()


@case
def test_only_a_node_that_can_read_a_write_is_named_its_eraser(case: Case) -> None:
    lm, these = model(case), everywhere(case)
    can_read = np.array([[these.reads(node, writer) for node in these.writes] for writer in these.writes])
    parts = [parse_node(name) for name in these.writes]
    assert can_read.tolist() == [[reads(node, writer, lm.parallel) for node in parts] for writer in parts]
    result = many(case)
    share, error = result["share"].values, result["share_se"].values
    want = np.zeros_like(can_read)
    p = stats.t(79).cdf((share + 0.02) / np.where(error > 0, error, 1))
    want[can_read] = benjamini_hochberg(p[can_read], 0.05)
    assert np.array_equal(result["eraser"].values, want & (share < -0.02))
    assert want.any()


def test_a_node_that_cannot_read_is_no_eraser_however_clear_its_share() -> None:
    share, error = np.full((1, 2), -0.9), np.full((1, 2), 1e-6)
    assert method.candidates(share, error, np.array([[True, False]]), 30).tolist() == [[True, False]]


def silent_head() -> Any:
    hf = tiny.model("llama", 7, num_attention_heads=4, head_dim=8)
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
    return uw.load(hf)


def test_a_named_writer_that_never_writes_is_an_error_and_an_unnamed_one_is_noted() -> None:
    lm = silent_head()
    with pytest.raises(NumericError, match="L1H1 never writes"):
        uw.scan(lm, tokens(), writers=["L0H0", "L1H1"])
    result = uw.scan(lm, tokens())
    assert result["n_positions"].sel(writer="L1H1") == 0
    assert str(result["in_words"].sel(writer="L1H1").values) == "never writes"
    assert result["pr"].sel(writer="L1H1").isnull().all()
    assert result["pr"].drop_sel(writer="L1H1").notnull().all()


@pytest.mark.promise("finite")
def test_a_value_that_is_not_finite_is_named_with_its_node_prompt_and_position() -> None:
    hf = tiny.model("llama", 7, tie_word_embeddings=False)
    lm, ids = uw.load(hf), torch.tensor(tokens().ids)
    ids[3, 5] = 2
    with torch.no_grad():
        hf.model.embed_tokens.weight[2] = float("nan")
    for batch in (1, 4):
        # The NaN of a position spreads to earlier ones as well, through the zeros of the attention pattern.
        with pytest.raises(NumericError, match=r"not finite: embed \(input\) at prompt 3, position 5"):
            uw.scan(lm, ids, batch=batch)
    with torch.no_grad():
        hf.model.embed_tokens.weight[2] = 0.1
        hf.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NumericError, match=r"not finite: MLP1 \(layer 1\) at prompt 0, position"):
        uw.scan(lm, ids)


@pytest.mark.parametrize("writer", ["L9H0", "L0H9", "pos_embed", "L0.bias", "MLP7", "resid_mid0", "head 3", ""])
def test_an_unknown_writer_is_an_error(writer: str) -> None:
    with pytest.raises(NodeError):
        uw.scan(_model("mistral"), tokens(), writers=[writer])


@pytest.mark.parametrize("skip", [-1, 9, 100])
def test_skipping_everything_is_an_error(skip: int) -> None:
    with pytest.raises(NumericError, match="skip leaves no position"):
        uw.scan(_model("gpt2"), tokens(), skip=skip)


@pytest.mark.promise("tokens")
def test_ids_that_the_model_cannot_read_are_an_error() -> None:
    lm = _model("gpt2")
    for bad in (-1, lm.vocabulary):
        with pytest.raises(TokensError, match="outside the model's vocabulary"):
            uw.scan(lm, torch.full((2, 5), bad))
    with pytest.raises(TokensError, match="longer than the model's context"):
        uw.scan(lm, torch.ones(2, lm.context + 1, dtype=torch.long))


def test_progress_is_told_batch_by_batch() -> None:
    told: list[Any] = []
    uw.scan(_model("gpt2"), tokens(), batch=4, listener=told.append)
    assert [(step.done, step.total, step.tokens) for step in told] == [(4, 6, 29), (6, 6, 36)]


@pytest.mark.parametrize(
    "bad",
    [{"batch": 0}, {"batch": -1}, {"floor": -1.0}, {"floor": float("nan")}, {"floor": 1.0}, {"skip": True}],
    ids=str,
)
def test_a_setting_that_means_nothing_is_refused(bad) -> None:
    with pytest.raises(NumericError, match=next(iter(bad))):
        uw.scan(view(tiny.model("gpt2")), torch.ones(2, 5, dtype=torch.long), **bad)


def test_no_text_a_second_mask_and_scattered_clusters_are_refused() -> None:
    lm, ids = view(tiny.model("gpt2")), np.ones((3, 5), dtype=np.int64)
    with pytest.raises(TokensError, match="no text"):
        uw.scan(lm, {})
    with pytest.raises(TokensError, match="padding already"):
        uw.scan(lm, from_ids(ids), mask=ids)
    with pytest.raises(TokensError, match="not neighbours"):
        uw.scan(lm, Tokens(ids, np.full(3, 5), np.array([0, 1, 0])))
