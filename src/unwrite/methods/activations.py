"""What is at some sites over a whole corpus? Recorded for probes and autoencoders, in one file, in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from unwrite.errors import NodeError, several
from unwrite.model.load import provenance
from unwrite.model.view import Model
from unwrite.nodes import Site
from unwrite.prompts.tokens import Tokens
from unwrite.result import Result, build, read
from unwrite.run.edit.sites import all_named
from unwrite.run.edit.trace import recorded
from unwrite.run.loop.checkpoint import Arrays
from unwrite.run.loop.job import Job, opened
from unwrite.run.loop.large import LargeFile
from unwrite.run.loop.ledger import Ledger
from unwrite.run.loop.rows import Rows
from unwrite.run.loop.stream import Batch, Listener, admit, batch_size, parts, stream


def activations(
    lm: Model,
    tokens: Any,
    sites: str | Iterable[object],
    out: Job | str | Path | None = None,
    *,
    mask: Any = None,
    bos: int | bool | None = None,
    batch: int | None = None,
    listener: Listener | None = None,
) -> Result:
    """What is at every site, at every position of every prompt.

    Arguments: `tokens`, `mask`, `bos`, `batch` as in `uw.scan`; `sites` one name or several, of any site of `uw.trace`
    or of several at once ("resid_post*", "L2.z", "MLP*.act"); `out` a folder in which batch after batch is written into
    one netCDF file, `result.nc`, so that no more than a batch is in memory: however the run was stopped, the same call
    goes on from there, to the same bytes (or a `uw.Job`); without it everything is in memory.
    Returns a Result with a variable for each site, [prompt, position, d] (a pattern: [prompt, query, key]), in float32
    or better, NaN where a prompt is shorter; and by prompt its `id` at every position, `length` and `cluster`. With
    `out` it is read from the file only where it is looked at, as by `uw.read(out)`: `found["resid_post2"][:100]`. Any
    reader of netCDF or HDF5 opens the file.
    Raises NodeError for sites that are not there, NumericError for a value that is no number, TokensError as `uw.scan`,
    ResultError where the folder cannot be written or holds another run.

    Example: `uw.activations(lm, uw.text("book.txt", lm.tokenizer), "resid_post*", "acts")["resid_post2"]`
    """
    tokens, chosen = admit(lm, tokens, mask, 0, bos), _sites(lm, sites)
    size = batch_size(lm, tokens, batch)
    settings = {"sites": [*map(str, chosen)], "batch": batch}
    with opened(out, listener) as job:
        if done := job.begin("activations", lm, {"": tokens.hash}, settings):
            return done
        asked = _Asked(lm, tokens, chosen)
        whole = build("activations", asked.small(), settings, provenance(lm), {"": tokens.about()})
        if job.folder is None:
            tally = Rows(asked.measured)
            stream(lm, tokens, tally, size, "activations", listener, job)
            found = {
                name: xr.Variable(axes, tally.whole()[name], about) for name, (axes, _, about) in asked.large.items()
            }
            return Result(whole.data.assign(found))
        file = LargeFile(Path(job.folder), whole.data.assign_attrs(job.mark("activations")), asked.large, asked.sizes)
        with closing(file):
            stream(lm, tokens, _Written(asked, file), size, "activations", listener, job)
            file.finish()
        return read(job.folder)


def _sites(lm: Model, sites: Any) -> tuple[Site, ...]:
    listed = [sites] if isinstance(sites, str) else several("sites are names", sites, "such as resid_post*", NodeError)
    if not listed:
        raise NodeError("no site was named", expected="names such as resid_post2, L2.z or MLP*")
    return tuple(dict.fromkeys(site for name in listed for site in all_named(lm, name)))


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is recorded of which prompts."""

    lm: Model
    tokens: Tokens
    sites: tuple[Site, ...]

    def measured(self, batch: Batch) -> Arrays:
        """By the name of each site, [prompt, position, d]."""
        trace, found = recorded(self.lm, batch.ids, self.sites), {}
        for site in self.sites:
            value = trace[site].to(self.lm.device, self.lm.compute_dtype)
            real = batch.counted.to(value.device)
            batch.require_numbers(value.isfinite().all(-1) | ~real, f"the activation at {site}")
            value = value.masked_fill(~real[..., None], torch.nan)
            if site.kind == "pattern":
                value = value.masked_fill(~real[:, None], torch.nan)
            found[str(site)] = value[: batch.real].cpu().numpy()
        return found

    @cached_property
    def large(self) -> Mapping[str, tuple[tuple[str, ...], np.dtype, dict[str, str]]]:
        """Axes, dtype, and unit and equation of every site."""
        dtype = np.dtype(str(self.lm.compute_dtype).removeprefix("torch."))
        about = {"units": "activation", "equation": "what is at the site in a clean run"}
        one = recorded(self.lm, torch.from_numpy(self.tokens.ids[:1, :1]), self.sites)
        return {str(site): (self._axes(site, one[site].shape[-1]), dtype, about) for site in self.sites}

    def _axes(self, site: Site, width: int) -> tuple[str, ...]:
        if site.kind == "pattern":
            return ("prompt", "query", "key")
        return ("prompt", "position", "d_model" if width == self.lm.d_model else f"d_{width}")

    @property
    def sizes(self) -> dict[str, int]:
        """Of all axes."""
        length, known = self.tokens.length, {"d_model": self.lm.d_model}
        known |= dict.fromkeys(("position", "query", "key"), length) | {"prompt": len(self.tokens)}
        axes = {axis for axes, *_ in self.large.values() for axis in axes}
        return {axis: known[axis] if axis in known else int(axis.removeprefix("d_")) for axis in sorted(axes)}

    def small(self) -> xr.Dataset:
        """What is known of the prompts beforehand."""
        there = np.arange(self.tokens.length) < self.tokens.lengths[:, None]
        variables = {
            "id": (("prompt", "position"), np.where(there, self.tokens.written, -1)),
            "length": ("prompt", self.tokens.lengths), "cluster": ("prompt", self.tokens.cluster),
        }  # fmt: skip
        axes = {"prompt": np.arange(len(self.tokens)), "position": np.arange(self.tokens.length)}
        return xr.Dataset(variables, axes)


class _Written:
    """What is recorded goes to a file, and nothing of it stays."""

    def __init__(self, asked: _Asked, file: LargeFile):
        self._asked, self._file = asked, file
        self.kept = Ledger({"file": file})

    def step(self, batch: Batch) -> None:
        """Record the prompts of one batch, in as many parts as memory asks for."""
        for rows, found in parts(batch.part(slice(0, batch.real)), self._asked.measured):
            self._file.write(batch.first + rows.start, found)
