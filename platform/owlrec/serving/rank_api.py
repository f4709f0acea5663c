"""Ranking over HTTP: a trained model over the current release, and an ASGI application around a cascade."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from pydantic import Field
from starlette.responses import Response

from owlrec import __version__
from owlrec.config import Config
from owlrec.ctr.artifact import CtrArtifact, FieldCache, LiveState, User
from owlrec.evaluation import PlattScaling, load_calibration
from owlrec.ranking.lora import open_adapter
from owlrec.releases.format import ChainedStore
from owlrec.releases.lmdb import LmdbStore
from owlrec.releases.release import Release, ReleaseSource
from owlrec.serving.guard import (
    PROBLEMS,
    READ_KEY,
    AuditLog,
    Guard,
    Limits,
    NoTelemetry,
    Problem,
    Stopping,
    Telemetry,
    complete_document,
    install_problem_handlers,
    never_stopping,
    readiness,
)
from owlrec.serving.keys import KeyRing
from owlrec.serving.schemas import Explanation, Health, Rank, RankAnswer, Ranked
from owlrec.serving.served import ServedReleases
from owlrec.workspace import Workspace

# ----------------------------------------------------------------------------------------------------------------- live
# A trained model over the current release, for `/v1/rank`, so that a refresh changes scores at once.
#
# A release whose vectors come from another encoder or codebooks than the model's is refused like one that
# cannot be opened: the previous release stays, and without one the application is not ready.


def live_state(artifact: CtrArtifact, release: Release, held: Mapping[str, FieldCache] | None = None) -> LiveState:
    """The inputs of an artifact's model from a release. held: by kind, fields that are known to be the same there.

    Raises ReleaseError for a release of another encoder or codebooks, SchemaError for vectors of another length.
    """
    manifest = release.manifest
    if artifact.card.reads is not None:
        codebooks = {kind: entry.codebooks for kind, entry in manifest.semantic_ids.items()}
        artifact.card.reads.refuse_other(manifest.name, manifest.encoder_identity, codebooks)
    return artifact.over(release.store, dim=manifest.dim, held=held)


class ScoredRelease(Release):
    """An open release with a model's inputs from it."""

    def __init__(self, release: Release, live: LiveState) -> None:
        super().__init__(release.store, release.chain)
        self.tombstones = release.tombstones  # already applied by its store
        self.live = live


class ScoredReleases:
    """A ReleaseSource of releases that an artifact may read. Fields are kept from a release to its deltas."""

    def __init__(self, artifact: CtrArtifact, source: ReleaseSource) -> None:
        self._artifact, self._source = artifact, source
        self._before: ScoredRelease | None = None

    def current(self) -> str | None:
        """See ReleaseSource.current."""
        return self._source.current()

    def forgotten(self) -> str:
        """See ReleaseSource.forgotten."""
        return self._source.forgotten()

    def open(self, name: str) -> ScoredRelease:
        """See ReleaseSource.open. Raises as `live_state` does."""
        release = self._source.open(name)
        try:
            held = unchanged_fields(self._before, release) if self._before else None
            self._before = ScoredRelease(release, live_state(self._artifact, release, held))
        except BaseException:
            release.close()
            raise
        return self._before


def unchanged_fields(before: ScoredRelease, release: Release) -> dict[str, FieldCache]:
    """Fields that are the same in a release as in the previous one, by kind; none if unknown.

    A delta on top of the previous release changes only the ids whose vectors it has, if it does not change cohorts.
    """
    names = [manifest.name for manifest in release.chain]
    delta, store = release.manifest, release.store
    if names[1:] != [manifest.name for manifest in before.chain] or not isinstance(store, ChainedStore):
        return {}
    newest, same = store.layers[0], {}
    for kind, held in before.live.held.items() if isinstance(newest, LmdbStore) else ():
        if not delta.vectors.get("cohort") and not delta.memberships.get(kind):
            changed = newest.vector_ids(kind)
            same[kind] = held.without(changed) if len(changed) else held
    return same


class LiveScorer:
    """Scores with an artifact over the current release of a source, followed by `served`. Threads may share it."""

    def __init__(self, artifact: CtrArtifact, source: ReleaseSource) -> None:
        self.served = ServedReleases(ScoredReleases(artifact, source))
        self._scorer = artifact.scorer

    def score(self, user: int | User, candidates: Sequence[int]) -> np.ndarray:
        """`score_labels` of the primary label."""
        return next(iter(self.score_labels(user, candidates).values()))

    def score_labels(self, user: int | User, candidates: Sequence[int]) -> dict[str, np.ndarray]:
        """See CtrScorer.score_labels. The whole call uses one release, and a forgotten user scores like an unknown one.
        Raises Problem (503) without a release.
        """
        asking = user if isinstance(user, User) else User(user)
        with self.served.lease() as release:
            assert isinstance(release, ScoredRelease)
            if asking.user_id is not None and asking.user_id in release.tombstones:
                asking = replace(asking, user_id=None)
            return self._scorer.score_labels(asking, candidates, release.live)

    def problem(self) -> str | None:
        """The problem that prevents scoring; None if there is none."""
        return None if self.served.name else self.served.error or "no release is loaded yet"


