"""What are the numbers by definition? A slow truth to compare the library with; it imports nothing of it.

`Truth` finds what every node writes by taking parts of the model out and looking at what the blocks then hand on.
`Rows` and the functions on it compute what a scan reports, from such writes, by the equations as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Where things are, by notes of one's own; what is not named is as in Llama.
_H = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), "transformer.h")
_H |= dict.fromkeys(("codegen", "ctrl"), "transformer.h")
_NEOX = {kind: f"{kind}.layers" for kind in ("gpt_neox", "gpt_neox_japanese")}
_BLOCKS = {**_H, **_NEOX, "opt": "model.decoder.layers"}
_ATTENTION = {
    **dict.fromkeys(("gpt2", "gptj", "codegen"), "attn"),
    **dict.fromkeys(("bloom", "falcon"), "self_attention"),
    "gpt_neo": "attn.attention",
    **dict.fromkeys(_NEOX, "attention"),
    "ctrl": "multi_head_attention",
}
_OUT = {
    **dict.fromkeys(("gpt_neo", "gptj", "opt", "codegen", "xglm"), "out_proj"),
    **dict.fromkeys((*_NEOX, "bloom", "falcon", "phi", "ctrl"), "dense"),
    "gpt2": "c_proj",
}
_MLP = {"opt": "fc2", "bloom": "mlp.dense_4h_to_h", "xglm": "fc2", "ctrl": "ffn"}
# What is left of the first block's input without this is of tokens, or (+) of positions.
_POSITIONS = {"gpt2": "transformer.wpe", "gpt_neo": "transformer.wpe", "opt": "model.decoder.embed_positions"}
_POSITIONS |= {"xglm": "model.embed_positions", "ctrl": "+transformer.w"}
_NORM = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen"), "ln_1") | {"ctrl": "layernorm1"}
_NORM |= dict.fromkeys(("opt", "xglm"), "self_attn_layer_norm")
_FINAL = {
    **dict.fromkeys(_H, "transformer.ln_f"),
    **{kind: f"{kind}.final_layer_norm" for kind in _NEOX},
    "ctrl": "transformer.layernorm",
    "xglm": "model.layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "phi": "model.final_layernorm",
}
_POST_NORM = ("gemma2", "gemma3_text", "olmo2", "afmoe")

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
        """The stream as Hugging Face says; between attention and MLP, what a block without its MLP hands on."""
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
        path = _POSITIONS[self.hf.config.model_type]
        table = attrgetter(path.removeprefix("+"))(self.hf)
        self._run(self.ids, [(table, False, _nothing), (self.blocks[0], True, _input(seen.append))])
        parts = [seen[0], start - seen[0]]
        return dict(zip(("embed", "pos_embed"), reversed(parts) if path[0] == "+" else parts, strict=True))

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


def _nothing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    return output * 0 if isinstance(output, Tensor) else (output[0] * 0, *output[1:])


def _reads(value: Tensor) -> Hook:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (value.expand_as(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value.expand_as(kwargs["hidden_states"])}

    return hook


@dataclass(frozen=True)
class Rows:
    """Writes and states at every position of every prompt: name -> [row, d_model], rows in the order of prompts."""

    writes: dict[str, np.ndarray]
    states: dict[str, np.ndarray]
    prompt: np.ndarray
    place: np.ndarray

    @staticmethod
    def of(hf: Any, ids: np.ndarray, lengths: Sequence[int]) -> Rows:
        """By the convention of the paper, every prompt run alone and without padding. A bias of zero is no node."""
        runs = [Truth(hf, torch.from_numpy(row[None, :length])) for row, length in zip(ids, lengths, strict=True)]
        writes = _joined([run.paper() for run in runs])
        return Rows(
            {name: write for name, write in writes.items() if np.abs(write).max() > 1e-6 or not name.endswith("bias")},
            _joined([run.readable(run.states()) for run in runs]),
            np.repeat(np.arange(len(runs)), lengths),
            np.concatenate([np.arange(length) for length in lengths]),
        )

    def where(self, kept: np.ndarray) -> Rows:
        """Some of the rows."""
        writes, states = ({name: x[kept] for name, x in part.items()} for part in (self.writes, self.states))
        return Rows(writes, states, self.prompt[kept], self.place[kept])

    def after(self, node: str) -> str:
        """The first state that holds what `node` wrote."""
        if "embed" in node:
            return "resid_pre0"
        layer = "".join(takewhile(str.isdigit, node.lstrip("LMP")))
        mid = f"resid_mid{layer}"
        return mid if mid in self.states and not node.startswith("MLP") else f"resid_post{layer}"

    @property
    def end(self) -> str:
        return list(self.states)[-1]

    def reads(self, reader: str, writer: str) -> bool:
        """Does the state that `reader` reads hold the write? Embeddings and constants read nothing."""
        if "embed" in reader or reader.endswith("bias"):
            return False
        names = list(self.states)
        own = names.index(self.after(reader))
        return names.index(self.after(writer)) < own


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name][0].numpy() for part in parts]) for name in parts[0]}


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1)


def kept(rows: Rows, writer: str, floor: float) -> np.ndarray:
    """Where the write is above `floor` times the largest norm of the stream."""
    largest = np.max([np.linalg.norm(x, axis=-1) for x in rows.states.values()], axis=0)
    return np.linalg.norm(rows.writes[writer], axis=-1) > floor * largest


def ratios(rows: Rows, writer: str) -> dict[str, dict[str, np.ndarray]]:
    """What a scan gives quantiles of, at every row."""
    w, states = rows.writes[writer], rows.states
    size = np.linalg.norm(w, axis=-1)
    after, end = states[rows.after(writer)], states[rows.end]
    level = {name: _dot(x, w) / size**2 for name, x in states.items()}
    return {
        "pr": {name: _dot(o, w) / size**2 for name, o in rows.writes.items()},
        "level": level,
        "change": {"": level[rows.end] - level[rows.after(writer)]},
        "norm": {"": size},
        "relative_norm": {"": size / np.linalg.norm(after, axis=-1)},
        "dilution": {"": np.log(np.linalg.norm(after, axis=-1) / np.linalg.norm(end, axis=-1))},
    }


def share(rows: Rows, vector: np.ndarray, writer: str, cluster: np.ndarray) -> tuple[float, float]:
    """Σ⟨vector, o_w⟩ / Σ‖o_w‖² and its standard error over clusters of prompts."""
    w = rows.writes[writer]
    ids = np.unique(cluster)
    y = np.array([_dot(vector, w)[np.isin(rows.prompt, np.flatnonzero(cluster == i))].sum() for i in ids])
    x = np.array([_dot(w, w)[np.isin(rows.prompt, np.flatnonzero(cluster == i))].sum() for i in ids])
    n, beta = len(ids), y.sum() / x.sum()
    error = n / (n - 1) * (np.sum(y**2) - 2 * beta * np.sum(x * y) + beta**2 * np.sum(x**2)) / x.sum() ** 2
    return beta, np.sqrt(max(error, 0.0))


def position_part(rows: Rows, node: str, writer: str, bucket: np.ndarray) -> float:
    """The share with the same position (or bucket of positions) of other prompts: the literal sum over pairs."""
    e, w = rows.writes[node], rows.writes[writer]
    total, where = 0.0, bucket[rows.place]
    for number in np.unique(where):
        here = np.flatnonzero(where == number)
        pairs = [(i, j) for i in here for j in here if rows.prompt[i] != rows.prompt[j]]
        if pairs:
            total += len(here) / len(pairs) * sum(float(e[i] @ w[j]) for i, j in pairs)
    return total / _dot(w, w).sum()


def patterns(truth: Truth) -> tuple[Tensor, ...]:
    """Where every head looks [prompt, head, query, key], layer by layer, as Hugging Face's eager attention says."""
    config = truth.hf.config
    usual, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            return truth.hf(input_ids=truth.ids, use_cache=False, output_attentions=True).attentions
    finally:
        config._attn_implementation = usual


