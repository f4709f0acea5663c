"""How a plan's prompts are asked: as a generation job of its own, drafting from what is there already.

A refresh may have a handful of rows, of which a single dead one is a large share. So failures count only from a few on;
then the run ends with an error, and the next one asks for these rows again. Below that the users keep what they have
(see streaming.partitions).
"""

from collections.abc import Iterable
from dataclasses import replace

from owlrec.decoding import DecodingConfig
from owlrec.decoding.release_pools import find_pools
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.generation.job import GenerateConfig, GenerationJob
from owlrec.releases.release import pointer_history
from owlrec.shards import Card
from owlrec.storage import fingerprint
from owlrec.streaming.journal import Plan
from owlrec.workspace import Workspace

_FEW_DEAD = 10


def job_of_plan(job: GenerationJob, plan: Plan) -> GenerationJob:
    """The recipe's job with a folder and prompts of the plan's own."""
    return replace(job, fingerprint=fingerprint(job.fingerprint, plan.fingerprint), ready={"user": plan.prompts})


def too_many_dead(cards: Iterable[Card], config: GenerateConfig) -> bool:
    """Whether so many rows failed that something other than the rows must be wrong."""
    cards = list(cards)
    dead = sum(card.rows_dead for card in cards)
    return dead > _FEW_DEAD and dead > config.max_dead_share * sum(card.rows_in for card in cards)


def with_latest_pools(workspace: Workspace, engine: EngineConfig, decoding: DecodingConfig) -> DecodingConfig:
    """`decoding`, drafting from the retrieval pools of the newest release that has some, where it names none itself.

    Deltas have no pools: the full release below them holds most of their users' earlier texts.
    """
    if decoding.mode == "off" or decoding.pools or not isinstance(engine, VllmEngineConfig):
        return decoding
    releases, identity = reversed(pointer_history(workspace)), engine.model_identity
    found = (find_pools(workspace, release, identity)[0] for release in releases)
    return decoding.model_copy(update={"pools": next(filter(None, found), None)})
