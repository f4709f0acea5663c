"""Helpers of other folders: small releases, the served application, a server of Redis."""

import sys
from pathlib import Path

for folder in ("releases", "serving"):
    sys.path.append(str(Path(__file__).resolve().parent.parent / folder))
