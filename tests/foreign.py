"""What may come in the place of an argument? Everything that people hand over by mistake, each made anew when asked."""

from __future__ import annotations

import io
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
import xarray as xr
from transformers import AutoConfig, BatchEncoding

import unwrite as uw


class Raising:
    """Whatever is asked of it, it raises."""

    def _raise(self, *_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError("nothing can be asked of this")

    __repr__ = __str__ = __len__ = __iter__ = __bool__ = __int__ = __float__ = __index__ = __getitem__ = _raise
    __eq__ = __hash__ = __lt__ = __call__ = __contains__ = __format__ = __fspath__ = _raise  # pyright: ignore


class Lying:
    """Has every attribute that one asks for, and none of them is what it should be."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Text(str):
    """A string of another class, which shows itself otherwise."""

    def __repr__(self) -> str:
        return "<\x1b[31m a string at 0x7f0123456789 \u202e>"


class Endless:
    """Contains itself."""

    def __iter__(self) -> Any:
        yield self


def _nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


THINGS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "3": lambda: 3,
    "0": lambda: 0,
    "-1": lambda: -1,
    "2**70": lambda: 2**70,
    "10**5000": lambda: 10**5000,
    "0.5": lambda: 0.5,
    "3.0": lambda: 3.0,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "Decimal": lambda: Decimal("0.5"),
    "True": lambda: True,
    "False": lambda: False,
    "np.int64": lambda: np.int64(3),
    "np.float32": lambda: np.float32(0.5),
    "np.bool": lambda: np.bool_(True),
    "...": lambda: ...,
    "nothing": lambda: "",
    "blank": lambda: " ",
    "nonsense": lambda: "nonsense",
    "a_NUL": lambda: "a\0b",
    "three": lambda: "3",
    "a_long_name": lambda: "L" + "9" * 5000 + "H0",
    "half_a_character": lambda: "\ud800",
    "str_subclass": lambda: Text("a\x1b[31m\nb\u202e"),
    "long_string": lambda: "no such thing " * 400,
    "bytes": lambda: b"bytes",
    "[]": list,
    "()": lambda: (),
    "{}": dict,
    "set()": lambda: set(),
    "[None]": lambda: [None],
    "[nan]": lambda: [float("nan")],
    "list_of_bools": lambda: [[True, False, True]],
    "list_of_strings_and_ints": lambda: ["nonsense", 3, ["more", 2]],
    "list_of_lists_of_strings_and_ints": lambda: [["nonsense", 3], [4, 5]],
    "a_truth_among_ids": lambda: [[True, 3, 4]],
    "list_of_huge_ints": lambda: [[2**70, 3, 4]],
    "list_of_negative_ints": lambda: [[-1, 3, 4]],
    "list_of_empty_lists": lambda: [[], []],
    "nested_deeply": lambda: _nested(200),
    "endless": Endless,
    "odd_keys": lambda: {3: 4, None: "x", (1, 2): object()},
    "ids_that_are_text": lambda: {"input_ids": "nonsense"},
    "ids_that_are_None": lambda: {"input_ids": None, "attention_mask": None},
    "chat_without_content": lambda: [{"role": 3}],
    "mapping_proxy": lambda: MappingProxyType({"a": 1}),
    "object": object,
    "lambda": lambda: lambda *_, **__: None,
    "generator": lambda: (i for i in ("a", 3)),
    "class": lambda: Lying,
    "exception": lambda: ValueError("an error of another kind"),
    "range": lambda: range(2),
    "slice": lambda: slice(0, 2),
    "file": lambda: io.BytesIO(b"bytes"),
    "floats": lambda: np.linspace(0.0, 1.0, 6).reshape(2, 3),
    "objects": lambda: np.array([None, "x", 3], dtype=object),
    "empty_array": lambda: np.zeros((0,)),
    "empty_ids": lambda: np.zeros((2, 0), dtype=np.int64),
    "3-D": lambda: np.ones((2, 2, 2), dtype=np.int64),
    "dates": lambda: np.array(["2020-01-01"], dtype="datetime64[D]"),
    "structured": lambda: np.zeros(2, dtype=[("a", int), ("b", float)]),
    "float_tensor": lambda: torch.linspace(0.0, 1.0, 6).reshape(2, 3),
    "nan_tensor": lambda: torch.full((2, 3), torch.nan),
    "meta_tensor": lambda: torch.zeros(2, 3, dtype=torch.long, device="meta"),
    "complex_tensor": lambda: torch.zeros(2, dtype=torch.complex64),
    "bool_tensor": lambda: torch.ones(2, 3, dtype=torch.bool),
    "tensor_with_a_gradient": lambda: torch.ones(2, 3, requires_grad=True),
    "sparse_tensor": lambda: torch.eye(3).to_sparse(),
    "tensor_without_axes": lambda: torch.tensor(3),
    "DataFrame": lambda: pd.DataFrame({"a": [1, 2]}),
    "Dataset": lambda: xr.Dataset({"a": ("b", [1, 2])}),
    "BatchEncoding": lambda: BatchEncoding({"input_ids": [[3, 4, 5, 6], [4, 5, 6, 7]]}),
    "BatchEncoding_of_nothing": lambda: BatchEncoding({}),
    "config": lambda: AutoConfig.for_model("gpt2"),
    "dtype": lambda: torch.float16,
    "module": lambda: torch.nn.Linear(2, 2),
    "state_dict": lambda: torch.nn.Linear(2, 2).state_dict(),
    "raising": Raising,
    "lying": Lying,
    "list_of_raising": lambda: [Raising()],
    "no_such_path": lambda: Path("no/such/place"),
    "path_with_NUL": lambda: Path("a\0b"),
    "Rules": lambda: uw.Rules(),
    "Edit": lambda: uw.Edit.set("L0H0", 0.0),
}
