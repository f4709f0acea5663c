"""Compaction changes no answer, and readers notice neither it nor pruning."""

import json
import threading
import uuid

import pytest
from release_rows import FULL, Rows, answers, check, publish_chain, publish_rows, texts
from typer.testing import CliRunner

from owlrec.cli import app
from owlrec.errors import ReleaseError
from owlrec.releases import current_release, list_releases, open_release, retention
from owlrec.releases.format import read_manifest
from owlrec.releases.parts import PartWriter
from owlrec.releases.retention import compact, prune
from owlrec.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


def test_compaction_gives_one_full_release_with_the_same_answers(workspace):
    names = publish_chain(workspace)
    written = []
    manifest = compact(workspace, on_card=lambda card: written.append(card.rows_out))
    assert (manifest.delta, manifest.parent, manifest.dim) == (False, names[-1], 2)
    assert manifest.knowledge == manifest.totals == read_manifest(workspace, names[-1]).totals
    assert manifest.knowledge == {"user": 2, "item": 1, "cohort": 1}
    # The delta has one partition, and no codes for user 1.
    assert (manifest.vectors, manifest.partitions) == ({"user": 1, "cohort": 1, "item": 1}, {})
    assert manifest.codes == {"user": 1, "item": 1}
    assert manifest.memberships == {"user": 2}
    assert (manifest.as_of_min, manifest.as_of_max) == (0, 4000)
    assert manifest.behaviors == {"user": 2}
    assert written == [4 + 3 + 2 + 2 + 2]
    assert current_release(workspace) == manifest.name
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))
        assert opened.chain == (manifest,)


def test_compacting_a_full_release_does_nothing(workspace):
    with pytest.raises(ReleaseError, match="nothing has been published"):
        compact(workspace)
    publish_rows(workspace, "full", FULL)
    before = list_releases(workspace)
    assert compact(workspace) == before[0]
    assert list_releases(workspace) == before


def test_rows_are_copied_in_bounded_batches(workspace, monkeypatch):
    publish_chain(workspace)
    sizes, real = [], PartWriter.add_rows

    def counted(self, database, keys, values):
        sizes.append(len(keys))
        real(self, database, keys, values)

    monkeypatch.setattr(PartWriter, "add_rows", counted)
    monkeypatch.setattr(retention, "_ROWS_AT_ONCE", 3)
    monkeypatch.setattr("owlrec.releases.lmdb._READ_ROWS", 1)
    compact(workspace)
    assert sizes == [3, 1, 3, 2, 2, 2]
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))


def test_a_pointer_that_moves_meanwhile_is_left_alone(workspace):
    names = publish_chain(workspace)

    def refreshed(card):
        if len(names) == 3:
            names.append(publish_rows(workspace, "newer", texts({("user", 1): "newest"}), delta_of=names[-1]).name)

    with pytest.raises(ReleaseError, match=r"was built on .* is now current"):
        compact(workspace, on_card=refreshed)
    assert current_release(workspace) == names[-1]
    assert len([m for m in list_releases(workspace) if not m.delta]) == 2
    compact(workspace)
    with open_release(workspace) as opened:
        assert not opened.manifest.delta
        assert opened.store.get("user", [1])[0].text == "newest"


def test_damage_is_not_copied(workspace):
    names = publish_chain(workspace)
    file = workspace.local_path("releases", names[0], "parts", "00000.lmdb")
    data = file.read_bytes()
    file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(ReleaseError, match="SHA-256"):
        compact(workspace)
    assert current_release(workspace) == names[-1]


def test_a_reader_goes_on_reading_what_was_pruned(workspace):
    names = publish_chain(workspace)
    with open_release(workspace) as reader:
        compact(workspace)
        assert prune(workspace, keep=1, min_age_s=0) == sorted(names)
        assert not workspace.exists("releases", names[0])
        check(reader.store, answers(), range(10))
    with open_release(workspace) as opened:
        check(opened.store, answers(), range(10))


