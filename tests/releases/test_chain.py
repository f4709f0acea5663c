"""Deltas: a chain answers like a dict that was updated in the same order, and refuses what it cannot stand on."""

import json
import uuid
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from release_rows import CODE_SIZES, KINDS, QUANTIZERS, Rows, check, publish_rows, tables, texts

from owlrec.errors import ReleaseError, SchemaError
from owlrec.releases import build, current_release, list_releases, open_release, retention, roll_back
from owlrec.releases import release as release_module
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.releases.format import chain, read_manifest
from owlrec.releases.retention import compact, prune
from owlrec.schema import MEMBERSHIPS
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

IDS = range(6)
BASE = Rows(
    texts={("user", 1): (1000, "one", "ok"), ("cohort", 8): (2000, "war films", "short"), ("item", 3): (0, "a", "ok")},
    vectors={("user", 1): [[1, 0], [2, 0], [3, 0]], ("cohort", 8): [[3, 4]]},
    cohorts={("user", 2): (8,), ("item", 2): (9, 8)},
)


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "ws")


@pytest.fixture
def full(workspace):
    return publish_rows(workspace, "full", BASE).name


def keys(kinds):
    return st.tuples(st.sampled_from(kinds), st.integers(0, IDS[-1]))


def coded(texts, vectors, cohorts):
    codes = {key: codes for key, (_, codes) in vectors.items() if codes and key[0] != "cohort"}
    return Rows(texts, {key: rows for key, (rows, _) in vectors.items()}, cohorts, codes)


def changes(min_texts=0):
    numbers = st.integers(-3, 3)
    codes = st.tuples(*(st.integers(0, size - 1) for size in CODE_SIZES), st.integers(0, 65_535))
    vectors = st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=1, max_size=3)
    return st.builds(
        coded,
        texts=st.dictionaries(
            keys(KINDS),
            st.tuples(st.integers(0, 9), st.text(max_size=3), st.sampled_from(["ok", "short"])),
            min_size=min_texts,
            max_size=6,
        ),
        vectors=st.dictionaries(keys(KINDS), st.tuples(vectors, st.none() | codes), max_size=6),
        cohorts=st.dictionaries(
            keys(KINDS[:2]), st.lists(st.integers(0, IDS[-1] + 1), max_size=3).map(tuple), max_size=6
        ),
    )


@settings(max_examples=30)
@given(
    full=changes(min_texts=1),
    deltas=st.lists(changes().filter(lambda r: r != Rows()), max_size=4),
    part_ids=st.lists(st.sampled_from([1, 3, 100]), min_size=6, max_size=6),
)
def test_a_chain_answers_like_a_dict_before_and_after_compaction(tmp_path_factory, full, deltas, part_ids):
    workspace = Workspace(tmp_path_factory.mktemp("law"))
    name, answers = None, Rows()
    with pytest.MonkeyPatch.context() as patch:
        for number, rows in enumerate([full, *deltas]):
            patch.setattr(build, "PART_IDS", part_ids[number])
            manifest = publish_rows(workspace, f"release {number}", rows, delta_of=name)
            name = manifest.name
            answers.update(rows)
            assert manifest.totals == dict(Counter(kind for kind, _ in answers.texts))
            with open_release(workspace) as opened:
                check(opened.store, answers, range(IDS[-1] + 3))
        patch.setattr(retention, "PART_IDS", part_ids[-1])
        compacted = compact(workspace)
    assert not compacted.delta
    with open_release(workspace) as opened:
        assert opened.name == compacted.name
        check(opened.store, answers, range(IDS[-1] + 3))


