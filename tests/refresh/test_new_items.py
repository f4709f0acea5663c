"""New and changed items: what of the log stands, what is asked, and that neither order nor repetition matters."""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from refresh_world import (  # type: ignore[import-not-found]
    DAY,
    DIM,
    HOUR,
    START,
    carry_out,
    log_events,
    plan_refresh,
    prompts_of,
    publish_world,
    watched,
)

from owlrec.encoding.compression import SemanticIdConfig
from owlrec.encoding.inputs import ItemMetadata
from owlrec.encoding.inputs import Resources as EncoderResources
from owlrec.encoding.vectors import EncoderConfig
from owlrec.errors import SchemaError, SourceError
from owlrec.generation.job import table_inputs
from owlrec.ids import shard_of, stable_id
from owlrec.refresh.items import unwritten_shards
from owlrec.refresh.state import State, dead_files, read_state
from owlrec.releases import current_release, open_release
from owlrec.releases.format import read_manifest
from owlrec.runs.upkeep import double_shards
from owlrec.shards import Shard
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace

NOW = START + 100 * DAY
Item = tuple[Any, int | None, str | None]  # raw id, timestamp, title


def log_items(workspace: Workspace, rows: Sequence[Item], name: str = "one", **columns: list[Any]) -> None:
    """Adds a file to the workspace's item log."""
    ids, moments, titles = (list(column) for column in zip(*rows, strict=True))
    table = {"item_id": ids, "timestamp": pa.array(moments, pa.int64()), "title": titles, **columns}
    workspace.write_parquet(f"events/items/{name}.parquet", pa.table(table))


def refresh(workspace: Workspace, failed: Sequence[object] = (), **config: object) -> State:
    return carry_out(workspace, plan_refresh(workspace, **config), failed)


def rows_of(workspace: Workspace) -> dict[int, dict[str, Any]]:
    return {row["item_id"]: row for row in workspace.read_table("items").to_pylist()}


def texts(workspace: Workspace, ids: Sequence[int]) -> list[str]:
    with open_release(workspace) as release:
        return [k.text if k else "" for k in release.store.get("item", ids)]


def item_prompts(workspace: Workspace, folder: str) -> dict[int, str]:
    below = f"{folder}/items/prompts/item"
    tables = [workspace.read_parquet(f"{below}/{name}") for name in workspace.names(below)]
    return {row["id"]: row["text"] for table in tables for row in table.to_pylist()}


def letters(workspace: Workspace) -> list[tuple[str, int | None, str]]:
    rows = [row for file in dead_files(workspace) for row in workspace.read_parquet(file).to_pylist()]
    return sorted((row["error"], row["id"], row["message"]) for row in rows if row["kind"] == "item")


def test_new_and_changed_items_are_asked_about_and_stand_in_table_and_release(world: Workspace) -> None:
    full = current_release(world)
    log_items(
        world, [(500, START, "Heat (1995)"), (101, START, "Film 1, restored"), (102, START, "Film 2 (1972)")],
        genres=[["Crime"], ["Drama", "War"], ["Comedy"]],
    )  # fmt: skip
    planned = plan_refresh(world)
    prompts = item_prompts(world, planned.plan.folder)
    assert sorted(prompts) == [101, 500]  # of 102 the log says what the table says
    assert 'Introduce the movie "Heat (1995)" (genres: Crime)' in prompts[500]
    state = carry_out(world, planned)
    assert (state.item_calls, state.calls, state.counts["items_new"], state.counts["items_renewed"]) == (2, 0, 1, 2)
    delta = read_manifest(world, state.release)
    assert (delta.delta, delta.parent, delta.knowledge, delta.totals["item"]) == (True, full, {"item": 2}, 31)
    assert texts(world, [101, 102, 500]) == [
        "Renewed text of item 101 as of 0.", "Film 102 is slow.", "Renewed text of item 500 as of 0.",
    ]  # fmt: skip
    with open_release(world) as release:
        vectors, known = release.store.vectors("item", [500, 101])
    assert known.all()
    assert vectors[:, 0].tolist() == [len("Renewed text of item 500 as of 0.") / 128] * 2
    rows = rows_of(world)
    assert len(rows) == 31
    assert (rows[500]["raw_id"], rows[500]["title"], rows[101]["title"]) == ("500", "Heat (1995)", "Film 1, restored")
    assert plan_refresh(world) is None


