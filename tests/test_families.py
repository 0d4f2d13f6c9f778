"""Is what the view says every node writes true, in every family? Ground truth by taking parts of the model out and
looking at what the blocks then hand on; no module of the library takes part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unwrite.errors import ModelError
from unwrite.model import capture
from unwrite.model.families import FAMILIES, Family
from unwrite.model.load import view
from unwrite.model.view import Model, expand, fold
from unwrite.nodes import Node

PINNED = {"opt": {"do_layer_norm_before": True, "layer_norm_elementwise_affine": True}}
# Own notes on where things are; what is not named is as in Llama.
BLOCKS = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), "transformer.h")
BLOCKS |= {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
ATTENTION = dict.fromkeys(("gpt2", "gptj"), "attn") | dict.fromkeys(("bloom", "falcon"), "self_attention")
ATTENTION |= {"gpt_neo": "attn.attention", "gpt_neox": "attention"}
OUT = dict.fromkeys(("gpt_neo", "gptj", "opt"), "out_proj") | dict.fromkeys(("gpt_neox", "bloom", "falcon", "phi"), "dense")
OUT |= {"gpt2": "c_proj"}
MLP = {"opt": "fc2", "bloom": "mlp.dense_4h_to_h"}
POSITIONS = {"gpt2": "transformer.wpe", "gpt_neo": "transformer.wpe", "opt": "model.decoder.embed_positions"}
NORM = dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "ln_1") | {"opt": "self_attn_layer_norm", "olmo2": None}
FINAL = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), "transformer.ln_f")
FINAL |= {"gpt_neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm", "phi": "model.final_layernorm"}
POST_NORM = ("gemma2", "gemma3_text", "olmo2")
# Every part of these computes in the dtype of the weights; the others' norms or softmax are float32 in float64 models.
NATIVE = ("gpt2", "falcon")

Hook = tuple[nn.Module, bool, Callable[..., Any]]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _instead(output: Any, first: Tensor) -> Any:
    return first if isinstance(output, Tensor) else (first, *output[1:])


@dataclass
class Truth:
    """What the parts of a model write for `ids` [prompt, position], by executed removals. All raw."""

    hf: Any
    ids: Tensor

    def at(self, table: dict[str, Any], default: str, root: Any) -> Any:
        path = table.get(self.hf.config.model_type, default)
        return None if path is None else attrgetter(path)(root)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        return list(self.at(BLOCKS, "model.layers", self.hf))

    @property
    def final(self) -> nn.Module:
        return self.at(FINAL, "model.norm", self.hf)

    def norm(self, block: nn.Module) -> nn.Module | None:
        """The norm before attention."""
        return block.ln_attn if hasattr(block, "ln_attn") else self.at(NORM, "input_layernorm", block)

    def run(self, ids: Tensor, hooks: list[Hook]) -> Any:
        with ExitStack() as stack, torch.no_grad():
            for module, before, hook in hooks:
                add = module.register_forward_pre_hook if before else module.register_forward_hook
                handle = add(hook, with_kwargs=True)
                stack.callback(handle.remove)
            return self.hf(input_ids=ids, use_cache=False, output_hidden_states=True)

    @cached_property
    def clean(self) -> dict[Any, Any]:
        """Block inputs and outputs, attention's output projection, the final norm's input, logits, hidden states."""
        seen: dict[Any, Any] = {}

        def start(key: Any) -> Callable[..., None]:
            return lambda module, args, kwargs: seen.update({key: (args[0] if args else kwargs["hidden_states"]).clone()})

        def ends(key: Any) -> Callable[..., None]:
            return lambda module, args, kwargs, output: seen.update({key: _first(output).clone()})

        hooks: list[Hook] = [(self.final, True, start("final"))]
        for i, block in enumerate(self.blocks):
            hooks += [(block, True, start(("in", i))), (block, False, ends(("out", i)))]
            if self.hf.config.model_type in POST_NORM:
                norm = block.post_attention_layernorm
                hooks += [(norm, True, start(("branch", i))), (norm, False, ends(("written", i)))]
        output = self.run(self.ids, hooks)
        return {**seen, "logits": output.logits, "hidden": output.hidden_states}

    @cached_property
    def embed(self) -> dict[str, Tensor]:
        """What the embeddings write: the first block's input with and without the position embedding."""
        path = POSITIONS.get(self.hf.config.model_type)
        start = self.clean["in", 0]
        if path is None:
            return {"embed": start}
        seen: list[Tensor] = []
        self.run(self.ids, [
            (attrgetter(path)(self.hf), False, lambda module, args, kwargs, output: output * 0),
            (self.blocks[0], True, lambda module, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0])),
        ])  # fmt: skip
        return {"embed": seen[0], "pos_embed": start - seen[0]}

    @property
    def heads(self) -> int:
        return self.hf.config.num_attention_heads

    def branches(self, layer: int, value: Tensor | None = None) -> Tensor:
        """What block `layer` adds without its MLP: [all heads, head 0 alone, …, no head] × prompt × position × d_model.

        With `value`, its attention reads that vector at every position instead of the stream.
        """
        block, copies = self.blocks[layer], self.heads + 2
        attention = self.at(ATTENTION, "self_attn", block)
        keep = torch.eye(copies - 1, self.heads, dtype=self.hf.dtype).roll(1, 0)
        keep[0] = 0
        keep = torch.cat([torch.ones(1, self.heads, dtype=self.hf.dtype), keep[1:], keep[:1]])
        seen: list[Tensor] = []

        def mask(module: nn.Module, args: Any, kwargs: Any) -> Any:
            z = args[0].reshape(copies, len(self.ids), -1, self.heads, args[0].shape[-1] // self.heads)
            return ((z * keep[:, None, None, :, None]).reshape(args[0].shape),), kwargs

        hooks: list[Hook] = [
            (getattr(attention, self.at_name(OUT, "o_proj")), True, mask),
            (self.at(MLP, "mlp", block), False, lambda module, args, kwargs, output: output * 0),
            (block, False, lambda module, args, kwargs, output: seen.append(_first(output).clone())),
        ]
        if value is not None:
            hooks.append((attention, True, _reads(value)))
        if self.hf.config.model_type in POST_NORM:
            hooks.append((block.post_attention_layernorm, False, self._frozen(layer)))
        self.run(self.ids.repeat(copies, 1), hooks)
        return seen[0].unflatten(0, (copies, len(self.ids))) - self.clean["in", layer]

    def at_name(self, table: dict[str, str], default: str) -> str:
        return table.get(self.hf.config.model_type, default)

    def _frozen(self, layer: int) -> Callable[..., Tensor]:
        """The norm after attention as the elementwise factor that it was in the clean run."""
        factor = self.clean["written", layer] / self.clean["branch", layer]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            return (args[0].unflatten(0, (-1, len(self.ids))) * factor).flatten(0, 1)

        return hook

    def mlp(self, layer: int) -> Tensor:
        return self.clean["out", layer] - self.clean["in", layer] - self.branches(layer)[0]

    def centred(self) -> bool:
        """Do the readers of the stream ignore its mean?"""
        x = self.clean["final"]
        with torch.no_grad():
            return torch.allclose(self.final(x), self.final(x + 1.0), atol=1e-3)

    def constants(self, layer: int) -> Tensor:
        """What each head writes when its attention reads nothing but the norm's bias: its constant part."""
        norm = self.norm(self.blocks[layer])
        nothing = torch.zeros(self.hf.config.hidden_size, dtype=self.hf.dtype)
        with torch.no_grad():
            beta = nothing if norm is None else norm(nothing)
        added = self.branches(layer, beta)
        return added[1:-1] - added[-1]

    def raw(self) -> dict[str, Tensor]:
        """Every node's write, raw; a bias even where it is zero."""
        writes = dict(self.embed)
        for layer in range(len(self.blocks)):
            added = self.branches(layer)
            writes |= {f"L{layer}H{head}": added[1 + head] - added[-1] for head in range(self.heads)}
            writes |= {f"L{layer}.bias": added[-1], f"MLP{layer}": self.mlp(layer)}
        return writes

    def paper(self) -> dict[str, Tensor]:
        """The same with the heads' constant part moved to the bias, and centred where readers ignore the mean."""
        writes = self.raw()
        for layer in range(len(self.blocks)):
            for head, constant in enumerate(self.constants(layer)):
                writes[f"L{layer}H{head}"] = writes[f"L{layer}H{head}"] - constant
                writes[f"L{layer}.bias"] = writes[f"L{layer}.bias"] + constant
        return {name: self.seen(write) for name, write in writes.items()}

    def seen(self, write: Tensor) -> Tensor:
        return write - write.mean(-1, keepdim=True) if self.centred() else write

    def states(self) -> dict[str, Tensor]:
        """Every state of the stream; between attention and MLP, what the block hands on without its MLP."""
        states = {"resid_pre0": self.clean["hidden"][0]}
        for layer, block in enumerate(self.blocks):
            states[f"resid_mid{layer}"] = self.clean["in", layer] + self.branches(layer)[0]
            # Hugging Face norms its last hidden state.
            last = block is self.blocks[-1]
            states[f"resid_post{layer}"] = self.clean["final"] if last else self.clean["hidden"][layer + 1]
        return {name: state.view_as(self.clean["in", 0]) for name, state in states.items()}


def _reads(value: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (value.expand_as(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value.expand_as(kwargs["hidden_states"])}

    return hook
