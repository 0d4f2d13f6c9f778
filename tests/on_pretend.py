"""Does every method do on another device what it does on the CPU? Collected by test_other_device.py alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pretend
import unwrite as uw
from executed import weights
from unwrite.contrasts import Pairs
from unwrite.model.load import view, weights_hash
from unwrite.model.view import Model
from unwrite.run import trust, without
from unwrite.run.slots import KINDS
from unwrite.tokens import from_ids

DEVICE = pretend.register()
# Learned positions, LayerNorm and tied weights; rotary ones, a gated MLP, grouped keys and values, in float32; own code
# around torch's attention, parallel blocks; norms after what is written, caps and windows.
FAMILIES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "gpt2": (torch.float64, {"tie_word_embeddings": True}),
    "llama": (torch.float32, {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "falcon": (torch.float64, {}),
    "gemma2": (torch.float64, {}),
}
IDS = torch.randint(3, 50, (6, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(7) < torch.tensor([7, 5, 7, 6, 7, 7])[:, None]
SOURCE = torch.where(torch.arange(7) == 2, 3 + (IDS + 11) % 47, IDS)
HEADS = ["L0H0", "L1H1"]


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """Few draws; and torch's attention computed openly, since its fused kernels are for devices that it knows."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(trust, "_DRAWS", 9)
        patch.setattr(without, "ROTATIONS", 2)
        patch.setattr("unwrite.methods.verify.ROTATIONS", 2)
        yield


@cache
def models(family: str) -> tuple[Model, Model]:
    """The same weights on the CPU and on the other device."""
    dtype, settings = FAMILIES[family]
    hf = weights(family, 1, dtype, num_hidden_layers=3, **{"num_attention_heads": 2, **settings})
    return view(hf), view(copy.deepcopy(hf).to(DEVICE))


def pairs() -> Pairs:
    read = [from_ids(part[:4], MASK[:4]) for part in (IDS, SOURCE)]
    return uw.pairs(*read, [5, 6, 7, 8], [9, 3, 4, 11])


def of_tensors(lm: Model) -> Pairs:
    """Prompts that lie where the model does, as a user may give them."""
    return uw.pairs(IDS[:3].to(lm.device), SOURCE[:3].to(lm.device), 5)


def own(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1)


def traced(lm: Model, edits: list[uw.Edit], *sites: str, ids: Tensor = IDS) -> dict[str, np.ndarray]:
    with uw.trace(lm, *sites, edits=edits) as seen:
        logits = lm.hf(ids.to(lm.device)).logits
    return {site: seen[site].detach().cpu().numpy() for site in sites} | {"logits": logits.detach().cpu().numpy()}


def generated(lm: Model) -> dict[str, np.ndarray]:
    with uw.trace(lm, edits=uw.Edit.add("resid_post0", 1.0, at=[2, 5])):
        return {"ids": lm.hf.generate(IDS[:2].to(lm.device), max_new_tokens=3, do_sample=False).cpu().numpy()}


def slope(lm: Model) -> dict[str, np.ndarray]:
    """Gradients through a trace, at what it recorded and at an edit's own tensor."""
    gain = torch.full((6, 7), 0.5, dtype=lm.dtype, device=lm.device, requires_grad=True)
    with torch.enable_grad(), uw.trace(lm, "MLP1", edits=uw.Edit.set("L0H0", 0.0, gain=gain)) as seen:
        logits = lm.hf(IDS.to(lm.device)).logits
        seen["MLP1"].retain_grad()
        logits.logsumexp(-1).sum().backward()
    lm.hf.zero_grad()
    return {"gain": gain.grad.cpu().numpy(), "MLP1": seen["MLP1"].grad.cpu().numpy()}


def edits(lm: Model) -> dict[str, np.ndarray]:
    """Tensors from both devices."""
    d = torch.linspace(-1, 1, lm.d_model, dtype=lm.dtype)
    other = torch.linspace(1, 2, 2 * lm.d_model, dtype=lm.dtype).reshape(2, -1).cos()
    asked = [
        uw.Edit.add("resid_post0", d.to(lm.device), gain=torch.tensor(0.5)),
        uw.Edit.add("MLP0", d, at=MASK, gain=torch.tensor(2.0, device=lm.device)),
        uw.Edit.set("MLP1", d, basis=other, at=MASK.to(lm.device)),
        uw.Edit.project_out("resid_post1", other.to(lm.device), at=-1),
        uw.Edit.set("L0H1", torch.ones(6, 2, lm.d_model), at=[1, 3], gain=torch.full((6, 2), 0.3)),
        uw.Edit.set("L1H0.z", torch.tensor(0.0), at=slice(1, 4)),
        uw.Edit.scale("L2H0.pattern" if lm.row.interface else "L2H0.z", 0.5),
    ]
    return traced(lm, asked, "L0H0", "MLP1", "resid_post1", "L1H1.v", "L2H1.pattern", "embed", "MLP2.act")


