"""Which channel of a head turns the heads away that it inhibits, and do weights say whom it speaks to?

    python examples/channels/inhibition.py MODEL --name NAME

MODEL is a folder or a hub name (HuggingFaceTB/SmolLM2-135M-Instruct), or a run of names.py. What was found is kept as
`results/NAME-inhibition.json` beside this file, from which docs/channels.md is made. Movers are the heads that look
at the name to be said and say it by their direct edges, the inhibitor is the head whose executed edges into their
queries help most: both are chosen on other pairs than those on which channels are removed. *Turned* is what a mover
looks at that name more than at the other one's first mention, from the last token (Merullo, Eickhoff and Pavlick 2024,
arXiv 2406.09519).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import names
import numpy as np
import pandas as pd
import torch
from kept import alike, keep, model_of

import unwrite as uw

MOVERS, LOOKS, PAIRS, FEW = 4, 0.2, 32, 8
CHOSEN_ON, EDGES_ON, CARRIED_ON, SHOWN_ON = 2, 3, 4, (0, 1)
# What the last token could know of S, and the source prompts that differ in that alone.
CARRIED = {"order": "where S1 is", "both": "who S is", "S2": "both"}
# A head turns movers if they look so much more at the name to be said because of it.
TURNS = 0.05
# About so far lies the name to be said behind the last token.
OFFSET = 10
# So many of the largest edges are looked at by themselves; of so many readers drawn by chance, all are executed.
TOP, DRAWN, FEWER = 100, 8, 4


def measured(model: str) -> dict[str, Any]:
    """Movers, edges into them by runs and by weights, and the channels of the head that inhibits them."""
    run = (place := Path(model)) / "run.json"
    lm = uw.load(place / "model" if run.exists() else model, dtype="float32")
    movers = looking(lm, pairs(lm, CHOSEN_ON, PAIRS))
    readers = [*movers, opponent(lm, pairs(lm, CHOSEN_ON, PAIRS), movers[0])]
    edges = uw.paths(lm, pairs(lm, EDGES_ON, FEW), "heads", [f"{head}.q" for head in readers], "frozen")
    made = uw.channels(lm, readers=readers, sides="q", offset=OFFSET, executed=edges)
    effects = edges["mean"].sel(receiver=[f"{head}.q" for head in movers]).sum("receiver", skipna=True).to_series()
    inhibitor, second = (str(node) for node in effects.sort_values().index[:2])
    found = {
        **model_of(made), "movers": movers, "inhibitor": inhibitor, "edges": beside(made, readers),
        "agreement": {name: made.data.attrs[name] for name in ("agreement", "agreement_whole", "edges")},
        "all edges": everywhere(lm), "drawn": drawn(lm),
        "channels": [channels_of(lm, made, inhibitor, movers, seed) for seed in SHOWN_ON],
        "second": [channels_of(lm, made, second, movers, seed, whole=False) for seed in SHOWN_ON],
    }  # fmt: skip
    training = json.loads(run.read_text("utf-8")) if run.exists() else None
    return {**found, "as weights": as_weights(lm, made, inhibitor), "carried": carried(lm), "run": training}


def pairs(lm: Any, seed: int, n: int, change: str = "S2") -> uw.Pairs:
    """Pairs of indirect object identification; each seed has its own."""
    words = names.ASKED if len(lm.tokenizer) == len(names.WORDS) else None
    return uw.tasks.ioi(n, lm.tokenizer, seed, change, words=words, bos=False)


def looking(lm: Any, on: uw.Pairs) -> list[str]:
    """Of heads that look, from the last token, at the name to be said and not at the other, those that say it most."""
    heads = [node for node in lm.nodes if "H" in node]
    looks = pd.Series(turned(lm, on, heads, [()])[0].mean(0), heads)
    says = -uw.paths(lm, on, "heads", "logits", "frozen")["mean"].isel(receiver=0).to_series()
    return [str(node) for node in says[looks >= LOOKS].nlargest(MOVERS).index]


def carried(lm: Any) -> dict[str, Any]:
    """What the last token's state has from source prompts in which S1 stands elsewhere, S is another name, or both."""
    layers, found = [f"resid_post{layer}" for layer in range(len(lm.layers))], {}
    for change, what in CARRIED.items():
        on = pairs(lm, CARRIED_ON, PAIRS, change)
        effect = uw.effects(lm, on, layers, at="end")
        clean = float(uw.solves(lm, on)["margin"].mean())
        named = {"effect": "mean", "low": "mean_low", "high": "mean_high"}
        found[what] = {"clean": clean, **{name: effect[of].values.tolist() for name, of in named.items()}}
    return found


