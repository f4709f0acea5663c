"""Runs single shards of a job through the runner, with an engine of the test's own."""

from typing import Any

from owlrec.generation import EchoEngineConfig, EngineConfig, build_engine
from owlrec.generation.engines import Engine
from owlrec.generation.job import GenerateStage, GenerationJob
from owlrec.runner import run_stage
from owlrec.shards import Card, Shard
from owlrec.workspace import Workspace

ECHO = EchoEngineConfig(type="echo")


class StageWithEngine(GenerateStage):
    """The stage with an engine that stands already."""

    def __init__(self, job: GenerationJob, engine: Engine, **more: Any) -> None:
        super().__init__(job, ECHO, **more)
        self.ready_engine = engine

    def open(self, workspace: Workspace, worker: str) -> None:
        super().open(workspace, worker)
        self._engine = self.ready_engine


def run_shard(
    workspace: Workspace,
    job: GenerationJob,
    shard: Shard,
    engine: Engine | EngineConfig = ECHO,
    inputs: str = "i",
    **more: Any,
) -> Card:
    """The card of a shard that this job, asking `engine`, has made of `inputs`."""
    built = build_engine(engine) if isinstance(engine, EngineConfig) else engine
    return run_stage(workspace, StageWithEngine(job, built), {shard: inputs}, **more)[shard.name]


def texts_file(job: GenerationJob, shard: Shard) -> str:
    """The path of a shard's texts, relative to the workspace."""
    return f"{job.folder}/{shard.file()}"


def dead_letters_file(job: GenerationJob, shard: Shard) -> str:
    """The path of a shard's dead letters."""
    return f"{job.folder}/dead/{shard.name}.parquet"


def counted(card: Card, prefix: str) -> dict[str, int]:
    """The card's counts of a prefix, without it."""
    return {name.removeprefix(prefix): n for name, n in card.counts.items() if name.startswith(prefix)}
