"""How does the cost of scan, verify, dla and effects grow, and what would a 7B and a 70B model cost?

    python benchmarks/scaling.py                     measure, fit, compare with the modelled cost, predict
    python benchmarks/scaling.py --quick             the same on small models, one round: a smoke test
    python benchmarks/scaling.py --peak 989e12 --bandwidth 3.35e12 --share 0.4       predict for this hardware too
    python benchmarks/scaling.py --device cuda --dtype bfloat16 --peak 989e12 --grow 8   absolute times, share of peak

Random models of Llama's layout; prompts, length, layers, heads and width change one at a time. The modelled cost is
that of `flops.py` beside this file, which torch's own count confirms; at the best rates of this machine it becomes
seconds, beside those that the runs take: CPU time of one thread, or synchronised time on an accelerator, the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from flops import BINS, COSTS, RUNS, VALUE, Cost, Shape, build, counted, ids_of, scan
from scipy import stats

import unwrite as uw
from unwrite.model.capture import run
from unwrite.model.fold import fold
from unwrite.model.onednn import fast
from unwrite.run.tally.gram import ON_DEVICE
from unwrite.stats.mergeable import RATIO, Histogram


@dataclass(frozen=True)
class Hardware(Cost):
    """Rates of each, per second, at best; a call counts as 1 / calls seconds."""

    def seconds(self, cost: Cost) -> float:
        return sum(part / rate for part, rate in zip(astuple(cost), astuple(self), strict=True))

    def limit(self, cost: Cost) -> str:
        """What takes most of that time."""
        parts = {f.name: getattr(cost, f.name) / getattr(self, f.name) for f in fields(cost)}
        return max(parts, key=lambda name: parts[name])


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def rates(device: str, dtype: str) -> dict[str, Hardware]:
    """The best that this machine does, by method: products, a factorisation, sums of 16 MiB, counts, calls.

    What a call costs beside its arithmetic is taken from each method on a model that computes next to nothing.
    """

    def best(amount: float, work: Callable[[], object], on: str = device) -> float:
        return amount / min(seconds(work, on) for _ in range(3))

    def product(kind: torch.dtype, on: str = device, n: int = 1024) -> float:
        a, b = (torch.randn(n, n).to(on, kind) for _ in range(2))
        with fast():
            return best(2 * n**3, lambda: torch.nn.functional.linear(a, b), on)

    x, y = (torch.randn(2**22, device=device) for _ in range(2))
    square, tiny = torch.randn(512, 512, dtype=torch.float64), Shape(layers=8, d=16, inner=16, length=8)
    lm = uw.load(build(tiny, device, dtype))
    folded, ids = fold(lm), ids_of(tiny)
    calls = {name: best(COSTS[name](tiny).calls, partial(RUNS[name], lm, tiny)) for name in RUNS if name != "scan"}
    # Of a short scan most is spent once; what grows with calls is a recorded pass.
    calls["scan"] = best(tiny.layers, lambda: run(lm, ids, folded))
    host = product(torch.float64, "cpu"), best(8 / 3 * 512**3, lambda: torch.linalg.qr(square), "cpu")
    products = (product(kind) for kind in (getattr(torch, dtype), torch.float32, torch.float64))
    histogram, ratios = Histogram(2**14, RATIO, 2**15, device), x.view(256, 2**14)
    values = best(x.numel(), lambda: histogram.add(ratios))
    found = Hardware(*products, *host, moved=best(3 * x.nbytes, lambda: torch.add(x, y, out=y)), values=values)
    return {name: replace(found, calls=calls[name]) for name in RUNS}


BASES = {
    "scan": Shape(heads=8, prompts=16, length=128), "verify": Shape(length=32, prompts=8),
    "dla": Shape(length=32), "effects": Shape(length=32, prompts=8),
}  # fmt: skip
QUICK = dict.fromkeys(BASES, Shape(d=64, inner=176, prompts=8, length=24))
AXES, LADDER = ("prompts", "length", "layers", "heads", "width"), (0.5, 1, 2)


def times(s: Shape, axis: str, factor: float) -> Shape:
    """A shape that is another one's multiple along one axis; more heads share the same width."""
    names = ("d", "inner") if axis == "width" else (axis,)
    return replace(s, **{name: round(factor * getattr(s, name)) for name in names})


