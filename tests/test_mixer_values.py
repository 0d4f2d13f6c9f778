"""Is what mixers carry through values that of their kernels? Spies in transformers' own modules call these once more.

The truth: what of a vector reaches the values by notes of where they lie, through a convolution and the held factor of
its silu, is given to the very function that the mixer called, in the place of its values and with all else as it was;
what the function gives is multiplied by what stood between it and the out-projection. Nothing of the library is used.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import every
import unwrite as uw
from executed import hooks
from methods import IDS, few_draws
from unwrite.model import identities
from unwrite.model.certificate import certify
from unwrite.model.fold import fold
from unwrite.model.hooks import hooked
from unwrite.model.load import view
from unwrite.model.mixer_values import shown_values
from unwrite.model.mixers import Frozen, holding, sloped_z, through_mixer
from unwrite.model.view import Model
from unwrite.run.backward.rules import RULES
from unwrite.run.backward.slopes import cotangents
from unwrite.run.replay import clean as replay
from unwrite.studies.described import described

CONVOLUTION = "causal_conv1d_fn"


@dataclass(frozen=True)
class Notes:
    """Of a mixer: what makes its values, channels before theirs in its convolution, and what its kernel calls them."""

    weight: Callable[[Any], Tensor]
    before: Callable[[Any], int]
    kernel: str
    value: str


def _scanned(mixer: Any) -> Tensor:
    return mixer.in_proj.weight[mixer.intermediate_size : 2 * mixer.intermediate_size]


NOTES = {
    "qwen3_5_text": Notes(
        lambda mixer: mixer.in_proj_qkv.weight[2 * mixer.key_dim :], lambda mixer: 2 * mixer.key_dim,
        "torch_chunk_gated_delta_rule", "value",
    ),
    "kimi_linear": Notes(
        lambda mixer: mixer.v_proj.weight, lambda mixer: 2 * mixer.qkv_dim, "chunk_kimi_delta_attention", "value"
    ),
    "bamba": Notes(_scanned, lambda mixer: 0, "mamba2_chunk_scan", "hidden_states"),
    "mamba2": Notes(_scanned, lambda mixer: 0, "mamba2_chunk_scan", "hidden_states"),
    "mamba": Notes(
        lambda mixer: mixer.in_proj.weight[: mixer.intermediate_size], lambda mixer: 0,
        "mamba_selective_scan", "hidden_states",
    ),
    "lfm2": Notes(
        lambda mixer: mixer.in_proj.weight[2 * len(mixer.out_proj.weight) :], lambda mixer: 0,
        CONVOLUTION, "hidden_states",
    ),
    "recurrent_gemma": Notes(lambda mixer: mixer.linear_x.weight, lambda mixer: 0, "_rnn_scan", "hidden_states"),
}  # fmt: skip
KINDS = tuple(NOTES)
Given = dict[str, Any]
Seen = dict[str, list[tuple[Callable[..., Any], Given, Tensor]]]


@cache
def model(kind: str) -> Model:
    return view(every.model(kind), convention="raw")


@contextmanager
def spied(owner: Any, name: str, seen: Seen) -> Iterator[None]:
    """Inside the `with`, `seen` is told of every call of a function: itself, its arguments by name and what it gave."""
    own = getattr(owner, name)

    def spy(*args: Any, **named: Any) -> Any:
        made = own(*args, **named)
        given = inspect.signature(own).bind(*args, **named).arguments
        given |= given.pop("kwargs", {})
        seen.setdefault(name, []).append((own, given, made if isinstance(made, Tensor) else made[0].clone()))
        return made

    with patch.object(owner, name, spy):
        yield


@dataclass
class Run:
    """A clean run, and what its last mixer's functions were called with."""

    lm: Model
    clean: replay.Clean
    index: int
    kernel: tuple[Callable[..., Any], Given, Tensor]
    convolved: tuple[Tensor, Tensor, Tensor | None]  # what was convolved [prompt, channel, position], taps, bias
    silu: bool

    @property
    def mixer(self) -> Any:
        return self.lm.layers[self.index].attention

    def z(self) -> Tensor:
        return self.clean.record.z[self.index].flatten(-2)


