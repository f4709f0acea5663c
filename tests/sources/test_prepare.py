"""`prepare` as a whole, over fragments, buckets and shards, against the same tables built in memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from owlrec.errors import OwlRecError, SchemaError, WorkspaceError
from owlrec.ids import shard_of, stable_id
from owlrec.recipe import Recipe
from owlrec.runs import stages
from owlrec.schema import INTERACTIONS, SAMPLES
from owlrec.shards import Artifact, Card, Claims, finished_stage
from owlrec.sources import preparation, tabular
from owlrec.sources import tabular as files
from owlrec.sources.outcomes import LabelConfig, Labels, with_outcomes
from owlrec.sources.preparation import table_files
from owlrec.sources.raw import RawTables
from owlrec.sources.splits import SplitConfig, build_samples, read_samples
from owlrec.sources.tabular import TableSource
from owlrec.storage import Storage
from owlrec.workspace import Workspace, table_file

T = 1_600_000_000_000
N_USERS, N_ITEMS, N_FILES, ROWS = 120, 40, 6, 700


@pytest.fixture(autouse=True)
def many_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fragments of 200 rows, groups of 500, buckets of 1,000 (8 of them): what 10^8 rows have in thousands."""
    monkeypatch.setattr(tabular, "FRAGMENT_ROWS", 200)
    monkeypatch.setattr(preparation, "GROUP_ROWS", 500)
    monkeypatch.setattr(preparation, "BUCKET_INTERACTIONS", 1000)
    monkeypatch.setattr(preparation, "BUCKET_ITEMS", 20)


