"""The tests of ``test_anywhere.py`` on the second device, in a process that has run no backward pass before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import second

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(second.missing() is not None, reason=str(second.missing()))
def test_everything_on_a_second_device() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", second.NAME]
    done = subprocess.run(
        [*command, str(HERE / "test_anywhere.py")],
        env=os.environ | {second.OWN_PROCESS: "1", "PYTEST_ADDOPTS": ""},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