def into_values(truth: Truth, layer: int, vector: Tensor) -> Tensor:
    """What `vector` in the stream is to a block's values, the norm held at the factor that it was. By weights."""
    block, x = truth.blocks[layer], truth._clean[layer]
    if truth.hf.config.model_type == "gpt2":
        norm = block.ln_1
        return (
            (vector - vector.mean(-1, keepdim=True))
            * norm.weight
            * (x.var(-1, correction=0) + norm.eps)[..., None] ** -0.5
        )
    norm = block.input_layernorm
    gain = norm.weight + 1 if truth._post_norm else norm.weight
    eps = norm.eps if truth._post_norm else norm.variance_epsilon
    return vector * gain * (x.pow(2).mean(-1, keepdim=True) + eps) ** -0.5


@torch.no_grad()
def carried(truth: Truth, layer: int, vector: Tensor, pattern: Tensor) -> Tensor:
    """Eq. 3, C [prompt, position, head, d_model]: what heads write because their values read `vector`. By weights.

    Of GPT-2, Llama and Gemma 2, whose post-norm is held at the factor that it was.
    """
    config, block, heads = truth.hf.config, truth.blocks[layer], truth.hf.config.num_attention_heads
    if config.model_type == "gpt2":
        into, out = block.attn.c_attn.weight[:, -config.n_embd :], block.attn.c_proj.weight
        own = into.unflatten(1, (heads, -1))
    else:
        into, out = block.self_attn.v_proj.weight.T, block.self_attn.o_proj.weight.T
        shared = into.unflatten(1, (config.num_key_value_heads, -1))
        own = shared[:, torch.arange(heads) // (heads // config.num_key_value_heads)]
    values = torch.einsum("btd,dhk->bthk", into_values(truth, layer, vector), own)
    found = torch.einsum("bhqi,bihk,hkd->bqhd", pattern, values, out.unflatten(0, (heads, -1)))
    if truth._post_norm:
        norm, before = block.post_attention_layernorm, truth._clean["before", layer]
        found = found * (norm.weight + 1) * (before.pow(2).mean(-1)[..., None, None] + norm.eps) ** -0.5
    return found
