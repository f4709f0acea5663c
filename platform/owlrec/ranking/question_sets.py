"""The questions of a ranker's run, for tuning, valid and test, and the metrics of its answers."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from owlrec import evaluation as metrics
from owlrec.ctr.experiment import DistillationConfig
from owlrec.encoding.compression import PROJECTION
from owlrec.encoding.vectors import EncoderConfig
from owlrec.errors import OwlRecError, WorkspaceError
from owlrec.evaluation import (
    Interval,
    PlattScaling,
    bootstrap_aucs,
    fit_calibration,
    percentile_interval,
    save_calibration,
)
from owlrec.generation import EngineConfig, engine_fingerprint, token_counter
from owlrec.generation.engines import EmptyPrompt, EngineStopped, RowError
from owlrec.generation.job import dead_file
from owlrec.prompting.frameworks import YES, rank_fingerprint
from owlrec.ranking.behavior_retrieval import BehaviorRetriever, ItemVectors, with_candidates
from owlrec.ranking.lora import Adapter, open_adapter
from owlrec.ranking.samples import RankerRun, RankingConfig, Shown, ask_about, asked_pairs, draw_samples, read_users
from owlrec.ranking.scorer import TEMPLATE_OPTIONS, PairScorer, open_scorer
from owlrec.runner import Result, Stage, Work, WorkerLost
from owlrec.scenario import Scenario
from owlrec.schema import DEAD_LETTERS, SOFT_LABELS
from owlrec.shards import Shard
from owlrec.sources.preparation import table_files
from owlrec.sources.splits import ItemCatalog, SplitConfig, read_samples
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

# -------------------------------------------------------------------------------------------------------------- judging
# Evaluation of a ranker's scores: AUC, gAUC, log loss, accuracy and calibration error on test, before and after a
# calibration fitted on valid.


_RESAMPLES = 500
EVALUATION_COLUMNS = ("model", "shown", "AUC", "95 % interval", "gAUC", "accuracy", "log-loss", "calibration error")


class Evaluation(BaseModel):
    """Evaluation of one model with one type of prompt."""

    model: str  # "zero-shot" or "tuned"
    shown: str  # samples.Shown
    rows: int
    unscored: int  # rows without a score; excluded from all figures
    auc: float
    interval: Interval | None  # 95 %, users resampled; None with fewer than two users
    gauc: float | None  # None if no user has both classes
    accuracy: float  # calibrated, at threshold 0.5
    log_loss: float  # calibrated
    raw_log_loss: float
    calibration_error: float  # calibrated
    raw_calibration_error: float


def evaluate_models(
    workspace: Workspace,
    folder: str,
    valid: pa.Table,
    test: pa.Table,
    scores: Mapping[str, np.ndarray],
) -> list[Evaluation]:
    """Evaluates all models; writes the results, the calibrations and the scored test rows into `folder`.

    scores: of each model, for the valid rows and then the test rows.
    """
    evaluations = []
    for model, model_scores in scores.items():
        on_valid, on_test = model_scores[: valid.num_rows], model_scores[valid.num_rows :]
        model_evaluations, calibrations = evaluate_model(model, valid, on_valid, test, on_test)
        workspace.write_parquet(f"{folder}/scores-{model}.parquet", test.append_column("score", pa.array(on_test)))
        for shown, calibration in calibrations.items():
            save_calibration(workspace, f"{folder}/calibration-{model}-{shown}.json", calibration)
        evaluations += model_evaluations
    workspace.write_json(f"{folder}/evaluations.json", [e.model_dump() for e in evaluations])
    return evaluations


def evaluate_model(
    model: str,
    valid: pa.Table,
    valid_scores: np.ndarray,
    test: pa.Table,
    test_scores: np.ndarray,
) -> tuple[list[Evaluation], dict[str, PlattScaling]]:
    """An evaluation and a calibration for each prompt type in both tables, in the order of `test`.

    valid, test: samples.TUNING_ROWS; scores: float64, aligned, nan for none. Raises SchemaError if the valid rows of
    a prompt type have only one class.
    """
    evaluations, calibrations = [], {}
    for shown in dict.fromkeys(test["shown"].to_pylist()):
        _, valid_labels, on_valid, _ = _rows(valid, valid_scores, shown)
        users, labels, raw, unscored = _rows(test, test_scores, shown)
        calibration = fit_calibration(on_valid, valid_labels)
        probabilities = calibration.apply(raw)
        gauc = metrics.gauc(labels, raw, users)
        evaluations.append(
            Evaluation(
                model=model,
                shown=shown,
                rows=len(labels),
                unscored=unscored,
                auc=metrics.auc(labels, raw),
                interval=_interval(labels, raw, users),
                gauc=None if np.isnan(gauc) else gauc,
                accuracy=float(((probabilities > 0.5) == (labels == 1)).mean()),
                log_loss=metrics.log_loss(labels, probabilities),
                raw_log_loss=metrics.log_loss(labels, raw),
                calibration_error=metrics.calibration_error(labels, probabilities),
                raw_calibration_error=metrics.calibration_error(labels, raw),
            )
        )
        calibrations[shown] = calibration
    return evaluations, calibrations


def evaluation_row(e: Evaluation) -> tuple[object, ...]:
    """The cells under EVALUATION_COLUMNS."""
    interval = f"[{e.interval.low:.4f}, {e.interval.high:.4f}]" if e.interval else ""
    gauc = f"{e.gauc:.4f}" if e.gauc is not None else ""
    error = f"{e.calibration_error:.3f} (raw {e.raw_calibration_error:.3f})"
    loss = f"{e.log_loss:.4f} (raw {e.raw_log_loss:.4f})"
    return e.model, e.shown, f"{e.auc:.4f}", interval, gauc, f"{e.accuracy:.4f}", loss, error


def _rows(table: pa.Table, scores: np.ndarray, shown: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Users, labels and scores of the scored rows of one prompt type; and the number without a score."""
    asked = np.array(table["shown"].to_pylist(), dtype=object) == shown
    kept = asked & ~np.isnan(scores)
    labels = np.array([answer == YES for answer in table["answer"].to_pylist()], dtype=np.float64)
    return table["user_id"].to_numpy()[kept], labels[kept], scores[kept], int((asked & ~kept).sum())


