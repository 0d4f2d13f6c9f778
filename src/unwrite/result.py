"""What did a method find, and how can it be checked and repeated? Named numbers with provenance; knows no torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import xarray as xr

from unwrite.axes import gridded, placed
from unwrite.errors import ResultError, plain, shown
from unwrite.files import possible, version, write
from unwrite.nodes import parse_location, parse_node, parse_site

if TYPE_CHECKING:
    import altair as alt

SCHEMA = 1
QUANTILES = (0.125, 0.25, 0.5, 0.75, 0.875)
FILE = "result.nc"
# The axes of a table's rows, where they are not writers or nodes.
_ROWS = {
    "dla": ("prompt", "node"), "adversarial": ("hit",), "corpus_dla": ("path",), "reproduce": ("claim",),
    "effects": ("pair", "node", "position", "role"), "compare": ("pair", "node", "position", "role"),
    "agree": ("reading", "group"), "paths": ("pair", "sender", "receiver", "role"), "bound": ("pair",),
    "lens": ("prompt", "location", "position"), "attention": ("prompt", "head", "query", "key"),
    "activations": ("prompt", "position"), "solves": ("pair",), "mask": ("penalty", "node", "position", "role"),
    "subspace": ("site", "patch", "rank"), "circuit": ("order", "by", "size"), "overlap": ("top", "stage"),
    "channels": ("writer", "reader", "side"), "decode": ("prompt", "location"), "graph": ("fact",),
    "self_repair": ("node",), "localise": ("run",),
}  # fmt: skip
VERSIONS = ("unwrite", "torch", "transformers", "numpy", "xarray")
# A spreadsheet takes a cell that begins with one of these for a formula, some also the full-width forms.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


# A file of a result ends with this and the SHA-256 of all before it, which netCDF readers leave alone: HDF5 looks at
# its data as it is, and may not come back from a damaged file. An attribute says that the end must be there.
_SEAL = b"unwrite sha256: "
SEALED = "sealed"
# The same of a file that is too large to be held, and is read where it is looked at.
_STREAM = b"unwrite stream: "
_BLOCK = 2**24

# Names on these axes are nothing else, whoever wrote the file.
_NAMES = {"writer": parse_node, "node": parse_node, "verified": parse_node, "location": parse_location}
# Methods whose nodes may be queries, neurons, states of the stream and other sites.
_OF_SITES = ("effects", "compare", "bound", "paths", "mask", "circuit", "Circuit", "overlap")


@dataclass(frozen=True, eq=False)
class Result:
    """Numbers with named axes (`data`, an xarray.Dataset); every variable says its unit and equation.

    `provenance` holds what is needed to repeat the run: method and settings, model, tokens, versions. Every axis whose
    names are nodes, states or sites has coordinates beside them, made of the names: of the axis `node` they are `layer`
    (−1: outside of all layers, as `embed`), `head` (−1: none, as of an MLP) and `kind`; of another one, such as
    `writer`, `writer_layer` and so on. So `result["effect"].groupby("layer")` works, and to pick by one of them
    `result["effect"].set_xindex("layer").sel(layer=2)`: they are no indexes from the start, since parts of a variable
    could then not be subtracted from it. Where prompts can be read, `position` has a coordinate `token`.
    """

    data: xr.Dataset

    def __post_init__(self) -> None:
        if not isinstance(self.data, xr.Dataset) or "provenance" not in self.data.attrs:
            raise ResultError(
                "this is not the data of a result", got=shown(self.data), expected="a Dataset with its provenance",
                fix="found.data of a result, or uw.read(path)",
            )  # fmt: skip
        object.__setattr__(self, "data", placed(self.data))

    @property
    def method(self) -> str:
        """Name of the method that made this result."""
        return str(self.provenance["method"])

    @property
    def provenance(self) -> dict[str, Any]:
        """Method, settings, model, certificate, tokens and versions, as plain values."""
        return json.loads(self.data.attrs["provenance"])

    def __getitem__(self, name: str) -> xr.DataArray:
        if not isinstance(name, str) or name not in self.data:
            known = ", ".join(map(str, self.data.data_vars))
            raise ResultError(f"a {self.method} has no such variable", got=shown(name), expected=known)
        return self.data[name]

    def table(self) -> pd.DataFrame:
        """One row per writer (and text), most energy moved first; of a verification one per node, of an attribution one
        per prompt and node, of effects one per pair, node and position, of a search one per hit, of a lens one per
        prompt, location and position.

        Columns are the variables with no further axis, medians of those with quantiles, the first of those in order;
        last kind, layer and head of what the rows name, and tokens. Raises ResultError where nothing has such rows.
        """
        rows = self.row_axes
        flat = {name: part.transpose(*rows) for name, part in self.data.items() if set(part.dims) == set(rows)}
        for name, part in self.data.items():
            if set(part.dims) == {*rows, "quantile"}:
                middle = part.sel(quantile=0.5, drop=True)
                flat[f"{name}_median"] = middle.transpose(*rows)
            elif set(part.dims) - set(rows) == {"top"} and set(rows) <= set(part.dims):
                flat[str(name)] = part.isel(top=0).transpose(*rows)
        if not flat:
            held = ", ".join(map(str, self.data.data_vars)) or "nothing"
            raise ResultError("nothing here makes a table", got=held, expected=f"variables of {', '.join(rows)}")
        frame = xr.Dataset(flat).to_dataframe().reset_index()
        frame = frame.sort_values("moved", ascending=False, kind="stable") if "moved" in frame else frame
        return frame.reindex(columns=[*rows, *flat, *(name for name in frame if name not in {*rows, *flat})])

    @property
    def row_axes(self) -> list[str]:
        """The axes of the table's rows."""
        known = _ROWS.get(self.method) or str(self.data.attrs.get("row_axes", "text writer")).split()
        return [axis for axis in known if axis in self.data.dims] or ["node"]

    def grid(self, name: str, **chosen: Any) -> xr.DataArray:
        """A variable as [layer, head], or as [layer, position] where it has positions.

        `head` holds names without the layer: H0, H1, …, M0 of mixers, MLP, bias, resid_post of states; NaN where a
        layer has none of that name, and what lies outside of all layers (`embed`) is left out. With positions and
        several names in a layer the rows are the names themselves. `chosen` picks on other axes, such as
        `pair=0, writer="L0H2"`; pairs and prompts that are not picked are averaged over, of quantiles the median is
        taken. Unit and equation stay; `.to_pandas()` makes a frame of it.
        Raises ResultError for a variable that is not of nodes, or has axes on which something must be picked first.

        Example: `uw.effects(lm, pairs, at="all").grid("effect").to_pandas()`
        """
        return gridded(self[name], chosen)

    def figure(
        self, name: str | None = None, writer: str | None = None, of: str | None = None, **chosen: Any
    ) -> alt.TopLevelMixin:
        """A picture as an altair chart, which saves itself as PNG, SVG, PDF or HTML (`.save("x.pdf")`).

        `name` "heatmap" (layers × heads with MLPs beside them, or × tokens), "bars" (ranked), "matrix" (writers ×
        nodes, senders × receivers), "attention" (queries × keys), "levels", "positions", or "fig1" to "fig5", the
        figures of Dao et al. 2023; by default the result's main picture. `writer` whose, by default the result's
        foremost; `of` the variable that the first four draw, and `chosen` what to pick on its other axes, as in
        `grid`. Raises ResultError for a figure, a writer or a variable that the result does not hold.
        """
        from unwrite.report import figures

        return figures.draw(self, name, writer, of, **chosen)

    def __repr__(self) -> str:
        """The finding in words, then the shape of the table and the names of the variables."""
        from unwrite.report import views

        return views.described(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: the finding, the main picture and the first rows."""
        from unwrite.report import card

        return card.card(self)

    def save(self, path: str | Path) -> Path:
        """Write the result as netCDF to `path` (a folder gets `result.nc`), whole or not at all; returns the file.

        Raises ResultError where the place cannot be written.
        """
        # What kind of objects an array holds is seen by those in it: without one, netCDF must be told that it is text.
        empty = {name: part.astype(str) for name, part in self.data.items() if part.dtype == object and not part.size}
        # In memory first: HDF5 may take the process with it where a disk is full.
        file = _file(path)
        try:
            whole = bytes(self.data.assign(empty).assign_attrs({SEALED: 1}).to_netcdf(engine="h5netcdf"))
        except ValueError as error:
            raise ResultError("netCDF cannot hold this result", got=error, expected="text without NUL") from None
        sealed = whole + _SEAL + hashlib.sha256(whole).digest()
        return write(file, lambda place: place.write_bytes(sealed))

    def save_table(self, path: str | Path) -> Path:
        """Write `table()` as CSV, text cells made harmless for spreadsheets. Raises ResultError as `save` does."""
        frame = self.table()
        for name in frame.columns:
            if not pd.api.types.is_numeric_dtype(frame[name]):
                frame[name] = [_cell(value) for value in frame[name]]
        return write(possible(path), lambda place: frame.to_csv(place, index=False))


def read(path: str | Path) -> Result:
    """A result saved at `path`, a file or a folder with a `result.nc`.

    Raises ResultError if there is none, if it is not a result of unwrite, is damaged, or was written by a newer
    version.
    """
    file = _file(path)
    if not file.is_file():
        raise ResultError(f"no result at {path}", expected="a result.nc or a folder that holds one")
    try:
        data = _opened(file)
        schema = int(data.attrs["schema"])
        if schema > SCHEMA:
            raise ResultError(
                f"{file} was written by a newer unwrite", got=f"schema {schema}", expected=f"up to {SCHEMA}",
                fix="update unwrite",
            )  # fmt: skip
        of_sites = json.loads(data.attrs["provenance"])["method"] in _OF_SITES
        for axis, parse in (_NAMES | ({"node": parse_site} if of_sites else {})).items():
            for name in np.unique(data[axis].values) if axis in data.coords else ():
                parse(str(name))
    except ResultError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever HDF5 raises on a damaged file means the same to the user
        raise ResultError(f"{file} is not a readable result of unwrite", got=error) from None
    return Result(data)


def layout_of(file: Path, names: Iterable[str]) -> dict[str, int]:
    """At which byte of a netCDF file each of these variables begins, all of which lie there in one piece."""
    with h5py.File(file, "r") as opened:
        return {name: int(opened[name].id.get_offset()) for name in names}  # pyright: ignore[reportAttributeAccessIssue]


def seal(file: Path) -> None:
    """Put an end to a file that was written piece by piece, by which `read` knows it to be whole."""
    digest = _digest(file, file.stat().st_size)
    with file.open("ab") as end:
        end.write(_STREAM + digest)
        end.flush()
        os.fsync(end.fileno())


def _digest(file: Path, length: int) -> bytes:
    """SHA-256 of the first bytes of a file."""
    sha, left = hashlib.sha256(), length
    with file.open("rb") as opened:
        while left > 0 and (block := opened.read(min(_BLOCK, left))):
            sha.update(block)
            left -= len(block)
    return sha.digest()


def _streamed(file: Path) -> xr.Dataset | None:
    """What a large file holds, read from it where it is looked at; None for any other file."""
    length = file.stat().st_size - len(_STREAM) - hashlib.sha256().digest_size
    with file.open("rb") as opened:
        opened.seek(max(0, length))
        end = opened.read()
    if not end.startswith(_STREAM):
        return None
    if end != _STREAM + _digest(file, length):
        raise ValueError("its bytes are not those that were written")
    data = xr.open_dataset(file, engine="h5netcdf", decode_timedelta=False)
    data.attrs.pop(SEALED, None)
    return data


def _opened(file: Path) -> xr.Dataset:
    """All that a file holds, after its end has been found to fit; one of an earlier version has no such end."""
    if (large := _streamed(file)) is not None:
        return large
    whole = file.read_bytes()
    end = len(whole) - len(_SEAL) - hashlib.sha256().digest_size
    sealed = whole[max(0, end) :].startswith(_SEAL)
    if sealed and not whole.endswith(hashlib.sha256(whole[:end]).digest()):
        raise ValueError("its bytes are not those that were written")
    # What has lost its end is refused before more of it is looked at.
    with h5py.File(io.BytesIO(whole), "r") as opened:
        if SEALED in opened.attrs and not sealed:
            raise ValueError("its end is missing, or another program has rewritten it: save it by uw.Result(data).save")
    # Everything is read at once: an open file would fail later, far from here, where it is damaged.
    with xr.open_dataset(io.BytesIO(whole), engine="h5netcdf", decode_timedelta=False) as opened:
        data = opened.load()
    data.attrs.pop(SEALED, None)
    return data


def require_result(name: str, found: object, method: str) -> None:
    """Raise ResultError unless `found` is what a method returns."""
    if not isinstance(found, Result) or found.method != method:
        got = f"a result of uw.{found.method}" if isinstance(found, Result) else shown(found)
        raise ResultError(f"{name} is no result of uw.{method}", got=got, fix=f"pass what uw.{method} returns")


def build(
    method: str, data: xr.Dataset, settings: Mapping[str, Any], model: Mapping[str, Any], tokens: Mapping[str, Any]
) -> Result:
    """A `Result` of `method`, with provenance added to `data`."""
    provenance = {
        "method": method,
        "settings": dict(settings),
        "model": dict(model),
        "tokens": dict(tokens),
        "versions": {name: version(name) for name in VERSIONS},
    }
    return Result(data.assign_attrs(schema=SCHEMA, provenance=record(provenance)))


def record(values: Mapping[str, Any]) -> str:
    """Settings as one text, the same for equal ones; a number of numpy is a number."""
    return json.dumps(values, sort_keys=True, default=np.generic.item)


def _file(path: str | Path) -> Path:
    path = possible(path)
    return path / FILE if path.is_dir() or path.suffix != ".nc" else path


def _cell(value: object) -> str:
    text = plain(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def quantity(axes: tuple[str, ...], values: np.ndarray, unit: str, equation: str) -> xr.Variable:
    """A variable of a result: values on named axes, with its unit and equation."""
    return xr.Variable(axes, values, {"units": unit, "equation": equation})


def over_documents(
    axes: tuple[str, ...], name: str, ends: tuple[np.ndarray, np.ndarray, np.ndarray], equation: str
) -> dict[str, xr.Variable]:
    """A number of no unit, and from where to where it may be, told by how it varies over documents."""
    texts = (equation, *2 * ("95 % t interval over documents (jackknife)",))
    each = zip(("", "_low", "_high"), ends, texts, strict=True)
    return {f"{name}{end}": quantity(axes, part, "1", text) for end, part, text in each}