def opponent(lm: Any, on: uw.Pairs, mover: str) -> str:
    """The head of a mover's layer that looks most at the name that is not to be said: it writes against it."""
    heads = [node for node in lm.nodes if node.startswith(mover[: mover.index("H") + 1])]
    looks = uw.attention(lm, on.base, heads=heads)["weight"].values
    pair = np.arange(len(on))
    return heads[int(np.argmax([looks[pair, i, on.row, on.roles["S2"]].mean() for i in range(len(heads))]))]


def beside(made: uw.Result, readers: list[str]) -> list[dict[str, Any]]:
    """Of each reader: how weights and runs agree over all writers, and the ranks by weights of the largest edges."""
    lines = []
    for reader in readers:
        one = made.data.sel(reader=reader, side="q")
        rank_whole = one["whole"].to_series().rank(ascending=False)
        largest = one["effect"].to_series().abs().nlargest(3).index
        lines.append({
            "reader": reader, "writers": int(one["effect"].notnull().sum()),
            "agreement": [float(one[name]) for name in ("agreement", "agreement_whole")],
            "random": float(one["generic_best"].sel(quantile=0.95)),
            "largest": [
                {"writer": str(writer), "rank_whole": int(rank_whole[writer]), **{
                    name: float(one[name].sel(writer=writer))
                    for name in ("effect", "best", "best_channel", "rank", "whole")
                }} for writer in largest
            ],
        })  # fmt: skip
    return lines


def everywhere(lm: Any) -> list[dict[str, Any]]:
    """Every edge between two heads, by queries, keys and values: of weights against slopes (EAP-IG), side by side."""
    guessed = uw.paths(lm, pairs(lm, EDGES_ON, FEW), "heads", [*"qkv"], method="eap-ig")
    return against(uw.channels(lm, offset=OFFSET, executed=guessed))


def drawn(lm: Any) -> dict[str, Any]:
    """The same of readers drawn by chance, where every edge is executed."""
    every = [node for node in lm.nodes if "H" in node and not node.startswith("L0")]
    readers = sorted(np.random.default_rng(0).choice(every, min(DRAWN, len(every)), replace=False).tolist())
    sides = [f"{reader}.{side}" for reader in readers for side in "qkv"]
    edges = uw.paths(lm, pairs(lm, EDGES_ON, FEWER), "heads", sides, "frozen")
    made = uw.channels(lm, readers=readers, offset=OFFSET, executed=edges)
    return {"readers": readers, "pairs": FEWER, "lines": against(made)}


def against(made: uw.Result) -> list[dict[str, Any]]:
    """By side: how scores by weights agree with the sizes of edges, and how high the largest edges stand."""
    lines = []
    for side in made.data["side"].values:
        part = made.data.sel(side=side)
        effect, best, whole = (part[name].values for name in ("effect", "best", "whole"))
        there = np.isfinite(effect) & np.isfinite(best)
        frame = pd.DataFrame({"size": np.abs(effect[there]), "best": best[there], "whole": whole[there]})
        rho, top = frame.corr("spearman")["size"], frame.nlargest(TOP, "size").index
        lines.append({
            "side": str(side), "edges": len(frame), "best": float(rho["best"]), "whole": float(rho["whole"]),
            "top percentile": float(frame.rank(pct=True)["best"][top].median()),
        })  # fmt: skip
    return lines


