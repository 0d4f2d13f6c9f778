"""How sure is a rate of hits, and does it say that a task is solved? Wilson's interval, and a verdict with its rule."""

from __future__ import annotations

from scipy.stats import binomtest

SOLVED, ABOVE, NOT, UNDECIDED = "solved", "above chance", "not solved", "undecided"
# The rule of each verdict: `lower` and `upper` are Wilson's 95 % interval of the rate.
RULES = {
    SOLVED: "lower > (1 + chance) / 2",
    ABOVE: "lower > chance",
    NOT: "upper < (1 + chance) / 2",
    UNDECIDED: "anything else: too few pairs",
}


def wilson(hits: int, n: int, looks: int = 1) -> tuple[float, float]:
    """Wilson's 95 % interval of hits / n (Wilson 1927); of several `looks` so wide that all hold together."""
    found = binomtest(hits, n).proportion_ci(1 - 0.05 / looks, method="wilson")
    return float(found.low), float(found.high)


def verdict(hits: int, n: int, chance: float) -> str:
    """What a rate says of a task, by `RULES` in their order."""
    lower, upper = wilson(hits, n)
    half = (1 + chance) / 2
    if lower > half:
        return SOLVED
    if lower > chance:
        return ABOVE
    return NOT if upper < half else UNDECIDED


def said(hits: int, n: int, chance: float) -> str:
    """The verdict as a sentence that stands below effects."""
    lower, upper = wilson(hits, n)
    numbers = f"{hits} of {n} pairs ({hits / n:.2f}, 95 % {lower:.2f} to {upper:.2f}, chance {chance:.2f})"
    return {
        SOLVED: f"The model solves {numbers}.",
        ABOVE: f"The model solves {numbers}: above chance, but effects are also of pairs that it does not solve.",
        NOT: f"The model does not solve this: effects mean little. It is right on {numbers}.",
        UNDECIDED: f"Whether the model solves this cannot be said of so few pairs: it is right on {numbers}.",
    }[verdict(hits, n, chance)]
