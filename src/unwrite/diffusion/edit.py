"""How is the text of an image exchanged, or kept from being harmful, and which modules would one train for it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unwrite.diffusion.localise import sets_of
from unwrite.diffusion.passes import WAYS, Exchange, way_of
from unwrite.diffusion.scores import quoted, replaced
from unwrite.diffusion.view import Image, TextLayer, painter, written
from unwrite.errors import NumericError, TokensError, function, one_of, require, shown, whole


def layers(pipe: Any, call: Any = None) -> tuple[TextLayer, ...]:
    """The layers of a pipeline that read text, in the order in which they run; from one pass of its denoiser.

    Arguments: `call` as in `uw.localise`. Raises ModelError for what is no pipeline that makes images of text.

    Example: `[layer.path for layer in uw.diffusion.layers(pipe)[55:58]]`
    """
    return painter(pipe, "text", call).layers


def lora_targets(pipe: Any, layers: Any, call: Any = None) -> list[str]:
    """Full names of the modules that make keys and values of text in these layers, as peft's LoraConfig takes them.

    Arguments: `layers` and `call` as in `uw.localise`.
    Raises NodeError for layers that are not there, ModelError as `layers` does.

    Example: `LoraConfig(r=8, target_modules=uw.diffusion.lora_targets(pipe, "L55+L56+L57"))`
    """
    sets = sets_of(painter(pipe, "text", call), layers)
    chosen = dict.fromkeys(layer for own in sets.values() for layer in own)
    return [name for layer in chosen for name in layer.targets]


def edit(
    pipe: Any, prompt: str, target: str, layers: Any, start: int = 0, *, seed: int = 0, put: str | None = None,
    call: Any = None,
) -> Image:  # fmt: skip
    """The image of a prompt whose text is the target's, [row, column, channel] from 0 to 1: three images are made.

    Arguments as in `uw.localise`, of which `layers` are exchanged together. Of a target that is the prompt, the
    prompt's own image. Raises as `uw.localise` does.

    Example: `uw.diffusion.edit(pipe, 'A sign that says "STOP"', 'A sign that says "TAXI"', "L55+L56+L57", start=4)`
    """
    for name, text in (("prompt", prompt), ("target", target)):
        require(isinstance(text, str), TokensError, f"{name} is one text", text, "a string")
        written(name, text)
    if put is not None:
        one_of("put", put, WAYS, "None")
    one = painter(pipe, prompt, call)
    chosen = tuple(dict.fromkeys(layer for own in sets_of(one, layers).values() for layer in own))
    first, noise = whole("start is a step", start, 0, 10**6), whole("seed", seed, 0)
    exchange = Exchange(one, prompt, target, noise, first, way_of(chosen, put), chosen)
    own = exchange.base()
    if prompt == target:
        return own
    exchange.aim()
    return exchange.changed(chosen)


def harmless(prompt: str, harmful: Callable[[str], bool], instead: str) -> str:
    """The same prompt, its quoted text exchanged where `harmful` says so of it: as the target of `edit`, a prevention.

    What is not quoted stays, and with it the picture. Raises TokensError for a prompt that quotes nothing, or whose
    text would stay harmful, NumericError for a `harmful` that is no function.

    Example: `edit(pipe, prompt, harmless(prompt, lambda text: "stupid" in text.lower(), "hello"), "L17")`
    """
    require(isinstance(prompt, str), TokensError, "prompt is one text", prompt, "a string")
    require(isinstance(instead, str) and bool(instead.strip()), TokensError, "instead is a text", instead, "a string")
    function("harmful", harmful)
    require(harmful is not None, NumericError, "harmful is a function of a text", harmful, "what can be called")
    if not (text := quoted(prompt)):
        raise TokensError("a prompt quotes no text", got=shown(prompt), expected='… "STOP"')
    if not harmful(text):
        return prompt
    if harmful(instead):
        raise TokensError("what would stand there instead is harmful, too", got=shown(instead))
    return replaced(prompt, instead)
