"""Claims: one holder at a time, taken over only from the dead, lost when a lease runs out."""

import os
import threading
import time
from pathlib import Path

import pytest

from owlrec.errors import WorkspaceError
from owlrec.generation import EchoEngineConfig
from owlrec.generation.batch import build_job
from owlrec.generation.engine import SamplingConfig
from owlrec.generation.ledger import Claim, Ledger, open_job, unclaimed
from owlrec.generation.shards import Job, Shard
from owlrec.prompting.rows import PromptConfig
from owlrec.scenario import get_scenario
from owlrec.workspace import Workspace

SHARD = Shard(kind="user", part="00000000.parquet", input_fingerprint="f")


@pytest.fixture
def job() -> Job:
    return build_job(get_scenario("movies"), PromptConfig(), SamplingConfig(), EchoEngineConfig(type="echo"))


def rewrite(workspace: Workspace, job: Job, **changes: object) -> None:
    """The claim file as another process would have left it."""
    path = Path(workspace.path(SHARD.file(job, "claim")))
    claim = Claim.model_validate_json(path.read_text())
    path.write_text(claim.model_copy(update=changes).model_dump_json())


def test_of_many_that_claim_at_once_one_gets_the_shard(workspace: Workspace, job: Job) -> None:
    ledgers = [Ledger(workspace, job, f"run-{i}") for i in range(16)]
    won: list[str] = []
    start = threading.Barrier(len(ledgers))

    def race(ledger: Ledger) -> None:
        start.wait()
        if ledger.claim(SHARD):
            won.append(ledger.run)

    threads = [threading.Thread(target=race, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    for ledger in ledgers:
        ledger.close()


def test_shard_given_back_is_free_and_leaves_no_file(workspace: Workspace, job: Job) -> None:
    first, second = Ledger(workspace, job, "a"), Ledger(workspace, job, "b")
    assert first.claim(SHARD)
    assert second.claim(SHARD) is None
    assert unclaimed(workspace, job, [SHARD], "b") == []
    assert unclaimed(workspace, job, [SHARD], "a") == [SHARD]
    first.release(SHARD)
    assert not first.holds(SHARD)
    assert second.claim(SHARD)
    second.close()
    assert os.listdir(Path(workspace.path(SHARD.file(job, "claim"))).parent) == []


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
def test_claim_is_taken_over_only_from_the_dead(workspace: Workspace, job: Job, changes: dict, free: bool) -> None:
    first = Ledger(workspace, job, "a")
    assert first.claim(SHARD)
    rewrite(workspace, job, nonce="another's", **changes)
    second = Ledger(workspace, job, "b")
    assert (second.claim(SHARD) is not None) == free
    assert unclaimed(workspace, job, [SHARD], "c") == []
    first.close()  # must not remove what is no longer its own
    assert Path(workspace.path(SHARD.file(job, "claim"))).exists()
    second.close()


def test_engines_of_one_run_take_over_at_once_and_remember_what_killed_them(workspace: Workspace, job: Job) -> None:
    first = Ledger(workspace, job, "a")
    claim = first.claim(SHARD)
    assert claim is not None
    assert claim.failures == 0
    first.blame()
    again = Ledger(workspace, job, "a").claim(SHARD)
    assert again is not None
    assert again.failures == 1
    other_run = Ledger(workspace, job, "b")
    rewrite(workspace, job, expires=0.0)
    fresh = other_run.claim(SHARD)
    assert fresh is not None
    assert fresh.failures == 0
    other_run.close()


def test_heartbeat_moves_the_lease_on_and_notices_its_loss(workspace: Workspace, job: Job) -> None:
    ledger = Ledger(workspace, job, "a", lease_s=0.4)
    claim = ledger.claim(SHARD)
    assert claim is not None
    time.sleep(0.8)
    assert Ledger(workspace, job, "b").claim(SHARD) is None  # twice the lease later still held
    rewrite(workspace, job, nonce="another's")
    deadline = time.monotonic() + 5
    while ledger.holds(SHARD):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ledger.close()


def test_unreadable_claim_holds_nothing(workspace: Workspace, job: Job) -> None:
    workspace.write_bytes(SHARD.file(job, "claim"), b"{")
    ledger = Ledger(workspace, job, "a")
    assert ledger.claim(SHARD)
    ledger.close()


def test_claims_work_on_an_object_store(job: Job) -> None:
    workspace = Workspace(f"memory://ledger-{time.time_ns()}")
    first, second = Ledger(workspace, job, "a"), Ledger(workspace, job, "b")
    assert first.claim(SHARD)
    assert second.claim(SHARD) is None
    first.close()
    assert second.claim(SHARD)
    second.close()


def test_job_folder_of_another_job_or_a_newer_ledger_is_refused(workspace: Workspace, job: Job) -> None:
    open_job(workspace, job)
    open_job(workspace, job)
    path = f"{job.folder}/job.json"
    workspace.write_json(path, {"ledger_version": 1, "fingerprint": job.fingerprint[:16] + "0" * 48})
    with pytest.raises(WorkspaceError, match="holds the files of job"):
        open_job(workspace, job)
    workspace.write_json(path, {"ledger_version": 2, "fingerprint": job.fingerprint})
    with pytest.raises(WorkspaceError, match="ledger version 2, this OwlRec knows 1"):
        open_job(workspace, job)
    workspace.write_json(path, {})
    with pytest.raises(WorkspaceError, match="is no job file"):
        open_job(workspace, job)


def test_folder_with_strange_files_is_refused(workspace: Workspace, job: Job) -> None:
    workspace.write_bytes(f"{job.folder}/thesis.doc", b"")
    with pytest.raises(WorkspaceError, match=r"files of something else \(thesis.doc\)"):
        open_job(workspace, job)
    assert workspace.exists(f"{job.folder}/thesis.doc")
