"""The embedded store: what is written reads back, misses stay aligned, and doubled or null rows are refused."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.errors import ReleaseError, SchemaError
from owlrec.releases import lmdb_writer
from owlrec.releases.lmdb_store import LmdbStore, decode_key, encode_key
from owlrec.releases.lmdb_writer import LmdbWriter
from owlrec.schema import KNOWLEDGE, vectors_schema

LARGEST = 2**63 - 1


def knowledge(rows: list[tuple[str, int, int, str]]) -> pa.Table:
    """Rows (kind, id, as_of, text) as a knowledge table."""
    defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    return pa.Table.from_pylist(
        [{**defaults, "kind": k, "id": i, "as_of": a, "text": t, "quality": "ok"} for k, i, a, t in rows], KNOWLEDGE
    )


def vectors(kind: str, ids: list[int], rows: list[list[float]]) -> pa.Table:
    """A vectors table of one kind."""
    arrays = [np.array(row, dtype=np.float16) for row in rows]
    return pa.table(
        {"kind": [kind] * len(ids), "id": ids, "vector": arrays, "codes": [[]] * len(ids)},
        schema=vectors_schema(len(rows[0])),
    )


def written(path: Path, *tables: pa.Table, vector_tables: tuple[pa.Table, ...] = ()) -> LmdbStore:
    writer = LmdbWriter(path)
    for table in tables:
        writer.add_knowledge(table, name="given")
    for table in vector_tables:
        writer.add_vectors(table, name="given")
    writer.close()
    return LmdbStore(path, dim=writer.dim, counts=writer.counts["knowledge"])


@settings(max_examples=40)
@given(
    rows=st.dictionaries(
        st.tuples(st.sampled_from(["user", "item", "cohort"]), st.integers(0, LARGEST)),
        st.tuples(st.integers(-(2**63), LARGEST), st.text()),
        min_size=1,
        max_size=30,
    ),
    cut=st.integers(0, 30),
)
def test_what_is_written_in_any_order_reads_back(tmp_path_factory, rows, cut):
    flat = [(kind, id_, as_of, text) for (kind, id_), (as_of, text) in rows.items()]
    path = tmp_path_factory.mktemp("store") / "s.lmdb"
    with written(path, knowledge(flat[:cut]), knowledge(flat[cut:])) as store:
        for kind, id_, as_of, text in flat:
            [found] = store.get(kind, [id_])
            assert (found.kind, found.id, found.as_of, found.text, found.quality) == (kind, id_, as_of, text, "ok")
        for kind in ("user", "item", "cohort"):
            expected = sorted(id_ for k, id_ in rows if k == kind)
            assert store.count(kind) == len(expected)
            assert store.ids(kind).tolist() == expected


@given(st.lists(st.integers(0, LARGEST), min_size=2), st.sampled_from(["user", "item", "cohort"]))
def test_keys_sort_like_their_ids(ids, kind):
    assert [decode_key(key) for key in sorted(encode_key(kind, i) for i in ids)] == [(kind, i) for i in sorted(ids)]


def test_misses_stay_aligned(tmp_path):
    store = written(
        tmp_path / "s.lmdb",
        knowledge([("user", 5, 1, "five"), ("item", 7, 1, "a film")]),
        vector_tables=(vectors("user", [5], [[0.5, -2.0]]),),
    )
    found = store.get("user", [7, 5, LARGEST, 5])
    assert [k and k.text for k in found] == [None, "five", None, "five"]  # 7 is an item, no user
    rows, mask = store.vectors("user", np.array([7, 5, 6]))
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0, 0], [0.5, -2.0], [0, 0]]
    assert mask.tolist() == [False, True, False]
    assert store.get("user", []) == []
    store.close()
    store.close()


def test_unknown_kind_is_refused_with_a_hint(tmp_path):
    store = written(tmp_path / "s.lmdb", knowledge([("user", 5, 1, "five")]))
    with store, pytest.raises(ReleaseError, match="Did you mean 'item'"):
        store.get("itm", [1])


def test_two_stores_on_one_file_outlive_each_other(tmp_path):
    first = written(tmp_path / "s.lmdb", knowledge([("user", 5, 1, "five")]))
    second = LmdbStore(tmp_path / "s.lmdb", dim=0, counts={"user": 1})
    first.close()
    assert second.get("user", [5])[0].text == "five"
    second.close()


@pytest.mark.parametrize("across", [False, True])
def test_a_doubled_key_is_named(tmp_path, across):
    one, two = [("user", 1, 1, "a"), ("item", 4, 1, "b")], [("item", 4, 1, "b"), ("user", 9, 1, "c")]
    writer = LmdbWriter(tmp_path / "s.lmdb")
    if across:
        writer.add_knowledge(knowledge(one), name="given")
    with pytest.raises(SchemaError, match="item 4 occurs twice in the knowledge"):
        writer.add_knowledge(knowledge(two if across else one + two), name="given")
    writer.close()


def test_null_text_and_mixed_vector_lengths_are_refused(tmp_path):
    writer = LmdbWriter(tmp_path / "s.lmdb")
    broken = knowledge([("user", 1, 1, "a"), ("user", 2, 1, "b")])
    broken = broken.set_column(3, "text", pa.array(["a", None]))
    with pytest.raises(SchemaError, match="row 1: text is null"):
        writer.add_knowledge(broken, name="given")
    writer.add_vectors(vectors("user", [1], [[1.0, 2.0]]), name="given")
    with pytest.raises(SchemaError, match="3 components, earlier ones 2"):
        writer.add_vectors(vectors("user", [2], [[1.0, 2.0, 3.0]]), name="given")
    writer.close()


def test_the_map_grows_and_shards_by_hash_are_all_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_writer, "_FIRST_MAP_BYTES", 1 << 16)
    monkeypatch.setattr(lmdb_writer, "_ROWS_A_TRANSACTION", 64)
    text = "x" * 3000
    shards = [knowledge([("user", i, i, f"{i}{text}") for i in range(start, 900, 3)]) for start in (2, 0, 1)]
    with written(tmp_path / "s.lmdb", *shards) as store:
        assert (tmp_path / "s.lmdb").stat().st_size > 900 * 3000
        assert store.ids("user").tolist() == list(range(900))
        assert [k.text for k in store.get("user", [0, 450, 899])] == [f"0{text}", f"450{text}", f"899{text}"]


def test_the_sample_for_verification_is_bounded_and_spread(monkeypatch):
    monkeypatch.setattr(lmdb_writer, "_SAMPLE", 10)
    sample = lmdb_writer._Sample()
    for start in range(0, 1000, 7):
        sample.add([(b"%d" % i, b"") for i in range(start, min(start + 7, 1000))])
    kept = [int(key) for key, _ in sample.rows]
    assert 10 <= len(kept) <= 20
    assert kept == list(range(0, 1000, kept[1]))


def test_a_damaged_row_is_an_error_that_names_it(tmp_path):
    store = written(tmp_path / "s.lmdb", knowledge([("user", 5, 1, "five")]))
    good = store.raw("knowledge", encode_key("user", 5))
    assert json.loads(good) == {"text": "five", "as_of": 1, "framework": "kar", "quality": "ok"}
    store.close()
    data = (tmp_path / "s.lmdb").read_bytes()
    (tmp_path / "s.lmdb").write_bytes(data.replace(b'{"text"', b'{"tex\xff"'))
    damaged = LmdbStore(tmp_path / "s.lmdb", dim=0, counts={"user": 1})
    with damaged, pytest.raises(ReleaseError, match="row of user 5 is unreadable"):
        damaged.get("user", [5])


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "s.lmdb").write_bytes(b"garbage" * 2000)
    with pytest.raises(ReleaseError, match="is no release store"):
        LmdbStore(tmp_path / "s.lmdb", dim=0, counts={})
