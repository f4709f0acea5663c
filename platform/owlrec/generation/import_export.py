"""Import and export of knowledge: files from other sources are read into shards; shards are written as one file."""

import gzip
import itertools
import json
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import field_validator

from owlrec.config import Config
from owlrec.errors import SchemaError, SourceError
from owlrec.generation import knowledge_files as files
from owlrec.generation.engines import BadRow, Completion, FailedQuality, SamplingConfig
from owlrec.generation.job import GenerationJob, Outcome, to_tables, write_shard
from owlrec.generation.knowledge_files import Field, Format, NoText, Record, Undecodable, Unusable
from owlrec.generation.quality import RULES, QualityConfig, QualityGate
from owlrec.ids import KINDS, Kind, shard_of, stable_id
from owlrec.prompting.prompts import Prompt, PromptConfig, UnusableRow
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.scenario import Scenario
from owlrec.schema import KNOWLEDGE, MILLISECONDS, conform
from owlrec.shards import Card, Shard
from owlrec.storage import Storage, Writer, file_digest, fingerprint
from owlrec.workspace import Workspace, read_tombstones
from owlrec_decoding import DecodingConfig

# ------------------------------------------------------------------------------------------------------------ exporting
# Export: one JSON-lines or Parquet file of all rows, written atomically.
#
# Tables are written as they come, so an export of 10^8 rows needs the memory of one shard. `read_knowledge_file`
# reads the files of `export_jsonl` and `export_parquet`.


_EXPORTED_AT_ONCE = 2048  # rows converted to Python objects at a time: about 10 MB


def export_jsonl(tables: Iterable[pa.Table], path: str | Path) -> int:
    """Writes knowledge tables (schema.KNOWLEDGE, plus any columns) as one JSON object per line, in UTF-8.

    A name in .gz is compressed. The file appears, or replaces an older one, only when complete. Returns the number of
    rows. Raises SchemaError if a table breaks the contract, and WorkspaceError if the file cannot be written.
    """
    rows = 0
    with _appearing_whole(path) as file, _packing(file) if str(path).endswith(".gz") else nullcontext(file) as stream:
        for table in tables:
            table = conform(table, KNOWLEDGE, name=f"knowledge for {path}")
            for batch in table.to_batches(_EXPORTED_AT_ONCE):
                lines = [json.dumps(row, ensure_ascii=False) for row in batch.to_pylist()]
                stream.write("".join(f"{line}\n" for line in lines).encode())
            rows += table.num_rows
    return rows


def export_parquet(tables: Iterable[pa.Table], path: str | Path) -> int:
    """Writes knowledge tables (schema.KNOWLEDGE, plus any columns) as one Parquet file, in Zstandard.

    Each table is written separately, in row groups of at most 2^20 rows. All must have the columns of the first.
    Returns, raises and replaces like `export_jsonl`; without tables the file has no rows.
    """
    rows = 0
    writer: pq.ParquetWriter | None = None
    with _appearing_whole(path) as file:
        try:
            for table in tables:
                table = conform(table, KNOWLEDGE, name=f"knowledge for {path}")
                writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
                if not table.schema.equals(writer.schema):
                    raise SchemaError(
                        f"knowledge for {path}: a table has columns {', '.join(table.column_names)}, but the "
                        f"first has {', '.join(writer.schema.names)}, or types differ. Export them to separate "
                        "files."
                    )
                writer.write_table(table)
                rows += table.num_rows
            writer = writer or pq.ParquetWriter(file, KNOWLEDGE, compression="zstd")
        finally:
            if writer:
                writer.close()
    return rows


def _packing(file: Writer) -> BinaryIO:
    # No name and no time inside, so the same rows give the same bytes.
    return cast(BinaryIO, gzip.GzipFile("", "wb", 6, cast(BinaryIO, file), mtime=0))


@contextmanager
def _appearing_whole(path: str | Path) -> Iterator[Writer]:
    """A writable file that gets its name only if the block ends without an error."""
    target = Path(path).expanduser()
    with Storage(target.parent).writer(target.name) as writer:
        yield writer


