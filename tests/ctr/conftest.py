"""A toy world in which only a user's knowledge vector tells what the user likes."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from owlrec import schema
from owlrec.ctr.features import build_features
from owlrec.ctr.knowledge_tables import KnowledgeTable
from owlrec.ctr.trainer import TrainingData

N_USERS, N_ITEMS, DIM = 150, 20, 8


@dataclass(frozen=True)
class ToyWorld:
    """Users like even or odd items; which, stands in the sign of their vector's first component and nowhere else."""

    users: pa.Table
    items: pa.Table
    samples: pa.Table
    vectors: tuple[KnowledgeTable, KnowledgeTable]

    @property
    def data(self) -> TrainingData:
        """All sources hold the same vectors here; of older interest partitions there is one, a millisecond older."""
        features = build_features(self.users, self.items, self.samples, min_item_count=1)
        kind_tables = dict(zip(("user", "item"), self.vectors, strict=True))
        sources = {source: kind_tables for source in ("knowledge", "collective", "metadata")}
        partition = dataclasses.replace(self.vectors[0], as_of=np.full(N_USERS, -1))
        return TrainingData(features, {**sources, "streaming": {"user": partition}})


@pytest.fixture(scope="session")
def toy_world() -> ToyWorld:
    rng = np.random.default_rng(0)
    likes_even = rng.integers(0, 2, N_USERS)
    rows = []
    for user in range(N_USERS):
        split = "train" if user < 110 else "valid" if user < 130 else "test"
        for item in rng.permutation(N_ITEMS):
            history = rng.integers(0, N_ITEMS, rng.integers(0, 5)).tolist()
            label = float((item % 2 == 0) == bool(likes_even[user]))
            rows.append((user, int(item), label, 1, history, [3.0] * len(history), [1.0] * len(history), split))
    columns = [list(column) for column in zip(*rows, strict=True)]
    user_vectors = rng.normal(scale=0.1, size=(N_USERS, DIM))
    user_vectors[:, 0] = 2 * likes_even - 1
    item_vectors = rng.normal(size=(N_ITEMS, DIM))
    return ToyWorld(
        users=pa.table(
            {
                "user_id": pa.array(range(N_USERS), pa.int64()),
                "raw_id": [str(u) for u in range(N_USERS)],
                "gender": ["f", "m"] * (N_USERS // 2),
            }
        ),
        items=pa.table(
            {
                "item_id": pa.array(range(N_ITEMS), pa.int64()),
                "raw_id": [str(i) for i in range(N_ITEMS)],
                "title": [f"Film {i}" for i in range(N_ITEMS)],
                "genres": pa.array([["A", "B"][: 1 + i % 3 // 2] for i in range(N_ITEMS)], pa.list_(pa.string())),
            }
        ),
        samples=pa.table(columns, schema=schema.SAMPLES),
        vectors=(
            KnowledgeTable(np.arange(N_USERS), user_vectors.astype(np.float16), np.zeros(N_USERS, np.int64)),
            KnowledgeTable(np.arange(N_ITEMS), item_vectors.astype(np.float16)),
        ),
    )
