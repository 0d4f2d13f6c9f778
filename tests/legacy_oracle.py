"""What does TransformerLens 3.9 make of a checkpoint folder? Run by `test_legacy.py` in an environment of its own.

    .venv-legacy/bin/python tests/legacy_oracle.py FOLDER...

Writes FOLDER/oracle.npz: everything that `HookedTransformer.from_pretrained`, with its default processing, shows in
float64 on the token ids in FOLDER/ids.npy, its weights, and what it shows with L0H2 hidden from the values of layer 2
(Dao, Lau, Rager, Janiak 2023, Fig. 3) as "hidden.…". Only the download is replaced: by the folder.
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
    ids = torch.tensor(np.load(folder / "ids.npy"))
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids)
        after = hidden(model, ids, cache)
    seen = {name: value.numpy() for name, value in cache.items()}
    seen |= {f"hidden.{name}": value.numpy() for name, value in after.items() if "resid" in name or "result" in name}
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    np.savez(folder / "oracle.npz", logits=logits.numpy(), **weights, **seen)


def hidden(model: HookedTransformer, ids: torch.Tensor, cache: Any) -> Any:
    """The paper's intervention: the write taken out of the value input of all heads, norms at their clean scale."""
    write, scale = cache["blocks.0.attn.hook_result"][:, :, 2, None], cache["blocks.2.ln1.hook_scale"]
    model.set_use_split_qkv_input(True)
    hooks = [
        ("blocks.2.hook_v_input", lambda value, hook: value - write),
        (
            "blocks.2.ln1.hook_scale",
            lambda value, hook: scale.unsqueeze(-2).expand_as(value) if value.ndim == 4 else scale,
        ),
    ]
    with model.hooks(fwd_hooks=hooks):
        return model.run_with_cache(ids)[1]


for argument in sys.argv[1:]:
    main(Path(argument))
