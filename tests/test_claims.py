"""Claims: one holder at a time, taken over only from the dead, lost when a lease runs out."""

import os
import threading
import time
from pathlib import Path

import pytest

from owlrec.errors import WorkspaceError
from owlrec.shards import Claim, Claims, claimed, clear_claims, unclaimed
from owlrec.workspace import Workspace

SHARD = "claims/a/user/00000000"


def rewrite(workspace: Workspace, **changes: object) -> None:
    """The claim file as another process would have left it."""
    path = Path(workspace.path(SHARD))
    claim = Claim.model_validate_json(path.read_text())
    path.write_text(claim.model_copy(update=changes).model_dump_json())


def test_of_many_that_claim_at_once_one_gets_the_shard(workspace: Workspace) -> None:
    holders = [Claims(workspace, f"run-{i}") for i in range(16)]
    won: list[str] = []
    start = threading.Barrier(len(holders))

    def race(claims: Claims) -> None:
        start.wait()
        if claims.claim(SHARD):
            won.append(claims.run)

    threads = [threading.Thread(target=race, args=(claims,)) for claims in holders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    for claims in holders:
        claims.close()


def test_shard_given_back_is_free_and_leaves_no_file(workspace: Workspace) -> None:
    first, second = Claims(workspace, "a"), Claims(workspace, "b")
    assert first.claim(SHARD)
    assert second.claim(SHARD) is None
    assert unclaimed(workspace, "claims/a", ["user/00000000"], "b") == []
    assert unclaimed(workspace, "claims/a", ["user/00000000"], "a") == ["user/00000000"]
    first.release(SHARD)
    assert not first.holds(SHARD)
    assert second.claim(SHARD)
    second.close()
    assert os.listdir(Path(workspace.path(SHARD)).parent) == []


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({"expires": 0.0}, True),
        ({"pid": 2**22 + 1}, True),  # beyond the largest pid: surely no process
        ({"born": 1.0}, True),  # the pid was used again
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),  # whose processes nobody here can see
        ({"host": "elsewhere", "expires": 0.0}, True),
    ],
)
def test_claim_is_taken_over_only_from_the_dead(workspace: Workspace, changes: dict, free: bool) -> None:
    first = Claims(workspace, "a")
    assert first.claim(SHARD)
    rewrite(workspace, run="another's", **changes)
    second = Claims(workspace, "b")
    assert (second.claim(SHARD) is not None) == free
    assert unclaimed(workspace, "claims/a", ["user/00000000"], "c") == []
    first.close()  # must not remove what is no longer its own
    assert Path(workspace.path(SHARD)).exists()
    second.close()


def test_workers_of_one_run_take_over_at_once_and_remember_what_killed_them(workspace: Workspace) -> None:
    first = Claims(workspace, "a")
    claim = first.claim(SHARD)
    assert claim is not None
    assert claim.failures == 0
    first.record_failure()
    again = Claims(workspace, "a").claim(SHARD)
    assert again is not None
    assert again.failures == 1
    other_run = Claims(workspace, "b")
    rewrite(workspace, expires=0.0)
    fresh = other_run.claim(SHARD)
    assert fresh is not None
    assert fresh.failures == 0
    other_run.close()


def test_heartbeat_moves_the_lease_on_and_notices_its_loss(workspace: Workspace) -> None:
    claims = Claims(workspace, "a", lease_s=1.0)
    claim = claims.claim(SHARD)
    assert claim is not None
    time.sleep(2.0)
    assert Claims(workspace, "b").claim(SHARD) is None  # twice the lease later still held
    rewrite(workspace, run="another's")
    deadline = time.monotonic() + 5
    while claims.holds(SHARD):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    claims.close()


def test_a_claim_given_back_while_the_heartbeat_renews_it_stays_gone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, swap, renewed = Claims(workspace, "a", lease_s=0.2), workspace.swap_bytes, threading.Event()
    assert claims.claim(SHARD)

    def renew(path: str, data: bytes, e_tag: str | None) -> str | None:
        tag = swap(path, data, e_tag)
        renewed.set()
        time.sleep(0.1)  # the claim is given back before the heartbeat hears of its new e_tag
        return tag

    monkeypatch.setattr(workspace, "swap_bytes", renew)
    assert renewed.wait(10)
    claims.release(SHARD)
    assert workspace.entries("claims/a") == {}
    claims.close()


def test_what_a_finished_run_and_the_dead_left_is_cleared_and_nothing_else(workspace: Workspace) -> None:
    mine, theirs, dead = Claims(workspace, "a"), Claims(workspace, "b"), Claims(workspace, "c")
    assert dead.claim(SHARD)
    rewrite(workspace, pid=2**22 + 1)  # its driver was killed after the shard was done: no run looks at it again
    assert theirs.claim("claims/a/user/00000001")
    assert mine.claim("claims/a/user/00000002")
    clear_claims(workspace, "claims/a", "a")
    assert list(workspace.entries("claims/a")) == ["user/00000001"]
    for claims in (mine, theirs, dead):
        claims.close()


def test_unreadable_claim_holds_nothing(workspace: Workspace) -> None:
    workspace.write_bytes(SHARD, b"{")
    claims = Claims(workspace, "a")
    assert claims.claim(SHARD)
    claims.close()


def test_claims_work_on_an_object_store() -> None:
    workspace = Workspace(f"memory://claims-{time.time_ns()}")
    first, second = Claims(workspace, "a"), Claims(workspace, "b")
    assert first.claim(SHARD)
    assert second.claim(SHARD) is None
    first.close()
    assert second.claim(SHARD)
    second.close()


def test_of_two_that_hold_a_claim_for_a_block_the_second_is_told_who_is_first(workspace: Workspace) -> None:
    second = claimed(workspace, SHARD, "prepare")
    with (
        claimed(workspace, SHARD, "prepare"),
        pytest.raises(WorkspaceError, match=f"prepare is already running in process {os.getpid()}"),
    ):
        second.__enter__()
    with claimed(workspace, SHARD, "prepare"):
        pass
