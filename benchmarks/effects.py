"""What do sweeps over patches cost, beside a loop with one run of the model for each? Ratios in one run, one thread.

    python benchmarks/effects.py             all lines; that of TransformerLens where it is installed
    python benchmarks/effects.py --rounds 5

GPT-2 small's shape, random weights, 15 tokens of which the fifth differs. Loops are timed on patches spread over the
sweep and multiplied; time is the CPU time of this process, the median over rounds that alternate.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import unwrite as uw
from unwrite.model.onednn import fast

LAYERS, HEADS, WIDTH, LENGTH, DIFFERS, PAIRS = 12, 12, 64, 15, 4, 4
SAMPLED = 18


def build() -> tuple[GPT2LMHeadModel, torch.Tensor, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=HEADS * WIDTH, n_layer=LAYERS, n_head=HEADS, bos_token_id=0, eos_token_id=0)
    base = torch.randint(config.vocab_size, (PAIRS, LENGTH))
    source = base.clone()
    source[:, DIFFERS] = torch.randint(config.vocab_size, (PAIRS,))
    return GPT2LMHeadModel(config).eval(), base, source


def loop(model: GPT2LMHeadModel, base: torch.Tensor, source: torch.Tensor, patches: Sequence[tuple]) -> list[float]:
    """One forward pass with one hook for each patch (layer, head, position or a slice)."""
    kept: dict[int, torch.Tensor] = {}
    projections = [block.attn.c_proj for block in model.transformer.h]
    handles = [
        module.register_forward_pre_hook(lambda _, args, i=i: kept.__setitem__(i, args[0].clone()))
        for i, module in enumerate(projections)
    ]
    model(source, use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for layer, head, position in patches:

        def put(_: torch.nn.Module, args: tuple, layer: int = layer, head: int = head, position: object = position):
            z = args[0].clone()
            at = slice(head * WIDTH, (head + 1) * WIDTH)
            z[:, position, at] = kept[layer][:, position, at]
            return (z,)

        handle = projections[layer].register_forward_pre_hook(put)
        logits = model(base, use_cache=False).logits[:, -1]
        found.append(float((logits[:, 1] - logits[:, 2]).mean()))
        handle.remove()
    return found


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds; whoever asks has the same library for products, so that ratios compare what is done with them."""
    start = time.process_time()
    with torch.no_grad(), fast():
        work()
    return time.process_time() - start


def compared(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both, and so their ratio."""
    both = [(seconds(ours), seconds(other)) for _ in range(rounds + 1)][1:]
    return statistics.median(a for a, _ in both), statistics.median(b for _, b in both)


def sweeps(model: GPT2LMHeadModel, base: torch.Tensor, source: torch.Tensor, rounds: int) -> None:
    lm = uw.load(model)
    pairs = uw.pairs(base, source, 1, 2)
    every = [(layer, head, slice(None)) for layer in range(LAYERS) for head in range(HEADS)]
    each = [(layer, head, t) for t in range(LENGTH) for layer in range(LAYERS) for head in range(HEADS)]
    for name, at, patches, limit in (("heads × layers", "all", every, 3), ("heads × positions", "each", each, 5)):
        chosen = patches[:: len(patches) // SAMPLED]
        ours, other = compared(
            lambda at=at: uw.effects(lm, pairs, "heads", at=at),
            lambda chosen=chosen: loop(model, base, source, chosen),
            rounds,
        )
        other *= len(patches) / len(chosen)
        print(f"{name:<18} {len(patches):>5} patches: loop {other:6.1f} s, ours {ours:6.2f} s, {other / ours:5.1f} ×"
              f"  (at least {limit} ×)")  # fmt: skip


def lens(model: GPT2LMHeadModel, base: torch.Tensor, source: torch.Tensor, rounds: int) -> None:
    """TransformerLens's own sweep over heads, on the same weights."""
    try:
        from transformer_lens import patching
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError:
        print("transformer-lens is not installed: its line is left out")
        return
    copied = copy.deepcopy(model)  # the bridge rebuilds the model that it is given
    other = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config)
    _, cache = other.run_with_cache(source)
    lm, pairs = uw.load(model), uw.pairs(base, source, 1, 2)
    metric = lambda logits: (logits[:, -1, 1] - logits[:, -1, 2]).mean()  # noqa: E731
    ours, theirs = compared(
        lambda: uw.effects(lm, pairs, "heads", at="all"),
        lambda: patching.get_act_patch_attn_head_out_all_pos(other, base, cache, metric),
        rounds,
    )
    print(
        f"heads × layers, TransformerLens: {theirs:6.1f} s, ours {ours:6.2f} s, {theirs / ours:5.1f} ×  (at least 4 ×)"
    )


def slopes(model: GPT2LMHeadModel, base: torch.Tensor, source: torch.Tensor, rounds: int) -> None:
    lm, pairs = uw.load(model), uw.pairs(base, source, 1, 2)
    forward = lambda: model(base, use_cache=False).logits  # noqa: E731
    atp, plain = compared(lambda: uw.effects(lm, pairs, "heads", method="atp"), forward, rounds)
    print(f"AtP: {atp / plain:.2f} forward passes  (at most 3)")
    relp, again = compared(
        lambda: uw.effects(lm, pairs, "heads", method="relp"),
        lambda: uw.effects(lm, pairs, "heads", method="atp"),
        rounds,
    )
    print(f"RelP: {relp / again:.2f} × AtP  (at most 1.1)")
    for kind in ("heads", "k"):
        star, plain = compared(lambda kind=kind: uw.effects(lm, pairs, kind, method="atp*"), forward, rounds)
        print(
            f"AtP* of {kind}: {star / plain:.2f} forward passes  (at most {3 + (LAYERS - 1) / 2:.1f} backward passes)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    model, base, source = build()
    slopes(model, base, source, rounds)
    sweeps(model, base, source, rounds)
    lens(model, base, source, max(1, rounds // 3))


if __name__ == "__main__":
    main()
