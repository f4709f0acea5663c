"""A plan carried out: texts, vectors, a delta release, then every user's state as the answers left it.

The delta has the last behaviors of all users with new events, and texts and vectors of those who were asked about.

Texts and vectors are made by the stages of a whole run, over the plan's prompts. A new text's vector becomes the user's
partition 0 and the vectors before it move on by one (LIBER fuses several), as far as they are kept. Its semantic id
comes from the codebooks of the release that the delta stands on: new ones would leave the ids of all other users
without a meaning. A user whose answer failed keeps the text of the parent release and the short term (see
refresh.partitions).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from owlrec.decoding import DecodingConfig
from owlrec.decoding.release_pools import find_pools
from owlrec.encoding.coded_vectors import quantiser_folder
from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.inputs import KnowledgeTexts
from owlrec.encoding.job import EncodingJob
from owlrec.errors import OwlRecError
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.generation.job import GenerateConfig, GenerationJob
from owlrec.refresh.config import RefreshConfig
from owlrec.refresh.partitions import UserState, freeze, hold, to_table
from owlrec.refresh.plan import Moved, RunStage
from owlrec.refresh.state import DELTA, RefreshPlan, State, delta_card, unfinished_plans
from owlrec.releases.build import ReleaseInfo, build_release, whole_release
from owlrec.releases.interface import KnowledgeStore
from owlrec.releases.lmdb import PartWriter
from owlrec.releases.manifest import chain
from owlrec.releases.release import (
    current_release,
    make_current,
    open_release,
    pointer_history,
    read_codebooks,
)
from owlrec.releases.retention import compact, prune
from owlrec.runner import Pool, Result, Stage, Work
from owlrec.schema import shard_of, vector_matrix, vectors_table
from owlrec.shards import Artifact, Card, Shard, in_threads
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

VECTORS = "knowledge-user"
_FEW_DEAD = 10


def interrupted_plan(workspace: Workspace, base: str, recipe: str) -> RefreshPlan | None:
    """The plan of an interrupted refresh that can still be carried out; others that go on from `base` are removed.

    recipe: fingerprint of the settings, see plan.Planner. One whose delta is current, or was, only has to be settled.
    """
    for plan in unfinished_plans(workspace, base):
        if published_delta(workspace, plan) is not None:
            return plan
        planned_on = (recipe, current_release(workspace), workspace.n_shards("user"))
        if (plan.recipe, plan.parent, plan.n_shards) == planned_on:
            return plan
        workspace.delete_dir(plan.folder)
    return None


# Texts


def job_of_plan(job: GenerationJob, plan: RefreshPlan) -> GenerationJob:
    """The recipe's job with the plan's prompts, and a folder for the texts that follow its base.

    A plan that is made again, since another release became current, finds the answers to the questions that it shares.
    """
    named = fingerprint(job.fingerprint, "refresh after", plan.base)
    return replace(job, fingerprint=named, ready={"user": f"{plan.part('prompts')}/user"})


def too_many_dead(cards: Iterable[Card], config: GenerateConfig) -> bool:
    """Whether so many rows failed that something other than the rows must be wrong.

    A refresh may have a handful of rows, of which a single dead one is a large share. So failures count only from a few
    on; then the run ends with an error, and the next one asks for these rows again.
    """
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
    pools = (find_pools(workspace, release, identity)[0] for release in releases)
    return decoding.model_copy(update={"pools": next(filter(None, pools), None)})


# The delta


def published_delta(workspace: Workspace, plan: RefreshPlan) -> Card | None:
    """What was published of a plan (outputs release and knowledge), if that is current or was before what is."""
    card = Artifact(workspace, plan.folder).card(DELTA)
    return card if card is not None and card.outputs["release"] in pointer_history(workspace) else None


@dataclass(frozen=True)
class Delta:
    """Encodes a plan's texts and publishes them, and behaviors, on top of the release that it was planned on."""

    workspace: Workspace
    moved: Moved
    job: GenerationJob
    texts: Mapping[str, Card]  # the job's shards
    engine: EngineConfig
    encoder: EncoderConfig
    partitions: int  # vectors that a user keeps
    encode: Callable[[EncodingJob], Mapping[str, Card]]  # where the encoder may run

    def publish(self, n_parts: int, pool: Pool) -> str:
        """Makes the delta current and gives its name. pool: where its parts are built.

        Raises ReleaseError where another release than the plan's parent is current by then, PointerHeld on a HOLD,
        EngineError where the encoder does not load.
        """
        workspace, plan, behaviors = self.workspace, self.moved.plan, self.moved.behaviors
        folder, vectors = self._encode() if any(card.rows_out for card in self.texts.values()) else ("", {})
        contents = [f.sha256 for card in (*self.texts.values(), *vectors.values()) for f in card.files.values()]
        contents += [file.sha256 for file in behaviors.values()]
        info = ReleaseInfo(
            fingerprint=fingerprint("delta", plan.fingerprint, self.partitions, sorted(contents)),
            model=getattr(self.engine, "model", self.engine.type),
            encoder=self.encoder.model,
            encoder_identity=self.encoder.identity,
            parent=plan.parent,
            delta=True,
        )
        manifest = whole_release(workspace, info)
        if manifest is None:
            shards = tuple(Shard.of_name(name).number for name in vectors)
            moved = tuple(shard.number for shard in behaviors)
            folders = (self.job.folder, folder, f"{plan.part('interests')}/behaviors")
            delta = DeltaRows(*folders, shards, moved, plan.n_shards, plan.parent, self.partitions)
            manifest = build_release(workspace, info, delta, n_parts, pool=pool)
        Artifact(workspace, plan.folder).finish(delta_card(plan, manifest.name, self.job.folder))
        make_current(workspace, manifest.name, expected=plan.parent)
        return manifest.name

    def _encode(self) -> tuple[str, dict[str, Card]]:
        """The folder of the vectors, with their semantic ids, and the cards of the shards with texts."""
        workspace = self.workspace
        quantiser = read_codebooks(workspace, chain(workspace, self.moved.plan.parent)[-1]).get("user")
        codebooks = quantiser.fingerprint if quantiser else ""
        folder = f"vectors/{fingerprint('delta', self.job.fingerprint, self.encoder.identity, codebooks)[:16]}"
        config = self.encoder
        if quantiser is not None:
            quantiser.save(workspace, quantiser_folder(folder, VECTORS))
        else:
            config = config.model_copy(update={"semantic_ids": None})
        cards = self.encode(EncodingJob(workspace, folder, config, {VECTORS: KnowledgeTexts(self.job.folder, "user")}))
        mine = {Shard(VECTORS, Shard.of_name(n).number).name for n, card in self.texts.items() if card.rows_out}
        return folder, {name: card for name, card in cards.items() if name in mine}


