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
        # A mixer reads weights of modules that it does not call: of its convolution, and of what is beside it.
        beside = any(isinstance(module, nn.Conv1d) for module in hf.modules())
        for module in hf.modules():
            for part in (module, *(module.children() if beside else ())):
                parameters, buffers = _halves(part._parameters), _halves(part._buffers)
                if parameters or buffers:
                    stack.callback(_put, part, parameters, buffers)
                    begin = called(module, partial(_widen, part, parameters, buffers))
                    end = ended(module, partial(_put, part, parameters, buffers))
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
