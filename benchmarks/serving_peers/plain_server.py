"""A plain server as one would write it in an afternoon: FastAPI and uvicorn over SQLite, one process, JSON."""

import sqlite3
import sys

import numpy as np
import pyarrow.parquet as pq
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Many(BaseModel):
    """A request for many users."""

    ids: list[int]


def build(rows: str) -> FastAPI:
    """The server over the rows of a Parquet file: user_id, text, vector."""
    table = pq.read_table(rows)
    database = sqlite3.connect("peer.sqlite", check_same_thread=False)
    database.execute("create table knowledge (id integer primary key, text text, vector blob)")
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1).astype(np.float16)
    values = zip(table["user_id"].to_pylist(), table["text"].to_pylist(), (v.tobytes() for v in vectors), strict=True)
    database.executemany("insert into knowledge values (?, ?, ?)", values)
    database.commit()
    app = FastAPI()

    def answer(row: tuple[int, str, bytes]) -> dict[str, object]:
        return {"id": row[0], "text": row[1], "vector": np.frombuffer(row[2], np.float16).tolist()}

    @app.get("/user/{id_}")
    async def one(id_: int) -> dict[str, object]:
        row = database.execute("select id, text, vector from knowledge where id = ?", (id_,)).fetchone()
        if row is None:
            raise HTTPException(404)
        return answer(row)

    @app.post("/users")
    async def many(asked: Many) -> dict[str, object]:
        marks = ",".join("?" * len(asked.ids))
        rows = database.execute(f"select id, text, vector from knowledge where id in ({marks})", asked.ids).fetchall()
        by_id = {row[0]: row for row in rows}
        return {"results": [answer(by_id[id_]) if id_ in by_id else None for id_ in asked.ids]}

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1]), port=int(sys.argv[2]), log_level="error")
