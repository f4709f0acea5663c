"""The client is tested on the applications of tests/serving and the small releases of tests/releases."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS / "serving"), str(TESTS / "releases")]
