"""What a run knows of its cohorts, on disk: item factors, a codebook for each side, attribute groups, size limits.

Enough to say for any user or item, new ones too, which cohorts it belongs to, without clustering again. Folder, in the
workspace: cohorts/<fingerprint>/, with model.safetensors and model.json, vectors/<kind>/ and <kind>/ (the assignments,
one file a part of the kind's table), profiles.parquet and prompts/; cohorts/LATEST names the newest that is complete.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from owlrec.cohorts.attributes import Group, group_name
from owlrec.cohorts.clustering import ClusterConfig, Codebook
from owlrec.cohorts.collaborative import CollaborativeConfig, ItemFactors
from owlrec.cohorts.profiles import ProfileConfig
from owlrec.config import Config
from owlrec.errors import WorkspaceError
from owlrec.workspace import Workspace

Book = Literal["user-liked", "user-disliked", "item"]
LATEST = "cohorts/LATEST"


class CohortsConfig(Config):
    """The recipe's `cohorts:` section."""

    collaborative: CollaborativeConfig = CollaborativeConfig()
    users: ClusterConfig = ClusterConfig()
    items: ClusterConfig = ClusterConfig()
    profiles: ProfileConfig = ProfileConfig()

    def clusters(self, book: Book) -> ClusterConfig:
        """The settings of one codebook."""
        return self.items if book == "item" else self.users


@dataclass(frozen=True)
class Rings:
    """Where a cohort that no clustering could bring below the largest size is cut: by distance, then by id."""

    distance: np.ndarray  # float32 [m], ascending with `id`: the first member of each ring but the innermost
    id: np.ndarray  # int64 [m]

    def of(self, distance: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: each member's ring, 0 for the innermost."""
        found = np.zeros(len(ids), dtype=np.int64)
        for limit, first in zip(self.distance, self.id, strict=True):
            found += (distance > limit) | ((distance == limit) & (ids >= first))
        return found


def cut_rings(distance: np.ndarray, ids: np.ndarray, largest: int) -> Rings:
    """Rings of one cohort's members, as equal in size as can be, none larger than `largest`."""
    order = np.lexsort((ids, distance))
    n_rings = -(-len(ids) // largest)
    first = order[[len(ids) * i // n_rings for i in range(1, n_rings)]]
    return Rings(distance[first], ids[first])


@dataclass(frozen=True)
class CohortModel:
    """Codebooks may be absent: of what nobody disliked, for example."""

    factors: ItemFactors
    books: Mapping[Book, Codebook]
    groups: Mapping[str, Mapping[Group, int]]  # by kind: members of each attribute group and its prefixes
    min_group: int
    rings: Mapping[Book, Mapping[int, Rings]] = field(default_factory=dict)  # by book and cohort number

    def save(self, workspace: Workspace, folder: str) -> None:
        """Writes the model into `folder`, the JSON last."""
        from safetensors.numpy import save  # here: a lookup needs neither this nor what brings it

        arrays = {"factors.ids": self.factors.ids, "factors.vectors": self.factors.vectors}
        for name, book in self.books.items():
            arrays |= {f"{name}.centroids": book.centroids, f"{name}.numbers": book.numbers}
        for name, rings in self.rings.items():
            for number, ring in rings.items():
                arrays |= {f"{name}.{number}.distance": ring.distance, f"{name}.{number}.id": ring.id}
        workspace.write_bytes(
            f"{folder}/model.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()})
        )
        about = {
            "books": {name: book.next_number for name, book in self.books.items()},
            "groups": {kind: [[list(map(list, g)), n] for g, n in c.items()] for kind, c in self.groups.items()},
            "min_group": self.min_group,
            "rings": {name: sorted(rings) for name, rings in self.rings.items()},
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
                ItemFactors(arrays["factors.ids"], arrays["factors.vectors"]),
                {n: Codebook(arrays[f"{n}.centroids"], arrays[f"{n}.numbers"], k) for n, k in about["books"].items()},
                {k: {tuple(map(tuple, g)): n for g, n in c} for k, c in about["groups"].items()},
                about["min_group"],
                {
                    name: {m: Rings(arrays[f"{name}.{m}.distance"], arrays[f"{name}.{m}.id"]) for m in numbers}
                    for name, numbers in about["rings"].items()
                },
            )
        except (SafetensorError, KeyError) as error:
            raise WorkspaceError(
                f"{workspace.path(folder)}: the cohort model is damaged ({error!r}). Delete the folder and run "
                "`cohorts` again."
            ) from None


@lru_cache(maxsize=4)
def _loaded(root: str, folder: str, version: str) -> CohortModel:
    return CohortModel.load(Workspace(root), folder)


def open_model(workspace: Workspace, folder: str) -> CohortModel:
    """The model in `folder`; read once a process and version."""
    version = json.dumps(workspace.read_json(f"{folder}/model.json"))
    return _loaded(workspace.root, folder, version)


def cohort_name(book: Book, number: int, ring: int = 0) -> str:
    """A collaborative cohort's name; also the name of its retrieval pool."""
    return f"{book}-{number:06d}" + (f".{ring}" if ring else "")


def attribute_cohort_name(kind: str, group: Group) -> str:
    """An attribute group's name; () is everybody of the kind."""
    return f"{kind}-{re.sub(r'[^A-Za-z0-9=+]+', '-', group_name(group)).strip('-')}"
