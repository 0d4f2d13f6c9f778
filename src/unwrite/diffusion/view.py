"""Which layers of an image pipeline read its text, and in which order? A view of the user's own pipeline.

Staniszewski et al. 2025 (arXiv 2502.09935) number the cross- or joint-attention layers in the order in which they run:
down, mid, up in a UNet, where modules are registered in another one. So the order is that of a pass.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from unwrite.errors import ModelError, NumericError, TokensError, plain, require, shown
from unwrite.model.hooks import Call, Handle, Leave, called, hooked, put_out

Image = Float[np.ndarray, "row column channel"]
# cross: keys and values of the text are made of the prompt's embedding alone; joint: of a stream of its own that
# layers change; mixed: text and image are one stream, and the text stands first in it.
TextKind = Literal["cross", "joint", "mixed"]
TEXT = "encoder_hidden_states"
# What a pipeline is told by us; all else in `call` is the user's.
_OURS = ("prompt", "generator", "output_type", "num_images_per_prompt", "return_dict", "latents")
_MASKS = ("attention_mask", "encoder_attention_mask", "encoder_hidden_states_mask")
_MIXED = ("FluxTransformer2DModel", "single_transformer_blocks.")


@dataclass(frozen=True, eq=False)
class TextLayer:
    """An attention layer that reads text: where it is, how text comes to it, what makes its keys and values of text."""

    path: str
    kind: TextKind
    module: nn.Module = field(repr=False)

    @property
    def targets(self) -> tuple[str, str]:
        """The full names, in the denoiser, of the modules that make keys and values of text: what peft is to adapt."""
        names = ("add_k_proj", "add_v_proj") if _added(self.module) else ("to_k", "to_v")
        return f"{self.path}.{names[0]}", f"{self.path}.{names[1]}"

    @property
    def projections(self) -> tuple[nn.Module, nn.Module]:
        """These modules."""
        key, value = (self.module.get_submodule(name.rpartition(".")[2]) for name in self.targets)
        return key, value

    @property
    def parameters(self) -> int:
        """How many weights they have, without biases."""
        return sum(weight.numel() for module in self.projections for weight in module.parameters() if weight.dim() == 2)


def _added(module: nn.Module) -> bool:
    return isinstance(getattr(module, "add_k_proj", None), nn.Module)


def in_order(denoiser: nn.Module, run: Callable[[], object]) -> tuple[TextLayer, ...]:
    """The layers that read text, in the order in which `run` runs them.

    Raises ModelError for a denoiser that has none, or whose text cannot be exchanged by itself.
    """
    found: dict[str, TextLayer] = {}

    def begin(path: str, module: nn.Module, call: Call) -> None:
        kind = _kind(denoiser, path, module, call)
        if kind is not None and path in found:
            raise ModelError(f"{path} runs twice in one pass of the denoiser", expected="every layer once")
        if kind is not None:
            found[path] = TextLayer(path, kind, module)

    attention = {path: module for path, module in denoiser.named_modules() if _attends(module)}
    with hooked(called(m, lambda call, p=p, m=m: begin(p, m, call)) for p, m in attention.items()):
        run()
    if not found:
        raise ModelError(
            "this pipeline has no layer that reads text", got=type(denoiser).__name__,
            expected="cross- or joint-attention to a prompt, as in Stable Diffusion, IF, SD3 or FLUX",
        )  # fmt: skip
    return tuple(found.values())


def _attends(module: nn.Module) -> bool:
    return _added(module) or all(isinstance(getattr(module, name, None), nn.Module) for name in ("to_k", "to_v"))


def _kind(denoiser: nn.Module, path: str, module: nn.Module, call: Call) -> TextKind | None:
    """How text comes to a layer; None where none does."""
    _, named = call
    mixed = type(denoiser).__name__ == _MIXED[0] and path.startswith(_MIXED[1])
    if not isinstance(named.get(TEXT), Tensor) and not mixed:
        return None
    masked = [name for name in _MASKS if isinstance(named.get(name), Tensor)]
    if masked or getattr(module, "fused_projections", False):
        raise ModelError(
            f"the text of {path} cannot be exchanged by itself", got=f"a mask, {masked[0]}" if masked else
            "queries, keys and values made by one product", fix="" if masked else "unfuse_qkv_projections()",
        )  # fmt: skip
    if mixed:
        return "mixed"
    return "joint" if isinstance(getattr(module, "add_q_proj", None), nn.Module) else "cross"


@dataclass(frozen=True, eq=False)
class Painter:
    """A pipeline of diffusers with what it is called with, and its layers that read text, in order."""

    pipe: Any
    denoiser: nn.Module
    layers: tuple[TextLayer, ...]
    call: Mapping[str, Any]

    def paint(self, prompt: str, seed: int, visits: Iterable[Handle] = ()) -> Image:
        """One image, with these hooks in place while it is made.

        Raises NumericError for an image that is none: not finite, or blanked by a checker.
        """
        with as_left(self.pipe, self.denoiser, seed) as generator, hooked(visits):
            made = self.pipe(
                prompt=prompt, generator=generator, output_type="np", num_images_per_prompt=1, **self.call
            )  # fmt: skip
        return _image(made, prompt)

    def positions(self, layers: Iterable[TextLayer]) -> tuple[int, ...]:
        """Which of all layers these are."""
        order = [id(layer) for layer in self.layers]
        return tuple(order.index(id(layer)) for layer in layers)

    def about(self, prompts: Iterable[str]) -> dict[str, Any]:
        """What tells this pipeline, as it is and as it is called, from another one; hashes of all that it holds."""
        parts = {name: part for name, part in sorted(self.pipe.components.items()) if part is not None}
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        others = {
            name: _configuration(part, prompts) for name, part in parts.items() if not isinstance(part, nn.Module)
        }
        return {
            "name": plain(getattr(self.pipe.config, "_name_or_path", None) or type(self.pipe).__name__),
            "pipeline": type(self.pipe).__name__, "denoiser": type(self.denoiser).__name__,
            "weights": _digest(modules), "others": others, "layers": len(self.layers),
            "dtype": str(next(self.denoiser.parameters()).dtype).removeprefix("torch."),
            "device": next(self.denoiser.parameters()).device.type,
            "attention": sorted({type(layer.module.processor).__name__ for layer in self.layers}),
            "adapters": sorted(map(str, getattr(self.denoiser, "peft_config", {}))),
        }  # fmt: skip


def painter(pipe: Any, prompt: str, call: Any) -> Painter:
    """A pipeline looked at: its text layers, by a pass of its denoiser for this prompt that is left after that.

    Raises ModelError for what is no pipeline that makes images of text, or where diffusers is not installed.
    """
    denoiser, call = denoiser_of(pipe), _called(pipe, call)
    one = Painter(pipe, denoiser, (), call)

    def leave(_: object) -> None:
        raise Leave

    def run() -> None:
        try:
            one.paint(prompt, 0, (put_out(denoiser, leave) for _ in range(1)))
        except Leave:
            pass
        except (TypeError, ValueError) as error:
            raise ModelError(
                "the pipeline cannot be called so", got=error, expected="a prompt, and what `call` says beside it"
            ) from error

    return Painter(pipe, denoiser, in_order(denoiser, run), call)


def denoiser_of(pipe: Any) -> nn.Module:
    """A pipeline's UNet or transformer. Raises ModelError as `painter` does."""
    if find_spec("diffusers") is None:
        raise ModelError("diffusers is not installed", fix="pip install 'unwrite[diffusion]'")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # pyright: ignore[reportMissingImports]

    expected = "a pipeline of diffusers that makes images of text, as StableDiffusion3Pipeline.from_pretrained gives"
    require(isinstance(pipe, DiffusionPipeline), ModelError, "this is no pipeline", pipe, expected)
    found = [part for name in ("unet", "transformer") if isinstance(part := getattr(pipe, name, None), nn.Module)]
    if len(found) != 1:
        got = f"a {type(pipe).__name__} with {', '.join(pipe.components) or 'nothing'}"
        raise ModelError("this pipeline has no one denoiser", got=got, expected="a unet or a transformer")
    return found[0]


