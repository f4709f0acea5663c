"""Knowledge made elsewhere: each row comes out once, as knowledge or with the reason why not."""

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from owlrec.errors import SourceError
from owlrec.generation import knowledge_files
from owlrec.generation.import_export import ImportedRow, ImportSource, RefusedRow, _SeenIds, read_knowledge_file
from owlrec.ids import stable_id

T = 1_700_000_000_000
TEXTS = st.lists(st.text(max_size=30), min_size=1, max_size=6)


def read(path: Path, **options: Any) -> list[ImportedRow | RefusedRow]:
    return list(read_knowledge_file(ImportSource(path=str(path), **({"kind": "item"} | options))))


def item(id_: int, text: str, **changes: Any) -> ImportedRow:
    fields = {"as_of": 0, "prompt": "", "finish_reason": "stop", "prompt_tokens": 0, "output_tokens": 0}
    return ImportedRow(id=id_, text=text, **(fields | changes))


def errors(rows: Sequence[ImportedRow | RefusedRow]) -> list[tuple[int, str, str]]:
    return [(row.row, row.raw_id, row.error) for row in rows if isinstance(row, RefusedRow)]


def file(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage} | more


def batch_line(custom_id: object, body: dict[str, Any] | None, *, status: int = 200, error: object = None) -> dict:
    response = {"status_code": status, "request_id": "r", "body": body} if body is not None else None
    return {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": error}


# --- KAR ---


def test_kar_file_gives_answers_with_their_prompts(tmp_path: Path) -> None:
    entries = {"7": {"prompt": "Introduce Heat.", "answer": "A film."}, "B00X": {"prompt": "p", "ans": "A book."}}
    path = file(tmp_path, "item.klg", json.dumps(entries))
    expected = [item(7, "A film.", prompt="Introduce Heat."), item(stable_id("B00X"), "A book.", prompt="p")]
    assert read(path) == expected
    assert read(file(tmp_path, "pretty.json", json.dumps(entries, indent=2))) == expected
    assert read(file(tmp_path, "item.klg.gz", gzip.compress(json.dumps(entries).encode()))) == expected


def test_kar_entry_without_a_usable_answer_is_a_bad_row(tmp_path: Path) -> None:
    content = (
        b'{"1": {"prompt": "p"}, "2": "text", "3": {"answer": 5}, "": {"answer": "x"}, "4": {"answer": "\xff"},'
        b' "5": {"answer": "\\ud800"}, "6": {"answer": "fine"}, "6": {"answer": "again"}}'
    )
    rows = read(file(tmp_path, "a.klg", content))
    assert errors(rows) == [
        (1, "1", "NoText"),
        (2, "2", "NoText"),
        (3, "3", "NoText"),
        (4, "", "NoId"),
        (5, "4", "Undecodable"),
        (6, "5", "Undecodable"),
        (8, "6", "DuplicateId"),
    ]
    assert rows[6] == item(6, "fine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'1': 2}", r"a.klg, line 1, column 2: not valid JSON"),
        ('{"1": {"answer": "a"}}\n{"2": {"answer": "b"}}', r"line 2, column 1.*set format: openai or jsonl"),
        ("[1]", "the JSON is a list"),
        ("[" * 100_000, "a.klg"),
    ],
)
def test_kar_file_that_is_no_json_object_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(file(tmp_path, "a.klg", content))


# --- OpenAI ---


def test_openai_batch_output_is_read_by_custom_id(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "out.jsonl",
        json_lines(
            batch_line("42", completion("Likes noir.\n")),
            batch_line("43", None, error={"code": "batch_expired", "message": "too late"}),
            batch_line("44", {"error": {"message": "context too long"}}, status=400),
            batch_line("45", completion(None)),
            batch_line(None, completion("whose?")),
            batch_line("46", completion("cut") | {"usage": None}),
            batch_line("43", completion("second try")),
        ),
    )
    rows = read(path, kind="user", as_of_ms=T)
    counts = {"as_of": T, "prompt_tokens": 11, "output_tokens": 7}
    assert [row for row in rows if isinstance(row, ImportedRow)] == [
        item(42, "Likes noir.\n", **counts),
        item(46, "cut", as_of=T),
        item(43, "second try", **counts),  # a failed row does not block its retry
    ]
    assert errors(rows) == [(2, "43", "ApiError"), (3, "44", "ApiError"), (4, "45", "NoText"), (5, "", "NoId")]
    assert isinstance(rows[1], RefusedRow)
    assert rows[1].message == "too late"
    assert isinstance(rows[2], RefusedRow)
    assert rows[2].message == "status 400: context too long"


