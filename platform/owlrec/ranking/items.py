"""The vectors by which behaviors are compared with a candidate: item texts encoded by shard, projected, found by id.

ReLLa pools the LLM's own last layer (ranking.item_vectors: llm). A sentence encoder, the default, was trained to tell
texts apart, costs a fraction, and stays the same where the ranker's model changes; where `encode` has written the
vectors of the same texts, they are read from there.
"""

from dataclasses import dataclass

import numpy as np

from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.inputs import ItemMetadata, Resources
from owlrec.encoding.projection import Projection, ProjectionConfig, fit_projection
from owlrec.encoding.stage import EncodeStage
from owlrec.encoding.vector_shards import VectorShards
from owlrec.ranking.last_layer import LastLayerConfig
from owlrec.ranking.retrieval import BehaviourRetriever
from owlrec.runner import Pool, run_stage
from owlrec.shards import Shard, finished_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

_NAME = "metadata-item"  # as `encode` names the vectors of titles and attributes


@dataclass(frozen=True)
class ItemVectors:
    """The vectors of all items on disk, and the space in which they are compared."""

    shards: VectorShards
    projection: Projection

    @classmethod
    def encoded(
        cls,
        workspace: Workspace,
        encoder: EncoderConfig | LastLayerConfig,
        projection: ProjectionConfig,
        pool: Pool | None = None,
    ) -> "ItemVectors":
        """Of the workspace's items. encoder: as RankingConfig.item_encoder chooses it.

        A later call encodes the items whose texts have changed since; the projection is fitted once for these items
        and settings, on a bounded sample.
        """
        texts = ItemMetadata()
        digests = texts.digests(workspace)
        folder = _of_encode(workspace, encoder) or f"ranking/items-{fingerprint(encoder.identity)[:16]}"
        if folder.startswith("ranking/"):
            resources = Resources(workspace, encoder)  # type: ignore[arg-type] # either loads and is named alike
            stage = EncodeStage(folder, resources, {_NAME: texts})
            run_stage(workspace, stage, {Shard(_NAME, number): digest for number, digest in digests.items()}, pool)
        shards = VectorShards(workspace, folder, _NAME)
        fitted_for = fingerprint(encoder.identity, projection, digests)
        kept = f"ranking/projections/{fitted_for[:16]}"
        if not workspace.exists(kept, "projection.json"):
            _, vectors = shards.sample(projection.fit_items, projection.seed)
            fit_projection(vectors, projection).save(workspace, kept, fitted_for)
        return cls(shards, Projection.load(workspace, kept, fitted_for))

    def retriever(self, items: np.ndarray | None = None) -> BehaviourRetriever:
        """Over some items (int64 [n], any order, repeats allowed), or over all of them for None, in memory."""
        if items is not None:
            ids = np.unique(items)
            vectors, mask = self.shards.gather(ids)
            return BehaviourRetriever(ids[mask], self.projection.apply(vectors[mask]))
        all_ids, projected = [np.zeros(0, np.int64)], [np.zeros((0, len(self.projection.directions)), np.float32)]
        for number in self.shards.numbers:
            if (shard := self.shards.shard(number)) is not None:
                all_ids.append(np.array(shard.ids))  # a view would hold the file open
                projected.append(self.projection.apply(shard.vectors))
        order = np.argsort(np.concatenate(all_ids), kind="stable")
        return BehaviourRetriever(np.concatenate(all_ids)[order], np.concatenate(projected)[order])


def item_retriever(
    workspace: Workspace, encoder: EncoderConfig | LastLayerConfig, projection: ProjectionConfig
) -> BehaviourRetriever:
    """The retriever over all of the workspace's items; arguments: see ItemVectors.encoded."""
    return ItemVectors.encoded(workspace, encoder, projection).retriever()


def _of_encode(workspace: Workspace, encoder: EncoderConfig | LastLayerConfig) -> str | None:
    """Where `encode` has put item vectors of this encoder; its card is forgotten when tables are prepared again."""
    card = finished_stage(workspace, "encode")
    if card is None or not workspace.exists(card.outputs["vectors"], _NAME):
        return None
    shards = VectorShards(workspace, card.outputs["vectors"], _NAME)
    first = shards.shard(shards.numbers[0])
    return card.outputs["vectors"] if first is not None and first.encoder == encoder.identity else None