def test_titles_are_those_of_the_log_wherever_items_are_read(world: Workspace) -> None:
    before, metadata = table_inputs(world), ItemMetadata().digests(world)
    log_items(world, [(500, START, "Heat (1995)"), (101, START, "Film 1, restored")])
    refresh(world)
    assert ItemCatalog.load(world).titles(np.array([500, 101, 102])) == [
        "Heat (1995)",
        "Film 1, restored",
        "Film 2 (1972)",
    ]
    changed = {Shard("item", n) for n in shard_of(np.array([500, 101]), world.n_shards("item")).tolist()}
    after = table_inputs(world)
    assert {shard for shard in after if after[shard] != before[shard]} == changed  # a whole run asks about them, too
    numbers = {number for number, digest in ItemMetadata().digests(world).items() if digest != metadata[number]}
    assert numbers == {shard.number for shard in changed}
    (number,) = shard_of(np.array([500]), world.n_shards("item")).tolist()
    assert 500 in ItemMetadata().rows(EncoderResources(world, EncoderConfig()), number).ids.tolist()


def test_events_with_a_new_item_are_taken_in_by_the_same_refresh_and_its_title_is_quoted(world: Workspace) -> None:
    log_items(world, [("heat", START, "Heat (1995)")])
    heat = stable_id("heat")
    log_events(world, watched(1, [115, heat, 116]))
    plan = plan_refresh(world)
    assert (plan.counts["events_new"], plan.counts["refused"]) == (3, 0)
    assert '"Film 15 (1985)" 4 stars; "Heat (1995)" 4 stars' in prompts_of(world, plan)[1]["text"]
    state = carry_out(world, plan)
    assert read_manifest(world, state.release).knowledge == {"item": 1, "user": 1}


def test_events_that_waited_for_their_item_are_taken_in_once_it_comes(world: Workspace) -> None:
    log_events(world, watched(1, [500]))
    assert refresh(world).counts["refused_UnknownItem"] == 1
    log_items(world, [(500, START, "Heat (1995)")])
    assert refresh(world).counts["events_new"] == 1


def test_items_alone_are_a_refresh_and_no_text_is_asked_for_twice(world: Workspace) -> None:
    log_items(world, [(500, START, "Heat (1995)")])
    refresh(world)
    log_items(world, [(500, START, "Heat (1995)")], "sent-twice")
    state = refresh(world)
    assert (state.item_calls, state.counts["items_read"], state.counts["items_new"]) == (0, 1, 0)
    log_items(world, [(500, START + 1, "Heat (1995)")], "newer, and the same")
    assert refresh(world).item_calls == 0


def test_order_of_files_and_repetition_change_nothing(world: Workspace, tmp_path: Path) -> None:
    import shutil

    files = [
        [(500, START + 2, "Heat (1995)"), (101, START + 1, "Film 1, cut")],
        [(500, START + 1, "HEAT"), (101, START + 3, "Film 1, restored")],
        [(500, START + 2, "Heat (US)"), (101, START + 2, "Film 1, dubbed")],
    ]
    outcomes = []
    for at, order in enumerate(permutations(range(3))):
        for together in (True, False):
            copy = Workspace(shutil.copytree(world.root, tmp_path / f"{at}-{together}"))
            for step, number in enumerate([*order, order[0]]):
                log_items(copy, files[number], f"{step}")
                if not together:
                    refresh(copy)
            if together:
                refresh(copy)
            outcomes.append((rows_of(copy), texts(copy, [500, 101])))
    assert all(other == outcomes[0] for other in outcomes)
    assert (outcomes[0][0][500]["title"], outcomes[0][0][101]["title"]) == ("Heat (US)", "Film 1, restored")


def test_bad_rows_are_dead_letters_with_file_and_row_and_the_others_stand(world: Workspace) -> None:
    log_items(
        world,
        [
            ("500", START, "Heat (1995)"), (None, START, "Nobody's"), ("", START, "Nobody's"), ("501", None, "Never"),
            ("502", START // 1000, "In seconds"), ("503", NOW + DAY, "Tomorrow's"), ("504", START, "x" * 100_001),
        ],
    )  # fmt: skip
    state = refresh(world)
    assert (state.counts["items_read"], state.counts["items_new"], state.counts["items_refused"]) == (3, 1, 6)
    file = world.path("events", "items", "one.parquet")
    dead = letters(world)
    assert [(error, id_) for error, id_, _ in dead] == [
        ("FromTheFuture", 503), ("NotMilliseconds", None), *[("NullField", None)] * 3, ("OversizedText", 504),
    ]  # fmt: skip
    rows = [message.partition(":")[0] for _, _, message in dead]
    assert rows == [f"{file}, row {row}" for row in (5, 4, 1, 2, 3, 6)]
    assert sorted(rows_of(world))[-1] == 500


def test_text_that_is_not_utf_8_is_refused(world: Workspace) -> None:
    titles = pa.array([b"Heat (1995)", b"H\xffat"], pa.binary()).view(pa.string())
    table = pa.table({"item_id": [500, 501], "timestamp": [START, START], "title": titles})
    world.write_parquet("events/items/one.parquet", table)
    refresh(world)
    assert [(error, message.partition(":")[0][-5:]) for error, _, message in letters(world)] == [
        ("UndecodableText", "row 1")
    ]
    assert 501 not in rows_of(world)


def test_two_raw_ids_of_one_number_are_refused(world: Workspace) -> None:
    rows = world.read_table("items")
    names = pa.array([f"film-{raw}" for raw in rows["raw_id"].to_pylist()])
    world.write_table("items", rows.set_column(1, "raw_id", names), key="item_id")
    log_items(world, [(101, START, "Heat (1995)")])
    assert refresh(world).counts["items_refused"] == 1
    ((error, id_, message),) = letters(world)
    assert (error, id_) == ("SameId", 101)
    assert "'film-101'" in message


def test_whole_files_that_are_wrong_stop_the_refresh(world: Workspace) -> None:
    world.write_parquet("events/items/one.parquet", pa.table({"item_id": [1], "title": ["Heat"]}))
    with pytest.raises(SchemaError, match=r"one\.parquet: column 'timestamp' is missing"):
        plan_refresh(world)
    Path(world.path("events", "items", "one.parquet")).write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"one\.parquet: cannot be read as Parquet"):
        plan_refresh(world)
    assert read_state(world).name == ""


