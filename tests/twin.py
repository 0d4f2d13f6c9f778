"""What are the numbers by definition? A slow truth to compare the library with; it imports nothing of it.

`Truth` finds what every node writes by taking parts of the model out and looking at what the blocks then hand on.
`scan` computes what a scan reports, from such writes, by the equations as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Where things are, by notes of one's own; what is not named is as in Llama.
_H = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), "transformer.h")
_BLOCKS = {**_H, "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
_ATTENTION = {
    **dict.fromkeys(("gpt2", "gptj"), "attn"),
    **dict.fromkeys(("bloom", "falcon"), "self_attention"),
    "gpt_neo": "attn.attention",
    "gpt_neox": "attention",
}
_OUT = {
    **dict.fromkeys(("gpt_neo", "gptj", "opt"), "out_proj"),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon", "phi"), "dense"),
    "gpt2": "c_proj",
}
_MLP = {"opt": "fc2", "bloom": "mlp.dense_4h_to_h"}
_POSITIONS = {"gpt2": "transformer.wpe", "gpt_neo": "transformer.wpe", "opt": "model.decoder.embed_positions"}
_NORM = {**dict.fromkeys(("gpt2", "gpt_neo", "gptj"), "ln_1"), "opt": "self_attn_layer_norm"}
_FINAL = {
    **dict.fromkeys(_H, "transformer.ln_f"),
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "phi": "model.final_layernorm",
}
_POST_NORM = ("gemma2", "gemma3_text", "olmo2")

Hook = Callable[..., Any]


@dataclass(frozen=True)
class Truth:
    """What the parts of a Hugging Face model write for `ids` [prompt, position], by executed removals."""

    hf: Any
    ids: Tensor

    def raw(self) -> dict[str, Tensor]:
        """Every node's write [prompt, position, d_model] in write order, as it is; a bias even where it is zero."""
        writes = dict(self._embeddings())
        for layer in range(len(self.blocks)):
            everything, *alone, nothing = self._attention[layer]
            writes |= {f"L{layer}H{head}": added - nothing for head, added in enumerate(alone)}
            writes |= {f"L{layer}.bias": nothing, f"MLP{layer}": self._added(layer) - everything}
        return writes

    def paper(self) -> dict[str, Tensor]:
        """The same with the heads' constant parts moved to the bias, and without the mean where no reader sees it."""
        writes = self.raw()
        for layer in range(len(self.blocks)):
            for head, constant in enumerate(self._constants(layer)):
                writes[f"L{layer}H{head}"] = writes[f"L{layer}H{head}"] - constant
                writes[f"L{layer}.bias"] = writes[f"L{layer}.bias"] + constant
        return self.readable(writes)

    def states(self) -> dict[str, Tensor]:
        """The stream in every state: what Hugging Face says, and between attention and MLP what a block without MLP hands on."""
        # Hugging Face normalises its last hidden state.
        streams = [*self._clean["hidden"][:-1], self._clean["final"]]
        states = {"resid_pre0": streams[0]}
        for layer in range(len(self.blocks)):
            if not self.parallel:
                states[f"resid_mid{layer}"] = streams[layer] + self._attention[layer][0]
            states[f"resid_post{layer}"] = streams[layer + 1]
        return states

    def readable(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without their mean over d_model, if the norm that reads the stream does not see it."""
        with torch.no_grad():
            sees = (self.final(self._clean["final"]) - self.final(self._clean["final"] + 1)).abs().max() > 1e-3
        return vectors if sees else {name: x - x.mean(-1, keepdim=True) for name, x in vectors.items()}

    def logits(self, stream: Tensor | None = None) -> Tensor:
        """The model's logits; with `stream`, those of a run whose final norm is given this instead."""
        if stream is None:
            return self._clean["logits"]
        return self._run(self.ids, [(self.final, True, lambda module, args, kwargs: ((stream,), {}))]).logits

    @cached_property
    def blocks(self) -> list[nn.Module]:
        return list(self._at(_BLOCKS, "model.layers", self.hf))

    @property
    def final(self) -> nn.Module:
        """The norm before the unembedding."""
        return self._at(_FINAL, "model.norm", self.hf)

    @cached_property
    def parallel(self) -> bool:
        """Does an MLP write the same when its block's attention writes nothing?"""
        out, seen = self._out(self.blocks[0]), []
        self._run(self.ids, [(out, False, _nothing), (self.blocks[0], False, _output(seen.append))])
        without = seen[0] - self._clean[0]
        return torch.allclose(without, self._added(0) - self._attention[0][0], atol=1e-5)

    def _at(self, table: Mapping[str, str], default: str, root: Any) -> Any:
        return attrgetter(table.get(self.hf.config.model_type, default))(root)

    def _out(self, block: nn.Module) -> nn.Module:
        return self._at(_OUT, "o_proj", self._at(_ATTENTION, "self_attn", block))

    def _run(self, ids: Tensor, hooks: Sequence[tuple[nn.Module, bool, Hook]]) -> Any:
        with ExitStack() as stack, torch.no_grad():
            for module, before, hook in hooks:
                add = module.register_forward_pre_hook if before else module.register_forward_hook
                stack.callback(add(hook, with_kwargs=True).remove)
            return self.hf(input_ids=ids, use_cache=False, output_hidden_states=True)

    @cached_property
    def _clean(self) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        hooks = [(self.final, True, _input(lambda x: seen.update(final=x.view(*self.ids.shape, -1))))]
        for layer, block in enumerate(self.blocks):
            hooks.append((block, True, _input(lambda x, layer=layer: seen.update({layer: x}))))
            hooks.append((block, False, _output(lambda x, layer=layer: seen.update({layer + 1: x}))))
            if self._post_norm:
                norm = block.post_attention_layernorm
                hooks.append((norm, True, _input(lambda x, layer=layer: seen.update({("before", layer): x}))))
                hooks.append((norm, False, _output(lambda x, layer=layer: seen.update({("after", layer): x}))))
        output = self._run(self.ids, hooks)
        return {**seen, "logits": output.logits, "hidden": output.hidden_states}

    @property
    def _post_norm(self) -> bool:
        return self.hf.config.model_type in _POST_NORM

    def _added(self, layer: int) -> Tensor:
        return self._clean[layer + 1] - self._clean[layer]

    def _embeddings(self) -> dict[str, Tensor]:
        """The first block's input with and without the position embedding."""
        start = self._clean[0]
        if self.hf.config.model_type not in _POSITIONS:
            return {"embed": start}
        seen: list[Tensor] = []
        table = self._at(_POSITIONS, "", self.hf)
        self._run(self.ids, [(table, False, _nothing), (self.blocks[0], True, _input(seen.append))])
        return {"embed": seen[0], "pos_embed": start - seen[0]}

    @cached_property
    def _attention(self) -> list[Tensor]:
        return [self._branches(layer) for layer in range(len(self.blocks))]

    def _branches(self, layer: int, value: Tensor | None = None) -> Tensor:
        """What a block adds without its MLP: [all heads, head 0 alone, head 1 alone, …, no head] × write.

        With `value`, its attention reads this vector at every position instead of the normalised stream.
        """
        block, heads, prompts = self.blocks[layer], self.hf.config.num_attention_heads, len(self.ids)
        keep = torch.cat([torch.ones(1, heads), torch.eye(heads), torch.zeros(1, heads)]).to(self.hf.dtype)

        def some_heads(module: nn.Module, args: Any, kwargs: Any) -> Any:
            z = args[0].reshape(heads + 2, prompts, -1, heads, args[0].shape[-1] // heads)
            return ((z * keep[:, None, None, :, None]).reshape(args[0].shape),), kwargs

        seen: list[Tensor] = []
        hooks = [(self._out(block), True, some_heads), (self._at(_MLP, "mlp", block), False, _nothing)]
        hooks.append((block, False, _output(seen.append)))
        if value is not None:
            hooks.append((self._at(_ATTENTION, "self_attn", block), True, _reads(value)))
        if self._post_norm:
            # The norm of the branch, held at the elementwise factor that it was in the clean run.
            factor = (self._clean["after", layer] / self._clean["before", layer]).repeat(heads + 2, 1, 1)
            frozen = lambda module, args, kwargs, output: args[0] * factor  # noqa: E731
            hooks.append((block.post_attention_layernorm, False, frozen))
        self._run(self.ids.repeat(heads + 2, 1), hooks)
        return seen[0].unflatten(0, (heads + 2, prompts)) - self._clean[layer]

    def _constants(self, layer: int) -> Tensor:
        """What each head writes when its attention reads what the norm says of nothing: its constant part."""
        block, nothing = self.blocks[layer], torch.zeros(self.hf.config.hidden_size, dtype=self.hf.dtype)
        path = "ln_attn" if hasattr(block, "ln_attn") else _NORM.get(self.hf.config.model_type, "input_layernorm")
        with torch.no_grad():
            _, *alone, none = self._branches(layer, getattr(block, path)(nothing) if hasattr(block, path) else nothing)
        return torch.stack(alone) - none


def _input(keep: Callable[[Tensor], Any]) -> Hook:
    return lambda module, args, kwargs: keep((args[0] if args else kwargs["hidden_states"]).clone())


def _output(keep: Callable[[Tensor], Any]) -> Hook:
    return lambda module, args, kwargs, output: keep((output if isinstance(output, Tensor) else output[0]).clone())


def _nothing(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output * 0


def _reads(value: Tensor) -> Hook:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (value.expand_as(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value.expand_as(kwargs["hidden_states"])}

    return hook
