"""Collects what a run left in its workspace into a report: stages, arms, texts, the release and its lookup latency.

Only manifests, results and a few rows are read, so a report of 10^8 users costs no more than one of a hundred.
"""

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.cohorts.model import read_profiles
from owlrec.ctr.comparison import GridScores
from owlrec.ctr.experiment import TrialResult, summarise
from owlrec.encoding.code_quality import QuantisationReport
from owlrec.encoding.coded_vectors import read_reports
from owlrec.generation.job import decoder_counters, iterate_knowledge
from owlrec.generation.models import PACKAGED
from owlrec.ops.report_data import ArmFigures, KnowledgeSample, ReportData, StageFigures
from owlrec.ops.throughput import throughput
from owlrec.ranking.results import read_results
from owlrec.releases.interface import measure_lookup
from owlrec.releases.release import Release
from owlrec.schema import KINDS, KNOWLEDGE, Kind, shard_of
from owlrec.shards import Artifact, Card, finished_stage
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

STAGES = ("prepare", "cohorts", "generate", "encode", "publish", "train_ctr")
_SAMPLES_A_KIND = 3
_LENGTH_ROWS = 20_000
_NOTE = (
    "A gain is the LLM's only where `knowledge` beats both `shuffled` (the same vectors given to other ids: what the "
    "adaptor's extra parameters are worth) and `metadata` (titles, attributes and history encoded without an LLM: what "
    "the text encoder is worth)."
)
_NOTES_ON_MODELS = {
    PACKAGED: "SmolLM2-135M makes up most facts: with it expect no gain over metadata. A stronger model in the "
    "recipe's engine section changes the texts, and nothing else of the run.",
    "echo": "The engine echo answers with invented words, so these texts can be worth nothing: it shows the machinery.",
}


def collect(
    workspace: Workspace,
    release: Release,
    results: list[TrialResult],
    *,
    scores: GridScores | None,
    run: str,
    protocol: str,
    facts: Mapping[str, str],
) -> ReportData:
    """All figures of a run. Stages without a manifest are left out.

    scores: the test scores of the trials, where they left any: without them differences have no interval.
    """
    manifests = [m for stage in STAGES if (m := finished_stage(workspace, stage))]
    cards = list(Artifact(workspace, _knowledge_folder(manifests)).cards().values())
    texts = {kind: _some_rows(workspace, manifests, kind) for kind in KINDS}
    of_model = _NOTES_ON_MODELS.get(release.manifest.model)
    return ReportData(
        run=run,
        finished=time.strftime("%Y-%m-%d %H:%M", time.localtime()),
        hardware=hardware_line(),
        facts=dict(facts),
        protocol=protocol,
        arms=arm_figures(results, scores),
        stages=[_stage_figures(m) for m in manifests],
        knowledge_tokens={kind: table["output_tokens"].to_pylist() for kind, table in texts.items() if table.num_rows},
        samples=[s for kind, table in texts.items() for s in _samples(workspace, kind, table)],
        release={
            "name": release.name,
            "texts": ", ".join(f"{n:,} {kind}s" for kind, n in release.manifest.knowledge.items()),
            "dimension": str(release.manifest.dim),
            "model": release.manifest.model,
            "encoder": release.manifest.encoder,
        },
        throughput=throughput(cards),
        decoder=decoder_counters(cards),
        semantic_ids=_semantic_ids(workspace, manifests),
        ranker=read_results(workspace),
        lookup=lookup_figures(release, _some_users(workspace)),
        notes=[_NOTE, of_model] if of_model else [_NOTE],
        versions={name: metadata.version(name) for name in ("ray", "pyarrow", "lmdb", "numpy")},
    )


def _some_users(workspace: Workspace) -> np.ndarray:
    return workspace.read_shard("users", 0, ["user_id"])["user_id"].to_numpy()


def lookup_figures(release: Release, ids: np.ndarray) -> dict[str, str]:
    """Latency of single lookups, as the report and the console print them."""
    figures = measure_lookup(release.store, "user", ids)
    if not figures["n"]:
        return {}
    return {
        what: (
            f"p50 {figures[f'{what}_p50_us']:.0f} µs, p99 {figures[f'{what}_p99_us']:.0f} µs "
            f"({figures['n']:.0f} single gets)"
        )
        for what in ("knowledge", "vector")
    }


def hardware_line() -> str:
    """The machine in a line, as every table of figures needs it."""
    memory = psutil.virtual_memory().total / 2**30
    processor = ", ".join([platform.machine(), *_matrix_instructions()])
    python = platform.python_version()
    return f"{os.cpu_count()} CPU cores ({processor}), {memory:.0f} GiB memory, Python {python}"


def _matrix_instructions() -> list[str]:
    """What decides an LLM's speed on a CPU, of what Linux says of the first one."""
    with suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
        return [name for flag, name in (("avx512_bf16", "AVX512-BF16"), ("amx_tile", "AMX")) if flag in flags]
    return []


