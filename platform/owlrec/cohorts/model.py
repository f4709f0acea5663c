"""The cohorts of a run on disk: item factors, codebooks, attribute groups, memberships and prompts.

The folder in the workspace is cohorts/<fingerprint>/. The small part that assigns any user or item, even a new one, to
cohorts is factors/, model.safetensors and model.json. <kind>/ has the memberships by shard; prompts/ and profiles/
go by the cohort's own shard. cohorts/CURRENT points to the newest complete run.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

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
# Cohorts whose texts stand in for a user or item, in the form that releases and training need.
#
# A user's cohort by likes comes first, the one by dislikes second.


def memberships(cohorts: pa.Table, *, marked: bool = False) -> pa.Table:
    """The memberships in a table of cohorts (schema.COHORTS), in ascending order of kind, id and as_of.

    Columns of schema.MEMBERSHIPS, then as_of: the start of validity. marked: whether a cohort by dislikes
    is stored as its complement, as in a release (`by_facet`).
    """
    names = cohorts["cohort"].combine_chunks().dictionary_encode()
    number = np.array([stable_id(name) for name in names.dictionary.to_pylist()], dtype=np.int64)
    later = np.array([facet == "disliked" for facet in cohorts["facet"].to_pylist()], dtype=bool)
    ids, as_of = cohorts["id"].to_numpy(), cohorts["as_of"].to_numpy()
    kinds = np.array(cohorts["kind"].to_pylist(), dtype=str)
    order = np.lexsort((later, as_of, ids, kinds))
    marked_names = number[names.indices.to_numpy()][order] if len(order) else np.zeros(0, dtype=np.int64)
    if marked:
        marked_names = np.where(later[order], ~marked_names, marked_names)
    ids, as_of, kinds = ids[order], as_of[order], kinds[order]
    start = np.unique(run_starts(as_of, ids, kinds))
    lists = pa.ListArray.from_arrays(pa.array(np.r_[start, len(ids)], pa.int32()), pa.array(marked_names, pa.int64()))
    table = pa.table([pa.array(kinds[start], pa.string()), pa.array(ids[start]), lists], schema=MEMBERSHIPS)
    return table.append_column("as_of", pa.array(as_of[start]))


class CohortNames:
    """Names of everybody's cohorts, in memory: 12 bytes per membership."""

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
        """Names of each id's cohorts; none for an unknown id or another kind."""
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


MeanSize = Annotated[int, Field(ge=2)]


class CohortsConfig(Config):
    """The recipe's `cohorts:` section."""

    # Of all cohorts, or {users: 40, items: 25}. None, also of a kind that is left out: by the population, see
    # ClusterConfig.
    mean_size: MeanSize | dict[Literal["users", "items"], MeanSize] | None = None

    def clusters(self, kind: Kind) -> ClusterConfig:
        """Settings of a kind's codebooks."""
        size = self.mean_size
        return ClusterConfig(
            mean_size=size.get("items" if kind == "item" else "users") if isinstance(size, dict) else size
        )


@dataclass(frozen=True)
class CohortSettings:
    """Settings outside the recipe. They shape cohorts and prompts, so they are part of the cohorts' fingerprint."""

    factors: FactorSettings = field(default_factory=FactorSettings)
    profiles: ProfileSettings = field(default_factory=ProfileSettings)
    seed: int = 0  # of k-means


@dataclass(frozen=True)
class CohortModel:
    """A codebook may be missing, for example if nobody disliked anything."""

    books: Mapping[Book, Codebook]
    groups: Mapping[Kind, Collection[Group]]  # by kind: the large enough attribute groups

    def names(self) -> list[str]:
        """All cohorts with possible members."""
        collaborative = [cohort_name(name, n) for name, book in self.books.items() for n in book.numbers.tolist()]
        attribute = [attribute_cohort_name(kind, g) for kind, groups in self.groups.items() for g in [*groups, ()]]
        return collaborative + attribute

    def save(self, workspace: Workspace, folder: str) -> None:
        """Writes the model into `folder`, the JSON last."""
        from safetensors.numpy import save  # here, since a lookup does not need it

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
        """Loads what `save` wrote. Raises WorkspaceError if it is missing or damaged."""
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
    """The folder on which a run in `folder` builds; a repeated run builds on the same one."""
    history = Pointer(workspace, POINTER).history
    before = history[: history.index(folder)] if folder in history else history
    return next((f for f in reversed(before) if workspace.exists(f, "model.json")), None)


def read_profiles(workspace: Workspace, folder: str, shards: Collection[int] | None = None) -> pa.Table:
    """Profiles (cohorts.profiles.PROFILES) of the cohorts in some shards; by default in all."""
    numbers = range(workspace.n_shards("cohort")) if shards is None else sorted(shards)
    return pa.concat_tables([workspace.read_parquet(f"{folder}/profiles/{n:08d}.parquet") for n in numbers])


def cohort_name(book: Book, number: int) -> str:
    """Name of a collaborative cohort."""
    return f"{book}-{number:06d}"


def attribute_cohort_name(kind: str, group: Group) -> str:
    """Name of an attribute group; () is everybody of the kind."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9=+]+', '-', group_name(group)).strip('-')}"
