"""The whole chain at any size: a synthetic world from `prepare` to `publish` and random lookups, stage by stage.

The engine is `echo` and the encoder `hashing`, so that what is measured is OwlRec itself. Every stage is a process of
its own, and twice a second the memory of each process below it is read: RSS, and PSS, which divides a shared page
among those who map it. `--growth` then adds 1 % of users and new behaviors for 5 %, runs the chain again and compares
what the engine was asked and what was encoded with what the texts' own digests say had to be.

    python -m benchmarks.scale                          # 10^4 users, about a minute
    python -m benchmarks.scale --users 1e6 --items 1e5 --interactions 3e7 --world DIR --workspace DIR --growth
    python -m benchmarks.scale --users 1e5 --items 1e4 --interactions 3e6 --workspace s3://bucket/scale
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import yaml
from pandas.util import hash_array

from benchmarks.table import Figure, options_parser, show
from benchmarks.worlds import World, grow, write_world
from owlrec.ids import KINDS, rows_of
from owlrec.ops.console import note
from owlrec.releases import open_release
from owlrec.shards import Artifact, Card, finished_stage
from owlrec.workspace import Workspace

STAGES = ("prepare", "cohorts", "generate", "encode", "publish")
_OUTPUTS = {"generate": "knowledge", "encode": "vectors"}  # of stages whose shards say what was done
LOOKUPS, BATCH = 100_000, 100  # ids, and ids of one request
_ONE_REPLICA_USERS = 20_000  # up to here Ray would start for longer than it works
_SAMPLE_S = 0.5
_MIB = 2**20


def main() -> None:
    """Runs what is asked for, in temporary folders where none are named."""
    parser = options_parser(__doc__)
    parser.add_argument("--users", type=float, default=1e4)
    parser.add_argument("--items", type=float, default=1e3)
    parser.add_argument("--interactions", type=float, default=3e5)
    parser.add_argument("--world", type=Path, help="folder of the source fragments; kept where it is named")
    parser.add_argument("--workspace", help="folder or object store's URI of the run; kept where it is named")
    parser.add_argument("--cohorts", action="store_true", help="build cohorts and ask about them too")
    parser.add_argument("--growth", action="store_true", help="then add users and behaviors and run again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in the recipe: ray.num_cpus=4")
    parser.add_argument("--write-world", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    world = World(int(options.users), int(options.items), int(options.interactions))
    if options.write_world:
        write_world(world, options.world)
        return
    with tempfile.TemporaryDirectory() as folder:
        run = Run(world, options.world or Path(folder) / "world", options.workspace or f"{folder}/workspace")
        figures = list(run.measure(cohorts=options.cohorts, changes=options.set))
        if options.growth:
            figures += run.measure_growth()
    show(f"{world.users:,} users, {world.items:,} items, {world.interactions:,} interactions", figures, options)


class Run:
    """One world and one workspace."""

    def __init__(self, world: World, source: Path, workspace: str) -> None:
        self.world, self.source, self.workspace = world, source, Workspace(workspace)
        self.recipe = source / "recipe.yaml"
        self.stages = STAGES

    def measure(self, *, cohorts: bool, changes: list[str]) -> Iterator[Figure]:
        """Writes the world and the recipe, runs the chain, looks ids up."""
        sizes = [f"--{name}={getattr(self.world, name)}" for name in ("users", "items", "interactions")]
        wrote = measured(["benchmarks.scale", "--write-world", f"--world={self.source}", *sizes])
        yield from self._stage_figures("world", wrote, self.world.interactions)
        self.stages = tuple(s for s in STAGES if cohorts or s != "cohorts")
        self._write_recipe(cohorts, changes)
        yield from self._chain("")
        yield from self._lookups()

    def measure_growth(self) -> Iterator[Figure]:
        """The same chain over a slightly larger world, beside what the texts' digests say it had to do."""
        before = self._digests()
        new, active = grow(self.world, self.source)
        start = time.time()
        yield from self._chain(f"{new:,} users more, {active:,} with new behaviors: ")
        prompts, texts = self._digests().changed_since(before)
        measure = "after growth"
        rows = (
            ("prompts that are new or changed", prompts, "rows"),
            ("prompts asked", self._made("generate", start, "rows_asked"), "rows"),
            ("texts that are new or changed", texts, "rows"),
            ("texts encoded", self._made("encode", start, "encoded"), "rows"),
        )
        for method, value, unit in rows:
            yield Figure(measure=measure, method=method, value=value, unit=unit)

    def _chain(self, prefix: str) -> Iterator[Figure]:
        for stage in self.stages:
            start = time.time()
            measurement = measured([f"pipelines.{stage}", str(self.recipe)])
            yield from self._stage_figures(prefix + stage, measurement, self._rows(stage, start))

    def _rows(self, stage: str, since: float) -> int:
        """How many rows a stage went through: of generate and encode those in shards that were made since a moment."""
        if stage in _OUTPUTS:
            count = "rows_asked" if stage == "generate" else None
            return self._made(stage, since, count)
        counts = {name: int(n) for name, n in self._card(stage).counts.items() if not isinstance(n, str)}
        if stage == "prepare":
            return counts["interactions"]
        return sum(n for name, n in counts.items() if name.startswith("knowledge_") or name.endswith("_members"))

    def _made(self, stage: str, since: float, count: str | None) -> int:
        """A count, or the rows, of the shards that were made since a moment."""
        cards = Artifact(self.workspace, self._card(stage).outputs[_OUTPUTS[stage]]).cards().values()
        return sum(int(c.counts[count]) if count else c.rows_out for c in cards if c.finished >= since)

    def _card(self, stage: str) -> Card:
        card = finished_stage(self.workspace, stage)
        assert card is not None
        return card

    def _stage_figures(self, stage: str, measurement: "Measured", rows: int) -> Iterator[Figure]:
        largest = ", ".join(f"{role} {pss / _MIB:,.0f} MiB" for role, (_, pss) in sorted(measurement.peaks.items()))
        note(f"{stage}: {measurement.seconds:.1f} s, {rows / measurement.seconds:,.0f} rows/s; {largest}")
        yield Figure(measure=stage, method="time", value=round(measurement.seconds, 1), unit="s")
        yield Figure(measure=stage, method="rate", value=round(rows / measurement.seconds), unit="rows/s")
        for role, (rss, pss) in sorted(measurement.peaks.items()):
            yield Figure(measure=stage, method=f"{role}, peak RSS", value=round(rss / _MIB), unit="MiB")
            yield Figure(measure=stage, method=f"{role}, peak PSS", value=round(pss / _MIB), unit="MiB")

    def _write_recipe(self, cohorts: bool, changes: list[str]) -> None:
        replicas = (os.cpu_count() or 1) if self.world.users > _ONE_REPLICA_USERS else 1
        recipe: dict[str, Any] = {
            "name": "scale",
            "scenario": "movies",
            "workspace": self.workspace.root,
            "source": {"type": "table"} | {t: str(self.source / t) for t in ("users", "items", "interactions")},
            "shard_rows": 8192,
            "split": {"cuts": "now"},  # one text per user
            "prompts": {"mode": "both" if cohorts else "individual", "history_tokens": 128},
            "engine": {"type": "echo", "answer_tokens": 200},
            "sampling": {"max_tokens": 256},
            "generate": {"replicas": replicas},
            "encoder": {"model": "hashing", "replicas": replicas},
            "ctr": {"arms": ["none", "knowledge"]},  # no control's vectors: one for each text
        }
        if cohorts:
            recipe["cohorts"] = {}
        for change in changes:
            key, _, value = change.partition("=")
            *sections, name = key.split(".")
            section = recipe
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = yaml.safe_load(value)
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))

    def _lookups(self) -> Iterator[Figure]:
        ids = np.random.default_rng(1).integers(0, self.world.users, LOOKUPS).tolist()
        with open_release(self.workspace) as release:
            start = time.perf_counter()
            missing = sum(answer is None for i in ids for answer in release.store.get("user", [i]))
            single = time.perf_counter() - start
            start = time.perf_counter()
            for at in range(0, LOOKUPS, BATCH):
                release.store.get("user", ids[at : at + BATCH])
            batches = time.perf_counter() - start
        yield Figure(measure="lookup", method="single", value=round(single / LOOKUPS * 1e6, 2), unit="µs per id")
        yield Figure(measure="lookup", method=f"by {BATCH}", value=round(batches / LOOKUPS * 1e6, 2), unit="µs per id")
        yield Figure(measure="lookup", method="misses", value=missing, unit=f"of {LOOKUPS:,}")

    def _digests(self) -> "Digests":
        folder = self._card("generate").outputs["knowledge"]
        columns = ["id", "prompt_sha256", "text"]
        chunks = []
        for number, kind in enumerate(KINDS):
            for name in sorted(self.workspace.entries(folder, kind)):
                ids, *texts = self.workspace.read_parquet(f"{folder}/{kind}/{name}", columns).columns
                chunks.append([ids.to_numpy() * len(KINDS) + number, *(hash_array(np.asarray(t)) for t in texts)])
        keys, prompts, answers = (np.concatenate(column) for column in zip(*chunks, strict=True))
        order = np.argsort(keys)
        return Digests(keys[order], prompts[order], answers[order])