def test_reki_answers_are_read_by_the_group_in_prompt(tmp_path: Path) -> None:
    lines = [completion("A set of films.", prompt=str(g), prompt_txt=f"Given a set of {g}") for g in (2, 3)]
    lines[1]["choices"][0]["finish_reason"] = "length"
    path = file(tmp_path, "knowledge.json", json_lines(*lines))
    counts = {"prompt_tokens": 11, "output_tokens": 7}
    assert read(path, kind="cohort", id_field="prompt") == [
        item(2, "A set of films.", prompt="Given a set of 2", **counts),
        item(3, "A set of films.", prompt="Given a set of 3", finish_reason="length", **counts),
    ]


def test_openai_fields_of_prompt_and_as_of_can_be_named(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json_lines(completion("x", id_=5, asked="q", upto=T), completion("y", id_=6)))
    rows = read(path, kind="user", id_field="id_", columns={"prompt": "asked", "as_of": "upto"})
    assert rows[0] == item(5, "x", prompt="q", as_of=T, prompt_tokens=11, output_tokens=7)
    assert errors(rows) == [(2, "6", "NoAsOf")]


@pytest.mark.parametrize(
    "body",
    [{}, {"choices": []}, {"choices": None}, {"choices": [{"message": "x"}]}, {"choices": ["x"]}, [], "text"],
)
def test_malformed_response_is_a_bad_row(tmp_path: Path, body: Any) -> None:
    path = file(tmp_path, "a.jsonl", json_lines(batch_line("1", completion("x")), batch_line("2", body)))
    assert errors(read(path)) == [(2, "2", "NoText")]


def test_refusal_says_so(tmp_path: Path) -> None:
    refused = completion(None, custom_id="1")
    refused["choices"][0]["message"]["refusal"] = "I cannot"
    (row,) = read(file(tmp_path, "a.jsonl", json_lines(refused)))
    assert isinstance(row, RefusedRow)
    assert row.message == "the model refused: I cannot"


# --- JSON lines ---


def test_bad_lines_stop_nobody(tmp_path: Path) -> None:
    lines = [
        b'{"id": 1, "text": "a"}',
        b"",
        b'{"id": 2, "text": ',
        b"[3]",
        b'{"id": 4, "text": "\xff"}',
        b'{"id": 5, "text": "\\udc80"}\r',
        b'{"id": true, "text": "b"}',
        b'{"id": 6.0, "text": "b"}',
        b'{"text": "b"}',
        b'{"id": 7}',
        b'{"id": 8, "text": ""}',
        b"[" * 100_000,
        b'{"id": "1", "text": "doubled"}',
        b'{"id": "\\ud800", "text": "x"}',
        b'{"id": 9, "text": "z"}',
    ]
    rows = read(file(tmp_path, "a.jsonl", b"\n".join(lines)))
    assert errors(rows) == [
        (3, "", "NotJson"),
        (4, "", "NotJson"),
        (5, "", "Undecodable"),
        (6, "5", "Undecodable"),
        (7, "", "NoId"),
        (8, "", "NoId"),
        (9, "", "NoId"),
        (10, "7", "NoText"),
        (12, "", "NotJson"),
        (13, "1", "DuplicateId"),
        (14, "", "Undecodable"),
    ]
    assert [row for row in rows if isinstance(row, ImportedRow)] == [item(1, "a"), item(8, ""), item(9, "z")]