# ------------------------------------------------------------------------------------------------------------- rank api
# Ranking over HTTP: an ASGI application around a cascade.


# -------------------------------------------------------------------------------------------------------------- rankers
# The current ranker: an adapter or the untuned model, and the map from its scores to probabilities.
#
# `owlrec ranker tune` fits a calibration for each prompt type and stores it next to the adapter, where it is found
# automatically. Applied to other scores, it would give wrong but plausible values, so the prompt type is
# part of the file's name.


_log = logging.getLogger("owlrec.serving")
T = TypeVar("T")


class RankerChoice(Config):
    """Settings of the ranker; paths are relative to the workspace."""

    adapter: str | None = None  # a folder of `owlrec ranker tune`; None = the untuned model
    calibration: str | None = Field(None, min_length=1)  # a file; None = the adapter's own, if it has one


@dataclass(frozen=True)
class CurrentRanker:
    """A checked choice."""

    adapter: str | None  # a local folder
    calibration: PlattScaling | None

    def probabilities(self, scores: np.ndarray) -> list[float]:
        """Scores of Yes as probabilities, with the calibration if there is one. scores: [n]; nan stays nan."""
        if self.calibration is None:
            return [float(score) for score in scores]
        known = ~np.isnan(scores)
        calibrated = np.full(len(scores), np.nan)
        calibrated[known] = self.calibration.apply(scores[known])
        return calibrated.tolist()


def open_ranker(
    workspace: Workspace, choice: Mapping[str, str | None], *, model: str, wording: str, shown: str
) -> CurrentRanker:
    """Opens a RankerChoice. model, wording: expected of the adapter (see open_adapter); shown: the prompt
    type.

    Raises WorkspaceError for missing or damaged files, and EngineError for an adapter of another model or wording.
    """
    asked = RankerChoice.model_validate(choice)
    adapter, file = None, asked.calibration
    if asked.adapter is not None:
        adapter = open_adapter(workspace, asked.adapter, model=model, wording=wording).folder
        beside = f"{asked.adapter.rstrip('/').rpartition('/')[0]}/calibration-tuned-{shown}.json"
        if file is None and workspace.exists(beside):
            file = beside
    calibration = load_calibration(workspace, file) if file else None
    _log.info("ranker: adapter %s, calibration %s", asked.adapter, file)
    return CurrentRanker(adapter, calibration)


# -------------------------------------------------------------------------------------------------------------- ranking
# The cascade: a CTR model ranks all candidates, and an LLM re-ranks the first ones within the deadline.
#
# On deadline, the CTR ranking is returned with `degraded: true`. A late
# recommendation is worthless, and the CTR ranking is the usual one without an LLM.


_MARGIN_S = 0.01  # reserved for writing the response, at most a tenth of the deadline


class Backend(Protocol):
    """A scorer of candidates: a deployment's handle, or a test."""

    async def score(self, asked: Rank, candidates: Sequence[int]) -> Sequence[float]:
        """A probability for each candidate, in order; nan if one could not be scored."""


class LabelBackend(Backend, Protocol):
    """The CTR model, which may have several labels."""

    async def score_labels(self, asked: Rank, candidates: Sequence[int]) -> Mapping[str, Sequence[float]]:
        """Label -> a probability for each candidate, in order; the primary label first."""


