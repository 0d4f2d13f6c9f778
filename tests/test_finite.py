"""Is the first cell named that is no number?"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unwrite.errors import NumericError
from unwrite.run.loop.finite import require_finite

SAYS = "the effect of {pair} with {node} at {position} is not finite"
SAID = "the effect of pair 5 with L0H1 at position 2 is not finite. "
NEXT = "Next: load the model in float32, or leave this pair out."


@pytest.mark.promise("finite")
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_the_first_cell_is_named_by_its_axes(kind: type) -> None:
    finite = np.ones((3, 2, 4), dtype=bool)
    require_finite(kind(finite), SAYS, pair=4, node=["L0H0", "L0H1"], position=0)
    finite[1, 1, 2:] = finite[2] = False
    with pytest.raises(NumericError) as caught:
        require_finite(kind(finite), SAYS, pair=4, node=["L0H0", "L0H1"], position=0)
    assert str(caught.value) == SAID + NEXT
