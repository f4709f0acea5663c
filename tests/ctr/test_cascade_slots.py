"""A sample's slots of a user's texts: the newest ones that are strictly earlier, however they are stored."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from owlrec.ctr.batches import SplitTensors, Tables
from owlrec.ctr.dataset import open_tables
from owlrec.ctr.experiment import Trial
from owlrec.ctr.features import Histories, SampleFeatures
from owlrec.ctr.knowledge_tables import KnowledgeTable, MappedTable, VectorTable, cascade_slots
from owlrec.ctr.trainer import tables_of
from owlrec.encoding.vectors import PARTITIONS, VectorShard, VectorShards, partitions_folder
from owlrec.ids import shard_of
from owlrec.workspace import Workspace, shard_file

IDS = np.array([1, 1, 1, 1, 2, 5, 5])
AS_OF = np.array([10, 20, 30, 40, 15, 7, 8])
VECTORS = np.arange(1, 8, dtype=np.float16)[:, None] * np.ones(2, dtype=np.float16)


def store(workspace: Workspace, name: str = PARTITIONS, later: int = 0) -> str:
    """The rows above in four shards, each so many ms later."""
    folder = partitions_folder("minilm")
    workspace.fix_shards({"user": 4})
    for number in range(4):
        mine = shard_of(IDS, 4) == number
        digests, codes = np.zeros((mine.sum(), 16), np.uint8), np.zeros((mine.sum(), 0), np.uint16)
        table = VectorShard("user", IDS[mine], AS_OF[mine] + later, VECTORS[mine], digests, codes).table()
        workspace.write_arrow(f"{folder}/{name}/{shard_file(number, '.arrow')}", table, table.schema)
    return folder


@pytest.fixture(params=["held", "mapped"])
def partitions(request: pytest.FixtureRequest, workspace: Workspace) -> VectorTable:
    if request.param == "held":
        return KnowledgeTable(IDS, VECTORS, AS_OF)
    return MappedTable(VectorShards(workspace, store(workspace), PARTITIONS))


RUNS = KnowledgeTable(np.array([1, 1, 2, 8]), np.full((4, 2), 50, np.float16), np.array([5, 25, 99, 1]))


def read(partitions: VectorTable, ids: list[int], before: list[int] | None) -> list[list[float]]:
    """The first components of what the slots read of each id, 0 for nothing, 50 for a text of a whole run."""
    moments = None if before is None else np.array(before)
    slots = cascade_slots(RUNS, partitions)
    return np.stack([s.vectors_at(s.find(np.array(ids), moments))[:, 0] for s in slots], axis=1).tolist()


def test_slots_read_the_newest_texts_before_a_sample_of_runs_and_partitions(partitions: VectorTable) -> None:
    assert read(partitions, [1, 1, 1, 1, 1, 2, 3, 5, 8], [41, 40, 25, 10, 5, 16, 99, 8, 2]) == [
        [4, 3, 50, 2], [3, 50, 2, 1], [2, 1, 50, 0], [50, 0, 0, 0], [0, 0, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0],
        [6, 0, 0, 0], [50, 0, 0, 0],
    ]  # fmt: skip
    assert read(partitions, [1, 2, 5], None) == [[4, 3, 50, 2], [50, 5, 0, 0], [7, 6, 0, 0]]


def test_users_of_either_have_a_text() -> None:
    table = KnowledgeTable(IDS, VECTORS, AS_OF)
    assert cascade_slots(RUNS, table)[0].gather(np.array([1, 2, 3, 5, 8]))[1].tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]


rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), unique=True, max_size=12)


@given(rows, rows, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 10)), max_size=8))
def test_no_sample_reads_a_text_of_its_moment_or_later(
    runs: list[tuple[int, int]], kept: list[tuple[int, int]], samples: list[tuple[int, int]]
) -> None:
    tables = []
    for keys in (runs, kept):
        table = np.array(sorted(keys), dtype=np.int64).reshape(-1, 2)
        tables.append(KnowledgeTable(table[:, 0], np.ones((len(table), 1), np.float16), table[:, 1]))
    asked = np.array(samples, dtype=np.int64).reshape(-1, 2)
    for older, slot in enumerate(cascade_slots(*tables)):
        places = slot.find(asked[:, 0], asked[:, 1])
        moments = np.full(len(places), -1)
        moments[places >= 0] = slot.as_of_at(places[places >= 0])
        for (id_, moment), as_of in zip(samples, moments.tolist(), strict=True):
            earlier = sorted({at for other, at in (*runs, *kept) if other == id_ and at < moment})
            assert as_of == (earlier[-1 - older] if len(earlier) > older else -1)


def test_the_arm_streaming_reads_partitions_and_what_it_reads_differs_from_knowledge(workspace: Workspace) -> None:
    folder = store(workspace)
    store(workspace, "knowledge-user", later=1)
    workspace.fix_shards({"item": 1})
    digests, codes = np.zeros((1, 16), np.uint8), np.zeros((1, 0), np.uint16)
    table = VectorShard("item", np.array([9]), np.array([0]), VECTORS[:1], digests, codes).table()
    workspace.write_arrow(f"{folder}/knowledge-item/{shard_file(0, '.arrow')}", table, table.schema)
    given_ = open_tables(workspace, {"knowledge": {"user": folder, "item": folder}, "streaming": {"user": folder}})
    masks = {}
    for arm in ("knowledge", "streaming"):
        tables = tables_of(Trial.model_validate({"backbone": "din", "arm": arm, "seed": 0}), given_, np.array([9]))
        assert isinstance(tables, Tables)
        none = np.zeros(0, np.int32)
        histories = Histories(np.zeros(2, np.int64), np.zeros(2, np.int32), none, none, 1)
        samples = SampleFeatures(
            np.array([1, 2]), np.array([9, 9]), np.zeros(2, np.int32), histories, np.zeros((2, 0, 1), np.int32),
            np.zeros((2, 0), np.float32), np.zeros(2, np.float32), np.array([25, 15]),
        )  # fmt: skip
        user = SplitTensors(samples, tables, "cpu").batch(torch.arange(2)).user
        assert user is not None
        masks[arm] = user.mask[user.rows].tolist()
    assert masks["knowledge"] == [[True], [False]]
    assert masks["streaming"] == [[True] * 4, [False] * 4]  # of user 1 both tables have two
