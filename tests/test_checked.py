"""Is a call with wrong shapes noticed where tests run, also after calls that were right?"""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from unwrite.model.values import looked


def test_axes_are_compared_at_every_new_kind_of_call() -> None:
    pattern, values = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 4)
    assert looked(pattern, values).shape == (2, 5, 3, 4)
    assert looked(pattern, values + 1).shape == (2, 5, 3, 4)
    # Torch would compute each of these.
    for wrong in (torch.rand(1, 3, 5, 4), torch.rand(3, 5, 4), torch.ones(2, 3, 5, 4, dtype=torch.int64)):
        with pytest.raises(jaxtyping.TypeCheckError):
            looked(pattern, wrong)
    for right in (torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 7)):
        assert looked(pattern, right).shape == (2, 5, 3, right.shape[-1])
