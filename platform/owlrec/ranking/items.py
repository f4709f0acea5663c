"""The vectors by which behaviours are compared with a candidate: item texts encoded, projected, and looked up by id.

ReLLa pools the LLM's own last layer (ranking.item_vectors: llm). A sentence encoder, the default, was trained to tell
texts apart, costs a fraction, and stays the same where the ranker's model changes.
"""

import hashlib

from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.projection import Projection, ProjectionConfig, fit_projection
from owlrec.encoding.vectors import encode_texts, item_metadata
from owlrec.ranking.last_layer import LastLayerConfig
from owlrec.ranking.retrieval import BehaviourRetriever
from owlrec.schema import vector_matrix
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace


def item_retriever(
    workspace: Workspace, encoder: EncoderConfig | LastLayerConfig, projection: ProjectionConfig
) -> BehaviourRetriever:
    """The retriever over the workspace's items. encoder: as RankingConfig.item_encoder chooses it.

    Encoded and fitted at the first call; a later one with the same items and settings reads what that wrote.
    """
    items = workspace.read_table("items")
    ids, texts = item_metadata(items)
    content = hashlib.sha256("\0".join([*map(str, ids.tolist()), *texts]).encode()).hexdigest()
    print_ = fingerprint(content, encoder.identity, projection)
    folder = f"ranking/items-{print_[:16]}"
    if not workspace.exists(folder, "projection.json"):
        table = encode_texts("item", ids, texts, encoder.load())
        workspace.write_parquet(f"{folder}/vectors.parquet", table)
        fit_projection(vector_matrix(table), projection).save(workspace, folder, print_)
    fitted = Projection.load(workspace, folder, print_)
    return BehaviourRetriever.from_table(workspace.read_parquet(f"{folder}/vectors.parquet"), fitted)
