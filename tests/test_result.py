"""Does a result come back as it was saved, never as half a file, and can it be handed to strangers' programs?"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from unwrite import files as writing
from unwrite import result
from unwrite.errors import ResultError, UnwriteError
from unwrite.files import folder, write
from unwrite.result import Result, build, quantity, read

SRC = Path(__file__).resolve().parents[1] / "src"
WRITERS, NODES, QUANTILES = ["embed", "L0H0", "MLP0"], ["embed", "L0H0", "MLP0", "L1H0"], [0.25, 0.5, 0.75]
SHARE = np.arange(12.0).reshape(3, 4) - 5
LEVEL = np.array([[0.5, 1.0, 1.5], [-np.inf, -2.0, np.nan], [1.0, 1.25, np.inf]])


def data(moved: tuple[float, ...] = (0.1, 0.7, 0.3)) -> xr.Dataset:
    """Three writers; of `table` only what has no node axis is expected."""
    return xr.Dataset(
        {
            "share": quantity(("writer", "node"), SHARE, "1", "Σ⟨o_e, o_w⟩ / Σ‖o_w‖²"),
            "level": quantity(("writer", "quantile"), LEVEL, "1", "⟨x, o_w⟩ / ‖o_w‖²"),
            "moved": quantity(("writer",), np.array(moved), "activation", "moved"),
            "n_positions": quantity(("writer",), np.array([2**40, 0, -3]), "1", "positions counted"),
            "material": quantity(("writer",), np.array([True, False, True]), "1", "material"),
            "reading": quantity(("writer",), np.array(["falls 1 → 0", "never writes", ""], dtype=object), "", ""),
            "n_clusters": quantity((), np.asarray(7), "1", "clusters"),
        },
        {"writer": WRITERS, "node": NODES, "quantile": QUANTILES},
    )


def made(dataset: xr.Dataset | None = None, **settings: object) -> Result:
    about = {"": {"source": "book.txt", "prompts": 3}}
    return build("scan", data() if dataset is None else dataset, settings, {"name": "tiny", "layers": 2}, about)


def two_texts(first: str = "one", second: str = "two") -> xr.Dataset:
    names = xr.Variable("text", [first, second])
    return xr.concat([data(), data((0.2, 0.0, 0.9))], names)


def files(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*"))


# --- provenance and round trip ----------------------------------------------------------------------------------------


@pytest.mark.promise("read-back")
def test_a_saved_result_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = made(skip=1)
    back = read(saved.save(tmp_path / "a.nc"))
    xr.testing.assert_identical(back.data, saved.data)
    kinds = [{name: part.dtype.kind.replace("U", "O") for name, part in one.data.items()} for one in (saved, back)]
    assert kinds[0] == kinds[1]
    assert back.provenance == saved.provenance


@pytest.mark.promise("read-back")
def test_a_result_of_several_texts_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = made(two_texts("a \\x1b text", "日本 😀"))
    xr.testing.assert_identical(read(saved.save(tmp_path)).data, saved.data)


def test_what_came_back_can_be_saved_again(tmp_path: Path) -> None:
    once = read(made().save(tmp_path / "a.nc"))
    xr.testing.assert_identical(read(once.save(tmp_path / "b.nc")).data, once.data)


@pytest.mark.parametrize("unit", ["1", "activation", "seconds", "logit"])
def test_a_unit_is_a_word_and_changes_no_number(tmp_path: Path, unit: str) -> None:
    saved = made(
        xr.Dataset({"x": quantity(("writer",), np.array([1.0, 2.0]), unit, "x")}, {"writer": ["L0H0", "L0H1"]})
    )
    back = read(saved.save(tmp_path))["x"]
    assert back.attrs == {"units": unit, "equation": "x"}
    assert back.values.tolist() == [1.0, 2.0]


@pytest.mark.promise("provenance")
def test_provenance_says_what_is_needed_to_repeat_the_run(tmp_path: Path) -> None:
    provenance = read(made(skip=1, writers=["L0H0"], floor=1e-4).save(tmp_path)).provenance
    assert provenance["method"] == "scan"
    assert provenance["settings"] == {"skip": 1, "writers": ["L0H0"], "floor": 1e-4}
    assert provenance["model"] == {"name": "tiny", "layers": 2}
    assert provenance["tokens"] == {"": {"source": "book.txt", "prompts": 3}}
    assert provenance["versions"]["numpy"] == np.__version__
    assert provenance["versions"]["xarray"] == xr.__version__
    assert {"unwrite", "torch", "transformers"} <= provenance["versions"].keys()


@pytest.mark.parametrize("value", ["\x1b[2J\n\u202e\ud800", "a\0b", "日本 😀", "x" * 300_000], ids=len)
def test_provenance_holds_any_text(tmp_path: Path, value: str) -> None:
    assert read(made(name=value).save(tmp_path)).provenance["settings"] == {"name": value}


def test_provenance_does_not_depend_on_the_order_in_which_settings_are_named() -> None:
    assert made(skip=1, floor=2).data.attrs == made(floor=2, skip=1).data.attrs


def test_building_a_result_leaves_the_data_alone() -> None:
    dataset = data()
    built = made(dataset)
    assert dataset.attrs == {}
    assert built.method == "scan"
    assert built["share"].sel(writer="L0H0", node="MLP0").item() == SHARE[1, 2]


# --- table ------------------------------------------------------------------------------------------------------------


def test_a_table_has_a_row_for_each_writer_by_energy_moved() -> None:
    table = made().table()
    assert table["writer"].tolist() == ["L0H0", "MLP0", "embed"]
    assert table["moved"].tolist() == [0.7, 0.3, 0.1]
    assert table["n_positions"].tolist() == [0, -3, 2**40]
    assert table["level_median"].tolist() == [-2.0, 1.25, 1.0]
    assert table["material"].tolist() == [False, True, True]
    assert table["reading"].tolist() == ["never writes", "", "falls 1 → 0"]
    columns = {"writer", "moved", "n_positions", "level_median", "material", "reading"}
    places = ["writer_kind", "writer_layer", "writer_head"]
    assert set(table) == {*columns, *places}
    assert list(table)[-3:] == places


def test_a_table_of_texts_has_a_row_for_each_writer_and_text() -> None:
    table = made(two_texts()).table()
    rows = list(zip(table["text"], table["writer"], table["moved"], table["level_median"], strict=True))
    assert rows == [
        ("two", "MLP0", 0.9, 1.25),
        ("one", "L0H0", 0.7, -2.0),
        ("one", "MLP0", 0.3, 1.25),
        ("two", "embed", 0.2, 1.0),
        ("one", "embed", 0.1, 1.0),
        ("two", "L0H0", 0.0, -2.0),
    ]


def test_the_table_of_one_writers_verification_has_a_row_for_each_node() -> None:
    erased = quantity(("node",), np.array([0.0, -0.5, -0.25, 0.0]), "1", "erased")
    survival = quantity(("location",), np.array([1.0, 0.5]), "1", "survival")
    table = made(xr.Dataset({"erased": erased, "survival": survival}, {"node": NODES})).table()
    places = {"kind": ["embed", "head", "mlp", "head"], "layer": [-1, 0, 0, 1], "head": [-1, 0, -1, 0]}
    assert table.to_dict("list") == {"node": NODES, "erased": [0.0, -0.5, -0.25, 0.0], **places}


def test_a_table_does_not_depend_on_the_order_of_the_axes() -> None:
    turned = Result(made(two_texts()).data.transpose("writer", "quantile", "text", "node"))
    pd.testing.assert_frame_equal(turned.table(), made(two_texts()).table())


def test_writers_that_moved_alike_keep_their_write_order() -> None:
    assert made(data((0.5, 0.5, 0.5))).table()["writer"].tolist() == WRITERS


def test_many_writers_that_moved_alike_keep_their_write_order() -> None:
    names = [f"L{layer}H0" for layer in range(200)]
    moved = quantity(("writer",), np.tile([1.0, 2.0], 100), "1", "moved")
    assert made(xr.Dataset({"moved": moved}, {"writer": names})).table()["writer"].tolist() == names[1::2] + names[::2]


def test_without_energy_moved_the_rows_keep_their_write_order() -> None:
    assert made(data().drop_vars("moved")).table()["writer"].tolist() == WRITERS


def test_a_writer_that_never_writes_comes_last() -> None:
    assert made(data((np.nan, 0.1, 0.2))).table()["writer"].tolist() == ["MLP0", "L0H0", "embed"]


# --- CSV --------------------------------------------------------------------------------------------------------------

HOSTILE = [
    '=HYPERLINK("http://x.example","click")', "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", "\x1b[2Jx",
    "abc\u202etxt", 'quote " and, comma', "two\nlines", "N\0L", "=", "-",
]  # fmt: skip


def cells(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.promise("hostile")
@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_harmless_in_a_spreadsheet(tmp_path: Path, name: str) -> None:
    hostile = two_texts(name).assign(reading=(("text", "writer"), np.full((2, 3), name, dtype=object)))
    rows = cells(made(hostile).save_table(tmp_path / "table.csv"))
    assert len(rows) == 6
    shown = {row["text"] for row in rows} | {row["reading"] for row in rows}
    assert len(shown) == 2
    for cell in shown:
        assert cell[0] not in "=+-@\t\r\n＝＋－＠"
        assert cell.isprintable()


def test_a_harmless_name_is_left_as_it_is(tmp_path: Path) -> None:
    rows = cells(made(two_texts("my text − 1", "b=c")).save_table(tmp_path / "table.csv"))
    assert {row["text"] for row in rows} == {"my text − 1", "b=c"}


def test_negative_numbers_stay_numbers(tmp_path: Path) -> None:
    rows = cells(made().save_table(tmp_path / "table.csv"))
    assert [float(row["level_median"]) for row in rows] == [-2.0, 1.25, 1.0]
    assert [int(row["n_positions"]) for row in rows] == [0, -3, 2**40]


def test_numbers_are_written_to_the_last_digit(tmp_path: Path) -> None:
    moved = (1 / 3, math.pi * 1e-9, 0.1)
    rows = cells(made(data(moved)).save_table(tmp_path / "table.csv"))
    assert sorted(float(row["moved"]) for row in rows) == sorted(moved)


def test_writing_a_table_does_not_change_the_result(tmp_path: Path) -> None:
    kept = made(two_texts("=1"))
    kept.save_table(tmp_path / "table.csv")
    assert set(kept.table()["text"]) == {"=1", "two"}


# --- where a result goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out/deep", "out.d", "out/a.nc", "result.nc"])
def test_a_result_is_found_by_the_name_it_was_saved_under(tmp_path: Path, name: str) -> None:
    file = made().save(tmp_path / name)
    assert file == (tmp_path / name if name.endswith(".nc") else tmp_path / name / "result.nc")
    assert file.is_file()
    for spelled in (tmp_path / name, str(tmp_path / name), file):
        assert read(spelled).method == "scan"


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.nc").mkdir()
    assert made().save(tmp_path / "a.nc") == tmp_path / "a.nc" / "result.nc"
    assert read(tmp_path / "a.nc").method == "scan"


def test_a_result_replaces_an_older_one(tmp_path: Path) -> None:
    made(skip=1).save(tmp_path)
    made(skip=2).save(tmp_path)
    assert read(tmp_path).provenance["settings"] == {"skip": 2}
    assert files(tmp_path) == ["result.nc"]


def test_a_result_that_was_read_can_be_replaced(tmp_path: Path) -> None:
    old = read(made(skip=1).save(tmp_path))
    made(skip=2).save(tmp_path)
    assert old["moved"].values.tolist() == [0.1, 0.7, 0.3]


def broken(place: Path) -> None:
    place.write_bytes(b"half a file")
    raise RuntimeError("stopped midway")


def full(place: Path) -> None:
    place.write_bytes(b"half a file")
    raise OSError(28, "No space left on device")


@pytest.mark.promise("whole")
def test_a_writer_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped midway"):
        write(tmp_path / "a.nc", broken)
    assert files(tmp_path) == []


@pytest.mark.promise("whole")
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"cannot write .*a\.nc\. Got: No space left on device"):
        write(tmp_path / "a.nc", full)
    assert files(tmp_path) == []


@pytest.mark.promise("whole")
@pytest.mark.parametrize("make", [broken, full])
def test_a_writer_that_fails_midway_leaves_the_older_file(tmp_path: Path, make: object) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises((ResultError, RuntimeError)):
        write(file, make)
    assert files(tmp_path) == ["a.txt"]
    assert file.read_text() == "old"


@pytest.mark.parametrize("save", [Result.save, Result.save_table])
def test_a_file_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path, monkeypatch, save: object) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ResultError, match="Got: Permission denied"):
        save(made(), tmp_path / "a.nc")
    assert files(tmp_path) == []


def test_the_file_is_whole_from_the_moment_it_is_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    seen = []
    write(file, lambda place: (place.write_text("whole"), seen.append(file.exists()), seen.append(place.parent)))
    assert seen == [False, tmp_path]
    assert file.read_text() == "whole"


@pytest.mark.skipif(os.name != "posix", reason="other permissions")
def test_others_may_read_the_file(tmp_path: Path) -> None:
    assert write(tmp_path / "a.txt", lambda place: place.write_text("x")).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("save", [Result.save, Result.save_table])
@pytest.mark.parametrize("inner", ["a.nc", "deep/a.nc"])
def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path, save: object, inner: str) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ResultError, match=r"cannot write .*taken"):
        save(made(), tmp_path / "taken" / inner)
    assert files(tmp_path) == ["taken"]


# --- folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_made_and_kept_with_what_is_in_it(tmp_path: Path) -> None:
    with folder(tmp_path / "a" / "b") as place:
        (place / "x").write_text("")
    assert files(tmp_path / "a" / "b") == ["x"]


def test_a_folder_made_for_a_run_that_fails_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"), folder(tmp_path / "a"):
        raise RuntimeError("failed")
    assert files(tmp_path) == []


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed"), folder(tmp_path):
        raise RuntimeError("failed")
    assert tmp_path.is_dir()


def test_a_folder_that_fails_with_something_in_it_stays(tmp_path: Path) -> None:
    def run() -> None:
        with folder(tmp_path / "a") as place:
            (place / "x").write_text("")
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        run()
    assert files(tmp_path) == ["a", "a/x"]


@pytest.mark.parametrize("name", ["taken", "taken/inner"])
def test_a_folder_that_cannot_be_made_is_said_before_the_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    with pytest.raises(ResultError, match="cannot write into"), folder(tmp_path / name):
        pytest.fail("the run began")


def test_a_folder_that_takes_no_files_is_said_before_the_run(tmp_path: Path, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ResultError, match="Permission denied"), folder(tmp_path):
        pytest.fail("the run began")


# --- files that are no results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent", "absent.nc", "empty"])
def test_no_result_is_an_error_that_names_the_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match=f"no result at .*{name}"):
        read(tmp_path / name)


@pytest.mark.promise("whole")
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_an_error(tmp_path: Path, kept: float) -> None:
    file = made().save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ResultError, match="not a readable result"):
        read(file)


@pytest.mark.promise("whole")
@pytest.mark.parametrize("at", [0, 4, 9, 40])
def test_a_damaged_head_is_an_error(tmp_path: Path, at: int) -> None:
    file = made().save(tmp_path)
    whole = bytearray(file.read_bytes())
    whole[at] ^= 0xFF
    file.write_bytes(whole)
    with pytest.raises(ResultError, match="not a readable result"):
        read(file)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x89HDF\r\n\x1a\n", b"CDF\x01" + bytes(64), bytes(range(256)) * 16], ids=len
)
def test_a_file_that_is_something_else_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.nc").write_bytes(content)
    with pytest.raises(ResultError, match="not a readable result"):
        read(tmp_path)


@pytest.mark.promise("whole")
@pytest.mark.parametrize(
    "attrs",
    [
        {},
        {"schema": 1},
        {"provenance": json.dumps({"method": "scan"})},
        {"schema": "one", "provenance": json.dumps({"method": "scan"})},
        {"schema": 1, "provenance": "not json"},
        {"schema": 1, "provenance": "{}"},
        {"schema": 1, "provenance": "[]"},
        {"schema": 1, "provenance": 3},
    ],
)
def test_a_netcdf_of_another_program_is_an_error(tmp_path: Path, attrs: dict) -> None:
    data().assign_attrs(attrs).to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match="not a readable result"):
        read(tmp_path)


@pytest.mark.promise("whole")
def test_a_result_of_a_newer_version_says_so(tmp_path: Path) -> None:
    newer = made().data.assign_attrs(schema=result.SCHEMA + 1)
    newer.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    with pytest.raises(ResultError, match=f"newer unwrite. Got: schema {result.SCHEMA + 1}"):
        read(tmp_path)


def test_an_error_about_a_hostile_file_is_one_safe_line(tmp_path: Path) -> None:
    with pytest.raises(UnwriteError) as caught:
        read(tmp_path / "a\x1b[2J\nb.nc")
    assert str(caught.value).isprintable()


# --- no torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("no-torch")
def test_reading_a_result_does_not_load_torch(tmp_path: Path) -> None:
    file = made().save(tmp_path)
    code = (
        "import sys, unwrite.result as result\n"
        "assert len(result.read(sys.argv[1]).table()) == 3\n"
        "print(sorted({'torch', 'transformers', 'altair'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
