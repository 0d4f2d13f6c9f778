"""Is a run refused, and is it said why, where the model or torch no longer computes what was certified?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import tiny
import unwrite as uw
from test_certificate import long_rope
from unwrite.errors import ModelError
from unwrite.model.view import Model

IDS = torch.randint(3, 50, (4, 8), generator=torch.Generator().manual_seed(0))
PAIRS = (IDS[:2], IDS[2:], 3, 5)
Change = Callable[[Model], Any]

ASKED: dict[str, Callable[[Model], Any]] = {
    "scan": lambda lm: uw.scan(lm, IDS),
    "verify": lambda lm: uw.verify(lm, IDS, "L0H0"),
    "dla": lambda lm: uw.dla(lm, IDS, 3, 5),
    "effects": lambda lm: uw.effects(lm, uw.pairs(*PAIRS)),
    "paths": lambda lm: uw.paths(lm, uw.pairs(*PAIRS)),
}


@pytest.fixture
def lm() -> Model:
    return uw.load(tiny.model("llama", 4, torch.float32, num_hidden_layers=2, num_attention_heads=2))


@contextmanager
def steered(lm: Model) -> Iterator[None]:
    """A user's hook that adds to what a block puts out, as steering does."""
    handle = lm.layers[0].block.register_forward_hook(lambda _, args, output: output + 0.1)
    yield
    handle.remove()


@contextmanager
def adapted(lm: Model) -> Iterator[None]:
    """Something beside a projection, which its weight does not hold: an adapter that was switched on."""
    own = lm.layers[1].out_proj.forward
    lm.layers[1].out_proj.forward = lambda x: own(x) + 0.1 * x[..., :1]  # pyright: ignore[reportAttributeAccessIssue]
    yield
    del lm.layers[1].out_proj.forward


@contextmanager
def cast(lm: Model) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


WAYS: list[tuple[Any, str]] = [
    (steered, r"not Llama.* as it computes now.*these changed: hooks of model\.layers\.0\. "),
    (adapted, r"as it computes now.*changed: forward functions of model\.layers\.1\.self_attn\.o_proj"),
    (cast, r"as it computes now.*changed: autocast \(now True\)"),
]


@pytest.mark.promise("exact")
@pytest.mark.parametrize(("way", "words"), WAYS)
@pytest.mark.parametrize("method", ASKED)
def test_a_run_of_another_model_than_was_loaded_is_refused_and_it_is_said_what_changed(
    lm: Model, method: str, way: Any, words: str
) -> None:
    with way(lm), pytest.raises(ModelError, match=words):
        ASKED[method](lm)
    ASKED[method](lm)


def test_what_changes_no_logit_is_nobodys_business(lm: Model) -> None:
    handle = lm.layers[0].block.register_forward_hook(lambda _, args, output: None)
    ASKED["scan"](lm)
    handle.remove()


def test_a_model_is_not_certified_in_such_a_state(lm: Model) -> None:
    with cast(lm), pytest.raises(ModelError):
        uw.load(lm.hf)


def test_the_check_costs_one_pass_of_a_batch(lm: Model) -> None:
    tokens = 0

    def count(_: Any, args: Any, named: Any) -> None:
        nonlocal tokens
        tokens += named["input_ids"].numel()

    handle = lm.decoder.register_forward_pre_hook(count, with_kwargs=True)
    ASKED["scan"](lm)
    assert tokens <= 2 * IDS.numel()
    tokens = 0
    uw.scan(lm, IDS[:1])
    assert tokens <= 2 * IDS[:1].numel()
    handle.remove()


@pytest.mark.promise("batches")
def test_a_short_prompt_beside_long_ones_that_turn_its_keys_is_refused() -> None:
    lm = uw.load(long_rope())
    mask = torch.ones_like(IDS)
    uw.scan(lm, IDS, mask=mask)
    mask[2, 3:] = 0
    with pytest.raises(ModelError, match="as it computes now"):
        uw.scan(lm, IDS, mask=mask)