def channels_of(
    lm: Any, made: uw.Result, head: str, movers: list[str], seed: int, whole: bool = True
) -> dict[str, Any]:
    """What each channel of a head does to the movers, alone removed; of the first also reversed, and kept alone."""
    on, every = pairs(lm, seed, PAIRS), range(int(made["singular"].sel(writer=head).notnull().sum()))
    one = [(uw.Edit.channel(made, head, [*block(made, head, i)], at=-1),) for i in every]
    rest = [i for i in every if i]
    more = {
        "clean": (), "head removed": (uw.Edit.channel(made, head, every, at=-1),),
        "0 removed": one[0], "0 reversed": (uw.Edit.channel(made, head, 0, -1.0, at=-1),),
        "0 alone": (uw.Edit.channel(made, head, rest, at=-1),),
    } if whole else {"clean": (), "head removed": (uw.Edit.channel(made, head, every, at=-1),)}  # fmt: skip
    found = turned(lm, on, movers, [*more.values(), *one])
    clean, gone = found[0].mean(1), found[1].mean(1)
    parts = np.array([(clean - each.mean(1)).mean() for each in found[len(more) :]])
    per_pair = clean - found[len(more)].mean(1)
    return {
        "head": head, "seed": seed, "pairs": len(on), "conditions": {
            name: each.mean(0).tolist() for name, each in zip(more, found, strict=False)
        },
        "whole": float((clean - gone).mean()), "parts": parts.tolist(),
        "share": float(parts[0] / (clean - gone).mean()), "share_interval": interval(per_pair, clean - gone),
        "logits": {name: solved(lm, on, edits) for name, edits in more.items()},
    }  # fmt: skip


def block(made: uw.Result, head: str, channel: int) -> range:
    """The channels that go together with one."""
    blocks = made["block"].sel(writer=head).values
    own = np.flatnonzero(blocks == blocks[channel])
    return range(int(own[0]), int(own[-1]) + 1)


def interval(above: np.ndarray, below: np.ndarray) -> list[float]:
    """A ratio of means over pairs: its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(above), size=(2000, len(above)))
    return np.percentile(above[drawn].mean(1) / below[drawn].mean(1), [2.5, 97.5]).tolist()


@torch.no_grad()
def turned(lm: Any, on: uw.Pairs, heads: list[str], every: list[tuple[uw.Edit, ...]]) -> list[np.ndarray]:
    """Under each of several edits at the last token: how much each head looks from there at IO more than at S1."""
    found = [np.zeros((len(on), len(heads))) for _ in every]
    for rows, ids, before in alike(lm, on):
        places = [
            torch.from_numpy(on.roles[role][rows])[:, None, None].expand(-1, len(heads), 1) for role in ("IO", "S1")
        ]
        for one, edits in zip(found, every, strict=True):
            with uw.trace(lm, *(f"{head}.pattern" for head in heads), edits=edits) as run:
                lm.decoder(input_ids=ids[:, -1:], past_key_values=copy.deepcopy(before), use_cache=True)
            looks = torch.stack([run[f"{head}.pattern"][:, 0] for head in heads], 1)
            wanted, other = (looks.gather(2, place)[..., 0] for place in places)
            one[rows] = (wanted - other).numpy()
    return found


@torch.no_grad()
def solved(lm: Any, on: uw.Pairs, edits: tuple[uw.Edit, ...]) -> dict[str, float]:
    """The logit of the answer over that of the other name, and how often it is the first of all tokens."""
    difference, first = [], []
    for rows, ids, before in alike(lm, on):
        with uw.trace(lm, edits=edits):
            logits = lm.hf(ids[:, -1:], past_key_values=copy.deepcopy(before), use_cache=True).logits[:, -1].numpy()
        pair, against = np.arange(len(rows)), np.asarray(on.against)[rows]
        difference += (logits[pair, on.answer[rows]] - logits[pair, against]).tolist()
        first += (logits.argmax(1) == on.answer[rows]).tolist()
    return {"difference": float(np.mean(difference)), "first": float(np.mean(first))}


@torch.no_grad()
def as_weights(lm: Any, made: uw.Result, head: str) -> dict[str, float]:
    """The channel removed at all positions, at run time and in the weights."""
    ids, edit = torch.from_numpy(pairs(lm, SHOWN_ON[0], FEW).base.ids), uw.Edit.channel(made, head, 0)
    clean = lm.hf(ids).logits
    with uw.trace(lm, edits=edit):
        run = lm.hf(ids).logits
    with uw.rewritten(lm, edit):
        changed = lm.hf(ids).logits
    again = lm.hf(ids).logits
    return {
        "apart": float((run - changed).abs().max()), "effect": float((run - clean).abs().max()),
        "back": float((again - clean).abs().max()),
    }  # fmt: skip


def kept_conditions(found: dict[str, Any]) -> pd.DataFrame:
    """How far each mover is turned, the logit difference and the rate of first choices, with channels changed."""
    lines = []
    for one in found["channels"]:
        for name, looks in one["conditions"].items():
            movers = {head: f"{value:+.2f}" for head, value in zip(found["movers"], looks, strict=True)}
            logits = one["logits"][name]
            lines.append({
                "pairs": f"{one['pairs']} (seed {one['seed']})", f"{one['head']}, channel": name, **movers,
                "logits": f"{logits['difference']:+.2f}", "first": f"{logits['first']:.2f}",
            })  # fmt: skip
    return pd.DataFrame(lines)


def kept_carried(found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """By how much the last token's state of other prompts moves the logits, before any mover and at the end."""
    lines = []
    for model, one in found.items():
        before = min(int(head[1:].partition("H")[0]) for head in one["movers"]) - 1
        for what, moved in one["carried"].items():
            each = list(zip(moved["effect"], moved["low"], moved["high"], strict=True))
            cells = {
                name: f"{each[layer][0]:+.2f} [{each[layer][1]:+.2f}, {each[layer][2]:+.2f}]"
                for name, layer in (("before the movers", before), ("at the end", -1))
            }
            lines.append({"model": model, "of S": what, "clean": f"{moved['clean']:+.2f}", "layer": before, **cells})
    return pd.DataFrame(lines)


