"""What a shard of a generation job is, and how one knows that it is done.

A shard is one part file of the users or items table, or a file of prompts, and its manifest, written last and
atomically, is the only thing a resumed job looks at: no manifest means do it, one of another input, of another job, cut
off or beside a file whose checksum differs means do it again. Names are deterministic, so redoing overwrites and never
doubles a row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from owlrec.decoding import DecodingConfig
from owlrec.decoding.counters import DecoderCounters, add_counters
from owlrec.errors import WorkspaceError
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.quality import QualityConfig
from owlrec.prompting.rows import PromptConfig
from owlrec.scenario import Scenario
from owlrec.schema import KINDS, KNOWLEDGE, TABLES, Kind
from owlrec.shards import needed_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

COUNTERS = "decoder.json"
_READERS = 16  # threads that check shards: on an object store each waits for its answer most of the time


@dataclass(frozen=True)
class Job:
    """All that shapes the texts of a generation run. Its fingerprint names the folder that the run writes to."""

    scenario: Scenario
    prompts: PromptConfig
    sampling: SamplingConfig
    decoding: DecodingConfig
    quality: QualityConfig
    fingerprint: str
    cohorts: str | None = None  # the folder of cohorts whose pools rows draft from; shapes no text

    @property
    def folder(self) -> str:
        """The job's folder in the workspace."""
        return f"knowledge/{self.fingerprint[:16]}"

    @property
    def counters_file(self) -> str:
        """What the decoder counted over the whole job (DecoderCounters), relative to the workspace."""
        return f"{self.folder}/{COUNTERS}"


class Shard(BaseModel):
    """One part of a table, and a digest of the data that it stands for."""

    kind: Kind
    part: str  # file name in the table's folder
    input_fingerprint: str
    prompts: str | None = None  # a file of ready-made prompts in the place of a table (schema.PROMPTS)

    @property
    def name(self) -> tuple[str, str]:
        """What tells the shard from the others of its job."""
        return self.kind, self.part

    @property
    def input_file(self) -> str:
        """What is read, relative to the workspace."""
        return self.prompts or f"tables/{TABLES[self.kind]}/{self.part}"

    def file(self, job: Job, what: Literal["knowledge", "dead", "manifest", "claim"]) -> str:
        """Path of one of the shard's files, relative to the workspace."""
        stem = self.part.removesuffix(".parquet").replace("part", "shard")
        folder = f"{job.folder}/{self.kind}"
        return {
            "knowledge": f"{folder}/{stem}.parquet",
            "dead": f"{folder}/dead/{stem}.parquet",
            "manifest": f"{folder}/{stem}.json",
            "claim": f"{folder}/claims/{stem}",
        }[what]


class ShardManifest(BaseModel):
    """What a finished shard leaves behind. rows_in == rows_out + rows_dead always."""

    shard: Shard
    job_fingerprint: str
    rows_in: int
    rows_out: int
    rows_dead: int
    rows_kept: int = 0  # of rows_out, texts of an earlier input that asks the same: they cost no call and no token
    sha256: str  # of the knowledge file
    dead_sha256: str
    prompt_tokens: int
    output_tokens: int
    accepted: int  # of them, tokens that the speculative decoder drafted: each saved a step of the model
    seconds: float
    finished: float  # seconds since 1970
    engine: str  # which engine of the run wrote it
    flags: dict[str, int] = {}  # texts by quality flag, as first written
    actions: dict[str, int] = {}  # what the quality gate did: retried, mended, fallen_back, dropped


def plan_shards(workspace: Workspace, kinds: Iterable[Kind] = ("user", "item")) -> list[Shard]:
    """All shards of the prepared tables. Raises WorkspaceError where `prepare` has not finished."""
    prepared = needed_stage(workspace, "prepare", "the tables are not prepared")
    return [
        Shard(kind=kind, part=part, input_fingerprint=fingerprint(prepared.fingerprint, kind, part))
        for kind in kinds
        for part in workspace.table_parts(TABLES[kind])
    ]


