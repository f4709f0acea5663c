"""Encoding all shards of all sources: first a bounded sample, on which codebooks are fitted, then the rest.

Shards that were encoded before their codebooks existed are passed over once more: their vectors are kept, codes are
added. Later runs code with the same codebooks, whatever has been added meanwhile; where a folder of `quantisers/` was
deleted, they are fitted again and every vector of that source and kind is coded again, without the encoder.
"""

from collections.abc import Callable, Mapping
from typing import cast

from owlrec.encoding.coded_vectors import CODED_KINDS, CODED_SOURCES, fit_codebooks, quantiser_folder, read_reports
from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.inputs import Input, Members, Resources
from owlrec.encoding.semantic_ids import Quantiser
from owlrec.encoding.stage import EncodeStage
from owlrec.encoding.vector_shards import VectorShards, shard_order
from owlrec.runner import Pool, run_stage
from owlrec.schema import Kind
from owlrec.shards import Artifact, Card, Shard
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

COHORTS = "knowledge-cohort"  # which members' vectors are made from: encoded before them


class EncodingJob:
    """What to encode into a folder of vectors."""

    def __init__(self, workspace: Workspace, folder: str, config: EncoderConfig, inputs: Mapping[str, Input]) -> None:
        """inputs: by `<source>-<kind>`."""
        self.workspace, self.folder, self.config, self.inputs = workspace, folder, config, inputs
        self._cards: dict[str, Card] | None = None  # of all shards that were encoded: listed once
        self._digests: dict[str, dict[int, str]] = {}

    def pending(self) -> bool:
        """Whether a shard is still to be encoded or coded. Loads no encoder."""
        shards = self._all()
        return bool(self._unfitted()) or len(self._done(shards)) < len(shards)

    def run(self, pool: Pool, on_card: Callable[[Card], None] | None = None) -> dict[str, Card]:
        """Encodes what is pending; the cards of all shards, by name (`knowledge-user/00000012`).

        on_card: see run_stage. Raises OwlRecError as the stage does.
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
        """Where the config has it run: in this process, or on Ray where it asks for replicas or GPUs."""
        config = self.config
        return Pool(
            here=config.replicas == 1 and not config.gpus,
            min_workers=config.replicas,
            max_workers=config.replicas,
            cpus=config.threads or 1,
            gpus=config.gpus,
            log_path=log_path,
        )

    def counts(self, cards: Mapping[str, Card]) -> dict[str, float | int | str]:
        """Vectors by `<source>_<kind>`, their dimension, and the figures of their codes. cards: what `run` returned."""
        counts: dict[str, float | int | str] = {}
        for name, card in cards.items():
            table = Shard.of_name(name).kind.replace("-", "_")
            counts[table] = int(counts.get(table, 0)) + card.rows_out
        if cards:
            counts["dim"] = VectorShards(self.workspace, self.folder, Shard.of_name(next(iter(cards))).kind).dim
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
        """The cards of those shards that are made of these inputs."""
        if self._cards is None:
            self._cards = Artifact(self.workspace, self.folder).cards()
        cards = {shard.name: self._cards.get(shard.name) for shard in shards}
        digests = {shard.name: digest for shard, digest in shards.items()}
        return {name: card for name, card in cards.items() if card and card.fingerprint == digests[name]}

    def _unfitted(self) -> list[str]:
        """The inputs whose vectors get codes but have no codebooks yet."""
        coded = [f"{source}-{kind}" for source in CODED_SOURCES for kind in CODED_KINDS]
        if self.config.semantic_ids is None:
            return []
        return [n for n in coded if n in self.inputs and not self.workspace.exists(quantiser_folder(self.folder, n))]

    def _of(self, name: str) -> dict[int, str]:
        """The digests of an input's shards."""
        if isinstance(self.inputs[name], Members):  # made from vectors that this very job may replace
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
        folder = quantiser_folder(self.folder, name)
        return Quantiser.load(self.workspace, folder).fingerprint if self.workspace.exists(folder) else ""

    def _sample(self, name: str) -> list[int]:
        """Shards that hold as many rows as codebooks are fitted on."""
        assert self.config.semantic_ids is not None
        wanted, numbers = self.config.semantic_ids.train_sample, []
        for number in shard_order(self.workspace.n_shards(_kind(name)), self.config.semantic_ids.seed):
            if wanted <= 0:
                break
            if number in self._of(name):
                numbers.append(number)
                wanted -= self.inputs[name].count(self.workspace, number)
        return numbers

    def _fit(self, name: str, numbers: list[int]) -> None:
        config = self.config.semantic_ids
        assert config is not None
        shards = VectorShards(self.workspace, self.folder, name)
        ids, vectors = shards.sample(config.train_sample, config.seed, numbers)
        if len(ids):
            fit_codebooks(self.workspace, self.folder, name, ids, vectors, config)


def _kind(name: str) -> Kind:
    return cast(Kind, name.rpartition("-")[2])