# ------------------------------------------------------------------------------------------------------------ importing
# Import row by row: KAR's files, OpenAI batches, REKI's answers, tables, our own exports.
#
# Every row of the file comes out once, as an `ImportedRow` or as a `RefusedRow` with the reason. The
# cutoff time of a user's text cannot be guessed: if the file does not have it, the caller must give it,
# since samples that are not later would leak.


_SHOWN_CHARACTERS = 300
_LINES_SNIFFED = 100
_INT64 = range(-(2**63), 2**63)


class NoId(Unusable):
    """The id is missing, or neither text nor a whole number."""


class DuplicateId(Unusable):
    """An earlier row has this id and as_of and was used."""


class NoAsOf(Unusable):
    """Neither the row nor the source has the text's cutoff time."""


class BadAsOf(Unusable):
    """The row's as_of is not a whole number of milliseconds since 1970."""


class WrongKind(Unusable):
    """The row of an OwlRec export is of no known kind."""


class ImportSource(Config):
    """One file of imported knowledge, all of one kind."""

    path: str
    format: Format | None = None  # default: by the file's name, and for .json and .jsonl its first lines
    kind: Kind
    id_field: str | None = None  # openai: top-level field with the row's id; default: custom_id
    columns: dict[Field, str] = {}  # our field name -> the file's: {id: sku, text: summary}
    framework: str = "imported"  # name for the method behind the texts
    as_of_ms: int | None = None  # for rows without one; items and cohorts default to 0

    @field_validator("as_of_ms")
    @classmethod
    def _in_milliseconds(cls, value: int | None) -> int | None:
        if value is not None and value != 0 and value not in MILLISECONDS:
            raise ValueError(f"{value} is not a time in milliseconds since 1970, UTC")
        return value


@dataclass(frozen=True, slots=True)
class ImportedRow:
    """One text. Defaults for missing values: finish reason "stop", 0 tokens, prompt ""."""

    id: int
    as_of: int  # ms since 1970, UTC: the text's cutoff
    text: str  # exactly as in the file; may be empty
    prompt: str
    finish_reason: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """An unusable row."""

    row: int  # from 1: the line where it starts (text formats), or the entry (KAR) or row (Parquet)
    raw_id: str  # "" if none could be read
    error: str  # class name
    message: str


def read_knowledge_file(source: ImportSource) -> Iterator[ImportedRow | RefusedRow]:
    """Rows of a file, in order; holds a batch of them and 8 bytes per text in memory, except for KAR's JSON.

    Ids are `ids.stable_id` of the file's, except in OwlRec's own exports (recognized by their columns), whose ids
    are used unchanged and whose rows of other kinds are skipped. Raises SourceError at once for a missing file, an
    unknown format, options that the format does not have, and user texts without a cutoff; while reading, for a file
    that is not valid JSON, CSV or Parquet, lacks a column, or is an export without a row of this kind.
    """
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise SourceError(f"{source.path}: file not found. Correct the path.")
    format_ = source.format or _guess_format(path, source)
    _check_options(source, format_)
    return _rows(source, path, _records(source, path, format_))


