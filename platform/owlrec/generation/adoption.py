"""Knowledge made elsewhere becomes a job's: imported rows pass the same gate into the same tables as generated ones.

All imports of a workspace make up one job, in which each replaces what an earlier one brought of its kind. Two things
are refused to a row besides what the file reader refuses: a user's text that knows more of the user than the samples
allow would leak the future into training, and a flagged text cannot be asked for again, so `retry` and `fall_back`
send it to the dead letters.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from owlrec import __version__
from owlrec.decoding import DecodingConfig
from owlrec.errors import SourceError
from owlrec.generation import importing
from owlrec.generation.engine import BadRow, Completion, FailedQuality, SamplingConfig
from owlrec.generation.ledger import open_job
from owlrec.generation.quality import QualityConfig, QualityGate
from owlrec.generation.shard_work import Outcome, Tally, to_tables, write_shard
from owlrec.generation.shards import Job, Shard, ShardManifest, iterate_manifests
from owlrec.prompting.rows import Prompt, PromptConfig, UnusableRow
from owlrec.scenario import Scenario
from owlrec.schema import Kind, stable_id
from owlrec.shards import Stopwatch
from owlrec.storage import file_digest, fingerprint
from owlrec.workspace import Workspace, shard_file


@dataclass(frozen=True)
class Adopted:
    """A finished import: its job, and the manifests of all that was ever imported into it."""

    job: Job
    manifests: list[ShardManifest]


def adopt(
    workspace: Workspace,
    scenario: Scenario,
    quality: QualityConfig,
    source: importing.ImportSource,
    *,
    shard_rows: int,
) -> Adopted:
    """Reads a file of knowledge into the workspace, in place of all imported knowledge of its kind.

    Raises SourceError for a file that cannot be read as a whole, and for a kind that no table of the workspace has;
    WorkspaceError where `prepare` has not run. A bad row goes to the dead letters.
    """
    if source.kind == "cohort":
        raise SourceError(
            f"{source.path}: knowledge of kind '{source.kind}' cannot be imported yet, only user and item."
        )
    rows = importing.read_knowledge_file(source)  # complains of the file before anything is removed
    read_until = _histories(workspace) if source.kind == "user" else None
    print_ = fingerprint("imported", scenario, quality, __version__)
    job = Job(scenario, PromptConfig(), SamplingConfig(), DecodingConfig(), quality, print_)
    open_job(workspace, job)
    gate = QualityGate(quality, scenario)
    workspace.delete_dir(job.folder, source.kind)
    digest = fingerprint(file_digest(source.path), source)
    for number in itertools.count():
        watch, chunk = Stopwatch(), list(itertools.islice(rows, shard_rows))
        if not chunk:
            break
        judged = [_judge(source.kind, row, read_until, gate) for row in chunk]
        tally = Tally()
        for _, outcome in judged:
            tally.add(outcome)
        knowledge, dead = to_tables(job, source.framework, [row for row, _ in judged], [out for _, out in judged])
        shard = Shard(kind=source.kind, part=shard_file(number), input_fingerprint=digest)
        write_shard(workspace, job, shard, knowledge, dead, tally, seconds=watch.seconds, engine_name="import")
    return Adopted(job, list(iterate_manifests(workspace, job.folder)))


@dataclass(frozen=True)
class _ReadUntil:
    """Up to which moment the samples allow each user's text to know them."""

    ids: np.ndarray  # int64 [n], sorted
    as_of: np.ndarray  # int64 [n], ms

    def of(self, id_: int) -> int | None:
        place = int(np.searchsorted(self.ids, id_))
        return int(self.as_of[place]) if place < len(self.ids) and self.ids[place] == id_ else None


def _histories(workspace: Workspace) -> _ReadUntil:
    table = workspace.read_table("histories", ["user_id", "as_of"])
    ids, as_of = table["user_id"].to_numpy(), table["as_of"].to_numpy()
    order = np.argsort(ids, kind="stable")
    return _ReadUntil(ids[order], as_of[order])


def _judge(
    kind: Kind, row: importing.ImportedRow | importing.RefusedRow, read_until: _ReadUntil | None, gate: QualityGate
) -> tuple[Prompt | UnusableRow, Outcome]:
    if isinstance(row, importing.RefusedRow):
        message = f"row {row.row}, id {row.raw_id!r}: {row.message}"
        bad = UnusableRow(kind, stable_id(row.raw_id) if row.raw_id else -row.row, 0, row.error, message)
        return bad, Outcome(BadRow(message, row.error))
    prompt = Prompt(kind, row.id, row.as_of, "", row.prompt, "")
    allowed = read_until.of(row.id) if read_until is not None else None
    if allowed is not None and row.as_of > allowed:
        message = (
            f"user {row.id}: the text knows the user up to {row.as_of}, but samples begin after {allowed}. "
            "Import a text of an earlier moment, or prepare the workspace with a later split."
        )
        return prompt, Outcome(BadRow(message, "LeaksTheFuture"))
    answer = Completion(row.text, row.prompt_tokens, row.output_tokens, row.finish_reason)
    flags = gate.flags(row.text, prompt=row.prompt, finish_reason=row.finish_reason)
    if gate.action(flags) != "keep":
        failed = FailedQuality(f"flagged {', '.join(flags)}: {row.text[:120]!r}")
        return prompt, Outcome(failed, flags, flags)
    return prompt, Outcome(answer, flags, flags)
