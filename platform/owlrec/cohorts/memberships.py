"""Whose texts stand in for a user or item: its cohorts, as a release and as training want them.

A user's own cohort by what they liked comes first, that by what they disliked second. Their vectors count alike.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from owlrec.cohorts.collaborative import unit
from owlrec.ordered import run_starts
from owlrec.schema import MEMBERSHIPS, stable_id
from owlrec.workspace import Workspace


def memberships(cohorts: pa.Table) -> pa.Table:
    """The memberships of the ids in a table of cohorts (schema.COHORTS), in ascending order of kind and id."""
    names = cohorts["cohort"].combine_chunks().dictionary_encode()
    number = np.array([stable_id(name) for name in names.dictionary.to_pylist()], dtype=np.int64)
    later = np.array([facet == "disliked" for facet in cohorts["facet"].to_pylist()], dtype=bool)
    ids, kinds = cohorts["id"].to_numpy(), np.array(cohorts["kind"].to_pylist(), dtype=str)
    order = np.lexsort((later, ids, kinds))
    of = number[names.indices.to_numpy()][order] if len(order) else np.zeros(0, dtype=np.int64)
    ids, kinds = ids[order], kinds[order]
    start = np.unique(run_starts(ids, kinds))
    lists = pa.ListArray.from_arrays(pa.array(np.r_[start, len(ids)], pa.int32()), pa.array(of, pa.int64()))
    return pa.table([pa.array(kinds[start], pa.string()), pa.array(ids[start]), lists], schema=MEMBERSHIPS)


def member_vectors(table: pa.Table, gather: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Of each member the mean of its cohorts' vectors, of length 1: float32 [n, d]; zeros where none has a vector.

    table: n rows of schema.MEMBERSHIPS. gather: vectors [k, d] and mask bool [k] of int64 [k] ids of cohorts, each
    asked for once however many members it has.
    """
    lists = table["cohorts"].combine_chunks()
    cohorts, at = np.unique(lists.flatten().to_numpy(), return_inverse=True)
    vectors, known = gather(cohorts)
    member = np.repeat(np.arange(len(table)), lists.value_lengths().to_numpy())[known[at]]
    total = np.zeros((len(table), vectors.shape[1]), dtype=np.float32)
    np.add.at(total, member, vectors[at[known[at]]].astype(np.float32))
    return unit(total)


class CohortNames:
    """The names of everybody's cohorts, in memory: 12 bytes a membership."""

    def __init__(self, workspace: Workspace, folder: str) -> None:
        self._names: list[str] = []
        self._of: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by kind: ids ascending, and numbers of names
        for kind in ("user", "item"):
            parts = [
                workspace.read_parquet(f"{folder}/{kind}/{p}", ["id", "cohort"]) for p in workspace.names(folder, kind)
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
