"""Lookup by id: a release on LMDB beside the same texts and vectors in SQLite, single gets, warm, one process."""

import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.table import Figure, options_parser, show
from owlrec.releases import open_release
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import KNOWLEDGE, vectors_schema
from owlrec.workspace import Workspace

DIM = 384


def main() -> None:
    """Builds both stores from the same rows and times random gets in turns."""
    options = options_parser(__doc__).parse_args()
    n, gets, rounds = (20_000, 2_000, 3) if options.quick else (100_000, 5_000, 5)
    knowledge, vectors = _rows(n)
    ids = np.random.default_rng(1).integers(0, n, gets)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        info = ReleaseInfo(fingerprint="00" * 32, model="synthetic", encoder="synthetic")
        publish(workspace, knowledge=[knowledge], vectors=[vectors], info=info)
        database = _sqlite(Path(folder) / "peer.sqlite", knowledge, vectors)
        with open_release(workspace) as release:
            text_sql = "select text from knowledge where id = ?"
            vector_sql = "select vector from knowledge where id = ?"
            methods: dict[str, dict[str, Callable[[int], object]]] = {
                "text": {
                    "owlrec (LMDB)": lambda i: release.store.get("user", [i]),
                    "SQLite": lambda i: database.execute(text_sql, (i,)).fetchone()[0],
                },
                "vector": {
                    "owlrec (LMDB)": lambda i: release.store.vectors("user", [i]),
                    "SQLite": lambda i: np.frombuffer(database.execute(vector_sql, (i,)).fetchone()[0], np.float16),
                },
            }
            figures = [f for what, peers in methods.items() for f in _compare(what, peers, ids, rounds)]
        database.close()
    show(f"single gets out of {n:,} ids, median of {rounds} rounds", figures, options)


def _compare(what: str, peers: dict[str, Callable[[int], object]], ids: np.ndarray, rounds: int) -> list[Figure]:
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, get in peers.items():
            start = time.perf_counter()
            for i in ids.tolist():
                get(i)
            times[name].append((time.perf_counter() - start) / len(ids) * 1e6)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    peer = medians["SQLite"]
    return [
        Figure(measure=what, method=name, value=round(value, 2), unit="µs", ratio_to="SQLite", ratio=peer / value)
        for name, value in medians.items()
    ]


def _rows(n: int) -> tuple[pa.Table, pa.Table]:
    random = np.random.default_rng(0)
    ids = np.arange(n)
    row = {f.name: "x" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    text = "The user prefers thoughtful dramas of the nineties with strong casts. " * 6
    columns = {name: [value] * n for name, value in row.items()} | {"kind": ["user"] * n, "id": ids, "text": [text] * n}
    flat = pa.array(random.standard_normal(n * DIM).astype(np.float16))
    vectors = pa.table(
        [
            pa.array(["user"] * n),
            pa.array(ids),
            pa.FixedSizeListArray.from_arrays(flat, DIM),
            pa.array([[]] * n, pa.list_(pa.uint16())),
        ],
        schema=vectors_schema(DIM),
    )
    return pa.table(columns, schema=KNOWLEDGE), vectors


def _sqlite(path: Path, knowledge: pa.Table, vectors: pa.Table) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    database.execute("create table knowledge (id integer primary key, text text, vector blob)")
    matrix = vectors["vector"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    rows = zip(knowledge["id"].to_pylist(), knowledge["text"].to_pylist(), (v.tobytes() for v in matrix), strict=True)
    database.executemany("insert into knowledge values (?, ?, ?)", rows)
    database.commit()
    return database


if __name__ == "__main__":
    main()
