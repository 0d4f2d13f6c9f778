"""Does every method do on another device what it does on the CPU? Collected by test_other_device.py alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pretend
import unwrite as uw
from executed import weights
from unwrite.errors import NumericError
from unwrite.model.load import view, weights_hash
from unwrite.model.view import Model
from unwrite.nodes import GROUPS
from unwrite.prompts.pairs import Pairs
from unwrite.prompts.tokens import from_ids
from unwrite.run.loop.job import Stage
from unwrite.run.tally import without
from unwrite.stats import bootstrap

DEVICE = pretend.register()
# Learned positions, LayerNorm and tied weights; rotary ones, a gated MLP, grouped keys and values, in float32.
FAMILIES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "gpt2": (torch.float64, {"tie_word_embeddings": True}),
    "llama": (torch.float32, {"num_attention_heads": 4, "num_key_value_heads": 2}),
}
IDS = torch.randint(3, 50, (6, 7), generator=torch.Generator().manual_seed(0))
# The longest two have one other prompt that reaches their end, which is too few for some numbers.
MASK = torch.arange(7) < torch.tensor([7, 5, 7, 6, 5, 6])[:, None]
SOURCE = torch.where(torch.arange(7) == 2, 3 + (IDS + 11) % 47, IDS)
HEADS = ["L0H0", "L1H1"]


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """Few draws; and torch's attention computed openly, since its fused kernels are for devices that it knows."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(bootstrap, "_DRAWS", 9)
        patch.setattr(without, "ROTATIONS", 2)
        patch.setattr("unwrite.methods.verify.ROTATIONS", 2)
        yield


@cache
def models(family: str) -> tuple[Model, Model]:
    """The same weights on the CPU and on the other device."""
    dtype, settings = FAMILIES[family]
    hf = weights(family, 1, dtype, num_hidden_layers=2, hidden_size=16, **{"num_attention_heads": 2, **settings})
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
        uw.Edit.project_out("resid_post0", other.to(lm.device), at=-1),
        uw.Edit.set("L0H1", torch.ones(6, 2, lm.d_model), at=[1, 3], gain=torch.full((6, 2), 0.3)),
        uw.Edit.set("L1H0.z", torch.tensor(0.0), at=slice(1, 4)),
        uw.Edit.scale("L1.v_input", 0.5),
        uw.Edit.add("L1H1", torch.tensor(1.0, device=DEVICE), gain=torch.tensor(0.2, device=DEVICE)),
        uw.Edit.scale("L1H0.pattern", 0.5),
    ]
    return traced(lm, asked, "L0H0", "MLP1", "resid_post1", "L1KV0.k", "L1H1.pattern", "embed", "MLP1.act")