def test_overlong_line_is_cut_and_the_next_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge_files, "LONGEST_LINE_BYTES", 64)
    rows = read(file(tmp_path, "a.jsonl", json_lines(*({"id": i, "text": "x" * n} for i, n in enumerate([9, 200, 9])))))
    assert errors(rows) == [(2, "", "NotJson")]
    assert [row.id for row in rows if isinstance(row, ImportedRow)] == [0, 2]


def test_token_counts_that_are_none_count_as_zero(tmp_path: Path) -> None:
    counts = [3, "4", -1, 2**40, None, "many", True, [5]]
    path = file(
        tmp_path, "a.jsonl", json_lines(*({"id": i, "text": "", "output_tokens": c} for i, c in enumerate(counts)))
    )
    assert [row.output_tokens for row in read(path) if isinstance(row, ImportedRow)] == [3, 4, 0, 0, 0, 0, 1, 0]


# --- CSV ---


def test_csv_and_tsv_columns_are_mapped(tmp_path: Path) -> None:
    content = '\ufeffsku,summary,pages\n007,"A, ""B""\r\nC",12\n8,,1\n'
    expected = [item(stable_id("007"), 'A, "B"\r\nC'), item(8, "")]
    mapping = {"id": "sku", "text": "summary"}
    assert read(file(tmp_path, "a.csv", content), columns=mapping) == expected
    assert read(file(tmp_path, "a.csv.gz", gzip.compress(content.encode())), columns=mapping) == expected
    tsv = "id\ttext\tas_of\tprompt\n1\ta, b\t" + f"{T}\tp\n"
    assert read(file(tmp_path, "a.tsv", tsv), kind="user") == [item(1, "a, b", as_of=T, prompt="p")]


