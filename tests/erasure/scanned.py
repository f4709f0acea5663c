"""A shop in which one user has a raw id, a profile and a text like nobody else's, and a scan for all three."""

import json
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from owlrec.erasure.erased_rows import Users
from owlrec.ids import stable_id
from owlrec.sources.preparation import read_batches
from owlrec.storage import Storage
from owlrec.workspace import Workspace

RAW, MARKER = "Zoe-Quatermain-1887", "lighthousekeeperofnowhere"
ID = stable_id(RAW)
ITEMS, USERS, START, DAY = 40, 24, 1_700_000_000_000, 86_400_000
TEXT = f"The reader is a {MARKER} who likes slow dramas about the sea, with few words and patient pictures."
WORDS = {"raw id": RAW.encode(), "id": str(ID).encode(), "marker": MARKER.encode()}
BYTES = {"id in bytes": ID.to_bytes(8, "little"), "id as a key": ID.to_bytes(8, "big")}


def names() -> list[str]:
    """The raw ids of all users, the one who leaves in the middle."""
    return [f"u{n}" for n in range(USERS // 2)] + [RAW] + [f"u{n}" for n in range(USERS // 2, USERS)]


def write_source(folder: Path, more: int = 0) -> None:
    """Users, items and ratings as Parquet. more: further ratings of everybody."""
    folder.mkdir(exist_ok=True)
    users = [{"user_id": n, "gender": "female", "occupation": MARKER if n == RAW else "artist"} for n in names()]
    items = [{"item_id": f"i{n}", "title": f"Film {n} (19{50 + n})", "genres": "Drama"} for n in range(ITEMS)]
    rows = []
    for number, name in enumerate(names()):
        rng = np.random.default_rng(number)
        for at, item in enumerate(rng.permutation(ITEMS)[: 20 + more].tolist()):
            # The one who leaves comes first: what a log ends with must not be theirs.
            time = START + at * DAY + (number if name != RAW else -1)
            rows.append((name, f"i{item}", float(1 + (item + number) % 5), time))
    columns = ("user_id", "item_id", "rating", "timestamp")
    ratings = [dict(zip(columns, row, strict=True)) for row in rows]
    for name, table in (("users", users), ("items", items), ("interactions", ratings)):
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")


def write_recipe(folder: Path, workspace: str, extra: str = "") -> Path:
    """The shop's recipe. extra: further lines."""
    source = {
        "type": "table",
        **{t: str(folder / "source" / f"{t}.parquet") for t in ("users", "items", "interactions")},
    }
    path = folder / "recipe.yaml"
    text = textwrap.dedent(
        f"""
        name: shop
        scenario: movies
        workspace: {workspace}
        source: {json.dumps(source)}
        shard_rows: 8
        engine: {{type: echo}}
        sampling: {{max_tokens: 60}}
        encoder: {{model: hashing}}
        streaming: {{partitions: 3}}
        ctr: {{backbones: [din], arms: [none, knowledge], seeds: [0], epochs: 1}}
        ranking: {{data: {{shots: 8}}}}
        """
    )
    path.write_text(text + textwrap.dedent(extra))
    return path


def scan(storage: Storage, skip: Iterable[str] = ()) -> dict[str, set[str]]:
    """In which files, by path, something of the user stands: bytes of every file, columns of every table."""
    places: dict[str, set[str]] = {}
    for path in every_file(storage):
        if path.startswith(tuple(skip)):
            continue
        data = storage.read_bytes(path)
        hits = {name for name, word in {**WORDS, **BYTES}.items() if word in data}
        text = "".join(map(str, rows_of(storage, path, data)))
        hits |= {name for name, word in WORDS.items() if word.decode() in text}
        if hits:
            places[path] = hits
    return places


def every_file(storage: Storage) -> list[str]:
    """All files, hidden ones too."""
    if not storage.local:
        import boto3

        bucket, _, prefix = storage.base.removeprefix("s3://").partition("/")
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [item["Key"][len(prefix) + 1 :] for page in pages for item in page.get("Contents", [])]
    root = Path(storage.path())
    return [str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()]


def rows_of(storage: Storage, path: str, data: bytes) -> list[object]:
    """The rows of a file that is a table."""
    if path.endswith(".parquet"):
        return pq.read_table(pa.BufferReader(data)).to_pylist()
    if not path.endswith(".arrow"):
        return []
    try:
        return pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
    except pa.ArrowInvalid:
        end = int(np.frombuffer(data[-8:], "<i8")[0])
        n = (len(data) - end) // 8 - 1
        return [row for batch in read_batches(storage, path, range(n), n) for row in batch.to_pylist()]


def user(raw: str = RAW) -> Users:
    """One user, as the erasure knows them."""
    return Users(np.array([stable_id(raw)]), frozenset([raw]))


def answers(workspace: Workspace) -> dict[str, object]:
    """What the current release says of everybody but the one user, to the byte."""
    from owlrec.releases import open_release

    others = [stable_id(name) for name in names() if name != RAW]
    items = [stable_id(f"i{n}") for n in range(ITEMS)]
    replies: dict[str, object] = {}
    with open_release(workspace) as release:
        for kind, ids in (("user", others), ("item", items)):
            replies[f"{kind} texts"] = release.store.get(kind, ids)
            rows, mask = release.store.partitions(kind, ids, 3)
            replies[f"{kind} vectors"] = rows.tobytes(), mask.tobytes()
            replies[f"{kind} codes"] = release.store.own_codes(kind, ids)
            replies[f"{kind} cohorts"] = release.store.cohorts(kind, ids)
    return replies
