"""Where a server finds releases: what that place must offer, and the databases that hold copies of them, by the scheme
of their address.

A new database is a file with a class that is made from an address, and a line here.
"""

from typing import Protocol

from owlrec.errors import ReleaseError, did_you_mean
from owlrec.registry import Registry
from owlrec.releases.release import Release


class ReleaseSource(Protocol):
    """Where releases come from."""

    def current(self) -> str | None:
        """The name of the release in force; None where nothing was published yet."""

    def open(self, name: str) -> Release:
        """Opens a release. Raises ReleaseError or StoreUnavailableError."""


class Database(ReleaseSource, Protocol):
    """A ReleaseSource behind an address."""

    def __init__(self, url: str) -> None: ...


STORES: Registry[Database] = Registry(
    "store",
    {
        "redis": "owlrec.releases.redis_store.RedisReleases",
        "rediss": "owlrec.releases.redis_store.RedisReleases",
        "unix": "owlrec.releases.redis_store.RedisReleases",
    },
)


def open_store(url: str) -> ReleaseSource:
    """The releases at an address such as redis://host:6379/0. Raises ReleaseError for a scheme that nobody knows."""
    scheme = url.partition("://")[0]
    if scheme not in STORES:
        raise ReleaseError(f"'{scheme}' begins no address of a store.{did_you_mean(scheme, STORES)}")
    return STORES.load(scheme)(url)
