"""Exports: whole or not at all, and what goes out comes back in."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlrec.errors import SchemaError, SourceError, WorkspaceError
from owlrec.generation.import_export import (
    ImportedRow,
    ImportSource,
    RefusedRow,
    export_jsonl,
    export_parquet,
    read_knowledge_file,
)
from owlrec.schema import KNOWLEDGE

BIG = 2**63 - 1  # 19 digits: as a raw id it would be hashed
EXPORTS = pytest.mark.parametrize(
    ("export", "name"), [(export_jsonl, "k.jsonl"), (export_jsonl, "k.jsonl.gz"), (export_parquet, "k.parquet")]
)


def row(kind: str, id_: int, text: str, **changes: Any) -> dict[str, Any]:
    fields = {
        "as_of": 1_700_000_000_000 + id_ % 7 if kind == "user" else 0,
        "framework": "kar",
        "prompt_sha256": "ab",
        "fingerprint": "cd",
        "prompt_tokens": 5,
        "output_tokens": 9,
        "finish_reason": "length",
        "quality": "ok",
        "drafted": 1,
        "accepted": 1,
        "relaxed": 0,
    }
    return {"kind": kind, "id": id_, "text": text} | fields | changes


def tables(*groups: list[dict[str, Any]]) -> list[pa.Table]:
    return [pa.Table.from_pylist(group, schema=KNOWLEDGE) for group in groups]


def read(path: Path, kind: str) -> list[ImportedRow | RefusedRow]:
    return list(read_knowledge_file(ImportSource(path=str(path), kind=kind)))


@EXPORTS
def test_export_comes_back_with_its_own_ids(tmp_path: Path, export: Any, name: str) -> None:
    users = [row("user", 3, "Likes noir."), row("user", BIG, 'a "b"\n\U0001f989')]
    items = [row("item", -4, ""), row("item", 3, "A film.")]
    assert export(tables(users, [], items), tmp_path / name) == 4
    for kind, rows in (("user", users), ("item", items)):
        assert read(tmp_path / name, kind) == [
            ImportedRow(r["id"], r["as_of"], r["text"], "", "length", 5, 9) for r in rows
        ]
    with pytest.raises(SourceError, match="none of its 4 rows is of kind 'cohort'"):
        read(tmp_path / name, "cohort")


@EXPORTS
def test_any_text_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, export: Any, name: str) -> None:
    path = tmp_path_factory.mktemp("law") / name
    ids = st.integers(-(2**63), BIG)

    @settings(max_examples=40)
    @given(st.dictionaries(ids, st.tuples(st.text(max_size=40), ids), min_size=1, max_size=6))
    def law(rows: dict[int, tuple[str, int]]) -> None:
        export(tables([row("user", id_, text, as_of=as_of) for id_, (text, as_of) in rows.items()]), path)
        assert read(path, "user") == [
            ImportedRow(id_, as_of, text, "", "length", 5, 9) for id_, (text, as_of) in rows.items()
        ]

    law()


def test_jsonl_holds_all_columns_in_plain_utf8(tmp_path: Path) -> None:
    table = tables([row("item", 1, "Amélie 🦉")])[0].append_column("note", pa.array(["more"]))
    export_jsonl([table], tmp_path / "k.jsonl")
    written = (tmp_path / "k.jsonl").read_bytes().decode()
    assert "Amélie 🦉" in written
    assert [json.loads(line) for line in written.splitlines()] == table.to_pylist()


def test_parquet_holds_the_tables_row_by_row(tmp_path: Path) -> None:
    parts = tables([row("user", 1, "a"), row("user", 2, "b")], [row("item", 1, "c")])
    assert export_parquet(iter(parts), tmp_path / "k.parquet") == 3
    with pq.ParquetFile(tmp_path / "k.parquet") as file:
        assert file.num_row_groups == 2
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        assert file.read().equals(pa.concat_tables(parts))


def test_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        export_jsonl(tables([row("item", 1, "x")]), tmp_path / folder / "k.jsonl.gz")
    assert (tmp_path / "a/k.jsonl.gz").read_bytes() == (tmp_path / "b/k.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a/k.jsonl.gz").read_bytes()).count(b"\n") == 1


def test_no_tables_make_an_empty_file(tmp_path: Path) -> None:
    assert export_parquet([], tmp_path / "k.parquet") == 0
    assert pq.read_table(tmp_path / "k.parquet").schema == KNOWLEDGE
    assert export_jsonl([], tmp_path / "k.jsonl") == 0
    assert (tmp_path / "k.jsonl").read_bytes() == b""


@EXPORTS
def test_failed_export_leaves_the_old_file_and_nothing_else(tmp_path: Path, export: Any, name: str) -> None:
    def failing() -> Iterator[pa.Table]:
        yield from tables([row("item", 1, "x")])
        raise RuntimeError("lost")

    (tmp_path / name).write_text("old")
    with pytest.raises(RuntimeError, match="lost"):
        export(failing(), tmp_path / name)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "old")]


@EXPORTS
def test_wrong_table_or_folder_is_refused(tmp_path: Path, export: Any, name: str) -> None:
    with pytest.raises(SchemaError, match="column 'as_of' is missing"):
        export([tables([row("item", 1, "x")])[0].drop_columns(["as_of"])], tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="cannot be written"):
        export(tables([row("item", 1, "x")]), tmp_path / "file" / name)


def test_parquet_of_tables_that_differ_is_refused(tmp_path: Path) -> None:
    first = tables([row("item", 1, "x")])[0]
    with pytest.raises(SchemaError, match="separate files"):
        export_parquet([first, first.append_column("note", pa.array(["more"]))], tmp_path / "k.parquet")
    assert not list(tmp_path.iterdir())


def test_row_of_an_export_with_a_wrong_kind_or_id_is_a_bad_row(tmp_path: Path) -> None:
    rows = [row("item", 1, "x"), row("film", 2, "x"), row("item", 3, "x") | {"id": "three"}, row("item", 2**63, "x")]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    refused = [(r.row, r.raw_id, r.error) for r in read(tmp_path / "k.jsonl", "item") if isinstance(r, RefusedRow)]
    assert refused == [(2, "", "WrongKind"), (3, "three", "NoId"), (4, str(2**63), "NoId")]
