"""Scores follow the current release: its vectors, semantic ids and behaviors; what the model was not trained on is
refused.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
from live_world import (  # type: ignore[import-not-found]
    ENCODER,
    ITEMS,
    Contents,
    LiveWorld,
    first_contents,
    random_vectors,
    write_live_world,
)

from owlrec.ctr.artifact import CtrArtifact, FieldCache, User, read_card
from owlrec.ctr.knowledge_tables import Arm
from owlrec.errors import ReleaseError
from owlrec.releases import Release, open_release, roll_back
from owlrec.serving.guard import Problem
from owlrec.serving.rank_api import LiveScorer, ScoredRelease, live_state
from owlrec.serving.served import WorkspaceReleases
from owlrec.workspace import Workspace, write_tombstones

NEW = [100, 101, 102, 103, 104]  # items that stand in no table
CANDIDATES = [*range(ITEMS), *NEW]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LiveWorld:
    return write_live_world(Workspace(tmp_path_factory.mktemp("live") / "ws"))


def scorer_of(world: LiveWorld) -> LiveScorer:
    """Not yet looking at any release."""
    return LiveScorer(CtrArtifact.open(world.workspace, world.folder), WorkspaceReleases(world.workspace))


def change() -> Contents:
    """Two users' new vectors (a partition more) and behaviors, five new items, another vector of item 3."""
    moved = random_vectors(8, 99)
    return Contents(
        vectors={
            "user": {6: [moved[0], *first_contents().vectors["user"][6]], 7: [moved[1]]},
            "item": {3: [moved[2]], **{item: [moved[3 + n]] for n, item in enumerate(NEW)}},
        },
        behaviors={6: [(500, 3, 5.0, 1.0), (501, 4, None, 1.0)], 8: [(500, 100, None, 0.0), (502, 9, 1.0, 0.0)]},
    )


def after(first: Contents, later: Contents) -> Contents:
    both = copy.deepcopy(first)
    for kind, rows in later.vectors.items():
        both.vectors[kind] |= rows
    both.behaviors |= later.behaviors
    both.cohorts |= later.cohorts
    return both


@pytest.mark.parametrize("arm", ["none", "knowledge", "knowledge-codes", "knowledge+codes", "both", "streaming"])
def test_scores_are_the_offline_scorers_before_and_after_a_delta(workspace: Workspace, arm: Arm) -> None:
    made = write_live_world(workspace, arm, "dcnv2" if arm == "both" else "din")
    live, first = scorer_of(made), first_contents()
    assert live.served.refresh()
    seen = {}
    for user in (0, 6, 7, 8, 9, 4711):
        seen[user] = live.score(user, CANDIDATES)
        np.testing.assert_allclose(seen[user], made.offline(first, user, CANDIDATES), rtol=0, atol=1e-5)
    made.publish(change(), "delta", delta_of=live.served.name)
    assert live.served.refresh()
    both = after(first, change())
    for user, before in seen.items():
        scores = live.score(user, CANDIDATES)
        np.testing.assert_allclose(scores, made.offline(both, user, CANDIDATES), rtol=0, atol=1e-5)
        if arm == "none":
            assert (scores == before).all() == (user not in (6, 8))
        elif arm != "knowledge-codes":  # of which two vectors may share some
            assert np.ptp(before[-5:]) < 1e-7
            assert np.diff(np.sort(scores[-5:])).min() > 1e-8  # nobody knows them but by their texts
            assert (np.abs(scores[:3] - before[:3]).max() < 1e-7) == (user not in (6, 7, 8))


def test_a_roll_back_brings_the_old_scores_back(workspace: Workspace) -> None:
    made = write_live_world(workspace)
    live = scorer_of(made)
    live.served.refresh()
    first = live.score(6, CANDIDATES)
    made.publish(change(), "delta", delta_of=live.served.name)
    live.served.refresh()
    assert not np.array_equal(live.score(6, CANDIDATES), first)
    roll_back(workspace)
    assert live.served.refresh()
    assert live.score(6, CANDIDATES).tolist() == first.tolist()


def test_a_forgotten_user_is_ranked_for_as_somebody_unknown(workspace: Workspace) -> None:
    made = write_live_world(workspace)
    live = scorer_of(made)
    live.served.refresh()
    unknown, before = live.score(User(), CANDIDATES), live.score(6, CANDIDATES)
    known_user = User(6, [1, 2], profile={"gender": "F"})
    with_history = live.score(replace(known_user, user_id=None), CANDIDATES)
    assert not np.array_equal(before, unknown)
    write_tombstones(workspace, np.array([6]))
    assert live.served.refresh()
    assert live.score(6, CANDIDATES).tolist() == unknown.tolist()
    assert live.score(known_user, CANDIDATES).tolist() == with_history.tolist()
    assert live.score(7, CANDIDATES).tolist() != unknown.tolist()


def test_a_history_in_the_request_takes_the_place_of_the_releases(world: LiveWorld) -> None:
    live = scorer_of(world)
    live.served.refresh()
    rows = first_contents().behaviors[9]
    known_user = User(9, [r[1] for r in rows], [r[2] for r in rows], [r[2] is not None or r[3] > 0 for r in rows])
    assert live.score(known_user, CANDIDATES).tolist() == live.score(9, CANDIDATES).tolist()
    assert live.score(User(9, []), [1, 2]).tolist() != live.score(9, [1, 2]).tolist()
    assert live.score(User(9, []), []).tolist() == []


