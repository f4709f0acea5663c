"""Thin entry points: `python -m pipelines.<stage> --recipe R` runs one stage, `owlrec run R` all of them.

On a cluster that has OwlRec's dependencies but not OwlRec itself, `ray job submit --working-dir .` brings this folder
and platform/ beside it; importing `pipelines` then makes `owlrec` importable.
"""

import importlib.util
import sys
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parent.parent / "platform"

if importlib.util.find_spec("owlrec") is None and SOURCE_ROOT.is_dir():
    sys.path.insert(0, str(SOURCE_ROOT))
