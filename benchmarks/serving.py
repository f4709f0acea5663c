"""Knowledge lookup: the stores, then HTTP beside Feast's online server and a plain FastAPI + SQLite server, on the same
texts and vectors, each server alone on the machine with the load generator.

Parts (--only): `store`, `latency` (at 200 requests/s), `http` (greatest rate for 1 and for 256 ids, in three rounds),
`swaps` (publish, swap and roll back under load), `overload` (five times what it can take), `memory` (what further
replicas add), `rank` (by CTR alone and re-ranked by SmolLM2, see benchmarks.serving_rank), `live` (how a refresh
reaches scores, beside
frozen fields). Feast runs from an environment of its own: `--feast DIR/bin/python`, made by `python -m venv DIR;
DIR/bin/pip install feast`.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from benchmarks.load import LoadSpec
from benchmarks.serving_processes import free_port, load, peer, process, serving, wait_for_port
from benchmarks.serving_rank import measure_live, measure_rank
from benchmarks.table import Figure, options_parser, show
from owlrec.releases import KnowledgeStore, open_release, roll_back
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import KNOWLEDGE, vectors_table
from owlrec.serving.schemas import ARROW_TYPE, BATCH_PATH
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

DIM, BATCH = 384, 256
_ONE, _MANY = "1 id, text and vector", f"{BATCH} ids, text and vector"
PARTS = ("store", "latency", "http", "swaps", "overload", "memory", "rank", "live")
OURS, PLAIN, FEAST = "owlrec", "FastAPI + SQLite", "Feast"


def main() -> None:
    """Builds the data and runs the parts that are asked for."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--feast", help="a Python that has feast; without it Feast is skipped")
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="owlrec-serving-") as name:
        folder = Path(name)
        parts = {
            "store": _store,
            "latency": _latency,
            "http": _http,
            "swaps": _swaps,
            "overload": _overload,
            "memory": _memory,
        }
        parts |= {"rank": measure_rank, "live": measure_live}
        for part in options.only:
            figures += parts[part](folder / part, options)
    show("serving", figures, options)


# ---------------------------------------------------------------------------------------------------------------- data


