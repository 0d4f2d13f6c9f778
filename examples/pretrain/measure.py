"""What survives of every write of a trained model, and how well does the model predict books that it never saw?

For `bundle.py`, which keeps it beside the model that ships, and for `sweep.py`, which keeps the loss. The position
embedding and every head and MLP before the last layer are taken away once (`uw.verify`), on windows of the two held-out
books.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train import HELD_OUT

import unwrite as uw

WINDOWS, LENGTH = 40, 64
LOSS_WINDOWS = 100


def loss(lm: Any, books: Path) -> dict[str, float]:
    """Nats per token on the first windows of each held-out book, of the model's whole context."""
    found = {}
    for name in HELD_OUT:
        ids = torch.from_numpy(uw.text(books / name, lm.tokenizer, n=LOSS_WINDOWS).ids)
        with torch.no_grad():
            found[name] = float(np.mean([float(lm.hf(input_ids=part, labels=part).loss) for part in ids.split(10)]))
    return found


def writers(lm: Any, books: Path) -> list[dict[str, Any]]:
    """One row for each writer: its size, its survival beside that of a random vector, and who acts because of it."""
    texts = [(books / name).read_text("utf-8") for name in HELD_OUT]
    parts = [uw.text(text, lm.tokenizer, n=WINDOWS // len(texts), length=LENGTH) for text in texts]
    tokens = np.concatenate([part.ids for part in parts])
    scanned = uw.scan(lm, tokens).data
    by = {kind: [str(node) for node in lm.parts if node.kind == kind] for kind in ("head", "mlp")}
    rows = []
    for node in [n for n in lm.parts if n.kind in ("pos_embed", "head", "mlp") and n.layer < len(lm.layers) - 1]:
        row = scanned.sel(writer=str(node))
        found = uw.verify(lm, tokens, node).data
        rows.append(
            {
                "writer": str(node),
                "relative_norm": float(row["relative_norm"].sel(quantile=0.5)),
                "material": bool(row["material"]),
                "verdict": found.attrs["verdict"],
                "survival": float(found["survival"][-1]),
                "generic": float(found["generic"].sel(bound="mean")[-1]),
                "gap": float(found["gap"][-1]),
                "gap_se": float(found["gap_se"][-1]),
                **{
                    f"{what}_by_{kind}s": float(found[what].sel(node=nodes).sum())
                    for what in ("erased", "filled_in")
                    for kind, nodes in by.items()
                },
            }
        )
    return rows


def measured(model: Path, books: Path) -> dict[str, Any]:
    """Loss and writers, as they are kept in JSON; numbers to four significant digits."""
    lm = uw.load(model)
    found = {"held_out": loss(lm, books), "writers": writers(lm, books)}
    return json.loads(json.dumps(found), parse_float=lambda text: rounded(float(text)), parse_constant=lambda _: None)


def rounded(x: float) -> float | None:
    """Four significant digits; nothing for what is no number."""
    return float(f"{x:.4g}") if math.isfinite(x) else None
