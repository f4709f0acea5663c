"""The one place that reads OwlRec's environment variables; everything else is configured by the recipe.

OWLREC_CACHE      folder for converted models and copied files (default ~/.cache/owlrec)
OWLREC_CACHE_GIB  how much of it copied files may take (default: half of what the disk has free)
OWLREC_API_KEYS   the lines of a key file, for endpoints that are given none (owlrec.serving.keys)
"""

import importlib.util
import os
import shutil
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """A folder in OwlRec's cache, made if absent."""
    base = os.environ.get("OWLREC_CACHE") or Path.home() / ".cache" / "owlrec"
    folder = Path(base).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_bytes(folder: Path) -> int:
    """How many bytes copied files may take below `folder`."""
    if limit := os.environ.get("OWLREC_CACHE_GIB"):
        return int(float(limit) * 2**30)
    held = sum(path.stat().st_size for path in folder.iterdir())
    return (shutil.disk_usage(folder).free + held) // 2


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, None where it does not: without importing it or what it needs."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def secret(variable: str | None) -> str | None:
    """The value of an environment variable that the recipe names as the holder of a secret, such as an API key."""
    return os.environ.get(variable) if variable else None


def api_keys() -> str | None:
    """The lines of a key file; None where the variable is absent or empty."""
    return os.environ.get("OWLREC_API_KEYS") or None