def _guess_format(path: Path, source: ImportSource) -> Format:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    by_name: dict[str, Format] = {".klg": "kar", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    if suffix in by_name:
        return by_name[suffix]
    if suffix in (".json", ".jsonl", ".ndjson"):
        records = (record for _, record in itertools.islice(files.json_lines(path), _LINES_SNIFFED))
        first = next((record for record in records if isinstance(record, dict) and record), None)
        if first is None or all(isinstance(value, dict) for value in first.values()):
            if suffix == ".json":
                return "kar"
        elif first.keys() & {"choices", "custom_id"} or isinstance(first.get("response"), dict):
            return "openai"
        elif source.columns.get("id", "id") in first:
            return "jsonl"
    raise SourceError(
        f"{path}: the format cannot be detected from its name and first lines. Set format: kar, openai, jsonl, "
        "csv or parquet."
    )


def _check_options(source: ImportSource, format_: Format) -> None:
    if source.id_field is not None and format_ != "openai":
        raise SourceError(
            f"{source.path}: id_field is only for openai files, but this one is {format_}. Use columns: {{id: ...}}."
        )
    allowed = {"kar": set[str](), "openai": {"prompt", "as_of"}}.get(format_)
    wrong = sorted(source.columns.keys() - allowed) if allowed is not None else []
    if wrong:
        hint = "Use id_field for the id." if format_ == "openai" else "Remove it: the format has no columns."
        raise SourceError(f"{source.path}: columns.{wrong[0]} is not a field of format {format_}. {hint}")
    says_as_of = format_ not in ("kar", "openai") or "as_of" in source.columns
    if source.kind == "user" and source.as_of_ms is None and not says_as_of:
        raise SourceError(
            f"{source.path}: the format has no cutoff for texts about users. Set as_of_ms to the time of the "
            "last behavior in any prompt (ms since 1970, UTC): only later samples read them."
        )


def _records(source: ImportSource, path: Path, format_: Format) -> Iterator[Record]:
    columns = {str(field): name for field, name in source.columns.items()}
    match format_:
        case "kar":
            return files.read_kar(path)
        case "openai":
            return files.read_openai(path, source.id_field or "custom_id", columns)
        case "jsonl":
            return files.read_jsonl(path, columns)
    required = ("id", "text", "as_of") if source.kind == "user" and source.as_of_ms is None else ("id", "text")
    return (files.read_csv if format_ == "csv" else files.read_parquet)(path, columns, required)


def _rows(source: ImportSource, path: Path, records: Iterator[Record]) -> Iterator[ImportedRow | RefusedRow]:
    seen, other_kinds, this_kind, no_json = _SeenIds(), 0, 0, 0
    for number, record in records:
        raw_id = ""
        try:
            if isinstance(record, Unusable):
                raise record
            ours = "kind" in record
            if ours and _text(record, "kind") != source.kind:
                if _text(record, "kind") not in KINDS:
                    raise WrongKind(f"'{_text(record, 'kind')}' is not one of {', '.join(KINDS)}")
                other_kinds += 1
                continue
            raw_id = _raw_id(record)
            row = _row(record, raw_id, source, ours)
            if not seen.add(row):
                raise DuplicateId(f"an earlier row has id {row.id} as of {row.as_of}; keep only one")
        except Unusable as problem:
            message = str(problem).encode(errors="replace").decode()[:_SHOWN_CHARACTERS]
            yield RefusedRow(number, raw_id, type(problem).__name__, message)
            no_json += isinstance(problem, files.NotJson)
        else:
            yield row
        this_kind += 1
    if this_kind and no_json == this_kind:
        raise SourceError(f"{path}: none of its {no_json} lines is a JSON object. Set another format.")
    if other_kinds and not this_kind:
        raise SourceError(f"{path}: none of its {other_kinds} rows is of kind '{source.kind}'. Set another kind.")


def _row(record: dict[str, Any], raw_id: str, source: ImportSource, ours: bool) -> ImportedRow:
    text = _text(record, "text")
    if text is None:
        value = record.get("text")
        raise NoText("the row has no text" if value is None else f"the text has type {type(value).__name__}")
    return ImportedRow(
        id=_own_id(raw_id) if ours else stable_id(raw_id),
        as_of=_as_of(record, source, ours),
        text=text,
        prompt=_text(record, "prompt") or "",
        finish_reason=_text(record, "finish_reason") or "stop",
        prompt_tokens=_count(record.get("prompt_tokens")),
        output_tokens=_count(record.get("output_tokens")),
    )


def _text(record: dict[str, Any], field: str) -> str | None:
    """A text field, checked to be UTF-8; None if it is missing or not text. Raises the Unusable instead."""
    value = record.get(field)
    if isinstance(value, Unusable):
        raise value
    try:
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, str):
            value.encode()
            return value
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise Undecodable(f"{field} is not valid UTF-8 ({error.reason} at {error.start})") from None
    return None


def _raw_id(record: dict[str, Any]) -> str:
    value = record.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = _text(record, "id")
    if text:
        return text
    problem = "is empty" if value in (None, "", b"") else f"has type {type(value).__name__}"
    raise NoId(f"the id {problem}; set id_field or columns if the file uses another name")