class Cascade:
    """Ranks with a CTR model and, if there is one, an LLM."""

    def __init__(self, ctr: LabelBackend, llm: Backend | None, telemetry: Telemetry | None = None) -> None:
        self._ctr = ctr
        self._llm = llm
        self._telemetry = telemetry or NoTelemetry()

    async def rank(self, asked: Rank) -> RankAnswer:
        """Candidates in order, by the deadline at the latest.

        Raises Problem (503) if even the CTR model does not answer in time.
        """
        whole_s = asked.deadline_ms / 1000
        due = time.monotonic() + whole_s - min(_MARGIN_S, whole_s / 10)
        ctr, labels = await self._ctr_scores(asked, due)
        # Ties and NaN keep the input order.
        order = sorted(range(len(ctr)), key=lambda row: -ctr[row] if not math.isnan(ctr[row]) else math.inf)
        head = order if asked.mode == "llm" else order[: asked.rerank] if asked.mode == "cascade" else []
        said, reason = await self._llm_scores(asked, [asked.candidates[row] for row in head], due)
        llm = {row: score for row, score in zip(head, said, strict=True) if not math.isnan(score)} if said else {}
        if said and len(llm) < len(head):
            reason = f"the LLM could not score {len(head) - len(llm)} of {len(head)} candidates"
        if reason:
            self._telemetry.count("degraded", tags={"reason": reason.partition(" of ")[0][:60]})
        places = {row: place for place, row in enumerate(order, 1)}
        weight = asked.llm_weight
        mixed = {
            row: weight * score + (1 - weight) * (ctr[row] if not math.isnan(ctr[row]) else score)
            for row, score in llm.items()
        }
        by_llm = sorted(llm, key=lambda row: (-mixed[row], places[row]))
        final = [*by_llm, *(row for row in order if row not in llm)][: asked.top_k]
        results = [
            Ranked(
                id=asked.candidates[row],
                score=_number(mixed.get(row, ctr[row])),
                by="llm" if row in llm else "ctr",
                explanation=Explanation(ctr_score=_number(ctr[row]), ctr_place=places[row], llm_score=llm.get(row))
                if asked.explain
                else None,
                labels={name: scores[row] for name, scores in labels.items()} if labels else None,
            )
            for row in final
        ]
        return RankAnswer(mode=asked.mode, degraded=reason is not None, reason=reason, results=results)

    async def _ctr_scores(self, asked: Rank, due: float) -> tuple[Sequence[float], Mapping[str, Sequence[float]]]:
        """Of the primary label; and of each, if the request wants them."""
        try:
            if not asked.labels:
                return await self._timed("ctr", self._ctr.score, asked, asked.candidates, due), {}
            labels = await self._timed("ctr", self._ctr.score_labels, asked, asked.candidates, due)
            return next(iter(labels.values())), labels
        except TimeoutError:
            detail = "the CTR model did not answer within the deadline"
        except Problem:
            raise
        except Exception:
            _log.exception("the CTR model failed")
            detail = "the CTR model is not available"
        raise Problem(503, detail, headers={"Retry-After": "1"})

    async def _llm_scores(
        self, asked: Rank, candidates: Sequence[int], due: float
    ) -> tuple[Sequence[float], str | None]:
        """Scores, or none and the reason."""
        if not candidates:
            return (), None
        if self._llm is None:
            return (), "no LLM is deployed"
        try:
            return await self._timed("llm", self._llm.score, asked, candidates, due), None
        except TimeoutError:
            return (), "the LLM did not answer within the deadline"
        except Exception as error:
            _log.warning("the LLM is not available: %s", type(error).__name__)
            return (), "the LLM is not available"

    async def _timed(
        self,
        stage: str,
        score: Callable[[Rank, Sequence[int]], Awaitable[T]],
        asked: Rank,
        candidates: Sequence[int],
        due: float,
    ) -> T:
        start = time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, due - start)):
                return await score(asked, candidates)
        finally:
            self._telemetry.time(stage, time.monotonic() - start)


def _number(score: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(score) else score


# ------------------------------------------------------------------------------------------------------------- rank api


def build_rank_api(
    cascade: Cascade,
    keys: KeyRing,
    limits: Limits,
    telemetry: Telemetry,
    ready: Callable[[], Awaitable[str | None]],
    stopping: Stopping = never_stopping,
    audit: AuditLog | None = None,
) -> FastAPI:
    """Builds the application. ready: the problem that prevents ranking; None if there is none."""
    app = FastAPI(title="OwlRec ranking", version=__version__, redoc_url=None)
    install_problem_handlers(app)

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Whether the process runs."""
        return Health(status="ok")

    @app.get("/readyz", response_model=Health, responses={503: {"model": Health}})
    async def readyz() -> Response:
        """Whether requests can be ranked, that is, whether the CTR model responds."""
        return readiness(await ready(), stopping)

    @app.post("/v1/rank", response_model=RankAnswer, response_model_exclude_none=True, responses=PROBLEMS)
    async def rank(request: Request, asked: Rank) -> RankAnswer:
        """Candidates in order, by the deadline at the latest; `degraded` if the LLM did not rank in time."""
        request.scope[READ_KEY] = [("user", [] if asked.user_id is None else [asked.user_id])]
        return await cascade.rank(asked)

    app.add_middleware(Guard, keys=keys, limits=limits, scope="rank", telemetry=telemetry, audit=audit)
    complete_document(app, keys=keys.required)
    return app
