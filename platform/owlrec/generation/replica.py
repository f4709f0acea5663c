"""The actor of a generation job: one engine, several shards in flight, each claimed before it is begun.

What a user can mend travels to the driver as a row: raised here, it would arrive under pages of Ray's tracebacks.
"""

import asyncio
import gc
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from owlrec.errors import EngineError, OwlRecError
from owlrec.generation import EngineConfig, build_engine
from owlrec.generation.decoder_metrics import DecoderMetrics
from owlrec.generation.engine import EngineStopped
from owlrec.generation.ledger import Claim, Ledger
from owlrec.generation.metrics import GenerationMetrics
from owlrec.generation.shard_work import ShardLost, generate_shard
from owlrec.generation.shards import Job, Shard, ShardManifest, finished_shard
from owlrec.quiet import redirect_output
from owlrec.sources.catalog import ItemCatalog
from owlrec.workspace import Workspace

_GC_THRESHOLD = (200_000, 20, 20)
_ENGINES_LOST = 3  # over one shard, in one run: then the run ends


@dataclass(frozen=True)
class Run:
    """One call of `generate`, as its replicas know it."""

    workspace: Workspace
    job: Job
    engine: EngineConfig
    name: str
    lease_s: float
    log_path: str
    price_per_hour: float | None = None  # of one replica


class Replica:
    """The actor: one engine and the shards that it is at."""

    def __init__(self, run: Run) -> None:
        redirect_output(run.log_path)
        self.run = run
        self.name = uuid.uuid4().hex[:8]
        self.ledger = Ledger(run.workspace, run.job, run.name, run.lease_s)
        self.metrics = GenerationMetrics(self.name, run.price_per_hour)
        self.decoder_metrics: DecoderMetrics | None = None
        self.mistake: OwlRecError | None = None
        try:
            self.catalog = ItemCatalog.load(run.workspace)
            self.engine = build_engine(run.engine, run.job.decoding)
        except OwlRecError as error:
            self.mistake = error
        # A shard makes some ten objects a row, all of which live until it is written: looking through them for cycles
        # as often as Python does by default takes an eighth of a replica's own time.
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLD)

    async def __call__(self, batch: Mapping[str, Any]) -> AsyncIterator[dict[str, list[str]]]:
        for text, again in zip(batch["shard"], batch["retry_dead"], strict=True):
            shard = Shard.model_validate_json(str(text))
            row = {"shard": str(text), "manifest": "", "mistake": "", "engine": self.name, "counters": ""}
            try:
                manifest = await self._do(shard, bool(again))
            except OwlRecError as error:
                row["mistake"] = str(error)
            else:
                row |= {"manifest": manifest.model_dump_json() if manifest else "", "counters": self._count(manifest)}
            yield {name: [value] for name, value in row.items()}
            if row["mistake"]:
                return

    async def _do(self, shard: Shard, again: bool) -> ShardManifest | None:
        """The shard's manifest, or None where another run is at it."""
        if self.mistake is not None:
            raise self.mistake
        claim = self.ledger.claim(shard)
        if claim is None:
            return None
        self.metrics.begin()
        try:
            return await self._claimed(shard, again, claim)
        except ShardLost:
            return None
        except EngineStopped:
            # Only a new process surely frees a device's memory; Ray starts one and hands it this shard again.
            self.ledger.blame()
            os._exit(1)
        finally:
            self.metrics.end()
            self.ledger.release(shard)

    async def _claimed(self, shard: Shard, again: bool, claim: Claim) -> ShardManifest:
        if claim.failures >= _ENGINES_LOST:
            raise EngineError(
                f"{_ENGINES_LOST} engines have ended while they wrote {shard.kind} shard {shard.part}; "
                f"the last one's reason stands in {self.run.log_path}. Run the same command again once it is mended."
            )
        workspace, job = self.run.workspace, self.run.job
        done = await asyncio.to_thread(finished_shard, workspace, job, shard)  # another run may have come before
        if done is not None and not (again and done.rows_dead):
            return done
        return await generate_shard(
            workspace,
            job,
            shard,
            self.engine,
            self.catalog,
            engine_name=self.name,
            retry_dead=done if again else None,
            still_mine=lambda: self.ledger.holds(shard),
        )

    def _count(self, manifest: ShardManifest | None) -> str:
        if manifest is not None and manifest.engine == self.name:
            self.metrics.update(manifest)
        if self.engine.counters is None:
            return ""
        if self.decoder_metrics is None:
            self.decoder_metrics = DecoderMetrics(self.name)
        self.decoder_metrics.update(self.engine.counters)
        return self.engine.counters.model_dump_json()
