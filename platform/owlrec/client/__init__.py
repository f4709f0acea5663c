"""A client of OwlRec's endpoints, blocking and for asyncio: retries, time-outs, typed answers, vectors as numpy.

It needs nothing but the base install, and imports neither Ray nor torch. `calls` says what is asked and how answers are
read, `exchange` when to ask again; `clients` does the sending.
"""

from owlrec.client.calls import Vectors
from owlrec.client.clients import AsyncClient, Client
from owlrec.client.exchange import ClientError, RetryPolicy

__all__ = ["AsyncClient", "Client", "ClientError", "RetryPolicy", "Vectors"]
