"""The embedded store: what is written reads back, misses stay aligned, and doubled or null rows are refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.errors import ReleaseError, SchemaError
from owlrec.releases import parts
from owlrec.releases.format import KEY_ORDER, decode_keys, encode_key, encode_keys
from owlrec.releases.lmdb import LmdbFile, LmdbStore
from owlrec.releases.parts import PartWriter
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


def written(path: Path, table: pa.Table, vector_table: pa.Table | None = None) -> LmdbStore:
    writer = PartWriter(path, codes={})
    for kind in KEY_ORDER:
        writer.add_knowledge(kind, table.filter(pc.equal(table["kind"], kind)), name="given")
    if vector_table is not None:
        writer.add_vectors("user", vector_table, name="given")
    writer.close()
    return opened(path, writer.counts["knowledge"], writer.dim)


def opened(path: Path, counts: dict[str, int], dim: int = 0) -> LmdbStore:
    return LmdbStore("given", 1, lambda _: LmdbFile(path), dim=dim, counts=counts, partitions={}, code_sizes={})


@settings(max_examples=40)
@given(
    rows=st.dictionaries(
        st.tuples(st.sampled_from(["user", "item", "cohort"]), st.integers(0, LARGEST)),
        st.tuples(st.integers(-(2**63), LARGEST), st.text()),
        min_size=1,
        max_size=30,
    ),
)
def test_what_is_written_in_any_order_reads_back(tmp_path_factory, rows):
    flat = [(kind, id_, as_of, text) for (kind, id_), (as_of, text) in rows.items()]
    path = tmp_path_factory.mktemp("store") / "s.lmdb"
    with written(path, knowledge(flat)) as store:
        for kind, id_, as_of, text in flat:
            [stored] = store.get(kind, [id_])
            assert (stored.kind, stored.id, stored.as_of, stored.text, stored.quality) == (kind, id_, as_of, text, "ok")
        for kind in ("user", "item", "cohort"):
            expected = sorted(id_ for k, id_ in rows if k == kind)
            assert store.count(kind) == len(expected)
            assert store.ids(kind).tolist() == expected
            assert store.ids(kind, 3).tolist() == expected[:3]


@given(st.lists(st.integers(0, LARGEST), min_size=2), st.sampled_from(["user", "item", "cohort"]))
def test_keys_sort_like_their_ids(ids, kind):
    assert encode_keys(kind, np.array(ids)) == [encode_key(kind, i) for i in ids]
    assert encode_keys(kind, np.array(ids), 7) == [encode_key(kind, i, 7) for i in ids]
    assert decode_keys(encode_keys(kind, np.array(ids)))[1].tolist() == ids
    kinds, ids_read = decode_keys(sorted(encode_key(kind, i) for i in ids))
    assert (set(kinds.tolist()), ids_read.tolist()) == ({encode_key(kind, 0)[0]}, sorted(ids))


def test_misses_stay_aligned(tmp_path):
    store = written(
        tmp_path / "s.lmdb",
        knowledge([("user", 5, 1, "five"), ("item", 7, 1, "a film")]),
        vectors("user", [5], [[0.5, -2.0]]),
    )
    stored = store.get("user", [7, 5, LARGEST, 5])
    assert [k and k.text for k in stored] == [None, "five", None, "five"]  # 7 is an item, no user
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
    second = opened(tmp_path / "s.lmdb", {"user": 1})
    first.close()
    assert second.get("user", [5])[0].text == "five"
    second.close()


@pytest.mark.parametrize("ids", [[4, 4], [9, 4, 1, 4]])
def test_a_key_that_occurs_twice_is_named(tmp_path, ids):
    writer = PartWriter(tmp_path / "s.lmdb", codes={})
    with pytest.raises(SchemaError, match="item 4 occurs twice in the knowledge"):
        writer.add_knowledge("item", knowledge([("item", i, 1, "b") for i in ids]), name="given")
    writer.abort()


def test_null_text_and_mixed_vector_lengths_are_refused(tmp_path):
    writer = PartWriter(tmp_path / "s.lmdb", codes={})
    broken = knowledge([("user", 1, 1, "a"), ("user", 2, 1, "b")])
    broken = broken.set_column(3, "text", pa.array(["a", None]))
    with pytest.raises(SchemaError, match="row 1: text is null"):
        writer.add_knowledge("user", broken, name="given")
    writer.add_vectors("item", vectors("item", [1], [[1.0, 2.0]]), name="given")
    with pytest.raises(SchemaError, match="3 components, but earlier ones have 2"):
        writer.add_vectors("user", vectors("user", [2], [[1.0, 2.0, 3.0]]), name="given")
    writer.abort()


def test_the_map_grows_and_pages_are_full(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_FIRST_MAP_BYTES", 1 << 16)
    monkeypatch.setattr(parts, "_TRANSACTION_ROWS", 64)
    text = "x" * 1300  # three rows to a page of 4096 bytes
    order = [i for start in (2, 0, 1) for i in range(start, 900, 3)]
    with written(tmp_path / "s.lmdb", knowledge([("user", i, i, f"{i}{text}") for i in order])) as store:
        assert 300 * 4096 < (tmp_path / "s.lmdb").stat().st_size < 350 * 4096
        assert store.ids("user").tolist() == list(range(900))
        assert [k.text for k in store.get("user", [0, 450, 899])] == [f"0{text}", f"450{text}", f"899{text}"]


def test_the_sample_for_verification_is_bounded_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_SAMPLE", 10)
    writer = PartWriter(tmp_path / "s.lmdb", codes={})
    for start in range(0, 1000, 100):
        ids = np.arange(start, start + 100)
        writer.add_rows("knowledge", encode_keys("user", ids), [b"v"] * 100)
    sampled = decode_keys([key for key, _ in writer._samples["knowledge"]])[1].tolist()
    assert 10 <= len(sampled) <= 20
    assert sampled == sorted(sampled)
    assert sampled[0] < 200
    assert sampled[-1] >= 900
    writer.close()


@pytest.mark.parametrize("damage", [b"karok\xffive", b"kar\xffkfive"])
def test_a_damaged_row_is_an_error_that_names_it(tmp_path, damage):
    store = written(tmp_path / "s.lmdb", knowledge([("user", 5, 1, "five")]))
    [good] = store.values("knowledge", "user", [5])
    assert good == (1).to_bytes(8, "big") + b"\x00\x03\x00\x02\x00\x01karokfive"
    store.close()
    data = (tmp_path / "s.lmdb").read_bytes()
    (tmp_path / "s.lmdb").write_bytes(data.replace(b"karokfive", damage))
    damaged = opened(tmp_path / "s.lmdb", {"user": 1})
    with damaged, pytest.raises(ReleaseError, match="row of user 5 is unreadable"):
        damaged.get("user", [5])


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "s.lmdb").write_bytes(b"garbage" * 2000)
    with pytest.raises(ReleaseError, match="is not part of a release"):
        LmdbFile(tmp_path / "s.lmdb")
