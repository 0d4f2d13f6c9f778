"""Is what `uw.load` was given whole, and can what it was told beside be meant?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unwrite.errors import ModelError, shown
from unwrite.model.view import CONVENTIONS
from unwrite.prompts.encode import is_tokenizer

_LISTED = 3


def require_options(tokenizer: Any, revision: Any, dtype: Any, device: Any, trust: Any, convention: Any) -> None:
    """Raise ModelError for a setting of `uw.load` that is none."""
    if not isinstance(convention, str) or convention not in CONVENTIONS:
        raise ModelError("unknown convention", got=shown(convention), expected=" or ".join(map(repr, CONVENTIONS)))
    if tokenizer is not None and not is_tokenizer(tokenizer):
        raise ModelError(
            "this is no tokenizer of transformers", got=shown(tokenizer),
            fix="AutoTokenizer.from_pretrained(…), or PreTrainedTokenizerFast(tokenizer_object=…)",
        )  # fmt: skip
    if revision is not None and not (isinstance(revision, str) and revision):
        raise ModelError("revision names a branch, tag or commit", got=shown(revision), expected="text")
    if not isinstance(trust, bool):
        raise ModelError("trust_remote_code is a choice", got=shown(trust), expected="True or False")
    if dtype is not None and not _floats(dtype):
        raise ModelError(
            "dtype is what weights are kept in", got=shown(dtype), expected="'auto', 'float32', torch.bfloat16, …"
        )
    if device is not None and not _is_device(device):
        raise ModelError("device is no device of torch", got=shown(device), expected="'cpu', 'cuda:0', …")


def require_whole(name: str, told: Mapping[str, Any]) -> None:
    """Raise ModelError where a checkpoint lacks weights, which transformers would draw at random."""
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ModelError(
            f"{name} lacks weights, which would be random numbers", got=f"no {', '.join(missing[:_LISTED])}{more}",
            expected="all that config.json describes", fix="take config.json and weights from one place",
        )  # fmt: skip


def require_numbers(name: str, hf: nn.Module, errors: Mapping[str, float]) -> None:
    """Raise ModelError, where errors of a certificate are no numbers, naming the weights that are none."""
    if all(error == error for error in errors.values()):
        return
    wrong = [path for path, one in hf.named_parameters() if not one.is_meta and not bool(one.isfinite().all())]
    if wrong:
        raise ModelError(
            f"{name} has weights that are no numbers", got=f"NaN or infinity in {', '.join(wrong[:_LISTED])}",
            expected="finite numbers", fix="load another copy, or an earlier checkpoint of it",
        )  # fmt: skip


def _floats(dtype: Any) -> bool:
    if isinstance(dtype, str) and dtype == "auto":
        return True
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return isinstance(named, torch.dtype) and named.is_floating_point


def _is_device(device: Any) -> bool:
    try:
        return isinstance(device, (str, torch.device)) and bool(str(torch.device(device)))
    except RuntimeError:
        return False
