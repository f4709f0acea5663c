"""The whole stage on planted tastes: who ends up together, sizes, new members, a second run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlrec.cohorts import building, clustering
from owlrec.cohorts.building import AssignCohorts, _batches, build_cohorts, cohort_shards
from owlrec.cohorts.clustering import ClusterConfig, FactorSettings
from owlrec.cohorts.cohort_model import POINTER, CohortsConfig, CohortSettings, previous_folder, read_profiles
from owlrec.errors import SchemaError
from owlrec.runner import Pool, run_stage
from owlrec.scenario import get_scenario
from owlrec.schema import HISTORIES, PROMPTS
from owlrec.shards import Artifact, Shard
from owlrec.storage import Pointer
from owlrec.workspace import Workspace

MOVIES = get_scenario("movies")
CONFIG = CohortsConfig(mean_size=16)  # 2 to 40 members
SETTINGS = CohortSettings(factors=FactorSettings(factors=4))
TASTES, ITEMS_PER_TASTE = 4, 20


def ask(profiles: pa.Table) -> pa.Table:
    """A prompt for each cohort: its name."""
    rows = [{"kind": "cohort", "id": r["id"], "as_of": r["as_of"], "text": r["cohort"]} for r in profiles.to_pylist()]
    return pa.Table.from_pylist(rows, schema=PROMPTS)


def build(
    workspace: Workspace, folder: str, config: CohortsConfig = CONFIG, previous: str | None = None
) -> dict[str, int]:
    return build_cohorts(workspace, folder, config, MOVIES, ask, shard_rows=4, previous=previous, settings=SETTINGS)


def prepare(
    workspace: Workspace, histories: Mapping[int, list[int]], dislikes: Mapping[int, list[int]] | None = None
) -> None:
    """Users by id with what they liked and disliked; items 0 to 79, of which each score is one taste."""
    dislikes = dislikes or {}
    n = TASTES * ITEMS_PER_TASTE
    items = pa.table(
        {
            "item_id": range(n),
            "raw_id": map(str, range(n)),
            "title": [f"Film {i}" for i in range(n)],
            "genres": [["Drama"]] * n,
        }
    )
    users = pa.table(
        {"user_id": list(histories), "raw_id": [str(u) for u in histories], "gender": ["F"] * len(histories)}
    )
    rows = [
        {
            "user_id": u,
            "as_of": 10,
            "items": liked + dislikes.get(u, []),
            "ratings": [5.0] * len(liked) + [1.0] * len(dislikes.get(u, [])),
        }
        for u, liked in histories.items()
        if liked or dislikes.get(u)
    ]
    workspace.write_table("users", users, key="user_id", n_shards=4)
    workspace.write_table("histories", pa.Table.from_pylist(rows, schema=HISTORIES), key="user_id", n_shards=4)
    workspace.write_table("items", items, key="item_id", n_shards=2)


def planted(n: int, seed: int = 0) -> dict[int, list[int]]:
    """User u has taste u modulo 4, and eight of its films."""
    rng = np.random.default_rng(seed)
    return {
        u: (ITEMS_PER_TASTE * (u % TASTES) + rng.choice(ITEMS_PER_TASTE, 8, replace=False)).tolist() for u in range(n)
    }


def names(workspace: Workspace, folder: str, kind: str, ids: Sequence[int]) -> list[list[str]]:
    """Of each id its cohorts, liked before disliked."""
    by_id: dict[int, list[tuple[str, str]]] = {i: [] for i in ids}
    for file in workspace.names(folder, kind):
        for row in workspace.read_parquet(f"{folder}/{kind}/{file}").to_pylist():
            if row["id"] in by_id:
                by_id[row["id"]].append((row["facet"], row["cohort"]))
    return [[name for _, name in sorted(by_id[i], reverse=True)] for i in ids]


def test_cohorts_hold_one_taste_and_keep_to_their_sizes(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(160))
    built = build(workspace, "c")
    cohort_of = {u: n[0] for u, n in enumerate(names(workspace, "c", "user", range(160)))}
    pure = [
        len({u % TASTES for u, name in cohort_of.items() if name == cohort}) == 1 for cohort in set(cohort_of.values())
    ]
    assert np.mean(pure) > 0.8
    sizes = Counter(cohort_of.values())
    assert max(sizes.values()) <= 40
    assert min(sizes.values()) >= 2
    assert built["user_cohorts"] == len(sizes)
    assert built["user_members"] == 160
    assert built["item_members"] == 80
    profiles = read_profiles(workspace, "c").to_pylist()
    assert {row["cohort"]: row["size"] for row in profiles if row["kind"] == "user"} == sizes
    for row in profiles:
        assert row["titles"], row


def test_everything_about_a_cohort_is_in_the_shard_of_its_id(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(160))
    built = build(workspace, "c")
    n = workspace.n_shards("cohort")
    assert 8 < built["user_cohorts"] + built["item_cohorts"] + 2 <= 16  # with those of all users and all items
    assert n == 4  # of four cohorts each
    asked = []
    for number in range(n):
        prompts = workspace.read_parquet(f"c/prompts/{number:08d}.parquet")
        assert prompts["id"].to_pylist() == sorted(prompts["id"].to_pylist())
        assert prompts["text"].to_pylist() == read_profiles(workspace, "c", [number])["cohort"].to_pylist()
        assert set(cohort_shards(prompts["text"].to_pylist(), n)) <= {number}
        asked += prompts["text"].to_pylist()
    assert len(asked) == built["user_cohorts"] + built["item_cohorts"] == len(set(asked))
    cards = Artifact(workspace, "c").cards("user", "item", "prompts")
    assert len(cards) == 4 + 2 + n
    assert sum(card.rows_out for name, card in cards.items() if name.startswith("prompts/")) == len(asked)


def test_a_finished_build_does_no_shard_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(80))
    first = build(workspace, "c")
    made: list[str] = []
    again = build_cohorts(
        workspace, "c", CONFIG, MOVIES, ask, shard_rows=4, on_card=lambda card: made.append(card.shard)
    )
    assert (again, made) == (first, [])


def test_two_levels_and_several_batches_group_tastes_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(160))
    for name, value in (("_ONE_CELL", 2), ("_PER_CELL", 4)):
        monkeypatch.setattr(clustering, name, value)
    monkeypatch.setattr(building, "CELL_SAMPLE", 50)  # groups of cells: 160 users make 3 of them, for 3 cells
    monkeypatch.setattr(building, "_BATCH_ROWS", 60)
    monkeypatch.setattr(building, "_MERGE_ROWS", 10)
    built = build(workspace, "c")
    assert len(workspace.names("c", "user-liked-samples")) > 1
    assert len(workspace.names("c", "user-liked-centroids")) == 3
    cohort_of = {u: n[0] for u, n in enumerate(names(workspace, "c", "user", range(160)))}
    pure = [
        len({u % TASTES for u, name in cohort_of.items() if name == cohort}) == 1 for cohort in set(cohort_of.values())
    ]
    assert np.mean(pure) > 0.8
    assert built["user_members"] == 160


def test_beyond_the_sample_sizes_are_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(640))
    monkeypatch.setattr(ClusterConfig, "sizes", lambda self, n: clustering.Sizes(max(1, n // 16), 2, 40, n // 2))
    built = build(workspace, "c")
    assert built["user_members"] == pytest.approx(640, rel=0.05)
    assert sum(map(len, names(workspace, "c", "user", range(640)))) == 640


def test_batches_take_the_first_shards_that_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_BATCH_ROWS", 10)
    assert _batches([4, 4, 4, 30, 2], 12) == [range(2), range(2, 3)]
    assert _batches([4, 4, 4, 30, 2], 100) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert _batches([0, 0], 0) == [range(1)]


def test_dislikes_make_cohorts_of_their_own(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    liked = planted(80)
    prepare(workspace, liked, {u: [(20 + i) % 80 for i in items[:4]] for u, items in liked.items()})
    build(workspace, "c")
    both = names(workspace, "c", "user", range(80))
    assert all(len(n) == 2 for n in both)
    assert all(n[0].startswith("user-liked-") and n[1].startswith("user-disliked-") for n in both)


def test_identical_users_are_one_cohort_and_one_prompt(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, {u: [1, 2, 3, 4] for u in range(60)})
    built = build(workspace, "c")
    assert names(workspace, "c", "user", range(60)) == [["user-liked-000000"]] * 60
    assert built["user_cohorts"] == 1


def test_users_without_history_share_an_attribute_cohort(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(80) | {100 + u: [] for u in range(6)})
    build(workspace, "c")
    assert names(workspace, "c", "user", range(100, 106)) == [["user-gender=F"]] * 6
    profile = next(r for r in read_profiles(workspace, "c").to_pylist() if r["cohort"] == "user-gender=F")
    assert (profile["size"], profile["titles"], profile["attributes"]) == (6, [], ["gender F"])


def test_a_second_run_keeps_names_and_profiles(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(160))
    build(workspace, "a")
    Pointer(workspace, POINTER).move("a")
    assert previous_folder(workspace, "b") == "a"
    prepare(workspace, planted(160) | {u: items for u, items in planted(168).items() if u >= 160})
    built = build(workspace, "b", previous="a")
    Pointer(workspace, POINTER).move("b")
    before, after = (names(workspace, folder, "user", range(160)) for folder in "ab")
    assert np.mean([a == b for a, b in zip(before, after, strict=True)]) > 0.7
    assert built["settled"] > 0
    assert previous_folder(workspace, "b") == "a"  # a run that is repeated goes on from where it did before
    assert previous_folder(workspace, "c") == "b"


def test_items_that_nobody_shares_are_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, {u: [u] for u in range(10)})
    with pytest.raises(SchemaError, match="none of 10 items"):
        build(workspace, "c")


def everything(workspace: Workspace, folder: str) -> list[pa.Table]:
    memberships = [
        workspace.read_parquet(f"{folder}/{kind}/{file}")
        for kind in ("user", "item")
        for file in workspace.names(folder, kind)
    ]
    return [*memberships, read_profiles(workspace, folder)]


def test_an_object_store_gets_the_same_cohorts(tmp_path: Path, s3_root: str) -> None:
    workspaces = Workspace(tmp_path), Workspace(s3_root)
    for workspace in workspaces:
        prepare(workspace, planted(80))
        build(workspace, "c")
        build(workspace, "d", previous="c")
    for folder in "cd":
        assert everything(workspaces[0], folder) == everything(workspaces[1], folder)


@pytest.mark.ray
def test_workers_of_a_cluster_assign_as_this_process_does(ray_local: None, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    prepare(workspace, planted(80))
    build(workspace, "c")
    here = everything(workspace, "c")
    shards = {Shard("user", number): "again" for number in range(4)}
    stage = AssignCohorts("c", CONFIG, MOVIES)
    cards = run_stage(workspace, stage, shards, Pool(here=False, max_workers=2))
    assert {card.fingerprint for card in cards.values()} == {"again"}
    assert everything(workspace, "c") == here