Case = Callable[[Model], Any]
# What takes long, or differs little from the rest, is asked of one family.
ONCE: dict[str, Case] = {
    "audit": lambda lm: uw.audit(lm, IDS, IDS[:2], most=1),
    "dla, mean": lambda lm: uw.dla(lm, IDS[:3], at="position", replace="mean", texts=from_ids(SOURCE)),
    "dla, resample": lambda lm: uw.dla(lm, IDS[:3].to(lm.device), 5, position=rows(lm), replace="resample"),
    "verify an MLP": lambda lm: uw.verify(lm, IDS, "MLP0", ["L1H0", "L1H1"]),
    "compare": lambda lm: uw.compare(lm, of_tensors(lm), methods=("exact", "relp", "ig", "direct", "net")),
    "dla, resumed": lambda lm: resumed(partial(uw.dla, lm, IDS[:4], 5, batch=2)),
    "adversarial, resumed": lambda lm: resumed(partial(uw.adversarial, lm, IDS, "L0H0", batch=3)),
    "paths, resumed": lambda lm: resumed(partial(uw.paths, lm, pairs(), HEADS, batch=2)),
    "agree": lambda lm: uw.agree(uw.effects(lm, pairs(), method="relp"), uw.effects(lm, pairs())),
    "verify, resumed": lambda lm: resumed(partial(uw.verify, lm, IDS, "L0H0", batch=3)),
    "corpus_dla, resumed": lambda lm: resumed(partial(uw.corpus_dla, lm, IDS, "L0H0", ["L1H0"], batch=3)),
    "effects, resumed": lambda lm: resumed(partial(uw.effects, lm, pairs(), HEADS, batch=2)),
    "own metric, ig": lambda lm: uw.effects(lm, pairs(), HEADS, method="ig", metric=own, steps=2),
    "by rules": lambda lm: uw.effects(lm, pairs(), method=uw.Rules("held", "free", "values"), metric="log_prob"),
    "bound, each": lambda lm: uw.bound(lm, pairs(), uw.effects(lm, pairs(), HEADS, method="relp"), 1, 12, 0.5),
    "corpus_dla, next": lambda lm: uw.corpus_dla(lm, IDS, "L0H0", ["L1H0"], logit="next token"),
    "own metric": lambda lm: uw.effects(lm, pairs(), HEADS, metric=own, source="zero"),
    "prob, resample": lambda lm: uw.effects(lm, of_tensors(lm), HEADS, at="all", metric="prob", source="resample"),
    "subspace": lambda lm: uw.subspace(lm, pairs(), ["MLP0.act", "L0H1.z"], held="pair", seeds=1, steps=2, draws=1),
    "an infinity": lambda lm: infinite(lm),
    "scan in buckets": lambda lm: in_buckets(lm),
}
METHODS: dict[str, Case] = {
    "certificate": lambda lm: {name: np.array(error) for name, error in lm.certificate.items()},
    "weights": lambda lm: {"hash": np.array(weights_hash(lm))},
    "scan": lambda lm: uw.scan(lm, IDS, mask=MASK, batch=2),
    "scan of some": lambda lm: uw.scan(lm, IDS.to(lm.device), [lm.nodes[1], lm.nodes[-1]], mask=MASK.to(lm.device)),
    "scan, resumed": lambda lm: resumed(partial(uw.scan, lm, IDS, mask=MASK, batch=2)),
    "verify": lambda lm: uw.verify(lm, IDS, "L0H0", mask=MASK),
    "dla": lambda lm: uw.dla(lm, IDS[:4], 5, [9, 3, 4, 11], mask=MASK[:4], batch=3),
    "corpus_dla": lambda lm: uw.corpus_dla(lm, IDS, "L0H0", ["L1H0", "L1H1"], mask=MASK),
    "adversarial": lambda lm: uw.adversarial(lm, IDS, "L0H0", held_out=SOURCE),
    "paths": lambda lm: uw.paths(lm, pairs(), ["L0H0+MLP0", *HEADS, "MLP0"], ["L1H0.v", "L1H1+MLP1", "logits"]),
    "paths, frozen": lambda lm: uw.paths(lm, pairs(), ["L0.attn_out", "embed"], ["L1H0.q", "MLP1", "logits"], "frozen"),
    "paths, another": lambda lm: uw.paths(lm, pairs(), "heads", ["L1H0", "logits"], source=elsewhere(lm)),
    "bound": lambda lm: uw.bound(lm, pairs(), uw.effects(lm, pairs(), method="atp", at="all"), 1, 12, 0.5),
    "circuit": lambda lm: uw.circuit(lm, pairs(), [*HEADS, "MLP0"], roles=["end"], draws=1),
    "atp*": lambda lm: uw.effects(lm, pairs(), [*HEADS, "L1H1.k", "L1H0.q"], method="atp*"),
    "kl": lambda lm: uw.effects(lm, pairs(), [*HEADS, "MLP1"], at="last", metric="kl", source="mean"),
    "exact, another": lambda lm: uw.effects(lm, pairs(), HEADS, source=elsewhere(lm)),
    "atp, another": lambda lm: uw.effects(lm, pairs(), HEADS, method="atp", source=elsewhere(lm)),
    "edits": lambda lm: edits(lm),
    "slope": lambda lm: slope(lm),
    "generate": lambda lm: generated(lm),
}
# Of the family that has all of them.
NODES: dict[str, Case] = {f"effects of {kind}": lambda lm, kind=kind: both_ways(lm, kind) for kind in GROUPS}


def both_ways(lm: Model, kind: str) -> dict[str, np.ndarray]:
    return {method: uw.effects(lm, pairs(), kind, method=method)["effect"].values for method in ("exact", "atp")}


def rows(lm: Model) -> Tensor:
    return torch.tensor([4, 6, 5], device=lm.device)


def elsewhere(lm: Model) -> Model:
    """A model on the device where this one is not."""
    return next(other for other in models(lm.family) if other.device != lm.device)


def resumed(asked: Callable[..., uw.Result]) -> uw.Result:
    """What a run finds that was stopped after its first batch and goes on from a file."""
    told: list[int] = []

    def stop(step: Any) -> None:
        if step.done:  # a sweep speaks also inside of its first batch
            told.append(step.done)
            raise KeyboardInterrupt

    def tell(step: Any) -> None:
        told.append(step.before)

    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "due", True)
        with pytest.raises(KeyboardInterrupt):
            asked(checkpoint=place, listener=stop)
        found = asked(checkpoint=place, listener=tell)
    assert told[0] in told[1:], "it began anew"
    return found


