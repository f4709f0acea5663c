"""A new source: a Config whose `load` reads your raw data, and one line that registers its name for recipes.

    python examples/custom_source.py

The example reads a shop's log with one line of JSON per click. `finish` makes the tables: it hashes ids and validates.
"""

import json
import tempfile
from pathlib import Path
from typing import Literal

import pyarrow as pa

from owlrec.recipe import Recipe
from owlrec.sources import SOURCES
from owlrec.sources.raw import RawTables, Source, finish, input_file

LOG = """
{"who": "ann", "sku": "tea-01", "name": "Green tea", "shelf": "drinks", "at": 1700000000}
{"who": "bob", "sku": "cup-07", "name": "Blue cup", "shelf": "kitchen", "at": 1700000060}
{"who": "ann", "sku": "cup-07", "name": "Blue cup", "shelf": "kitchen", "at": 1700003600}
"""


class ClickLog(Source):
    """JSON lines of clicks."""

    type: Literal["clicks"]
    path: str

    def load(self) -> RawTables:
        """Returns the three tables; a click becomes a rating of 1. Raises SourceError if the file does not exist."""
        file = input_file(self.path)
        clicks = [json.loads(line) for line in file.read_text().splitlines() if line]
        items = {c["sku"]: {"item_id": c["sku"], "title": c["name"], "shelf": c["shelf"]} for c in clicks}
        rows = [{"user_id": c["who"], "item_id": c["sku"], "rating": 1.0, "timestamp": c["at"] * 1000} for c in clicks]
        return finish(
            self,
            [file],
            users=None,  # taken from the clicks
            items=pa.Table.from_pylist(list(items.values())),
            interactions=pa.Table.from_pylist(rows),
            names=dict.fromkeys(("users", "items", "interactions"), str(file)),
        )


SOURCES["clicks"] = f"{__name__}.ClickLog"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "clicks.jsonl").write_text(LOG)
        source = {"type": "clicks", "path": f"{folder}/clicks.jsonl"}
        shop = {"name": "shop", "scenario": "ads", "workspace": folder, "engine": {"type": "echo"}, "source": source}
        tables = Recipe.model_validate(shop).source.load()
        for name in ("users", "items", "interactions"):
            print(f"\n{name}\n{getattr(tables, name).to_pandas().to_string(index=False)}")