def plan_prompt_shards(workspace: Workspace, kind: Kind, folder: str) -> list[Shard]:
    """A shard for each file of ready-made prompts (schema.PROMPTS) in `folder`; its content is its fingerprint."""
    files = {name: f"{folder}/{name}" for name in workspace.names(folder) if name.endswith(".parquet")}
    return [
        Shard(kind=kind, part=name, input_fingerprint=workspace.digest(path), prompts=path)
        for name, path in files.items()
    ]


def finished_shard(workspace: Workspace, job: Job, shard: Shard) -> ShardManifest | None:
    """The shard's manifest, if it is done for this very input and its files are there and whole."""
    try:
        manifest = ShardManifest.model_validate(workspace.read_json(shard.file(job, "manifest")))
        if manifest.shard != shard or manifest.job_fingerprint != job.fingerprint:
            return None
        whole = workspace.digest(shard.file(job, "knowledge")) == manifest.sha256
        whole &= workspace.digest(shard.file(job, "dead")) == manifest.dead_sha256
    except (WorkspaceError, ValidationError):  # absent, or cut off in the middle
        return None
    return manifest if whole else None


def earlier_texts(workspace: Workspace, job: Job, shard: Shard) -> pa.Table | None:
    """The knowledge that this job wrote for the shard when its input was another one; None where there is none that
    is whole."""
    try:
        manifest = ShardManifest.model_validate(workspace.read_json(shard.file(job, "manifest")))
    except (WorkspaceError, ValidationError):
        return None
    whole = manifest.shard != shard and finished_shard(workspace, job, manifest.shard) is not None
    return workspace.read_parquet(shard.file(job, "knowledge")) if whole else None


def finished_shards(workspace: Workspace, job: Job, shards: Iterable[Shard]) -> list[ShardManifest]:
    """The manifests of those among `shards` that are done, in their order; several files are checked at once."""
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda shard: finished_shard(workspace, job, shard), shards)
        return [manifest for manifest in found if manifest is not None]


def keep_counters(workspace: Workspace, job: Job, counters: DecoderCounters) -> DecoderCounters:
    """Adds what the decoder counted to what earlier, interrupted runs of this job did; returns the sum."""
    if workspace.exists(job.counters_file):
        counters = add_counters([DecoderCounters.model_validate(workspace.read_json(job.counters_file)), counters])
    workspace.write_json(job.counters_file, counters.model_dump())
    return counters


def iterate_knowledge(workspace: Workspace, folder: str, kinds: tuple[Kind, ...] = KINDS) -> Iterator[pa.Table]:
    """The knowledge tables of a finished job, one shard at a time.

    folder: the job's folder, relative to the workspace. Only shards with a manifest count: a file without one is
    half-done work.
    """
    for kind in kinds:
        for name in workspace.names(folder, kind):
            if name.endswith(".json"):
                yield workspace.read_parquet(f"{folder}/{kind}/{name.removesuffix('.json')}.parquet")


def add_manifests(manifests: Iterable[ShardManifest]) -> Counter[str]:
    """Rows and tokens by kind, texts by flag, and what the quality gate did, summed over shards."""
    counts = Counter({f"{kind}_{name}": 0 for kind in KINDS for name in ("rows_out", "rows_dead")})
    for manifest in manifests:
        for name in ("rows_out", "rows_dead", "prompt_tokens", "output_tokens"):
            counts[f"{manifest.shard.kind}_{name}"] += getattr(manifest, name)
        counts.update({f"flag_{flag}": n for flag, n in manifest.flags.items()})
        counts.update({f"quality_{action}": n for action, n in manifest.actions.items()})
    return counts


def iterate_manifests(workspace: Workspace, folder: str) -> Iterator[ShardManifest]:
    """The shard manifests of a finished job, read one at a time."""
    for kind in KINDS:
        for name in workspace.names(folder, kind):
            if name.endswith(".json"):
                yield ShardManifest.model_validate(workspace.read_json(f"{folder}/{kind}/{name}"))


def read_knowledge(workspace: Workspace, folder: str, kind: Kind) -> pa.Table:
    """All knowledge of one kind that a finished job wrote."""
    return pa.concat_tables([KNOWLEDGE.empty_table(), *iterate_knowledge(workspace, folder, (kind,))])
