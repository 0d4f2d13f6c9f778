"""Are levels and survival by position, and the prompts shown token by token, what plain hooks on the model give?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import unwrite as uw
from test_verify import ids_of, removed_by_hand
from unwrite.model.load import view
from unwrite.run.tally.by_position import EXAMPLES, GROUPS, SHOWN, first_of_groups

LENGTHS = [40, 33, 40, 21, 40, 40, 37]


def by_hand(hf, ids: Tensor, layer: int, head: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """⟨x, o⟩, ⟨x − x', o⟩ and ‖o‖² at the final stream of one Llama prompt; o is z times the head's columns of W_O."""
    lm = view(hf, convention="raw")
    seen = {}
    block = lm.layers[layer]
    final = lm.decoder.get_submodule(lm.row.final_norm)
    handles = [
        block.out_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("z", args[0])),
        final.register_forward_pre_hook(lambda _, args: seen.__setitem__("x", args[0])),
    ]
    with torch.no_grad():
        lm.decoder(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    part = slice(head * lm.head_dim, (head + 1) * lm.head_dim)
    write = seen["z"][0, :, part] @ block.out_proj.weight[:, part].T
    end, without = seen["x"][0], removed_by_hand(lm, layer, head, ids)[0]
    return tuple(
        x.detach().numpy() for x in ((end * write).sum(1), ((end - without) * write).sum(1), write.pow(2).sum(1))
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_positions_and_strips_are_those_of_plain_hooks(batch) -> None:
    # Skipped positions are not edited; without skipping, silencing a head is the same intervention.
    hf = tiny.model("llama", 5)
    lm = view(hf, convention="raw")
    ids = ids_of(lm, len(LENGTHS), 40)
    mask = torch.arange(40) < torch.tensor(LENGTHS)[:, None]
    found = uw.verify(lm, ids, "L0H1", skip=0, mask=mask, batch=batch).data
    rows = [by_hand(hf, ids[i : i + 1, :n], 0, 1) for i, n in enumerate(LENGTHS)]

    starts = list(found["place"].values)
    assert starts == list(range(0, 40, 2))
    for name, which in (("level_at", 0), ("survival_at", 1)):
        sums = [[row[k][s : s + 2].sum() for s in starts] for row in rows for k in (which, 2)]
        along, energy = np.array(sums[::2]), np.array(sums[1::2])
        share = along.sum(0) / energy.sum(0)
        np.testing.assert_allclose(found[name].values, share, atol=1e-6)
        # The delta method over prompts, in its linear form: n / (n − 1) · Σ (Y − βX)² / (ΣX)².
        n = len(rows)
        error = np.sqrt(n / (n - 1) * ((along - share * energy) ** 2).sum(0)) / energy.sum(0)
        np.testing.assert_allclose(found[f"{name}_se"].values, error, rtol=1e-4, atol=1e-9)

    order = np.argsort([row[1].sum() / row[2].sum() for row in rows])
    for example, quantile in enumerate(EXAMPLES):
        prompt = order[round(quantile * (len(rows) - 1))]
        n = LENGTHS[prompt]
        for name, which in (("strip_level", 0), ("strip_survival", 1)):
            strip = found[name].values[example]
            np.testing.assert_allclose(strip[:n], rows[prompt][which] / rows[prompt][2], rtol=1e-4, atol=1e-5)
            assert np.isnan(strip[n:]).all()
        words = found["strip_token"].values[example]
        assert list(words[:n]) == [str(int(i)) for i in ids[prompt, :n]]
        assert list(words[n:]) == [""] * len(words[n:])


def test_skipped_positions_are_not_shown_as_numbers() -> None:
    lm = view(tiny.model("gpt2", 1))
    found = uw.verify(lm, ids_of(lm, 2), "L0H1", skip=3).data
    assert np.isnan(found["strip_level"].values[:, :3]).all()
    assert np.isfinite(found["strip_level"].values[:, 3:]).all()
    assert np.isnan(found["survival_at"].values[:3]).all()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 1000])
def test_groups_of_positions_are_few_and_of_one_size(length) -> None:
    starts = first_of_groups(length)
    assert starts[0] == 0
    assert len(starts) <= GROUPS
    assert len(set(np.diff(starts))) <= 1
    assert length - starts[-1] <= max(1, *np.diff([*starts, length]))


def test_long_prompts_are_shown_by_their_beginning() -> None:
    lm = view(tiny.model("llama", 1, max_position_embeddings=300))
    found = uw.verify(lm, ids_of(lm, 2, 300), "L0H1").data
    assert found["strip_token"].shape == (len(EXAMPLES), SHOWN)
