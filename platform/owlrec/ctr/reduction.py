"""Knowledge vectors of fewer components, for training: all of them seen from their first principal directions.

At an encoder's full width the adaptor alone multiplies as often as all of DeepFM, and 10^8 users' vectors take 77 GB.
One projection serves all sources and both sides, since the shared experts read users and items, and the fusion adds
sources up. It has no centre: what all vectors share stays in them, as the lengths and angles that the adaptor reads.
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


def reduced(tables: Mapping[Name, KnowledgeTable], components: int) -> dict[Name, KnowledgeTable]:
    """The tables with `components` of each vector, of length 1; fewer where vectors have fewer.

    Raises SchemaError where two tables differ in size, or for a vector that is not finite.
    """
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
    if components is not None and folders and not workspace.exists(kept, _DONE):
        tables = {
            f"{source}-{side}": KnowledgeTable.open(workspace.local_path(folder))
            for source, sides in folders.items()
            for side, folder in sides.items()
        }
        if any(table.dim > components for table in tables.values()):
            for name, table in reduced(tables, components).items():
                table.save(workspace.local_path(kept, name))
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