def _interval(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> Interval | None:
    if len(np.unique(users)) < 2 or labels.min() == labels.max():
        return None
    return percentile_interval(bootstrap_aucs(labels, [scores], users, resamples=_RESAMPLES)[:, 0])


# -------------------------------------------------------------------------------------------------------------- results
# Results of ranker runs, and of CTR models on the same samples: small files that a report gathers.


_FOLDER = "ranking/results"


class RankerResult(BaseModel):
    """Test AUC of one model with one prompt type, or of a CTR model on the same samples."""

    model: str  # "zero-shot", "tuned", or a backbone
    shots: int | None  # training samples: None for the whole train split, 0 for zero-shot
    behaviors: int | None  # maximum in a prompt; None for a CTR model
    shown: str  # samples.Shown; "" for a CTR model
    seed: int
    auc: float
    interval: Interval | None = None  # 95 %, users resampled


def results_of(config: RankingConfig, evaluations: list[Evaluation], seed: int = 0) -> list[RankerResult]:
    """Results of one run of the ranker. seed: of its shots."""
    return [
        RankerResult(
            model=e.model,
            shots=0 if e.model == "zero-shot" else config.data.shots,
            behaviors=config.data.behaviors,
            shown=e.shown,
            seed=seed,
            auc=e.auc,
            interval=e.interval,
        )
        for e in evaluations
    ]


def write_results(workspace: Workspace, name: str, results: list[RankerResult]) -> None:
    """Stores the results of a run. name: unique per run, the same for a repeated run."""
    workspace.write_json(f"{_FOLDER}/{name}.json", [result.model_dump() for result in results])


def read_results(workspace: Workspace) -> list[RankerResult]:
    """Results of all runs, without duplicates: few behaviors and few shots first."""
    results = {}
    for file in workspace.names(_FOLDER):
        for row in workspace.read_json(f"{_FOLDER}/{file}"):
            result = RankerResult.model_validate(row)
            key = (result.behaviors or 0, result.shown, result.shots if result.shots is not None else 1 << 62)
            results[(*key, result.model, result.seed)] = result
    return [results[key] for key in sorted(results)]


# ------------------------------------------------------------------------------------------------------------ questions
# Writes the prompts of a ranker run: the tuning shots, and the valid and test rows for evaluation.


def write_questions(
    workspace: Workspace,
    folder: str,
    config: RankingConfig,
    scenario: Scenario,
    vectors: ItemVectors,
    count_tokens: Callable[[str], int],
    run: RankerRun | None = None,
) -> dict[str, int]:
    """Writes train, valid and test.parquet (samples.TUNING_ROWS) into `folder`, from the workspace's tables.

    Valid rows use the prompt types of the evaluation and of tuning; the latter are for early stopping. Only the
    drawn samples, their users and their items' vectors are read in full. Returns the counts of all three, by split.
    Raises RecipeError like `draw_samples` and SchemaError like `ask_about`.
    """
    catalog, data, run = ItemCatalog.load(workspace), config.data, run or RankerRun()
    valid_ways = tuple(dict.fromkeys((*run.ways, *data.shown)))
    draws = {
        "train": (data.shots, run.seed, data.shown),
        "valid": (run.valid_samples, run.evaluation_seed, valid_ways),
        "test": (run.test_samples, run.evaluation_seed, run.ways),
    }
    counts: dict[str, int] = {}
    for split, (limit, seed, ways) in draws.items():
        samples = draw_samples(workspace, split, limit, seed, catalog.ids, exactly=split == "train")
        items = np.concatenate([pc.list_flatten(samples[name]).to_numpy() for name in ("candidates", "history")])
        asked = ask_about(
            samples,
            read_users(workspace, samples["user_id"].to_numpy()),
            catalog,
            vectors.retriever(items),
            scenario,
            config.prompt,
            count_tokens,
            k=data.behaviors,
            ways=ways,
        )
        workspace.write_parquet(f"{folder}/{split}.parquet", asked.rows)
        counts |= {f"{split}_{name}": count for name, count in asked.counts.items()}
    return counts


# ---------------------------------------------------------------------------------------------------------- soft labels
# The stage of `owlrec ranker score-pairs`: an LLM's P(yes) for user-item pairs, from which CTR models learn.
#
# A pair's prompt equals the ranker's in serving: the same wording, the same choice of behaviors, all strictly
# earlier than the pair. Rows with an unchanged prompt keep their probability, so adding pairs or users costs
# only the new ones. A pair without a prompt is a dead letter, and training falls back to its label.
#
#     soft-labels/<fingerprint>/user/00000000.parquet    schema.SOFT_LABELS, plus a digest of each prompt
#     soft-labels/<fingerprint>/dead/user/...            schema.DEAD_LETTERS, if rows failed


SOFT_LABELS_FOLDER = "soft-labels"
_ROWS = SOFT_LABELS.append(pa.field("question", pa.binary(16)))  # BLAKE2b of both turns
_MOMENTS = ("user_id", "item_id", "timestamp")
_ASKED_AT_ONCE = 4096  # prompts held at a time
_USER_TABLES = ("users", "interactions", "samples")
Key = tuple[int, int, int]  # user_id, item_id, timestamp


@dataclass(frozen=True)
class Teacher:
    """The teacher LLM and its prompts."""

    engine: EngineConfig
    config: RankingConfig
    scenario: Scenario
    encoder: EncoderConfig  # of the vectors for retrieving behaviors
    adapter: str | None = None  # a folder of `ranker tune`; None = the untuned model
    adapter_sha256: str = ""
    calibration: PlattScaling | None = None

    @property
    def shown(self) -> Shown:
        """Prompt type: the same as in serving."""
        return self.config.data.shown[-1]

    @property
    def wording(self) -> str:
        """See prompting.frameworks.rank_fingerprint."""
        return rank_fingerprint(self.config.prompt, self.scenario)

    @property
    def folder(self) -> str:
        """Folder of its answers, named by everything they depend on besides the pairs."""
        retrieved = (self.encoder.identity, PROJECTION) if self.shown != "recent" else None
        shows = (self.shown, self.config.data.behaviors, retrieved, TEMPLATE_OPTIONS)
        made_by = (engine_fingerprint(self.engine), self.adapter_sha256, self.calibration)
        return f"{SOFT_LABELS_FOLDER}/{fingerprint(self.wording, shows, made_by)[:16]}"

    def open_adapter(self, workspace: Workspace) -> Adapter | None:
        """Raises WorkspaceError if it is damaged, and EngineError if it was tuned for another model or wording."""
        if self.adapter is None:
            return None
        return open_adapter(workspace, self.adapter, model=self.engine.model_identity, wording=self.wording)


def pair_inputs(workspace: Workspace, config: DistillationConfig) -> dict[Shard, str]:
    """Shards of users, each with a digest of its prompts' inputs."""
    files = {path: entry.sha256 for path, entry in table_files(workspace).items()}
    titles = fingerprint({path: digest for path, digest in files.items() if path.startswith("items/")})
    inputs = {}
    for number in workspace.table_shards("samples"):
        own = [files.get(f"{table}/{shard_file(number)}") for table in _USER_TABLES]
        inputs[Shard("user", number)] = fingerprint(own, titles, config.asks)
    return inputs


class ScorePairs(Stage):
    """Scores the pairs of a shard of users."""

    name = "score_pairs"

    def __init__(
        self, teacher: Teacher, pairs: DistillationConfig, split: SplitConfig, vectors: ItemVectors | None
    ) -> None:
        """split: the split of `prepare`; vectors: None if behaviors are not retrieved."""
        self.folder, self.teacher, self.pairs, self.split, self.vectors = teacher.folder, teacher, pairs, split, vectors
        self._scorer: PairScorer | None = None

    def open(self, workspace: Workspace, worker: str) -> None:
        """See Stage.open."""
        self._catalog = ItemCatalog.load(workspace)
        self._count = token_counter(self.teacher.engine)
        adapter = self.teacher.open_adapter(workspace)
        self._adapter = adapter.folder if adapter else None
        self._scorer = open_scorer(self.teacher.engine, lora_rank=adapter.manifest.rank if adapter else None)

    async def run(self, work: Work) -> Result:
        """See Stage.run. Raises WorkerLost if the engine is dead."""
        workspace = work.workspace
        number, catalog = work.shard.number, self._catalog.ids
        pairs = await asyncio.to_thread(asked_pairs, workspace, number, self.pairs, self.split, catalog)
        logged = await asyncio.to_thread(read_samples, workspace, number, _MOMENTS)
        pairs = await asyncio.to_thread(with_candidates, pairs, logged, catalog)
        answers = _KnownAnswers(await asyncio.to_thread(_earlier, work))
        for start in range(0, len(pairs), _ASKED_AT_ONCE):
            rows = pairs.slice(start, _ASKED_AT_ONCE)
            await self._ask(rows, await asyncio.to_thread(self._questions, workspace, rows), answers)
        return await asyncio.to_thread(self._write, work, answers)

    def close(self) -> None:
        """See Stage.close."""
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None

    def _questions(self, workspace: Workspace, pairs: pa.Table) -> pa.Table:
        """samples.TUNING_ROWS of the pairs whose item has a title; their answers are meaningless."""
        if self.vectors is None:
            retriever = BehaviorRetriever(np.zeros(0, np.int64), np.zeros((0, 1), np.float32))
        else:
            items = [pc.list_flatten(pairs[name]).to_numpy() for name in ("candidates", "history")]
            retriever = self.vectors.retriever(np.concatenate(items))
        teacher, users = self.teacher, read_users(workspace, pairs["user_id"].to_numpy())
        return ask_about(
            pairs,
            users,
            self._catalog,
            retriever,
            teacher.scenario,
            teacher.config.prompt,
            self._count,
            k=teacher.config.data.behaviors,
            ways=(teacher.shown,),
        ).rows

    async def _ask(self, pairs: pa.Table, questions: pa.Table, answers: "_KnownAnswers") -> None:
        assert self._scorer is not None
        asked = {_key(row): (row["system"], row["text"]) for row in questions.to_pylist()}
        for row in pairs.select(["user_id", "item_id", "timestamp"]).to_pylist():
            if _key(row) not in asked:
                answers.fail(_key(row), EmptyPrompt("the item has no title, so it has no prompt"))
        digests = {key: _digest(*turns) for key, turns in asked.items()}
        new = [key for key in asked if not answers.keep(key, digests[key])]
        try:
            scored = await self._scorer.score([asked[key] for key in new], self._adapter)
        except ExceptionGroup as group:
            mistakes = group.subgroup(OwlRecError)
            if mistakes is None:
                raise
            first = mistakes.exceptions[0]
            raise WorkerLost(str(first)) if isinstance(first, EngineStopped) else first from group
        answers.tokens += scored.prompt_tokens
        calibration, p = self.teacher.calibration, scored.probabilities
        p = calibration.apply(np.nan_to_num(p)) if calibration else p
        for place, key in enumerate(new):
            if place in scored.failures:
                answers.fail(key, scored.failures[place])
            else:
                answers.add(key, digests[key], float(p[place]))

    def _write(self, work: Work, answers: "_KnownAnswers") -> Result:
        work.check()
        workspace, artifact, shard = work.workspace, work.artifact, work.shard
        files = {shard.file(): workspace.write_parquet(artifact.path(shard.file()), answers.table())}
        letters = dead_file(shard.name)
        if answers.dead:
            files[letters] = workspace.write_parquet(artifact.path(letters), answers.letters())
        else:
            workspace.delete_file(artifact.path(letters))
        return Result(
            files,
            rows_in=len(answers.rows) + len(answers.dead),
            rows_out=len(answers.rows),
            rows_dead=len(answers.dead),
            counts={"asked": answers.asked, "prompt_tokens": answers.tokens},
        )


class _KnownAnswers:
    """Answers for a shard's pairs so far, by key: user_id, item_id, timestamp."""

    def __init__(self, earlier: Mapping[bytes, float]) -> None:
        """earlier: probabilities by the digest of their prompt."""
        self._earlier = earlier
        self.rows: list[tuple[int, int, int, float, bytes]] = []
        self.dead: list[tuple[Key, RowError]] = []
        self.asked = self.tokens = 0

    def keep(self, key: Key, question: bytes) -> bool:
        """Reuses an earlier answer to the same prompt; returns whether there was one."""
        if question in self._earlier:
            self.rows.append((*key, self._earlier[question], question))
        return question in self._earlier

    def add(self, key: Key, question: bytes, probability: float) -> None:
        """Adds a new answer."""
        self.asked += 1
        self.rows.append((*key, probability, question))

    def fail(self, key: Key, error: RowError) -> None:
        """Adds a pair without a prompt."""
        self.dead.append((key, error))

    def table(self) -> pa.Table:
        """The answers, by user, timestamp and item."""
        self.rows.sort(key=lambda row: (row[0], row[2], row[1]))
        columns = zip(*self.rows, strict=True) if self.rows else ([] for _ in _ROWS)
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, _ROWS, strict=True)], schema=_ROWS)

    def letters(self) -> pa.Table:
        """The dead letters; as_of is the pair's moment."""
        rows = [
            ("user", key[0], key[2], "score_pairs", error.name, f"item {key[1]}: {error}", error.attempts)
            for key, error in self.dead
        ]
        columns = zip(*rows, strict=True)
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, DEAD_LETTERS, strict=True)], schema=DEAD_LETTERS)


def _digest(system: str, text: str) -> bytes:
    return hashlib.blake2b(f"{system}\0{text}".encode(), digest_size=16).digest()


def _key(row: Mapping[str, Any]) -> Key:
    return row["user_id"], row["item_id"], row["timestamp"]


def _earlier(work: Work) -> dict[bytes, float]:
    """This teacher's earlier answers in the shard, for any pairs. Ignores the card: a run killed
    between the file and the card must not pay twice.
    """
    path = work.artifact.path(work.shard.file())
    if work.workspace.entry(path) is None:
        return {}
    try:
        table = work.workspace.read_parquet(path, ["question", "p"])
    except WorkspaceError:  # damaged: score again
        return {}
    return dict(zip(table["question"].to_pylist(), table["p"].to_pylist(), strict=True))
