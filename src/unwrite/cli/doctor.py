"""`unwrite doctor`: is the decomposition exact, will a scan fit, and how long will it take?"""

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
    cost = f"about {diagnosis.memory / 2**30:.2f} GiB, {duration(diagnosis.seconds)}"
    timed = f" (timed on this model{', with what it reads and moves' if diagnosis.per_pass else ''})"
    screen.print(f"a scan of {diagnosis.n} × {diagnosis.length} tokens: {cost}{timed}")
    if not diagnosis.ok:
        raise typer.Exit(1)
