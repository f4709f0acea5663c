"""Storage: the same laws on a local disk, in memory and on S3 over HTTP."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import threading
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlrec import storage as storage_module
from owlrec.errors import WorkspaceError
from owlrec.storage import FileEntry, Storage, file_digest, fingerprint


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "root")
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}")
    return Storage(request.getfixturevalue("s3_root"))


def test_what_was_written_is_read_listed_and_removed(storage: Storage) -> None:
    written = storage.write_bytes("a/b/c", b"12345")
    storage.write_bytes("a/d", b"")
    assert written == FileEntry(bytes=5, sha256=hashlib.sha256(b"12345").hexdigest(), e_tag=written.e_tag)
    assert storage.read_bytes("a/b/c") == b"12345"
    assert storage.read_range("a/b/c", 1, 3) == b"234"
    assert storage.names("a") == ["b", "d"]
    assert {path: entry.bytes for path, entry in storage.entries("a").items()} == {"b/c": 5, "d": 0}
    assert storage.entries("a")["b/c"].e_tag == storage.entry("a/b/c").e_tag == written.e_tag
    assert storage.exists("a")
    assert storage.exists("a", "b", "c")
    storage.delete_dir("a", "b")
    storage.delete_file("a/d")
    storage.delete_file("a/d")
    assert not storage.exists("a", "d")
    assert storage.names("a") == []
    assert storage.names("never") == []
    with pytest.raises(WorkspaceError, match="a/d does not exist"):
        storage.read_bytes("a/d")


def test_only_the_first_creates_and_only_the_latest_reader_swaps(storage: Storage) -> None:
    assert storage.create_bytes("x", b"first")
    assert not storage.create_bytes("x", b"second")
    data, tag = storage.read_tagged("x")
    assert data == b"first"
    assert storage.swap_bytes("x", b"third", "stale") is None
    new = storage.swap_bytes("x", b"third", tag)
    assert new == storage.entry("x").e_tag
    assert storage.swap_bytes("x", b"fourth", tag) is None
    assert storage.swap_bytes("absent", b"", tag) is None
    assert storage.read_bytes("x") == b"third"
    assert storage.names() == ["x"]


def test_of_sixteen_writers_one_creates_and_every_swap_is_counted(storage: Storage) -> None:
    created, rounds = [], 5
    storage.write_bytes("count", b"0")

    def race(number: int) -> None:
        if storage.create_bytes("lock", str(number).encode()):
            created.append(number)
        for _ in range(rounds):
            while True:
                data, tag = storage.read_tagged("count")
                if storage.swap_bytes("count", str(int(data) + 1).encode(), tag) is not None:
                    break

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(storage.read_bytes("lock"))] == created
    assert storage.read_bytes("count") == str(16 * rounds).encode()


def _add(root: str, times: int) -> None:
    mine = Storage(root)
    for _ in range(times):
        while True:
            data, tag = mine.read_tagged("count")
            if mine.swap_bytes("count", str(int(data) + 1).encode(), tag) is not None:
                break


def test_swaps_of_several_processes_on_one_disk_are_all_counted(tmp_path: Path) -> None:
    Storage(tmp_path).write_bytes("count", b"0")
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_add, args=(str(tmp_path), 50)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert Storage(tmp_path).read_bytes("count") == b"150"


def test_tables_come_back_from_parquet_and_mapped(storage: Storage) -> None:
    table = pa.table({"id": pa.array(range(1000), pa.int64()), "x": [str(i) for i in range(1000)]})
    entry = storage.write_parquet("t.parquet", table, row_group_rows=100)
    assert entry.sha256 == hashlib.sha256(storage.read_bytes("t.parquet")).hexdigest() == storage.digest("t.parquet")
    assert storage.read_parquet("t.parquet", ["x"]) == table.select(["x"])
    assert storage.count_rows("t.parquet") == 1000
    assert storage.parquet_file("t.parquet").read_row_group(3) == table.slice(300, 100)
    written = storage.write_arrow("t.arrow", table.to_batches(100), table.schema)
    assert storage.map_arrow("t.arrow", written) == table


def test_a_file_that_is_streamed_appears_whole_or_not_at_all(storage: Storage) -> None:
    table = pa.table({"x": list(range(100))})
    with storage.writer("t") as file:
        pq.write_table(table, file)
        assert storage.entry("t") is None
    assert storage.read_parquet("t") == table
    assert file.entry == FileEntry(
        bytes=storage.entry("t").bytes, sha256=storage.digest("t"), e_tag=storage.entry("t").e_tag
    )

    def break_off() -> None:
        with storage.writer("u") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert storage.names() == ["t"]


def test_a_local_file_of_several_pieces_is_uploaded_and_read_by_ranges(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_LEAST_PIECE", 5 << 20)
    data = os.urandom(12 << 20)
    (tmp_path / "big").write_bytes(data)
    entry = storage.upload(tmp_path / "big", "up/big")
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    storage.download("up/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


def test_pieces_of_a_120_gb_file_stay_below_the_limit_of_s3() -> None:
    size = 120 * 10**9
    assert -(-size // storage_module._piece_bytes(size)) <= 10_000
    assert storage_module._piece_bytes(1 << 20) == 8 << 20


def test_a_storage_travels_to_other_processes(storage: Storage) -> None:
    storage.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def test_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(file: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    storage = Storage(tmp_path)
    storage.write_bytes("a/b", b"old")
    monkeypatch.setattr(os, "fsync", disk_full)
    for write in (storage.write_bytes, storage.create_bytes):
        with pytest.raises(WorkspaceError, match=r"cannot be written \(.*no space left\). Free some space"):
            write("a/b", b"new")
    assert storage.read_bytes("a/b") == b"old"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_unwritable_places_are_refused_with_what_to_check(tmp_path: Path, s3_root: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="file/below is not writable"):
        Storage(tmp_path / "file" / "below").check_writable()
    with pytest.raises(WorkspaceError, match="bucket does not exist"):
        Storage("s3://no-such-bucket/x").check_writable()
    with pytest.raises(WorkspaceError, match="ftp://x cannot be opened"):
        Storage("ftp://x")


def test_truncated_and_missing_files_are_named(storage: Storage) -> None:
    storage.write_bytes("t.parquet", b"no parquet")
    with pytest.raises(WorkspaceError, match=r"t\.parquet cannot be read"):
        storage.read_parquet("t.parquet")
    storage.write_bytes("t.json", b"{")
    with pytest.raises(WorkspaceError, match=r"t\.json is not valid JSON"):
        storage.read_json("t.json")


def test_a_flipped_bit_in_a_parquet_page_is_seen(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write_parquet("t.parquet", pa.table({"x": [os.urandom(999)]}))
    data = bytearray(storage.read_bytes("t.parquet"))
    data[500] ^= 1
    storage.write_bytes("t.parquet", bytes(data))
    with pytest.raises(WorkspaceError, match="cannot be read"):
        storage.read_parquet("t.parquet")


def test_fingerprint_ignores_key_order_and_sees_every_value() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, [{"a": 1}])}) == 5


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
