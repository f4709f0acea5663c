"""The cohorts of a run on disk: item factors, a codebook of each sort, attribute groups, memberships and prompts.

Folder, in the workspace: cohorts/<fingerprint>/. What says for any user or item, new ones too, which cohorts it belongs
to is small: factors/, model.safetensors and model.json. <kind>/ holds the memberships by shard, prompts/ and profiles/
go by the cohort's own shard; cohorts/CURRENT points to the newest that is complete.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa

from owlrec.cohorts.clustering import ClusterConfig, Codebook, FactorSettings
from owlrec.cohorts.profiles import Group, ProfileSettings, group_name
from owlrec.config import Config
from owlrec.errors import WorkspaceError
from owlrec.ids import Kind, stable_id
from owlrec.ordered import run_starts
from owlrec.schema import MEMBERSHIPS, newest
from owlrec.storage import Pointer
from owlrec.workspace import Workspace

# ---------------------------------------------------------------------------------------------------------- memberships
# Whose texts stand in for a user or item: its cohorts, as a release and as training want them.
#
# A user's own cohort by what they liked comes first, that by what they disliked second.


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


# ---------------------------------------------------------------------------------------------------------------- model


Book = Literal["user-liked", "user-disliked", "item"]
FACETS: dict[Book, tuple[Kind, str, str]] = {  # kind, vector column, facet
    "user-liked": ("user", "liked", "liked"),
    "user-disliked": ("user", "disliked", "disliked"),
    "item": ("item", "vector", ""),
}
POINTER = "cohorts/CURRENT"
FACTORS = "factors/00000000.arrow"


class CohortsConfig(Config):
    """The recipe's `cohorts:` section."""

    users: ClusterConfig = ClusterConfig()
    items: ClusterConfig = ClusterConfig()

    def clusters(self, kind: Kind) -> ClusterConfig:
        """The settings of a kind's codebooks."""
        return self.items if kind == "item" else self.users


@dataclass(frozen=True)
class CohortSettings:
    """What no recipe sets. Its values shape cohorts and prompts, so they are part of the fingerprint of cohorts."""

    factors: FactorSettings = field(default_factory=FactorSettings)
    profiles: ProfileSettings = field(default_factory=ProfileSettings)
    seed: int = 0  # of k-means


@dataclass(frozen=True)
class CohortModel:
    """Codebooks may be absent: of what nobody disliked, for example."""

    books: Mapping[Book, Codebook]
    groups: Mapping[Kind, Collection[Group]]  # by kind: the attribute groups that are large enough

    def names(self) -> list[str]:
        """All cohorts that somebody can be assigned to."""
        collaborative = [cohort_name(name, n) for name, book in self.books.items() for n in book.numbers.tolist()]
        attribute = [attribute_cohort_name(kind, g) for kind, groups in self.groups.items() for g in [*groups, ()]]
        return collaborative + attribute

    def save(self, workspace: Workspace, folder: str) -> None:
        """Writes the model into `folder`, the JSON last."""
        from safetensors.numpy import save  # here: a lookup needs neither this nor what brings it

        arrays: dict[str, np.ndarray] = {}
        for name, book in self.books.items():
            arrays |= {f"{name}.centroids": book.centroids, f"{name}.numbers": book.numbers}
            if book.cells is not None:
                arrays[f"{name}.cells"] = book.cells
        workspace.write_bytes(
            f"{folder}/model.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        )
        about = {
            "books": {name: book.next_number for name, book in self.books.items()},
            "groups": {kind: sorted(list(map(list, g)) for g in groups) for kind, groups in self.groups.items()},
        }
        workspace.write_json(f"{folder}/model.json", about)

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> "CohortModel":
        """What `save` wrote. Raises WorkspaceError where it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        about = workspace.read_json(f"{folder}/model.json")
        try:
            arrays = load(workspace.read_bytes(f"{folder}/model.safetensors"))
            return cls(
                {
                    n: Codebook(arrays[f"{n}.centroids"], arrays[f"{n}.numbers"], k, arrays.get(f"{n}.cells"))
                    for n, k in about["books"].items()
                },
                {kind: {tuple(map(tuple, g)) for g in groups} for kind, groups in about["groups"].items()},
            )
        except (SafetensorError, KeyError) as error:
            raise WorkspaceError(
                f"{workspace.path(folder)}: the cohort model is damaged ({error!r}). Delete the folder and run "
                "`cohorts` again."
            ) from None


def previous_folder(workspace: Workspace, folder: str) -> str | None:
    """The folder that a run in `folder` goes on from; a run that is repeated goes on from where it did before."""
    history = Pointer(workspace, POINTER).history
    before = history[: history.index(folder)] if folder in history else history
    return next((f for f in reversed(before) if workspace.exists(f, "model.json")), None)


def read_profiles(workspace: Workspace, folder: str, shards: Collection[int] | None = None) -> pa.Table:
    """Profiles (cohorts.profiles.PROFILES) of the cohorts in some of their shards; of all by default."""
    numbers = range(workspace.n_shards("cohort")) if shards is None else sorted(shards)
    return pa.concat_tables([workspace.read_parquet(f"{folder}/profiles/{n:08d}.parquet") for n in numbers])


def cohort_name(book: Book, number: int) -> str:
    """A collaborative cohort's name."""
    return f"{book}-{number:06d}"


def attribute_cohort_name(kind: str, group: Group) -> str:
    """An attribute group's name; () is everybody of the kind."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9=+]+', '-', group_name(group)).strip('-')}"
