"""`unwrite doctor`: is the decomposition exact, will each stage fit, and how long will it take?"""

from __future__ import annotations

import typer

from unwrite.cli.options import Convention, Device, DeviceMap, Dtype, Length, ModelName, Prompts, load_model
from unwrite.cli.voice import diagnose
from unwrite.errors import PrecisionError, plain


def doctor(
    model: ModelName,
    n: Prompts = 300,
    length: Length = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    convention: Convention = "paper",
) -> None:
    """Is the decomposition exact, will a scan fit, and how long will it take? With a device map also: where it lies."""
    from unwrite.report import terminal
    from unwrite.report.live import duration
    from unwrite.studies.doctor import doctor as run
    from unwrite.studies.doctor import foresee

    screen = terminal.console()
    before = None if device_map is None else foresee(model, device_map, n, length, dtype)
    if before is not None:
        diagnose(before, screen, "before loading: ")
        if not before.ok:
            raise typer.Exit(1)
    try:
        lm = load_model(model, device, dtype, convention, device_map)
    except PrecisionError as error:
        screen.print(plain(f"✗ precision: {error}"))
        raise typer.Exit(1) from None
    diagnosis = run(lm, n, length)
    screen.print(plain(repr(lm)))
    diagnose(diagnosis, screen)
    timed = f" (timed on this model{', with what it reads and moves' if diagnosis.per_pass else ''})"
    prompts, one = f"{diagnosis.n} × {diagnosis.length} tokens", f"1 × {diagnosis.length}"
    words = {
        "scan": f"a scan of {prompts}", "survival": f"survival of all writers, {prompts}",
        "verify": f"a verify of one writer, {prompts}", "dla": f"dla of {one}",
        "audit": f"an audit, {prompts}",
    }  # fmt: skip
    for need in diagnosis.stages:
        cost = f"about {need.memory / 2**30:.2f} GiB, {duration(need.seconds)}"
        screen.print(f"{words[need.stage]}: {cost}{timed}")
    if not diagnosis.ok:
        raise typer.Exit(1)
