"""The stage that encodes: a shard of texts (or of members of cohorts) becomes a file of vectors.

It is incremental by row: where a shard was encoded before, rows whose text has the digest it had keep their vectors,
and their codes where the codebooks are the same.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from owlrec.encoding.coded_vectors import quantiser_folder
from owlrec.encoding.inputs import Input, Resources, Rows
from owlrec.encoding.semantic_ids import Quantiser, code_vectors
from owlrec.encoding.vector_shards import DIGEST_BYTES, VectorShard
from owlrec.errors import WorkspaceError
from owlrec.runner import Result, Stage, Work
from owlrec.tombstones import read_tombstones


class EncodeStage(Stage):
    """Shards of kind `<source>-<kind>`, such as knowledge-user."""

    name = "encode"

    def __init__(self, folder: str, resources: Resources, inputs: Mapping[str, Input], coded: bool = False) -> None:
        """folder: of the vectors. inputs: by `<source>-<kind>`. coded: whether those with codebooks get codes."""
        self.folder, self.resources, self.inputs, self.coded = folder, resources, dict(inputs), coded
        self._quantisers: dict[str, Quantiser | None] = {}

    def run(self, work: Work) -> Result:
        """Encodes one shard. Raises OwlRecError as the input, the encoder and the quantiser do."""
        name, number = work.shard.kind, work.shard.number
        source = self.inputs[name]
        rows = source.rows(self.resources, number)
        if name.endswith("-user"):
            rows = rows.take(np.flatnonzero(~read_tombstones(work.workspace).among(rows.ids)))
        path = work.artifact.path(work.shard.file(".arrow"))
        earlier = _earlier(work, path)
        at = _unchanged(rows, earlier)
        new = np.flatnonzero(at < 0)
        made = rows.make(new) if len(new) or earlier is None else earlier.vectors[:0]
        vectors = np.zeros((len(at), made.shape[1]), dtype=np.float16)
        vectors[new] = made
        if earlier is not None:
            vectors[at >= 0] = earlier.vectors[at[at >= 0]]
        no_codes = np.zeros((len(at), 0), dtype=np.uint16)
        kind, identity = name.rpartition("-")[2], self.resources.config.identity
        shard = VectorShard(kind, rows.ids, rows.as_of, vectors, rows.digests, no_codes, encoder=identity)
        if (quantiser := self._quantiser(name)) is not None:
            shard = _coded(shard, earlier, at, quantiser)
        work.check()
        table = shard.table()
        file = work.workspace.write_arrow(path, table, table.schema)
        return Result(
            files={work.shard.file(".arrow"): file},
            rows_in=rows.read,
            rows_out=len(at),
            counts={"encoded": len(new), "kept": len(at) - len(new)},
        )

    def _quantiser(self, name: str) -> Quantiser | None:
        if self.coded and name not in self._quantisers:
            workspace, folder = self.resources.workspace, quantiser_folder(self.folder, name)
            self._quantisers[name] = Quantiser.load(workspace, folder) if workspace.exists(folder) else None
        return self._quantisers.get(name)


def _earlier(work: Work, path: str) -> VectorShard | None:
    if work.earlier is None:
        return None
    try:
        return VectorShard.read(work.workspace, path)
    except WorkspaceError:  # damaged since its card was read: encode it all again
        return None


def _unchanged(rows: Rows, earlier: VectorShard | None) -> np.ndarray:
    """Of each row, the row of the earlier shard that is of the same id and was made from the same, or -1: int64 [n].

    It leaves the as_of out: a text that was found to hold for longer keeps its vector.
    """
    if earlier is None:
        return np.full(len(rows.ids), -1, dtype=np.int64)
    known = {key: row for row, key in enumerate(_keys(earlier.ids, earlier.digests))}
    return np.fromiter((known.get(key, -1) for key in _keys(rows.ids, rows.digests)), np.int64, len(rows.ids))


def _keys(ids: np.ndarray, digests: np.ndarray) -> list[tuple[int, bytes]]:
    joined = digests.tobytes()
    return [
        (id_, joined[at : at + DIGEST_BYTES])
        for id_, at in zip(ids.tolist(), range(0, len(joined), DIGEST_BYTES), strict=True)
    ]


def _coded(shard: VectorShard, earlier: VectorShard | None, at: np.ndarray, quantiser: Quantiser) -> VectorShard:
    """The shard with codes. at: see _unchanged; a vector that these codebooks coded already keeps its codes."""
    codes = np.zeros((len(at), len(quantiser.codebooks) + 1), dtype=np.uint16)
    kept = np.zeros(len(at), dtype=bool)
    if earlier is not None and len(earlier.ids) and earlier.quantiser == quantiser.fingerprint:
        kept = at >= 0
        codes[kept] = earlier.codes[at[kept]]
    codes[~kept] = code_vectors(quantiser, shard.ids[~kept], shard.vectors[~kept])
    return replace(shard, codes=codes, quantiser=quantiser.fingerprint)
