"""What is a node that writes to answers for: for whichever is right, for one alone, or always for the same?

Of direct effects on centred logits (the answer's less the mean of all choices), as means by which answer is right. A
node that always raises one label is worth nothing over prompts in which each label is right as often. (Lieberum et al.
2023, arXiv 2307.09458; the words are theirs, the rules ours)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from unwrite.stats.jackknife import ratio

# An answer needs so many prompts, else there is no interval.
FEWEST = 3
CORRECT, SOME, CONSTANT, AGAINST, AMPLIFIES, THROUGH = (
    "correct answer", "some answers", "constant", "against", "amplifies", "through others",
)  # fmt: skip
RULES = {
    CORRECT: "the 95 % interval of direct (jackknife over prompts) lies above 0 whichever answer is right",
    AMPLIFIES: "the same, of a head that attends most to the row that it writes at",
    SOME: "above 0 over all prompts, and for these answers alone",
    CONSTANT: "not told apart from 0 over all prompts, but above 0 for one answer and below 0 for another, both by at "
    "least {writes:g} of the logit difference",
    AGAINST: "below 0 over all prompts",
    THROUGH: "direct is less than a tenth of what is executed, and that is above 0, at least {writes:g} of the logit "
    "difference",
}


def by_answer(
    direct: Float[np.ndarray, "prompt node"], answer: Int[np.ndarray, " prompt"]
) -> dict[int, Float[np.ndarray, "end node"]] | None:
    """Mean of direct with the ends of its interval, by the answer; None where some answer has too few prompts."""
    counts = dict(zip(*(part.tolist() for part in np.unique(answer, return_counts=True)), strict=True))
    if len(counts) < 2 or min(counts.values()) < FEWEST:
        return None
    return {one: interval(direct[answer == one]) for one in counts}


def interval(direct: Float[np.ndarray, "prompt node"]) -> Float[np.ndarray, "end node"]:
    """Mean, and its 95 % interval."""
    return np.stack(ratio(direct, np.ones(len(direct)), np.arange(len(direct))))


def category(
    whole: Float[np.ndarray, " end"], each: dict[str, Float[np.ndarray, " end"]], executed: Float[np.ndarray, " end"],
    size: float, attends_to_itself: bool,
) -> str:  # fmt: skip
    """One word for a node, of `RULES`; "" where nothing of them holds.

    `whole` and `executed` (NaN where nobody asked) are a mean and the ends of its interval, `each` the same of direct
    by the answer; `size` is what counts as something, in logits.
    """
    (mean, low, high), above = whole, [name for name, (_, least, _) in each.items() if least > 0]
    if low > 0 and len(above) == len(each):
        return AMPLIFIES if attends_to_itself else CORRECT
    if executed[1] > 0 and executed[0] >= size and abs(mean) < executed[0] / 10:
        return THROUGH
    if high < 0:
        return AGAINST
    if low > 0:
        return f"{SOME} ({', '.join(above)})" if above else ""
    raised, lowered = (
        any(sign * end[0] >= size and sign * end[at] > 0 for end in each.values()) for sign, at in ((1, 1), (-1, 2))
    )
    return CONSTANT if raised and lowered else ""