@dataclass(frozen=True)
class DeltaRows:
    """The rows of a delta: renewed texts, their vectors before those of earlier partitions, and behaviors."""

    knowledge: str  # folders, relative to the workspace
    vectors: str
    behaviors: str
    shards: tuple[int, ...]  # of users with new texts, of `n_shards`
    moved: tuple[int, ...]  # those with new behaviors
    n_shards: int
    parent: str
    partitions: int

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """See releases.build.Rows.write."""
        common = min(n_parts, self.n_shards) - 1  # an id's shard and its part have these bits in common
        if numbers := [number for number in self.shards if number & common == part & common]:
            self._write_texts(workspace, writer, part, n_parts, numbers)
        if numbers := [number for number in self.moved if number & common == part & common]:
            files = [f"{self.behaviors}/{Shard('user', number).file()}" for number in numbers]
            rows = pa.concat_tables(in_threads(workspace.read_parquet, files))
            mine = rows.filter(pa.array(shard_of(rows["id"].to_numpy(), n_parts) == part))
            writer.add_behaviors(mine, name=workspace.path(files[0]))

    def _write_texts(
        self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int, numbers: Sequence[int]
    ) -> None:
        texts = [f"{self.knowledge}/{Shard('user', number).file()}" for number in numbers]
        files = [f"{self.vectors}/{Shard(VECTORS, number).file('.arrow')}" for number in numbers]
        knowledge = pa.concat_tables(in_threads(workspace.read_parquet, texts))
        # Not mapped: each file would hold a descriptor.
        vectors = pa.concat_tables(in_threads(lambda f: pa.ipc.open_file(workspace.open_input(f)).read_all(), files))
        mine = [t.filter(pa.array(shard_of(t["id"].to_numpy(), n_parts) == part)) for t in (knowledge, vectors)]
        writer.add_knowledge("user", mine[0], name=workspace.path(texts[0]))
        with open_release(workspace, self.parent, verify=False) as release:
            stacked = stack_partitions(mine[1], release.store, self.partitions)
        if stacked.num_rows:
            writer.add_vectors("user", stacked, name=workspace.path(files[0]))