def arm_figures(results: list[TrialResult], scores: GridScores | None = None) -> list[ArmFigures]:
    """Results grouped by backbone and arm, one value a seed; differences and slices as `summarise` finds them."""
    groups: dict[tuple[str, str], list[TrialResult]] = {}
    for result in results:
        groups.setdefault((result.backbone, result.arm), []).append(result)
    return [
        ArmFigures(
            backbone=summary.backbone,
            arm=summary.arm,
            auc=[r.test.auc for r in group],
            gauc=[r.test.gauc for r in group if r.test.gauc is not None],
            log_loss=[r.test.log_loss for r in group],
            valid_auc=[r.valid.auc for r in group],
            calibration_error=[e for r in group if (e := r.test.calibration_error) is not None],
            differences=dict(summary.differences),
            slices=summary.slices,
        )
        for summary, group in zip(summarise(results, scores), groups.values(), strict=True)
    ]


def _stage_figures(manifest: Card) -> StageFigures:
    def total(suffix: str) -> int:
        return sum(int(v) for k, v in manifest.counts.items() if k.endswith(suffix))

    return StageFigures(
        stage=manifest.stage,
        seconds=manifest.seconds,
        prompt_tokens=total("_prompt_tokens"),
        output_tokens=total("_output_tokens"),
        rows=total("_rows_out"),
    )


def _semantic_ids(workspace: Workspace, manifests: list[Card]) -> dict[str, QuantisationReport]:
    return next((read_reports(workspace, m.outputs["vectors"]) for m in manifests if m.stage == "encode"), {})


def _knowledge_folder(manifests: list[Card]) -> str:
    return next(m.outputs["knowledge"] for m in manifests if m.stage == "generate")


def _some_rows(workspace: Workspace, manifests: list[Card], kind: Kind) -> pa.Table:
    folder = _knowledge_folder(manifests)
    tables: list[pa.Table] = []
    for table in iterate_knowledge(workspace, folder, (kind,)):
        tables.append(table)
        if sum(t.num_rows for t in tables) >= _LENGTH_ROWS:
            break
    return pa.concat_tables([KNOWLEDGE.empty_table(), *tables])


def _samples(workspace: Workspace, kind: str, texts: pa.Table) -> list[KnowledgeSample]:
    # The longest of the texts that end by themselves show best what the model can do; the histogram shows the rest.
    order = pc.sort_indices(texts, sort_keys=[("finish_reason", "descending"), ("output_tokens", "descending")])
    chosen = texts.take(order[:_SAMPLES_A_KIND]).to_pylist()
    ids = pa.array([row["id"] for row in chosen], pa.int64())
    return [
        KnowledgeSample(kind=kind, title=title, inputs=inputs, text=row["text"])
        for row, (title, inputs) in zip(chosen, _inputs(workspace, kind, ids), strict=True)
    ]


def _inputs(workspace: Workspace, kind: str, ids: pa.Array) -> list[tuple[str, list[str]]]:
    if kind == "cohort":
        built = finished_stage(workspace, "cohorts")
        shards = set(shard_of(ids.to_numpy(), workspace.n_shards("cohort")).tolist()) if built and ids else set()
        profiles = read_profiles(workspace, built.outputs["cohorts"], shards).to_pylist() if built and shards else []
        cohorts = {row["id"]: row for row in profiles}
        chosen = [
            cohorts.get(i, {"cohort": str(i), "size": 0, "attributes": [], "titles": []}) for i in ids.to_pylist()
        ]
        return [(f"{row['cohort']}, {row['size']} members", [*row["attributes"], *row["titles"]]) for row in chosen]
    if kind == "item":
        items = {row["item_id"]: row for row in _rows(workspace, "items", "item_id", ids)}
        unknown = {"title": "not in the items table"}  # imported knowledge may be of anybody
        rows = [items.get(i, unknown) for i in ids.to_pylist()]
        return [(row["title"], _fields(row, {"item_id", "raw_id", "title"})) for row in rows]
    users = {row["user_id"]: row for row in _rows(workspace, "users", "user_id", ids)}
    histories = {row["user_id"]: row for row in _rows(workspace, "histories", "user_id", ids)}
    catalog = ItemCatalog.load(workspace)
    found = []
    for i in ids.to_pylist():
        history = histories.get(i, {"items": [], "ratings": []})
        titles = catalog.titles(np.asarray(history["items"], dtype=np.int64))
        behaviours = [t if r is None else f"{t}: {r:g}" for t, r in zip(titles, history["ratings"], strict=True)]
        found.append((f"user {i}", [*_fields(users.get(i, {}), {"user_id", "raw_id"}), *behaviours]))
    return found


def _rows(workspace: Workspace, table: str, key: str, ids: pa.Array) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    n_shards = len(workspace.table_shards(table))
    for number in np.unique(shard_of(ids.to_numpy(zero_copy_only=False), n_shards)).tolist():
        rows = workspace.read_shard(table, number)
        found += rows.filter(pc.is_in(rows[key], ids)).to_pylist()
    return found


def _fields(row: Mapping[str, Any], without: set[str]) -> list[str]:
    return [f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in row.items() if k not in without and v]
