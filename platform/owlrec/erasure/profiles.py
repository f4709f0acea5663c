"""Profile values that only forgotten users had, in the vocabularies of CTR models.

A vocabulary lists every value that training has seen; one that nobody else has would name its user. It gives way to a
random word, so that all other values keep their codes.
"""

import secrets
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.erasure.rows import Users
from owlrec.schema import by_shard
from owlrec.workspace import Workspace, table_file

_FILE = "vocabularies.parquet"
_PREFIX = "profile/"


def hide_values(workspace: Workspace, users: Users) -> tuple[int, int]:
    """Hides the values of users who still stand in the table of users; how many files were rewritten, and how many
    values each of them lost together.
    """
    files = [f"{root}/{path}" for root in ("ctr", "models") for path in workspace.entries(root) if path.endswith(_FILE)]
    fields = {field for path in files for field in _fields(workspace, path)}
    if not fields:
        return 0, 0
    own = _own_values(workspace, users, fields)
    for number in workspace.table_shards("users") if any(own.values()) else ():
        table = _table(workspace, number, fields)
        others = table.filter(pa.array(~users.rows(table)))
        for field in [name for name, values in own.items() if values and name in others.column_names]:
            own[field] -= set(pc.unique(others[field].cast(pa.string())).to_pylist())
        if not any(own.values()):
            break
    changed = [n for path in files if any(own.values()) and (n := _rewrite(workspace, path, own))]
    return len(changed), sum(changed)


def _fields(workspace: Workspace, path: str) -> Iterable[str]:
    names = pc.unique(workspace.read_parquet(path, ["field"])["field"]).to_pylist()
    return [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]


def _table(workspace: Workspace, number: int, fields: set[str]) -> pa.Table:
    path = table_file("users", number)
    names = workspace.parquet_file(path).schema_arrow.names
    return workspace.read_parquet(path, ["user_id", *(name for name in names if name in fields)])


def _own_values(workspace: Workspace, users: Users, fields: set[str]) -> dict[str, set[str]]:
    """By field, the values of the users."""
    found: dict[str, set[str]] = {field: set() for field in fields}
    for number, _ in by_shard(users.ids, workspace.n_shards("user")):
        table = _table(workspace, number, fields)
        mine = table.filter(pa.array(users.rows(table)))
        for field in fields & set(mine.column_names):
            found[field] |= set(mine[field].cast(pa.string()).drop_null().to_pylist())
    return found


def _rewrite(workspace: Workspace, path: str, hidden: dict[str, set[str]]) -> int:
    table = workspace.read_parquet(path)
    fields, values = table["field"].to_pylist(), table["value"].to_pylist()
    rows = [
        row
        for row, (field, value) in enumerate(zip(fields, values, strict=True))
        if field.startswith(_PREFIX) and value in hidden.get(field.removeprefix(_PREFIX), ())
    ]
    if rows:
        new = np.array(values, dtype=object)
        new[rows] = [f"forgotten-{secrets.token_hex(8)}" for _ in rows]
        at = table.column_names.index("value")
        workspace.write_parquet(path, table.set_column(at, "value", pa.array(new, pa.string())))
    return len(rows)