def _own_id(raw_id: str) -> int:
    try:
        id_ = int(raw_id)
    except ValueError:
        id_ = 2**63
    if id_ not in _INT64:
        raise NoId("an OwlRec export has int64 ids; for other ids, drop one of its columns or map columns")
    return id_


def _as_of(record: dict[str, Any], source: ImportSource, ours: bool) -> int:
    value = record.get("as_of")
    if isinstance(value, bytes | str):
        value = _text(record, "as_of") or None
    if value is None or value != value:  # pandas writes missing numbers as NaN
        if source.as_of_ms is None and source.kind == "user":
            raise NoAsOf("the row has no as_of; add one, or set as_of_ms for all such rows")
        return source.as_of_ms or 0
    try:
        moment = int(value)
        exact = isinstance(value, str) or (moment == value and not isinstance(value, bool))
    except (ValueError, OverflowError, TypeError):
        moment, exact = 0, False
    # A value in seconds would look older than any sample and hide every leak. 0 is right for texts that know no
    # behavior; in a foreign row of a user it is far more often a filler.
    likely = moment in _INT64 if ours else moment in MILLISECONDS or (moment == 0 and source.kind != "user")
    if not (exact and likely):
        raise BadAsOf(f"as_of {str(value)[:40]} is not a time in milliseconds since 1970, UTC")
    return moment


def _count(value: object) -> int:
    """A number of tokens; 0 if invalid, since a missing count must not lose a text."""
    try:
        count = int(value) if isinstance(value, int | float | str | bytes) else 0
    except (ValueError, OverflowError):
        return 0
    return count if 0 <= count < 2**31 else 0


class _SeenIds:
    """Set of pairs of id and as_of at 8 bytes each, while Python's own takes about 150: a sorted array of 64-bit
    hashes, plus a small set of the newest.
    """

    _NEWEST = 1 << 18

    def __init__(self) -> None:
        self._newest: set[int] = set()
        self._sorted = np.zeros(0, np.int64)

    def add(self, row: ImportedRow) -> bool:
        """Adds a row; returns False if its id and as_of were already there."""
        key = hash(struct.pack("<qq", row.id, row.as_of))
        place = self._sorted.searchsorted(key)
        if key in self._newest or (place < len(self._sorted) and self._sorted[place] == key):
            return False
        self._newest.add(key)
        if len(self._newest) == self._NEWEST:
            newest = np.fromiter(self._newest, np.int64, self._NEWEST)
            # "stable" is a merge sort: one pass over already sorted data.
            self._sorted = np.sort(np.concatenate([self._sorted, np.sort(newest)]), kind="stable")
            self._newest.clear()
        return True


# --------------------------------------------------------------------------------------------------------------- import
# Adds imported knowledge as a job: imported rows pass the same gate into the same tables as generated ones.
#
# All imports of a workspace form one job, in which each import replaces earlier ones of its kind. A file of
# any length is read once: its rows are split into buckets by the hash of their id on the local disk, and each bucket
# becomes whole shards. A text's cutoff may be recent, since no sample before its as_of reads it.
# A flagged text cannot be generated again, so `retry` and `fall_back` send it to the dead letters.


_ROWS_AT_ONCE = 1 << 14
_MOST_BUCKETS = 256  # open files while splitting the rows
_ROWS = pa.schema(
    [
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("error", pa.string()),  # null if the row is usable
        ("message", pa.string()),
    ]
)


