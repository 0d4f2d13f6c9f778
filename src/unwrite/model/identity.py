"""Which model is this, for a run that goes on later? Configuration, buffers, adapters, and some of its logits.

Weights are hashed elsewhere (`load.weights_hash`). Logits say what nothing else does: a function that was exchanged, a
frequency that is no buffer. They are compared to some digits, since machines round differently.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from unwrite.model.identities import output_of
from unwrite.model.now import state
from unwrite.model.view import Model

LOGITS = "logits"
_LENGTH = 9
_KEPT = 16
# Says nothing about what a model computes, or is in the key by itself.
_IDLE = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "_attn_implementation",
}  # fmt: skip


@torch.no_grad()
def identity(lm: Model) -> dict[str, Any]:
    """What tells this model, as it is now, from another one with the same weights."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.vocabulary, (2, min(_LENGTH, lm.context or _LENGTH)), generator=generator)
    logits = output_of(lm, ids.to(lm.device))[:, -1].double().cpu()
    some = torch.linspace(0, logits.shape[-1] - 1, _KEPT).long()
    return {
        "configuration": _configuration(lm.config.to_dict()),
        "buffers": _buffers(lm.hf),
        "adapters": sorted({f"{path} {adapter}" for path, adapter in state(lm.hf)["adapters"].items()}),
        LOGITS: [float(f"{value:.4g}") for value in logits[:, some].flatten().tolist()],
    }


def _configuration(values: dict[str, Any]) -> str:
    told = json.dumps({name: part for name, part in values.items() if name not in _IDLE}, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _buffers(hf: nn.Module) -> str:
    total = hashlib.sha256()
    for path, module in hf.named_modules():
        for name, value in module._buffers.items():
            # Dynamic frequencies are those of the last run.
            if value is None or value.is_meta or (_moves(module) and not name.startswith("original")):
                continue
            total.update(f"{path}.{name} {tuple(value.shape)}".encode())
            whole = value.detach().cpu()
            # The last bits of a float that was computed, and not read, may be another machine's.
            part = whole.float().numpy().view("int32") + 128 >> 8 if whole.is_floating_point() else whole.numpy()
            total.update(part.tobytes())
    return total.hexdigest()


def _moves(module: nn.Module) -> bool:
    kind = getattr(module, "rope_type", "")
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any("dynamic" in str(one) or str(one) == "longrope" for one in kinds)