@dataclass(frozen=True)
class Point:
    """One run of a method: how far along an axis, the FLOPs that torch counts, and the time that it takes."""

    method: str
    shape: Shape
    at: float
    flops: float
    seconds: float


def measured(method: str, axis: str, base: Shape, rounds: int, on: tuple[str, str]) -> list[Point]:
    found = []
    for factor in LADDER if method != "scan" else (*LADDER, 4):
        s = times(base, axis, factor)
        lm = uw.load(build(s, *on))
        flops = counted(lm, method, s)  # also hashes the weights, which is done once for a model
        taken = statistics.median(seconds(lambda lm=lm, s=s: RUNS[method](lm, s), on[0]) for _ in range(rounds))
        found.append(Point(method, s, getattr(s, "d" if axis == "width" else axis), flops, taken))
    return found


def exponent(at: Iterable[float], cost: Iterable[float]) -> tuple[float, float]:
    """Slope of log cost over log at, and its standard error."""
    fit = stats.linregress(np.log([*at]), np.log([*cost]))
    return float(fit.slope), float(fit.stderr)


def between(top: Iterable[float], bottom: Iterable[float]) -> str:
    ratios = [a / b for a, b in zip(top, bottom, strict=True)]
    return f"{min(ratios):.3f} to {max(ratios):.3f}"


def growth(points: list[Point], axis: str, here: Hardware) -> None:
    """One line for a method and an axis."""
    at, costs = [p.at for p in points], [COSTS[p.method](p.shape) for p in points]
    took, modelled, flops = [p.seconds for p in points], [*map(here.seconds, costs)], [c.counted for c in costs]
    slope, error = exponent(at, took)
    print(
        f"{points[0].method:<8} {axis:<8} {' '.join(f'{value:g}' for value in at):<14} {slope:5.2f} ± {error:4.2f}"
        f" {exponent(at, modelled)[0]:9.2f} {exponent(at, flops)[0]:9.2f}"
        f"   {between(flops, [p.flops for p in points])}   {between(modelled, took)}",
        flush=True,
    )


def shares(points: list[Point], here: dict[str, Hardware], peak: float) -> dict[str, float]:
    """By method, of the run with most FLOPs: its modelled time, at best rates, over the time that it takes."""
    found = {}
    print("\nthe largest run: seconds, GFLOP/s, share of peak, modelled / measured time, what most of it goes to")
    for method in RUNS:
        largest = max((p for p in points if p.method == method), key=lambda p: p.flops)
        cost, rate = COSTS[method](largest.shape), largest.flops / largest.seconds
        found[method] = here[method].seconds(cost) / largest.seconds
        print(
            f"{method:<8}{largest.seconds:9.3f}{rate / 1e9:9.1f}{rate / peak:9.2f}{found[method]:9.2f}   "
            f"{here[method].limit(cost)}"
        )
    return found


MODELS = {
    "7B": Shape(32, 4096, 32, inner=11008, vocabulary=32000),
    "70B": Shape(80, 8192, 64, inner=28672, kv=8, vocabulary=32000),
}
JOBS: dict[str, tuple[str, Callable[[Shape], Cost], int, int]] = {
    "scan, all writers, 10 million tokens": ("scan", scan, 9766, 1024),
    "scan, 16 writers, 10 million tokens": ("scan", partial(scan, writers=16), 9766, 1024),
    "verify, one writer, 300 × 1024 tokens": ("verify", COSTS["verify"], 300, 1024),
    "dla, 20 prompts of 32 tokens": ("dla", COSTS["dla"], 20, 32),
    "effects, all heads, 20 pairs of 32": ("effects", COSTS["effects"], 20, 32),
}
# Data sheets: dense bfloat16, float32 (unwrite asks for no TensorFloat), float64 (tensor cores), bytes/s.
SHEETS = {
    "A100 SXM": (312e12, 19.5e12, 19.5e12, 2.039e12),
    "H100 SXM": (989e12, 67e12, 67e12, 3.35e12),
    "H200 SXM": (989e12, 67e12, 67e12, 4.8e12),
}


def spelled(taken: float) -> str:
    for unit, name in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if taken >= 2 * unit:
            return f"{taken / unit:.1f} {name}"
    return f"{taken:.1f} s"


