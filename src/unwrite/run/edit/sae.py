"""What are the features of a sparse autoencoder, and how is one of them edited? A basis that is read by an encoder.

a = act((x − b) W_enc + b_enc), x ≈ a W_dec + b_dec. An edit in this basis changes features and leaves what they do not
say as it is: x' = x + g · (α · source + β · a) W_dec. Files in the layout of SAELens: `cfg.json` and
`sae_weights.safetensors` in one folder. A transcoder reads what an MLP reads, and writes what it gives (Dunefsky et al.
2024, arXiv 2406.11944); gated: Rajamanoharan et al. 2024, arXiv 2404.16014; jumprelu: arXiv 2407.14435.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unwrite.errors import NodeError, ResultError, shown
from unwrite.files import possible

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_TRANSCODES = {"transcoder": "standard", "skip_transcoder": "standard", "jumprelu_transcoder": "jumprelu"}
# Beside the decoder and the two biases: the parameters of each kind, by their axes.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "standard": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}  # fmt: skip
# What a configuration may not ask for, since nothing here does it: a name, and what it is where it asks for nothing.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "normalize_activations": ("none", None), "rescale_acts_by_decoder_norm": (False, None),
    "reshape_activations": ("none", None), "finetuning_scaling_factor": (False, None),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sae:
    """A sparse autoencoder or transcoder, a basis of an `Edit`; `sae[17]` and `sae[[3, 17]]` are some of its features.

    `kind` "standard", "topk", "jumprelu" or "gated"; `weights` W_enc [d, feature], W_dec [feature, d_out], b_dec and
    the biases of the kind; `k` of "topk"; `centred`: is b_dec taken from what is read; `transcodes`: does it read what
    an MLP reads; `features` those that are chosen, by default all. Read by `uw.sae`.
    """

    kind: str
    weights: Mapping[str, Tensor]
    k: int = 0
    centred: bool = False
    transcodes: bool = False
    features: Int[Tensor, " chosen"] | None = None

    def __getitem__(self, features: Any) -> Sae:
        """The same with some of its features alone. Raises NodeError for one that it does not have."""
        listed = [features] if isinstance(features, int) else features
        count = len(self.weights["W_dec"])
        whole = isinstance(listed, (list, tuple)) and all(type(one) is int and 0 <= one < count for one in listed)
        if not whole or not listed or len(set(listed)) < len(listed):
            raise NodeError("these are no features", got=shown(features), expected=f"numbers from 0 to {count - 1}")
        return replace(self, features=torch.tensor(listed))

    @property
    def width(self) -> int:
        """Of what it changes."""
        return self.weights["W_dec"].shape[1]

    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows feature"]:
        """The chosen features of what is at the site (of a transcoder, of what its MLP reads)."""
        weight = {name: part.to(x.device, x.dtype) for name, part in self.weights.items()}
        if x.shape[-1] != len(weight["W_enc"]):
            raise NodeError("this autoencoder reads another width", got=x.shape[-1], expected=len(weight["W_enc"]))
        found = _ACTIVE[self.kind](self, weight, x - weight["b_dec"] if self.centred else x)
        return found if self.features is None else found[..., self.features.to(x.device)]

    def decode(self, features: Float[Tensor, "*rows feature"]) -> Float[Tensor, "*rows d_out"]:
        """What the chosen features add up to, without b_dec."""
        weight = self.weights["W_dec"].to(features.device, features.dtype)
        return features @ (weight if self.features is None else weight[self.features.to(features.device)])


def _relu(sae: Sae, weight: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.relu(x @ weight["W_enc"] + weight["b_enc"])


def _jump(sae: Sae, weight: Mapping[str, Tensor], x: Tensor) -> Tensor:
    before = x @ weight["W_enc"] + weight["b_enc"]
    return torch.relu(before) * (before > weight["threshold"])


def _top(sae: Sae, weight: Mapping[str, Tensor], x: Tensor) -> Tensor:
    highest = (x @ weight["W_enc"] + weight["b_enc"]).topk(sae.k, -1)
    empty = x.new_zeros(*x.shape[:-1], weight["W_enc"].shape[1])
    return empty.scatter(-1, highest.indices, torch.relu(highest.values))


def _gate(sae: Sae, weight: Mapping[str, Tensor], x: Tensor) -> Tensor:
    made = x @ weight["W_enc"]
    return (made + weight["b_gate"] > 0) * torch.relu(made * weight["r_mag"].exp() + weight["b_mag"])


_ACTIVE: Mapping[str, Callable[[Sae, Mapping[str, Tensor], Tensor], Tensor]] = {
    "standard": _relu, "jumprelu": _jump, "topk": _top, "gated": _gate,
}  # fmt: skip


def sae(path: str | Path) -> Sae:
    """A sparse autoencoder or transcoder, from a folder in the layout of SAELens (cfg.json, sae_weights.safetensors).

    It must have been trained on what the site shows: states of LayerNorm models are centred here under the convention
    "paper", as TransformerLens centres them where it folds weights; with convention="raw" they are Hugging Face's.
    Raises ResultError for a folder that holds none, a kind that is not known ("standard", "topk", "jumprelu", "gated",
    and transcoders without a skip connection), and settings that nothing here does, such as a normalisation.

    Example: `uw.Edit.scale("resid_post5", 0.0, basis=uw.sae("saes/5")[17])` removes what feature 17 says
    """
    folder = possible(path)
    config, weights = _config(folder / _CONFIG), _weights(folder / _WEIGHTS)
    name = str(config.get("architecture", "standard"))
    act = str(config.get("activation_fn_str", config.get("activation_fn", "relu")))
    kind = "topk" if act == "topk" else _TRANSCODES.get(name, name)
    if kind not in _KINDS or act not in ("relu", "topk") or "W_skip" in weights:
        raise ResultError("another kind of autoencoder", got=f"{name}, {act}", expected=", ".join(_KINDS))
    for setting, plain in _PLAIN.items():
        if config.get(setting) not in plain:
            raise ResultError(
                f"this autoencoder asks for {setting}", got=shown(config[setting]), expected=shown(plain[0])
            )
    found = {part: weights.get(part) for part in ("W_enc", "W_dec", "b_dec", *_KINDS[kind])}
    _require_shapes(folder, found)
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k", 0))
    if kind == "topk" and not (type(k) is int and 0 < k <= len(weights["W_dec"])):
        raise ResultError("topk needs its k", got=shown(k), expected="a number of features")
    centred = bool(config.get("apply_b_dec_to_input", name not in _TRANSCODES))
    return Sae(kind, {part: weights[part] for part in found}, int(k or 0), centred, name in _TRANSCODES)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{file} is no configuration of an autoencoder", got=error) from None
    if not isinstance(config, dict):
        raise ResultError(
            f"{file} is no configuration of an autoencoder", got=shown(config), expected="settings by name"
        )
    return config


def _weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ResultError(f"{file} holds no weights of an autoencoder", got=error) from None


def _require_shapes(folder: Path, weights: Mapping[str, Tensor | None]) -> None:
    """Raise ResultError unless all weights are there and fit each other."""
    into, out = weights["W_enc"], weights["W_dec"]
    if into is None or out is None or into.dim() != 2 or out.dim() != 2 or into.shape[1] != out.shape[0]:
        got = " and ".join(shown(part) for part in (into, out))
        raise ResultError(f"encoder and decoder in {folder} do not fit", got=got, expected="[d, feature], [feature, d]")
    for name, part in weights.items():
        size = [out.shape[1]] if name == "b_dec" else [into.shape[1]]
        if name[0] != "W" and (part is None or list(part.shape) != size or not part.is_floating_point()):
            raise ResultError(f"{name} in {folder} does not fit", got=shown(part), expected=f"{size} numbers")