def test_attributes_are_the_tables_own_in_its_types(world: Workspace) -> None:
    column = world.read_table("items").schema.field("genres")
    assert column.type == pa.list_(pa.string())
    log_items(world, [(500, START, "Heat (1995)"), (501, START, "Ronin (1998)")], genres=["Crime", None], extra=[1, 2])
    refresh(world)
    rows = rows_of(world)
    assert (rows[500]["genres"], rows[501]["genres"]) == (["Crime"], [])
    assert "extra" not in rows[500]


def test_failed_answer_keeps_the_row_and_is_asked_for_again(world: Workspace) -> None:
    log_items(world, [(101, START, "Film 1, restored"), (500, START, "Heat (1995)")])
    state = refresh(world, failed=[("item", 101, 0)])
    assert (state.item_calls, state.counts["items_renewed"]) == (2, 1)
    assert rows_of(world)[101]["title"] == "Film 1, restored"
    assert texts(world, [101]) == ["Film 101 is slow."]
    (shard,) = unwritten_shards(world)
    assert plan_refresh(world) is None  # the same question would fail again, so something else must have come
    log_events(world, watched(1, [105]))
    planned = plan_refresh(world)
    assert planned.plan.item_shards == [shard]
    assert list(item_prompts(world, planned.plan.folder)) == [101]
    carry_out(world, planned)
    assert texts(world, [101]) == ["Renewed text of item 101 as of 0."]
    assert unwritten_shards(world) == []


def test_row_of_the_log_outlives_a_later_prepare_with_other_columns(world: Workspace) -> None:
    log_items(world, [(101, START, "Film 1, restored"), (500, START, "Heat (1995)")], genres=[["Drama"], ["Crime"]])
    refresh(world)
    n = world.n_shards("item")
    table = pa.table(
        {
            "item_id": [100, 101, 600],
            "raw_id": ["100", "101", "600"],
            "title": ["A", "B", "C"],
            "genres": ["x", "y", "z"],
        }
    )
    for number in range(n):
        mine = table.filter(pa.array(shard_of(table["item_id"].to_numpy(), n) == number))
        world.write_parquet(f"tables/items/{number:08d}.parquet", mine)
    rows = rows_of(world)
    assert {id_: (row["title"], row["genres"]) for id_, row in rows.items()} == {
        100: ("A", "x"), 101: ("Film 1, restored", "Drama"), 500: ("Heat (1995)", "Crime"), 600: ("C", "z"),
    }  # fmt: skip


def test_items_outlive_a_split_of_their_shards(world: Workspace) -> None:
    prepared = world.read_table("items")
    log_items(world, [(id_, START, f"New {id_}") for id_ in range(500, 520)])
    refresh(world)
    before = rows_of(world)
    double_shards(world, ["item"])
    world.write_table("items", prepared, key="item_id")  # the tables of this small world have no cards to split
    assert world.n_shards("item") == 8
    assert rows_of(world) == before
    log_items(world, [(500, START + HOUR, "Newer"), (501, START - HOUR, "Older")], "two")
    refresh(world)
    rows = rows_of(world)
    assert (rows[500]["title"], rows[501]["title"]) == ("Newer", "New 501")


def test_new_vectors_of_items_are_coded_by_the_releases_own_quantizer(world: Workspace) -> None:
    publish_world(world, "coded", ids=SemanticIdConfig(levels=2, codes_per_level=4))
    log_items(world, [(500, START, "Heat (1995)")])
    refresh(world)
    with open_release(world) as release:
        quantizer = release.quantizers()["item"]
        codes, coded = release.store.codes("item", [500, 101])
        vectors, _ = release.store.vectors("item", [500])
    assert vectors.shape == (1, DIM)
    assert coded.all()
    np.testing.assert_array_equal(codes[:1, :-1], quantizer.encode(vectors))