def test_a_remote_workspace_is_compacted_and_pruned(tmp_path):
    remote = Workspace(f"memory://bucket-{uuid.uuid4().hex}/ws")
    name = publish_rows(remote, "full", FULL).name
    compacted = compact(remote)
    assert compacted.name == name
    with open_release(remote) as opened:
        assert opened.quantizers().keys() == {"user", "item"}
        assert opened.store.own_codes("user", [1]) == [(3, 299, 0)]
    other = publish_rows(remote, "other", FULL).name
    assert prune(remote, keep=1, min_age_s=0) == [name]
    assert remote.names("releases") == sorted([other, "CURRENT"])


N = 5  # users with texts; user N is a member of cohort 8, item 0 tells the number of its release
ROUNDS = 40


def round_rows(number):
    """What release `number` changes: one user, the cohort and the item; every text and vector says `number`."""
    users = range(N) if number == 0 else [number % N]
    keys = [*(("user", u) for u in users), ("cohort", 8), ("item", 0)]
    return Rows(
        texts={key: (1, str(number), "ok") for key in keys},
        vectors={key: [[number, 1]] for key in keys},
        cohorts={("user", N): (8,)},
    )


def expected_numbers(number):
    """The number that each user's text has in release `number`, the member's last."""
    return [max((n for n in range(1, number + 1) if n % N == user), default=0) for user in range(N)] + [number]


def test_lookups_never_fail_nor_mix_releases_while_deltas_are_compacted_and_pruned(workspace):
    publish_rows(workspace, "0", round_rows(0))
    stop, wrong, seen = threading.Event(), [], [[], []]  # the numbers that each reader saw

    def read(numbers):
        while not stop.is_set():
            try:
                with open_release(workspace) as opened:
                    numbers.append(int(opened.store.get("item", [0])[0].text))
                    numbers_read = [int(k.text) for k in opened.store.get("user", range(N + 1))]
                    vectors = opened.store.vectors("user", range(N))[0][:, 0].tolist()
                    if numbers_read != expected_numbers(numbers[-1]) or vectors != numbers_read[:N]:
                        wrong.append((numbers[-1], numbers_read, vectors))
            except BaseException as error:  # whatever it is, the test must hear of it
                wrong.append(error)

    readers = [threading.Thread(target=read, args=(numbers,)) for numbers in seen]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, ROUNDS):
            publish_rows(workspace, str(number), round_rows(number), delta_of=current_release(workspace))
            if number % 4 == 0:
                compact(workspace)
            prune(workspace, keep=1, min_age_s=0)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []
    for numbers in seen:
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > ROUNDS // 4


def test_the_commands_say_what_they_did(workspace):
    names = publish_chain(workspace)
    run, root = CliRunner().invoke, workspace.root
    listed = run(app, ["release", "list", root])
    assert listed.exit_code == 0
    lines = [line for line in listed.output.splitlines() if names[-1][-8:] in line]
    assert [names[-2] in line for line in lines] == [True]
    shown = run(app, ["lookup", root, "user", "4"])
    assert "peace" in shown.output
    assert "peace" in run(app, ["lookup", root, "cohort", "8"]).output
    assert "semantic id 1-256, duplicate digit 300" in run(app, ["lookup", root, "item", "5"]).output
    assert "semantic id" not in run(app, ["lookup", root, "user", "1"]).output  # a new vector without codes
    assert "stays current" in run(app, ["release", "hold", root, "--reason", "odd texts"]).output
    refused = run(app, ["release", "compact", root])
    assert (refused.exit_code, "odd texts" in refused.output) == (1, True)
    assert "no hold" in run(app, ["release", "unhold", root]).output
    compacted = run(app, ["release", "compact", root])
    assert f"release {current_release(workspace)} is current, replacing {names[-1]}" in compacted.output
    assert "already full" in run(app, ["release", "compact", root]).output
    assert "nothing to remove" in run(app, ["release", "prune", root]).output
    pruned = run(app, ["release", "prune", root, "--keep", "1", "--min-age-hours", "0"])
    assert all(name in pruned.output for name in names)
    assert json.loads((workspace.local_path("releases", "CURRENT")).read_text())["history"][:3] == names
