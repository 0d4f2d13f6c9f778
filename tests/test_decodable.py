"""How much of a write's token part is still in the stream? The streamed ridge against rows that are really stacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
import unwrite as uw
from unwrite.model.fold import fold
from unwrite.model.load import view
from unwrite.model.planted import planted
from unwrite.model.view import Model
from unwrite.prompts.tokens import Tokens
from unwrite.report.verified import sentence, trajectory
from unwrite.run.loop.stream import batches
from unwrite.run.replay import clean as replay
from unwrite.run.tally import decodable as decode


def tokens_of(lm: Model, lengths: list[int], cluster: list[int]) -> Tokens:
    shape = (len(lengths), max(lengths))
    ids = torch.randint(lm.vocabulary, shape, generator=torch.Generator().manual_seed(3)).numpy()
    return Tokens(ids, np.array(lengths), np.array(cluster))


def stacked(lm: Model, tokens: Tokens, writer: str, skip: int) -> list[float]:
    """Held-out R² by location: all rows in memory, the write in full, ridge as rows appended to the regression."""
    run = replay.clean(lm, torch.from_numpy(tokens.ids), fold(lm))
    write = torch.cat([*run.written(run.record)])[lm.nodes.index(writer)].double().numpy()
    documents = list(dict.fromkeys(tokens.cluster.tolist()))
    parity = [documents.index(document) % 2 for document in tokens.cluster.tolist()]
    groups: list[list[tuple[list[int], int]]] = [[], []]
    for half in (0, 1):
        for place in range(skip, tokens.length):
            there = [p for p in range(len(tokens)) if parity[p] == half and tokens.lengths[p] > place]
            groups[half] += [(there, place)] if len(there) >= 2 else []
    y = [token_part(write, half) for half in groups]
    return [
        score([token_part(run.record.stream[state].double().numpy(), half) for half in groups], y)
        for state in lm.states
    ]


def token_part(vectors: np.ndarray, groups: list[tuple[list[int], int]]) -> np.ndarray:
    return np.concatenate([vectors[there, place] - vectors[there, place].mean(0) for there, place in groups])


def score(x: list[np.ndarray], y: list[np.ndarray]) -> float:
    error = energy = 0.0
    for train, test in ((0, 1), (1, 0)):
        width = x[train].shape[1]
        ridge = decode.RIDGE * (x[train] ** 2).sum() / width
        rows = np.concatenate([x[train], np.sqrt(ridge) * np.eye(width)])
        found = np.linalg.lstsq(rows, np.concatenate([y[train], np.zeros((width, y[train].shape[1]))]))[0]
        error += ((y[test] - x[test] @ found) ** 2).sum()
        energy += (y[test] ** 2).sum()
    return float(1 - error / energy)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("family", "writer"),
    [("gpt2", "L0H1"), ("llama", "L0H0"), ("gpt_neox", "MLP0"), ("gemma2", "L1H0"), ("bloom", "embed")],
)
def test_it_is_the_ridge_of_rows_that_are_stacked(family, writer, batch) -> None:
    lm = view(tiny.model(family, 3))
    tokens = tokens_of(lm, [32, 32, 27, 32, 12, 32, 30], [5, 5, 6, 7, 7, 8, 9])
    result = uw.verify(lm, tokens, writer, skip=2, batch=batch)
    np.testing.assert_allclose(result["decodable"], stacked(lm, tokens, writer, 2), rtol=0, atol=1e-6)
    assert result.data.attrs["decodable_note"] == ""


def test_it_is_what_the_ratio_of_signal_to_noise_says() -> None:
    """x = noise + g · w, with σ² = 1 and 4 in each direction: R² = 4g² / (4g² + 1). Erased to a tenth, hardly any."""
    lm = view(tiny.model("llama", 2, hidden_size=16, num_attention_heads=2, num_hidden_layers=2))
    tokens, node = tokens_of(lm, [200] * 40, list(range(40))), lm.parts[1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 4, generator=generator, dtype=torch.float64)).Q
    found = decode.Decoding(lm, tokens, node, 0, basis)
    gains = dict(zip(lm.states, (0.0, 1.0, 0.5, 0.1, 0.0), strict=True))
    for batch in batches(tokens, 10):
        said, noise = (torch.randn(10, 200, width, generator=generator, dtype=torch.float64) for width in (4, 16))
        place = 10 * torch.arange(200)[:, None]  # what only the position says is no part of it
        write = (2 * said + place) @ basis.t()
        stream = {state: noise + (2 * gain * said - 9 * place) @ basis.t() for state, gain in gains.items()}
        found.add(found.measure(batch, stream, write, batch.counted))
    expected = [4 * gain**2 / (4 * gain**2 + 1) for gain in gains.values()]
    np.testing.assert_allclose(found.found(), expected, atol=0.01)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def known(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """decodable by location of planted writers: of the token itself, and of the token before it."""
    truth = planted(request.param, dtype=torch.float64)
    lm = view(truth.hf, truth.tokenizer)
    tokens = tokens_of(lm, [32] * 32, list(range(32)))
    return {writer: uw.verify(lm, tokens, writer)["decodable"].values for writer in ("L0H0", "L0H5")}


def test_a_token_before_this_one_is_decodable_once_it_was_written(known) -> None:
    before, *after = known["L0H5"]
    assert before < 0.05
    assert min(after) > 0.9


def test_an_erased_vector_stays_decodable_where_what_it_says_is_written_elsewhere_too(known) -> None:
    """The write is nine tenths gone, and copied the token's code, which is in the stream from start to end."""
    assert known["L0H0"].min() > 0.9