def test_a_release_of_another_encoder_is_refused_and_the_one_before_stays(workspace: Workspace) -> None:
    made = write_live_world(workspace)
    live = scorer_of(made)
    live.served.refresh()
    first, scores = live.served.name, live.score(1, CANDIDATES)
    made.publish(first_contents(), "other", encoder="other@256")
    assert not live.served.refresh()
    assert (live.served.name, live.problem()) == (first, None)
    assert "other@256" in (live.served.error or "")
    assert live.score(1, CANDIDATES).tolist() == scores.tolist()
    fresh = scorer_of(made)
    assert not fresh.served.refresh()
    assert ENCODER in (fresh.problem() or "")
    with pytest.raises(Problem):
        fresh.score(1, CANDIDATES)
    roll_back(workspace)
    assert fresh.served.refresh()
    assert fresh.problem() is None


def test_a_release_of_other_codebooks_is_refused_by_a_model_that_reads_codes(workspace: Workspace) -> None:
    made = write_live_world(workspace, "knowledge+codes")
    artifact = CtrArtifact.open(workspace, made.folder)
    assert artifact.card.reads is not None
    assert artifact.card.reads.codebooks == {k: q.fingerprint for k, q in made.quantizers.items()}
    made.quantizers["item"], made.quantizers["user"] = made.quantizers["user"], made.quantizers["item"]  # type: ignore[index]
    made.publish(first_contents(), "other")
    with open_release(workspace) as release, pytest.raises(ReleaseError, match="user codes of codebooks"):
        live_state(artifact, release)


def test_fields_stay_from_a_release_to_its_deltas_but_for_those_that_changed(workspace: Workspace) -> None:
    made = write_live_world(workspace)
    live = scorer_of(made)
    live.served.refresh()
    for user in (1, 6, 7):
        live.score(user, CANDIDATES)

    def held() -> dict[str, FieldCache]:
        with live.served.lease() as release:
            assert isinstance(release, ScoredRelease)
            return release.live.held

    def sizes() -> tuple[int, int]:
        return len(held()["user"]), len(held()["item"])

    first = held()
    assert sizes() == (3, len(CANDIDATES))
    made.publish(Contents(behaviors=change().behaviors), "behaviors", delta_of=live.served.name)
    live.served.refresh()
    assert held() == first
    made.publish(Contents(vectors={"user": change().vectors["user"]}), "users", delta_of=live.served.name)
    live.served.refresh()
    assert held()["item"] is first["item"]
    assert sizes() == (1, len(CANDIDATES))
    made.publish(change(), "items", delta_of=live.served.name)
    live.served.refresh()
    assert sizes() == (1, len(CANDIDATES) - 6)
    made.publish(Contents(vectors={"cohort": {901: [random_vectors(1, 3)[0]]}}), "cohorts", delta_of=live.served.name)
    live.served.refresh()
    assert sizes() == (0, 0)


def test_the_card_says_what_the_model_reads(world: LiveWorld) -> None:
    reads = read_card(world.workspace, world.folder).reads
    assert reads is not None
    assert (reads.user, reads.item, reads.encoder, reads.codebooks) == (("knowledge",), ("knowledge",), ENCODER, {})


def test_an_object_store_gives_the_scores_of_a_local_disk(world: LiveWorld, s3_root: str) -> None:
    remote = Workspace(s3_root)
    for path in world.workspace.entries():
        remote.write_bytes(path, world.workspace.read_bytes(path))
    local = scorer_of(world)
    live = LiveScorer(CtrArtifact.open(remote, world.folder), WorkspaceReleases(remote))
    for scorer in (local, live):
        assert scorer.served.refresh()
    for user in (1, 6):
        assert live.score(user, CANDIDATES).tolist() == local.score(user, CANDIDATES).tolist()


def test_a_cache_makes_each_id_once_and_forgets_the_first_that_came() -> None:
    cache, asked = FieldCache(2, held_bytes=4 * 2 * 4), []  # room for four

    def make(ids: np.ndarray) -> np.ndarray:
        asked.append(ids.tolist())
        return np.stack([ids, ids * 10], axis=1).astype(np.float32)

    for ids in ([1, 2, 1], [2, 3], [4, 5], [1, 5, 3], list(range(10, 17))):
        fields = cache.gather(np.array(ids), make)
        assert fields.tolist() == [[i, i * 10] for i in ids]
    assert asked == [[1, 2], [3], [4, 5], [1], list(range(10, 17))]
    assert len(cache) == 4
    copied = cache.without(np.array([10, 12]))
    copied.gather(np.array([10, 11, 12, 13]), make)
    assert asked[-1] == [10, 12]


def test_a_release_is_closed_where_it_is_refused(world: LiveWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Release, "close", lambda self: closed.append(self.name))
    monkeypatch.setattr("owlrec.serving.rank_api.live_state", lambda *_: 1 / 0)
    served = scorer_of(world).served
    assert not served.refresh()
    assert "ZeroDivisionError" in (served.error or "")
    assert len(closed) == 1