def test_bad_csv_rows_stop_nobody(tmp_path: Path) -> None:
    content = b'id,text\n1,a\n2\n3,b,c\n,d\n\n4,"e" f\n5,\xff\n6,"g\nh"\n1,i\n7,"never closed\n8,j\n'
    rows = read(file(tmp_path, "a.csv", content))
    assert errors(rows) == [
        (3, "", "NotCsv"),
        (4, "", "NotCsv"),
        (5, "", "NoId"),
        (7, "", "NotCsv"),
        (8, "5", "Undecodable"),
        (11, "1", "DuplicateId"),
        (12, "", "NotCsv"),
    ]
    assert [row for row in rows if isinstance(row, ImportedRow)] == [item(1, "a"), item(6, "g\nh")]
    assert isinstance(rows[-1], RefusedRow)
    assert rows[-1].message.startswith("lines 12 to 13 are not valid CSV")


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("id,txt", {}, "column 'text' is missing. Did you mean 'txt'"),
        ("id,text", {"columns": {"id": "sku"}}, "column 'sku' is missing"),
        ("id,text", {"columns": {"prompt": "asked"}}, "column 'asked' is missing"),
        ("id,text", {"kind": "user"}, "column 'as_of' is missing.*set as_of_ms"),
        ("id,text,text", {}, "two columns are named 'text'"),
        ('"id"x,text', {}, "not valid CSV"),
        ("", {}, "first line is empty"),
    ],
)
def test_wrong_header_is_refused(tmp_path: Path, header: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(file(tmp_path, "a.csv", f"{header}\n1,a\n"), **options)


# --- Parquet ---


def parquet(tmp_path: Path, columns: dict[str, Any], rows_per_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=rows_per_group)
    return tmp_path / "a.parquet"


def test_parquet_of_various_types_is_read(tmp_path: Path) -> None:
    columns = {
        "id": pa.array(["7", "B00X", "9"]).dictionary_encode(),
        "text": pa.array(["a", "b", "c"], pa.large_string()),
        "as_of": pa.array([T, T + 1, None], pa.timestamp("ms")),
        "output_tokens": pa.array([1.0, None, 3.0]),
    }
    rows = read(parquet(tmp_path, columns), kind="user")
    assert rows[:2] == [item(7, "a", as_of=T, output_tokens=1), item(stable_id("B00X"), "b", as_of=T + 1)]
    assert errors(rows) == [(3, "9", "NoAsOf")]
    assert read(parquet(tmp_path, {"sku": [3], "text": ["x"], "as_of": [float(T)]}), columns={"id": "sku"}) == [
        item(3, "x", as_of=T)
    ]


def test_bad_parquet_rows_stop_nobody(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff", None, b"again", b"e"]).view(pa.string())
    rows = read(parquet(tmp_path, {"id": [1, 2, 3, 1, None], "text": broken}))
    assert errors(rows) == [(2, "2", "Undecodable"), (3, "3", "NoText"), (4, "1", "DuplicateId"), (5, "", "NoId")]
    assert rows[0] == item(1, "ok")


def test_wrong_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"column of 'id' .*double.*int64 or string"):
        read(parquet(tmp_path, {"id": [1.0], "text": ["x"]}))
    with pytest.raises(SourceError, match=r"column of 'text' .*int64.* as string"):
        read(parquet(tmp_path, {"id": [1], "text": [2]}))
    with pytest.raises(SourceError, match="column 'text' is missing"):
        read(parquet(tmp_path, {"id": [1]}))
    with pytest.raises(SourceError, match="cannot be read as Parquet"):
        read(file(tmp_path, "b.parquet", "id,text"))


# --- as_of ---


@pytest.mark.parametrize("name", ["a.klg", "a.jsonl"])
def test_user_texts_of_no_known_moment_are_refused_at_once(tmp_path: Path, name: str) -> None:
    content = '{"1": {"answer": "x"}}' if name == "a.klg" else json_lines(completion("x", custom_id="1"))
    source = ImportSource(path=str(file(tmp_path, name, content)), kind="user")
    with pytest.raises(SourceError, match="Set as_of_ms to the time of the last behavior"):
        read_knowledge_file(source)


def test_row_that_states_its_moment_keeps_it_and_the_others_get_the_callers(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", f"id,text,as_of\n1,a,{T}\n2,b,\n")
    assert [row.as_of for row in read(path, kind="user", as_of_ms=T + 5) if isinstance(row, ImportedRow)] == [T, T + 5]
    assert errors(read(path, kind="user")) == [(3, "2", "NoAsOf")]
    assert [row.as_of for row in read(path) if isinstance(row, ImportedRow)] == [T, 0]
    nothing_known = file(tmp_path, "b.csv", "id,text\n1,a\n")
    assert read(nothing_known, kind="user", as_of_ms=0) == [item(1, "a")]  # said by the caller, not assumed


@pytest.mark.parametrize("as_of", [T // 1000, T * 1000, 0, -5, "soon", f"{T}.5", 1e300])
def test_moment_of_another_unit_is_a_bad_row(tmp_path: Path, as_of: object) -> None:
    path = file(tmp_path, "a.csv", f"id,text,as_of\n1,a,{as_of}\n")
    assert errors(read(path, kind="user", as_of_ms=T)) == [(2, "1", "BadAsOf")]


def test_callers_moment_in_seconds_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"as_of_ms\s.*1700000000"):
        ImportSource(path="x", kind="user", as_of_ms=T // 1000)


# --- formats and options ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "x"),
        ("a.jsonl", ""),
        ("a.jsonl", "no json\n"),
        ("a.json", '{"a": 1}'),
        ("a.jsonl", '{"1": {"answer": "x"}}'),
    ],
)
def test_unknown_format_is_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(SourceError, match="Set format: kar, openai, jsonl, csv or parquet"):
        read(file(tmp_path, name, content))


def test_format_is_known_in_spite_of_a_bad_first_line(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", "oops\n" + json_lines({"id": 1, "response": "an answer"}))
    assert read(path, columns={"text": "response"})[1:] == [item(1, "an answer")]


def test_file_without_any_json_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="none of its 2 lines is a JSON object"):
        read(file(tmp_path, "a.jsonl", "id,text\n1,a\n"), format="jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv", "id_field": "x"}, "id_field is only for openai"),
        ({"format": "openai", "columns": {"id": "x"}}, r"columns.id is not a field .* Use id_field"),
        ({"format": "kar", "columns": {"text": "x"}}, r"columns.text is not a field"),
    ],
)
def test_option_that_the_format_lacks_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(file(tmp_path, "a", "{}"), **options)


