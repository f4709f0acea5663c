"""The file formats in which others keep LLM knowledge: KAR's JSON, OpenAI's JSON lines, plain JSON lines, CSV, Parquet.

A reader turns a file into records with our field names and leaves judging them to `importing`. What makes one record
unusable becomes an `Unusable` in its place, so that a bad line stops nobody; only a file that is wrong as a whole
raises. Text is decoded a line at a time: one bad byte costs its own row.
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
OURS = frozenset({"kind", "id", "as_of", "text", "framework"})  # the columns by which an OwlRec export is known
LONGEST_LINE_BYTES = 16 << 20  # 1,000 times a long answer; bounds the memory that a file without line breaks takes
_PARQUET_ROWS = 512


class Unusable(Exception):
    """A record that cannot become knowledge; the names of its subclasses tell the user why."""


class NotJson(Unusable):
    """A line that is no JSON object."""


class NotCsv(Unusable):
    """Lines whose quotes or number of fields do not fit."""


class Undecodable(Unusable):
    """Bytes that are no UTF-8, or a lone surrogate, which no UTF-8 can hold."""


class NoText(Unusable):
    """There is no text, or something else stands in its place."""


class ApiError(Unusable):
    """The API answered this request with an error."""


# The number of the line, entry or row (from 1), and its fields by FIELDS; `kind` is among them in an OwlRec export.
Record = tuple[int, dict[str, Any] | Unusable]


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where it is gzip (known by its first bytes, not its name).

    Raises SourceError where the file is missing, unreadable or a broken gzip, also later, while it is read.
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
    """The lines with their line breaks. One longer than LONGEST_LINE_BYTES is cut, which makes it a bad row."""
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
    """A JSON object as its pairs: a dict would lose all but the last of a duplicate id."""


def read_kar(path: Path) -> Iterator[Record]:
    """KAR's one JSON object {id: {"prompt", "answer"}}; its own files say "ans". The whole file is held in memory.

    Raises SourceError where the file is no JSON object.
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
    """JSON lines of chat completions: bare ones with an id of theirs, or the output of OpenAI's batch API.

    id_field: the top-level field that holds the row's id. columns: the top-level fields of `prompt` and `as_of`; the
    prompt is otherwise looked for in `prompt_txt` (as in REKI's files) and `prompt`.
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
    """Text, finish reason and token counts of one response. Raises ApiError or NoText where it has no text."""
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
    """JSON lines of plain columns, such as `export_jsonl` writes. columns: our field name -> the file's."""
    names = {field: columns.get(field, field) for field in FIELDS}
    for number, record in json_lines(path):
        if isinstance(record, Unusable) or (not columns and record.keys() >= OURS):
            yield number, record
        else:
            yield number, {field: record.get(name) for field, name in names.items()}


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a JSON-lines file, as they are; blank lines are passed over."""
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

    required: the fields without which the file is refused. Raises SourceError where the header lacks one of them.
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
                # The reader has dropped the lines since the opening quote; it goes on with the next one.
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

    Raises SourceError where the file is no Parquet, lacks a required column or has one of a wrong type.
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
    """Our field -> the file's column, for those that are there."""
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
    """A Parquet column as Python values; text as bytes, since Arrow decodes a batch as a whole or not at all."""
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
    )  # pandas, where some are missing
    if numbers or floats or pa.types.is_null(column.type):
        return cast(list[Any], column.to_pylist())
    wanted = "string" if field in ("text", "prompt", "kind", "finish_reason") else "int64 or string"
    raise SourceError(f"{path}: the column of '{field}' has type {column.type}. Write it as {wanted}.")
