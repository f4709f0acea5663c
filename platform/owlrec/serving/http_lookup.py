"""The two lookups that machines send, GET of one id and batchGet, as raw ASGI: no framework between the socket and the
store.

A lookup in a mapped file takes microseconds, so its request is routed by two string comparisons, its answer is joined
from JSON fragments, and vectors are written as text by a table of float16's 65,536 values. Machines that read Arrow
(`Accept: application/vnd.apache.arrow.stream`) get columns instead, without any text for numbers. Each answer comes
from one leased release.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from urllib.parse import parse_qsl

import numpy as np
import orjson
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError
from starlette.types import Scope

from owlrec.ids import KINDS, stable_id
from owlrec.releases.format import Knowledge
from owlrec.releases.release import Release
from owlrec.serving.guard import READ_KEY, Problem, Reply, Telemetry
from owlrec.serving.schemas import (
    ARROW_TYPE,
    BATCH_PATH,
    BYTES_TYPE,
    DEFAULT_FIELDS,
    DIM_HEADER,
    IF_RELEASE_HEADER,
    LARGEST_ID,
    LONGEST_RAW_ID,
    ONE_PATH,
    RELEASE_HEADER,
    BatchGet,
    Kind,
    What,
)
from owlrec.serving.served import ServedReleases

_PREFIX = ONE_PATH.partition("{")[0]
_JSON, _BYTES, _ARROW = "json", "f2", "arrow"  # formats of answers, in ETags
_TYPES = {_JSON: b"application/json", _BYTES: BYTES_TYPE.encode(), _ARROW: ARROW_TYPE.encode()}
_FIELDS: TypeAdapter[list[What]] = TypeAdapter(list[What])
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_RELEASE = RELEASE_HEADER.encode()
_MANY_ROWS = 8  # vectors from which Arrow's gather is faster than NumPy's


@dataclass(slots=True)
class _Found:
    """What the store has for some ids of a kind, aligned with them."""

    kind: Kind
    asked: Sequence[int | str]  # as the client wrote them
    ids: Sequence[int]
    found: list[bool]  # whether an id has any of what was asked for
    texts: list[bytes | None] | None  # UTF-8
    knowledge: list[Knowledge | None] | None  # if provenance was asked for
    vectors: np.ndarray | None  # float16 [n, d]
    mask: list[bool] | None  # of the vectors
    codes: list[tuple[int, ...] | None] | None


class Lookups:
    """Answers them; see guard.Direct."""

    def __init__(self, served: ServedReleases, telemetry: Telemetry) -> None:
        self._served = served
        self._telemetry = telemetry
        _texts(), _arrow_texts()  # now instead of in the first request

    @property
    def computes(self) -> bool:
        """See guard.Direct: a memory-mapped store answers within microseconds."""
        return not self._served.remote

    def route(self, method: str, path: str) -> str | None:
        """See guard.Direct."""
        if path == BATCH_PATH:
            template, allowed = BATCH_PATH, "POST"
        elif path.startswith(_PREFIX) and (rest := path[len(_PREFIX) :]).count("/") == 1 and not rest.endswith("/"):
            template, allowed = ONE_PATH, "GET"
        else:
            return None
        if method != allowed:
            raise Problem(405, f"only {allowed} is allowed here", headers={"Allow": allowed})
        return template

    async def answer(self, scope: Scope, path: str, headers: Mapping[bytes, bytes], body: bytes) -> Reply:
        """See guard.Direct."""
        format_ = _format(headers.get(b"accept", b""))
        if path == BATCH_PATH:
            asked = BatchGet.model_validate_json(body)
            wanted = [(kind, [resolved(id_) for id_ in ids], ids) for kind, ids in asked.by_kind]
            fields, pin, tags = asked.fields, asked.if_release, b""
            if format_ == _BYTES and len(wanted) > 1:
                raise Problem(
                    422, "raw vectors are of one kind: ask for Arrow, or for one kind at a time", field="kinds"
                )
        else:
            kind, raw = _one(path)
            wanted, fields, pin = [(kind, [resolved(raw)], [raw])], _fields(scope.get("query_string", b"")), None
            tags = headers.get(b"if-none-match", b"")
        scope[READ_KEY] = [(kind, ids) for kind, ids, _ in wanted]
        with self._served.lease(pin or headers.get(IF_RELEASE_HEADER, b"").decode("latin-1") or None) as release:
            single = path != BATCH_PATH
            reply_headers = [(b"content-type", _TYPES[format_]), (_RELEASE, release.name.encode())]
            if single:
                tag = f'"{release.version}.{format_}"'.encode()
                reply_headers += [(b"etag", tag), (b"vary", b"accept"), (b"cache-control", b"no-cache")]
                if tags and tag in [t.strip().removeprefix(b"W/") for t in tags.split(b",")]:
                    return Reply(304, reply_headers[1:], b"")
            if format_ == _BYTES:
                fields = ["vector"]
            start = time.perf_counter()
            try:
                if release.store.remote:
                    rows = [await asyncio.to_thread(self._read, release, *one, fields) for one in wanted]
                else:
                    rows = [self._read(release, *one, fields) for one in wanted]
            finally:
                self._telemetry.time("lookup", time.perf_counter() - start)
            if single and not rows[0].found[0]:
                what = "vector" if format_ == _BYTES else "knowledge"
                raise Problem(404, f"this id has no {what}", field="id", headers={RELEASE_HEADER: release.name})
            if format_ == _ARROW:
                content = _as_arrow(release, rows, fields)
            elif format_ == _BYTES:
                assert rows[0].vectors is not None
                assert rows[0].mask is not None
                content = _as_bytes(rows[0].vectors, np.array(rows[0].mask))
                reply_headers.append((DIM_HEADER.encode(), str(rows[0].vectors.shape[1]).encode()))
            elif single:
                content = b'{"release":"%s","kind":"%s",%s' % (
                    release.name.encode(), rows[0].kind.encode(), _as_json(release, rows[0], fields)[0][1:],
                )  # fmt: skip
            else:
                content = _batch_json(release, rows, several=asked.kinds is not None, fields=fields)
            reply_headers.append((b"content-length", b"%d" % len(content)))
            return Reply(200, reply_headers, content)

    def _read(
        self, release: Release, kind: Kind, ids: list[int], asked: Sequence[int | str], fields: Sequence[What]
    ) -> _Found:
        store, n = release.store, len(ids)
        texts = knowledge = vectors = mask = None
        found = [False] * n
        if "provenance" in fields:
            knowledge = store.get(kind, ids)
            found = [known is not None for known in knowledge]
            if "text" in fields:
                texts = [None if known is None else known.text.encode("utf-8", "replace") for known in knowledge]
        elif "text" in fields:
            texts = store.texts(kind, ids)
            found = [text is not None for text in texts]
        if "vector" in fields:
            vectors, there = store.half_vectors(kind, ids)
            mask = there.tolist()
            found = [a or b for a, b in zip(found, mask, strict=True)] if texts or knowledge else mask
        codes = store.own_codes(kind, ids) if "codes" in fields else None
        if codes is not None:
            found = [a or bool(own) for a, own in zip(found, codes, strict=True)]
        hits = found.count(True)
        if hits:
            self._telemetry.count("hits", hits, {"kind": kind})
        if hits < n:
            self._telemetry.count("misses", n - hits, {"kind": kind})
        return _Found(kind, asked, ids, found, texts, knowledge, vectors, mask, codes)


def resolved(raw: int | str) -> int:
    """int64 id of what a client writes: an integer, also as text, is an id; any other text is a raw id (stable_id)."""
    if isinstance(raw, int):
        return raw
    if raw.isascii() and raw.isdigit() and len(raw) == 19 and raw[0] != "0" and (number := int(raw)) <= LARGEST_ID:
        return number  # an id as in tables; of raw ids, this is true up to 18 digits
    return stable_id(raw)


def _one(path: str) -> tuple[Kind, int | str]:
    """Kind and id of a path: a canonical integer as a number."""
    kind, _, raw = path[len(_PREFIX) :].partition("/")
    if kind not in KINDS:
        raise Problem(422, f"is not a kind: use {', '.join(KINDS)}", field="kind")
    if len(raw) > LONGEST_RAW_ID:
        raise Problem(422, f"is longer than {LONGEST_RAW_ID} characters", field="id")
    number = resolved(raw)
    return kind, number if str(number) == raw else raw


@lru_cache(512)
def _fields(query: bytes) -> list[What]:
    """Distinct `fields` of a query string. Raises Problem (422)."""
    values = [value for name, value in parse_qsl(query.decode("latin-1"), True) if name == "fields"]
    if not values:
        return list(DEFAULT_FIELDS)
    if len(values) > 4:
        raise Problem(422, "has more than 4 values", field="fields")
    try:
        return list(dict.fromkeys(_FIELDS.validate_python(values)))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Problem(422, first["msg"], field=f"fields[{first['loc'][0]}]") from None


def _format(accept: bytes) -> str:
    if not accept or accept == b"*/*":
        return _JSON
    if _TYPES[_ARROW] in accept:
        return _ARROW
    return _BYTES if _TYPES[_BYTES] in accept else _JSON


# ---------------------------------------------------------------------------------------------------------------- json


def _batch_json(release: Release, rows: Sequence[_Found], *, several: bool, fields: Sequence[What]) -> bytes:
    lists = [b'"%s":[%s]' % (one.kind.encode(), b",".join(_as_json(release, one, fields))) for one in rows]
    if several:
        return b'{"release":"%s","kinds":{%s}}' % (release.name.encode(), b",".join(lists))
    results = lists[0].partition(b":")[2]
    return b'{"release":"%s","kind":"%s","results":%s}' % (release.name.encode(), rows[0].kind.encode(), results)


def _as_json(release: Release, rows: _Found, fields: Sequence[What]) -> list[bytes]:
    """Each id as a JSON object."""
    columns = [
        (b"id", [b"%d" % id_ if isinstance(id_, int) else orjson.dumps(id_) for id_ in rows.asked]),
        (b"found", [b"true" if found else b"false" for found in rows.found]),
    ]
    if rows.texts is not None:
        columns.append(
            (b"text", [b"null" if t is None else orjson.dumps(t.decode("utf-8", "replace")) for t in rows.texts])
        )
    if rows.vectors is not None and rows.mask is not None:
        vectors = vectors_as_json(rows.vectors)
        if not all(rows.mask):
            vectors = [v if there else b"null" for v, there in zip(vectors, rows.mask, strict=True)]
        columns.append((b"vector", vectors))
    if rows.codes is not None:
        columns.append((b"codes", [orjson.dumps(codes or None) for codes in rows.codes]))
    if rows.knowledge is not None:
        columns.append((b"provenance", [_provenance(release, known) for known in rows.knowledge]))
    template = b"{" + b",".join(b'"%s":%%b' % name for name, _ in columns) + b"}"
    return [template % row for row in zip(*(values for _, values in columns), strict=True)]


def _provenance(release: Release, known: Knowledge | None) -> bytes:
    if known is None:
        return b"null"
    return orjson.dumps(
        {
            "as_of": known.as_of,
            "framework": known.framework,
            "quality": known.quality,
            "model": release.manifest.model,
            "encoder": release.manifest.encoder,
            "from_cohorts": _borrowed(known),
        }
    )


def _borrowed(known: Knowledge) -> bool:
    return known.kind != "cohort" and known.framework == "collective"


def vectors_as_json(rows: np.ndarray) -> list[bytes]:
    """Each row as a JSON list of numbers, with float16's shortest digits.

    rows: float16 [n, d]; values that are not finite become null. 256 vectors of 384 components take 0.8 ms; orjson
    needs 2.3 ms for digits that float16 does not have.
    """
    bits = np.ascontiguousarray(rows, dtype=np.float16).view(np.uint16)
    n, dim = bits.shape
    if not dim:
        return [b"[]"] * n
    if n < _MANY_ROWS:
        return [b"[%s]" % row.tobytes().translate(None, b"\0")[:-1] for row in _texts().take(bits)]
    texts = _arrow_texts().take(pa.array(bits.ravel()))
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[::dim][: n + 1].tolist()
    values = data.to_pybytes()
    return [b"[%s]" % values[start : end - 1] for start, end in pairwise(ends)]


@cache
def _texts() -> np.ndarray:
    """The text of each float16, by its bits, with a comma: padded with zero bytes."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(values)
    # The shortest decimal that reads back as the same float16, in valid JSON.
    shortest = [repr(float(str(value))) if good else "null" for value, good in zip(values, finite, strict=True)]
    return np.array([f"{text}," for text in shortest], dtype=np.bytes_)


