"""What does a verification say about its writer, in rows and in one sentence?"""

from __future__ import annotations

from unwrite.result import Result


def sentence(result: Result) -> str:
    """The verdict with the numbers it rests on."""
    data, end = result.data, result.data.isel(location=-1)
    low, mean, high = (float(end["generic"].sel(bound=bound)) for bound in ("low", "mean", "high"))
    read = result.provenance["tokens"][""]
    survival = f"{float(end['survival']):.2f} ± {float(end['survival_se']):.2f}"
    words = (
        f"{data.attrs['writer']} on {read['source']} ({read['prompts']} × {read['length']} tokens): "
        f"{data.attrs['verdict']}. Of the write {survival} survives to the end, of randomly turned writes {mean:.2f} "
        f"({low:.2f} to {high:.2f}); later nodes erase {float(data['erased'].sum()):+.2f} and fill in "
        f"{float(data['filled_in'].sum()):+.2f}."
    )
    names = data.attrs["erasers"]
    if not names:
        return f"{words} No later head could read it through values."
    share = float(data["causal_share"])
    causal = f", {share:.0%} of it" if share == share else f" ({data.attrs['causal_share_note']})"
    opposed, caused = float(data["opposed"]), float(data["caused"])
    return f"{words} {names} write {opposed:+.2f} along it, and {caused:+.2f} because their values read it{causal}."


def trajectory(result: Result) -> list[tuple[str, ...]]:
    """Location by location: level, background, survival, generic."""
    lines = []
    for location in result.data["location"].values:
        at = result.data.sel(location=location)
        survival = float(at["survival"])
        written = survival == survival
        lines.append(
            (
                str(location),
                f"{float(at['level_share']):.2f}",
                f"{float(at['background']):.2f}",
                f"{survival:.2f} ± {float(at['survival_se']):.2f}" if written else "–",
                f"{float(at['generic'].sel(bound='mean')):.2f}" if written else "–",
            )
        )
    return lines


def actors(result: Result) -> list[tuple[str, ...]]:
    """Later nodes with a share, a change or a value path worth naming, the strongest change first."""
    columns = ("share", "share_without", "erased", "filled_in", "v_share")
    data = result.data
    order = sorted(data["node"].values, key=lambda node: float(data["acts"].sel(node=node)))
    named = {str(node): str(data["class"].sel(node=node).item()) for node in order}
    return [
        (node, *(f"{float(data[name].sel(node=node)):+.2f}" for name in columns), how)
        for node, how in named.items()
        if how
    ]
