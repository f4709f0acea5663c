"""Members of cohorts read the text that their cohort had at the moment, and the cohort that they were in."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.encoding.inputs import Members, Resources, Rows
from owlrec.encoding.vectors import EncoderConfig, VectorShard
from owlrec.ids import stable_id
from owlrec.schema import COHORTS
from owlrec.workspace import Workspace

A, B, D = (stable_id(name) for name in "abd")
TEXTS = {A: {10: [1, 0], 30: [0, 1]}, B: {5: [3, 4]}, D: {10: [4, 3]}}  # cohort -> as_of -> vector


def membership(user: int, cohort: str, as_of: int, facet: str = "liked") -> dict[str, Any]:
    return {"kind": "user", "id": user, "as_of": as_of, "cohort": cohort, "facet": facet, "source": "", "distance": 0}


def rows_of(tmp_path: Path, cohorts: list[dict[str, Any]], *, disliked: bool = False) -> Rows:
    workspace = Workspace(tmp_path)
    workspace.fix_shards({"user": 1, "cohort": 1})
    workspace.write_parquet("c/user/00000000.parquet", pa.Table.from_pylist(cohorts, schema=COHORTS))
    keys = sorted((id_, as_of) for id_, moments in TEXTS.items() for as_of in moments)
    ids, as_of = np.array(keys).T
    vectors = np.array([TEXTS[key][moment] for key, moment in keys], np.float16)
    digests = np.arange(16 * len(keys), dtype=np.uint8).reshape(-1, 16)
    shard = VectorShard("cohort", ids, as_of, vectors, digests, np.zeros((len(keys), 0), np.uint16)).table()
    workspace.write_arrow("v/knowledge-cohort/00000000.arrow", shard, shard.schema)
    return Members("c", "v", "user", disliked).rows(Resources(workspace, EncoderConfig(model="hashing")), 0)


def test_a_member_gets_a_row_where_the_text_or_the_cohort_changes(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [membership(1, "a", 7), membership(2, "a", 12), membership(2, "b", 20)])
    assert list(zip(rows.ids.tolist(), rows.as_of.tolist(), strict=True)) == [(1, 10), (1, 30), (2, 12), (2, 20)]
    vectors = rows.make(np.arange(4))
    np.testing.assert_allclose(vectors, [[1, 0], [0, 1], [1, 0], [0.6, 0.8]], atol=1e-3)
    np.testing.assert_allclose(rows.make(np.array([3, 1])), vectors[[3, 1]])
    assert (rows.digests[0] == rows.digests[2]).all()  # made of one text
    assert len(np.unique(rows.digests, axis=0)) == 3


def test_what_users_disliked_is_a_source_of_its_own(tmp_path: Path) -> None:
    cohorts = [membership(1, "b", 8), membership(1, "d", 8, "disliked"), membership(2, "unwritten", 8)]
    liked, disliked = rows_of(tmp_path, cohorts), rows_of(tmp_path, cohorts, disliked=True)
    np.testing.assert_allclose(liked.make(np.array([0])), [[0.6, 0.8]], atol=1e-3)
    np.testing.assert_allclose(disliked.make(np.array([0])), [[0.8, 0.6]], atol=1e-3)
    assert (liked.ids.tolist(), disliked.ids.tolist()) == ([1], [1])
    assert (liked.as_of.tolist(), disliked.as_of.tolist()) == ([8], [10])
