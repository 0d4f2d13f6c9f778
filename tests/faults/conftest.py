"""What holds in all of these tests: what is random is repeated less often than in earnest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from methods import few_draws


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    with few_draws():
        yield
