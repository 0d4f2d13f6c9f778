"""What does TransformerLens 3.9 make of a checkpoint folder? Run by `test_legacy.py` in an environment of its own.

    .venv-legacy/bin/python tests/legacy_oracle.py FOLDER...

Writes FOLDER/oracle.npz: everything that `HookedTransformer.from_pretrained`, with its default processing, shows in
float64 on the token ids in FOLDER/ids.npy. Only the download is replaced: by the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformer_lens import HookedTransformer, loading_from_pretrained


def serve(folder: Path) -> None:
    """Let TransformerLens find the folder where it looks for a repository of the hub."""

    def download(_: str, name: str, **__: Any) -> Any:
        if name.endswith(".pth"):
            return torch.load(folder / name, weights_only=True)
        # Without the tokenizer, which would have to be fetched.
        return json.loads((folder / name).read_text()) | {"tokenizer_name": None}

    names = [file.name for file in folder.iterdir()]
    hub = SimpleNamespace(list_repo_files=lambda _, **__: names)
    loading_from_pretrained.HfApi = lambda: hub
    loading_from_pretrained.utils.download_file_from_hf = download


def main(folder: Path) -> None:
    serve(folder)
    # The processing rounds weights to float32 on its way; without that it is the same algebra, and comparable to 1e-10.
    with patch.object(torch.Tensor, "float", lambda tensor: tensor):
        model = HookedTransformer.from_pretrained("gelu-4l", dtype=torch.float64, device="cpu")
    model.set_use_attn_result(True)
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor(np.load(folder / "ids.npy")))
    seen = {name: value.numpy() for name, value in cache.items()}
    biases = {f"blocks.{layer}.attn.b_O": block.attn.b_O.detach().numpy() for layer, block in enumerate(model.blocks)}
    np.savez(folder / "oracle.npz", logits=logits.numpy(), **biases, **seen)


for argument in sys.argv[1:]:
    main(Path(argument))
