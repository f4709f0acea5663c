"""Raw data to contract tables. A new source is a file with a Config whose `load` gives RawTables, and a line here."""

from typing import Annotated

from pydantic import Field

from owlrec.sources.amazon import AmazonSource
from owlrec.sources.movielens import MovieLens100KSource, MovieLensSource
from owlrec.sources.raw import RawTables
from owlrec.sources.tabular import TableSource

SourceConfig = Annotated[
    MovieLens100KSource | MovieLensSource | AmazonSource | TableSource,
    Field(discriminator="type"),
]


def load_source(config: SourceConfig) -> RawTables:
    """Reads a source's users, items and interactions. Raises SourceError or SchemaError, naming file and row."""
    return config.load()
