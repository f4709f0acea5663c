"""Feast's online server on its SQLite online store, with the rows of a Parquet file; runs in Feast's environment."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.types import Array, Float32, Int64, String
from feast.value_type import ValueType

CONFIG = """project: knowledge
provider: local
registry: registry.db
online_store: {type: sqlite, path: online.db}
entity_key_serialization_version: 3
"""
_ROWS_AT_ONCE = 5_000


def fill(rows: str, repo: Path) -> FeatureStore:
    """A feature repository whose online store holds the rows."""
    repo.mkdir()
    (repo / "feature_store.yaml").write_text(CONFIG)
    store = FeatureStore(repo_path=str(repo))
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    fields = [Field(name="text", dtype=String), Field(name="vector", dtype=Array(Float32))]
    source = FileSource(path=rows, timestamp_field="event_timestamp")
    view = FeatureView(
        name="knowledge",
        entities=[user],
        ttl=timedelta(days=0),
        schema=[Field(name="user_id", dtype=Int64), *fields],
        source=source,
    )
    store.apply([user, view])
    for batch in pq.ParquetFile(rows).iter_batches(_ROWS_AT_ONCE):
        frame: pd.DataFrame = batch.to_pandas()
        frame["event_timestamp"] = datetime.now(UTC)
        store.write_to_online_store("knowledge", df=frame)
    return store


if __name__ == "__main__":
    # max_requests: by default Feast ends its worker after every 1,000 requests, which would cost it most of its rate.
    fill(sys.argv[1], Path("feast")).serve(
        host="127.0.0.1", port=int(sys.argv[2]), max_requests=0, max_requests_jitter=0
    )
