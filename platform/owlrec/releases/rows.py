"""The rows of a release as bytes, the same in LMDB and in Redis, and the store that reads them.

A key is one byte for the kind and the id as eight big-endian bytes, so that byte order is numeric order; vectors of
older interest partitions follow their id's newest one, under its key and one byte more. Five databases hold values:
`knowledge` (as_of, framework, quality, text), `vectors` (raw float16), `memberships` (cohort ids, each as eight
big-endian bytes), `codes` (semantic ids as owlrec.encoding.packed_codes writes them; empty: none) and, of users,
`behaviors` (24 bytes each, schema.BEHAVIOR). Whole columns are encoded at once: a loop over 10^8 rows in Python
would cost hours.
"""

import struct
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.packed_codes import unpack_codes
from owlrec.errors import ReleaseError, SchemaError, did_you_mean
from owlrec.releases.interface import Knowledge, KnowledgeStore
from owlrec.schema import BEHAVIOR, Kind
from owlrec.tombstones import Tombstones

DATABASES = ("knowledge", "vectors", "memberships", "codes", "behaviors")
KEY_ORDER: tuple[Kind, ...] = ("cohort", "item", "user")  # kinds as their keys ascend
KEY_BYTES = 9
LAST_PARTITION = 255  # one byte of a key
_KIND_BYTES = {"user": b"u", "item": b"i", "cohort": b"c"}
_KINDS = {value[0]: kind for kind, value in _KIND_BYTES.items()}
_KEY = struct.Struct(">cq")
_HEAD = np.dtype([("as_of", ">i8"), ("framework", ">u2"), ("quality", ">u2")])  # lengths of the two names in bytes
_HEAD_STRUCT = struct.Struct(">qHH")
_LONGEST_NAME = (1 << 16) - 1


def encode_key(kind: str, id_: int, partition: int = 0) -> bytes:
    """The nine bytes of a row's key, ten for an older partition. Raises ReleaseError for an unknown kind."""
    key = _KEY.pack(_kind_byte(kind), id_)
    return key + bytes([partition]) if partition else key


def encode_keys(kind: str, ids: np.ndarray, partition: int = 0) -> list[bytes]:
    """The keys of many ids of a kind, aligned. Raises ReleaseError for an unknown kind."""
    width = KEY_BYTES + bool(partition)
    keys = np.empty((len(ids), width), dtype=np.uint8)
    keys[:, 0] = _kind_byte(kind)[0]
    keys[:, 1:KEY_BYTES] = np.asarray(ids, dtype=">i8").view(np.uint8).reshape(-1, 8)
    if partition:
        keys[:, KEY_BYTES] = partition
    return byte_rows(keys)


def decode_key(key: bytes) -> tuple[str, int]:
    """The kind and the id that a key stands for."""
    kind, id_ = _KEY.unpack(key[:KEY_BYTES])
    return _KINDS[kind[0]], id_


def decode_keys(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The kinds (their bytes, uint8) and ids (int64) of keys."""
    table = np.frombuffer(b"".join(key[:KEY_BYTES] for key in keys), dtype=np.uint8).reshape(-1, KEY_BYTES)
    return table[:, 0], np.ascontiguousarray(table[:, 1:]).view(">i8").ravel().astype(np.int64)


def speaking(keys: Sequence[bytes], tombstones: Tombstones) -> list[bool]:
    """Of each key whether its row may be told: not that of a user who is forgotten."""
    if not keys or not len(tombstones):
        return [True] * len(keys)
    kinds, ids = decode_keys(keys)
    told: list[bool] = (~tombstones.among(ids) | (kinds != _KIND_BYTES["user"][0])).tolist()
    return told


def kind_of(byte: int) -> str:
    """The kind that a key's first byte stands for."""
    return _KINDS[byte]


def byte_rows(table: np.ndarray) -> list[bytes]:
    """Each row of a contiguous table [n, width] as bytes."""
    table = np.ascontiguousarray(table).view(np.uint8)
    return table.view(f"V{table.shape[1]}").ravel().tolist() if table.size else [b""] * len(table)


def encode_knowledge(table: pa.Table, *, name: str) -> list[bytes]:
    """The values of knowledge rows (schema.KNOWLEDGE). Raises SchemaError for a framework or quality beyond 64 kB."""
    framework, quality, text = (_binary(table[column]) for column in ("framework", "quality", "text"))
    head = np.empty(table.num_rows, dtype=_HEAD)
    head["as_of"] = table["as_of"].to_numpy()
    for column, values in (("framework", framework), ("quality", quality)):
        lengths = pc.binary_length(values).to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.max() > _LONGEST_NAME:
            row = int(lengths.argmax())
            raise SchemaError(
                f"{name}, row {row}: its {column} has {lengths[row]:,} bytes, more than {_LONGEST_NAME:,}. Shorten it."
            )
        head[column] = lengths
    heads = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_HEAD.itemsize), len(head), [None, pa.py_buffer(head)])
    return _slices(pc.binary_join_element_wise(heads.cast(pa.binary()), framework, quality, text, b""))


def decode_knowledge(kind: str, id_: int, value: bytes, where: str) -> Knowledge:
    """The knowledge that a value holds. Raises ReleaseError, which names `where`, for a damaged one."""
    try:
        as_of, framework, quality = _HEAD_STRUCT.unpack_from(value)
        first = _HEAD_STRUCT.size
        second, third = first + framework, first + framework + quality
        if third > len(value):
            raise ValueError("it is cut short")
        text = value[third:].decode()
        return Knowledge(kind, id_, as_of, text, value[first:second].decode(), value[second:third].decode())
    except (ValueError, struct.error) as error:
        raise ReleaseError(
            f"{where}: the row of {kind} {id_} is unreadable ({error!r}). The store is corrupt: "
            f"roll back to the previous release, or publish again."
        ) from None