def interactions(seed: int, ids: str) -> pa.Table:
    """Distinct (user, item, timestamp) rows; a few moments, so that ties are common."""
    random = np.random.default_rng(seed)
    keys = random.permutation(N_USERS * N_ITEMS)[:ROWS]
    user, item = np.char.add(ids, (keys // N_ITEMS).astype(str)), np.char.add("i", (keys % N_ITEMS).astype(str))
    time = T + 10 * seed + random.integers(0, 9, ROWS)  # each file has its own moments, so rows are distinct
    return pa.table({"user_id": user, "item_id": item, "rating": random.integers(1, 6, ROWS), "timestamp": time})


def write_source(folder: Path, ids: str = "u", n_files: int = N_FILES) -> Path:
    (folder / "log").mkdir(parents=True)
    for number in range(n_files):
        write_log(folder, number, interactions(number, ids))
    users = [f"{ids}{n}" for n in range(N_USERS)]
    pq.write_table(pa.table({"user_id": users, "age": np.arange(N_USERS) % 70}), folder / "users.parquet")
    titles = [f"Title {n}" for n in range(N_ITEMS)]
    items = pa.table({"item_id": [f"i{n}" for n in range(N_ITEMS)], "title": titles, "tags": [["a", "b"]] * N_ITEMS})
    pq.write_table(items, folder / "items.parquet", row_group_size=15)
    return folder


def write_log(folder: Path, number: int, table: pa.Table) -> None:
    pq.write_table(table, folder / "log" / f"{number:03d}.parquet", row_group_size=150)


def recipe(folder: Path, workspace: str | Path, split: dict[str, Any] | None = None, **source: Any) -> Recipe:
    paths = {"users": f"{folder}/users.parquet", "items": f"{folder}/items.parquet", "interactions": f"{folder}/log"}
    values = {"name": "t", "scenario": "movies", "engine": {"type": "echo"}, "shard_rows": 10, "split": split or {}}
    source = {"type": "table", **paths, **source}
    return Recipe.model_validate({**values, "workspace": str(workspace), "source": source})


def prepared(recipe: Recipe) -> tuple[Card, Workspace]:
    workspace = Workspace(recipe.workspace)
    return stages.prepare(recipe, workspace), Workspace(recipe.workspace)


def by_id(table: pa.Table, *keys: str) -> list[dict[str, Any]]:
    return table.sort_by([(key, "ascending") for key in keys]).to_pylist()


def all_samples(workspace: Workspace) -> pa.Table:
    return pa.concat_tables([read_samples(workspace, n) for n in workspace.table_shards("samples")])


def raw(folder: Path, **source: Any) -> RawTables:
    loaded: RawTables = recipe(folder, "unused", **source).source.load()
    return loaded


@pytest.mark.parametrize("split", [{}, {"method": "time"}, {"ratios": [2, 1, 1], "history_length": 3}])
def test_shards_hold_what_the_whole_holds(tmp_path: Path, split: dict[str, Any]) -> None:
    folder = write_source(tmp_path / "source")
    card, workspace = prepared(recipe(folder, tmp_path / "ws", split))
    whole = raw(folder)
    labels = Labels(rule="rating_above", rating_above=3)
    expected = build_samples(whole.interactions, SplitConfig.model_validate(split), labels)

    keys = ("user_id", "timestamp", "item_id")
    interactions = with_outcomes(whole.interactions, labels, "log").select(INTERACTIONS.names)
    assert by_id(workspace.read_table("interactions"), *keys) == by_id(interactions, *keys)
    assert by_id(workspace.read_table("users"), "user_id") == by_id(whole.users, "user_id")
    assert by_id(workspace.read_table("items"), "item_id") == by_id(whole.items, "item_id")
    assert by_id(workspace.read_table("histories"), "user_id") == by_id(expected.histories, "user_id")
    assert by_id(all_samples(workspace), *keys) == by_id(expected.samples, *keys)
    assert {name: card.counts[name] for name in expected.counts} == expected.counts
    assert card.counts["items"] == N_ITEMS


def test_files_are_by_hash_and_ascend(tmp_path: Path) -> None:
    _, workspace = prepared(recipe(write_source(tmp_path / "source"), tmp_path / "ws"))
    assert (workspace.n_shards("user"), workspace.n_shards("item")) == (16, 4)  # 120 and 40 rows, 10 per shard
    for name, key, n in (("interactions", "user_id", 16), ("users", "user_id", 16), ("items", "item_id", 4)):
        for number in range(n):
            ids = workspace.read_shard(name, number)[key].to_numpy()
            assert set(shard_of(ids, n)) <= {number}
            assert (np.diff(ids) >= 0).all()
    rows = workspace.read_shard("interactions", 3)
    assert rows.equals(rows.sort_by([(c, "ascending") for c in ("user_id", "timestamp", "item_id")]))


def test_fewer_shards_than_buckets(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    few = recipe(folder, tmp_path / "few").model_copy(update={"shard_rows": 60})
    _, workspace = prepared(few)
    assert workspace.n_shards("user") == 2
    assert preparation.read_grouping(workspace, f"ingest/{workspace.names('ingest')[0]}").user_buckets == 8  # type: ignore[union-attr]
    whole = raw(folder)
    assert by_id(workspace.read_table("users"), "user_id") == by_id(whole.users, "user_id")
    assert workspace.read_table("interactions").num_rows == N_FILES * ROWS


@pytest.mark.parametrize("ids", ["u", ""])
def test_users_come_from_the_interactions(tmp_path: Path, ids: str) -> None:
    folder = write_source(tmp_path / "source", ids)
    _, workspace = prepared(recipe(folder, tmp_path / "ws", users=None))
    expected = {(stable_id(f"{ids}{n}"), f"{ids}{n}") for n in range(N_USERS)}
    users = workspace.read_table("users")
    assert set(zip(users["user_id"].to_pylist(), users["raw_id"].to_pylist(), strict=True)) == expected
    assert len(users) == N_USERS
    assert 8 <= workspace.n_shards("user") <= 32  # estimated from one bucket of eight


def test_csv_json_and_parquet_give_the_same_bytes(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", n_files=2)
    contents = []
    for form in ("parquet", "csv", "jsonl"):
        log = tmp_path / form
        log.mkdir()
        for number in range(2):
            table = pq.read_table(folder / "log" / f"{number:03d}.parquet")
            if form == "parquet":
                pq.write_table(table, log / f"{number}.parquet")
            elif form == "csv":
                table.to_pandas().to_csv(log / f"{number}.csv", index=False)
            else:
                (log / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        card, _ = prepared(recipe(folder, tmp_path / f"ws-{form}", interactions=str(log)))
        contents.append(card.fingerprint)
    assert contents[0] == contents[1] == contents[2]


def test_read_samples_gathers_only_what_is_asked_for(tmp_path: Path) -> None:
    _, workspace = prepared(recipe(write_source(tmp_path / "source"), tmp_path / "ws"))
    whole = read_samples(workspace, 5)
    assert whole.schema.equals(SAMPLES)
    assert max(len(history) for history in whole["history"].to_pylist()) == 10
    assert read_samples(workspace, 5, ["split", "history"]).equals(whole.select(["split", "history"]))
    workspace.delete_file(table_file("interactions", 5))  # not needed without histories
    assert read_samples(workspace, 5, ["label", "user_id"]).equals(whole.select(["label", "user_id"]))


# What is refused


def test_a_repeated_interaction_is_named_by_file_and_row(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    table = pq.read_table(folder / "log" / "004.parquet")
    first = pq.read_table(folder / "log" / "001.parquet").slice(7, 1).cast(table.schema)
    write_log(folder, 4, pa.concat_tables([table.slice(0, 321), first, table.slice(321)]))
    user, item = (first[c][0].as_py() for c in ("user_id", "item_id"))
    with pytest.raises(SchemaError, match=rf"004\.parquet, row 321: user_id '{user}', item_id '{item}'"):
        prepared(recipe(folder, tmp_path / "ws"))


@pytest.mark.parametrize("kind", ["user", "item"])
def test_orphans_are_named_or_dropped(tmp_path: Path, kind: str) -> None:
    folder = write_source(tmp_path / "source")
    table = pq.read_table(folder / "log" / "002.parquet")
    ids = table[f"{kind}_id"].to_pylist()
    ids[555] = "nobody"
    write_log(folder, 2, table.set_column(table.column_names.index(f"{kind}_id"), f"{kind}_id", pa.array(ids)))
    with pytest.raises(SchemaError, match=rf"002\.parquet, row 555: {kind}_id 'nobody' has no .*{kind}s\.parquet"):
        prepared(recipe(folder, tmp_path / "ws"))
    card, workspace = prepared(recipe(folder, tmp_path / "ws", drop_orphans=True))
    assert card.counts["orphans_dropped"] == 1
    assert workspace.read_table("interactions").num_rows == N_FILES * ROWS - 1


@pytest.mark.parametrize("table", ["users", "items"])
def test_a_repeated_id_is_named(tmp_path: Path, table: str) -> None:
    folder = write_source(tmp_path / "source")
    rows = pq.read_table(folder / f"{table}.parquet")
    pq.write_table(pa.concat_tables([rows, rows.slice(17, 1)]), folder / f"{table}.parquet", row_group_size=15)
    with pytest.raises(SchemaError, match=rf"{table}\.parquet, row {len(rows)}: {table[:-1]}_id '.17' is a duplicate"):
        prepared(recipe(folder, tmp_path / "ws"))


def test_a_fragment_without_a_column_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    write_log(folder, 3, interactions(3, "u").drop_columns("timestamp"))
    with pytest.raises(SchemaError, match=r"003\.parquet: column 'timestamp' is missing"):
        prepared(recipe(folder, tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("timestamp", None, r"003\.parquet, row 432: timestamp is null"),
        ("timestamp", 10**15, r"003\.parquet.*micro- or nanoseconds"),
        ("user_id", "", r"003\.parquet, row 432: user_id is empty"),
        ("item_id", None, r"003\.parquet, row 432: item_id is null"),
        ("rating", None, r"003\.parquet, row 432: rating is null"),
        ("weight", -1.0, r"003\.parquet, row 432: the weight is -1.0, but it must be"),
        ("weight", None, r"003\.parquet, row 432: the weight is None"),
    ],
)
def test_bad_values_are_named_by_their_row_in_the_file(tmp_path: Path, column: str, value: Any, message: str) -> None:
    folder = write_source(tmp_path / "source")
    if column == "weight":
        for number in range(N_FILES):
            write_log(folder, number, interactions(number, "u").append_column("weight", pa.array([0.5] * ROWS)))
    table = pq.read_table(folder / "log" / "003.parquet")
    values = table[column].to_pylist()
    values[432] = value
    write_log(folder, 3, table.set_column(table.column_names.index(column), column, pa.array(values)))
    with pytest.raises(SchemaError, match=message):
        prepared(recipe(folder, tmp_path / "ws"))


def test_files_with_and_without_ratings_are_refused(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    table = interactions(3, "u")
    write_log(folder, 3, table.drop_columns("rating"))
    with pytest.raises(
        SchemaError,
        match=r"003\.parquet has neither rating, label, event, split nor weight, but .*000\.parquet has rating",
    ):
        prepared(recipe(folder, tmp_path / "ws"))


def test_weights_reach_the_samples_that_are_trained_on(tmp_path: Path) -> None:
    """Those of positives and of what is drawn for them; without the column all weigh 1."""
    folder = write_source(tmp_path / "source", n_files=2)
    _, workspace = prepared(recipe(folder, tmp_path / "plain"))
    assert set(workspace.read_table("samples")["weight"].to_pylist()) == {1.0}
    weight: dict[tuple[int, int, int], float] = {}
    for number in range(2):
        table = interactions(number, "").drop_columns("rating")
        weights = np.random.default_rng(number).integers(0, 9, len(table)) / 4
        keys = (np.char.lstrip(table["item_id"].to_numpy().astype(str), "i"), table["timestamp"].to_numpy())
        write_log(folder, number, table.append_column("importance", pa.array(weights)))
        for user, item, time, drawn_weight in zip(table["user_id"].to_pylist(), *keys, weights, strict=True):
            weight[int(user), stable_id(f"i{item}"), time] = drawn_weight
    columns = {"interactions": {"weight": "importance"}}
    pq.write_table(pa.table({"user_id": [str(n) for n in range(N_USERS)]}), folder / "users.parquet")
    _, workspace = prepared(recipe(folder, tmp_path / "weighted", columns=columns))
    rows = workspace.read_table("samples").to_pylist()
    taken_at: dict[tuple[int, int], set[float]] = {}
    for (user, _, time), drawn_weight in weight.items():
        taken_at.setdefault((user, time), set()).add(drawn_weight)
    drawn = 0
    for row in rows:
        key = (row["user_id"], row["item_id"], row["timestamp"])
        if row["label"] == 1:
            assert row["weight"] == weight[key]
        else:
            drawn += 1
            assert row["weight"] in taken_at[row["user_id"], row["timestamp"]]
    assert 0 < drawn < len(rows)


def test_a_split_by_column_needs_the_column(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    with pytest.raises(SchemaError, match=r"split\.method is column, but the interactions have no column 'split'"):
        prepared(recipe(folder, tmp_path / "ws", {"method": "column"}))


def test_what_is_refused_leaves_the_earlier_tables(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    before, workspace = prepared(recipe(folder, tmp_path / "ws"))
    contents = {path: entry.sha256 for path, entry in table_files(workspace).items()}
    write_log(folder, 0, pa.concat_tables([interactions(0, "u"), interactions(0, "u").slice(5, 1)]))
    with pytest.raises(SchemaError, match=r"000\.parquet, row 700"):
        prepared(recipe(folder, tmp_path / "ws"))
    with pytest.raises(SchemaError, match="the train split has only one label"):
        prepared(
            recipe(write_source(tmp_path / "other"), tmp_path / "ws").model_copy(
                update={"labels": LabelConfig(rule={"rating_above": 9})}
            )
        )
    assert {path: entry.sha256 for path, entry in table_files(workspace).items()} == contents
    assert finished_stage(workspace, "prepare") == before


def test_two_preparations_at_once_are_refused(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    workspace = Workspace(tmp_path / "ws")
    other = Claims(workspace, "other")
    assert other.claim("claims/prepare")
    with pytest.raises(WorkspaceError, match="prepare is already running"):
        prepared(recipe(folder, tmp_path / "ws"))
    assert workspace.names() == ["claims"]
    other.close()
    prepared(recipe(folder, tmp_path / "ws"))


# What is not done again


def ingested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fragments that are read from now on, by file and first row group."""
    read: list[str] = []
    real = tabular.FileFragments.read

    def watched(self: tabular.FileFragments, fragment: Any) -> Any:
        read.append(f"{Path(fragment.path).name}:{fragment.groups[0]}")
        return real(self, fragment)

    monkeypatch.setattr(tabular.FileFragments, "read", watched)
    return read


def test_the_second_time_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(tmp_path / "source")
    first, workspace = prepared(recipe(folder, tmp_path / "ws"))
    read = ingested(monkeypatch)
    assert prepared(recipe(folder, tmp_path / "ws"))[0] == first
    workspace.delete_file(table_file("samples", 2))  # lost, so it is made again, from what was read before
    second, workspace = prepared(recipe(folder, tmp_path / "ws"))
    assert second.fingerprint == first.fingerprint
    assert workspace.read_shard("samples", 2).num_rows > 0
    assert read == []


def test_only_new_fragments_are_read_and_unchanged_shards_keep_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_source(tmp_path / "source", n_files=5)
    _, workspace = prepared(recipe(folder, tmp_path / "ws", {"method": "time"}))
    before = {path: entry.sha256 for path, entry in table_files(workspace).items()}
    read = ingested(monkeypatch)
    new = {"user_id": ["u7"] * 3, "item_id": ["i1", "i2", "i3"], "rating": [5, 1, 4], "timestamp": [T + 500] * 3}
    write_log(folder, -1, pa.table(new))  # sorts before all others
    _, workspace = prepared(recipe(folder, tmp_path / "ws", {"method": "time"}))
    assert read == ["-01.parquet:0"]
    after = {path: entry.sha256 for path, entry in table_files(workspace).items()}
    changed = {path for path, digest in after.items() if before[path] != digest}
    home = int(shard_of(np.array([stable_id("u7")]), workspace.n_shards("user"))[0])
    assert {path for path in changed if not path.startswith("samples/")} == {
        f"interactions/{home:08d}.parquet",
        f"histories/{home:08d}.parquet",
    }
    _, other = prepared(recipe(folder, tmp_path / "fresh", {"method": "time"}))
    assert {path: entry.sha256 for path, entry in table_files(other).items()} == after


def test_a_changed_file_replaces_its_rows(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source")
    prepared(recipe(folder, tmp_path / "ws"))
    write_log(folder, 2, interactions(50, "u").slice(0, 300))
    after, _ = prepared(recipe(folder, tmp_path / "ws"))
    fresh, _ = prepared(recipe(folder, tmp_path / "fresh"))
    assert after.fingerprint == fresh.fingerprint
    assert after.counts["interactions"] == (N_FILES - 1) * ROWS + 300


def test_the_number_of_shards_never_changes(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", n_files=1)
    prepared(recipe(folder, tmp_path / "ws"))
    more = pa.table({"user_id": [f"u{n}" for n in range(1000)], "age": [1] * 1000})
    pq.write_table(more, folder / "users.parquet")
    _, workspace = prepared(recipe(folder, tmp_path / "ws"))
    assert workspace.n_shards("user") == 16
    assert workspace.read_table("users").num_rows == 1000


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(tmp_path / "source")
    made: list[str] = []
    real = Artifact.finish

    def dying(self: Artifact, card: Card) -> None:
        real(self, card)
        made.append(f"{card.stage} {card.shard}")
        if len(made) in (5, 9, 15, 22):
            raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "finish", dying)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            prepared(recipe(folder, tmp_path / "ws"))
    card, _ = prepared(recipe(folder, tmp_path / "ws"))
    assert len(made) == len(set(made))  # nothing twice
    fresh, _ = prepared(recipe(folder, tmp_path / "fresh"))
    assert card.fingerprint == fresh.fingerprint


# Other stores


def test_a_source_and_a_workspace_without_a_disk(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "source", n_files=2)
    bucket = Storage("memory://prepare-source")
    for path, _ in Storage(folder).entries().items():
        bucket.write_bytes(f"data/{path}", (folder / path).read_bytes())
    remote = recipe(Path("unused"), "memory://prepare-ws").model_copy(
        update={
            "source": TableSource(
                type="table",
                users="memory://prepare-source/data/users.parquet",
                items="memory://prepare-source/data/it*.parquet",
                interactions="memory://prepare-source/data/log",
            )
        }
    )
    local, _ = prepared(recipe(folder, tmp_path / "ws"))
    assert prepared(remote)[0].fingerprint == local.fingerprint


@pytest.mark.parametrize(("pattern", "names"), [("a/**/*.csv", ["a/b/c/x.csv", "a/y.csv"]), ("a/*.csv", ["a/y.csv"])])
def test_globs_of_a_bucket(pattern: str, names: list[str]) -> None:
    bucket = Storage("memory://prepare-globs")
    for name in ("a/y.csv", "a/b/c/x.csv", "a/b/x.txt", "b/z.csv"):
        bucket.write_bytes(f"data/{name}", b"x")
    listed = files.input_files(f"memory://prepare-globs/data/{pattern}")
    assert [file.path for file in listed] == [f"memory://prepare-globs/data/{name}" for name in names]


@pytest.mark.parametrize("path", ["iceberg:shop.sales.items", "delta:s3://lake/items"])
def test_a_lake_without_its_package_says_what_to_install(tmp_path: Path, path: str) -> None:
    folder = write_source(tmp_path / "source")
    with pytest.raises(OwlRecError, match=r"is not installed\. Install owlrec's extra `lake`"):
        prepared(recipe(folder, tmp_path / "ws", items=path))


def test_a_delta_table_is_read_by_version(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    folder, lake = write_source(tmp_path / "source", n_files=2), str(tmp_path / "lake")
    for number in range(2):
        deltalake.write_deltalake(lake, pq.read_table(folder / "log" / f"{number:03d}.parquet"), mode="append")
    card, _ = prepared(recipe(folder, tmp_path / "lake-ws", interactions=f"delta:{lake}@1"))
    assert card.fingerprint == prepared(recipe(folder, tmp_path / "ws"))[0].fingerprint
    assert prepared(recipe(folder, tmp_path / "ws", interactions=f"delta:{lake}@0"))[0].counts["interactions"] == ROWS


@pytest.mark.ray
def test_on_a_cluster_it_is_the_same(tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "FRAGMENT_ROWS", 1000)  # few pieces per stage: each may start a process
    monkeypatch.setattr(preparation, "GROUP_ROWS", 1000)
    folder = write_source(tmp_path / "source", n_files=2)
    few = {"shard_rows": N_USERS // 2}
    here, _ = prepared(recipe(folder, tmp_path / "here").model_copy(update=few))
    monkeypatch.setattr(stages, "PREPARED_HERE", 0)
    on_ray = recipe(folder, tmp_path / "ray").model_copy(update=few)
    assert prepared(on_ray)[0].fingerprint == here.fingerprint
    table = interactions(1, "u")
    write_log(folder, 1, pa.concat_tables([table, table.slice(9, 1)]))
    with pytest.raises(OwlRecError, match=rf"001\.parquet, row {ROWS}: user_id '{table['user_id'][9]}'"):
        prepared(on_ray)


def test_movielens_does_not_need_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ray_session", None)
    values = {"name": "t", "scenario": "movies", "engine": {"type": "echo"}, "source": {"type": "movielens-100k"}}
    values["split"] = {"cuts": "kar"}
    card, workspace = prepared(Recipe.model_validate({**values, "workspace": str(tmp_path)}))
    assert card.counts["samples"] == 76_329
    assert pc.sum(workspace.read_table("interactions")["rating"]).as_py() == 352_986