def test_cohorts_stand_in_for_an_id_without_knowledge(workspace, full):
    with open_release(workspace) as opened:
        [own, member, _] = opened.store.get("user", [1, 2, 3])
        assert (own.text, own.framework) == ("one", "kar")
        assert (member.kind, member.id, member.as_of, member.text) == ("user", 2, 2000, "war films")
        assert (member.framework, member.quality) == ("collective", "short")
        rows, mask = opened.store.vectors("user", [1, 2, 3])
        np.testing.assert_allclose(rows, [[1, 0], [0.6, 0.8], [0, 0]], rtol=1e-6)
        assert mask.tolist() == [True, True, False]
        assert opened.store.cohorts("item", [2, 3]) == [(9, 8), ()]
        assert opened.store.count("user") == 1
        assert opened.store.ids("user").tolist() == [1]


def test_a_delta_that_renews_a_cohort_renews_its_members_in_the_parent(workspace, full):
    renewed = Rows(texts={("cohort", 8): (3000, "peace films", "ok")}, vectors={("cohort", 8): [[0, 5]]})
    publish_rows(workspace, "d", renewed, delta_of=full)
    with open_release(workspace) as opened:
        [member] = opened.store.get("user", [2])
        assert (member.text, member.as_of, member.quality) == ("peace films", 3000, "ok")
        assert opened.store.vectors("user", [2])[0].tolist() == [[0, 1]]


def test_a_member_in_a_delta_reads_its_cohort_in_the_parent(workspace, full):
    delta = publish_rows(workspace, "d", Rows(cohorts={("user", 4): (9, 8), ("user", 2): ()}), delta_of=full)
    assert (delta.knowledge, delta.memberships, delta.dim, delta.totals) == ({}, {"user": 2}, 2, BASE_TOTALS)
    assert (delta.as_of_min, delta.as_of_max) == (0, 2000)
    with open_release(workspace) as opened:
        assert [k and k.text for k in opened.store.get("user", [4, 2])] == ["war films", None]  # 2 left its cohort
        assert opened.store.vectors("user", [4, 2])[1].tolist() == [True, False]
        assert opened.store.cohorts("user", [4, 2]) == [(9, 8), ()]


BASE_TOTALS = {"user": 1, "cohort": 1, "item": 1}


def test_a_chain_codes_by_the_codebooks_of_its_full_release(workspace, full):
    rows = Rows(vectors={("user", 7): [[1, 1]], ("user", 1): [[2, 2]]}, codes={("user", 7): (1, 2, 9)})
    delta = publish_rows(workspace, "d", rows, delta_of=full)
    files = {"parts/00000.lmdb", "parts/00000.ids", "parts/00000-user.faiss"}
    assert (delta.codes, delta.files.keys()) == ({"user": 2}, files)
    assert {k: (e.sizes, e.codebooks) for k, e in delta.semantic_ids.items()} == {
        kind: (CODE_SIZES, quantizer.fingerprint) for kind, quantizer in QUANTIZERS.items()
    }
    later = publish_rows(workspace, "dd", Rows(vectors={("user", 3): [[0, 0]]}), delta_of=delta.name)
    for manifest in (later, compact(workspace)):
        with open_release(workspace, manifest.name) as opened:
            quantizers = opened.quantizers()
            assert quantizers.keys() == QUANTIZERS.keys()
            for kind, quantizer in quantizers.items():
                assert quantizer.config == QUANTIZERS[kind].config
                np.testing.assert_array_equal(quantizer.codebooks[1], QUANTIZERS[kind].codebooks[1])
        assert manifest.semantic_ids == delta.semantic_ids


