"""Entry points of jobs: `python -m pipelines.STAGE RECIPE` runs the `owlrec` command of that stage.

On a cluster with OwlRec's dependencies but without OwlRec itself, `ray job submit --working-dir .` uploads this folder
with platform/ next to it; importing `pipelines` then makes `owlrec` importable.
"""

import importlib.util
import sys
from pathlib import Path

_SOURCE_ROOT = Path(__file__).resolve().parent.parent / "platform"

if importlib.util.find_spec("owlrec") is None and _SOURCE_ROOT.is_dir():
    sys.path.insert(0, str(_SOURCE_ROOT))


def command(*words: str) -> None:
    """Runs `owlrec WORDS…` followed by this process's arguments."""
    from owlrec.cli import app

    app([*words, *sys.argv[1:]])