Case = Callable[[Model], Any]
METHODS: dict[str, Case] = {
    "certificate": lambda lm: {name: np.array(error) for name, error in lm.certificate.items()},
    "scan": lambda lm: uw.scan(lm, IDS, mask=MASK, batch=2),
    "scan of some": lambda lm: uw.scan(lm, IDS.to(lm.device), [lm.nodes[1], lm.nodes[-1]], mask=MASK.to(lm.device)),
    "scan in buckets": lambda lm: in_buckets(lm),
    "verify": lambda lm: uw.verify(lm, IDS, "L0H0", mask=MASK),
    "verify an MLP": lambda lm: uw.verify(lm, IDS, "MLP0", ["L1H0", "L2H1"]),
    "dla": lambda lm: uw.dla(lm, IDS, 5, [9, 3, 4, 11, 7, 6], mask=MASK, batch=4),
    "dla, mean": lambda lm: uw.dla(lm, IDS, at="position", replace="mean", texts=from_ids(SOURCE)),
    "dla, resample": lambda lm: uw.dla(lm, IDS.to(lm.device), 5, position=3, replace="resample"),
    "corpus_dla": lambda lm: uw.corpus_dla(lm, IDS, "L0H0", ["L1H0", "L2H1"], mask=MASK),
    "corpus_dla, next": lambda lm: uw.corpus_dla(lm, IDS, "L0H0", ["L1H0"], logit="next token"),
    "adversarial": lambda lm: uw.adversarial(lm, IDS, "L0H0", held_out=SOURCE),
    "audit": lambda lm: uw.audit(lm, IDS, IDS[:2], most=1),
    "audit, own prompts": lambda lm: uw.audit(lm, torch.cat([IDS, SOURCE]), most=2),
    "paths": lambda lm: uw.paths(lm, pairs(), "heads", ["L1H0.v", "L2H1", "MLP1", "logits"]),
    "paths, frozen": lambda lm: uw.paths(lm, pairs(), ["L0H0", "MLP0", "embed"], ["L1H0.q", "MLP1", "logits"], "frozen"),
    "bound": lambda lm: uw.bound(lm, pairs(), uw.effects(lm, pairs(), method="atp", at="all"), 2, 12, 0.5),
    "bound, each": lambda lm: uw.bound(lm, pairs(), uw.effects(lm, pairs(), HEADS, method="relp"), 2, 12, 0.5),
    "agree": lambda lm: uw.agree(uw.effects(lm, pairs(), method="relp"), uw.effects(lm, pairs())),
    "compare": lambda lm: uw.compare(lm, of_tensors(lm), methods=("exact", "relp", "ig", "direct", "net")),
    "atp*": lambda lm: uw.effects(lm, pairs(), [*HEADS, *("L1H1.k", "L1H0.q") * lm.row.interface], method="atp*"),
    "by rules": lambda lm: uw.effects(lm, pairs(), method=uw.Rules("held", "free", "values"), metric="log_prob"),
    "kl": lambda lm: uw.effects(lm, pairs(), [*HEADS, "MLP1"], at="last", metric="kl", source="mean"),
    "own metric": lambda lm: uw.effects(lm, pairs(), HEADS, metric=own, source="zero"),
    "own metric, ig": lambda lm: uw.effects(lm, pairs(), HEADS, method="ig", metric=own, steps=2),
    "prob, resample": lambda lm: uw.effects(lm, of_tensors(lm), HEADS, at="all", metric="prob", source="resample"),
    "another model": lambda lm: uw.effects(lm, pairs(), HEADS, source=lm),
    "edits": edits,
    "slope": slope,
    "generate": generated,
}
for _kind in KINDS:
    METHODS[f"effects of {_kind}"] = lambda lm, kind=_kind: every_way(lm, kind)


def every_way(lm: Model, kind: str) -> dict[str, np.ndarray]:
    if not lm.row.interface and kind in ("q", "k", "shared_k"):
        pytest.skip(f"{lm.family} does not show {kind}")
    ways = {at: uw.effects(lm, pairs(), kind, at=at)["effect"].values for at in ("each", "all", "last")}
    return ways | {"atp": uw.effects(lm, pairs(), kind, method="atp")["effect"].values}


def in_buckets(lm: Model) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unwrite.run.positions._buckets", lambda *_: 3)
        return uw.scan(lm, IDS, mask=MASK)


def numbers(found: Any) -> dict[str, np.ndarray]:
    if isinstance(found, uw.Result):
        return {str(name): np.asarray(part) for name, part in found.data.variables.items()}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bits(name: str, family: str) -> None:
    here, there = (numbers(METHODS[name](lm)) for lm in models(family))
    assert here.keys() == there.keys()
    for part, expected in here.items():
        np.testing.assert_array_equal(there[part], expected, err_msg=part, strict=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_have_the_same_hash(family: str) -> None:
    here, there = models(family)
    assert there.device == DEVICE
    assert weights_hash(here) == weights_hash(there)
