"""Whose texts stand in for a user or item: its cohorts, as a release and as training want them.

A user's own cohort by what they liked comes first, that by what they disliked second.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from owlrec.ordered import run_starts
from owlrec.schema import MEMBERSHIPS, newest, stable_id
from owlrec.workspace import Workspace


def memberships(cohorts: pa.Table, *, marked: bool = False) -> pa.Table:
    """The memberships in a table of cohorts (schema.COHORTS), in ascending order of kind, id and as_of.

    Columns of schema.MEMBERSHIPS, then as_of: since when the list holds. marked: whether a cohort by what users
    disliked is its complement, as in a release (`by_facet`).
    """
    names = cohorts["cohort"].combine_chunks().dictionary_encode()
    number = np.array([stable_id(name) for name in names.dictionary.to_pylist()], dtype=np.int64)
    later = np.array([facet == "disliked" for facet in cohorts["facet"].to_pylist()], dtype=bool)
    ids, as_of = cohorts["id"].to_numpy(), cohorts["as_of"].to_numpy()
    kinds = np.array(cohorts["kind"].to_pylist(), dtype=str)
    order = np.lexsort((later, as_of, ids, kinds))
    of = number[names.indices.to_numpy()][order] if len(order) else np.zeros(0, dtype=np.int64)
    if marked:
        of = np.where(later[order], ~of, of)
    ids, as_of, kinds = ids[order], as_of[order], kinds[order]
    start = np.unique(run_starts(as_of, ids, kinds))
    lists = pa.ListArray.from_arrays(pa.array(np.r_[start, len(ids)], pa.int32()), pa.array(of, pa.int64()))
    table = pa.table([pa.array(kinds[start], pa.string()), pa.array(ids[start]), lists], schema=MEMBERSHIPS)
    return table.append_column("as_of", pa.array(as_of[start]))


def by_facet(listed: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a release's list of a member the cohorts by what they liked or by what they are, and those by what they
    disliked, which it holds as the complement of their ids.
    """
    return tuple(c for c in listed if c >= 0), tuple(~c for c in listed if c < 0)


class CohortNames:
    """The names of everybody's cohorts, in memory: 12 bytes a membership."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        self._names: list[str] = []
        self._of: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by kind: ids ascending, and numbers of names
        for kind in ("user", "item"):
            parts = [
                newest(workspace.read_parquet(f"{folder}/{kind}/{p}", ["id", "as_of", "cohort"]))
                for p in workspace.names(folder, kind)
            ]
            table = pa.concat_tables(parts)
            names = table["cohort"].combine_chunks().dictionary_encode()
            numbers = names.indices.to_numpy().astype(np.int32) + len(self._names)
            self._names += names.dictionary.to_pylist()
            ids = table["id"].to_numpy()
            order = np.argsort(ids, kind="stable")
            self._of[kind] = ids[order], numbers[order]

    def __call__(self, kind: str, ids: Sequence[int]) -> list[list[str]]:
        """The names of each id's cohorts; none for an unknown id or another kind."""
        if kind not in self._of:
            return [[] for _ in ids]
        known, numbers = self._of[kind]
        wanted = np.asarray(ids, dtype=np.int64)
        low, high = np.searchsorted(known, wanted, "left"), np.searchsorted(known, wanted, "right")
        return [[self._names[n] for n in numbers[a:b]] for a, b in zip(low, high, strict=True)]
