"""Examples are run with the tiny models of tests/ranking."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "ranking"))
