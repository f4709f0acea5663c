"""Readers of knowledge files: KAR's JSON, OpenAI's JSON lines, plain JSON lines, CSV, Parquet.

A reader turns a file into records with our field names and leaves validation to `importing`. An unusable record
becomes an `Unusable`, so a bad line stops nothing; only a file that is wrong as a whole
raises. Text is decoded a line at a time, so one bad byte costs only its row.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from owlrec.errors import SourceError, did_you_mean
from owlrec.sources.tabular import to_milliseconds

Format = Literal["kar", "openai", "jsonl", "csv", "parquet"]
Field = Literal["id", "text", "prompt", "as_of", "finish_reason", "prompt_tokens", "output_tokens"]
FIELDS: tuple[Field, ...] = get_args(Field)
OURS = frozenset({"kind", "id", "as_of", "text", "framework"})  # columns that identify an OwlRec export
LONGEST_LINE_BYTES = 16 << 20  # 1,000 times a long answer; bounds memory for a file without line breaks
_PARQUET_ROWS = 512


class Unusable(Exception):
    """A record that cannot become knowledge; its subclass tells the user the reason."""


class NotJson(Unusable):
    """A line that is not a JSON object."""


class NotCsv(Unusable):
    """Lines with wrong quotes or a wrong number of fields."""


class Undecodable(Unusable):
    """Bytes that are not valid UTF-8, or a lone surrogate, which UTF-8 cannot encode."""


class NoText(Unusable):
    """The text is missing or is not text."""


class ApiError(Unusable):
    """The API returned an error for this request."""


# Number of the line, entry or row (from 1), and its fields by FIELDS; an OwlRec export also has `kind`.
Record = tuple[int, dict[str, Any] | Unusable]


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Bytes of a file, decompressed if it is gzip (recognized by its first bytes, not its name).

    Raises SourceError if the file is missing, unreadable or a broken gzip, possibly only while reading.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
    except FileNotFoundError:
        raise SourceError(f"{path}: file not found. Correct the path.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: the file cannot be read ({error}). Replace it with a complete copy.") from None


def lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their line breaks. A line longer than LONGEST_LINE_BYTES is truncated, which makes it a bad row."""
    while line := stream.readline(LONGEST_LINE_BYTES):
        rest = line
        while len(rest) == LONGEST_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE_BYTES)
        yield line


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Undecodable(f"the line is not valid UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise NotJson(f"the line is not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise NotJson(f"the line is a JSON {type(record).__name__}, not an object")
    return record


class _Pairs(list):
    """A JSON object as its pairs: a dict would keep only the last of duplicate ids."""


def read_kar(path: Path) -> Iterator[Record]:
    """KAR's one JSON object {id: {"prompt", "answer"}}; its own files say "ans". Holds the whole file in memory.

    Raises SourceError if the file is not a JSON object.
    """
    with open_bytes(path) as stream:
        text = stream.read().decode("utf-8-sig", "surrogateescape")
    try:
        entries = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        hint = (
            "For one JSON object per line, set format: openai or jsonl."
            if error.msg == "Extra data"
            else "Fix the file."
        )
        raise SourceError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). {hint}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not in KAR's JSON format ({error}). Fix the file.") from None
    if not isinstance(entries, _Pairs):
        raise SourceError(
            f"{path}: the JSON is a {type(entries).__name__}, but KAR's format is an object keyed by id. Set format."
        )
    for number, (raw_id, entry) in enumerate(entries, 1):
        fields = dict(entry) if isinstance(entry, _Pairs) else {}
        text_ = fields.get("answer", fields.get("ans"))
        yield number, {"id": raw_id, "text": text_, "prompt": fields.get("prompt")}


def read_openai(path: Path, id_field: str, columns: Mapping[str, str]) -> Iterator[Record]:
    """JSON lines of chat completions: bare ones with their own id, or the output of OpenAI's batch API.

    id_field: top-level field with the row's id. columns: top-level fields of `prompt` and `as_of`; by default, the
    prompt is in `prompt_txt` (as in REKI's files) or `prompt`.
    """
    for number, record in json_lines(path):
        if isinstance(record, Unusable):
            yield number, record
            continue
        prompts = [columns["prompt"]] if "prompt" in columns else [n for n in ("prompt_txt", "prompt") if n != id_field]
        fields = {
            "id": record.get(id_field),
            "as_of": record.get(columns.get("as_of", "as_of")),
            "prompt": next((record[name] for name in prompts if name in record), None),
        }
        try:
            yield number, fields | _completion(record)
        except Unusable as problem:
            yield number, fields | {"text": problem}


def _completion(record: dict[str, Any]) -> dict[str, Any]:
    """Text, finish reason and token counts of one response. Raises ApiError or NoText if it has no text."""
    response = record.get("response")
    body: Any = response.get("body") if isinstance(response, dict) else record
    status = response.get("status_code") if isinstance(response, dict) else None
    error = record.get("error") or (body.get("error") if isinstance(body, dict) else None)
    if error or status not in (None, 200):
        detail = error.get("message") or error.get("code") if isinstance(error, dict) else error
        raise ApiError(f"status {status}: {detail}" if status else str(detail))
    try:
        choice = body["choices"][0]
        message, usage = choice["message"], body.get("usage")
        if message.get("content") is None and message.get("refusal"):
            raise NoText(f"the model refused: {message['refusal']}")
        return {
            "text": message.get("content"),
            "finish_reason": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens") if isinstance(usage, dict) else None,
            "output_tokens": usage.get("completion_tokens") if isinstance(usage, dict) else None,
        }
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoText("the response has no choices[0].message.content") from None