def _release(workspace: Workspace, n: int, label: str = "release") -> str:
    """A release of `n` users; every text begins with `label`."""

    def texts() -> Iterator[pa.Table]:
        row = {f.name: "x" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
        text = f"{label} " + "The user prefers thoughtful dramas of the nineties with strong casts. " * 6
        for ids in np.array_split(np.arange(n), max(1, n // 50_000)):
            same = {name: [value] * len(ids) for name, value in row.items()}
            yield pa.table(same | {"kind": ["user"] * len(ids), "id": ids, "text": [text] * len(ids)}, schema=KNOWLEDGE)

    def vectors() -> Iterator[pa.Table]:
        random = np.random.default_rng(0)
        for ids in np.array_split(np.arange(n), max(1, n // 50_000)):
            yield vectors_table("user", ids, random.standard_normal((len(ids), DIM), dtype=np.float32))

    info = ReleaseInfo(fingerprint=fingerprint(label, n), model="synthetic", encoder="synthetic")
    return publish(workspace, knowledge=texts(), vectors=vectors(), info=info).name


# --------------------------------------------------------------------------------------------------------------- store


def _store(folder: Path, options: argparse.Namespace) -> list[Figure]:
    n = 50_000 if options.quick else 1_000_000
    workspace = Workspace(folder / "ws")
    _release(workspace, n)
    with open_release(workspace, verify=False) as release:
        figures = _batches(f"{n:,} entities", "LMDB", release.store, n, 300 if options.quick else 2000)
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        return [*figures, _skipped("store", "Redis (not installed)")]
    from owlrec.releases.redis import RedisReleases, push

    port = free_port()
    with process([program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]):
        wait_for_port(port)
        releases = RedisReleases(f"redis://127.0.0.1:{port}/0", timeout_s=60)
        with releases.open(push(workspace, releases)) as release:
            name = "Redis over loopback"
            return figures + _batches(f"{n:,} entities", name, release.store, n, 300 if options.quick else 2000)


def _batches(what: str, method: str, store: KnowledgeStore, n: int, repeats: int) -> list[Figure]:
    batches = np.random.default_rng(1).integers(0, n, (repeats, BATCH))
    figures = []
    for name, look_up in (
        ("vectors", lambda ids: store.vectors("user", ids)),
        ("vectors and text", lambda ids: (store.vectors("user", ids), store.get("user", ids))),
    ):
        for ids in batches:  # warm: the very pages that are read again
            look_up(ids)
        times = np.empty(repeats)
        for row, ids in enumerate(batches):
            start = time.perf_counter()
            look_up(ids)
            times[row] = time.perf_counter() - start
        for p in (50, 99):
            value = float(np.percentile(times, p)) * 1e3
            figures.append(_figure(f"{what}, {BATCH} ids, {name}, p{p}", method, value, "ms"))
    return figures


# ---------------------------------------------------------------------------------------------------------------- http


def _latency(folder: Path, options: argparse.Namespace) -> list[Figure]:
    n, workspace = 5_000 if options.quick else 100_000, Workspace(folder / "ws")
    _release(workspace, n)
    with serving(workspace) as url:
        ours = _our_load(url, n, 1)
        load(ours, seconds=3, connections=4)
        result = load(ours, rate=200, seconds=10 if options.quick else 60, connections=200)
    bad = result.asked - result.statuses.get("200", 0)
    return [
        _figure("one id, 200 requests/s, p50", OURS, result.ok_p50_ms, "ms"),
        _figure("one id, 200 requests/s, p99", OURS, result.ok_p99_ms, "ms"),
        _figure("one id, 200 requests/s, errors", OURS, bad, f"of {result.asked:,}"),
    ]


def _http(folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Greatest rates, ours and the peers' in turns; of the rounds, the median."""
    n, rounds, seconds = 5_000 if options.quick else 50_000, 1 if options.quick else 3, 5.0
    workspace = Workspace(folder / "ws")
    _release(workspace, n)
    rates: dict[tuple[str, str], list[float]] = {}
    arrow = {"Accept": ARROW_TYPE}
    for _ in range(rounds):
        with serving(workspace) as url:
            for what, job in (
                (_ONE, _our_load(url, n, 1)),
                (_MANY, _our_load(url, n, BATCH)),
                (f"{_MANY}, Arrow", _our_load(url, n, BATCH, headers=arrow)),
            ):
                rates.setdefault((what, OURS), []).append(_greatest(job, seconds))
        with peer("plain_server.py", sys.executable, workspace, folder, n) as url:
            for what, ids in ((_ONE, 1), (_MANY, BATCH)):
                rates.setdefault((what, PLAIN), []).append(_greatest(_plain_load(url, n, ids), seconds))
        if options.feast:
            feast = str(Path(options.feast).absolute())  # not resolved: a link to Python that lies in an environment
            with peer("feast_server.py", feast, workspace, folder, n) as url:
                for what, ids in ((_ONE, 1), (_MANY, BATCH)):
                    rates.setdefault((what, FEAST), []).append(_greatest(_feast_load(url, n, ids), seconds))
    figures = [] if options.feast else [_skipped("greatest rate", "Feast (see --feast)")]
    for (what, method), values in sorted(rates.items()):
        figure = _figure(f"greatest rate, {what}", method, float(np.median(values)), "requests/s")
        if method == OURS:
            plain = float(np.median(rates[what.removesuffix(", Arrow"), PLAIN]))
            figure = figure.model_copy(update={"ratio_to": PLAIN, "ratio": figure.value / plain})
        figures.append(figure)
    return figures


def _greatest(job: LoadSpec, seconds: float) -> float:
    """Requests/s with every connection busy: the best of three numbers of them."""
    load(job, seconds=2, connections=4)
    return max(load(job, seconds=seconds / 2, connections=c).ok_per_s for c in (4, 16, 64))


def _our_load(url: str, n: int, ids: int, fields: tuple[str, ...] = ("text", "vector"), **more: object) -> LoadSpec:
    if ids == 1:
        query = "&".join(f"fields={field}" for field in fields)
        paths = [f"/v1/knowledge/user/{one}?{query}" for one in _drawn(n, 1)[:, 0].tolist()]
        return LoadSpec(url=url, paths=paths, seconds=1, **more)
    bodies = [json.dumps({"kind": "user", "ids": row, "fields": fields}) for row in _drawn(n, ids).tolist()]
    return LoadSpec(url=url + BATCH_PATH, bodies=bodies, seconds=1, **more)


def _plain_load(url: str, n: int, ids: int) -> LoadSpec:
    if ids == 1:
        return LoadSpec(url=url, paths=[f"/user/{one}" for one in _drawn(n, 1)[:, 0].tolist()], seconds=1)
    return LoadSpec(url=f"{url}/users", bodies=[json.dumps({"ids": row}) for row in _drawn(n, ids).tolist()], seconds=1)


def _feast_load(url: str, n: int, ids: int) -> LoadSpec:
    features = ["knowledge:text", "knowledge:vector"]
    bodies = [json.dumps({"features": features, "entities": {"user_id": row}}) for row in _drawn(n, ids).tolist()]
    return LoadSpec(url=f"{url}/get-online-features", bodies=bodies, seconds=1)


def _drawn(n: int, ids: int) -> np.ndarray:
    random = np.random.default_rng(2)
    return np.stack([random.choice(n, ids, replace=False) for _ in range(500 if ids == 1 else 60)])


# --------------------------------------------------------------------------------------------------------------- swaps


def _swaps(folder: Path, options: argparse.Namespace) -> list[Figure]:
    rounds, n = (4 if options.quick else 50), 1000
    workspace = Workspace(folder / "ws")
    _release(workspace, n, "r0")
    with serving(workspace) as url:
        job = _our_load(url, n, 8, ("text",), check_labels=True).model_copy(
            update={"rate": 200.0, "seconds": rounds * 3.2, "connections": 200}
        )
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(load, job)
            for number in range(1, rounds + 1):
                _release(workspace, n, f"r{number}")
                time.sleep(1.2)
                roll_back(workspace)
                time.sleep(1.2)
            result = asking.result()
    failed = result.asked - result.statuses.get("200", 0)
    mixed = result.mixed + sum(len(labels) > 1 for labels in result.labels.values())
    what = f"{rounds} publications, swaps and roll-backs, 200 requests/s"
    return [
        _figure(f"{what}, releases seen", OURS, len(result.labels), "releases"),
        _figure(f"{what}, failed", OURS, failed, f"of {result.asked:,}"),
        _figure(f"{what}, mixed", OURS, mixed, f"of {result.asked:,}"),
        _figure(f"{what}, p99", OURS, result.ok_p99_ms, "ms"),
    ]


# ------------------------------------------------------------------------------------------------------------ overload


def _overload(folder: Path, options: argparse.Namespace) -> list[Figure]:
    n, seconds = 20_000, 8.0 if options.quick else 60.0
    workspace = Workspace(folder / "ws")
    _release(workspace, n)
    with serving(workspace) as url:
        job = _our_load(url, n, BATCH, ("text",))
        capacity = _greatest(job, 6 if options.quick else 20)
        before = _replica_bytes("rss")
        result = load(job, rate=5 * capacity, seconds=seconds, connections=1000)
        after = _replica_bytes("rss")
        recovered = load(job, seconds=3, connections=16)
    unanswered = result.asked - sum(result.statuses.get(s, 0) for s in ("200", "503"))
    return [
        _figure("capacity, 256 texts a request", OURS, capacity, "requests/s"),
        _figure("goodput at 5x", OURS, result.ok_per_s / capacity * 100, "% of capacity"),
        _figure("503 at 5x, p99", OURS, result.refused_p99_ms, "ms"),
        _figure("neither 200 nor 503", OURS, unanswered, f"of {result.asked:,}"),
        _figure("growth of the replica", OURS, (after - before) / 2**20, "MB"),
        _figure("rate right after", OURS, recovered.ok_per_s / capacity * 100, "% of capacity"),
    ]


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(folder: Path, options: argparse.Namespace) -> list[Figure]:
    n = 20_000 if options.quick else 500_000
    workspace = Workspace(folder / "ws")
    _release(workspace, n)
    totals = {}
    for replicas in (1, 3):
        with serving(workspace, replicas) as url:
            load(_our_load(url, n, BATCH), seconds=5 if options.quick else 20, connections=16)
            totals[replicas] = _replica_bytes("pss")
    size = sum(p.stat().st_size for p in workspace.local_path("releases").rglob("*.lmdb"))
    return [
        _figure("size of the release", OURS, size / 2**20, "MB"),
        _figure("memory of one replica (PSS)", OURS, totals[1] / 2**20, "MB"),
        _figure("memory that each further replica adds", OURS, (totals[3] - totals[1]) / 2 / 2**20, "MB"),
    ]


def _replica_bytes(field: str) -> float:
    total = 0.0
    for one in psutil.process_iter(["name", "cmdline"]):
        if "ServeReplica:knowledge" in " ".join(one.info["cmdline"] or ()):
            total += getattr(one.memory_full_info(), field)
    return total


def _figure(measure: str, method: str, value: float, unit: str) -> Figure:
    return Figure(measure=measure, method=method, value=round(float(value), 3), unit=unit)


def _skipped(measure: str, method: str) -> Figure:
    return Figure(measure=measure, method=method, value=float("nan"), unit="skipped")


if __name__ == "__main__":
    main()
