"""Is what a method would record still the model, as it is and as torch computes now? Measured at the start of a run.

A certificate is of the moment of loading. Hooks that come later, adapters that are switched, autocast, matrix products
of reduced precision change what a pass computes, or what can be seen of it. (Compiled parts run as they are written.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from unwrite.errors import ModelError
from unwrite.model.capture import run
from unwrite.model.fold import fold
from unwrite.model.identities import finished, output_of, relative
from unwrite.model.single import HALVES
from unwrite.model.view import Model
from unwrite.model.writes import expand

# So many rows at the end of a prompt are compared.
_ROWS = 4
_SHOWN = 3


def state(hf: nn.Module) -> dict[str, Any]:
    """What changes logits and is no weight: by what a message calls it."""
    device = next(hf.parameters()).device.type
    modules = dict(hf.named_modules())
    return {
        "autocast": torch.is_autocast_enabled(device if device != "meta" else "cpu"),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "adapters": {name: adapters for name, module in modules.items() if (adapters := _adapters(module))},
        "hooks": {name: count for name, module in modules.items() if (count := _hooks(module))},
        "forward functions": {name for name, module in modules.items() if "forward" in module.__dict__},
    }


def _adapters(module: nn.Module) -> tuple[str, ...]:
    found = (getattr(module, name, None) for name in ("_active_adapter", "_disable_adapters", "merged_adapters"))
    return tuple(str(part) for part in found if part is not None)


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


@torch.no_grad()
def same_now(lm: Model, prompt: Int[Tensor, "1 position"], length: int) -> None:
    """Raise ModelError naming what changed unless the writes of a prompt give its logits.

    The writes are those of the prompt as a batch has it, with whatever stands behind its `length` tokens; the logits
    those of the model as its user calls it, on these tokens alone.
    """
    name = str(lm.about.get("name", lm.family))
    # Of another length, half precision rounds otherwise, and routers may choose other experts.
    alone = (prompt if lm.dtype in HALVES else prompt[:, :length]).to(lm.device)
    rows = slice(max(0, length - _ROWS), length)
    own = output_of(lm, alone)[0, rows]
    if not own.isfinite().all():
        return  # the method says where
    folded = fold(lm)
    writes = run(lm, prompt, folded).map(lambda part: part[0, rows])
    error = relative(finished(lm, expand(lm, folded, writes).sum(0))[None], own)
    if not error <= lm.certificate.limit:
        raise ModelError(
            f"what would be recorded is not {name} as it computes now",
            got=f"logits with a relative error of {error:.1e}{_since(lm)}",
            expected=f"at most {lm.certificate.limit:.0e}, as when it was loaded",
            fix="take that back, or load the model as it is now",
        )


def _since(lm: Model) -> str:
    changed = [*changes(lm.state, state(lm.hf))]
    return f"; since it was loaded these changed: {'; '.join(changed)}" if changed else ""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is another one, in words."""
    for what, value in now.items():
        if value == (old := before.get(what)):
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            names = [name or "the model" for name in {**old, **value} if old.get(name) != value.get(name)]
            yield f"{what} of {_named(names)}"
        elif isinstance(value, set) and isinstance(old, set):
            yield f"{what} of {_named(sorted(old ^ value))}"
        else:
            yield f"{what} (now {value})"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