def read_jsonl(path: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """JSON lines of plain columns, as written by `export_jsonl`. columns: our field name -> the file's."""
    names = {field: columns.get(field, field) for field in FIELDS}
    for number, record in json_lines(path):
        if isinstance(record, Unusable) or (not columns and record.keys() >= OURS):
            yield number, record
        else:
            yield number, {field: record.get(name) for field, name in names.items()}


def json_lines(path: Path) -> Iterator[Record]:
    """Objects of a JSON-lines file, unchanged; blank lines are skipped."""
    with open_bytes(path) as stream:
        for number, line in enumerate(lines(stream), 1):
            if line.isspace():
                continue
            try:
                yield number, _parse(line)
            except Unusable as problem:
                yield number, problem


def read_csv(path: Path, columns: Mapping[str, str], required: Collection[str]) -> Iterator[Record]:
    """CSV, or TSV by the file's name, with a header. columns: our field name -> the file's.

    required: fields without which the file is refused. Raises SourceError if the header lacks one of them.
    """
    with open_bytes(path) as stream:
        texts = (line.decode("utf-8", "surrogateescape") for line in lines(stream))
        reader = csv.reader(texts, delimiter="\t" if ".tsv" in path.name else ",", strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise SourceError(f"{path}, line 1: the header is not valid CSV ({error}). Correct it.") from None
        if not header:
            raise SourceError(f"{path}: the first line is empty. Add a header with column names.")
        header[0] = header[0].removeprefix("\ufeff")
        mapping = _mapping(path, header, columns, required)
        repeated = [name for name in mapping.values() if header.count(name) > 1]
        if repeated:
            raise SourceError(f"{path}, line 1: two columns are named '{repeated[0]}'. Rename one.")
        places = {field: header.index(name) for field, name in mapping.items()}
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                # The reader has dropped the lines since the opening quote and continues with the next one.
                yield (
                    number,
                    NotCsv(f'lines {number} to {reader.line_num} are not valid CSV ({error}); write "" for a quote'),
                )
                continue
            if row is None:
                return
            if len(row) == len(header):
                yield number, {field: row[place] for field, place in places.items()}
            elif row:
                yield number, NotCsv(f"the line has {len(row)} fields, but the header has {len(header)}")


def read_parquet(path: Path, columns: Mapping[str, str], required: Collection[str]) -> Iterator[Record]:
    """Parquet, a few hundred rows as Python objects at a time. columns, required: as in `read_csv`.

    Raises SourceError if the file is not valid Parquet, or lacks a required column or has one of a wrong type.
    """
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            mapping = _mapping(path, file.schema_arrow.names, columns, required)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(dict.fromkeys(mapping.values()))):
                values = {field: _values(path, field, batch[name]) for field, name in mapping.items()}
                for row in zip(*values.values(), strict=True):
                    number += 1
                    yield number, dict(zip(values, row, strict=True))
    except FileNotFoundError:
        raise SourceError(f"{path}: file not found. Correct the path.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{path}: the file cannot be read as Parquet ({error}). Replace it.") from None


def _mapping(
    path: Path, present: Collection[str], columns: Mapping[str, str], required: Collection[str]
) -> dict[str, str]:
    """Our field -> the file's column, for existing columns."""
    names = {field: columns.get(field, field) for field in FIELDS}
    for field, name in names.items():
        if name not in present and (field in columns or field in required):
            hint = " or set as_of_ms, the cutoff time of its texts about users" if field == "as_of" else ""
            raise SourceError(
                f"{path}: column '{name}' is missing.{did_you_mean(name, present)} Rename a column, or map one to "
                f"'{field}' under columns{hint}."
            )
    ours = {"kind": "kind"} if not columns and OURS.issubset(present) else {}
    return ours | {field: name for field, name in names.items() if name in present}


def _values(path: Path, field: str, column: pa.Array) -> list[Any]:
    """A Parquet column as Python values; text as bytes, since Arrow decodes a batch all or nothing."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if field == "as_of":
        column = to_milliseconds(column, "ms", name=str(path))
    text_types = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    if any(is_text(column.type) for is_text in text_types):
        return cast(list[Any], column.cast(pa.large_binary()).to_pylist())
    numbers = field in ("id", "as_of", "prompt_tokens", "output_tokens") and pa.types.is_integer(column.type)
    floats = field in ("as_of", "prompt_tokens", "output_tokens") and pa.types.is_floating(
        column.type
    )  # pandas, if some are missing
    if numbers or floats or pa.types.is_null(column.type):
        return cast(list[Any], column.to_pylist())
    wanted = "string" if field in ("text", "prompt", "kind", "finish_reason") else "int64 or string"
    raise SourceError(f"{path}: the column of '{field}' has type {column.type}. Write it as {wanted}.")
