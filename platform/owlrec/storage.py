"""Files under one root: a local folder, S3, Google Cloud Storage, Azure or memory, using obstore (Rust's object_store).

Every write is atomic: a temporary name, fsync and a rename on a local disk, one PUT or one multipart upload elsewhere,
so a reader never sees half a file. `create_bytes` is put-if-absent and `swap_bytes` is compare-and-swap on every
store; claims, cards and pointers need nothing else. Local files are read and written without obstore, whose local store
neither syncs nor swaps.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from pydantic import BaseModel

from owlrec.errors import DiskFullError, WorkspaceError, naming_extras
from owlrec.machine import CachedFile, NodeCache, cache_folder

if TYPE_CHECKING:
    import pyarrow as pa  # imported where a table is read or written: a lookup needs no Arrow
    import pyarrow.parquet as pq

COMPRESSION = "zstd"
SCHEMES = ("s3://", "s3a://", "gs://", "az://", "azure://", "abfs://", "abfss://", "adl://", "memory://")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RANGE_BYTES = 8 << 20  # per ranged read, several in parallel
_RANGES_AT_ONCE = 12
_MOST_PIECES = 9_000  # S3 allows 10,000 per multipart upload
_LEAST_PIECE = 8 << 20
_SCRATCH_S = 2 * 86_400.0
_MEMORY: dict[str, Any] = {}  # stores of memory:// by name, only in this process


@dataclass(frozen=True)
class Entry:
    """A file in a listing. e_tag: changes whenever the file is rewritten."""

    bytes: int
    e_tag: str
    modified: float = 0.0  # seconds since 1970


class FileEntry(BaseModel, frozen=True):
    """A file at the time of writing."""

    bytes: int
    sha256: str
    e_tag: str = ""

    def matches(self, entry: Entry | None) -> bool | None:
        """Whether a listed file is this one; None if only its contents could decide (such as a copy in another
        store)."""
        if entry is None or entry.bytes != self.bytes:
            return False
        return True if entry.e_tag == self.e_tag else None


class Storage:
    """Files under one root. Paths given to its methods are relative to the root, with forward slashes."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """root: a local path (created on write) or a URI. Raises WorkspaceError if no store supports the URI."""
        self.root = str(root)
        self.local = "://" not in self.root or self.root.startswith("file://")
        if self.local:
            self.base = os.path.abspath(os.path.expanduser(self.root.removeprefix("file://")))
            self._store: Any = None
        else:
            self.base = self.root.rstrip("/")
            self._store = _open_store(self.base)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.base,)

    def path(self, *parts: str) -> str:
        """Full path or URI of a path relative to the root."""
        return "/".join([self.base, *parts])

    def local_path(self, *parts: str) -> Path:
        """The path as a local one, for operations that need a local folder. Raises WorkspaceError on an object
        store."""
        if not self.local:
            raise WorkspaceError(
                f"{self.root} is not a local folder, but {'/'.join(parts)} needs one. Use a local workspace."
            )
        return Path(self.path(*parts))

    def arrow(self, *parts: str) -> tuple[Any, str]:
        """The location for Arrow's file systems: (file system, path), for libraries that accept nothing else."""
        import pyarrow.fs as pafs

        if self.local:
            return pafs.LocalFileSystem(), self.path(*parts)
        from obstore.fsspec import FsspecStore

        scheme, _, path = self.path(*parts).partition("://")
        protocol: Any = scheme
        store = FsspecStore(protocol, client_options={"allow_http": _allows_http()})
        return pafs.PyFileSystem(pafs.FSSpecHandler(store)), path

    def check_writable(self) -> None:
        """Writes and removes a probe file. Raises WorkspaceError if that fails, so that no job fails hours
        later.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(probe, b"owlrec")
            self.delete_file(probe)
        except WorkspaceError as error:
            raise WorkspaceError(
                f"workspace {self.root} is not writable: {error} Or use another workspace, in the recipe or "
                "with --workspace."
            ) from None

    # Listing

    def entry(self, path: str) -> Entry | None:
        """Size and e_tag of a file, None if it does not exist."""
        if self.local:
            try:
                return _stat(self.path(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
        import obstore

        with self._explained(path, "read"):
            try:
                meta = obstore.head(self._store, path)
            except FileNotFoundError:
                return None
        return _entry(meta)

    def entries(self, *folder: str) -> dict[str, Entry]:
        """All files below a folder by their path relative to it, sorted, without hidden and temporary ones."""
        prefix = "/".join(folder)
        if self.local:
            return dict(sorted(_walk(self.path(prefix))))
        import obstore

        listed: dict[str, Entry] = {}
        skip = len(prefix) + 1 if prefix else 0
        with self._explained(prefix, "listed"):
            for chunk in obstore.list(self._store, prefix or None, chunk_size=1000):
                for meta in chunk:
                    name = meta["path"][skip:]
                    if not _hidden(name):
                        listed[name] = _entry(meta)
        return dict(sorted(listed.items()))

    def names(self, *folder: str) -> list[str]:
        """Names in a folder, sorted, without hidden and temporary ones; empty if the folder does not exist."""
        prefix = "/".join(folder)
        if self.local:
            try:
                return sorted(name for name in os.listdir(self.path(prefix)) if not name.startswith("."))
            except (FileNotFoundError, NotADirectoryError):
                return []
        import obstore

        with self._explained(prefix, "listed"):
            listed = obstore.list_with_delimiter(self._store, prefix or None)
        paths = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
        return sorted(name for path in paths if not (name := path.rstrip("/").rpartition("/")[2]).startswith("."))

    def exists(self, *parts: str) -> bool:
        """Whether a file or folder exists."""
        if self.local:
            return os.path.exists(self.path(*parts))
        return self.entry("/".join(parts)) is not None or bool(self.names(*parts))

    # Removing

    def delete_file(self, path: str) -> None:
        """Removes a file; a missing one is not an error."""
        if self.local:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self.path(path))
            return
        import obstore

        with self._explained(path, "deleted"), suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def delete_dir(self, *parts: str) -> None:
        """Removes a folder and its contents, if it exists."""
        if self.local:
            shutil.rmtree(self.path(*parts), ignore_errors=True)
            return
        import obstore

        prefix = "/".join(parts)
        with self._explained(prefix, "deleted"):
            for chunk in obstore.list(self._store, prefix, chunk_size=1000):
                obstore.delete(self._store, [meta["path"] for meta in chunk])

    # Writing

    def write_bytes(self, path: str, data: bytes) -> FileEntry:
        """Writes a whole file atomically. On failure (such as a full disk) raises WorkspaceError and keeps the previous
        contents.
        """
        digest = hashlib.sha256(data).hexdigest()
        if self.local:
            with _written(self.path(path)):
                stat = self._install(path, data, os.replace)
            return FileEntry(bytes=len(data), sha256=digest, e_tag=stat.e_tag)
        import obstore

        with self._explained(path, "written"):
            # Arrow's buffers declare their bytes signed, which obstore refuses.
            view = memoryview(data).cast("B")
            result = obstore.put(self._store, path, view, chunk_size=_piece_bytes(len(view)))
        return FileEntry(bytes=len(data), sha256=digest, e_tag=result["e_tag"] or "")

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Put-if-absent: writes a whole file unless it exists; returns whether it did. Of several callers one
        succeeds. Raises WorkspaceError like write_bytes.
        """
        return self.swap_bytes(path, data, None) is not None

    def swap_bytes(self, path: str, data: bytes, e_tag: str | None) -> str | None:
        """Compare-and-swap: replaces a file that still has this e_tag (None: does not exist). Returns the new e_tag,
        None if another process was faster. Raises WorkspaceError like write_bytes.
        """
        if self.local:
            with _written(self.path(path)):
                if e_tag is None:
                    try:
                        return self._install(path, data, os.link).e_tag  # unlike a rename, fails if the target exists
                    except FileExistsError:
                        return None
                with _locked(self.path(path)):
                    current = self.entry(path)
                    if current is None or current.e_tag != e_tag:
                        return None
                    return self._install(path, data, os.replace).e_tag
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._explained(path, "written"):
            try:
                mode: Any = "create" if e_tag is None else {"e_tag": e_tag}
                return obstore.put(self._store, path, data, mode=mode)["e_tag"] or ""
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return None

    @contextmanager
    def writer(self, path: str) -> Iterator[Writer]:
        """A writable binary file that appears complete when the block ends without an error; `.entry` after it."""
        spool = self._temporary(path)
        try:
            with _written(str(spool)):
                spool.parent.mkdir(parents=True, exist_ok=True)
                with spool.open("wb") as file:
                    writer = Writer(file)
                    yield writer
                    writer.flush()
                    os.fsync(file.fileno())
            writer.entry = self.upload(spool, path, sha256=writer.sha256)
        finally:
            with suppress(OSError):  # already moved on success, or not a folder
                spool.unlink()

    def upload(self, file: Path, path: str, *, sha256: str | None = None) -> FileEntry:
        """Moves a local file of any size to its place: a rename on the same disk, otherwise a multipart upload.

        sha256: of the file, if known. Raises WorkspaceError on failure; nothing is visible then.
        """
        size = file.stat().st_size
        digest = sha256 or file_digest(file)
        if self.local:
            target = self.path(path)
            with _written(target):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                try:
                    os.replace(file, target)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    spool = self._temporary(path)
                    shutil.copyfile(file, spool)
                    _sync(spool)
                    os.replace(spool, target)
                return FileEntry(bytes=size, sha256=digest, e_tag=_stat(target).e_tag)
        import obstore

        with self._explained(path, "written"):
            result = obstore.put(self._store, path, file, chunk_size=_piece_bytes(size), max_concurrency=8)
        return FileEntry(bytes=size, sha256=digest, e_tag=result["e_tag"] or "")

    def write_json(self, path: str, value: Any) -> FileEntry:
        """Writes a JSON file atomically."""
        return self.write_bytes(path, json.dumps(value, indent=2, ensure_ascii=False).encode())

    def write_parquet(self, path: str, table: pa.Table, *, row_group_rows: int | None = None) -> FileEntry:
        """Writes one Parquet file (Zstandard, with a checksum per page) atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=COMPRESSION, row_group_size=row_group_rows, write_page_checksum=True)
        return self.write_bytes(path, sink.getvalue())

    def write_arrow(self, path: str, batches: pa.Table | Sequence[pa.RecordBatch], schema: pa.Schema) -> FileEntry:
        """Writes one uncompressed Arrow IPC file for `map_arrow`; batches stay separate, a table becomes one."""
        import pyarrow as pa

        if isinstance(batches, pa.Table):
            batches = batches.combine_chunks().to_batches()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return self.write_bytes(path, sink.getvalue())

    def _install(self, path: str, data: bytes, put_in_place: Callable[[str, str], None]) -> Entry:
        """Writes a local file under a temporary name and renames it: the only place that does this."""
        target, temporary = self.path(path), self._temporary(path)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                # The rename is atomic, but durable only once the bytes are: a power cut must not leave an empty
                # "finished" file.
                file.flush()
                os.fsync(file.fileno())
            stat = _stat(str(temporary))
            put_in_place(str(temporary), target)
            return stat
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _temporary(self, path: str) -> Path:
        if not self.local:
            return cache_folder("spool") / f"{uuid.uuid4().hex}.tmp"
        folder, _, name = self.path(path).rpartition("/")
        return Path(f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp")

    def scratch(self) -> Path:
        """A new local folder for building files, on the workspace's own disk if it is local, so `upload` can
        rename. Remove it when done; those of killed processes are removed after two days.
        """
        base = Path(self.path(".scratch")) if self.local else cache_folder("scratch")
        for left in base.iterdir() if base.is_dir() else ():
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _SCRATCH_S:
                    shutil.rmtree(left)
        folder = base / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    # Reading

    def read_bytes(self, path: str) -> bytes:
        """A whole file. Raises WorkspaceError if it is missing."""
        return self.read_tagged(path)[0]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        """A whole file and its e_tag for `swap_bytes`. Raises WorkspaceError if it is missing."""
        if self.local:
            try:
                with open(self.path(path), "rb") as file:
                    return file.read(), _tag(os.fstat(file.fileno()))
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise self._missing(path) from None
        import obstore

        with self._explained(path, "read"):
            try:
                result = obstore.get(self._store, path)
                return bytes(result.bytes()), result.meta["e_tag"] or ""
            except FileNotFoundError:
                raise self._missing(path) from None

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start` on. Raises WorkspaceError if the file is missing."""
        if self.local:
            try:
                with open(self.path(path), "rb") as file:
                    return os.pread(file.fileno(), length, start)
            except FileNotFoundError:
                raise self._missing(path) from None
        import obstore

        with self._explained(path, "read"):
            try:
                return bytes(obstore.get_range(self._store, path, start=start, length=length))
            except FileNotFoundError:
                raise self._missing(path) from None

    def digest(self, path: str) -> str:
        """SHA-256 (hex) of a file's bytes. Raises WorkspaceError if it is missing."""
        if self.local and self.exists(path):
            return file_digest(self.path(path))
        return hashlib.sha256(self.read_bytes(path)).hexdigest()

    def read_json(self, path: str) -> Any:
        """Reads a JSON file. Raises WorkspaceError if it is missing or not valid JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:  # not JSON, or bytes that are not text
            raise WorkspaceError(
                f"{self.path(path)} is not valid JSON ({error}). Delete it and run its stage again."
            ) from None

    def read_parquet(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Reads one Parquet file. Raises WorkspaceError if it is missing or corrupt."""
        import pyarrow.parquet as pq

        with self._readable(path):
            # ParquetFile, since read_table would add columns for folder names such as day=3.
            return pq.ParquetFile(self.open_input(path), page_checksum_verification=True).read(columns)

    def parquet_file(self, path: str) -> pq.ParquetFile:
        """A Parquet file for piecewise reading, by ranged reads. Raises the errors of read_parquet."""
        import pyarrow.parquet as pq

        with self._readable(path):
            return pq.ParquetFile(self.open_input(path))

    def count_rows(self, path: str) -> int:
        """Rows of one Parquet file, from its footer."""
        return int(self.parquet_file(path).metadata.num_rows)

    def map_arrow(self, path: str, entry: FileEntry | None = None) -> pa.Table:
        """An Arrow IPC file as a table without copying; from an object store, through the node's cache.

        entry: of the file, to verify its content after fetching. Raises the errors of read_parquet.
        """
        import pyarrow as pa

        with self._readable(path):
            copy = self.local_copy(path, entry)
            table = pa.ipc.open_file(pa.memory_map(str(copy.path), "r")).read_all()
        copy.keep_for(table)
        return table

    def open_input(self, path: str) -> pa.NativeFile:
        """A file for random access: mapped from a local disk, by ranged reads elsewhere. Raises WorkspaceError if
        it is missing.
        """
        import pyarrow as pa

        if self.local:
            try:
                return pa.memory_map(self.path(path), "r")
            except (FileNotFoundError, IsADirectoryError):
                raise self._missing(path) from None
        entry = self.entry(path)
        if entry is None:
            raise self._missing(path)
        if entry.bytes <= 2 * _RANGE_BYTES:
            return pa.BufferReader(self.read_bytes(path))
        return pa.PythonFile(_RangedFile(self, path, entry.bytes), mode="r")

    def download(self, path: str, file: Path) -> None:
        """Copies a file to a local one, by ranges in parallel. Raises WorkspaceError if it is missing, or the disk
        is full.
        """
        if self.local:
            with _written(str(file)):
                shutil.copyfile(self.path(path), file)
            return
        entry = self.entry(path)
        if entry is None:
            raise self._missing(path)
        starts = range(0, entry.bytes, _RANGE_BYTES)
        with _written(str(file)), file.open("wb") as out, ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:

            def fetch(start: int) -> None:
                length = min(_RANGE_BYTES, entry.bytes - start)
                os.pwrite(out.fileno(), self.read_range(path, start, length), start)

            for _ in pool.map(fetch, starts):
                pass

    def local_copy(self, path: str, entry: FileEntry | None = None) -> CachedFile:
        """A file on this machine's disk, for mapping: the file itself, or a copy in the node's cache that stays there
        until it is closed.

        entry: see map_arrow. Raises WorkspaceError if it is missing or damaged, or the disk is full.
        """
        if self.local:
            if not os.path.exists(self.path(path)):
                raise self._missing(path)
            return CachedFile(Path(self.path(path)))
        current = self.entry(path)
        if current is None:
            raise self._missing(path)
        key = f"{self.copy_name(path)}-{hashlib.sha256(current.e_tag.encode()).hexdigest()[:32]}"
        return NodeCache.default().open(
            key, current.bytes, lambda file: self.download(path, file), entry.sha256 if entry else None
        )

    def copy_name(self, path: str) -> str:
        """Prefix of the names of a file's copies in the caches of nodes, for all its contents."""
        return hashlib.sha256(self.path(path).encode()).hexdigest()[:32]

    # Errors

    def _missing(self, path: str) -> WorkspaceError:
        return WorkspaceError(f"{self.path(path)} does not exist. Run the stage that writes it first.")

    @contextmanager
    def _readable(self, path: str) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowInvalid, OSError) as error:
            raise WorkspaceError(
                f"{self.path(path)} cannot be read ({error}). Delete it and run its stage again."
            ) from None

    @contextmanager
    def _explained(self, path: str, what: str) -> Iterator[None]:
        """Converts an object store's errors to WorkspaceErrors with a remedy."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as error:
            _refuse(self.path(path), what, error)


class Writer(io.RawIOBase):
    """A binary file that counts and hashes the bytes written."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self._hash = file, hashlib.sha256()
        self.bytes = 0
        self.entry: FileEntry | None = None  # set once the file is in place

    def writable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def write(self, data: Any) -> int:
        """See io.RawIOBase."""
        self._hash.update(data)
        self._file.write(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def tell(self) -> int:
        """Number of bytes written."""
        return self.bytes

    def flush(self) -> None:
        """See io.RawIOBase."""
        if not self._file.closed:
            self._file.flush()

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the bytes written."""
        return self._hash.hexdigest()


class _RangedFile(io.RawIOBase):
    """A remote file read by ranges, only as requested."""

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        super().__init__()
        self._storage, self._path, self._size, self._at = storage, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self._at if size < 0 else min(size, self._size - self._at)
        if wanted <= 0:
            return b""
        data = self._storage.read_range(self._path, self._at, wanted)
        self._at += len(data)
        return data


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of `parts`: pydantic models, paths or any JSON values, independent of key order."""

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


def _open_store(uri: str) -> Any:
    if not uri.startswith(SCHEMES):
        raise WorkspaceError(
            f"workspace {uri} cannot be opened. Use a local path or one of {', '.join(SCHEMES)}; mount other stores."
        )
    with naming_extras():
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url

    if uri.startswith("memory://"):
        return _MEMORY.setdefault(uri, MemoryStore())
    try:
        return from_url(
            uri,
            client_options={"allow_http": _allows_http(), "timeout": "120s", "connect_timeout": "5s"},
            retry_config={"max_retries": 6, "retry_timeout": timedelta(seconds=60)},
        )
    except (BaseError, ValueError, OSError) as error:
        _refuse(uri, "opened", error)


def _allows_http() -> bool:
    """Whether the environment names a server without TLS, such as MinIO on the same network or a test's server."""
    return any(os.environ.get(f"AWS_ENDPOINT_URL{suffix}", "").startswith("http://") for suffix in ("", "_S3"))


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _FULL


def _refuse(where: str, what: str, error: Exception) -> NoReturn:
    text = str(error)
    first = " ".join(text.split())[:300]
    if _is_full(error):
        remedy = "Free some space and run the same command again: finished work stays."
    elif "NoSuchBucket" in text or "bucket does not exist" in text:
        remedy = "The bucket does not exist: correct its name."
    elif "169.254.169.254" in text or "metadata.google.internal" in text:
        remedy = "This machine has no credentials for it: set them in the environment, or give its role access."
    elif "PermanentRedirect" in text or "AuthorizationHeaderMalformed" in text or "IllegalLocation" in text:
        remedy = "The bucket is in another region: set AWS_REGION to that region."
    elif "AccessDenied" in text or "403" in text:
        remedy = "These credentials lack permission: grant them access to this prefix, or use other credentials."
    else:
        remedy = "Check the bucket's name and region, and this machine's credentials."
    kind = DiskFullError if _is_full(error) else WorkspaceError
    raise kind(f"{where} cannot be {what} ({type(error).__name__}: {first}). {remedy}") from error


@contextmanager
def _written(target: str) -> Iterator[None]:
    """Error with a remedy for a local file that cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "Free some space" if _is_full(error) else "Make it writable"
        kind = DiskFullError if _is_full(error) else WorkspaceError
        raise kind(
            f"{target} cannot be written ({error}). {remedy} and run the same command again: finished work stays."
        ) from error


@contextmanager
def _locked(target: str) -> Iterator[None]:
    """Locks out other processes that swap files of the same folder. The lock ends with its process."""
    folder = target.rpartition("/")[0]
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stat(path: str) -> Entry:
    info = os.stat(path)
    return Entry(info.st_size, _tag(info), info.st_mtime)


def _tag(info: os.stat_result) -> str:
    return f"{info.st_ino:x}-{info.st_mtime_ns:x}-{info.st_size:x}"


def _entry(meta: Any) -> Entry:
    return Entry(meta["size"], meta["e_tag"] or "", meta["last_modified"].timestamp())


def _hidden(path: str) -> bool:
    return path.startswith(".") or "/." in path


def _walk(folder: str, below: str = "") -> Iterator[tuple[str, Entry]]:
    try:
        with os.scandir(folder) as listing:
            for item in listing:
                if item.name.startswith("."):
                    continue
                if item.is_dir():
                    yield from _walk(item.path, f"{below}{item.name}/")
                else:
                    with suppress(FileNotFoundError):
                        info = item.stat()
                        yield f"{below}{item.name}", Entry(info.st_size, _tag(info), info.st_mtime)
    except (FileNotFoundError, NotADirectoryError):
        return


def _piece_bytes(size: int) -> int:
    """Bytes per piece of a multipart upload, so that a file of any size stays below S3's 10,000 pieces."""
    return max(_LEAST_PIECE, -(-size // _MOST_PIECES))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------- pointer
# Pointers: small files that name the current release, cohorts, or refresh state.
#
# A pointer contains its own history, so one write changes both, and it is replaced only by compare-and-swap: if
# two processes move it at once, one gets an error. A HOLD next to it stops every replacement until a person lifts it.


class PointerMoved(WorkspaceError):
    """The pointer no longer names the expected value: another process was faster."""


class PointerHeld(WorkspaceError):
    """A HOLD next to the pointer stops every replacement until a person lifts it."""


class Hold(BaseModel):
    """Contents of a HOLD file."""

    reason: str
    by: str
    since: float  # seconds since 1970


_HISTORY = 100  # moves in the history
_TRIES = 20
_ANY: Any = object()


def pack_history(history: list[str]) -> bytes:
    """Contents of a pointer, in a file or a Redis key. history: values, oldest first, the current one last."""
    return json.dumps({"current": history[-1], "history": history[-_HISTORY:]}).encode()


def unpack_history(data: bytes | str) -> list[str]:
    """The history that `pack_history` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    content = json.loads(data)
    history = [str(name) for name in content["history"]]
    if not history or history[-1] != content["current"]:
        raise ValueError("'history' does not end with 'current'")
    return history


@dataclass(frozen=True)
class Pointer:
    """A small file with a current value and its history, replaced only by compare-and-swap."""

    storage: Storage
    path: str

    @property
    def current(self) -> str | None:
        """Current value of the pointer; None if it was never moved."""
        history = self.history
        return history[-1] if history else None

    @property
    def history(self) -> list[str]:
        """Previously current values, oldest first, the current one last. Raises WorkspaceError if it is unreadable."""
        return self._read()[0]

    def move(self, to: str, *, expected: str | None = _ANY) -> None:
        """Moves the pointer to `to`. expected: the required current value; by default any.

        Raises PointerMoved if another value is current, and PointerHeld on a HOLD.
        """
        self._swap(lambda history: history if history and history[-1] == to else [*history, to], expected)

    def rewind(self, to: str) -> None:
        """Moves back to `to` and drops later values from the history. Raises PointerHeld like `move`."""

        def back(history: list[str]) -> list[str]:
            return history[: len(history) - history[::-1].index(to)] if to in history else [*history, to]

        self._swap(back, _ANY)

    def hold(self, reason: str, by: str) -> None:
        """Stops every replacement until `lift`."""
        self.storage.write_bytes(self._hold, Hold(reason=reason, by=by, since=time.time()).model_dump_json().encode())

    def lift(self) -> None:
        """Allows replacements again."""
        self.storage.delete_file(self._hold)

    @property
    def held(self) -> Hold | None:
        """The HOLD next to the pointer, if there is one."""
        if self.storage.entry(self._hold) is None:
            return None
        return Hold.model_validate_json(self.storage.read_bytes(self._hold))

    def refuse_hold(self) -> None:
        """Raises PointerHeld with its author, time and reason if there is a HOLD next to the pointer."""
        if hold := self.held:
            since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(hold.since))
            raise PointerHeld(
                f"{self.storage.path(self.path)} is on HOLD since {since} by {hold.by}: {hold.reason}. It "
                "cannot change until the hold is lifted (`owlrec release unhold`)."
            )

    @property
    def _hold(self) -> str:
        return "/".join([*self.path.split("/")[:-1], "HOLD"])

    def _read(self) -> tuple[list[str], str | None]:
        if self.storage.entry(self.path) is None:
            return [], None
        data, e_tag = self.storage.read_tagged(self.path)
        try:
            history = unpack_history(data)
        except (ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(
                f"{self.storage.path(self.path)} is not a pointer ({error!r}). Delete it and set the current "
                "value again."
            ) from None
        return history, e_tag

    def _swap(self, change: Callable[[list[str]], list[str]], expected: str | None) -> None:
        where = self.storage.path(self.path)
        for _ in range(_TRIES):
            history, e_tag = self._read()
            current = history[-1] if history else None
            if expected is not _ANY and current != expected:
                raise PointerMoved(f"{where} names {current!r}, not {expected!r}: another process changed it first.")
            wanted = change(history)
            if wanted == history:
                return
            self.refuse_hold()
            if self.storage.swap_bytes(self.path, pack_history(wanted), e_tag) is not None:
                return
        raise PointerMoved(f"{where} was changed by other processes {_TRIES} times in a row. Try again.")
