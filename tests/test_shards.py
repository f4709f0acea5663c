"""Cards: whole only with the files that they name, hashed again only where they were copied, gathered by thousands."""

import shutil
from pathlib import Path

import pytest

from owlrec.shards import BLOCK, GATHERED, Artifact, Card, Shard
from owlrec.storage import Storage
from owlrec.workspace import Workspace


def write_shard(artifact: Artifact, shard: Shard, text: str = "text") -> Card:
    """A shard of one file, with its card."""
    file = artifact.workspace.write_bytes(artifact.path(shard.file()), text.encode())
    card = Card(stage="s", shard=shard.name, fingerprint=f"of {text}", files={shard.file(): file}, rows_in=1)
    artifact.finish(card)
    return card


@pytest.fixture
def artifact(workspace: Workspace) -> Artifact:
    """Three shards of users and one of items."""
    made = Artifact(workspace, "texts/f")
    for shard in (Shard("user", 2), Shard("user", 0), Shard("user", 1), Shard("item", 0)):
        write_shard(made, shard)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often files are read and hashed."""
    counted = {"read_bytes": 0, "digest": 0}
    for name in counted:
        original = getattr(Storage, name)

        def count(self: Storage, path: str, name: str = name, original: object = original) -> object:
            counted[name] += 1
            return original(self, path)  # type: ignore[operator]

        monkeypatch.setattr(Storage, name, count)
    return counted


def test_names_of_shards_go_both_ways() -> None:
    shard = Shard("user", 12)
    assert (shard.name, shard.file(), shard.file(".arrow")) == (
        "user/00000012",
        "user/00000012.parquet",
        "user/00000012.arrow",
    )
    assert Shard.from_name("user/00000012") == shard


def test_cards_come_in_order_and_by_kind(artifact: Artifact, calls: dict[str, int]) -> None:
    users = [f"user/{n:08d}" for n in range(3)]
    assert list(artifact.cards()) == ["item/00000000", *users]
    assert list(artifact.cards("user")) == users
    assert artifact.cards("cohort") == {}
    assert calls["digest"] == 0  # size and e_tag say enough
    assert artifact.card(Shard("user", 3)) is None


@pytest.mark.parametrize("damage", ["deleted", "truncated", "longer", "other bytes", "no card", "broken card"])
def test_a_card_counts_only_with_its_files_whole(artifact: Artifact, damage: str) -> None:
    shard = Shard("user", 1)
    folder = Path(artifact.workspace.path("texts/f"))
    file, card = folder / shard.file(), folder / "cards/user/00000/00000001.json"
    if damage == "deleted":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(b"tex")
    elif damage == "longer":
        file.write_bytes(b"texts")
    elif damage == "other bytes":
        artifact.workspace.write_bytes(artifact.path(shard.file()), b"tent")
    elif damage == "no card":
        card.unlink()
    else:
        card.write_bytes(card.read_bytes()[:-5])
    assert artifact.card(shard) is None
    assert list(artifact.cards("user")) == ["user/00000000", "user/00000002"]


def test_a_shard_is_whole_only_with_all_its_files(artifact: Artifact) -> None:
    shard, workspace = Shard("user", 0), artifact.workspace
    files = {
        path: workspace.write_bytes(artifact.path(path), b"x")
        for path in (shard.file(), f"dead/{shard.file()}", "of all.json")
    }
    artifact.finish(Card(stage="s", shard=shard.name, fingerprint="f", files=files))
    assert artifact.card(shard) == artifact.cards()[shard.name]
    workspace.delete_file(artifact.path(f"dead/{shard.file()}"))
    assert artifact.card(shard) is None
    assert shard.name not in artifact.cards()


def test_a_copied_workspace_is_hashed_once(artifact: Artifact, tmp_path: Path, calls: dict[str, int]) -> None:
    before = artifact.cards()
    shutil.copytree(artifact.workspace.path(), tmp_path / "copy", copy_function=shutil.copyfile)
    copy = Artifact(Workspace(tmp_path / "copy"), artifact.folder)
    copy.workspace.write_bytes(copy.path("user/00000002.parquet"), b"tEXt")  # a copy that went wrong
    cards = copy.cards()
    assert calls["digest"] == 4
    assert list(cards) == ["item/00000000", "user/00000000", "user/00000001"]
    for name, card in cards.items():
        (path, file), *_ = card.files.items()
        entry = copy.workspace.entry(copy.path(path))
        assert entry is not None
        assert file.e_tag == entry.e_tag != before[name].files[path].e_tag
        assert card == before[name].model_copy(update={"files": card.files})
    assert copy.cards() == cards
    assert calls["digest"] == 5  # the broken one alone: the other cards were written again


def gathered_artifact(workspace: Workspace) -> Artifact:
    """2,050 shards without files, all gathered but the last fifty, which are few."""
    artifact = Artifact(workspace, "many")
    for number in range(2 * BLOCK + 50):
        artifact.finish(Card(stage="s", shard=Shard("user", number).name, fingerprint=f"{number}"))
    artifact.gather(artifact.cards())
    return artifact


def test_gathered_thousands_are_one_read_each_and_hide_no_change(workspace: Workspace, calls: dict[str, int]) -> None:
    artifact = gathered_artifact(workspace)
    assert workspace.names("many", "gathered", "user") == ["00000.jsonl", "00001.jsonl"]

    def fingerprints() -> list[str]:
        calls["read_bytes"] = 0
        return [card.fingerprint for card in artifact.cards().values()]

    expected = [str(number) for number in range(2050)]
    assert fingerprints() == expected
    assert calls["read_bytes"] == 2 + 50

    artifact.finish(Card(stage="s", shard=Shard("user", 1234).name, fingerprint="changed"))
    expected[1234] = "changed"
    assert fingerprints() == expected
    assert calls["read_bytes"] == 2 + 50 + 1
    artifact.gather(["user/00001234"])
    assert fingerprints() == expected
    assert calls["read_bytes"] == 2 + 50

    for number in range(2050, 2050 + GATHERED):
        artifact.finish(Card(stage="s", shard=Shard("user", number).name, fingerprint=str(number)))
        expected.append(str(number))
    artifact.gather(["user/00002050"])
    assert fingerprints() == expected
    assert calls["read_bytes"] == 3

    artifact.forget(Shard("user", 7))
    del expected[7]
    assert fingerprints() == expected


@pytest.mark.parametrize("content", [b"", b"{", b'{"card": {}}\n', b"\xff\xfe", b"[]"])
def test_a_corrupt_gathered_file_costs_nothing_but_time(workspace: Workspace, content: bytes) -> None:
    artifact = Artifact(workspace, "many")
    for number in range(BLOCK):
        artifact.finish(Card(stage="s", shard=Shard("user", number).name, fingerprint=f"{number}"))
    artifact.gather(cards := artifact.cards())
    workspace.write_bytes("many/gathered/user/00000.jsonl", content)
    assert artifact.cards() == cards
    artifact.gather(cards)
    assert len(workspace.read_bytes("many/gathered/user/00000.jsonl").splitlines()) == BLOCK
