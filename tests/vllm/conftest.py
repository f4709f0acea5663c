"""Engines of tiny models, which tests/ranking tunes."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "ranking"))
