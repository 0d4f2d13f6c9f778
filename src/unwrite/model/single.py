"""What does a model in half precision compute in float32, from the very same weights? Exactness shows there.

In half precision rounding hides a scale that is wrong by some percent. So every module is given float32 copies of its
own weights, one module at a time, while it runs: no more memory than the largest of them needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from unwrite.model.hooks import called, ended, hooked

HALVES = (torch.float16, torch.bfloat16)
Held = dict[str, torch.Tensor]


@contextmanager
def in_float32(hf: nn.Module) -> Iterator[None]:
    """Inside the `with`, forward passes compute in float32; afterwards every weight is the object that it was."""
    with ExitStack() as stack:
        for module in hf.modules():
            parameters, buffers = _halves(module._parameters), _halves(module._buffers)
            if parameters or buffers:
                stack.callback(_put, module, parameters, buffers)
                begin = called(module, partial(_widen, module, parameters, buffers))
                end = ended(module, partial(_put, module, parameters, buffers))
                stack.enter_context(hooked([begin, end]))
        yield


def _halves(own: dict[str, torch.Tensor | None] | dict[str, nn.Parameter | None]) -> Held:
    return {name: value for name, value in own.items() if value is not None and value.dtype in HALVES}


def _widen(module: nn.Module, parameters: Held, buffers: Held, _: object) -> None:
    for name, value in parameters.items():
        module._parameters[name] = nn.Parameter(value.detach().float(), requires_grad=False)
    for name, value in buffers.items():
        module._buffers[name] = value.float()


def _put(module: nn.Module, parameters: Held, buffers: Held) -> None:
    module._parameters.update(parameters)  # pyright: ignore[reportArgumentType, reportCallIssue]
    module._buffers.update(buffers)
