"""Tables of a lake, by snapshot: `iceberg:CATALOG.NAMESPACE.TABLE[@SNAPSHOT]` and `delta:PATH-OR-URI[@VERSION]`.

Each is resolved to its Parquet data files, which are then read as any others; the snapshot goes into the fingerprint.
Needs the extra `lake` (pyiceberg, deltalake).
"""

import re

from owlrec.errors import SourceError
from owlrec.shards import in_threads
from owlrec.sources.files import SourceFile, input_files

_SCHEMES = ("iceberg:", "delta:")
_SNAPSHOT = re.compile(r"@(\d+)$")  # an address of Azure holds another @
_INSTALL = "Install owlrec's extra `lake`: pip install 'owlrec[lake]'."

_CHECK = "Correct its name or snapshot in the recipe, or the settings of its catalog or store."


def is_lake_table(name: str) -> bool:
    """Whether a recipe's path names a table of a lake."""
    return name.startswith(_SCHEMES)


def lake_files(name: str) -> tuple[list[SourceFile], str]:
    """The data files of a table's snapshot, and what names that snapshot.

    Raises SourceError where the package is missing, the table cannot be opened, or rows are deleted by other files.
    """
    scheme, _, table = name.partition(":")
    table, version = _SNAPSHOT.sub("", table), _SNAPSHOT.search(table)
    try:
        paths, snapshot = (_iceberg if scheme == "iceberg" else _delta)(
            name, table, int(version[1]) if version else None
        )
    except ImportError as error:
        raise SourceError(f"{name}: {error.name} is not installed. {_INSTALL}") from None
    if not paths:
        raise SourceError(f"{name}: the table holds no data files. Correct its name or its snapshot.")
    files = in_threads(input_files, sorted(paths))
    return [file for found in files for file in found], f"{scheme}@{snapshot}"


def _iceberg(name: str, table: str, snapshot: int | None) -> tuple[list[str], str]:
    from pyiceberg.catalog import load_catalog

    catalog, _, identifier = table.partition(".")
    try:
        opened = load_catalog(catalog).load_table(identifier)
        tasks = list(opened.scan(snapshot_id=snapshot).plan_files())
    except Exception as error:  # pyiceberg's catalogs raise classes of their own, and those of what they talk to
        raise SourceError(f"{name}: the table cannot be opened ({type(error).__name__}: {error}). {_CHECK}") from error
    if any(task.delete_files for task in tasks):
        raise SourceError(f"{name}: rows are deleted by delete files, which are not read. Compact the table first.")
    current = opened.current_snapshot()
    paths = [task.file.file_path.removeprefix("file://") for task in tasks]
    return paths, str(snapshot or (current.snapshot_id if current else 0))


def _delta(name: str, table: str, version: int | None) -> tuple[list[str], str]:
    from deltalake import DeltaTable

    try:
        opened = DeltaTable(table, version=version)
        paths = [path.removeprefix("file://") for path in opened.file_uris()]
        features = opened.protocol().reader_features or []
    except Exception as error:  # deltalake's classes share no base, and its stores raise OSError
        raise SourceError(f"{name}: the table cannot be opened ({type(error).__name__}: {error}). {_CHECK}") from error
    if "deletionVectors" in features:
        raise SourceError(f"{name}: rows are deleted by deletion vectors, which are not read. Purge the table first.")
    return paths, str(opened.version())
