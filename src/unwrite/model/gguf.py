"""How does a GGUF file become an ordinary Hugging Face model? transformers' own reader dequantises its weights, once.

What it made is kept in the user's cache folder as safetensors, under the hash of the file and of what read it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from unwrite.errors import ModelError
from unwrite.files import version

SUFFIX = ".gguf"
# What is kept takes at most this part of the room there is.
_ROOM = 0.1


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
    place = _kept(file, wanted)
    if (place / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(place, dtype=wanted)
    hf = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=wanted)
    # From here on it is a model like any other.
    vars(hf.config).pop("quantization_config", None)
    _keep(hf, place)
    return hf


def _kept(file: Path, dtype: torch.dtype) -> Path:
    """Where the weights of this file are kept, as this version of the reader makes them."""
    with file.open("rb") as handle:
        own = hashlib.file_digest(handle, "sha256").hexdigest()
    made = f"{own} {dtype} {version('transformers')} {version('gguf')}"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "unwrite" / hashlib.sha256(made.encode()).hexdigest()[:32]


def _keep(hf: PreTrainedModel, place: Path) -> None:
    """Keep a model for the next time, whole or not at all; where there is little room, or no folder, go without."""
    size = sum(part.numel() * part.element_size() for part in hf.parameters())
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if size > _ROOM * shutil.disk_usage(place.parent).free:
            return
        with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as beside:
            hf.config.save_pretrained(beside)
            save_model(hf, str(Path(beside) / "model.safetensors"), {"format": "pt"})
            Path(beside).replace(place)
    except (OSError, SafetensorError):
        return
