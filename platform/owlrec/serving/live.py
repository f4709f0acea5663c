"""A trained model over the current release, for `/v1/rank`, so that a refresh changes scores at once.

A release whose vectors come from another encoder or codebooks than the model's is refused like one that
cannot be opened: the previous release stays, and without one the application is not ready.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from owlrec.ctr.scoring import Artifact, FieldCache, LiveState, User
from owlrec.releases.lmdb import LmdbStore
from owlrec.releases.release import Release, ReleaseSource
from owlrec.releases.rows import ChainedStore
from owlrec.serving.served import ServedReleases


def live_state(artifact: Artifact, release: Release, held: Mapping[str, FieldCache] | None = None) -> LiveState:
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

    def __init__(self, artifact: Artifact, source: ReleaseSource) -> None:
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

    def __init__(self, artifact: Artifact, source: ReleaseSource) -> None:
        self.served = ServedReleases(ScoredReleases(artifact, source))
        self._scorer = artifact.scorer

    def score(self, user: int | User, candidates: Sequence[int]) -> np.ndarray:
        """See Scorer.score. The whole call uses one release, and a forgotten user scores like an unknown one. Raises
        Problem (503) if there is no release.
        """
        asking = user if isinstance(user, User) else User(user)
        with self.served.lease() as release:
            assert isinstance(release, ScoredRelease)
            if asking.user_id is not None and asking.user_id in release.tombstones:
                asking = replace(asking, user_id=None)
            return self._scorer.score(asking, candidates, release.live)

    def problem(self) -> str | None:
        """The problem that prevents scoring; None if there is none."""
        return None if self.served.name else self.served.error or "no release is loaded yet"
