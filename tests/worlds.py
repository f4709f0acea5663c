"""Writes toy worlds into workspaces, in the form that `prepare` and `encode` leave them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec import schema
from owlrec.ctr.knowledge_tables import KnowledgeTable
from owlrec.encoding.vectors import VectorShard
from owlrec.ids import shard_of
from owlrec.workspace import Workspace, shard_file, table_file


def write_world(workspace: Workspace, world: Any, n_shards: int = 2) -> None:
    """Users, items and samples, and as interactions the histories of the samples, one after the other."""
    workspace.write_table("users", world.users, key="user_id", n_shards=n_shards)
    workspace.write_table("items", world.items, key="item_id", n_shards=n_shards)
    write_samples(workspace, world.samples)


def write_samples(workspace: Workspace, samples: pa.Table) -> None:
    """samples: schema.SAMPLES. The users' shards must be fixed."""
    n_shards = workspace.n_shards("user")
    samples = samples.sort_by("user_id")
    shards = shard_of(samples["user_id"].to_numpy(), n_shards)
    for number in range(n_shards):
        rows = samples.take(np.flatnonzero(shards == number))
        history, ratings, labels = (
            rows[column].combine_chunks() for column in ("history", "history_ratings", "history_labels")
        )
        lengths = pc.list_value_length(history).to_numpy()
        ends = np.cumsum(lengths)
        columns = {
            "user_id": np.repeat(rows["user_id"].to_numpy(), lengths),
            "item_id": pc.list_flatten(history),
            "rating": pc.list_flatten(ratings),
            "timestamp": np.arange(lengths.sum()),
            "label": np.ones(lengths.sum()) if labels.null_count else pc.list_flatten(labels),
            "split": pa.nulls(int(lengths.sum())),
            "weight": np.ones(lengths.sum()),
        }
        interactions = pa.table(columns).cast(schema.INTERACTIONS)
        stored = {name: rows[name] for name in schema.SAMPLE_ROWS.names if name in rows.column_names}
        stored |= {"history_start": ends - lengths, "history_end": ends}
        stored |= {"weight": rows["weight"] if "weight" in rows.column_names else np.ones(len(rows))}
        workspace.write_parquet(
            table_file("samples", number), pa.table(stored).select(schema.SAMPLE_ROWS.names).cast(schema.SAMPLE_ROWS)
        )
        workspace.write_parquet(table_file("interactions", number), interactions)


def write_vectors(workspace: Workspace, folder: str, name: str, table: KnowledgeTable) -> None:
    """A table as the shards <folder>/<name>; an empty shard has no file. name: <source>-<kind>."""
    kind = name.rpartition("-")[2]
    n_shards = workspace.n_shards(kind)  # type: ignore[arg-type]
    shards = shard_of(table.ids, n_shards)
    for number in np.unique(shards).tolist():
        rows = shards == number
        n = int(rows.sum())
        codes = np.zeros((n, 0), np.uint16)
        if table.codes is not None:
            codes = np.column_stack([table.codes[rows], np.zeros(n, np.uint16)]).astype(np.uint16)
        shard = VectorShard(
            kind,
            table.ids[rows],
            np.zeros(n, np.int64),
            table.vectors[rows],
            np.zeros((n, 16), np.uint8),
            codes,
            encoder="e",
        ).table()
        workspace.write_arrow(f"{folder}/{name}/{shard_file(number, '.arrow')}", shard, shard.schema)
