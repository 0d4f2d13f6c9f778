"""Is what is recorded of a corpus what a trace shows prompt by prompt, and does a killed run end in the same bytes?"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

import unwrite as uw
from executed import weights
from unwrite.errors import NodeError, NumericError, ResultError
from unwrite.model.load import view
from unwrite.model.view import Model

SITES = ["resid_post*", "L1.z", "L0H1.pattern", "MLP1.act", "L0KV0.k", "embed"]
LENGTHS = (6, 3, 5, 6, 1)
IDS = torch.randint(3, 50, (len(LENGTHS), 6), generator=torch.Generator().manual_seed(2))
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]


@cache
def lm() -> Model:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return view(weights("llama", 2, torch.float32, **settings))


def recorded(out: Any = None, **more: Any) -> uw.Result:
    return uw.activations(lm(), IDS, SITES, out, mask=MASK, batch=1, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("whole") / "acts"
    recorded(place)
    return place


def test_it_is_what_a_trace_shows(whole: Path) -> None:
    found = uw.read(whole)
    names = [name for name in map(str, found.data.data_vars) if name not in ("id", "length", "cluster")]
    assert len(names) == 2 + 4 + 4
    for prompt, length in enumerate(LENGTHS):
        with torch.no_grad(), uw.trace(lm(), *names) as t:
            lm().hf(IDS[prompt : prompt + 1, :length], use_cache=False)
        for name in names:
            one, want = found[name][prompt].values, t[name][0].numpy()
            np.testing.assert_allclose(one[tuple(map(slice, want.shape))], want, rtol=1e-5, atol=1e-6)
            assert np.isfinite(one).sum() == want.size
    assert found["length"].values.tolist() == list(LENGTHS)
    assert found["id"].values[1].tolist() == [*IDS[1, :3].tolist(), -1, -1, -1]


def test_in_memory_it_is_the_same_and_a_file_is_read_where_it_is_looked_at(whole: Path) -> None:
    found = uw.read(whole)
    assert not any(part.variable._in_memory for name, part in found.data.items() if name != "id" and part.ndim > 2)
    xr.testing.assert_identical(recorded().data.drop_attrs(), found.data.load().drop_attrs())
    with h5py.File(whole / "result.nc") as plain:
        np.testing.assert_array_equal(np.asarray(plain["MLP1.act"]), found["MLP1.act"].values)


@pytest.mark.promise("resumed")
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_run_that_is_killed_ends_in_the_same_bytes(at: int, whole: Path, tmp_path: Path) -> None:
    first, image, steps = tmp_path / "first", tmp_path / "image", []

    def copied(step: Any) -> None:
        steps.append(step)
        if step.done == at + 1:
            shutil.copytree(first, image, ignore=shutil.ignore_patterns("*.lock"))

    recorded(uw.Job(first, every=0.0), listener=copied)
    assert not (image / "result.nc").exists()
    done: list[int] = []
    recorded(image, listener=lambda step: done.append(step.done))
    assert min(done) == at + 2
    assert [file.name for file in image.iterdir()] == ["result.nc"]
    assert (image / "result.nc").read_bytes() == (whole / "result.nc").read_bytes()


def test_a_folder_that_is_done_is_read_and_another_run_is_refused(whole: Path, tmp_path: Path) -> None:
    before = (whole / "result.nc").stat().st_mtime_ns
    again = recorded(whole)
    assert (whole / "result.nc").stat().st_mtime_ns == before
    np.testing.assert_array_equal(again["L1H0.z"], recorded()["L1H0.z"])
    with pytest.raises(ResultError, match="another run"):
        uw.activations(lm(), IDS, ["embed"], whole, mask=MASK)
    for spoil in (lambda data: data[:-1], lambda data: data[:-1000], lambda data: data[:4000] + b"x" + data[4001:]):
        (tmp_path / "result.nc").write_bytes(spoil((whole / "result.nc").read_bytes()))
        with pytest.raises(ResultError, match="not a readable result"):
            uw.read(tmp_path)


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    for sites in ([], "L9.z", ["nonsense"]):
        with pytest.raises(NodeError):
            uw.activations(lm(), IDS, sites, tmp_path / "acts")
    spoilt = view(weights("llama", 2, torch.float32, num_hidden_layers=2, num_attention_heads=4))
    with torch.no_grad():
        spoilt.hf.get_input_embeddings().weight[int(IDS[1, 2])] = torch.nan
    with pytest.raises((NumericError, uw.errors.ModelError), match=r"not finite|not exact"):
        uw.activations(spoilt, IDS, "resid_post0", tmp_path / "acts", mask=MASK)
    assert not (tmp_path / "acts" / "result.nc").exists()