def import_knowledge_file(
    workspace: Workspace, scenario: Scenario, quality: QualityConfig, source: ImportSource
) -> tuple[GenerationJob, dict[str, Card]]:
    """Imports a file of knowledge into the workspace, replacing all imported knowledge of its kind; returns the job of
    all imports, and the cards of this one.

    Raises SourceError for a file that cannot be read as a whole, and for a kind without a table in the workspace;
    WorkspaceError if `prepare` has not run. A bad row goes to the dead letters.
    """
    if source.kind == "cohort":
        raise SourceError(f"{source.path}: knowledge of kind '{source.kind}' cannot be imported, only user and item.")
    rows = read_knowledge_file(source)  # reports file errors before anything is removed
    named = fingerprint("imported", scenario, quality, RULES)
    job = GenerationJob(scenario, PromptConfig(), SamplingConfig(), DecodingConfig(), quality, named)
    n_shards = workspace.n_shards(source.kind)
    digest = fingerprint(file_digest(source.path), source)
    spill = workspace.scratch()
    try:
        buckets = _deal(rows, spill, min(n_shards, _MOST_BUCKETS))
        stage = _ImportStage(job, source.kind, source.framework, buckets)
        inputs = {Shard(source.kind, number): digest for number in range(n_shards)}
        # Repeated even if the cards belong to this file: nothing else shows that the spill was read to its end.
        cards = run_stage(workspace, stage, inputs, Pool(in_flight=1), again=list(inputs))
    finally:
        shutil.rmtree(spill, ignore_errors=True)
    return job, cards


def _deal(rows: Iterator[ImportedRow | RefusedRow], folder: Path, n: int) -> list[Path]:
    """Writes rows into `n` files by the hash of their id, keeping the order of the source."""
    paths = [folder / f"{number}.arrows" for number in range(n)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), _ROWS)) for path in paths]
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            table = pa.Table.from_pylist([_record(row) for row in chunk], schema=_ROWS)
            bucket = shard_of(table["id"].to_numpy(), n)
            for number in np.unique(bucket).tolist():
                writers[number].write_table(table.filter(pa.array(bucket == number)))
    return paths


def _record(row: ImportedRow | RefusedRow) -> dict[str, object]:
    if isinstance(row, RefusedRow):
        message = f"row {row.row}, id {row.raw_id!r}: {row.message}"
        id_ = stable_id(row.raw_id) if row.raw_id else -row.row
        return {"id": id_, "as_of": 0, "error": row.error, "message": message}
    return {name: getattr(row, name, None) for name in _ROWS.names}


@dataclass
class _ImportStage(Stage):
    """Shards of imported texts, from rows split into buckets."""

    job: GenerationJob
    kind: Kind
    framework: str
    buckets: list[Path]

    name = "import"

    @property
    def folder(self) -> str:  # type: ignore[override]
        """See Stage.folder."""
        return self.job.folder

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        n_shards = workspace.n_shards(self.kind)
        table = pa.ipc.open_stream(str(self.buckets[shard.number % len(self.buckets)])).read_all()
        mine = shard_of(table["id"].to_numpy(), n_shards) == shard.number
        if self.kind == "user":
            mine &= ~read_tombstones(workspace).among(table["id"].to_numpy())
        gate = QualityGate(self.job.quality, self.job.scenario)
        checked = [_check_row(self.kind, row, gate) for row in table.filter(pa.array(mine)).to_pylist()]
        rows, outcomes = [row for row, _ in checked], [outcome for _, outcome in checked]
        knowledge, dead = to_tables(self.job, self.framework, rows, outcomes)
        return write_shard(work, KNOWLEDGE.empty_table(), knowledge, dead, outcomes)


def _check_row(kind: Kind, row: dict[str, object], gate: QualityGate) -> tuple[Prompt | UnusableRow, Outcome]:
    id_, as_of = int(str(row["id"])), int(str(row["as_of"]))
    if row["error"]:
        error, message = str(row["error"]), str(row["message"])
        return UnusableRow(kind, id_, as_of, error, message), Outcome(BadRow(message, error))
    text, asked, reason = str(row["text"]), str(row["prompt"]), str(row["finish_reason"])
    prompt = Prompt(kind, id_, as_of, "", asked, "")
    answer = Completion(text, int(str(row["prompt_tokens"])), int(str(row["output_tokens"])), reason)
    flags = gate.flags(text, prompt=asked, finish_reason=reason)
    if gate.action(flags) != "keep":
        failed = FailedQuality(f"flagged {', '.join(flags)}: {text[:120]!r}")
        return prompt, Outcome(failed, flags, flags)
    return prompt, Outcome(answer, flags, flags)
