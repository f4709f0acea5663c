"""The one leak rule: no sample reads what knows as much as itself, whatever was written, imported or refreshed."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.ctr.batches import SplitTensors, Tables
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import FeatureSchema, Grades, Vocabularies, encode_items, encode_samples
from owlrec.ctr.knowledge_tables import KnowledgeTable
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.encoding.inputs import Members, Resources
from owlrec.encoding.vectors import EncoderConfig, VectorShard
from owlrec.errors import SchemaError
from owlrec.ids import stable_id
from owlrec.schema import COHORTS, INTERACTIONS
from owlrec.sources.outcomes import Labels
from owlrec.sources.splits import SplitConfig, build_samples
from owlrec.workspace import Workspace

HOUR = 3_600_000
RULE = Labels(rule="rating_above", rating_above=3)
N_ITEMS = 6
ITEMS = pa.table({"item_id": np.arange(N_ITEMS), "raw_id": [""] * N_ITEMS, "title": [""] * N_ITEMS})
CUTS = st.lists(st.sampled_from(["half", "now", {"every": "1h"}, {"every": "3h"}]), min_size=1, unique_by=str)


@st.composite
def logs(draw: st.DrawFn) -> pa.Table:
    key = st.tuples(st.integers(1, 9), st.integers(0, N_ITEMS - 1), st.integers(1, 12))
    keys = draw(st.lists(key, min_size=12, max_size=80, unique=True))
    ratings = draw(st.lists(st.sampled_from([1.0, 5.0]), min_size=len(keys), max_size=len(keys)))
    rows = [(user, item, rating, hour * HOUR) for (user, item, hour), rating in zip(keys, ratings, strict=True)]
    names = ("user_id", "item_id", "rating", "timestamp")
    schema = pa.schema([INTERACTIONS.field(name) for name in names])
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), schema=schema)


def table_of(texts: set[tuple[int, int]]) -> KnowledgeTable:
    """A vector for each (id, as_of), which tells both: as_of in hours."""
    ids, as_of = np.array(sorted(texts), np.int64).reshape(-1, 2).T
    return KnowledgeTable(ids, np.c_[ids, as_of / HOUR].astype(np.float32), as_of)


def read_by(samples: pa.Table, users: KnowledgeTable, items: KnowledgeTable) -> tuple[np.ndarray, np.ndarray]:
    """What the model gets of each sample: as_of (ms) of the user's and of the item's text, -1 for the default."""
    none = pa.array([], pa.string())
    vocabularies = Vocabularies(pa.array(np.arange(N_ITEMS)), {}, FeatureSchema(), Grades(1, 5))
    catalog = encode_items([ITEMS], vocabularies)
    features = encode_samples(samples, pa.table({"user_id": none}), catalog, vocabularies, 5)
    tensors = SplitTensors(features, Tables((users,), (items,), item_ids=catalog.ids), "cpu")
    batch = tensors.batch(torch.arange(len(features)))
    # Similarities read texts about the items of the history, as of the sample, too.
    assert features.times is not None
    past = tensors._found(features.item_ids, features.history, features.times)[1][0]
    texts_at = items.vectors_at(past.reshape(-1))[:, 1].reshape(past.shape) * HOUR
    assert (np.where(past >= 0, np.rint(texts_at.astype(float)), -1) < features.times[:, None]).all()
    moments = []
    for ids, known in ((features.user_ids, batch.user), (features.item_ids, batch.item)):
        vectors, mask = known.vectors[known.rows][:, 0], known.mask[known.rows][:, 0]
        assert (vectors[mask][:, 0].numpy() == ids[mask.numpy()]).all()  # of nobody else
        moments.append(np.where(mask.numpy(), np.rint(vectors[:, 1].numpy() * HOUR), -1).astype(np.int64))
    return moments[0], moments[1]


@settings(max_examples=150, deadline=None)
@given(
    logs(),
    CUTS,
    st.sets(st.tuples(st.integers(1, 9), st.integers(1, 14)), max_size=20),
    st.sets(st.tuples(st.integers(0, N_ITEMS - 1), st.integers(0, 14)), max_size=10),
)
def test_no_sample_reads_a_text_as_late_as_itself(
    log: pa.Table, cuts: list[Any], imported: set[tuple[int, int]], refreshed: set[tuple[int, int]]
) -> None:
    """imported: users and hours of texts from elsewhere; refreshed: items and hours of renewed ones."""
    try:
        tables = build_samples(log, SplitConfig(cuts=tuple(cuts), llm_history=3), RULE)
    except SchemaError:
        return
    texts = set(zip(*(tables.histories[c].to_pylist() for c in ("user_id", "as_of")), strict=True))
    times = {(row["user_id"], row["item_id"], row["timestamp"]) for row in log.to_pylist()}
    for row in tables.histories.to_pylist():  # a text knows nothing later than it says
        assert all(
            any((row["user_id"], i, t) in times for t in range(HOUR, row["as_of"] + 1, HOUR)) for i in row["items"]
        )
    texts |= {(user, hour * HOUR) for user, hour in imported}
    item_texts = {(item, 0) for item in range(N_ITEMS)} | {(item, hour * HOUR) for item, hour in refreshed}
    user_as_of, item_as_of = read_by(tables.samples, table_of(texts), table_of(item_texts))
    rows = tables.samples.select(["user_id", "item_id", "timestamp"]).to_pylist()
    for row, user_text, item_text in zip(rows, user_as_of.tolist(), item_as_of.tolist(), strict=True):
        for known, id_, as_of in ((texts, row["user_id"], user_text), (item_texts, row["item_id"], item_text)):
            assert as_of == max([t for i, t in known if i == id_ and t < row["timestamp"]], default=-1)


@settings(max_examples=50, deadline=None)
@given(
    st.sets(st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from("abc")), min_size=1, max_size=12),
    st.sets(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=9),
)
def test_members_read_no_cohort_s_text_before_it_was_written_nor_before_they_joined(
    joined: set[tuple[int, int, str]], written: set[tuple[str, int]]
) -> None:
    workspace = Workspace(f"memory://{np.random.default_rng().integers(2**62)}")
    workspace.fix_shards({"user": 1, "cohort": 1})
    rows = [
        {"kind": "user", "id": user, "as_of": as_of, "cohort": cohort, "facet": "liked", "source": "", "distance": 0.0}
        for user, as_of, cohort in sorted(joined)
    ]
    workspace.write_parquet("c/user/00000000.parquet", pa.Table.from_pylist(rows, schema=COHORTS))
    ids, as_of = np.array(sorted((stable_id(name), moment) for name, moment in written), np.int64).T
    place = {stable_id(name): at for at, name in enumerate("abc")}
    vectors = np.zeros((len(ids), 30), np.float16)  # a component for each cohort and moment
    for row, (id_, moment) in enumerate(zip(ids.tolist(), as_of.tolist(), strict=True)):
        vectors[row, 10 * place[id_] + moment] = 1
    digests = np.random.default_rng(0).integers(0, 256, (len(ids), 16)).astype(np.uint8)
    shard = VectorShard("cohort", ids, as_of, vectors, digests, np.zeros((len(ids), 0), np.uint16)).table()
    workspace.write_arrow("v/knowledge-cohort/00000000.arrow", shard, shard.schema)
    members = Members("c", "v", "user").rows(Resources(workspace, EncoderConfig(model="hashing")), 0)
    made = members.make(np.arange(len(members.ids)))
    table = KnowledgeTable(members.ids, made.astype(np.float32), members.as_of)
    for user in range(1, 5):
        for moment in range(1, 12):
            vector, _ = table.gather(np.array([user]), np.array([moment]))
            since = max([t for u, t, _ in joined if u == user and t < moment], default=None)
            cohorts = {c for u, t, c in joined if (u, t) == (user, since)}
            newest = {c: max([t for name, t in written if name == c and t < moment], default=None) for c in cohorts}
            expected = {10 * "abc".index(c) + t for c, t in newest.items() if t is not None}
            read = set(np.flatnonzero(vector[0]).tolist())
            allowed = {c for u, t, c in joined if u == user and t < moment}
            assert all("abc"[at // 10] in allowed and at % 10 < moment for at in read)
            if expected:  # else the text of a cohort that the user has left serves on
                assert read == expected


def test_a_text_that_states_the_label_moves_no_auc(toy_world: Any) -> None:
    """Of each user the vector says what they like, as of the very moment of their samples: nobody reads it. A moment
    earlier all do.
    """
    users, items = toy_world.vectors
    config = CTRConfig(batch_size=64, learning_rate=0.01, epochs=4, embed_dim=8, hidden_dims=(16, 8))
    auc = {}
    for name, as_of in (("leaked", 1), ("earlier", 0)):
        moments = np.full(len(users), as_of)
        moments[:3] = 0  # an arm that nobody reads would be refused
        table = dataclasses.replace(users, as_of=moments)
        data = TrainingData(toy_world.data.features, {"knowledge": {"user": table, "item": items}})
        auc[name] = train_one(Trial(backbone="din", arm="knowledge", seed=0), data, config).result.test.auc
    data = TrainingData(toy_world.data.features, {"knowledge": {"user": users, "item": items}})
    auc["none"] = train_one(Trial(backbone="din", arm="none", seed=0), data, config).result.test.auc
    assert auc["earlier"] > 0.95
    assert auc["leaked"] == pytest.approx(auc["none"], abs=0.05)
