"""The vectors by which behaviours are compared with a candidate: item texts encoded, projected, and looked up by id.

ReLLa pools the LLM's own last layer (ranking.item_vectors: llm). A sentence encoder, the default, was trained to tell
texts apart, costs a fraction, and stays the same where the ranker's model changes.
"""

import hashlib

from owlrec.encoding.encoder import Encoder, EncoderConfig, encoder_identity
from owlrec.encoding.vectors import encode_texts, item_metadata
from owlrec.ranking.last_layer import LastLayerConfig, LastLayerEncoder
from owlrec.ranking.projection import Projection, ProjectionConfig, fit_projection
from owlrec.ranking.retrieval import BehaviourRetriever
from owlrec.workspace import Workspace, fingerprint


def item_retriever(
    workspace: Workspace, encoder: EncoderConfig | LastLayerConfig, projection: ProjectionConfig
) -> BehaviourRetriever:
    """The retriever over the workspace's items. encoder: as RankingConfig.item_encoder chooses it.

    Encoded and fitted at the first call; a later one with the same items and settings reads what that wrote.
    """
    items = workspace.read_table("items")
    ids, texts = item_metadata(items)
    content = hashlib.sha256("\0".join([*map(str, ids.tolist()), *texts]).encode()).hexdigest()
    print_ = fingerprint(content, item_encoder_identity(encoder), projection)
    folder = f"ranking/items-{print_[:16]}"
    if not workspace.exists(folder, "projection.json"):
        loaded = LastLayerEncoder(encoder) if isinstance(encoder, LastLayerConfig) else Encoder(encoder)
        table = encode_texts("item", ids, texts, loaded)
        vectors = table["vector"].combine_chunks()
        matrix = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(table), vectors.type.list_size)
        workspace.write_parquet(f"{folder}/vectors.parquet", table)
        fit_projection(matrix, projection).save(workspace, folder, print_)
    fitted = Projection.load(workspace, folder, print_)
    return BehaviourRetriever.from_table(workspace.read_parquet(f"{folder}/vectors.parquet"), fitted)


def item_encoder_identity(encoder: EncoderConfig | LastLayerConfig) -> str:
    """What the vectors depend on, for fingerprints."""
    return encoder.identity if isinstance(encoder, LastLayerConfig) else encoder_identity(encoder)
