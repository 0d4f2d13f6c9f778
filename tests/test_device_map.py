"""Does a model that is spread over memory and disk give the very numbers of the same model loaded whole?

The oracle is the model loaded whole, and equal means bit for bit: what is brought in is what lies in the file, and it
goes through the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import tiny
import unwrite as uw
from unwrite.errors import ModelError
from unwrite.model import weights
from unwrite.model.load import weights_hash
from unwrite.model.view import Model, fold, value_weights
from unwrite.run import trust, without

pytest.importorskip("accelerate", reason="device_map needs accelerate")

IDS = torch.randint(3, 50, (6, 6), generator=torch.Generator().manual_seed(0))
PAIRS = uw.pairs(IDS[:2], IDS[2:4], 5, 9)
# Post-norms, tied embeddings, parallel blocks, biases, fused values, one output for q, k and v: each is in one of these.
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "olmo2")
TIED = {"gpt2", "gemma2"}


def _edited(lm: Model) -> uw.Result:
    """What a trace records of edited passes, and the slopes that it hands on."""
    sites = ("L0H0", "L1.bias", "L2H1.z", "resid_mid1", "L1.v_input", "resid_post2")
    sites = tuple(
        site for site in sites if site in lm.nodes or "." in site and "bias" not in site or site[:5] == "resid"
    )
    sites = tuple(site for site in sites if not (lm.parallel and "mid" in site))
    edits = [uw.Edit.set("L1H0", 0.0), uw.Edit.scale("MLP0", 0.5), uw.Edit.add("L2.v_input", torch.ones(lm.d_model))]
    with uw.trace(lm, *sites, edits=edits) as t:
        logits = lm.hf(IDS).logits
        logits[:, -1, 5].sum().backward()
    found = {site: t[site].detach() for site in sites} | {f"slope {site}": t[site].grad for site in sites}
    lm.hf.zero_grad()
    named = {name: (tuple(f"{name} {i}" for i in range(part.dim())), part.numpy()) for name, part in found.items()}
    return uw.Result(xr.Dataset(named | {"logits": (("a", "b", "c"), logits.detach().numpy())}))


METHODS: dict[str, Callable[[Model], uw.Result]] = {
    "scan": lambda lm: uw.scan(lm, IDS),
    "verify": lambda lm: uw.verify(lm, IDS, "L0H0", ["L1H0", "L2H1"]),
    "dla": lambda lm: uw.dla(lm, IDS[:2], 5, 9, replace="mean"),
    "dla resample": lambda lm: uw.dla(lm, IDS[:3], replace="resample", at="position"),
    "corpus_dla": lambda lm: uw.corpus_dla(lm, IDS, "L0H0", ["L1H0"]),
    "adversarial": lambda lm: uw.adversarial(lm, IDS, "L0H0"),
    "paths": lambda lm: uw.paths(lm, PAIRS, "heads", ["L1H0.v", "MLP1", "logits"]),
    "paths frozen": lambda lm: uw.paths(lm, PAIRS, "mlp_out", ["L1H0.q", "MLP2", "logits"], "frozen"),
    "bound": lambda lm: uw.bound(lm, PAIRS, uw.effects(lm, PAIRS, method="atp"), subsets=12, p=0.5),
    "exact": lambda lm: uw.effects(lm, PAIRS, ["embed", "L0H0", "MLP1", "L1.attn_out", "L2H0.k", "resid_post1"]),
    "exact kl": lambda lm: uw.effects(lm, PAIRS, ["L0H0", "MLP1"], "all", metric="kl", source="mean"),
    "atp": lambda lm: uw.effects(lm, PAIRS, "heads", method="atp", metric="prob"),
    "atp*": lambda lm: uw.effects(lm, PAIRS, ["L0H0", "L1H1.k", "L1H0.q", "MLP1"], method="atp*"),
    "relp": lambda lm: uw.effects(lm, PAIRS, "mlp_out", method="relp"),
    "ig": lambda lm: uw.effects(lm, PAIRS, "heads", method="ig", steps=2),
    "net": lambda lm: uw.effects(lm, PAIRS, "heads", method="net"),
    "audit": lambda lm: uw.audit(lm, IDS, IDS[:2], most=1),
    "trace": _edited,
}


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    """What is random is repeated less often than in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust, "_DRAWS", 9)
        patch.setattr(without, "ROTATIONS", 2)
        patch.setattr("unwrite.methods.verify.ROTATIONS", 2)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random model of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            shape = {"num_hidden_layers": 3, "num_attention_heads": 2, "tie_word_embeddings": family in TIED}
            tiny.model(family, 3, torch.float32, **shape).save_pretrained(made[family])
        return made[family]

    return folder


def parts_of(hf: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the blocks, and of everything else that has weights."""
    lists = [name for name, module in hf.named_modules() if isinstance(module, nn.ModuleList)]
    blocks = [f"{lists[0]}.{i}" for i in range(3)]
    others = [n for n, m in hf.named_modules() if not any(m.children()) and not n.startswith(lists[0])]
    return blocks, others


def spread(hf: nn.Module, layout: str) -> dict[str, str]:
    """Where every part of a model goes."""
    if layout == "all":
        return {"": "disk"}
    blocks, others = parts_of(hf)
    away = {"blocks": blocks[1:], "ends": [blocks[0], *others]}[layout]
    return {name: "disk" if name in away else "cpu" for name in (*blocks, *others)}


@pytest.fixture(scope="module")
def both(folders: Callable[[str], Path]) -> Callable[[str, str], tuple[Model, Model]]:
    """A family's model loaded whole, and spread by a layout."""
    wholes: dict[str, Model] = {}
    spreads: dict[tuple[str, str], Model] = {}

    def load(family: str, layout: str) -> tuple[Model, Model]:
        whole = wholes.setdefault(family, wholes.get(family) or uw.load(folders(family)))
        if (family, layout) not in spreads:
            spreads[family, layout] = uw.load(folders(family), device_map=spread(whole.hf, layout))
        return whole, spreads[family, layout]

    return load


def equal(got: uw.Result, want: uw.Result) -> None:
    xr.testing.assert_equal(got.data, want.data)
    assert len(want.data.data_vars)


def left_over(hf: nn.Module) -> Any:
    """What a run could have left on a model: hooks, other forwards, weights that it brought in."""
    return (
        {(name, kind): len(getattr(module, kind)) for name, module in hf.named_modules() for kind in dir(module)
         if kind.endswith("_hooks") and isinstance(getattr(module, kind), dict)},
        {name: module.__dict__.get("forward") for name, module in hf.named_modules()},
        {name: (part.device, part.requires_grad, part.grad) for name, part in hf.named_parameters()},
        hf.config._attn_implementation,
    )  # fmt: skip


# An audit is made of the others, and takes as long.
MATRIX = [
    (method, family, layout)
    for family, layout in [*((family, "blocks") for family in FAMILIES), ("gpt2", "ends"), ("olmo2", "all")]
    for method in METHODS
    if method != "audit" or (family, layout) == ("gemma2", "blocks")
]


@pytest.mark.parametrize(("method", "family", "layout"), MATRIX)
def test_every_number_is_that_of_the_model_loaded_whole(method: str, family: str, layout: str, both: Any) -> None:
    whole, lm = both(family, layout)
    before = left_over(lm.hf)
    equal(METHODS[method](lm), METHODS[method](whole))
    assert left_over(lm.hf) == before
    assert weights.offloaded(lm.hf)