def test_codes_that_no_codebook_explains_are_refused(workspace, full):
    odd = Rows(vectors={("user", 1): [[1, 1]]}, codes={("user", 1): (4, 0, 0)})
    with pytest.raises(SchemaError, match="code 4 is out of range: level 0 has 4 codes"):
        publish_rows(workspace, "d", odd, delta_of=full)
    with pytest.raises(SchemaError, match=r"must be \[1, 3\]|must be \[n, 3\]"):
        publish_rows(workspace, "d", Rows(odd.texts, odd.vectors, codes={("user", 1): (1, 0)}), delta_of=full)
    info = ReleaseInfo(fingerprint=fingerprint("other"), model="m", encoder="e")
    rows = Rows(texts={("user", 1): (1, "a", "ok")}, vectors=odd.vectors, codes={("user", 1): (1, 0, 0)})
    with pytest.raises(SchemaError, match="kind 'user' have codes, but the release has no codebooks"):
        publish(workspace, **tables(rows), info=info)
    delta = info.model_copy(update={"parent": full, "delta": True})
    with pytest.raises(ValueError, match="quantizers"):
        publish(workspace, **tables(rows), quantizers=QUANTIZERS, info=delta)
    assert current_release(workspace) == full


def test_damaged_codebooks_are_found(workspace, full):
    file = workspace.local_path("releases", full, "semantic_ids", "user", "codebooks.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ReleaseError, match=r"codebooks\.safetensors is corrupt"):
        open_release(workspace)


def test_the_newest_release_with_an_id_answers_for_all_its_partitions(workspace, full):
    delta = publish_rows(workspace, "d", Rows(vectors={("user", 1): [[7, 7], [1, 0]]}), delta_of=full)
    assert (delta.vectors, delta.partitions) == ({"user": 1}, {"user": 1})
    assert read_manifest(workspace, full).partitions == {"user": 2}
    with open_release(workspace) as opened:
        rows, mask = opened.store.partitions("user", [1, 2], 4)
        assert (rows.dtype, rows.shape) == (np.float32, (2, 4, 2))
        assert rows[0].tolist() == [[7, 7], [1, 0], [0, 0], [0, 0]]
        assert mask.tolist() == [[True, True, False, False], [True, False, False, False]]
    with open_release(workspace, full) as opened:
        assert opened.store.partitions("user", [1], 4)[0][0].tolist() == [[1, 0], [2, 0], [3, 0], [0, 0]]
        assert opened.store.partitions("user", [1], 300)[1].sum() == 3


def test_a_delta_counts_ids_that_are_new_in_the_whole_chain(workspace, full):
    first = publish_rows(workspace, "d1", texts({("user", 1): "new", ("user", 7): "x"}), delta_of=full)
    second = publish_rows(workspace, "d2", texts({("user", 7): "y", ("user", 9): "z"}), delta_of=first.name)
    assert (first.totals["user"], second.totals["user"], second.knowledge) == (2, 3, {"user": 2})
    assert [m.name for m in chain(workspace, second.name)] == [second.name, first.name, full]
    with open_release(workspace) as opened:
        assert [m.name for m in opened.chain] == [second.name, first.name, full]
        assert opened.store.count("user") == 3
        assert opened.store.ids("user", 2).tolist() == [1, 7]


def test_vectors_may_begin_in_a_delta(workspace):
    full = publish_rows(workspace, "full", texts({("user", 1): "a"}))
    assert full.dim == 0
    publish_rows(workspace, "d", Rows(vectors={("user", 1): [[1, 2]]}), delta_of=full.name)
    with open_release(workspace) as opened:
        assert opened.store.vectors("user", [0, 1])[0].tolist() == [[0, 0], [1, 2]]


def test_publishing_a_delta_again_gives_the_same_and_another_parent_another(workspace, full):
    delta = publish_rows(workspace, "d", texts({("user", 1): "new"}), delta_of=full)
    later = publish_rows(workspace, "other", BASE).name

    def unread():
        raise AssertionError("the tables of a release that exists must not be read")
        yield

    info = ReleaseInfo(fingerprint=delta.fingerprint, model="m", encoder="e", parent=full, delta=True)
    with pytest.raises(ReleaseError, match=f"was built on {full}, but {later} is"):
        publish(workspace, knowledge=unread(), vectors=unread(), memberships=unread(), info=info)
    roll_back(workspace, to=full)
    assert publish(workspace, knowledge=unread(), vectors=unread(), memberships=unread(), info=info) == delta
    assert current_release(workspace) == delta.name
    roll_back(workspace, to=later)
    on_later = publish_rows(workspace, "d", texts({("user", 1): "new"}), delta_of=later)
    assert (on_later.parent, on_later.fingerprint) == (later, delta.fingerprint)
    assert publish_rows(workspace, "d", BASE).delta is False
    assert len(list_releases(workspace)) == 5


def test_a_delta_without_a_row_or_a_complete_parent_is_refused(workspace, full):
    one = texts({("user", 1): "new"})
    with pytest.raises(ReleaseError, match=rf"delta of release '{full}' has no row"):
        publish_rows(workspace, "d", Rows(), delta_of=full)
    with pytest.raises(ReleaseError, match=r"'nope' cannot be the parent of a delta: .*publish in full"):
        publish_rows(workspace, "d", one, delta_of="nope")
    orphan = ReleaseInfo(fingerprint=fingerprint("d"), model="m", encoder="e", delta=True)
    with pytest.raises(ReleaseError, match="a delta release needs a parent"):
        publish(workspace, **tables(one), info=orphan)
    delta = publish_rows(workspace, "d", one, delta_of=full).name
    workspace.delete_dir("releases", full)
    with pytest.raises(ReleaseError, match=rf"'{delta}' cannot be the parent of a delta: .*'{full}', which is missing"):
        publish_rows(workspace, "dd", one, delta_of=delta)
    assert [m.name for m in list_releases(workspace)] == [delta]


def test_vectors_of_another_length_than_the_parents_are_refused(workspace, full):
    info = ReleaseInfo(fingerprint=fingerprint("d"), model="m", encoder="e", parent=full, delta=True)
    longer = tables(Rows(vectors={("user", 1): [[1, 2, 3]]}), dim=3)
    with pytest.raises(SchemaError, match="3 components, but earlier ones have 2"):
        publish(workspace, **longer, info=info)
    assert current_release(workspace) == full


@pytest.mark.parametrize(
    ("partitions", "message"), [([1], "partition 1, but none of partition 0"), ([0, 256], "row 1")]
)
def test_partitions_that_no_lookup_reaches_are_refused(workspace, full, partitions, message):
    table = tables(Rows(vectors={("user", 1): [[1, 2]] * len(partitions)}))["vectors"][0]
    table = table.set_column(table.column_names.index("partition"), "partition", pa.array(partitions, pa.int32()))
    info = ReleaseInfo(fingerprint=fingerprint("d"), model="m", encoder="e", parent=full, delta=True)
    with pytest.raises(SchemaError, match=message):
        publish(workspace, knowledge=[], vectors=[table], info=info)


def test_broken_memberships_are_refused(workspace):
    one = tables(texts({("user", 1): "a"}))
    info = ReleaseInfo(fingerprint=fingerprint("a"), model="m", encoder="e")
    for rows, message in (
        ([("user", 1, [5, None])], "cohorts of user 1 contain a null"),
        ([("user", 1, None)], "row 0: cohorts is null"),
        ([("user", 1, [5]), ("user", 1, [6])], "user 1 occurs twice in the memberships"),
    ):
        members = pa.Table.from_pylist([dict(zip(MEMBERSHIPS.names, row, strict=True)) for row in rows], MEMBERSHIPS)
        with pytest.raises(SchemaError, match=message):
            publish(workspace, **(one | {"memberships": [members]}), info=info)


def test_a_delta_of_another_encoder_is_refused_and_one_that_does_not_say_has_its_parents(workspace):
    rows = tables(texts({("user", 1): "a"}))
    info = ReleaseInfo(fingerprint=fingerprint("f"), model="m", encoder="e", encoder_identity="e@1")
    full = publish(workspace, **rows, info=info)
    delta = ReleaseInfo(fingerprint=fingerprint("d"), model="m", encoder="e", parent=full.name, delta=True)
    with pytest.raises(ReleaseError, match="vectors of encoder e@1, but the new ones come from e@2"):
        publish(workspace, **rows, info=delta.model_copy(update={"encoder_identity": "e@2"}))
    assert publish(workspace, **rows, info=delta).encoder_identity == "e@1"
    assert compact(workspace).encoder_identity == "e@1"


def test_a_deleted_parent_is_named_with_the_way_back(workspace, full):
    middle = publish_rows(workspace, "d1", texts({("user", 1): "new"}), delta_of=full).name
    newest = publish_rows(workspace, "d2", texts({("user", 1): "newer"}), delta_of=middle).name
    workspace.delete_dir("releases", middle)
    with pytest.raises(ReleaseError, match=rf"{newest} is a delta of release '{middle}', .*rollback --to {full}"):
        open_release(workspace)
    with pytest.raises(ReleaseError, match="which is missing"):
        roll_back(workspace, to=newest)
    assert roll_back(workspace) == full
    workspace.delete_dir("releases", full)
    with pytest.raises(ReleaseError, match="no full release is left"):
        open_release(workspace, newest)


def test_damage_to_any_part_of_a_chain_is_found_on_opening(workspace, full):
    publish_rows(workspace, "d", texts({("user", 1): "new"}), delta_of=full)
    file = workspace.local_path("releases", full, "parts", "00000.lmdb")
    data = file.read_bytes()
    file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(ReleaseError, match="SHA-256"):
        open_release(workspace)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ReleaseError, match="bytes"):
        open_release(workspace, verify=False)


