"""What a store of knowledge answers, whichever database stands behind it: texts and vectors, aligned with their ids.

A miss is an answer, never an error, because new users and items are normal: `get` gives None in its place, `vectors` a
zero row with a False in the mask. Stores are read-only: what they hold was written and verified once, by
`owlrec.store.publishing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What the LLM wrote about one user, item or cohort."""

    kind: str
    id: int
    as_of: int  # ms since 1970, UTC: the text knows nothing later
    text: str
    framework: str
    quality: str  # "ok", or the names of the quality rules that flagged the text


class KnowledgeStore(ABC):
    """Read access to one release; a context manager that closes itself."""

    @abstractmethod
    def get(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """Knowledge aligned with `ids`, None where an id has none. Raises ReleaseError for an unknown kind."""

    @abstractmethod
    def vectors(self, kind: str, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Vectors aligned with `ids`: (float32 [n, d], mask bool [n]); zeros and False where an id has none."""

    @abstractmethod
    def count(self, kind: str) -> int:
        """How many ids of this kind have knowledge."""

    @abstractmethod
    def ids(self, kind: str, limit: int | None = None) -> np.ndarray:
        """The ids of this kind that have knowledge: int64, ascending, at most `limit`."""

    @abstractmethod
    def close(self) -> None:
        """Frees what the store holds; calling it twice does no harm."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