def _called(pipe: Any, call: Any) -> Mapping[str, Any]:
    takes = inspect.signature(type(pipe).__call__).parameters
    if not {"prompt", "generator", "output_type"} <= set(takes):
        raise ModelError("this pipeline makes no images of text", got=type(pipe).__name__, expected="one with a prompt")
    named = isinstance(call, Mapping) and all(isinstance(name, str) for name in call)
    require(call is None or named, NumericError, "call is what the pipeline is called with", call, "arguments by name")
    taken = [name for name in _OURS if name in (call or {})]
    if taken:
        raise NumericError("call has what is not the caller's", got=", ".join(taken), expected="other arguments")
    unknown = [name for name in call or {} if name not in takes]
    if unknown:
        raise NumericError(
            f"a {type(pipe).__name__} takes no such argument", got=", ".join(unknown), expected=", ".join(takes)
        )
    return dict(call or {})


def _image(made: Any, prompt: str) -> Image:
    checked = getattr(made, "nsfw_content_detected", None) or getattr(made, "nsfw_detected", None)
    if checked is not None and np.any(checked):
        raise NumericError(
            "the pipeline's checker has blanked an image", got=shown(prompt),
            fix="leave the prompt out, or load the pipeline with safety_checker=None",
        )  # fmt: skip
    image = np.asarray(getattr(made, "images", [None])[0], dtype=np.float32)
    if image.ndim != 3:
        raise ModelError(
            "this pipeline makes no images", got=type(made).__name__, expected="rows, columns and channels"
        )
    if not np.isfinite(image).all():
        raise NumericError("an image is not finite", got=shown(prompt), fix="load the pipeline in float32 or bfloat16")
    return image


