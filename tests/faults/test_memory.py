"""Does running out of memory leave nothing behind but time, wherever in a method it happens?

A part of a batch that did not fit is repeated once what nobody uses was given back: to the same bits. Where it still
does not fit it is halved. To the bit it is as if the halves had been asked for at once. Whole and halves agree to
rounding only: the same rows give other last bits in a matrix product of another shape, and sums over a part's prompts
are taken part by part.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from asked import differing, model, same, single_methods
from torch import nn

import unwrite as uw
from methods import COMBINED, METHODS
from unwrite.errors import NumericError
from unwrite.run.loop import stream
from unwrite.run.loop.stream import Batch

# In float64 of numbers near 1; a standard error is the root of a difference, which may be 0.
ROUNDING = 1e-9
# All is imported before anything is patched: a module that is imported later would keep the patch.
assert all(getattr(uw, name) for name in dir(uw))
NO_ROOM = "does not fit into memory"


@pytest.fixture(scope="module", autouse=True)
def _little_to_look_through() -> Iterator[None]:
    """What is given back when memory is short is looked for among what these tests make, not in all that is loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@dataclass
class Passes:
    """What happened so far: uses of a module of the model, and parts of batches that were begun.

    `inside` are those in the middle of which it is, by number and prompts: one may need another.
    """

    uses: int = 0
    begun: int = 0
    inside: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    @property
    def part(self) -> int:
        """The number of the innermost part; 0 outside."""
        return self.inside[-1][0]

    @property
    def prompts(self) -> int:
        """How many it has."""
        return self.inside[-1][1]


@contextmanager
def failing(module: nn.Module, when: Callable[[Passes], bool]) -> Iterator[Passes]:
    """Inside the `with`, memory is short at uses of a module at which `when` says so."""
    passes, real = Passes(), stream.parts

    def parts(batch: Batch, measure: Callable[[Batch], Any]) -> Any:
        def counted(part: Batch) -> Any:
            passes.begun += 1
            passes.inside.append((passes.begun, len(part.ids)))
            try:
                return measure(part)
            finally:
                passes.inside.pop()

        return real(batch, counted)

    def hook(*_: Any) -> None:
        passes.uses += 1
        if when(passes):
            raise torch.OutOfMemoryError("full")

    handle = module.register_forward_hook(hook)
    with pytest.MonkeyPatch.context() as patch:
        for name, other in list(sys.modules.items()):
            if name.startswith("unwrite.") and getattr(other, "parts", None) is real:
                patch.setattr(other, "parts", parts)
        try:
            yield passes
        finally:
            handle.remove()


def last_block(method: str) -> nn.Module:
    return model(method).layers[-1].out_proj


@cache
def whole(method: str) -> uw.Result:
    """All prompts in one batch."""
    return METHODS[method](model(method))


@cache
def uses(method: str) -> int:
    """How often the last block is used."""
    with failing(last_block(method), lambda passes: False) as passes:
        METHODS[method](model(method))
    return passes.uses


def close(one: uw.Result, other: uw.Result) -> None:
    """Words and counts are equal, numbers to rounding."""
    for name in differing(one, other):
        a, b = (found[name].values for found in (one, other))
        assert a.dtype.kind == b.dtype.kind == "f", name
        power = 2 if "_se" in name else 1
        np.testing.assert_allclose(a**power, b**power, ROUNDING, ROUNDING, err_msg=name)


@pytest.mark.promise("faults")
@pytest.mark.promise("memory")
@single_methods
def test_memory_that_was_short_for_a_moment_changes_no_bit(method: str) -> None:
    n = uses(method)
    for at in (1 + n // 2, n) if method not in COMBINED else (n // 2,):
        fell: list[int] = []

        def once(passes: Passes, at: int = at, fell: list[int] = fell) -> bool:
            if passes.uses == at:
                fell.append(passes.part)
            return passes.uses == at

        with failing(last_block(method), once):
            found = caught(method)
        # Outside of a batch there is nothing but a model's check.
        assert ("could not be run" in found and fell == [0]) if isinstance(found, str) else same(found, whole(method))


@pytest.mark.promise("faults")
@pytest.mark.promise("memory")
@single_methods
def test_memory_that_stays_short_in_any_pass_leaves_nothing_behind(method: str) -> None:
    lm, n = model(method), uses(method)
    start = lm.layers[0].block  # a run that is continued embeds nothing
    for at in sorted({1 + n // 2, n}) if method not in COMBINED else (n // 2,):
        fell: list[tuple[int, int]] = []
        again: list[int] = []

        def late(passes: Passes, at: int = at, fell: list[tuple[int, int]] = fell, again: list[int] = again) -> bool:
            """A use somewhere in a part, and one when the part is repeated, as the next that is begun."""
            if passes.uses == at:
                fell.append(passes.inside[-1])
                again.append(passes.begun + 1)
                return True
            if passes.part in again:
                again.clear()
                return True
            return False

        with failing(last_block(method), late):
            found = caught(method)
        ((part, prompts),) = fell
        if isinstance(found, str):
            # What was asked of one prompt alone has no halves; outside of a batch, of nothing but a model's check.
            assert (NO_ROOM in found and prompts == 1) or ("could not be run" in found and not part)
            continue
        assert not again
        began: list[int] = []

        def early(passes: Passes, part: int = part, began: list[int] = began) -> bool:
            """The first use in the part in which memory was short, and when it is repeated: before it computes."""
            began.append(passes.part)
            return passes.part in (part, part + 1) and began.count(passes.part) == 1

        with failing(start, early):
            assert same(found, METHODS[method](lm)), at
        assert {part, part + 1} <= set(began)
        close(found, whole(method))


def caught(method: str) -> uw.Result | str:
    """What a method finds, or says."""
    try:
        return METHODS[method](model(method))
    except uw.errors.UnwriteError as error:
        return str(error)


@pytest.mark.promise("faults")
@pytest.mark.promise("memory")
@single_methods
def test_where_there_is_room_for_one_prompt_at_a_time(method: str) -> None:
    with failing(last_block(method), lambda passes: passes.prompts > 1):
        close(METHODS[method](model(method)), whole(method))


@pytest.mark.promise("faults")
@pytest.mark.promise("memory")
@single_methods
def test_where_there_is_room_for_nothing(method: str) -> None:
    with failing(last_block(method), lambda passes: passes.part > 0), pytest.raises(NumericError, match=NO_ROOM):
        METHODS[method](model(method))