@cache
def _arrow_texts() -> pa.Array:
    return pa.array(_texts().tolist(), pa.binary())


# --------------------------------------------------------------------------------------------------------------- binary


def _as_bytes(rows: np.ndarray, mask: np.ndarray) -> bytes:
    """Rows of float16, little-endian, concatenated; rows with a False `mask` (bool [n]) are all NaN."""
    values = np.array(rows, dtype="<f2")
    values[~mask] = np.nan
    return values.tobytes()


def _as_arrow(release: Release, all_rows: Sequence[_Found], fields: Sequence[What]) -> bytes:
    """One Arrow IPC stream: `kind`, `id` (resolved), `found`, and a column for each field, null where it is missing.

    The release is in the schema's metadata; provenance is `as_of` (ms), `framework`, `quality` and `from_cohorts`.
    """
    columns: dict[str, pa.Array] = {}
    columns["kind"] = pa.concat_arrays([pa.repeat(rows.kind, len(rows.asked)) for rows in all_rows])
    columns["id"] = pa.array(np.concatenate([np.array(rows.ids, dtype=np.int64) for rows in all_rows]))
    columns["found"] = pa.array(np.concatenate([np.array(rows.found) for rows in all_rows]))
    if "text" in fields:
        columns["text"] = pa.array([text for rows in all_rows for text in rows.texts or ()], pa.binary()).cast(
            pa.string()
        )
    if "provenance" in fields:
        known = [k for rows in all_rows for k in rows.knowledge or ()]
        columns["as_of"] = pa.array([None if k is None else k.as_of for k in known], pa.int64())
        columns["framework"] = pa.array([None if k is None else k.framework for k in known], pa.string())
        columns["quality"] = pa.array([None if k is None else k.quality for k in known], pa.string())
        columns["from_cohorts"] = pa.array([None if k is None else _borrowed(k) for k in known], pa.bool_())
    if "vector" in fields:
        vectors = [rows.vectors for rows in all_rows if rows.vectors is not None]
        mask = np.concatenate([np.array(rows.mask) for rows in all_rows])
        columns["vector"] = _vector_column(vectors[0] if len(vectors) == 1 else np.concatenate(vectors), mask)
    if "codes" in fields:
        codes = [c or None for rows in all_rows for c in rows.codes or ()]
        columns["codes"] = pa.array(codes, pa.list_(pa.uint16()))
    batch = pa.record_batch(columns)
    schema = batch.schema.with_metadata({"release": release.name})
    # The messages of a stream, in buffers of their exact size: a stream writer's buffer grows by copying.
    return b"".join([schema.serialize(), batch.serialize(), _END_OF_STREAM])


def _vector_column(rows: np.ndarray, mask: np.ndarray) -> pa.Array:
    n, dim = rows.shape
    valid = None if mask.all() else pa.py_buffer(np.packbits(mask, bitorder="little").tobytes())
    values = pa.Array.from_buffers(pa.float16(), n * dim, [None, pa.py_buffer(np.ascontiguousarray(rows))])
    return pa.Array.from_buffers(pa.list_(pa.float16(), dim), n, [valid], children=[values])