def test_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="file not found"):
        read(tmp_path / "a.csv")
    whole = gzip.compress(json_lines(*({"id": i, "text": random.Random(i).random()} for i in range(999))).encode())
    with pytest.raises(SourceError, match="cannot be read"):
        read(file(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2]), format="jsonl")


# --- laws ---


def write_kar(rows: list[tuple[int, str]]) -> bytes:
    return json.dumps({str(i): {"prompt": text, "answer": text} for i, text in rows}).encode()


def write_jsonl(rows: list[tuple[int, str]]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t, "prompt": t}, ensure_ascii=False) + "\n" for i, t in rows).encode()


def write_csv(rows: list[tuple[int, str]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("id", "text", "prompt"), *((i, t, t) for i, t in rows)])
    return buffer.getvalue().encode()


def write_parquet(rows: list[tuple[int, str]]) -> bytes:
    sink = pa.BufferOutputStream()
    ids, texts = [i for i, _ in rows], [t for _, t in rows]
    pq.write_table(pa.table({"id": ids, "text": texts, "prompt": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.klg", write_kar), ("a.jsonl", write_jsonl), ("a.csv", write_csv), ("a.parquet", write_parquet)],
)
def test_any_text_comes_in_unchanged(
    tmp_path_factory: pytest.TempPathFactory, name: str, write: Callable[[list[tuple[int, str]]], bytes]
) -> None:
    folder = tmp_path_factory.mktemp("law")

    @settings(max_examples=60)
    @given(TEXTS)
    def law(texts: list[str]) -> None:
        path = file(folder, name, write(list(enumerate(texts))))
        assert read(path) == [item(i, text, prompt=text) for i, text in enumerate(texts)]

    law()


@pytest.mark.parametrize("name", ["a.klg", "a.jsonl", "a.csv", "a.tsv", "a.parquet"])
def test_arbitrary_bytes_are_bad_rows_or_a_refusal_never_a_crash(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    folder = tmp_path_factory.mktemp("law")
    pieces = st.sampled_from(
        [b'{"id": 1, "text": "a"}\n', b"id,text\n", b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"1", b"{"]
    )
    formats = {"klg": "kar", "tsv": "csv"}

    @settings(max_examples=100)
    @given(st.lists(st.one_of(pieces, st.binary(max_size=8)), max_size=12).map(b"".join))
    def law(content: bytes) -> None:
        suffix = name.partition(".")[2]
        with suppress(SourceError):
            read(file(folder, name, content), format=formats.get(suffix, suffix))

    law()


@settings(max_examples=100)
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), max_size=60))
def test_seen_ids_know_what_a_set_knows(ids: list[int]) -> None:
    seen, oracle = _SeenIds(), set[tuple[int, int]]()
    seen._NEWEST = 4  # type: ignore[misc]
    for id_ in ids:
        for as_of in (0, id_ % 3):
            row = item(id_, "text", as_of=as_of)
            assert seen.add(row) == ((id_, as_of) not in oracle)
            oracle.add((id_, as_of))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    rows = [(i, f"{random.Random(i).random()} " * 80) for i in range(6_000)]  # 9 MB, twice with the prompt
    if name == "a.parquet":
        texts = [text for _, text in rows]
        path = parquet(tmp_path, {"id": range(6_000), "text": texts, "prompt": texts}, rows_per_group=500)
        del texts
    else:
        content = (write_csv if name == "a.csv" else write_jsonl)(rows)
        path = file(tmp_path, name, gzip.compress(content, 1) if name.endswith(".gz") else content)
        del content
    source = ImportSource(path=str(path), kind="item")
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        count, arrow = 0, 0
        for row in read_knowledge_file(source):
            count += isinstance(row, ImportedRow)
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 6_000
    assert peak + arrow < 12e6  # of 18 MB of texts