@contextmanager
def as_left(pipe: Any, denoiser: nn.Module, seed: int) -> Iterator[torch.Generator]:
    """Inside the `with` the pipeline may be called; afterwards it is what it was, scheduler and random state too.

    Gives the generator of the noise, on the CPU: the same for every device.
    """
    own, scheduler = dict(vars(pipe)), pipe.scheduler
    timed = copy.deepcopy(vars(scheduler))
    device = next(denoiser.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            pipe.set_progress_bar_config(disable=True)
            yield torch.Generator("cpu").manual_seed(seed)
        finally:
            with suppress(AttributeError):
                pipe.maybe_free_model_hooks()  # a pass that was left early has not done so
            # Hooks that move components are put on anew by that.
            moved = {name: part for name, part in vars(pipe).items() if name == "_all_hooks"}
            vars(pipe).clear()
            vars(pipe).update({**own, **moved})
            vars(scheduler).clear()
            vars(scheduler).update(timed)


def text_of(call: Call) -> Tensor:
    """The text that a denoiser is called with. Raises ModelError where it is given in another way."""
    text = call[1].get(TEXT)
    if not isinstance(text, Tensor):
        raise ModelError("this pipeline gives its denoiser text in another way", got=shown(text), expected=TEXT)
    return text


def written(what: str, texts: Any) -> list[str]:
    """Prompts, each a string that says something. Raises TokensError for anything else."""
    listed = [texts] if isinstance(texts, str) else texts
    fits = isinstance(listed, (list, tuple)) and listed and all(isinstance(one, str) and one.strip() for one in listed)
    require(bool(fits), TokensError, f"{what} are texts", texts, "a string or several")
    broken = [one for one in listed if any(0xD800 <= ord(letter) < 0xE000 for letter in one)]
    if broken:
        raise TokensError(f"{what} hold half a character", got=shown(broken[0]), expected="whole ones")
    return [str(one) for one in listed]


def _digest(modules: Mapping[str, nn.Module]) -> str:
    total = hashlib.sha256()
    for name, module in modules.items():
        for path, part in sorted(module.state_dict().items()):
            total.update(f"{name}.{path} {tuple(part.shape)} {part.dtype}".encode())
            if isinstance(part, Tensor) and not part.is_meta:
                total.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _configuration(part: Any, prompts: Iterable[str]) -> str:
    """Of a scheduler its configuration, of a tokenizer what it makes of these prompts."""
    told: Any = dict(part.config) if isinstance(getattr(part, "config", None), Mapping) else type(part).__name__
    if hasattr(part, "encode"):
        told = [part.encode(prompt) for prompt in prompts]
    return hashlib.sha256(json.dumps([type(part).__name__, told], sort_keys=True, default=str).encode()).hexdigest()
