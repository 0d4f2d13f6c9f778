"""What does a run of scan, verify, dla or effects consist of? Counted from the sources, beside torch's own count.

    python benchmarks/flops.py       FLOPs of matrix products: modelled, counted by torch, and their ratio

FLOPs (a multiplication and an addition are two) by the dtype that they run in, bytes moved by what is no matrix
product, and calls of a block. Random models of two layouts, Llama's and GPT-2's; torch counts real runs of the methods.
`benchmarks/scaling.py` turns these costs into seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import unwrite as uw
from unwrite.model.onednn import there
from unwrite.run.tally.gram import FEW
from unwrite.run.tally.survives import ALONE
from unwrite.stats.mergeable import RATIO

DRAWN, READ = 20, 5  # rotations that verify executes a run for, and those whose readers it runs
TURNING, SHOWN = 80, 5  # d³ FLOPs of turning 20 rotations into place; prompts that verify shows token by token
VALUE = 90  # bytes moved to put a value into a histogram: its bin, stash and count
BINS = 2 * RATIO.reach + 2
AT_ONCE = 1024  # rows that changed runs bring together on a processor, as unwrite.run.replay.removed has it


@dataclass(frozen=True)
class Shape:
    """A model and what it reads; `width` bytes of a weight; `gpt2` has biases, positions and no gate.

    `room`: how many times larger a scan's chunks are than on a processor.
    """

    layers: int = 4
    d: int = 256
    heads: int = 4
    prompts: int = 4
    length: int = 64
    inner: int = 704
    kv: int = 0
    vocabulary: int = 1024
    gpt2: bool = False
    width: int = 4
    room: int = 1

    @property
    def nodes(self) -> int:
        return self.layers * (self.heads + 1 + self.gpt2) + 1 + self.gpt2

    @property
    def states(self) -> int:
        return 2 * self.layers + 1

    @property
    def tokens(self) -> int:
        return self.prompts * self.length

    @property
    def kv_width(self) -> int:
        return self.d * (self.kv or self.heads) // self.heads

    @property
    def linear(self) -> int:
        """Weights of a block."""
        return 2 * self.d * (self.d + self.kv_width) + self.mlp

    @property
    def mlp(self) -> int:
        return (2 if self.gpt2 else 3) * self.d * self.inner

    @property
    def weights(self) -> int:
        return self.layers * self.linear + 2 * self.vocabulary * self.d

    @property
    def factors(self) -> int:
        """Bytes of all writes' factors at one position."""
        return 4 * (2 * self.layers + 2) * self.d

    def batch(self, held: int = 1) -> int:
        """Prompts at a time, as unwrite.run.loop.stream has it."""
        return max(1, min(self.prompts, min(4096, 2**28 // self.factors) // (held * self.length)))

    def batches(self, held: int = 1) -> int:
        return -(-self.prompts // self.batch(held))


@dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products in the model's dtype, in float32, in float64 and, float64, on the host; of
    factorisations on the host, which no counter sees; bytes moved; calls of a block; values put into histograms."""

    model: float = 0
    single: float = 0
    double: float = 0
    host: float = 0
    factors: float = 0
    moved: float = 0
    calls: float = 0
    values: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: float) -> Cost:
        return Cost(*(times * part for part in astuple(self)))

    @property
    def counted(self) -> float:
        """What torch's counter should find."""
        return self.model + self.single + self.double + self.host


def block(s: Shape, rows: float, keys: float, mlp_rows: float | None = None) -> Cost:
    """One block on some rows, each of which attends to `keys`."""
    through = rows if mlp_rows is None else mlp_rows
    flops = 2 * rows * (s.linear - s.mlp) + 2 * through * s.mlp + 4 * rows * keys * s.d
    return Cost(model=flops, moved=s.width * (s.linear + rows * 30 * s.d + through * 8 * s.inner), calls=1)


def passes(s: Shape, rows: float, batches: float = 1) -> Cost:
    """All blocks on rows of whole prompts, in some batches."""
    one = block(s, rows / batches, s.length)
    return batches * s.layers * one


def backward(s: Shape, rows: float) -> Cost:
    """A backward pass to the stream: none to weights, both factors of attention's two products."""
    return s.layers * (block(s, rows, s.length) + Cost(model=4 * rows * s.length * s.d))


def expand(s: Shape, rows: float) -> Cost:
    """z · W_O of every head, and where the writes go."""
    return Cost(single=2 * rows * s.layers * s.d**2, moved=4 * rows * s.nodes * s.d + 4 * s.layers * s.d**2)


def dots(s: Shape, rows: float, vectors: float) -> Cost:
    """Inner products of many vectors with one write."""
    return Cost(single=2 * rows * vectors * s.d, moved=4 * rows * vectors * s.d)


def carried(s: Shape, rows: float) -> Cost:
    """A vector through the values of one layer's heads, pattern held, each head's part in full."""
    return Cost(single=4 * rows * s.d**2 + 2 * rows * s.length * s.d, moved=4 * rows * s.d * (2 * s.heads + 4))


def summed(s: Shape, rows: float) -> Cost:
    """All factors, summed over prompts."""
    vectors = 2 * s.layers + 1 + s.gpt2
    return Cost(single=2 * rows * vectors * s.d, moved=8 * rows * vectors * s.d)


def chunk(s: Shape, writers: int) -> int:
    """Positions whose Gram matrices are made at once, as unwrite.run.tally.gram has it."""
    floats = s.nodes * (s.d + s.nodes) + 2 * (s.nodes + s.states + 1) * writers
    return max(8, min(512, 2**23 * s.room // floats))


def buckets(s: Shape) -> int:
    """Groups of positions whose sums over prompts are kept, as unwrite.run.tally.position_part has it."""
    return max(1, min(s.length, 2**30 // (s.factors * (s.batches().bit_length() + 2))))


def scan(s: Shape, writers: int | None = None) -> Cost:
    """One pass; at every position the Gram matrix of all nodes; ratios of each (node or state, writer) counted."""
    n, n_writers, at_once = s.nodes, writers or s.nodes, chunk(s, writers or s.nodes)
    pairs, half = (n + s.states + 1) * n_writers, n // 2
    rows, counted = s.batches() * s.batch() * s.length, s.tokens - s.prompts
    spans = 1 + min(s.prompts, 1 + (at_once - 1) / max(s.length - 1, 1))
    gram = Cost(single=2 * s.d * ((n - half) * n + half**2) + 2 * s.states * n**2, moved=8 * n * (s.d + 2 * n))
    if FEW * n_writers <= n:
        few = 2 * n * n_writers * (s.d + s.states) + 2 * s.states * n * s.d
        gram = Cost(single=few, moved=8 * n * (s.d + n_writers) + 8 * s.states * s.d)
    chunks = Cost(single=2 * spans * n * n_writers, moved=40 * pairs + 4 * s.layers * s.d**2 / at_once, values=pairs)
    sums = expand(s, buckets(s)) + Cost(single=2 * n**2 * s.d * buckets(s), moved=8 * n**2)
    ends = Cost(double=2 * s.states * n * n_writers, moved=500 * pairs)
    quantiles = Cost(moved=30 * BINS * pairs, calls=s.tokens / at_once)
    constants = Cost(single=4 * s.layers * s.d**2 * s.gpt2)
    own, put = 1, Cost()
    if buckets(s) < s.length:  # sums over buckets: in all, and what each prompt has of it
        own += s.prompts
        put = (s.batches() + s.prompts) * Cost(single=2 * s.length * buckets(s) * (2 * s.layers + 2) * s.d)
    streamed = passes(s, rows, s.batches()) + summed(s, rows) + expand(s, s.tokens) + s.tokens * gram + counted * chunks
    return streamed + own * sums + put + (s.prompts + 1) * ends + quantiles + constants


def verify(s: Shape, erasers: int = 1) -> Cost:
    """Of a head of the first layer: two clean runs, one without its write, 20 without a turned one, readers of six."""
    rows, n_batches, later = s.batches(2) * s.batch(2) * s.length, s.batches(2), s.layers - 1
    head, kept = s.d // s.heads, s.tokens - s.prompts
    runs = passes(s, (2 + 1 + DRAWN + 1 + READ) * rows, (2 + 1 + DRAWN + 1 + READ) * n_batches)
    shown = 2 * passes(s, SHOWN * s.length, SHOWN) + Cost(single=2 * SHOWN * s.length * s.d * head)
    # Recorded runs copy what they record; nodes and states are compared with the write again and again.
    recorded = Cost(moved=80 * rows * s.d * s.layers * (2 + 1 + DRAWN + 1 + READ))
    hidden = n_batches * erasers * block(s, rows / n_batches, s.length) + 2 * erasers * carried(s, rows)
    turned = Cost(single=2 * (DRAWN + READ) * rows * s.d**2)
    read = (3 + READ) * later * carried(s, rows) + Cost(moved=20 * (1 + READ) * rows * s.nodes * s.d)
    written = Cost(single=2 * rows * s.d * head * (2 + erasers))  # the writer's in both runs, and the erasers'
    onto_nodes = 3 * s.nodes + later * s.heads + 2 * erasers + 1
    along = dots(s, rows, onto_nodes + (DRAWN + 5) * s.states + (1 + READ) * s.layers)
    space = Cost(single=2 * rows * s.d * head * (s.nodes + s.states), moved=60 * rows * s.nodes * s.d)
    ends = Cost(host=TURNING * s.d**3, factors=8 / 3 * (DRAWN + 1) * s.d**3, moved=8 * (DRAWN + 1) * 10 * s.d**2)
    constants = Cost(single=4 * s.layers * s.d**2 * s.gpt2)
    algebra = 3 * expand(s, rows) + written + turned + read + along + space + decoded(s, kept, head) + constants
    return runs + shown + recorded + hidden + algebra + ends + beside(s)


def beside(s: Shape) -> Cost:
    """What `uw.survival` would do for that head: of each prompt two runs, one without the write, and without others;
    before that one look at all that is written."""
    runs, square = 1 + sum(ALONE.values()), Cost(single=2 * s.tokens * s.d**2)
    # The write; what heads of two layers write in another prompt; what decoys are mixed of.
    made = (1 / s.heads + 2 + 2 * ALONE["typical"]) * square
    seen = Cost(single=4 * s.tokens * s.d * runs, double=2 * s.d * s.prompts * runs * (s.states + 1))
    looked = passes(s, s.tokens, s.batches()) + expand(s, s.tokens - s.prompts)
    return (2 + runs) * passes(s, s.tokens, s.prompts) + made + s.layers * square + seen + looked


def decoded(s: Shape, rows: float, rank: int) -> Cost:
    """Ridge regression in float64 at as many states as 1 GiB holds the matrices of."""
    fit = min(s.states, 2**30 // (32 * s.d * (s.d + rank + s.length)))
    products = 2 * rows * s.d * (s.d + rank) + 4 * s.length * s.d * (s.d + rank) + 4 * s.d**2 * rank
    moved = 8 * s.batches(2) * 6 * s.d * (s.d + s.length) + 40 * rows * s.d
    return Cost(single=2 * rows * s.d * rank) + fit * Cost(double=products, factors=4 / 3 * s.d**3, moved=moved)


def executed(s: Shape) -> Cost:
    """What dla's totals cannot do without: of each prompt and replacement every node's run, from where it begins."""
    heads, mlps = s.heads * s.layers * (s.layers + 1) / 2, s.layers * (s.layers - 1) / 2
    # Biases and positions are their own mean.
    constant = s.gpt2 * (s.layers + s.layers * (s.layers + 1) / 2)
    return (2 * (s.layers + heads + mlps) + constant) * block(s, s.tokens, s.length)


def dla(s: Shape) -> Cost:
    """Four readings, every node replaced by nothing and by its mean, and every prompt read with the others' inputs."""
    rows, n_batches, pool = s.tokens, s.batches(4), s.batches() * s.batch() * s.length
    chunks = 2 * s.nodes * s.prompts / max(1, AT_ONCE // s.length)
    runs = executed(s)
    run_rows = runs.calls * s.prompts  # of every run at the read row, block by block
    replaced = replace(runs, calls=chunks * (s.layers + 1) / 2)
    # Only values are differentiated in `net`; where q, k and v are one matrix, all of it and the pattern are.
    fused = s.gpt2
    values = s.d**2 + (s.d + 2 * s.kv_width if fused else s.kv_width) * s.d
    net = s.layers * Cost(model=2 * rows * values + (8 if fused else 2) * rows * s.length * s.d, calls=1)
    slopes = 4 * passes(s, rows, n_batches) + 2 * backward(s, rows) + net
    split = (
        3 * s.tokens / n_batches * s.d**2 / s.heads
    )  # a node's change is made anew where a chunk ends among its runs
    changes = Cost(
        single=12 * rows * s.layers * s.d**2 + max(0.0, chunks - 1) * split, moved=2 * 4 * 25 * rows * s.nodes * s.d
    )
    recorded = Cost(moved=80 * rows * s.d * runs.calls)
    sums = expand(s, s.prompts) + dots(s, s.prompts, s.nodes)
    through = Cost(
        single=2 * 2 * s.prompts * s.layers * s.d**2
    )  # what a head's values do, for totals and for invariance
    others = s.prompts**2
    directs = Cost(single=2 * s.d * (run_rows + s.layers * (s.prompts + 2 * others)))
    queried = s.layers * s.prompts * block(s, s.prompts, s.length)
    invariance = passes(s, n_batches * rows, n_batches) + queried
    called = n_batches * (passes(s, s.length) + s.layers * block(s, 1, s.length))
    clean = 2 * passes(s, rows, n_batches) + called + passes(s, pool, s.batches()) + summed(s, pool)
    constants = Cost(single=4 * s.layers * s.d**2 * s.gpt2)
    algebra = changes + recorded + sums + through + directs + constants
    return clean + slopes + replaced + invariance + algebra


def effects(s: Shape) -> Cost:
    """Every head at every position from the middle on, where pairs begin to differ, is set to its other value."""
    total = 2 * passes(s, s.tokens, s.batches(4))
    each = s.prompts / s.batches(4)
    for start in range(s.length // 2, s.length):
        rows = s.length - start
        waves = max(1.0, each * s.heads * s.layers / (4096 // rows))
        asked = s.layers * (block(s, 1, start + 1) + block(s, rows, s.length))
        for layer in range(s.layers):
            here, joined = each * s.heads, each * s.heads * layer
            last = layer + 1 == s.layers
            asked += block(s, here, start + 1)
            if joined:
                asked += block(s, joined * rows, s.length, joined if last else None)
            past = 6 * s.width * (here + joined) * start * 2 * s.kv_width
            asked += Cost(moved=past, calls=max(0.0, waves - 1))
        total += s.batches(4) * asked
    return total


def build(s: Shape, device: str = "cpu", dtype: str = "float32") -> Any:
    """A random model of this shape."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": s.vocabulary}
    if s.gpt2:
        shape = {"n_embd": s.d, "n_layer": s.layers, "n_head": s.heads, "n_inner": s.inner, "n_positions": 4096}
        hf = GPT2LMHeadModel(GPT2Config(**shape, **ends))
        for name, parameter in hf.named_parameters():
            if name.endswith("bias"):  # 0 at first, and dla runs nothing without a write of 0
                torch.nn.init.normal_(parameter, std=0.02)
    else:
        shape = {"hidden_size": s.d, "num_hidden_layers": s.layers, "num_attention_heads": s.heads}
        shape |= {"num_key_value_heads": s.kv or s.heads, "intermediate_size": s.inner, "max_position_embeddings": 4096}
        hf = LlamaForCausalLM(LlamaConfig(**shape, **ends))
    return hf.to(device, getattr(torch, dtype)).eval()


def ids_of(s: Shape) -> torch.Tensor:
    return torch.randint(2, s.vocabulary, (s.prompts, s.length), generator=torch.Generator().manual_seed(0))


def run_effects(lm: Any, s: Shape) -> object:
    base = ids_of(s)
    source = base.clone()
    source[:, s.length // 2 :] = source[:, s.length // 2 :].roll(1, 0)
    return uw.effects(lm, uw.pairs(base, source, 0, 1), "heads")


COSTS: dict[str, Callable[[Shape], Cost]] = {"scan": scan, "verify": verify, "dla": dla, "effects": effects}
RUNS: dict[str, Callable[[Any, Shape], object]] = {
    "scan": lambda lm, s: uw.scan(lm, ids_of(s)),
    "verify": lambda lm, s: uw.verify(lm, ids_of(s), "L0H0", [f"L{s.layers - 1}H0"]),
    "dla": lambda lm, s: uw.dla(lm, ids_of(s), 0, 1),
    "effects": run_effects,
}


def _linear(input: torch.Tensor, weight: torch.Tensor, *rest: Any, out_val: torch.Tensor, **named: Any) -> int:
    return 2 * out_val.numel() * weight.shape[1]


# Torch's own, and of what it has none: the product that oneDNN makes.
FORMULAS = {**flop_registry, **({torch.ops.mkldnn._linear_pointwise: _linear} if there() else {})}


class Counter(TorchDispatchMode):
    """What FlopCounterMode adds up, by torch's formulas; its tracker of modules does not stand `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def counted(lm: Any, method: str, s: Shape) -> float:
    """Matrix-product FLOPs of a run. On a CPU torch has no formula for fused attention, so it is computed openly."""
    before = lm.config._attn_implementation
    lm.hf.set_attn_implementation("eager")
    with Counter() as counter:
        RUNS[method](lm, s)
    lm.hf.set_attn_implementation(before)
    return counter.total


SMALL = Shape(layers=3, d=128, inner=352, prompts=6, length=32)
SHAPES = {
    "Llama": SMALL,
    "Llama, 2 key/value heads": replace(SMALL, kv=2),
    "Llama, 8 layers": replace(SMALL, layers=8),
    "Llama, 16 heads, length 72": replace(SMALL, heads=16, length=72),
    "Llama, 40 prompts": replace(SMALL, layers=2, prompts=40),
    "GPT-2": replace(SMALL, gpt2=True),
    "GPT-2, width 320, 5 heads": replace(SMALL, gpt2=True, d=320, heads=5, inner=1280),
}


def main() -> None:
    torch.set_num_threads(1)
    print("FLOPs of matrix products: modelled, counted by torch, modelled / counted")
    print(f"{'':<28}" + "".join(f"{method:>30}" for method in RUNS))
    for name, s in SHAPES.items():
        lm = uw.load(build(s))
        print(f"{name:<28}", end="")
        for method, cost in COSTS.items():
            modelled, found = cost(s).counted, counted(lm, method, s)
            print(f"{modelled:12.4g}{found:10.4g}{modelled / found:8.4f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
