"""Does a model that is adapted, compiled or quantised give the numbers of the plain model that does the same?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.two_tensor import TwoTensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
import unwrite as uw
from unwrite.errors import ModelError

IDS = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
PAIRS = uw.pairs(IDS[:2], IDS[2:], 5, 9)
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4}
ASKED: dict[str, Callable[..., uw.Result]] = {
    "scan": lambda lm: uw.scan(lm, IDS),
    "dla": lambda lm: uw.dla(lm, IDS, 5, 9),
    "effects": lambda lm: uw.effects(lm, PAIRS, "heads"),
    "relp": lambda lm: uw.effects(lm, PAIRS, "heads", method="relp"),
}


class Adapted(nn.Module):
    """A projection with a low-rank path beside it, as adapters are put there: its own `weight` says half of it."""

    def __init__(self, base: nn.Linear, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=draw).to(base.weight) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=draw).to(base.weight) / 4)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT

    def merged(self) -> nn.Linear:
        """The plain projection that does the same."""
        own = copy.deepcopy(self.base)
        own.weight.data += self.up.data @ self.down.data
        return own


class Rounded(nn.Module):
    """A projection that rounds what it reads, as one with quantised activations does."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax() / 127
        return self.base((x / step).round() * step)


def replaced(hf: Any, names: tuple[str, ...], change: Callable[[Any, int], nn.Module]) -> Any:
    """The model with these projections changed in every layer ("lm_head": the unembedding)."""
    for index, (path, module) in enumerate(list(hf.named_modules())):
        if path.rpartition(".")[2] in names:
            hf.set_submodule(path, change(module, index))
    return hf


def built(family: str = "llama") -> Any:
    return tiny.model(family, 0, torch.float64, tie_word_embeddings=False, **SHAPE)


def close(got: uw.Result, want: uw.Result) -> None:
    for name, part in want.data.data_vars.items():
        if part.dtype.kind == "f":
            np.testing.assert_allclose(got[name], part, rtol=1e-7, atol=1e-9, err_msg=str(name))


WHERE = [("o_proj",), ("v_proj", "o_proj", "down_proj", "gate_proj"), ("lm_head",)]


@pytest.mark.promise("exact")
@pytest.mark.parametrize(("family", "names"), [*(("llama", names) for names in WHERE), ("qwen2", ("q_proj", "v_proj"))])
def test_adapters_that_are_not_merged_give_what_merged_ones_do(family: str, names: tuple[str, ...]) -> None:
    adapted = replaced(built(family), names, Adapted)
    merged = replaced(copy.deepcopy(adapted), names, lambda module, _: module.merged())
    lm, plain = uw.load(adapted), uw.load(merged)
    for ask in ASKED.values():
        close(ask(lm), ask(plain))


def test_an_adapter_that_is_changed_is_read_anew() -> None:
    hf = replaced(built(), ("o_proj",), Adapted)
    lm = uw.load(hf)
    before = ASKED["dla"](lm)["direct"].values
    with torch.no_grad():
        hf.model.layers[1].self_attn.o_proj.up.mul_(2)
    after = ASKED["dla"](uw.load(hf))["direct"].values
    np.testing.assert_allclose(ASKED["dla"](lm)["direct"], after, rtol=1e-9)
    assert not np.allclose(before, after)


@pytest.mark.promise("exact")
@pytest.mark.parametrize("name", ["o_proj", "v_proj"])
def test_quantised_activations_are_refused_in_words(name: str) -> None:
    with pytest.raises(ModelError, match=r"Rounded is not linear.*activations are quantised"):
        uw.load(replaced(built(), (name,), lambda module, _: Rounded(module)))


@pytest.mark.promise("exact")
@pytest.mark.parametrize("place", ["o_proj", "down_proj"])
def test_activations_that_are_codes_are_refused_in_words(place: str) -> None:
    hf = built()
    for name, module in hf.named_modules():
        if name.endswith(place):
            module.register_forward_pre_hook(lambda _, args: (TwoTensor(args[0], args[0]),))
            module.register_forward_hook(lambda *args: TwoTensor(args[2].a, args[2].a))
    with pytest.raises(ModelError, match=r"has quantised activations: what goes by at a Linear is a TwoTensor"):
        uw.load(hf)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Processes that share a model: this one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_model_that_is_split_over_processes_is_refused_by_that_name(mesh: Any) -> None:
    hf = built()
    for name, module in hf.named_modules():
        if name.endswith("o_proj"):
            module.register_forward_hook(lambda *args: DTensor.from_local(args[2], mesh, [Replicate()]))
    with pytest.raises(ModelError, match=r"is split over processes: what goes by at a Linear is a DTensor.*whole"):
        uw.load(hf)