def test_what_a_random_model_wrote_fades() -> None:
    lm = view(tiny.model("llama", 2, hidden_size=48, num_attention_heads=4, num_hidden_layers=3))
    before, after, *later = uw.verify(lm, tokens_of(lm, [24] * 40, list(range(40))), "L0H0")["decodable"].values
    assert before < 0.1
    assert after > 0.8
    assert later[-1] < 0.6 * after


def test_it_says_why_it_says_nothing() -> None:
    lm = view(tiny.model("gpt2", 3))
    for lengths, cluster in (([6] * 3, [0, 1, 2]), ([6] * 6, [0] * 6), ([6, 6, 2, 2], [0, 1, 2, 3])):
        result = uw.verify(lm, tokens_of(lm, lengths, cluster), "L0H0", skip=2 if lengths[-1] == 2 else 1)
        assert result["decodable"].isnull().all()
        assert "held-out" in result.data.attrs["decodable_note"]
        assert "is not measurable: two prompts" in sentence(result)
        assert {line[-1] for line in trajectory(result)} == {"–"}


def test_a_map_with_as_many_channels_as_rows_is_not_measurable() -> None:
    """Of two prompts in each half, one row less is none, and one more is a number."""
    lm = view(tiny.model("gpt2", 3))
    for length in (lm.d_model // 2 + 1, lm.d_model // 2 + 2):
        result = uw.verify(lm, tokens_of(lm, [length] * 4, [*range(4)]), "L0H0", skip=1)
        enough = 2 * (length - 1) > lm.d_model
        assert bool(result["decodable"].notnull().any()) == enough
        said = f"not measurable: {lm.d_model} rows of each half of the documents, {lm.d_model} channels"
        assert (said in sentence(result)) == (not enough)


def test_a_write_without_a_token_part_has_none_to_decode() -> None:
    lm = view(tiny.model("gpt2", 3))
    assert uw.verify(lm, tokens_of(lm, [8] * 6, list(range(6))), "pos_embed")["decodable"].isnull().all()


def test_as_many_locations_as_memory_has_room_for(monkeypatch) -> None:
    lm = view(tiny.model("gpt2", 3, num_hidden_layers=3))
    tokens = tokens_of(lm, [24] * 6, list(range(6)))
    full = uw.verify(lm, tokens, "L1H0").data
    each = 32 * lm.d_model * (lm.d_model + lm.head_dim + 24)
    for room in (0, 1, 2, 3):
        monkeypatch.setattr(decode, "_BYTES", room * each)
        some = uw.verify(lm, tokens, "L1H0").data
        there = some["decodable"].notnull().values
        assert there.sum() == room
        np.testing.assert_array_equal(some["decodable"].values[there], full["decodable"].values[there])
        assert there[-1] == (room > 0)
        assert there[lm.locations.index("resid_mid1")] == (room > 1)
        assert f"{len(lm.states) - room} locations left out" in some.attrs["decodable_note"]


def test_on_a_real_model_what_a_write_says_fades_while_its_level_rises(shared) -> None:
    """stories260K, L0H2 (facts: measuring erasure, §8): the level rises, the held-out token part fades."""
    lm = uw.load(shared / "models" / "stories260K")
    tokens = uw.text(shared / "corpus" / "tinystories.txt", lm.tokenizer, n=12, length=256)
    data = uw.verify(lm, tokens, "L0H2").data
    after, end = data.sel(location="resid_mid0"), data.isel(location=-1)
    assert float(end["level_share"]) > 2 * float(after["level_share"])
    assert float(after["decodable"]) > 0.5
    assert float(end["decodable"]) < 0.3