class Digests(NamedTuple):
    """64-bit digests of every row's prompt and text, by ascending key of its kind and id; 24 bytes a row."""

    keys: np.ndarray
    prompts: np.ndarray
    texts: np.ndarray

    def changed_since(self, before: "Digests") -> tuple[int, int]:
        """How many prompts and how many texts are new or differ."""
        rows = rows_of(before.keys, self.keys)
        new = rows < 0
        return tuple(int((new | (now != then[rows])).sum()) for now, then in zip(self[1:], before[1:], strict=True))  # type: ignore[return-value]


class Measured(NamedTuple):
    """One command: how long it took, and the highest (RSS, PSS) in bytes of any one process of each role."""

    seconds: float
    peaks: dict[str, tuple[int, int]]


def measured(command: list[str]) -> Measured:
    """Runs `python -m command`; raises CalledProcessError where it fails."""
    note(f"python -m {' '.join(command)}")
    start = time.perf_counter()
    process = psutil.Popen([sys.executable, "-m", *command])
    peaks: dict[str, tuple[int, int]] = {}
    while True:
        for role, *sizes in _memory(process):
            peaks[role] = tuple(map(max, sizes, peaks.get(role, (0, 0))))  # type: ignore[assignment]
        try:
            code = process.wait(_SAMPLE_S)
            break
        except psutil.TimeoutExpired:
            continue
    if code:
        raise subprocess.CalledProcessError(code, command)
    return Measured(time.perf_counter() - start, peaks)


def _memory(driver: psutil.Process) -> Iterator[tuple[str, int, int]]:
    """(role, RSS, PSS) of the driver and of each process below it that still lives."""
    try:
        processes = [driver, *driver.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            memory, name = process.memory_full_info(), process.name()
        except psutil.Error:
            continue
        role = "driver" if process is driver else "worker" if name.startswith("ray::") else name
        yield role, memory.rss, memory.pss


if __name__ == "__main__":
    main()
