"""How does a GGUF file become an ordinary Hugging Face model? transformers' own reader dequantises its weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unwrite.errors import ModelError

SUFFIX = ".gguf"


def gguf_file(source: str) -> Path | None:
    """The GGUF file that is named, or lies alone in a folder without a configuration; None where there is none.

    Raises ModelError for a file that is not there, for several in one folder, and where the reader is not installed.
    """
    place = Path(source)
    if place.suffix.lower() == SUFFIX:
        if not place.is_file():
            raise ModelError(f"there is no file {place}", expected="a GGUF file")
        found = [place]
    elif place.is_dir() and not (place / "config.json").exists():
        found = sorted(file for file in place.iterdir() if file.suffix.lower() == SUFFIX)
    else:
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ModelError(f"{place} holds several GGUF files", got=names, fix="name one of them")
    if found and find_spec("gguf") is None:
        raise ModelError(
            f"{found[0].name} is a GGUF file, whose reader is not installed", fix="pip install 'unwrite[gguf]'"
        )
    return found[0] if found else None


def configuration(file: Path) -> Any:
    """The configuration that a GGUF file describes."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def from_gguf(file: Path, dtype: Any) -> PreTrainedModel:
    """The model with its weights dequantised, in float32 unless another `dtype` is named."""
    wanted = torch.float32 if dtype in (None, "auto") else dtype
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=wanted)
