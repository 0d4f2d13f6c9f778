"""Which tokens is a prompt that holds an image? Those of its text, and where the image is what the model puts there.

The model's own pass shows it: what its decoder is given is compared with the embedding of the ids. Whatever else an
image changes (positions, a mask, a later layer) is not in the vectors, so the decoder's pass over them is compared with
the model's own, and refused where they differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from unwrite.errors import ModelError, TokensError, said, shown
from unwrite.model.capture import evaluating
from unwrite.model.families import REST
from unwrite.model.hooks import Call, called, first_of, hooked, put_out
from unwrite.model.identities import Ids, Mask, output_of, relative
from unwrite.model.placed import decode
from unwrite.model.view import Model, require_model
from unwrite.prompts.given import given
from unwrite.prompts.tokens import BEYOND, Images, Tokens, from_ids

_IDS, _MASK = "input_ids", "attention_mask"
# What a decoder is given with text alone, too.
_ALWAYS = {"inputs_embeds", _MASK, "use_cache", "return_dict", "output_attentions", "output_hidden_states"}


@torch.no_grad()
def images(lm: Model, inputs: Any) -> Tokens:
    """`Tokens` of prompts that hold images, or whatever else a processor makes ready beside text.

    At the positions of an image the node `embed` is what the model puts there, behind its vision tower and projector;
    all that follows is as with text. The vectors are kept as long as the tokens are.

    Arguments: `lm` a model that sees; `inputs` what its processor returned (input_ids, attention_mask, pixel_values, …)
    for all prompts at once, with padding on either side.
    Raises TokensError for anything else; ModelError for a model that fails on it, and for one in which an image changes
    more than vectors at its positions, such as positions (Qwen2-VL) or masks (Gemma 3).

    Example: `uw.scan(lm, uw.images(lm, processor(text=texts, images=pictures, return_tensors="pt", padding=True)))`
    """
    require_model(lm)
    if lm.row.embed == REST:
        raise ModelError(
            f"no module of {lm.about.get('name', lm.family)} puts out what its first block reads of a token",
            expected="one in whose place an image can be put", fix="give a method the ids alone",
        )  # fmt: skip
    ids, mask, more = _unpacked(lm, inputs)
    call, own = _own_pass(lm, ids, mask, more)
    embedded = call[1]["inputs_embeds"].to(lm.device)
    if not bool((at := _differs(lm, ids, embedded) & mask).any()):
        raise TokensError(
            "none of these prompts holds an image", got=", ".join(more), fix="give a method the ids alone"
        )
    held, seen = _named(ids, embedded, at)
    found = replace(from_ids(held, mask), images=seen, source="prompts with images")
    lm.images.add(seen)
    _require_whole(lm, found, own[mask], call)
    return found


def _unpacked(lm: Model, inputs: Any) -> tuple[Ids, Mask, dict[str, Any]]:
    """Ids, mask, and all else as the model takes it, where it computes."""
    if not isinstance(inputs, Mapping) or _IDS not in inputs:
        raise TokensError(
            "images are read from what a processor returned", got=shown(inputs), expected=f"{_IDS}, pixel_values, …",
            fix='processor(text=…, images=…, return_tensors="pt", padding=True)',
        )  # fmt: skip
    own = {name: inputs[name] for name in (_IDS, _MASK) if name in inputs}
    from_ids(own[_IDS], own.get(_MASK))
    given(own, lm.tokenizer)
    ids = torch.as_tensor(own[_IDS]).to(lm.device)
    mask = torch.as_tensor(own.get(_MASK, np.ones(ids.shape))).to(lm.device).bool()
    more = {said(name): _moved(lm, value) for name, value in inputs.items() if name not in own}
    return ids, mask, more


def _moved(lm: Model, value: Any) -> Any:
    value = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "iufb" else value
    if not isinstance(value, Tensor):
        return value
    return value.to(lm.device, lm.dtype if value.is_floating_point() else value.dtype)


def _own_pass(lm: Model, ids: Ids, mask: Mask, more: dict[str, Any]) -> tuple[Call, Float[Tensor, "prompt position d"]]:
    """How the model itself calls its decoder for these inputs, and what that gives."""
    calls: list[Call] = []
    found: list[Any] = []
    try:
        with hooked([called(lm.decoder, calls.append), put_out(lm.decoder, found.append)]):
            output_of(lm, ids, mask, **more)
    except Exception as error:  # the forward pass is the model's own
        raise ModelError(
            f"{lm.about.get('name', lm.family)} could not be run on these inputs", got=error,
            expected=f"what its own processor returns, not only {', '.join(more) or _IDS}",
        ) from error  # fmt: skip
    if len(calls) != 1 or not isinstance(calls[0][1].get("inputs_embeds"), Tensor):
        raise ModelError(
            f"what {lm.about.get('name', lm.family)} puts at an image is not shown by one call of its decoder",
            got=f"{len(calls)} calls", expected="one, with the vectors of all positions",
        )  # fmt: skip
    return calls[0], first_of(found[0]).to(lm.device)


def _differs(lm: Model, ids: Ids, embedded: Float[Tensor, "prompt position d"]) -> Mask:
    """Where something else stands than the embedding of the id."""
    known = ids < lm.vocabulary
    own = lm.decoder.get_submodule(lm.row.embed)(ids.where(known, 0)).to(embedded)
    return (own != embedded).any(-1) | ~known


def _named(ids: Ids, embedded: Float[Tensor, "prompt position d"], at: Mask) -> tuple[Ids, Images]:
    """The ids with those of vectors in them: equal vectors, and no others, have equal ids."""
    vectors = embedded[at].cpu()
    digests = [hashlib.sha256(row.view(torch.uint8).numpy().tobytes()).digest() for row in vectors.contiguous()]
    ids_of = np.array([BEYOND + (int.from_bytes(digest[:8]) >> 2) for digest in digests], dtype=np.int64)
    every, first = np.unique(ids_of, return_index=True)
    held = ids.masked_scatter(at, torch.from_numpy(ids_of).to(ids))
    return held, Images(every, vectors[torch.from_numpy(first)], ids[at].cpu().numpy()[first])


def _require_whole(lm: Model, found: Tokens, own: Float[Tensor, "row d"], call: Call) -> None:
    """Raise ModelError unless the decoder makes of the vectors alone what it gives in the model's own pass."""
    real = torch.from_numpy(np.arange(found.length) < found.lengths[:, None]).to(lm.device)
    with evaluating(lm.hf):
        alone = first_of(decode(lm, torch.from_numpy(found.ids), use_cache=False)).to(lm.device)[real]
    error = relative(alone[None], own)
    if not error <= lm.certificate.limit:
        told = sorted(name for name, value in call[1].items() if value is not None and name not in _ALWAYS)
        raise ModelError(
            f"an image changes more in {lm.about.get('name', lm.family)} than what is embedded at its positions",
            got=f"final streams {error:.1e} from its own, where its decoder is also told {', '.join(told) or 'a mask'}",
            expected=f"at most {lm.certificate.limit:.0e}", fix="use text alone, or a model that sees as LLaVA does",
        )  # fmt: skip
