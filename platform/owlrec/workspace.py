"""Where a run's artifacts live, on a local path or any URI that Arrow or fsspec opens (s3://, gs://, hdfs://,
memory://).

Every write is atomic: a temporary name and a rename on a local disk, one PUT on an object store. A reader therefore
never sees half a file, and "the manifest exists" means "what it lists exists". Layout, relative to the root:

    tables/<name>/part-00000.parquet      users, items, interactions, histories, samples; part i holds hash(id) % n == i
    knowledge/<fingerprint>/<kind>/       shard-00000.parquet, then its manifest shard-00000.json; dead/ beside them
    knowledge/<fingerprint>/decoder.json  what the speculative decoder counted
    vectors/<fingerprint>/<name>.parquet  encoded knowledge and metadata; quantisers/<name>/ beside them
    releases/<time>-<fingerprint8>/       immutable; releases/CURRENT names the one in force
    ctr/<fingerprint>/                    one folder a trial: result.json, model.safetensors
    pools/<release>/<pool>/               retrieval pools of a release's texts
    reports/, logs/, manifests/<stage>.json
"""

import errno
import hashlib
import importlib.util
import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import BaseModel

from owlrec.errors import WorkspaceError
from owlrec.schema import shard_of

COMPRESSION = "zstd"
_CLOUDS = ("s3://", "gs://", "gcs://", "abfs://", "abfss://")  # that Arrow opens itself
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) over `parts`: pydantic models, paths or anything JSON can hold, independent of key order."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        return str(value)

    text = json.dumps(parts, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a local file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, None where it is not: found without importing it or what it needs."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


class Workspace:
    """Artifacts under one root. Paths given to its methods are relative to the root, with forward slashes."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """root: a local path (made if absent) or a URI. Raises WorkspaceError where it cannot be opened."""
        self.root = str(root)
        try:
            if "://" in self.root:
                self.filesystem, self.base = pafs.FileSystem.from_uri(_impatient(self.root))
                self.local = isinstance(self.filesystem, pafs.LocalFileSystem)
            else:
                self.filesystem, self.base = pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(self.root))
                self.local = True
        except (pa.ArrowInvalid, OSError) as error:
            if self.root.startswith(_CLOUDS):
                raise WorkspaceError(
                    f"workspace {self.root} cannot be opened ({error}). Check the bucket's name and region, and that "
                    "this machine has credentials for it."
                ) from None
            self.filesystem, self.base, self.local = *_open_fsspec(self.root), False

    def __reduce__(self) -> tuple[type["Workspace"], tuple[str]]:
        return Workspace, (self.base if self.local else self.root,)

    def path(self, *parts: str) -> str:
        """The full path, inside `filesystem`, of a path relative to the root."""
        return "/".join([self.base.rstrip("/"), *parts])

    def local_path(self, *parts: str) -> Path:
        """The path as a local one. Raises WorkspaceError on an object store."""
        if not self.local:
            raise WorkspaceError(
                f"{self.root} is not a local folder, which {'/'.join(parts)} needs. Use a local workspace."
            )
        return Path(self.path(*parts))

    def check_writable(self) -> None:
        """Writes and removes a probe file. Raises WorkspaceError where that fails, so that no job finds out hours
        later.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"")
            self.delete_file(probe)
        except (OSError, pa.ArrowException, WorkspaceError) as error:
            raise WorkspaceError(
                f"workspace {self.root} is not writable ({error.__cause__ or error}). "
                f"Name a folder you may write to, in the recipe's `workspace` or with --workspace."
            ) from None

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder is there."""
        info = self.filesystem.get_file_info(self.path(*parts))
        return bool(info.type != pafs.FileType.NotFound)

    def names(self, *parts: str) -> list[str]:
        """The names in a folder, sorted, without hidden and temporary ones; empty where the folder does not exist."""
        selector = pafs.FileSelector(self.path(*parts), allow_not_found=True)
        return sorted(i.base_name for i in self.filesystem.get_file_info(selector) if not i.base_name.startswith("."))

    def delete_file(self, path: str) -> None:
        """Removes a file; one that is gone already is no error."""
        with suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(path))

    def delete_dir(self, *parts: str) -> None:
        """Removes a folder and all it holds, if it is there."""
        if self.exists(*parts):
            self.filesystem.delete_dir(self.path(*parts))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes a whole file atomically, making its folder. Raises WorkspaceError where that fails (a full disk, say):
        what stood there before still does.
        """
        target = self.path(path)
        try:
            if self.local:
                self._write_local(target, data, os.replace)
                return
            self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)  # an object appears when its stream is closed: one PUT
        except (OSError, pa.ArrowException) as error:
            raise _not_written(target, error) from error

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Writes a whole file unless there is one already; whether it did. Of several callers one succeeds: always on a
        local disk, and on an object store where fsspec's driver knows put-if-absent (else two may in a rare race).
        Raises WorkspaceError as write_bytes does.
        """
        target = self.path(path)
        try:
            if self.local:
                self._write_local(target, data, _link_new)
                return True
            if isinstance(self.filesystem, pafs.PyFileSystem):
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
                self.filesystem.handler.fs.pipe_file(target, data, mode="create")
                return True
        except FileExistsError:
            return False
        except (OSError, pa.ArrowException) as error:
            raise _not_written(target, error) from error
        if self.exists(path):
            return False
        self.write_bytes(path, data)
        return True

    @staticmethod
    def _write_local(target: str, data: bytes, install: Callable[[str, str], None]) -> None:
        folder, _, name = target.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                # The rename is atomic, but only durable once the bytes are: a power cut must not leave an empty
                # "finished" file.
                file.flush()
                os.fsync(file.fileno())
            install(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def read_bytes(self, path: str) -> bytes:
        """A whole file. Raises WorkspaceError where it is missing."""
        try:
            with self.filesystem.open_input_stream(self.path(path)) as stream:
                return bytes(stream.read())
        except (FileNotFoundError, IsADirectoryError):
            raise WorkspaceError(f"{self.path(path)} does not exist. Run the stage that writes it first.") from None

    def digest(self, path: str) -> str:
        """SHA-256 (hex) of a file's bytes. Raises WorkspaceError where it is missing."""
        return hashlib.sha256(self.read_bytes(path)).hexdigest()

    def write_json(self, path: str, value: Any) -> None:
        """Writes a JSON file atomically."""
        self.write_bytes(path, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def read_json(self, path: str) -> Any:
        """Reads a JSON file. Raises WorkspaceError where it is missing or no JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:  # no JSON, or bytes that are no text
            raise WorkspaceError(
                f"{self.path(path)} is no JSON ({error}). Delete it and run its stage again."
            ) from None

    def write_parquet(self, path: str, table: pa.Table) -> str:
        """Writes one Parquet file (Zstandard) atomically. Returns the SHA-256 (hex) of its bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=COMPRESSION)
        data = sink.getvalue().to_pybytes()
        self.write_bytes(path, data)
        return hashlib.sha256(data).hexdigest()

    def read_parquet(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Reads one Parquet file. Raises WorkspaceError where it is missing or corrupt."""
        try:
            return pq.read_table(self.path(path), filesystem=self.filesystem, columns=columns)
        except FileNotFoundError:
            raise WorkspaceError(f"{self.path(path)} does not exist. Run the stage that writes it first.") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise WorkspaceError(
                f"{self.path(path)} cannot be read ({error}). Delete it and run its stage again."
            ) from None

    def write_table(self, name: str, table: pa.Table, *, key: str, n_shards: int) -> None:
        """Writes table `name` as `n_shards` Parquet files, a row's file chosen by the hash of its `key` (an int64
        column).

        Rows keep their order within a shard. Shards beyond `n_shards` left by an earlier run are removed.
        """
        shards = shard_of(table[key].to_numpy(), n_shards)
        for shard in range(n_shards):
            rows = np.flatnonzero(shards == shard)
            self.write_parquet(f"tables/{name}/{part_name(shard)}", table.take(pa.array(rows)))
        for stale in self.names("tables", name)[n_shards:]:
            self.filesystem.delete_file(self.path("tables", name, stale))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Reads all shards of table `name`, in shard order. Raises WorkspaceError where it was never written."""
        parts = self.table_parts(name)
        return pa.concat_tables([self.read_parquet(f"tables/{name}/{part}", columns) for part in parts])

    def table_parts(self, name: str) -> list[str]:
        """The shard file names of table `name`. Raises WorkspaceError where it was never written."""
        parts = self.names("tables", name)
        if not parts:
            raise WorkspaceError(f"{self.path('tables', name)} is empty. Run `prepare` first, with the same recipe.")
        return parts

    def count_rows(self, path: str) -> int:
        """Rows of one Parquet file, from its footer alone."""
        return int(pq.read_metadata(self.path(path), filesystem=self.filesystem).num_rows)

    def log_path(self, name: str) -> Path:
        """A local file for third-party logs: in the workspace, or in the temporary folder where that is remote."""
        base = self.local_path("logs") if self.local else Path("/tmp/owlrec-logs") / fingerprint(self.root)[:8]
        base.mkdir(parents=True, exist_ok=True)
        return base / f"{name}.log"


def _impatient(uri: str) -> str:
    """Arrow asks Google's storage for credentials for a quarter of an hour unless told otherwise."""
    return f"{uri}?retry_limit_seconds=60" if uri.startswith(("gs://", "gcs://")) and "?" not in uri else uri


def _link_new(temporary: str, target: str) -> None:
    os.link(temporary, target)  # unlike a rename, refuses an existing target
    os.unlink(temporary)


def _not_written(target: str, error: Exception) -> WorkspaceError:
    remedy = "Free some space there" if getattr(error, "errno", None) in _FULL else "Make it writable"
    return WorkspaceError(
        f"{target} cannot be written ({error}). {remedy} and run the same command again: what is finished stays."
    )


def part_name(shard: int) -> str:
    """The file name of a table's shard."""
    return f"part-{shard:05d}.parquet"


def _open_fsspec(uri: str) -> tuple[pafs.FileSystem, str]:
    import fsspec

    try:
        filesystem, base = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise WorkspaceError(
            f"workspace {uri} cannot be opened ({error}). Install the fsspec driver for its scheme, or use a "
            "local path."
        ) from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), base
