"""The encode stage: a shard of texts (or of members of cohorts) becomes a file of vectors.

It is incremental by row: in an already encoded shard, rows whose text has the same digest keep their vectors,
and their codes if the codebooks are the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from owlrec.encoding.compression import SEED, TRAIN_SAMPLE, Quantizer, code_vectors
from owlrec.encoding.inputs import Input, Members, Resources, Rows
from owlrec.encoding.vectors import (
    CODED_KINDS,
    CODED_SOURCES,
    DIGEST_BYTES,
    EncoderConfig,
    VectorShard,
    VectorShards,
    fit_codebooks,
    quantizer_folder,
    read_reports,
    shard_order,
)
from owlrec.errors import WorkspaceError
from owlrec.ids import Kind
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.shards import Artifact, Card, Shard, Stopwatch
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, read_tombstones

TIMED_TEXTS, TIMED_SECONDS = "timed_texts", "timed_s"  # counts of a card, see _timed


class EncodeStage(Stage):
    """Shards of kind `<source>-<kind>`, such as knowledge-user."""

    name = "encode"

    def __init__(self, folder: str, resources: Resources, inputs: Mapping[str, Input], coded: bool = False) -> None:
        """folder: of the vectors. inputs: by `<source>-<kind>`. coded: whether vectors with codebooks get codes."""
        self.folder, self.resources, self.inputs, self.coded = folder, resources, dict(inputs), coded
        self._quantizers: dict[str, Quantizer | None] = {}

    def run(self, work: Work) -> Result:
        """Encodes one shard. Raises the OwlRecErrors of the input, the encoder and the quantizer."""
        watch, loaded_s = Stopwatch(), self.resources.load_s
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
        if (quantizer := self._quantizer(name)) is not None:
            shard = _coded(shard, earlier, at, quantizer)
        work.check()
        table = shard.table()
        file = work.workspace.write_arrow(path, table, table.schema)
        seconds = watch.seconds - (self.resources.load_s - loaded_s)
        return Result(
            files={work.shard.file(".arrow"): file},
            rows_in=rows.read,
            rows_out=len(at),
            counts={"encoded": len(new), "kept": len(at) - len(new), **_timed(len(new), seconds, work.earlier)},
        )

    def _quantizer(self, name: str) -> Quantizer | None:
        if self.coded and name not in self._quantizers:
            workspace, folder = self.resources.workspace, quantizer_folder(self.folder, name)
            self._quantizers[name] = Quantizer.load(workspace, folder) if workspace.exists(folder) else None
        return self._quantizers.get(name)


def _timed(texts: int, seconds: float, earlier: Card | None) -> dict[str, float | int | str]:
    """Number of encoded texts and seconds, for the encoder's speed. A pass that only adds codes
    adds its seconds to those of the pass that encoded.
    """
    if not texts and earlier is not None:
        texts = int(earlier.counts.get(TIMED_TEXTS, 0))
        seconds += float(earlier.counts.get(TIMED_SECONDS, 0))
    return {TIMED_TEXTS: texts, TIMED_SECONDS: round(seconds, 3)}


def _earlier(work: Work, path: str) -> VectorShard | None:
    if work.earlier is None:
        return None
    try:
        return VectorShard.read(work.workspace, path)
    except WorkspaceError:  # damaged since its card was read: encode all of it again
        return None


def _unchanged(rows: Rows, earlier: VectorShard | None) -> np.ndarray:
    """For each row, the earlier shard's row with the same id and input, or -1: int64 [n].

    It ignores as_of: a text that turns out to hold for longer keeps its vector.
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


def _coded(shard: VectorShard, earlier: VectorShard | None, at: np.ndarray, quantizer: Quantizer) -> VectorShard:
    """The shard with codes. at: see _unchanged; a vector already coded with these codebooks keeps its codes."""
    codes = np.zeros((len(at), len(quantizer.codebooks) + 1), dtype=np.uint16)
    kept = np.zeros(len(at), dtype=bool)
    if earlier is not None and len(earlier.ids) and earlier.quantizer == quantizer.fingerprint:
        kept = at >= 0
        codes[kept] = earlier.codes[at[kept]]
    codes[~kept] = code_vectors(quantizer, shard.ids[~kept], shard.vectors[~kept])
    return replace(shard, codes=codes, quantizer=quantizer.fingerprint)


# ------------------------------------------------------------------------------------------------------------------ job
# Encodes all shards of all sources: first a bounded sample to fit codebooks, then the rest.
#
# Shards encoded before their codebooks existed are visited once more: their vectors stay and codes are
# added. Later runs use the same codebooks, whatever has been added meanwhile. If a folder of `quantizers/`
# is deleted, its codebooks are fitted again and every vector of that source and kind is coded again, without the
# encoder.


COHORTS = "knowledge-cohort"  # input of members' vectors, so encoded before them


