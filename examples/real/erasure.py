"""Who survives, and who erases whom, in a real language model? One text, and every finding again on two others.

    python examples/real/erasure.py MODEL TEXT TEXT TEXT --out FOLDER

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M, google/gemma-3-270m), each TEXT a folder of books. What is
printed is in docs/real.md; the results lie in FOLDER, one for every text, and a map of all writers as a picture. A run
that was stopped goes on from FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd

import unwrite as uw

SPECIAL = ("erased", "reduced", "filled in", "kept", "amplified")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("text", nargs=3, type=Path)
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("-n", type=int, default=8)
    asked.add_argument("--length", type=int, default=64)
    given = asked.parse_args()
    lm = uw.load(given.model, dtype="float32")
    found = []
    for i, text in enumerate(given.text):
        tokens = uw.text(text, lm.tokenizer, n=given.n, length=given.length)
        # Turned writes only to show on one text what they would have said.
        controls = ("typical", "signs", "rotated") if i == 0 else ("typical", "signs")
        folder = given.out / f"text{i}"
        one = uw.survival(lm, tokens, controls=controls, checkpoint=folder)
        one.save(folder)
        found.append(one)
        print(f"text {i}: {text.name}, sha256 {digest(one)}", flush=True)
    print(table(found).to_string(index=False))
    print(compared(found))
    picture(found[0]).save(given.out / "map.png", ppi=200)


def digest(result: uw.Result) -> str:
    """Of all survivals, to three digits: what another machine should find, too."""
    return hashlib.sha256(np.round(result["end"].values, 3).tobytes()).hexdigest()[:16]


def table(found: list[uw.Result]) -> pd.DataFrame:
    """Writers that are out of the ordinary on some text, with what survives of them on each."""
    frames = [one.table().set_index("writer") for one in found]
    names = [name for name in frames[0].index if any(name in f.index and f["verdict"][name] in SPECIAL for f in frames)]
    lines = []
    for name in names:
        line = {"writer": name}
        for i, frame in enumerate(frames):
            one = frame.loc[name] if name in frame.index else None
            line[f"survives {i}"] = (
                "–" if one is None else f"{one['end']:.2f} [{one['end_low']:.2f}, {one['end_high']:.2f}]"
            )
            line[f"gap {i}"] = "–" if one is None else f"{one['gap']:+.2f}"
            line[f"q {i}"] = "–" if one is None else f"{min(one['q'], one['q_above']):.2f}"
            line[f"verdict {i}"] = "–" if one is None else one["verdict"]
        lines.append(line)
    return pd.DataFrame(lines)


def compared(found: list[uw.Result]) -> str:
    """How texts agree, and what other weights and controls would have said."""
    first = found[0]
    said = []
    for i, one in enumerate(found[1:], 1):
        both = [name for name in first["writer"].values if name in one["writer"].values]
        a, b = (part.data.sel(writer=both) for part in (first, one))
        decided = (a["verdict"].values != "undecided") & (b["verdict"].values != "undecided")
        same = (a["verdict"].values == b["verdict"].values)[decided]
        r = np.corrcoef(np.clip(a["end"], -3, 3), np.clip(b["end"], -3, 3))[0, 1]
        said.append(
            f"text 0 and {i}: survival r {r:.2f} (clipped at ±3), {same.sum()} of {len(same)} decided verdicts agree"
        )
    end = first["survival"].isel(location=-1)
    r = np.corrcoef(np.clip(end.sel(weigh="readers"), -3, 3), np.clip(end.sel(weigh="raw"), -3, 3))[0, 1]
    said.append(f"survival as readers weigh it and raw: r {r:.2f} (clipped at ±3)")
    own = first["end"].values
    for control in first["control"].values:
        low = first["ordinary"].sel(control=control, bound="low").values
        said.append(f"below the 5 % of {control} stand-ins: {int((own < low).sum())} of {len(own)}")
    return "\n".join(said)


def picture(result: uw.Result) -> alt.LayerChart:
    """Every writer's place, coloured by what survives of it at the end."""
    data = result.table()
    data["layer"] = data["writer"].str.extract(r"(\d+)")[0].fillna(-1).astype(int)
    data["head"] = data["writer"].str.extract(r"H(\d+)")[0].fillna(data["writer"].str.extract("([a-zA-Z]+)")[0])
    order = [*sorted({h for h in data["head"] if h.isdigit()}, key=int), "MLP", "embed", "pos"]
    base = alt.Chart(data).encode(
        x=alt.X("head:N", sort=order, title="head, MLP, embedding"), y=alt.Y("layer:O", sort="descending")
    )
    cells = base.mark_rect().encode(
        color=alt.Color(
            "end:Q", title="survives", scale=alt.Scale(scheme="redblue", domain=[-1, 1], domainMid=0, clamp=True)
        )
    )
    special = base.transform_filter(alt.FieldOneOfPredicate("verdict", [*SPECIAL])).mark_text(fontSize=7)
    return cells + special.encode(text="verdict:N")


if __name__ == "__main__":
    main()