def infinite(lm: Model) -> dict[str, np.ndarray]:
    """What is said of a number that is none."""
    broken = view(copy.deepcopy(lm.hf))
    with torch.no_grad():
        broken.layers[1].mlp.get_parameter(next(iter(dict(broken.layers[1].mlp.named_parameters())))).fill_(torch.inf)
    said: dict[str, np.ndarray] = {}
    for name in ("scan", "verify", "dla", "exact, source"):
        with pytest.raises(NumericError) as caught:
            uw.effects(broken, pairs(), HEADS) if name == "exact, source" else METHODS[name](broken)
        said[name] = np.array(str(caught.value))
    return said


def in_buckets(lm: Model) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unwrite.run.tally.position_part._buckets", lambda *_: 3)
        return uw.scan(lm, IDS, mask=MASK)


def numbers(found: Any) -> dict[str, np.ndarray]:
    if isinstance(found, uw.Result):
        return {str(name): np.asarray(part) for name, part in found.data.variables.items()}
    return found


EVERY = {**METHODS, **ONCE, **NODES}
CASES = [
    *((name, family) for family in FAMILIES for name in METHODS),
    *((name, "gpt2") for name in ONCE),
    *((name, "llama") for name in NODES),
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_every_method_gives_the_same_bits(name: str, family: str) -> None:
    here, there = models(family)
    assert (here.device.type, there.device) == ("cpu", DEVICE)
    want, got = (numbers(EVERY[name](lm)) for lm in (here, there))
    assert got.keys() == want.keys()
    for part, expected in want.items():
        np.testing.assert_array_equal(got[part], expected, err_msg=part, strict=True)


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a sum": lambda x, cpu: x + cpu,
    "a sum in place": lambda x, cpu: x.add_(cpu),
    "a sum into what lies on the CPU": lambda x, cpu: cpu.add_(x),
    "a product": lambda x, cpu: x @ cpu,
    "a list": lambda x, cpu: torch.cat([x, cpu]),
    "a mask": lambda x, cpu: x.masked_fill(cpu > 0, 0.0),
    "rows that are counted": lambda x, cpu: cpu.index_add_(0, torch.arange(2).to(x.device), cpu.clone()),
    "an index of the device": lambda x, cpu: cpu[torch.arange(2).to(x.device)],
    "vectors put in": lambda x, cpu: x.__setitem__(torch.arange(2), cpu),
    "integers multiplied": lambda x, cpu: x.long() @ x.long(),
    "draws of the CPU": lambda x, cpu: torch.randn(2, generator=torch.Generator(), device=x.device),
}
ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda x, cpu: x * cpu[0, 1],
    "an index of the CPU": lambda x, cpu: x[torch.tensor([1, 0])],
    "a mask of the CPU as index": lambda x, cpu: x[cpu > 1],
    "a number put in": lambda x, cpu: x.index_put((torch.tensor([1]),), cpu[1, 1]),
    "a row copied": lambda x, cpu: x.copy_(cpu.mT),
    "a shape changed in place": lambda x, cpu: x.unsqueeze_(0).expand(2, 2, 2),
    "a slope": lambda x, cpu: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x)[0],
}


def matrices() -> tuple[Tensor, Tensor]:
    cpu = torch.arange(4.0).reshape(2, 2)
    return cpu.to(DEVICE, copy=True), cpu


@pytest.mark.parametrize("name", REFUSED)
def test_the_device_refuses_what_cuda_refuses(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"same device|not implemented|device type for generator"):
        REFUSED[name](*matrices())


@pytest.mark.parametrize("name", ALLOWED)
def test_the_device_allows_what_cuda_allows(name: str) -> None:
    got = ALLOWED[name](*matrices())
    assert got.device == DEVICE
    assert torch.equal(got.cpu(), ALLOWED[name](torch.arange(4.0).reshape(2, 2), torch.arange(4.0).reshape(2, 2)))


def test_numpy_sees_only_what_was_brought_back() -> None:
    there, cpu = matrices()
    for read in (Tensor.numpy, np.asarray):
        with pytest.raises((RuntimeError, TypeError)):
            read(there)
    assert np.array_equal(there.cpu().numpy(), cpu.numpy())


def test_tied_weights_stay_tied() -> None:
    hf = models("gpt2")[1].hf
    assert hf.lm_head.weight is hf.get_input_embeddings().weight
    assert hf.lm_head.weight.device == DEVICE


def test_a_model_is_loaded_onto_the_device() -> None:
    lm = uw.load("default", device=pretend.NAME)
    assert {part.device for part in (*lm.hf.parameters(), *lm.hf.buffers())} == {DEVICE}
    assert weights_hash(lm) == weights_hash(uw.load("default"))
    assert all(check.ok for check in uw.doctor(lm, 8, 16).checks)