@pytest.mark.parametrize("database", ["vectors", "memberships"])
def test_row_counts_other_than_the_manifests_are_refused(workspace, full, database):
    path = workspace.local_path("releases", full, "release.json")
    manifest = json.loads(path.read_text())
    manifest["parts"][0]["rows"][database] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match=rf"rows of {database}, but release\.json says"):
        open_release(workspace)


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_remote_chain_is_copied_and_opened(scheme, request):
    root = f"memory://bucket-{uuid.uuid4().hex}/ws" if scheme == "memory" else request.getfixturevalue("s3_root")
    remote = Workspace(root)
    full = publish_rows(remote, "full", BASE).name
    delta = publish_rows(remote, "d", texts({("user", 1): "new", ("user", 5): "five"}), delta_of=full)
    assert delta.totals == BASE_TOTALS | {"user": 2}
    with open_release(remote) as opened:
        assert [k.text for k in opened.store.get("user", [1, 2, 5])] == ["new", "war films", "five"]
    compacted = compact(remote)
    assert prune(remote, keep=1, min_age_s=0) == sorted([full, delta.name])
    assert remote.names("releases") == sorted([compacted.name, "CURRENT"])
    with open_release(remote) as opened:
        assert opened.manifest.totals == BASE_TOTALS | {"user": 2}
        assert [k.text for k in opened.store.get("user", [1, 2, 5])] == ["new", "war films", "five"]


def test_opening_follows_a_pointer_that_moves_meanwhile(workspace, full, monkeypatch):
    real, opened = release_module.chain, []

    def slow(workspace, name):
        pinned = real(workspace, name)
        opened.append(name)
        if len(opened) == 1:
            opened.append(publish_rows(workspace, "next", texts({("user", 1): "next"})).name)
            workspace.delete_dir("releases", name)
        return pinned

    monkeypatch.setattr(release_module, "chain", slow)
    with open_release(workspace) as release:
        assert release.store.get("user", [1])[0].text == "next"


def test_opening_gives_up_where_the_pointer_never_rests(workspace, full, monkeypatch):
    names = iter(range(1000))
    monkeypatch.setattr(release_module, "current_release", lambda workspace: f"gone-{next(names)}")
    with pytest.raises(ReleaseError, match="changed 10 times"):
        open_release(workspace)
