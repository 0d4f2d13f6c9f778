"""What does a run do from some position on, over keys and values that it kept of the positions before?

A sweep runs only what a patch can change, so it rests on this: a part of a run is the same part of the whole run. It
is not where a model computes otherwise for another number of positions (longrope), or where a layer looks up what was
kept of another one (exchanged layers); that is measured, and then runs are taken whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unwrite.errors import ModelError, plain
from unwrite.model.cache import ByPrompt, Handed, Past, empty, keeping, kept_of, remembering, with_past
from unwrite.model.capture import evaluating
from unwrite.model.hooks import (
    Call,
    before,
    called,
    calls_kept,
    first_of,
    hooked,
    kept,
    put_out,
    read_of,
    reads_instead,
)
from unwrite.model.lengths import switches
from unwrite.model.placed import decode
from unwrite.model.view import Layer, Model

_UNCERTIFIED = 1e-3
Calls = Mapping[int, Call]
Inputs = list[Float[Tensor, "prompt position d_model"]]


def calling(lm: Model) -> AbstractContextManager[Calls]:
    """Inside the `with`, every forward pass leaves how it called each block."""
    return calls_kept({layer.index: layer.block for layer in lm.layers})


@contextmanager
def apart(lm: Model) -> Iterator[None]:
    """Inside the `with`, a pass whose blocks cannot be run again one by one raises ModelError.

    Those of some models are handed which keys an earlier block has chosen: on another stream it would choose others,
    once a prompt has more tokens than are chosen.
    """
    made: list[Tensor] = []

    def begin(layer: Layer, call: Call) -> None:
        length, most = read_of(call).shape[1], min(switches(lm), default=None)
        handed = [part for part in (*call[0], *call[1].values()) if any(part is other for other in made)]
        if handed and most is not None and length > most:
            raise ModelError(
                f"layer {layer.index} of {lm.family} is handed what another layer made beside the stream, so it cannot "
                f"be run again by itself", got=f"{length} tokens", expected=f"at most {most}",
                fix="use shorter prompts, or what runs no layer again, as scan",
            )  # fmt: skip

    def end(output: Any) -> None:
        made.extend(part for part in (output[1:] if isinstance(output, tuple) else ()) if isinstance(part, Tensor))

    blocks = [(layer, layer.block) for layer in lm.layers]
    with hooked(
        [called(block, partial(begin, layer)) for layer, block in blocks] + [put_out(b, end) for _, b in blocks]
    ):
        yield


def block(layer: Layer, call: Call, x: Tensor | None = None) -> Tensor:
    """What a block puts out when it is called so, or so but for the stream that it reads."""
    args, kwargs = call if x is None else reads_instead(call, x)
    return first_of(layer.block(*args, **kwargs))


@torch.no_grad()
def kept_run(lm: Model, ids: Int[Tensor, "prompt position"]) -> tuple[Inputs, list[Past]]:
    """One whole run: what each block read and, last, the final stream; and every layer's keys and values, if it can be
    continued over these.
    """
    found: dict[int, Tensor] = {}
    cache = empty() if lm.applies("continued") else None
    past: dict[str, Any] = {"use_cache": False} if cache is None else keeping(lm.decoder, cache)
    modules = (*(layer.block for layer in lm.layers), lm.final_norm)
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm.hf))
        # Copies: some blocks add into what they were given.
        stack.enter_context(hooked(before(module, kept(found, i, copied=True)) for i, module in enumerate(modules)))
        decode(lm, ids, **past)
    inputs = [found[index].to(lm.device) for index in range(len(modules))]
    makes = [layer.values_of is None for layer in lm.layers]
    return inputs, [] if cache is None else kept_of(cache, makes)


def calls_from(lm: Model, ids: Int[Tensor, "_ position"], kept: Sequence[Past], start: int, end: int) -> Calls:
    """How the model calls each block for rows start … end of these prompts that follow on earlier ones.

    For runs of any of them: an argument is either the same for all, and then it is that of the first, or `ByPrompt`.
    Where nothing is `kept`, start is 0, and the model is asked for no cache.
    """
    alike = calls_of(lm, ids[:1], kept, start, end)
    if not lm.by_prompt:
        return alike
    every = calls_of(lm, ids, kept, start, end) if len(ids) > 1 else alike
    return {layer: by_prompt(lm, call, every[layer]) for layer, call in alike.items()}


def by_prompt(lm: Model, call: Call, every: Call) -> Call:
    """A call in which the arguments that are another one for another prompt are those of `every` prompt."""
    (args, kwargs), (all_args, all_kwargs) = call, every
    instead: Callable[[object, Any, Any], Any] = lambda name, own, whole: (  # noqa: E731
        ByPrompt(whole) if str(name) in lm.by_prompt else own
    )
    pairs = zip(args, all_args, strict=True)
    return tuple(instead(i, *pair) for i, pair in enumerate(pairs)), {
        name: instead(name, own, all_kwargs[name]) for name, own in kwargs.items()
    }  # fmt: skip


@torch.no_grad()
def calls_of(lm: Model, ids: Int[Tensor, "_ position"], kept: Sequence[Past], start: int, end: int) -> Calls:
    """How the model calls each block for some rows of all of these prompts at once."""
    past = {i: tuple(part[: len(ids), :, :start] for part in own) for i, own in enumerate(kept)}
    cache: dict[str, Any] = {"use_cache": False}
    if kept:
        cache = keeping(lm.decoder, remembering(past, len(lm.layers)))
    with evaluating(lm.hf), calling(lm) as calls:
        decode(lm, ids[:, start:end], **cache)
    return calls


def block_from(
    lm: Model,
    kept: Sequence[Past],
    index: int,
    x: Float[Tensor, "run row d_model"],
    pair: Int[Tensor, " run"],
    start: int,
    calls: Calls,
    handed: Handed,
) -> Float[Tensor, "run row d_model"]:
    """What a block makes of rows `start` and later of runs that before them are runs of the prompts `pair`.

    `handed` is what blocks of these runs hand on to each other, as far as they have gone.
    """
    past = None
    if kept:
        own = tuple(part[pair.to(part.device), :, :start] for part in kept[index])
        past = remembering({index: own}, len(lm.layers))
    layer = lm.layers[index]
    with evaluating(layer.block):  # of the whole model it takes long beside a block of few rows
        made = block(layer, with_past(calls[index], past, pair, handed), x).to(pair.device)
    handed.keep()
    return made


def continued(lm: Model, ids: Int[Tensor, "prompt position"], inputs: Sequence[Tensor], kept: Sequence[Past]) -> bool:
    """Is a part of a run over prompts of this length the same part of the whole run? Measured once for each length."""
    length = ids.shape[1]
    if not lm.applies("continued"):
        return False
    if length not in lm.whole:
        limit = _UNCERTIFIED if lm.certificate is None else lm.certificate.allowed("continued")
        starts = {1, length // 2} - {0, length}
        errors = [continues(lm, ids, inputs, kept, start, min(2, length - start)) for start in sorted(starts)]
        # Written so that NaN is not a proof.
        lm.whole[length] = not (lm.proved("continued") and all(error <= limit for error in errors))
        if lm.whole[length]:
            logging.getLogger("unwrite").warning(
                "%s", plain(f"a part of a run of {length} tokens is not that of the whole run, so every run is whole")
            )
    return not lm.whole[length]


@torch.no_grad()
def continues(
    lm: Model,
    ids: Int[Tensor, "prompt position"],
    inputs: Sequence[Tensor],
    kept: Sequence[Past],
    start: int,
    rows: int,
) -> float:
    """How far the first prompt's run, continued for some rows from `start`, is from the whole run: relative, worst row.

    ∞ where it cannot be continued at all.
    """
    if not kept:
        return float("inf")
    end, pair = start + rows, torch.zeros(1, dtype=torch.long, device=lm.device)
    try:
        calls, x = calls_from(lm, ids[:1].to(lm.device), kept, start, end), inputs[0][:1, start:end]
        handed = Handed()
        for index in range(len(lm.layers)):
            x = block_from(lm, kept, index, x, pair, start, calls, handed)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError):
        return float("inf")
    whole = inputs[-1][:1, start:end]
    error = (x - whole).to(lm.compute_dtype).norm(dim=-1) / whole.to(lm.compute_dtype).norm(dim=-1)
    return float(error.amax()) if error.isfinite().all() else float("nan")
