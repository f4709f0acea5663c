"""A wheel in an empty virtual environment: the command works outside the repository, on base dependencies alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import KNOWLEDGE, vectors_schema
from owlrec.workspace import Workspace

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def published(tmp_path: Path) -> Path:
    row = {f.name: "x" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    knowledge = pa.Table.from_pylist([row | {"kind": "user", "id": 7, "text": "likes owls"}], schema=KNOWLEDGE)
    vectors = pa.Table.from_pylist(
        [{"kind": "user", "id": 7, "vector": np.zeros(4, np.float16), "codes": []}], schema=vectors_schema(4)
    )
    info = ReleaseInfo(fingerprint="ab" * 32, model="m", encoder="e")
    publish(Workspace(tmp_path / "ws"), knowledge=[knowledge], vectors=[vectors], info=info)
    return tmp_path / "ws"


def test_doctor_and_lookup_work_from_the_wheel(tmp_path: Path, published: Path) -> None:
    def run(*command: object, cwd: Path = tmp_path, check: bool = True) -> str:
        ran = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=400, check=False)
        assert not check or ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", cwd=ROOT)
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python, owlrec = tmp_path / "venv/bin/python", tmp_path / "venv/bin/owlrec"
    run(python, "-m", "pip", "install", "-q", "--upgrade", "pip")
    run(python, "-m", "pip", "install", "-q", next((tmp_path / "dist").glob("*.whl")))
    assert "likes owls" in run(owlrec, "lookup", published, "user", "7")
    report = run(owlrec, "doctor", published, check=False)
    assert "ray" in report
    assert "Traceback" not in report
    origin = run(python, "-c", "import owlrec, platform; print(owlrec.__file__, platform.system())")
    assert str(tmp_path) in origin
    assert "Linux" in origin