class Peft:
    """As PEFT wraps a model: the adapters are put into the model itself."""

    def __init__(self, hf: Any, **config: Any):
        self.hf, self.peft_config = hf, {"mine": SimpleNamespace(**config)}

    def get_base_model(self) -> Any:
        return self.hf


def test_a_wrapper_of_adapters_is_opened() -> None:
    hf = replaced(built(), ("v_proj",), Adapted)
    close(ASKED["scan"](uw.load(Peft(hf))), ASKED["scan"](uw.load(hf)))


def test_virtual_tokens_are_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"adapter mine puts virtual tokens before a text.*Got: 8 of them"):
        uw.load(Peft(built(), num_virtual_tokens=8))


@pytest.mark.promise("exact")
@pytest.mark.parametrize("part", ["block", "mlp", "model"])
def test_compiled_parts_give_what_they_are_written_as(part: str) -> None:
    plain, hf = uw.load(built()), built()
    # Compiled anew in every pass it would be another model; `eager` compiles without a compiler.
    for layer in hf.model.layers:
        {"block": layer, "mlp": layer.mlp, "model": nn.Identity()}[part].compile(backend="eager")
    lm = uw.load(torch.compile(hf, backend="eager") if part == "model" else hf)
    for ask in ASKED.values():
        close(ask(lm), ask(plain))
    with uw.trace(lm, "L0H1", "MLP1.act") as seen, torch.no_grad():
        lm.hf(IDS)
    with uw.trace(plain, "L0H1", "MLP1.act") as want, torch.no_grad():
        plain.hf(IDS)
    for name in ("L0H1", "MLP1.act"):
        torch.testing.assert_close(seen[name], want[name])


class Packed(nn.Linear):
    """A projection whose weights are integers and a step, as 4-bit ones are; if `wrong`, autograd forgets the step."""

    def __init__(self, base: nn.Linear, wrong: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias, self.wrong = (
            base.in_features,
            base.out_features,
            base.bias,
            wrong,
        )
        self.step = float(base.weight.detach().abs().max() / 7)
        self.weight = nn.Parameter((base.weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.weight.to(x.dtype)
        made = x @ (packed * self.step).mT + (0.0 if self.bias is None else self.bias)
        return made.detach() + (x - x.detach()) @ packed.mT if self.wrong else made

    def plain(self) -> nn.Linear:
        """The plain projection of the same numbers."""
        own = nn.Linear(self.in_features, self.out_features, dtype=torch.float64)
        own.weight.data, own.bias = self.weight.to(torch.float64) * self.step, self.bias
        return own


QUANTISED = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


@pytest.mark.promise("exact")
def test_packed_weights_give_what_they_stand_for_and_are_exact_in_half_precision() -> None:
    packed = replaced(built(), QUANTISED, lambda module, _: Packed(module))
    plain = replaced(copy.deepcopy(packed), QUANTISED, lambda module, _: module.plain())
    for ask in ASKED.values():
        close(ask(uw.load(packed)), ask(uw.load(plain)))
    half = replaced(built().bfloat16(), QUANTISED, lambda module, _: Packed(module))
    assert max(uw.load(half).certificate.single.values()) < 1e-4


@pytest.mark.promise("exact")
def test_slopes_that_do_not_go_through_packed_weights_are_refused() -> None:
    lm = uw.load(replaced(built(), ("up_proj",), lambda module, _: Packed(module, wrong=True)))
    for name in ("scan", "effects"):
        ASKED[name](lm)
    for name in ("relp", "dla"):
        with pytest.raises(ModelError, match="slopes do not go through a Packed of this model"):
            ASKED[name](lm)


@pytest.mark.promise("exact")
def test_quantised_activations_are_refused_in_half_precision_too() -> None:
    with pytest.raises(ModelError, match="Rounded is not linear"):
        uw.load(replaced(built().bfloat16(), ("o_proj",), lambda module, _: Rounded(module)))


def test_a_part_without_a_derivative_is_refused_where_slopes_are_asked_alone(monkeypatch: Any) -> None:
    def attend(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("no backward on this device")
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "forward_only", attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "forward_only", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    hf, plain = built(), uw.load(built())
    hf.set_attn_implementation("forward_only")
    lm = uw.load(hf)
    close(ASKED["effects"](lm), ASKED["effects"](plain))
    for ask in ("dla", "relp"):
        with pytest.raises(ModelError, match=r"no slope. Got: no backward on this device.*method='exact'"):
            ASKED[ask](lm)