def encode_lists(lists: pa.ListArray) -> list[bytes]:
    """The values of memberships: of each list of int64 eight big-endian bytes per cohort."""
    offsets = lists.offsets.to_numpy().astype(np.int64) * 8
    data = lists.values.to_numpy().astype(">i8").tobytes()
    return [data[start:end] for start, end in pairwise(offsets.tolist())]


def encode_behaviors(table: pa.Table) -> list[bytes]:
    """The values of behaviors (schema.BEHAVIORS): schema.BEHAVIOR after each other, NaN for no rating.

    Raises ValueError where the lists of a row differ in length.
    """
    lists = {name: table[f"{name}s"].combine_chunks() for name in BEHAVIOR.names or ()}
    offsets = np.r_[0, np.cumsum(lists["time"].value_lengths().to_numpy())]
    rows = np.empty(offsets[-1], dtype=BEHAVIOR)
    for name, column in lists.items():
        if not np.array_equal(column.value_lengths().to_numpy(), np.diff(offsets)):
            raise ValueError(f"{name}s and times differ in length")
        rows[name] = column.flatten().to_numpy(zero_copy_only=False)
    data, bounds = rows.tobytes(), (offsets * BEHAVIOR.itemsize).tolist()
    return [data[start:end] for start, end in pairwise(bounds)]


class RowStore(KnowledgeStore):
    """What a database answers that holds these rows under these keys."""

    def __init__(
        self,
        where: str,
        *,
        dim: int,
        counts: Mapping[str, int],
        partitions: Mapping[str, int],
        code_sizes: Mapping[str, Sequence[int]],
    ) -> None:
        """where: the folder or server, for errors. The others as the release's manifest states."""
        self._where, self._dim, self._counts = where, dim, counts
        self._partitions, self._code_sizes = partitions, code_sizes

    @abstractmethod
    def values(
        self, database: str, kind: str, ids: Sequence[int] | np.ndarray, partition: int = 0
    ) -> list[bytes | None]:
        """The bytes under each id in a database, None where there are none. Raises ReleaseError for an unknown kind."""

    def own_knowledge(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[Knowledge | None]:
        """See KnowledgeStore.own_knowledge."""
        values = self.values("knowledge", kind, ids)
        return [
            None if value is None else decode_knowledge(kind, int(id_), value, self._where)
            for id_, value in zip(ids, values, strict=True)
        ]

    def own_vectors(self, kind: str, ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """See KnowledgeStore.own_vectors."""
        vectors = np.zeros((len(ids), n, self._dim), dtype=np.float32)
        mask = np.zeros((len(ids), n), dtype=bool)
        asked: Sequence[int] | np.ndarray = ids
        rows: slice | np.ndarray = slice(None)  # of the ids that are asked for
        for partition in range(min(n, LAST_PARTITION + 1) if self._partitions.get(kind) else 1):
            values = self.values("vectors", kind, asked, partition)
            present = [value for value in values if value is not None]
            if not present:
                break
            if len(present) < len(values):  # who lacks a partition lacks all older ones
                known = [at for at, value in enumerate(values) if value is not None]
                rows, asked = np.arange(len(ids))[rows][known], [asked[at] for at in known]
            data = np.frombuffer(b"".join(present), dtype=np.float16)
            vectors[rows, partition] = data.reshape(len(present), -1)
            mask[rows, partition] = True
        return vectors, mask

    def own_codes(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.own_codes."""
        sizes = self._code_sizes.get(kind, ())
        values = self.values("codes", kind, ids)
        return [None if v is None else unpack_codes(v, sizes) if v else () for v in values]

    def memberships(self, kind: str, ids: Sequence[int] | np.ndarray) -> list[tuple[int, ...] | None]:
        """See KnowledgeStore.memberships."""
        values = self.values("memberships", kind, ids)
        return [None if v is None else struct.unpack(f">{len(v) // 8}q", v) for v in values]

    def behaviors(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray | None]:
        """See KnowledgeStore.behaviors."""
        values = self.values("behaviors", "user", ids)
        return [None if value is None else np.frombuffer(value, dtype=BEHAVIOR) for value in values]

    def count(self, kind: str) -> int:
        """See KnowledgeStore.count."""
        return self._counts.get(kind, 0)


def _kind_byte(kind: str) -> bytes:
    if kind not in _KIND_BYTES:
        raise ReleaseError(f"kind '{kind}' is none that a release holds.{did_you_mean(kind, _KIND_BYTES)}")
    return _KIND_BYTES[kind]


def _binary(column: pa.ChunkedArray) -> pa.Array:
    """A string column as one array of bytes, "" in the place of nulls."""
    column = pc.fill_null(column, "") if column.null_count else column
    return column.cast(pa.binary()).combine_chunks()


def _slices(values: pa.Array) -> list[bytes]:
    """A binary array as a list of bytes; `to_pylist` takes several times as long."""
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + len(values) + 1]
    data = values.buffers()[2]
    data = data.to_pybytes() if data is not None else b""
    bounds = offsets.tolist()
    return [data[start:end] for start, end in pairwise(bounds)]