class EncodingJob:
    """The inputs to encode into a folder of vectors."""

    def __init__(
        self,
        workspace: Workspace,
        folder: str,
        config: EncoderConfig,
        inputs: Mapping[str, Input],
        *,
        sample: int = TRAIN_SAMPLE,
    ) -> None:
        """inputs: by `<source>-<kind>`. sample: number of vectors for fitting codebooks."""
        self.workspace, self.folder, self.config, self.inputs, self.sample = workspace, folder, config, inputs, sample
        self._cards: dict[str, Card] | None = None  # cards of all encoded shards, listed once
        self._digests: dict[str, dict[int, str]] = {}

    def pending(self) -> bool:
        """Whether a shard still needs encoding or coding. Loads no encoder."""
        shards = self._all()
        return bool(self._unfitted()) or len(self._done(shards)) < len(shards)

    def run(self, pool: Pool, on_card: Callable[[Card], None] | None = None) -> dict[str, Card]:
        """Encodes pending shards; returns the cards of all shards, by name (`knowledge-user/00000012`).

        on_card: see run_stage. Raises the OwlRecErrors of the stage.
        """
        resources = Resources(self.workspace, self.config)
        samples = {name: self._sample(name) for name in self._unfitted()}
        first = {Shard(name, n): self._of(name)[n] for name, numbers in samples.items() for n in numbers}
        if COHORTS in self.inputs:
            first |= {Shard(COHORTS, n): digest for n, digest in self._of(COHORTS).items()}
        self._run(EncodeStage(self.folder, resources, self.inputs), first, pool, on_card)
        for name, numbers in samples.items():
            self._fit(name, numbers)
        stage = EncodeStage(self.folder, resources, self.inputs, coded=True)
        return self._run(stage, self._all(), pool, on_card)

    def pool(self, log_path: str) -> Pool:
        """Where the config runs the stage: in this process, or on Ray if it requests replicas or GPUs."""
        config = self.config
        return Pool(
            here=config.replicas == 1 and not config.gpus,
            min_workers=config.replicas,
            max_workers=config.replicas,
            cpus=1,  # Ray also sets torch's threads from it: more replicas use more cores
            gpus=config.gpus,
            log_path=log_path,
        )

    def counts(self, cards: Mapping[str, Card]) -> dict[str, float | int | str]:
        """Vectors by `<source>_<kind>`, their dimension, and figures of their codes. cards: returned by `run`."""
        counts: dict[str, float | int | str] = {}
        for name, card in cards.items():
            table = Shard.from_name(name).kind.replace("-", "_")
            counts[table] = int(counts.get(table, 0)) + card.rows_out
        if cards:
            counts["dim"] = VectorShards(self.workspace, self.folder, Shard.from_name(next(iter(cards))).kind).dim
        for name, report in read_reports(self.workspace, self.folder).items():
            counts |= {f"{name.replace('-', '_')}_{figure}": value for figure, value in report.counts().items()}
        return counts

    def _run(
        self, stage: EncodeStage, shards: Mapping[Shard, str], pool: Pool, on_card: Callable[[Card], None] | None
    ) -> dict[str, Card]:
        done = self._done(shards)
        made = run_stage(self.workspace, stage, shards, pool, on_card, done=done)
        self._cards = {**(self._cards or {}), **made}
        return made

    def _done(self, shards: Mapping[Shard, str]) -> dict[str, Card]:
        """Cards of the shards made from these inputs."""
        if self._cards is None:
            self._cards = Artifact(self.workspace, self.folder).cards()
        cards = {shard.name: self._cards.get(shard.name) for shard in shards}
        digests = {shard.name: digest for shard, digest in shards.items()}
        return {name: card for name, card in cards.items() if card and card.fingerprint == digests[name]}

    def _unfitted(self) -> list[str]:
        """Inputs whose vectors get codes but have no codebooks yet."""
        coded = [f"{source}-{kind}" for source in CODED_SOURCES for kind in CODED_KINDS]
        if self.config.id_config is None:
            return []
        return [n for n in coded if n in self.inputs and not self.workspace.exists(quantizer_folder(self.folder, n))]

    def _of(self, name: str) -> dict[int, str]:
        """Digests of an input's shards."""
        if isinstance(self.inputs[name], Members):  # made from vectors that this job may replace
            return self.inputs[name].digests(self.workspace)
        if name not in self._digests:
            self._digests[name] = self.inputs[name].digests(self.workspace)
        return self._digests[name]

    def _all(self) -> dict[Shard, str]:
        shards = {}
        for name in self.inputs:
            codebooks = self._codebooks(name)
            for number, digest in self._of(name).items():
                shards[Shard(name, number)] = fingerprint(digest, codebooks) if codebooks else digest
        return shards

    def _codebooks(self, name: str) -> str:
        folder = quantizer_folder(self.folder, name)
        return Quantizer.load(self.workspace, folder).fingerprint if self.workspace.exists(folder) else ""

    def _sample(self, name: str) -> list[int]:
        """Shards with enough rows to fit codebooks."""
        wanted, numbers = self.sample, []
        for number in shard_order(self.workspace.n_shards(_kind(name)), SEED):
            if wanted <= 0:
                break
            if number in self._of(name):
                numbers.append(number)
                wanted -= self.inputs[name].count(self.workspace, number)
        return numbers

    def _fit(self, name: str, numbers: list[int]) -> None:
        config = self.config.id_config
        assert config is not None
        shards = VectorShards(self.workspace, self.folder, name)
        ids, vectors = shards.sample(self.sample, SEED, numbers)
        if len(ids):
            fit_codebooks(self.workspace, self.folder, name, ids, vectors, config)


def _kind(name: str) -> Kind:
    return cast(Kind, name.rpartition("-")[2])
