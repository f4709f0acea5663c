"""A worker's log must never be the reason that a worker ends."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="only Linux has a file that is always full")
def test_a_full_disk_costs_lines_of_the_log_and_no_worker() -> None:
    code = f"""
import sys
from owlrec.machine import redirect_output
redirect_output("{FULL}")
for stream in (sys.stdout, sys.stderr):
    print("a line", file=stream)
    stream.flush()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_output_of_python_and_of_native_code_keeps_its_order(tmp_path: Path) -> None:
    code = f"""
import os
from owlrec.machine import redirect_output
redirect_output({str(tmp_path / "logs" / "log")!r})
print("one")
os.write(1, b"two\\n")
print("three", end="")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    assert (tmp_path / "logs" / "log").read_text() == "one\ntwo\nthree"
