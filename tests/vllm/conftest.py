"""Small releases and tiny models of other folders' tests."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in ("releases", "decoding", "ranking")]
