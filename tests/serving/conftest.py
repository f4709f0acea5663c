"""Serving is tested on the small releases of tests/releases."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "releases"))
