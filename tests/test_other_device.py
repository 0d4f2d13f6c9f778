"""Would it run on a GPU? Every method on a device that stands for one, in a process of its own.

A device that torch is told of stays until the process ends, and changes what others see (`torch.accelerator`, the
threads of backward passes), so nothing of it happens here. What is checked is in on_pretend.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretend

CHECKS = Path(__file__).with_name("on_pretend.py")


@pytest.mark.skipif(pretend.missing() is not None, reason=str(pretend.missing()))
def test_every_method_runs_on_another_device_and_gives_the_same_bits() -> None:
    # Types are checked where the same code runs on the CPU; a worker of xdist tells its children that they are one.
    options = ["-q", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, CHECKS], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
