"""The notebooks run from top to bottom without Jupyter, within a minute each, and are committed without outputs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
RUN = """
import json, sys, time
names, cells = {"__name__": "__main__"}, json.load(open(sys.argv[1]))["cells"]
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
print("seconds", time.process_time(), *(f"{name} {eval(name, names)}" for name in sys.argv[2:]), sep="\\n")
"""


def run(name: str, folder: Path, *expressions: str) -> list[str]:
    """Runs the notebook's cells in one namespace; the values of expressions there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    environment["OMP_NUM_THREADS"] = "1"  # so that its seconds are its own, whoever else computes
    command = [sys.executable, "-c", RUN, str(ROOT / "examples" / f"{name}.ipynb"), *expressions]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seconds, *values = ran.stdout.rpartition("seconds\n")[2].splitlines()
    assert float(seconds) < 60
    assert not list(folder.iterdir())  # what it writes goes with it
    return [value.partition(" ")[2] for value in values]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_valid_nbformat_4_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"nbformat", "nbformat_minor", "metadata", "cells"}
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert set(cell) == {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        else:
            assert cell["cell_type"] == "markdown"
            assert set(cell) == {"cell_type", "id", "metadata", "source"}


@pytest.mark.e2e
def test_ten_minutes_goes_from_frames_to_lookups(tmp_path: Path) -> None:
    failed, known, nearest = run(
        "ten_minutes", tmp_path, "texts.error.notna().tolist()", "coded.tolist()", "ids[nearest][0]"
    )
    assert failed == "[False, False, False, True]"
    assert known == "[True, True, False]"
    assert nearest == "B007"


@pytest.mark.e2e
def test_a_model_outside_owlrec_learns_from_its_own_vectors_alone(tmp_path: Path) -> None:
    own, shuffled = map(float, run("your_own_model", tmp_path, "auc['own']", "auc['shuffled']"))
    assert own > 0.8
    assert shuffled < 0.65
