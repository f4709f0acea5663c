"""OwlRec: open-world LLM recommendation on Ray (see README.md for the tour).

`from owlrec import Client, AsyncClient` asks a running server; both are loaded when they are named.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owlrec.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from owlrec import client

        return getattr(client, name)
    raise AttributeError(f"module 'owlrec' has no attribute '{name}'")
