"""Knowledge made elsewhere becomes a job's: imported rows pass the same gate into the same tables as generated ones.

All imports of a workspace make up one job, in which each replaces what an earlier one brought of its kind. A file of
any length is read once: its rows are dealt into buckets by the hash of their id on the local disk, and each bucket then
becomes whole shards. A text may know as much of a user as it likes, since no sample before its as_of reads it. A
flagged text cannot be asked for again, so `retry` and `fall_back` send it to the dead letters.
"""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from owlrec.decoding import DecodingConfig
from owlrec.errors import SourceError
from owlrec.generation import importing
from owlrec.generation.engine import BadRow, Completion, FailedQuality, SamplingConfig
from owlrec.generation.job import GenerationJob
from owlrec.generation.quality import QualityConfig, QualityGate
from owlrec.generation.worker import Outcome, to_tables, write_shard
from owlrec.prompting.rows import Prompt, PromptConfig, UnusableRow
from owlrec.runner import Pool, Result, Stage, Work, run_stage
from owlrec.scenario import Scenario
from owlrec.schema import KNOWLEDGE, Kind, shard_of, stable_id
from owlrec.shards import Card, Shard
from owlrec.storage import file_digest, fingerprint
from owlrec.tombstones import read_tombstones
from owlrec.workspace import Workspace

_ROWS_AT_ONCE = 1 << 14
_MOST_BUCKETS = 256  # files that are open while the rows are dealt
_ROWS = pa.schema(
    [
        ("id", pa.int64()),
        ("as_of", pa.int64()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("error", pa.string()),  # null where the row can be used
        ("message", pa.string()),
    ]
)


def adopt(
    workspace: Workspace, scenario: Scenario, quality: QualityConfig, source: importing.ImportSource
) -> tuple[GenerationJob, dict[str, Card]]:
    """Reads a file of knowledge into the workspace, in place of all imported knowledge of its kind; the job of all
    imports, and the cards of this one.

    Raises SourceError for a file that cannot be read as a whole, and for a kind that no table of the workspace has;
    WorkspaceError where `prepare` has not run. A bad row goes to the dead letters.
    """
    if source.kind == "cohort":
        raise SourceError(
            f"{source.path}: knowledge of kind '{source.kind}' cannot be imported yet, only user and item."
        )
    rows = importing.read_knowledge_file(source)  # complains of the file before anything is removed
    named = fingerprint("imported", scenario, quality)
    job = GenerationJob(scenario, PromptConfig(), SamplingConfig(), DecodingConfig(), quality, named)
    n_shards = workspace.n_shards(source.kind)
    digest = fingerprint(file_digest(source.path), source)
    spill = workspace.scratch()
    try:
        buckets = _deal(rows, spill, min(n_shards, _MOST_BUCKETS))
        stage = _ImportStage(job, source.kind, source.framework, buckets)
        inputs = {Shard(source.kind, number): digest for number in range(n_shards)}
        # Made again even where the cards are of this very file: nothing else says that the spill was read to its end.
        cards = run_stage(workspace, stage, inputs, Pool(in_flight=1), again=list(inputs))
    finally:
        shutil.rmtree(spill, ignore_errors=True)
    return job, cards


def _deal(rows: Iterator[importing.ImportedRow | importing.RefusedRow], folder: Path, n: int) -> list[Path]:
    """Writes rows into `n` files by the hash of their id; in each they keep the order of the source."""
    paths = [folder / f"{number}.arrows" for number in range(n)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), _ROWS)) for path in paths]
        while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
            table = pa.Table.from_pylist([_record(row) for row in chunk], schema=_ROWS)
            bucket = shard_of(table["id"].to_numpy(), n)
            for number in np.unique(bucket).tolist():
                writers[number].write_table(table.filter(pa.array(bucket == number)))
    return paths


def _record(row: importing.ImportedRow | importing.RefusedRow) -> dict[str, object]:
    if isinstance(row, importing.RefusedRow):
        message = f"row {row.row}, id {row.raw_id!r}: {row.message}"
        id_ = stable_id(row.raw_id) if row.raw_id else -row.row
        return {"id": id_, "as_of": 0, "error": row.error, "message": message}
    return {name: getattr(row, name, None) for name in _ROWS.names}


@dataclass
class _ImportStage(Stage):
    """Shards of imported texts, from rows that were dealt into buckets."""

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
        judged = [_judge(self.kind, row, gate) for row in table.filter(pa.array(mine)).to_pylist()]
        rows, outcomes = [row for row, _ in judged], [outcome for _, outcome in judged]
        knowledge, dead = to_tables(self.job, self.framework, rows, outcomes)
        return write_shard(work, KNOWLEDGE.empty_table(), knowledge, dead, outcomes)


def _judge(kind: Kind, row: dict[str, object], gate: QualityGate) -> tuple[Prompt | UnusableRow, Outcome]:
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
