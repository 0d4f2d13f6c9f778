"""How does a TransformerLens-era checkpoint (gelu-4l and its siblings) become an ordinary Hugging Face GPT-2?

The folder holds a `config.json` without `model_type` and a state dict in `*final.pth`. It is read as TransformerLens
reads it, which is how its numbers were published: scores divided by √d_head, eps 1e-5 and the exact GELU whatever
training used (tanh, for "gelu"), and every other setting of training ignored. GPT-2's projections are [input, output],
so matrices are laid side by side and never transposed, but for the unembedding:

    c_attn = [W_Q | W_K | W_V], heads side by side · c_proj = W_O, heads stacked · lm_head = W_Uᵀ

An attention-only model becomes a GPT-2 whose MLPs have one neuron and only zeros: its MLP nodes never write. Norms that
were folded into what reads them ("LNPre") become norms of gain 1 and bias 0. What GPT-2 has no place for is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel

from unwrite.errors import ModelError

_WEIGHTS = "*final.pth"
_SIZES = ("n_layers", "n_heads", "d_head", "d_model", "n_ctx", "d_vocab")
_ACTIVATIONS = ("gelu", "gelu_new")
_BUFFERS = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE)")
# Ids of end, beginning and padding in the tokenizer that every sibling came with.
_ENDS = {"NeelNanda/gpt-neox-tokenizer-digits": (0, 1, 2)}


@dataclass(frozen=True)
class Shape:
    """What the configuration says about the state dict."""

    layers: int
    heads: int
    d_head: int
    d_model: int
    context: int
    vocabulary: int
    neurons: int
    attn_only: bool
    folded: bool  # no norm has a gain or bias of its own

    def lacks(self, tensor: str) -> bool:
        """Is this a tensor that GPT-2 has and the checkpoint does not?"""
        mlp = ".ln2." in tensor or ".mlp." in tensor
        return (self.attn_only and mlp) or (self.folded and (".ln" in tensor or tensor.startswith("ln_final.")))

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by TransformerLens' name."""
        d, first = self.d_model, {"embed.W_E": (self.vocabulary, self.d_model)}
        ends = {"pos_embed.W_pos": (self.context, d), "ln_final.w": (d,), "ln_final.b": (d,)}
        blocks = {f"blocks.{i}.{name}": shape for i in range(self.layers) for name, shape in self._block().items()}
        return {**first, **ends, **blocks, "unembed.W_U": (d, self.vocabulary)}

    def _block(self) -> dict[str, tuple[int, ...]]:
        d, heads, width = self.d_model, self.heads, self.d_head
        norms = {f"ln{i}.{part}": (d,) for i in (1, 2) for part in "wb"}
        reads = {f"attn.W_{x}": (heads, d, width) for x in "QKV"} | {f"attn.b_{x}": (heads, width) for x in "QKV"}
        writes = {"attn.W_O": (heads, width, d), "attn.b_O": (d,)}
        mlp = {"W_in": (d, self.neurons), "b_in": (self.neurons,), "W_out": (self.neurons, d), "b_out": (d,)}
        return {**norms, **reads, **writes, **{f"mlp.{name}": shape for name, shape in mlp.items()}}


def is_legacy(folder: Path) -> bool:
    """Does a folder hold such a checkpoint?"""
    return folder.is_dir() and any(folder.glob(_WEIGHTS)) and _is_described(_json(folder / "config.json"))


