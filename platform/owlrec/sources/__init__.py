"""Raw data to contract tables. A new source is a file with a Source, whose `load` returns RawTables, and a line
here."""

from typing import Annotated

from owlrec.config import Registry
from owlrec.sources.raw import Source

SOURCES: Registry[Source] = Registry(
    "source",
    {
        "movielens-100k": "owlrec.sources.datasets.MovieLens100KSource",
        "movielens": "owlrec.sources.datasets.MovieLensSource",
        "amazon": "owlrec.sources.datasets.AmazonSource",
        "table": "owlrec.sources.tabular.TableSource",
    },
)
SourceConfig = Annotated[Source, SOURCES]  # a recipe's `source:` section
