"""OwlRec: open-world LLM recommendation on Ray (see README.md for the tour).

The Python API is six names: `run`, `write_texts`, `open`, `Adaptor`, `drafting`, and `Client` (for asyncio,
`AsyncClient`). Each is imported on first use, so `import owlrec` loads neither pandas, torch, Ray nor vLLM.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlrec.api import drafting, run, write_texts
    from owlrec.client import AsyncClient, Client
    from owlrec.ctr.model import Adaptor
    from owlrec.lookup import open

__version__ = "0.1.0"
__all__ = ["Adaptor", "AsyncClient", "Client", "__version__", "drafting", "open", "run", "write_texts"]

_MODULES = {
    "Adaptor": "owlrec.ctr.model",
    "AsyncClient": "owlrec.client",
    "Client": "owlrec.client",
    "open": "owlrec.lookup",
    **dict.fromkeys(("drafting", "run", "write_texts"), "owlrec.api"),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from owlrec.errors import naming_extras

        with naming_extras():
            return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'owlrec' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
