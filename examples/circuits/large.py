"""What would it take to ask for the output nodes of a model as large as the paper's, of which no weight is here?

    python examples/circuits/large.py          with accelerate, which knows what a device_map is

Lieberum et al. 2023 (arXiv 2307.09458) take Chinchilla apart: 80 layers of 64 heads, 70 billion weights. A Llama of
this shape is made up from a configuration alone, and asked what its nodes, its weights and the passes over it come to;
what that is is kept as `results/large.json`, from which docs/multiple-choice.md is made.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from measure import write
from transformers import LlamaConfig

from unwrite.model.load import outline
from unwrite.run.edit.slots import slots
from unwrite.run.replay.sweep import forwards
from unwrite.studies.doctor import foresee
from unwrite.studies.room import memory


def large(length: int = 600, n: int = 64) -> pd.Series:
    """What it takes with 80 layers of 64 heads, from a configuration alone: no weight is there.

    Prompts of five worked examples have about `length` tokens.
    """
    config = LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=64, intermediate_size=22016,
        vocab_size=32000, max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    half = {f"model.layers.{i}": f"cuda:{i // 40}" for i in range(80)}
    where = {"model.embed_tokens": "cuda:0", "model.norm": "cuda:1", "lm_head": "cuda:1", "model.rotary_emb": "cuda:0"}
    with TemporaryDirectory() as place:
        config.save_pretrained(place)
        lm, two = outline(place, "bfloat16"), foresee(place, half | where, n, length, "bfloat16")
    if lm is None or two is None:
        raise ValueError("this configuration does not say its shape")
    nodes = slots(lm, [str(node) for node in lm.parts if node.kind in ("head", "mlp")])
    row = np.array([length - 1])
    passes = forwards(lm, nodes, row, row, row[:, None])
    weights = sum(part.numel() for part in lm.hf.parameters())
    return pd.Series({
        "nodes": f"{len(lm.nodes):,}", "weights": f"{weights / 1e9:.1f} billion",
        "on two devices": "; ".join(map(str, two.regions)),
        "memory of uw.dla beside the weights": f"{memory(lm, n, length)['dla'] / 2**30:.0f} GiB",
        "direct effects": "five passes forward, four of them also backward, whatever the number of nodes",
        "total effects of all heads and MLPs at the end": f"{passes:.1f} passes over a prompt",
    })  # fmt: skip


if __name__ == "__main__":
    write(large().to_dict(), "large")