def checkpoint(source: str, revision: str | None = None) -> Path | None:
    """The folder of such a checkpoint: `source` itself, or a copy of what the hub has; None for any other model.

    Raises ModelError, before any weights are fetched, for a checkpoint that GPT-2 cannot express.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder if is_legacy(folder) else None
    config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    if not _is_described(config):
        return None
    _shape(config, source)
    return Path(snapshot_download(source, revision=revision, allow_patterns=["config.json", _WEIGHTS]))


def tokenizer_name(folder: Path) -> str | None:
    """The hub name of the tokenizer that such a checkpoint asks for, where it names one."""
    name = _json(folder / "config.json").get("tokenizer_name")
    return name if isinstance(name, str) and name else None


def tokenizer_folder(folder: Path) -> Path | None:
    """Where its tokenizer lies: beside the weights, or a copy of what the hub has; None for one that cannot be had."""
    name = tokenizer_name(folder)
    if (folder / "tokenizer_config.json").is_file():
        return folder
    if name is None or Path(name).is_dir():
        return None if name is None else Path(name)
    # Fetched as a whole because, without network, transformers would try again and again for most of a minute.
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"]))
    except (OSError, ValueError):
        return None


def from_legacy(
    folder: Path | str, dtype: torch.dtype | str | None = None, activation: str = "gelu", device_map: Any = None
) -> PreTrainedModel:
    """An ordinary `GPT2LMHeadModel` with the weights of a TransformerLens-era checkpoint.

    Arguments: `folder` with `config.json` and `*final.pth`; `dtype` by default that of the weights; `activation`, what
    the file's "gelu" means: "gelu" (exact, as TransformerLens reads it) or "gelu_new" (tanh, as these models were
    trained); `device_map` as in transformers. An unembedding bias that is not zero becomes one of `lm_head`, which
    `save_pretrained` writes and GPT-2 does not read again.
    Raises ModelError for a model that GPT-2 cannot express, for a file that holds anything but tensors (none of its
    code is run), and for tensors that are missing, unknown, misshapen or not finite.

    Example: `lm = uw.load(from_legacy("gelu-4l", activation="gelu_new"), tokenizer)`
    """
    folder = Path(folder)
    if activation not in _ACTIVATIONS:
        raise ModelError("unknown activation", got=repr(activation), expected=" or ".join(map(repr, _ACTIVATIONS)))
    if not is_legacy(folder):
        raise ModelError(f"{folder} is no TransformerLens-era checkpoint", expected=f"config.json and {_WEIGHTS}")
    config = _json(folder / "config.json")
    shape = _shape(config, folder.name)
    tensors = _read(_weights_file(folder), shape)
    bias = tensors.pop("unembed.b_U", None)
    meant = activation if shape.attn_only or config["act_fn"] == "gelu" else config["act_fn"]
    hf = GPT2LMHeadModel.from_pretrained(
        None,
        config=_gpt2(shape, meant, config.get("tokenizer_name")),
        state_dict=dict(_renamed(tensors, shape)),
        dtype=dtype if dtype not in (None, "auto") else tensors["embed.W_E"].dtype,
        device_map=device_map,
    )
    if bias is not None and bias.any():
        if hf.lm_head.weight.is_meta:
            raise ModelError(
                f"{folder.name} has an unembedding bias, which would stay behind", fix="load it without device_map"
            )
        hf.lm_head.bias = nn.Parameter(bias.to(hf.lm_head.weight))
    # The hub's cache names a snapshot's folder by its commit.
    hf.config._commit_hash = folder.name if folder.parent.name == "snapshots" else None
    return hf.eval()


def _json(file: Path) -> dict[str, Any]:
    """An empty one for a file that cannot be read as one: such a folder is refused elsewhere, in its own words."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_described(config: Mapping[str, Any]) -> bool:
    return "model_type" not in config and {"d_model", "n_layers"} <= config.keys()


def _shape(config: Mapping[str, Any], name: str) -> Shape:
    """Raises ModelError, naming the checkpoint, for what GPT-2 cannot express or what the configuration leaves open."""
    norm = config.get("normalization", config.get("normalization_type"))
    if why := _refusal(config, norm):
        raise ModelError(f"{name} cannot be expressed as a GPT-2: {why}")
    attn_only = bool(config.get("attn_only"))
    wanted = _SIZES if attn_only else (*_SIZES, "d_mlp")
    if odd := [key for key in wanted if type(config.get(key)) is not int or config[key] < 1]:
        got = ", ".join(f"{key} {config.get(key)!r}" for key in odd)
        raise ModelError(f"the config.json of {name} leaves its size open", got=got, expected="whole numbers above 0")
    sizes = [config[key] for key in _SIZES]
    shape = Shape(*sizes, neurons=1 if attn_only else config["d_mlp"], attn_only=attn_only, folded=norm == "LNPre")
    if shape.heads * shape.d_head != shape.d_model:
        raise ModelError(
            f"{name} cannot be expressed as a GPT-2: the heads of a GPT-2 divide d_model among them",
            got=f"{shape.heads} heads of {shape.d_head}", expected=f"{shape.d_model} in all",
        )  # fmt: skip
    return shape