@cache
def run_of(kind: str, which: int = -1) -> Run:
    lm, seen = model(kind), {}
    mixers = [layer for layer in lm.layers if layer.mixes]
    mixer: Any = mixers[which].attention
    module, notes = importlib.import_module(type(mixer).__module__), NOTES[kind]
    with ExitStack() as stack:
        own = notes.kernel == "_rnn_scan"
        stack.enter_context(spied(mixer.rg_lru if own else module, notes.kernel, seen))
        if own:
            stack.enter_context(spied(mixer.conv_1d, "forward", seen))
        elif notes.kernel != CONVOLUTION:
            stack.enter_context(spied(module, CONVOLUTION, seen))
        clean = replay.clean(lm, IDS, fold(lm), with_patterns=True)
    at = 0 if own else which
    _, conv, _ = seen["forward" if own else CONVOLUTION][at]
    if own:  # conv_1d is padded behind as well
        conv = {"hidden_states": conv["input"], "weight": mixer.conv_1d.weight[:, 0], "bias": mixer.conv_1d.bias}
    convolved = conv["hidden_states"], conv["weight"], conv.get("bias")
    return Run(lm, clean, mixers[which].index, seen[notes.kernel][at], convolved, conv.get("activation") == "silu")


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Each channel of [prompt, channel, position] with its own taps, the last of which is for now."""
    padded = nn.functional.pad(x.double(), (taps.shape[1] - 1, 0))
    return sum(padded[..., i : i + x.shape[-1]] * taps[:, i, None].double() for i in range(taps.shape[1]))  # pyright: ignore[reportReturnType]


@torch.no_grad()
def carried_by_hand(kind: str, run: Run, read: Tensor, biases: bool = False) -> Tensor:
    """What a vector in what the mixer reads puts into its z, by notes: [prompt, position, z]. Or what biases do."""
    notes, (x, taps, bias) = NOTES[kind], run.convolved
    weight, before = notes.weight(run.mixer), notes.before(run.mixer)
    made = (read @ weight.t()).mT
    bias = torch.zeros(x.shape[1]) if bias is None else bias
    if biases:
        made = torch.zeros_like(made) + (run.mixer.linear_x.bias[:, None] if kind == "recurrent_gemma" else 0)
    function, given, core = run.kernel
    if kind == "lfm2":  # the convolution is its kernel: it is given B ⊙ x, and what it gives is multiplied by C
        gate = (read_by_mixer(run) @ run.mixer.in_proj.weight[: len(weight)].t()).mT
        values = gate * made
    else:
        channels = slice(before, before + len(weight))
        values = convolve(made, taps[channels]) + biases * bias[channels, None]
        if run.silu:
            values = values * (convolve(x[:, channels], taps[channels]) + bias[channels, None]).sigmoid()
        own = given[notes.value]
        if kind == "recurrent_gemma":  # what its gate and its norm make of what was convolved
            values = values * (own.mT / (convolve(x, taps) + bias[:, None]))
        values = values.float() if own.shape == values.shape else values.float().mT.reshape(own.shape)
    with_it = function(**{**given, notes.value: values})
    with_it = with_it if isinstance(with_it, Tensor) else with_it[0]
    z = run.z()
    with_it, core = (part.mT if kind in ("mamba", "lfm2") else part for part in (with_it, core))
    return with_it.reshape(z.shape) * (z / core.reshape(z.shape))


def read_by_mixer(run: Run) -> Tensor:
    args, named = run.clean.patterns.mixed[run.index]
    return args[0] if args else named["hidden_states"]


def some_vector(run: Run, seed: int = 3) -> Tensor:
    return torch.randn(*IDS.shape, run.lm.d_model, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    assert float(want.norm()) > 1e-3


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.promise("exact")
@every_kind
def test_what_a_mixer_carries_is_its_kernel_on_other_values(kind: str) -> None:
    run = run_of(kind)
    vector = some_vector(run)
    call = run.clean.patterns.mixed[run.index]
    close(through_mixer(run.lm, run.lm.layers[run.index], call, vector).flatten(-2), carried_by_hand(kind, run, vector))


@pytest.mark.promise("exact")
@every_kind
def test_what_is_carried_of_all_that_is_read_and_of_biases_is_z(kind: str) -> None:
    run = run_of(kind)
    layer, call = run.lm.layers[run.index], run.clean.patterns.mixed[run.index]
    biases = carried_by_hand(kind, run, torch.zeros(*IDS.shape, run.lm.d_model), biases=True)
    writes = torch.cat([*run.clean.written(run.clean.record)])
    before = [i for i, node in enumerate(run.lm.parts) if node.layer < run.index]
    # A node at a time: what each of them puts there adds up, and with what biases do it is all.
    z = sum((through_mixer(run.lm, layer, call, normed(run, writes[i])).flatten(-2) for i in before), biases)
    close(z, run.z())
    assert (biases.norm() > 1e-3) == (kind in ("bamba", "mamba", "mamba2", "recurrent_gemma"))


def normed(run: Run, vector: Tensor) -> Tensor:
    """A vector in the stream as the block's norm hands it to the mixer, the scale of the whole stream held."""
    layer = run.lm.layers[run.index]
    norm: Any = layer.input_norm
    eps = next(getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name))
    scale = (run.clean.record.stream[layer.reads].pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    gain = norm.weight.detach() + (run.lm.family in ("recurrent_gemma", "qwen3_5_text"))
    return gain * vector * scale


@pytest.mark.promise("exact")
@every_kind
def test_of_a_mixer_that_is_not_held_or_lacks_a_value_nothing_is_proved(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(kind)
    lm, index = run.lm, run.index
    mask = torch.ones(IDS.shape, dtype=torch.bool)

    def error() -> float:
        call = run.clean.patterns.mixed[index]
        return identities._mixer_error(lm, lm.layers[index], run.clean.record, call, mask)

    own = lm.mixed[index]
    assert error() < 2e-6
    part, columns = next((part, columns) for part, columns in own.items() if columns.any())
    fewer = columns.clone()
    fewer[int(columns.nonzero()[0])] = False
    with patch.dict(lm.mixed, {index: {**own, part: fewer}}):
        assert error() > 1e-2
    if kind != "recurrent_gemma":  # to whose gates no slope goes forwards at all
        with patch.dict(lm.mixed, {index: {part: torch.ones_like(columns) for part, columns in own.items()}}):
            assert error() > 1e-2


def test_a_mixer_whose_norms_or_activations_are_not_held_shows_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Frozen, "__torch_function__", lambda _, func, types, args=(), kwargs=None: func(*args, **kwargs or {})
    )
    assert not shown_values(model("mamba2"))


def test_later_mixers_of_a_make_take_their_values_from_the_first_and_prove_them() -> None:
    lm = model("mamba2")
    widths = {(len(columns), int(columns.sum())) for values in lm.mixed.values() for columns in values.values()}
    assert widths == {(152, 64)}
    assert len({id(columns) for values in lm.mixed.values() for columns in values.values()}) == 1
    assert len(lm.mixed) == 4


# What methods make of it.


def by_hand_through(lm: Model, vector: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """What every mixer of Mamba-2 from `first` on writes because a vector is in the stream."""
    for which in range(first, len(lm.layers)):
        run = run_of("mamba2", which)
        yield which, carried_by_hand("mamba2", run, normed(run, vector)) @ run.mixer.out_proj.weight.detach().t()


@pytest.mark.promise("exact")
def test_verify_says_what_mixers_carry() -> None:
    lm = model("mamba2")
    with few_draws():
        found = uw.verify(lm, IDS, "L0M1")
    write = torch.cat([*run_of("mamba2").clean.written(run_of("mamba2").clean.record)])[lm.nodes.index("L0M1")].clone()
    write[:, 0] = 0
    run, energy = run_of("mamba2", 2), write.square().sum()
    z = carried_by_hand("mamba2", run, normed(run, write)).unflatten(-1, (8, -1))
    w_o = run.mixer.out_proj.weight.detach().t().unflatten(0, (8, -1))
    carried = torch.einsum("bthk,hkd->hbtd", z, w_o)
    names = [f"L2M{head}" for head in range(8)]
    want = (carried * write).sum((1, 2, 3)) / energy
    np.testing.assert_allclose(found["v_share"].sel(node=names), want, rtol=1e-3, atol=1e-6)
    all_of_it = run.clean.record.z[2].movedim(2, 0) @ w_o[:, None]
    want = carried[:, :, 1:].square().sum((1, 2, 3)) / all_of_it[:, :, 1:].square().sum((1, 2, 3))
    np.testing.assert_allclose(found["read"].sel(node=names), want, rtol=1e-4)
    whole = write
    for which in (1, 2, 3):
        whole = whole + next(by_hand_through(lm, whole, which))[1]
    at_the_end = float(found["v_survival"].sel(location="resid_post3"))
    assert at_the_end == pytest.approx(float((whole * write).sum() / energy), rel=1e-4)
    assert abs(at_the_end - float(found["v_survival"].sel(location="resid_post0"))) > 1e-3


@pytest.mark.promise("exact")
def test_net_follows_mixers_and_what_they_give_stays_what_it_is() -> None:
    lm = model("mamba2")
    vector, row = some_vector(run_of("mamba2")), 5
    u = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5))
    along: Callable[[Tensor], Tensor] = lambda normed: normed[:, row] @ u  # noqa: E731
    reads = lm.layers[2].reads
    net, direct = (cotangents(lm, IDS, RULES[name], along)[1][reads] for name in ("net", "direct"))
    end = vector
    for which in (2, 3):
        end = end + next(by_hand_through(lm, end, which))[1]
    norm: Any = lm.final_norm
    final = run_of("mamba2").clean.record.stream[lm.states[-1]]
    scale = (final.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    want = ((norm.weight.detach() * end * scale)[:, row] @ u).sum()
    assert float((net * vector).sum()) == pytest.approx(float(want), rel=1e-4)
    assert abs(float((direct * vector).sum()) - float(want)) > 1e-2 * abs(float(want))
    with torch.no_grad():
        plain = lm.hf(input_ids=IDS, use_cache=False).logits
        with hooked(handle for layer in lm.layers for handle in holding(layer, lm.mixed[layer.index])):
            assert torch.equal(lm.hf(input_ids=IDS, use_cache=False).logits, plain)


@pytest.mark.promise("exact")
def test_values_behind_a_norm_that_centres_its_heads_are_those_of_the_kernel() -> None:
    """What xLSTM's kernel makes of other values, less its mean in each head, times what norm and gate made of it."""
    lm, seen = model("xlstm"), {}
    layer = next(layer for layer in lm.layers if layer.index == 2)
    mixer, kernel = layer.attention, layer.attention.mlstm_backend
    told: Callable[..., None] = lambda _, __, named, made: seen.update(given=named, h=made[0])  # noqa: E731
    keep = kernel.register_forward_hook(told, with_kwargs=True)
    with hooks(keep):
        clean = replay.clean(lm, IDS, fold(lm), with_patterns=True)
    vector = torch.randn(*IDS.shape, lm.d_model, generator=torch.Generator().manual_seed(3))
    values = (vector @ mixer.v.weight.detach().t()).unflatten(-1, (4, -1)).transpose(1, 2)
    with torch.no_grad():
        made, own = (kernel(**{**seen["given"], "value": v})[0] for v in (values, seen["given"]["value"]))
    assert torch.equal(own, seen["h"])
    made, own = (h.sub(h.mean(-1, keepdim=True)).transpose(1, 2).flatten(-2) for h in (made, own))
    want = made / own * clean.record.z[2].flatten(-2)
    close(through_mixer(lm, layer, clean.patterns.mixed[2], vector).flatten(-2), want, 1e-4)


def test_a_mixer_that_is_not_linear_in_what_it_holds_shows_no_values_and_that_is_said() -> None:
    hf = every.model("xlstm")
    for block in hf.backbone.blocks:
        block.mlstm_layer.multihead_norm = nn.Softmax(-1)
    lm = view(hf)
    assert not lm.mixed
    assert "values not checked: no layer has attention, or a mixer that shows its values" in lm.certificate.explain()
    assert "it shows no pattern, and what it carries through values is not shown" in described(lm)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_slopes_go_through_a_mixer_in_any_mode_and_leave_nothing(mode: Any) -> None:
    run = run_of("recurrent_gemma")
    lm, layer = run.lm, run.lm.layers[run.index]
    call = run.clean.patterns.mixed[run.index]
    want = through_mixer(lm, layer, call, some_vector(run))
    with mode():
        assert torch.equal(through_mixer(lm, layer, call, some_vector(run)), want)
    assert not want.requires_grad
    assert not [module for module in layer.attention.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_a_convolution_that_is_read_and_not_called_is_float32_too_where_half_precision_is_judged() -> None:
    lm = view(every.model("mamba2").to(torch.bfloat16))
    assert lm.certificate.ok
    assert lm.certificate.single["values"] < 1e-5
    assert len(lm.mixed) == 4
    run = replay.clean(lm, IDS, fold(lm), with_patterns=True)
    _, slope = sloped_z(lm.layers[1], lm.mixed[1], run.patterns.mixed[1], torch.ones(*IDS.shape, lm.d_model))
    assert slope.dtype == torch.float32


def test_the_certificate_asks_anew_which_values_are_shown() -> None:
    lm = model("lfm2")
    lm.mixed.clear()
    assert certify(lm)["values"] < 1e-6
    assert [*lm.mixed] == [0, 2]