def kept_shares(found: dict[str, Any]) -> pd.DataFrame:
    """Which part of what a head does to the movers each of its channels does when it alone is removed.

    Of heads that turn movers at all.
    """
    lines = []
    for one in [one for one in (*found["channels"], *found["second"]) if one["whole"] >= TURNS]:
        parts = np.array(one["parts"]) / one["whole"]
        order = np.argsort(-parts)[:3]
        low, high = one["share_interval"]
        lines.append({
            "head": one["head"], "pairs": f"{one['pairs']} (seed {one['seed']})",
            "head removed": f"{-one['whole']:+.3f}",
            "channels": len(parts), "the largest parts": ", ".join(f"{i}: {parts[i]:.2f}" for i in order),
            "channel 0": f"{parts[0]:.2f} [{low:.2f}, {high:.2f}]",
        })  # fmt: skip
    return pd.DataFrame(lines)


def kept_edges(found: dict[str, Any]) -> pd.DataFrame:
    """The largest executed edges into each reader's queries, with their ranks by weights."""
    return pd.DataFrame([
        {
            "reader": f"{one['reader']}.q", "writer": edge["writer"], "executed": f"{edge['effect']:+.2f}",
            "best channel": f"{edge['best_channel']:.0f}", "score": f"{edge['best']:.3f}",
            "random": f"{one['random']:.3f}", "rank by channel": f"{edge['rank']:.0f} of {one['writers']}",
            "rank by head": edge["rank_whole"],
            "all writers, Spearman (channel, head)": " ".join(f"{rho:+.2f}" for rho in one["agreement"]),
        }
        for one in found["edges"] for edge in one["largest"]
    ])  # fmt: skip


def kept_everywhere(found: dict[str, Any]) -> pd.DataFrame:
    """Spearman's correlation of scores with slopes over all edges of a side, and with executed ones of some readers."""
    readers = found["drawn"]["readers"]
    every = [("all, by slopes", one) for one in found["all edges"]]
    every += [(f"of {len(readers)} readers drawn, executed", one) for one in found["drawn"]["lines"]]
    return pd.DataFrame([
        {
            "edges between heads": which, "side": one["side"], "edges": f"{one['edges']:,}",
            "Spearman, best channel": f"{one['best']:+.2f}", "Spearman, whole head": f"{one['whole']:+.2f}",
            f"of the {TOP} largest, median place by channel": f"top {1 - one['top percentile']:.0%}",
        }
        for which, one in every
    ])  # fmt: skip


if __name__ == "__main__":
    keep(__doc__ or "", measured, "inhibition")