def _refusal(config: Mapping[str, Any], norm: Any) -> str | None:
    """Why GPT-2 has no place for this model; None if it has."""
    # The attention-only models were trained with a default "solu_ln" that nothing computes.
    activation = "gelu" if config.get("attn_only") else config.get("act_fn")
    layout = config.get("architecture", "neel")
    reasons = {
        f"its layout is {layout!r}, with other names and transposed weights": layout != "neel",
        f"its activation {activation!r} is x · softmax(x) over all neurons together (solu_ln: then a LayerNorm)"
        ", and GPT-2's acts on each neuron alone": "solu" in str(activation).lower(),
        f"its activation is {activation!r}, and of these models only gelu ones were checked": activation
        not in _ACTIVATIONS,
        "its positions are added to queries and keys only (shortformer_pos), and GPT-2's to the stream": bool(
            config.get("shortformer_pos")
        ),
        f"its normalization is {norm!r}, and GPT-2's a LayerNorm (LN, or LNPre if folded)": norm not in ("LN", "LNPre"),
        "its final norm is an RMSNorm (final_rms), and GPT-2's a LayerNorm": bool(config.get("final_rms")),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _weights_file(folder: Path) -> Path:
    files = sorted(folder.glob(_WEIGHTS))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{folder} has several final checkpoints", got=names, expected=f"one {_WEIGHTS}")
    return files[0]


def _read(file: Path, shape: Shape) -> dict[str, Tensor]:
    """The state dict with what the checkpoint lacks filled in, and perhaps `unembed.b_U`, but without buffers."""
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ModelError(
            f"{file.name} cannot be opened as a state dict", got=error,
            expected="nothing but tensors: whatever else a pickle holds is never run",
        ) from error  # fmt: skip
    if not isinstance(found, dict):
        raise ModelError(f"{file.name} is no state dict", got=type(found).__name__, expected="names and tensors")
    found = {name: tensor for name, tensor in found.items() if not _BUFFERS.fullmatch(str(name))}
    every = shape.tensors()
    wanted = {name: size for name, size in every.items() if not shape.lacks(name)}
    optional = {"unembed.b_U": (shape.vocabulary,)}
    if wrong := list(_wrong(found, wanted, optional)):
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(f"{file.name} is not what its config.json describes", got=", ".join(wrong[:5]) + more)
    dtype = found["embed.W_E"].dtype
    filled = {name: _neutral(name, size, dtype) for name, size in every.items() if shape.lacks(name)}
    return {**found, **filled}


def _wrong(
    found: Mapping[Any, Any], wanted: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """What is wrong with each tensor, in words."""
    if any("norm" in str(name) for name in found):
        yield "names of an *_old checkpoint, whose weights are transposed"
    yield from (f"no {name}" for name in wanted if name not in found)
    for name, tensor in found.items():
        size = {**wanted, **optional}.get(name)
        if size is None:
            yield f"an unknown {name}"
        elif not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            yield f"{name} is no dense tensor of floating-point numbers"
        elif tensor.shape != size:
            yield f"{name} is {list(tensor.shape)} and not {list(size)}"
        elif not tensor.isfinite().all():
            yield f"{name} is not finite"


def _neutral(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What changes nothing: gain 1 for a norm, 0 for the rest."""
    return torch.ones(size, dtype=dtype) if name.endswith(".w") else torch.zeros(size, dtype=dtype)


def _gpt2(shape: Shape, activation: str, tokenizer: Any) -> GPT2Config:
    eos, bos, pad = _ENDS.get(str(tokenizer), (None, None, None))
    return GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_embd=shape.d_model,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.neurons,
        activation_function=activation,
        layer_norm_epsilon=1e-5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=False,
        eos_token_id=eos,
        bos_token_id=bos,
        pad_token_id=pad,
    )


def _renamed(tensors: Mapping[str, Tensor], shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the GPT-2."""
    yield "transformer.wte.weight", tensors["embed.W_E"]
    yield "transformer.wpe.weight", tensors["pos_embed.W_pos"]
    for layer in range(shape.layers):
        block = {name: tensors[f"blocks.{layer}.{name}"] for name in shape._block()}
        yield from ((f"transformer.h.{layer}.{name}", tensor) for name, tensor in _block(block, shape.d_model))
    yield "transformer.ln_f.weight", tensors["ln_final.w"]
    yield "transformer.ln_f.bias", tensors["ln_final.b"]
    yield "lm_head.weight", tensors["unembed.W_U"].T.contiguous()


def _block(block: Mapping[str, Tensor], d_model: int) -> Iterator[tuple[str, Tensor]]:
    for ours, theirs in (("ln_1", "ln1"), ("ln_2", "ln2")):
        yield f"{ours}.weight", block[f"{theirs}.w"]
        yield f"{ours}.bias", block[f"{theirs}.b"]
    yield "attn.c_attn.weight", torch.cat([block[f"attn.W_{x}"].transpose(0, 1).flatten(1) for x in "QKV"], 1)
    yield "attn.c_attn.bias", torch.cat([block[f"attn.b_{x}"].flatten() for x in "QKV"])
    yield "attn.c_proj.weight", block["attn.W_O"].reshape(d_model, d_model)
    yield "attn.c_proj.bias", block["attn.b_O"]
    for ours, theirs in (("c_fc", "in"), ("c_proj", "out")):
        yield f"mlp.{ours}.weight", block[f"mlp.W_{theirs}"]
        yield f"mlp.{ours}.bias", block[f"mlp.b_{theirs}"]
