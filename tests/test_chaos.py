"""A few of the kills that `make chaos` makes thirty of."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_bits_of_one_that_is_not():
    result = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--kills", "3", "--ranks", "3", "--layouts", "ddp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills in" in result.stdout and " 0 problems." in result.stdout
    # a run that a quick machine finishes before its kill counts as well
    assert re.search(r"[1-9] runs ended on 3 ranks with the bits of a run that", result.stdout)