def predict(here: dict[str, Hardware], share: dict[str, float], sheets: dict[str, tuple], given: float) -> None:
    """What models of public shapes would take. Arithmetic: nothing of that size was run."""
    print("\nPredicted. Here: in float32, at the share of modelled time that the largest run reached. Elsewhere: in")
    print(
        f"bfloat16, at {given:.0%} of the data sheet, as if the model fitted on one device; work on the host, and calls"
    )
    print("of blocks, as fast as here. Beside each time what most of it goes to.")
    print(f"{'':<43}" + "".join(f"{name:<22}" for name in ("here", *sheets)))
    for size, model in MODELS.items():
        for job, (method, cost, prompts, length) in JOBS.items():
            s, own = replace(model, prompts=prompts, length=length), here[method]
            cells = [(own.seconds(cost(s)) / share[method], own.limit(cost(s)))]
            work = cost(replace(s, width=2, room=ON_DEVICE))
            for rates_there in sheets.values():
                model_rate, single, double, moved = (given * rate for rate in rates_there)
                on = replace(own, model=model_rate, single=single, double=double, moved=moved, values=moved / VALUE)
                cells.append((on.seconds(work), on.limit(work)))
            print(f"{size:<4} {job:<38}" + "".join(f"{spelled(t) + ' ' + limit:<22}" for t, limit in cells))


def memory(s: Shape, writers: int) -> dict[str, float]:
    """Bytes that a scan holds whatever it reads, weights in bfloat16; and what verify holds of one prompt."""
    pairs = (s.nodes + s.states + 1) * writers
    # Of every block what it takes in, both its states, its z and both its writes.
    recorded, patterns = (6 * s.layers + 1) * s.length * s.d, s.layers * s.heads * s.length**2
    return {
        "weights": 2 * s.weights,
        "W_O in float32": 4 * s.layers * s.d**2,
        "histograms": pairs * (4 * BINS + 2 * 256),
        "sums": 40 * pairs * (s.batches().bit_length() + 1),
        "verify, two runs of a prompt": 2 * 4 * (recorded + patterns),
    }


def print_memory() -> None:
    print("\nMemory in GB, by its formulas, for prompts of 1024 tokens")
    for name, model in MODELS.items():
        s = replace(model, prompts=9766, length=1024)
        for writers in (s.nodes, 16):
            parts = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in memory(s, writers).items())
            print(f"{name:<4} {writers:>5} writers of {s.nodes}: {parts}")
    print("Histograms grow with nodes × writers, not with tokens: a large model is scanned for chosen writers.")
    print("What verify holds grows with the length of a prompt: shorter ones need less.")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--grow", type=int, default=1, help="width, heads and prompts of all models, times this")
    parser.add_argument("--peak", type=float, help="FLOP/s of products in the model's dtype")
    parser.add_argument("--peak32", type=float, default=67e12, help="in float32, in which writes are computed")
    parser.add_argument("--peak64", type=float, default=67e12, help="in float64")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes/s")
    parser.add_argument("--share", type=float, default=0.4, help="of these rates that is reached")
    return parser.parse_args()


def main() -> None:
    asked = options()
    torch.set_num_threads(1)
    here = rates(asked.device, asked.dtype)
    best = here["scan"]
    print(f"best rates here, {asked.device}, per second: {asked.dtype} {best.model:.3g}, float32 {best.single:.3g},"
          f" float64 {best.double:.3g} FLOP; host float64 {best.host:.3g}, QR {best.factors:.3g} FLOP; {best.moved:.3g}"
          f" bytes, {best.values:.3g} values into histograms")  # fmt: skip
    print(
        "a call of a block beside its arithmetic: " + ", ".join(f"{m} {1e3 / h.calls:.2f} ms" for m, h in here.items())
    )
    print("\nexponents of time, of modelled time and of FLOPs; modelled / counted FLOPs; modelled / measured time")
    points = []
    for method, base in (QUICK if asked.quick else BASES).items():
        grown = replace(base, **{name: asked.grow * getattr(base, name) for name in ("d", "inner", "heads", "prompts")})
        for axis in AXES[::4] if asked.quick else AXES:
            line = measured(method, axis, grown, 1 if asked.quick else asked.rounds, (asked.device, asked.dtype))
            growth(line, axis, here[method])
            points += line
    share = shares(points, here, best.model if asked.device == "cpu" else asked.peak or best.model)
    sheets = SHEETS | ({"as asked": (asked.peak, asked.peak32, asked.peak64, asked.bandwidth)} if asked.peak else {})
    predict(here, share, sheets, asked.share)
    print_memory()


if __name__ == "__main__":
    main()
