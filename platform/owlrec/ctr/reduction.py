"""Knowledge vectors of fewer components, for training: all of them seen from their first principal directions.

The vectors of 10^8 users take 77 GB with the 384 components of MiniLM and 13 GB with 64, and the adaptor's first layer
shrinks as they do. One projection serves all sources and both sides, since the shared experts read users and items, and
the fusion adds sources up. It has no centre: what all vectors share stays in them, as the lengths and angles that the
adaptor reads.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from owlrec.ctr.experiment import grid_folder
from owlrec.ctr.knowledge import KnowledgeTable, refuse_two_sizes
from owlrec.encoding.projection import ProjectionConfig, fit_projection
from owlrec.workspace import Workspace

Name = TypeVar("Name")
Folders = Mapping[str, Mapping[str, str]]  # source -> side -> folder of vectors (KnowledgeTable.save)

_FIT_ROWS = 16_384  # of each table: with 384 components the SVD then takes seconds
_DONE = "done.json"  # written last


def reduced(tables: Mapping[Name, KnowledgeTable], components: int | None) -> dict[Name, KnowledgeTable]:
    """The tables with `components` of each vector, of length 1: at most as many as there are vectors.

    None, or vectors that have no more, give the very tables. Raises SchemaError where two tables differ in size, or for
    a vector that is not finite.
    """
    if components is None or all(table.dim <= components for table in tables.values()):
        return dict(tables)
    refuse_two_sizes({f"vectors {name}": table for name, table in tables.items()})
    sample = np.concatenate([table.vectors[:: -(-max(1, len(table)) // _FIT_ROWS)] for table in tables.values()])
    projection = fit_projection(sample, ProjectionConfig(components=components, fit_items=len(sample)), centred=False)
    return {name: table.projected(projection) for name, table in tables.items()}


def reduce_once(workspace: Workspace, folders: Folders, components: int | None, fingerprint: str) -> Folders:
    """The folders that the trials of a grid read in place of `folders` (`reduced_folders`), written where they are not
    there yet.

    components: at most so many of each vector; None for all. Raises SchemaError as `reduced` does.
    """
    kept = _kept(fingerprint)
    if not workspace.exists(kept, _DONE):
        tables = {
            f"{source}-{side}": KnowledgeTable.open(workspace.local_path(folder))
            for source, sides in folders.items()
            for side, folder in sides.items()
        }
        smaller = {name: t for name, t in reduced(tables, components).items() if t is not tables[name]}
        for name, table in smaller.items():
            table.save(workspace.local_path(kept, name))
        if smaller:
            workspace.write_json(f"{kept}/{_DONE}", {"components": components})
    return reduced_folders(workspace, folders, fingerprint)


def reduced_folders(workspace: Workspace, folders: Folders, fingerprint: str) -> Folders:
    """Where the vectors lie that a grid's trials read: in its own folder where they were reduced."""
    kept = _kept(fingerprint)
    if not workspace.exists(kept, _DONE):
        return folders
    return {source: {side: f"{kept}/{source}-{side}" for side in sides} for source, sides in folders.items()}


def _kept(fingerprint: str) -> str:
    return f"{grid_folder(fingerprint)}/vectors"