def stack_partitions(vectors: pa.Table, store: KnowledgeStore, partitions: int) -> pa.Table:
    """The vectors of users with those of their earlier partitions behind them; a column `partition` counts from 0.

    vectors: schema.vectors_schema, one new vector per user, whose codes it keeps; earlier ones have none. store: the
    parent release's.
    """
    ids = vectors["id"].to_numpy()
    rows, owners, numbers = [vector_matrix(vectors)], [ids], [np.zeros(len(ids), dtype=np.int32)]
    if len(ids) and partitions > 1:
        earlier, known = store.own_vectors("user", ids, partitions - 1)
        owner, at = np.nonzero(known)
        rows.append(earlier[owner, at].astype(np.float16))
        owners.append(ids[owner])
        numbers.append((at + 1).astype(np.int32))
    table = vectors_table("user", np.concatenate(owners), np.concatenate(rows))
    codes = pa.concat_arrays(
        [vectors["codes"].combine_chunks(), table["codes"].combine_chunks().slice(0, len(table) - len(ids))]
    )
    column = table.schema.get_field_index("codes")
    table = table.set_column(column, table.schema.field(column), codes)
    return table.append_column("partition", pa.array(np.concatenate(numbers)))


# States


class SettleStage(Stage):
    """Shards with users who were asked about: partitions that were read are frozen, the others held."""

    name = "settle"

    def __init__(self, moved: Moved, knowledge: str) -> None:
        """knowledge: the folder of the answers."""
        plan = moved.plan
        self.folder, self.prompts, self.knowledge = plan.part("settled"), plan.part("prompts"), knowledge
        self.state, self.encoder, self.horizon = moved.state, plan.encoder, plan.horizon

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        partitions = workspace.read_parquet(f"{self.prompts}/partitions/{shard.file()}")
        asked = {row["user_id"]: row for row in partitions.to_pylist()}
        texts = f"{self.knowledge}/{shard.file()}"
        answered = set(workspace.read_parquet(texts, ["id"])["id"].to_pylist()) & asked.keys()
        users: list[UserState] = []
        for user in self.state.read_users(workspace, shard.number, self.encoder):
            row = asked.get(user.user_id)
            if row is None:
                users.append(user)
            elif user.user_id in answered:
                vector_sum = np.array(row["vector_sum"], dtype=np.float32)
                users.append(freeze(user, vector_sum, row["weight"], self.horizon))
            else:
                users.append(hold(user))
        work.check()
        files = {shard.file(): workspace.write_parquet(work.artifact.path(shard.file()), to_table(users))}
        return Result(files, len(users), len(users), counts={"renewed": len(answered)})


def settle(moved: Moved, knowledge: str, release: str, run: RunStage) -> State:
    """The state once the answers are there. release: current by then."""
    stage = SettleStage(moved, knowledge)
    cards = run(stage, dict.fromkeys(moved.prompts, moved.plan.fingerprint), moved.state.calls, "settling")
    shards = dict(moved.state.shards)
    for name in cards:
        shard = Shard.of_name(name)
        update = {"file": f"{stage.folder}/{shard.file()}", "encoder": moved.plan.encoder}
        shards[shard.number] = shards[shard.number].model_copy(update=update)
    renewed = sum(int(card.counts["renewed"]) for card in cards.values())
    counts = moved.state.counts | {"renewed": renewed}
    return moved.state.model_copy(update={"shards": shards, "counts": counts, "release": release})


# Afterwards


def tidy(workspace: Workspace, config: RefreshConfig) -> str:
    """Merges a chain that has become too long and removes old releases; says what it did, "" for nothing.

    A lookup asks each delta of the chain in turn; merging it costs one pass over all texts, and need not happen often.
    A release that became current meanwhile is left alone: the next refresh tidies up.
    """
    current = current_release(workspace)
    if config.compact_after is None or current is None or len(chain(workspace, current)) <= config.compact_after:
        return ""
    try:
        name, removed = compact(workspace).name, prune(workspace, config.keep_releases)
    except OwlRecError as error:  # a full disk or a HOLD does not undo the refresh
        return f"not tidied: {error}"
    return f"deltas merged into release {name}; {len(removed)} old releases removed"
