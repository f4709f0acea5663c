"""New and changed items: a log of rows of the items table that does not need another `prepare`.

Others add Parquet files to the folder `items` of the log of events, with `item_id`, `timestamp` (ms since 1970, UTC: of
the row, not of the item), `title` and the table's attributes. A row replaces the item's earlier row; among several, the
latest timestamp wins, so neither the order of files nor reading one twice matters. The accepted rows
are in `refresh/items`, by shard, on top of the prepared table (Workspace.read_shard), and override later `prepare`
runs. They are moved there once the release with their texts is current; until then they are the plan's.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.ids import shard_of
from owlrec.prompting.frameworks import FrameworkName
from owlrec.prompting.prompts import Prompt, UnusableRow, item_prompts, prompts_table
from owlrec.refresh.events import open_parquet
from owlrec.refresh.state import RefreshPlan
from owlrec.runner import Result, Stage, Work
from owlrec.scenario import Scenario
from owlrec.schema import DEAD_LETTERS, MILLISECONDS, missing_column
from owlrec.shards import Artifact, Card, Shard
from owlrec.sources.preparation import MAX_BUCKETS, Grouping, bucket_file, grouped, read_batches, write_buckets
from owlrec.sources.raw import Fragment, entities_piece
from owlrec.sources.splits import ItemCatalog
from owlrec.sources.tabular import SourceFile, to_milliseconds
from owlrec.workspace import ITEM_UPDATES, Workspace, as_texts, shard_file, table_file

_NEEDED = ("item_id", "timestamp", "title")
# Stored with a row of the items table: its timestamp, and whether its text is still to be written.
_MOMENT, _UNWRITTEN = pa.field("updated_ms", pa.int64()), pa.field("unwritten", pa.bool_())
_FILE, _ROW = pa.field("file", pa.string()), pa.field("row", pa.int64())  # position in the log
_REASONS = {
    "NullField": "item_id or timestamp is null or empty: write rows with both",
    "NotMilliseconds": "the timestamp is not in milliseconds since 1970 (UTC): convert it",
    "UndecodableText": "a text is not valid UTF-8: correct it",
    "FromTheFuture": "the timestamp is in the future: correct the source's clock and send the row again",
    "OversizedText": "{other}",
    "SameId": "another item with the raw id '{other}' has the same numeric id: rename one of them (a prefix is enough)",
}


def _letter(error: str, item: int | None, moment: int | None, file: str, row: int, other: str = "") -> tuple[Any, ...]:
    """A row of DEAD_LETTERS about a row of the log."""
    message = f"{file}, row {row}: {_REASONS[error].format(other=other)}."
    return ("item", item, moment, "refresh", error, message, 1)


def _letters(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = [pa.array([row[i] for row in rows], f.type) for i, f in enumerate(DEAD_LETTERS)]
    return pa.table(columns, schema=DEAD_LETTERS)


# Reading the log


@dataclass
class ReadItems(Stage):
    """Reads groups of row groups: a file of usable rows by bucket of items, and dead letters for the others."""

    folder: str
    grouping: Grouping
    known: Mapping[str, int]  # rows of a file read by an earlier refresh, by path
    n_shards: int

    name = "item log"

    def run(self, work: Work) -> Result:
        """See Stage.run. Raises SchemaError for a file that lacks a column, SourceError for one that is broken."""
        workspace = work.workspace
        schema = workspace.parquet_file(table_file("items", 0)).schema_arrow
        tables, letters = [_log_schema(schema).empty_table()], list[tuple[Any, ...]]()
        for fragment in self.grouping.fragments(work.shard.number):
            rows, dead = read_fragment(fragment, schema)
            tables.append(rows)
            letters += [letter for row, letter in dead if row >= self.known.get(fragment.path, 0)]
        items = pa.concat_tables(tables)
        path = bucket_file("items", work.shard.number)
        files = {path: write_buckets(workspace, f"{self.folder}/{path}", items, "item_id", self.grouping.item_buckets)}
        if letters:
            path = f"dead/{work.shard.file()}"
            files[path] = workspace.write_parquet(f"{self.folder}/{path}", _letters(letters))
        holds = np.zeros(self.n_shards, dtype=bool)
        holds[shard_of(items["item_id"].to_numpy(), self.n_shards)] = True
        counts: dict[str, float | int | str] = {
            "shards": base64.b64encode(np.packbits(holds).tobytes()).decode(),
            "items_read": items.num_rows,
            "items_refused": len(letters),
        }
        return Result(files, items.num_rows + len(letters), items.num_rows, len(letters), counts)


def read_fragment(fragment: Fragment, schema: pa.Schema) -> tuple[pa.Table, list[tuple[int, tuple[Any, ...]]]]:
    """Usable rows of some row groups in the form of the items table, and dead rows with their letters.

    schema: of the items table; extra columns of the log are dropped, and missing ones are empty.
    """
    with open_parquet(SourceFile(fragment.path, fragment.bytes, "")) as parquet:
        names = parquet.schema_arrow.names
        for column in _NEEDED:
            if column not in names:
                raise missing_column(parquet.schema_arrow.empty_table(), column, name=fragment.path)
        columns = [name for name in names if name in (*_NEEDED, *schema.names) and name != "raw_id"]
        table = parquet.read_row_groups(list(range(*fragment.groups)), columns)
    n, first = table.num_rows, fragment.first_row
    moments = to_milliseconds(table["timestamp"], "ms", name=fragment.path).cast(pa.int64())
    null = pc.is_null(table["item_id"]).to_numpy() | pc.is_null(moments).to_numpy()
    if pa.types.is_string(table["item_id"].type) or pa.types.is_large_string(table["item_id"].type):
        null |= pc.equal(table["item_id"], "").fill_null(False).to_numpy()
    time = moments.fill_null(0).to_numpy()
    wrong_unit = ~null & ((time < MILLISECONDS.start) | (time >= MILLISECONDS.stop))
    garbled = ~null & ~wrong_unit & _undecodable(table)
    good = ~(null | wrong_unit | garbled)
    dead = []
    for mask, error in ((null, "NullField"), (wrong_unit, "NotMilliseconds"), (garbled, "UndecodableText")):
        for row in (first + np.flatnonzero(mask)).tolist():
            moment = None if error == "NullField" else int(time[row - first])
            dead.append((row, _letter(error, None, moment, fragment.path, row)))
    kept = table.filter(pa.array(good))
    items = entities_piece("items", kept.drop_columns(["timestamp"]), fragment.path).data
    places = {_MOMENT: time[good], _FILE: pa.repeat(fragment.path, len(kept)), _ROW: (first + np.arange(n))[good]}
    return pa.table([*as_texts(items, schema).columns, *places.values()], schema=_log_schema(schema)), sorted(dead)


def _log_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([*schema, _MOMENT, _FILE, _ROW])


def _undecodable(table: pa.Table) -> np.ndarray:
    """Rows with a text that is not valid UTF-8: bool [n]."""
    bad = np.zeros(table.num_rows, dtype=bool)
    try:
        table.to_pylist()
    except UnicodeDecodeError:
        for row in range(table.num_rows):
            try:
                table.slice(row, 1).to_pylist()
            except UnicodeDecodeError:
                bad[row] = True
    return bad


def item_groups(fragments: Sequence[Fragment], n_shards: int) -> Grouping:
    """Grouping of the log's fragments: a bucket is a shard of items if there are not too many."""
    return grouped(fragments, None).model_copy(update={"item_buckets": min(n_shards, MAX_BUCKETS)})


