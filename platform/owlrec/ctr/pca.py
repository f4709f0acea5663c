"""Reduces knowledge vectors to their first principal components for training.

The vectors of 10^8 users take 77 GB with MiniLM's 384 components and 13 GB with 64, and the adaptor's first layer
shrinks accordingly. One projection serves all sources and both sides, since the shared experts read users and items,
and the fusion adds up sources. It has no center, so the part common to all vectors stays, as do the lengths and angles
that the adaptor reads. It is fitted on a bounded sample, stored with the grid, and applied by shard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from owlrec.ctr.experiment import grid_folder
from owlrec.ctr.knowledge import KnowledgeTable, VectorTable, open_vectors, refuse_non_finite, refuse_two_sizes
from owlrec.encoding.projection import Projection, ProjectionSettings, fit_projection
from owlrec.encoding.vectors import VectorShards, quantizer_folder
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.shards import Shard
from owlrec.workspace import Workspace

Name = TypeVar("Name")
Folders = Mapping[str, Mapping[str, str]]  # source -> kind -> folder with the vectors <source>-<kind>

_FIT_ROWS = 16_384  # per table: with 384 components the SVD then takes seconds
_DONE = "done.json"  # written last


class ReduceVectors(Stage):
    """Projects a shard of vectors; ids, codes and digests stay unchanged."""

    name = "train_ctr"

    def __init__(self, folder: str, fingerprint: str, sources: Mapping[str, str]) -> None:
        """fingerprint: of the projection in `folder`. sources: <source>-<kind> -> its folder."""
        self.folder, self.fingerprint, self.sources = folder, fingerprint, dict(sources)

    def open(self, workspace: Workspace, worker: str) -> None:
        """Loads the projection."""
        self._projection = Projection.load(workspace, self.folder, self.fingerprint)
        self._shards = {name: VectorShards(workspace, folder, name) for name, folder in self.sources.items()}

    def run(self, work: Work) -> Result:
        """Raises SchemaError for a vector that is not finite."""
        shard = self._shards[work.shard.kind].shard(work.shard.number)
        assert shard is not None, f"{work.shard.name} was listed but no longer exists"
        refuse_non_finite(shard.vectors, shard.ids)
        table = replace(shard, vectors=self._projection.apply(shard.vectors).astype(np.float16)).table()
        path = work.shard.file(".arrow")
        work.check()
        file = work.workspace.write_arrow(work.artifact.path(path), table, table.schema)
        return Result({path: file}, rows_in=len(table), rows_out=len(table))


def reduce_once(
    workspace: Workspace,
    folders: Folders,
    components: int | None,
    fingerprint: str,
    pool: Pool | None = None,
    projection: Projection | None = None,
) -> Folders:
    """Folders that a grid's trials read instead of `folders` (`reduced_folders`), written if missing:
    vectors with at most `components`, of length 1, and the projection. With None, or vectors that are short enough,
    returns `folders`. projection: applied instead of fitting one on these vectors.

    Raises SchemaError if two tables differ in size, or for a vector that is not finite.
    """
    kept = _kept(fingerprint)
    shards = {
        f"{source}-{kind}": VectorShards(workspace, folder, f"{source}-{kind}")
        for source, kinds in folders.items()
        for kind, folder in kinds.items()
    }
    if components is None or workspace.exists(kept, _DONE) or all(s.dim <= components for s in shards.values()):
        return reduced_folders(workspace, folders, fingerprint)
    refuse_two_sizes({f"vectors {name}": open_vectors(name_shards, held=False) for name, name_shards in shards.items()})
    fitted = projection or _fit([s.sample(_FIT_ROWS, seed=0)[1] for s in shards.values()], components)
    fitted.save(workspace, kept, fingerprint)
    stage = ReduceVectors(kept, fingerprint, {name: name_shards.folder for name, name_shards in shards.items()})
    inputs = {
        Shard(name, number): fingerprint for name, name_shards in shards.items() for number in name_shards.numbers
    }
    run_stage(workspace, stage, inputs, pool)
    for name, name_shards in shards.items():
        if quantizer := name_shards.quantizer():
            quantizer.save(workspace, quantizer_folder(kept, name))
    workspace.write_json(f"{kept}/{_DONE}", {"components": components})
    return reduced_folders(workspace, folders, fingerprint)


def reduced_folders(workspace: Workspace, folders: Folders, fingerprint: str) -> Folders:
    """Folders of the vectors that a grid's trials read: the grid's own folder if they were reduced."""
    kept = _kept(fingerprint)
    if not workspace.exists(kept, _DONE):
        return folders
    return {source: dict.fromkeys(kinds, kept) for source, kinds in folders.items()}


def open_tables(workspace: Workspace, folders: Folders, *, held: bool = True) -> dict[str, dict[str, VectorTable]]:
    """Source -> kind -> vectors and semantic ids. held: whether to read small tables into memory.

    Raises the errors of `open_vectors`.
    """

    def opened(folder: str, name: str) -> VectorTable:
        shards = VectorShards(workspace, folder, name)
        quantizer = shards.quantizer()
        return open_vectors(shards, tuple(quantizer.sizes) if quantizer else (), held=held)

    return {
        source: {kind: opened(folder, f"{source}-{kind}") for kind, folder in kinds.items()}
        for source, kinds in folders.items()
    }


def reduced(tables: Mapping[Name, KnowledgeTable], components: int | None) -> dict[Name, KnowledgeTable]:
    """Tables in memory, reduced like those on disk by `reduce_once`."""
    if components is None or all(table.dim <= components for table in tables.values()):
        return dict(tables)
    refuse_two_sizes({f"vectors {name}": table for name, table in tables.items()})
    projection = _fit([t.vectors[:: -(-max(1, len(t)) // _FIT_ROWS)] for t in tables.values()], components)
    smaller = {}
    for name, table in tables.items():
        refuse_non_finite(table.vectors, table.ids)
        smaller[name] = replace(table, vectors=projection.apply(table.vectors).astype(np.float16))
    return smaller


def _fit(samples: Sequence[np.ndarray], components: int) -> Projection:
    sample = np.concatenate(samples)
    return fit_projection(sample, ProjectionSettings(components=components, fit_items=len(sample)), centered=False)


def _kept(fingerprint: str) -> str:
    return f"{grid_folder(fingerprint)}/vectors"
