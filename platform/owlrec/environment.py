"""The one place that reads OwlRec's environment variables; everything else is configured by the recipe.

OWLREC_CACHE      folder for converted models and copied releases (default ~/.cache/owlrec)
OWLREC_API_KEYS   the lines of a key file, for endpoints that are given none (owlrec.serving.keys)
"""

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """A folder in OwlRec's cache, made if absent."""
    base = os.environ.get("OWLREC_CACHE") or Path.home() / ".cache" / "owlrec"
    folder = Path(base).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def secret(variable: str | None) -> str | None:
    """The value of an environment variable that the recipe names as the holder of a secret, such as an API key."""
    return os.environ.get(variable) if variable else None


def api_keys() -> str | None:
    """The lines of a key file; None where the variable is absent or empty."""
    return os.environ.get("OWLREC_API_KEYS") or None