@dataclass(frozen=True)
class ItemBuckets:
    """Output of ReadItems, for the shards of items."""

    folder: str
    n_shards: int
    holds: Mapping[int, bytes]  # by group: one bit per shard with rows

    @classmethod
    def of(cls, workspace: Workspace, folder: str, n_shards: int) -> "ItemBuckets":
        """From the stage's cards."""
        cards = Artifact(workspace, folder).cards().values()
        return cls(folder, n_shards, {Shard.from_name(c.shard).number: _bits(c) for c in cards})

    @property
    def shards(self) -> list[int]:
        """Shards with rows, ascending."""
        bits = np.zeros(-(-self.n_shards // 8), dtype=np.uint8)
        for held in self.holds.values():
            bits |= np.frombuffer(held, dtype=np.uint8)
        return np.flatnonzero(np.unpackbits(bits)[: self.n_shards]).tolist()

    def read(self, workspace: Workspace, shard: int, schema: pa.Schema) -> pa.Table:
        """Rows of one shard. schema: of the items table."""
        n_buckets = min(self.n_shards, MAX_BUCKETS)
        tables = [_log_schema(schema).empty_table()]
        for group, held in self.holds.items():
            if held[shard >> 3] >> (7 - (shard & 7)) & 1:
                path = f"{self.folder}/{bucket_file('items', group)}"
                tables += read_batches(workspace, path, [shard & (n_buckets - 1)], n_buckets)
        table = pa.concat_tables(tables)
        return table.filter(pa.array(shard_of(table["item_id"].to_numpy(), self.n_shards) == shard))


def _bits(card: Card) -> bytes:
    return base64.b64decode(str(card.counts["shards"]))


# Accepted rows and their prompts


class ItemsStage(Stage):
    """Shards of items: accepted rows of the log, and prompts for changed ones."""

    name = "items"

    def __init__(
        self, plan: RefreshPlan, log: ItemBuckets, scenario: Scenario, framework: FrameworkName, latest: int
    ) -> None:
        """latest: ms; later rows are from the future."""
        self.folder, self.log = plan.part("items"), log
        self.scenario, self.framework, self.latest = scenario, framework, latest

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        current = workspace.read_shard("items", shard.number)
        known = read_updates(workspace, shard.number, current.schema)
        log = self.log.read(workspace, shard.number, current.schema)
        current = current.filter(pc.is_in(current["item_id"], value_set=log["item_id"].combine_chunks()))
        raw_ids = dict(zip(current["item_id"].to_pylist(), current["raw_id"].to_pylist(), strict=True))
        moments = {row["item_id"]: row for row in known.to_pylist()}
        rows, letters = self._standing(log, dict(raw_ids), moments)
        table = pa.Table.from_pylist(rows, pa.schema([*current.schema, _MOMENT])).sort_by("item_id")
        left = known.filter(known["unwritten"])
        left = left.filter(pc.invert(pc.is_in(left["item_id"], value_set=table["item_id"].combine_chunks())))
        asked = [*self._changed(table, current, moments), *self._usable(left)]
        files = {}
        work.check()
        for path, content in (
            (f"rows/{shard.file()}", table if table.num_rows else None),
            (f"prompts/{shard.file()}", prompts_table(sorted(asked, key=lambda p: p.id)) if asked else None),
            (f"dead/{shard.file()}", _letters(letters) if letters else None),
        ):
            if content is not None:
                files[path] = workspace.write_parquet(work.artifact.path(path), content)
        counts = {
            "items_new": sum(row["item_id"] not in raw_ids for row in rows),
            "items_refused": len(letters),
            "item_calls": len(asked),
        }
        return Result(files, log.num_rows, table.num_rows, len(letters), counts)

    def _standing(
        self, log: pa.Table, raw_ids: dict[int, str], moments: Mapping[int, dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
        """Rows that replace stored ones, one per item, and dead letters of invalid ones.

        raw_ids: of known items. moments: of the rows on top of the prepared table.
        """
        rows, letters = dict[int, dict[str, Any]](), list[tuple[Any, ...]]()
        asked = item_prompts(log, self.scenario, self.framework)
        both = zip(log.to_pylist(), asked, strict=True)
        for row, prompt in sorted(both, key=lambda pair: (pair[0]["updated_ms"], pair[0]["raw_id"])):
            id_, moment, place = row["item_id"], row["updated_ms"], (row.pop("file"), row.pop("row"))
            if moment > self.latest:
                letters.append(_letter("FromTheFuture", id_, moment, *place))
            elif isinstance(prompt, UnusableRow):
                letters.append(_letter(prompt.error, id_, moment, *place, prompt.message))
            elif raw_ids.setdefault(id_, row["raw_id"]) != row["raw_id"]:
                letters.append(_letter("SameId", id_, moment, *place, raw_ids[id_]))
            else:
                standing = rows.get(id_, moments.get(id_))
                if standing is None or _order(row) > _order({name: standing.get(name) for name in row}):
                    rows[id_] = row
        return list(rows.values()), sorted(letters, key=lambda letter: letter[1:6])

    def _changed(self, rows: pa.Table, current: pa.Table, moments: Mapping[int, dict[str, Any]]) -> Iterator[Prompt]:
        """Prompts that differ from the previous ones or were never answered."""
        before = {prompt.id: prompt.text for prompt in self._usable(current)}
        for prompt in self._usable(rows):
            unwritten = moments.get(prompt.id, {}).get("unwritten", False)
            if prompt.text and (unwritten or before.get(prompt.id) != prompt.text):
                yield prompt

    def _usable(self, items: pa.Table) -> Iterable[Prompt]:
        """Prompts for rows of the items table, where possible."""
        prompts = item_prompts(items, self.scenario, self.framework)
        return (prompt for prompt in prompts if isinstance(prompt, Prompt))


def _order(row: Mapping[str, Any]) -> tuple[int, str]:
    """Order of two rows of an item: the later one wins, and ties are broken consistently."""
    return row["updated_ms"], json.dumps(row, sort_keys=True, default=str)


def read_updates(workspace: Workspace, number: int, schema: pa.Schema) -> pa.Table:
    """Rows of a shard of items on top of the prepared table, in its columns, then _MOMENT and _UNWRITTEN."""
    path = f"{ITEM_UPDATES}/item/{shard_file(number)}"
    kept = pa.schema([*schema, _MOMENT, _UNWRITTEN])
    if workspace.entry(path) is None:
        return kept.empty_table()
    table = workspace.read_parquet(path)
    return pa.table([*as_texts(table, schema).columns, table["updated_ms"], table["unwritten"]], schema=kept)


def unwritten_shards(workspace: Workspace) -> list[int]:
    """Shards of items with missing answers, ascending."""
    cards = Artifact(workspace, ITEM_UPDATES).cards("item")
    return sorted(Shard.from_name(name).number for name, card in cards.items() if card.counts.get("unwritten"))


def with_new_items(workspace: Workspace, plan: RefreshPlan) -> ItemCatalog:
    """Titles of all items, including those of the plan."""
    artifact = Artifact(workspace, plan.part("items"))
    paths = [path for card in artifact.cards("item").values() for path in card.files if path.startswith("rows/")]
    tables = [workspace.read_parquet(artifact.path(path), ["item_id", "title"]) for path in paths]
    return ItemCatalog.load(workspace, tables)


class UpsertItems(Stage):
    """Shards of items with rows or answers of a plan: writes the new rows on top of the prepared table."""

    name = "upsert"
    folder = ITEM_UPDATES

    def __init__(self, plan: RefreshPlan, knowledge: str) -> None:
        """knowledge: folder of the answers."""
        self.items, self.knowledge = plan.part("items"), knowledge

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        schema = workspace.parquet_file(table_file("items", shard.number)).schema_arrow
        known = read_updates(workspace, shard.number, schema)
        rows, asked, answered = (
            _rows(workspace, path, columns)
            for path, columns in (
                (f"{self.items}/rows/{shard.file()}", None),
                (f"{self.items}/prompts/{shard.file()}", ["id"]),
                (f"{self.knowledge}/{shard.file()}", ["id"]),
            )
        )
        if rows is not None:
            new = as_texts(rows, schema).append_column(_MOMENT, rows["updated_ms"])
            new = new.append_column(_UNWRITTEN, pa.repeat(False, len(rows)))
            others = pc.invert(pc.is_in(known["item_id"], value_set=new["item_id"].combine_chunks()))
            known = pa.concat_tables([known.filter(others), new]).sort_by("item_id")
        ids, wanted = known["item_id"], asked["id"] if asked else pa.chunked_array([[]], pa.int64())
        written = answered["id"] if answered else pa.chunked_array([[]], pa.int64())
        planned = pc.is_in(ids, value_set=wanted.combine_chunks())
        failed = pc.and_(planned, pc.invert(pc.is_in(ids, value_set=written.combine_chunks())))
        unwritten = pc.if_else(planned, failed, known["unwritten"])
        known = known.set_column(len(known.schema) - 1, _UNWRITTEN, unwritten)
        work.check()
        files = {shard.file(): workspace.write_parquet(work.artifact.path(shard.file()), known)}
        left = pc.sum(unwritten).as_py() or 0
        renewed = len(wanted) - (pc.sum(failed).as_py() or 0)
        return Result(files, len(known), len(known), counts={"unwritten": left, "items_renewed": renewed})


def _rows(workspace: Workspace, path: str, columns: list[str] | None) -> pa.Table | None:
    return workspace.read_parquet(path, columns) if workspace.entry(path) is not None else None
