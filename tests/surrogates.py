"""What is the network whose slopes relp is? The user's own model under plain hooks, with every rule executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from executed import Alone


@contextmanager
def linearised(alone: Alone) -> Iterator[None]:
    """The network whose slopes relp is: norms multiply as they did, an activation is a factor, products count half.

    Everything is found by names of classes and modules: "…Norm…" outside of attention, an activation's class, the
    projection behind a gated product, the mixture of experts, and the routers, whose choice is held.
    """
    hf = alone.hf
    clean: dict[tuple[str, int], tuple[Any, Any]] = {}
    calls: dict[str, int] = {}
    kinds = {name: kind for name, module in hf.named_modules() if (kind := _kind(name, module))}
    modules = dict(hf.named_modules())
    gated = any(name.rpartition(".")[2] in ("gate_proj", "gate_up_proj", "experts") for name in modules)
    assert len([kind for kind in kinds.values() if kind == "act"]) >= len(alone.truth.blocks)

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            clean[name, calls.get(name, 0)] = (args[0], output)
            calls[name] = calls.get(name, 0) + 1

        return hook

    def replay(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            x0, y0 = clean[name, calls.get(name, 0)]
            calls[name] = calls.get(name, 0) + 1
            return _SURROGATES[kinds[name]](module, args[0], output, x0, y0)

        return hook

    def halved(name: str) -> Callable[..., Any]:
        return lambda _, args: (clean[name, 0][0] + (args[0] - clean[name, 0][0]) / 2,)

    with ExitStack() as stack:
        handles = [modules[name].register_forward_hook(keep(name)) for name in kinds]
        with torch.no_grad():
            hf(input_ids=alone.ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        assert set(calls.values()) >= {1}
        alone.truth.logits()  # its own runs come before there are hooks that count calls
        stack.callback(hf.register_forward_pre_hook(lambda _, __: calls.clear()).remove)
        for name, kind in kinds.items():
            if kind != "product":
                stack.callback(modules[name].register_forward_hook(replay(name)).remove)
            elif gated:
                stack.callback(modules[name].register_forward_pre_hook(halved(name)).remove)
        yield


def _kind(name: str, module: nn.Module) -> str | None:
    kind, last = type(module).__name__, name.rpartition(".")[2]
    if "Norm" in kind:
        inside = last in ("q_norm", "k_norm", "q_layernorm", "k_layernorm") or "layernorm.norms" in name
        return None if inside or last == "word_embeddings_layernorm" else "norm"
    if any(word in kind.lower() for word in ("gelu", "silu", "relu")):
        return "act"
    return {
        "down_proj": "product", "experts": "half", "gate": "router", "shared_expert_gate": "router",
    }.get(last)  # fmt: skip


def _norm(module: nn.Module, x: Tensor, y: Tensor, x0: Tensor, y0: Tensor) -> Tensor:
    def seen(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if "LayerNorm" in type(module).__name__ else x

    offset = getattr(module, "bias", None)
    return y0 + (y0 - (0 if offset is None else offset)) / seen(x0) * seen(x - x0)


_SURROGATES: dict[str, Callable[..., Any]] = {
    "norm": _norm,
    "act": lambda _, x, y, x0, y0: y0 + (x - x0) * y0 / (x0 + torch.where(x0 < 0, -1e-6, 1e-6).double()),
    "half": lambda _, x, y, x0, y0: y0 + (y - y0) / 2,
    "router": lambda _, x, y, x0, y0: y0,
}


@contextmanager
def bilinear(lm: Any, ids: Tensor) -> Iterator[None]:
    """Inside the `with`, the product of a gated MLP is ½ (a u₀ + a₀ u), the clean factors held: also far from clean.

    To be entered inside `linearised`, whose half of the product it replaces; for families with an "up_proj".
    """
    now: dict[Any, Tensor] = {}
    clean: dict[Any, Tensor] = {}

    def product(mlp: nn.Module) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any) -> Any:
            a, u = now[mlp, "act_fn"], now[mlp, "up_proj"]
            return ((a * clean[mlp, "up_proj"] + clean[mlp, "act_fn"] * u) / 2,) if clean else None

        return hook

    with ExitStack() as stack:
        for mlp in [layer.mlp for layer in lm.layers if hasattr(layer.mlp, "up_proj")]:
            for name in ("act_fn", "up_proj"):
                keep = lambda _, __, out, key=(mlp, name): now.__setitem__(key, out)  # noqa: E731
                stack.callback(getattr(mlp, name).register_forward_hook(keep).remove)
            stack.callback(mlp.down_proj.register_forward_pre_hook(product(mlp)).remove)
        with torch.no_grad():
            lm.hf(input_ids=ids[None], use_cache=False)
        clean.update(now)
        yield
