"""Carries out a plan: texts, vectors, a delta release, then every user's new state.

The delta has the latest behaviors of all users with new events, and texts and vectors of those with LLM calls.

The stages of a full run make texts and vectors from the plan's prompts. The vector of a user's newest text
becomes partition 0 and earlier ones shift by one (LIBER fuses several), up to the limit. Its semantic id comes
from the codebooks of the delta's base release, because new codebooks would make all other ids
meaningless. A user whose call failed keeps the text of the parent release and the short term (see refresh.partitions);
an item's failed call is retried by the next refresh (see refresh.items).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from owlrec.encoding.inputs import Input, KnowledgeTexts
from owlrec.encoding.stage import EncodingJob
from owlrec.encoding.vectors import PARTITIONS, EncoderConfig, VectorShard, partitions_folder, quantizer_folder
from owlrec.errors import OwlRecError
from owlrec.generation import EngineConfig
from owlrec.generation.job import GenerateConfig, GenerationJob
from owlrec.ids import Kind, run_starts, shard_of
from owlrec.refresh.items import UpsertItems
from owlrec.refresh.plan import Moved, RunStage
from owlrec.refresh.state import (
    DELTA,
    RefreshPlan,
    State,
    UserState,
    as_interest,
    delta_card,
    freeze,
    hold,
    to_table,
    unfinished_plans,
)
from owlrec.releases.build import ReleaseInfo, build_release, whole_release
from owlrec.releases.format import KnowledgeStore, chain
from owlrec.releases.parts import PartWriter
from owlrec.releases.release import (
    current_release,
    make_current,
    open_release,
    pointer_history,
    read_codebooks,
)
from owlrec.releases.retention import compact, prune
from owlrec.runner import Pool, Result, Stage, Work
from owlrec.schema import newest, vector_matrix, vectors_table
from owlrec.shards import Artifact, Card, Shard, in_threads
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

_KINDS: tuple[Kind, ...] = ("item", "user")  # as keys ascend
_FEW_DEAD = 10
COMPACT_AFTER = 24  # deltas on top of a full release: a day of hourly refreshes
KEEP_RELEASES = 3  # previously current releases kept for roll-back; younger than an hour are always kept


def interrupted_plan(workspace: Workspace, base: str, recipe: str) -> RefreshPlan | None:
    """The plan of an interrupted refresh that can still be carried out; removes others based on `base`.

    recipe: fingerprint of the settings, see plan.RefreshPlanner. One whose delta is current, or was, only has to
    be settled.
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
    """The recipe's job with the plan's prompts, and a folder for the texts on top of its base.

    A repeated plan, after another release became current, reuses the answers to shared prompts.
    """
    named = fingerprint(job.fingerprint, "refresh after", plan.base)
    ready = {"item": f"{plan.part('items')}/prompts/item", "user": f"{plan.part('prompts')}/user"}
    return replace(job, fingerprint=named, ready=ready)


def too_many_dead(cards: Iterable[Card], config: GenerateConfig) -> bool:
    """Whether so many rows failed that the fault must be outside the rows.

    A refresh may have a handful of rows, of which a single dead one is a large share, so failures count only from a few
    on. Then the run ends with an error, and the next one retries these rows.
    """
    cards = list(cards)
    dead = sum(card.rows_dead for card in cards)
    return dead > _FEW_DEAD and dead > config.max_dead_share * sum(card.rows_in for card in cards)


# The delta


@dataclass(frozen=True)
class Renewed:
    """Results of a plan."""

    release: str  # current at that time
    knowledge: str = ""  # folders of texts and vectors, relative to the workspace; "" for none
    vectors: str = ""
    user_shards: tuple[int, ...] = ()  # shards of users with vectors


def published_delta(workspace: Workspace, plan: RefreshPlan) -> Renewed | None:
    """The published delta of a plan, if it is current or an ancestor of the current release."""
    card = Artifact(workspace, plan.folder).card(DELTA)
    if card is None or card.outputs["release"] not in pointer_history(workspace):
        return None
    return Renewed(**card.outputs, user_shards=tuple(json.loads(str(card.counts["user_shards"]))))


@dataclass(frozen=True)
class Delta:
    """Encodes a plan's texts and publishes them, and behaviors, on top of the plan's base release."""

    workspace: Workspace
    moved: Moved
    job: GenerationJob
    texts: Mapping[str, Card]  # the job's shards
    engine: EngineConfig
    encoder: EncoderConfig
    partitions: int  # vectors kept per user
    encode: Callable[[EncodingJob], Mapping[str, Card]]  # runs the encoder

    def publish(self, n_parts: int, pool: Pool) -> Renewed:
        """Makes the delta current. pool: builds its parts.

        Raises ReleaseError if another release than the plan's parent is current by then, PointerHeld on a HOLD, and
        EngineError if the encoder does not load.
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
            shards = tuple(Shard.from_name(name) for name, card in self.texts.items() if card.rows_out)
            folders = (self.job.folder, folder, f"{plan.part('interests')}/behaviors")
            delta = DeltaRows(*folders, shards, tuple(behaviors), plan.parent, self.partitions)
            manifest = build_release(workspace, info, delta, n_parts, pool=pool)
        numbers = [Shard.from_name(name).number for name in vectors if name.startswith("knowledge-user/")]
        outputs = {"release": manifest.name, "knowledge": self.job.folder, "vectors": folder}
        Artifact(workspace, plan.folder).finish(delta_card(plan, outputs, numbers))
        make_current(workspace, manifest.name, expected=plan.parent)
        return Renewed(**outputs, user_shards=tuple(numbers))

    def _encode(self) -> tuple[str, dict[str, Card]]:
        """Folder of the vectors, with their semantic ids, and the cards of the shards with texts."""
        workspace, identity = self.workspace, self.encoder.identity
        quantizers = read_codebooks(workspace, chain(workspace, self.moved.plan.parent)[-1])
        codebooks = [quantizers[kind].fingerprint if kind in quantizers else "" for kind in _KINDS]
        folder = f"vectors/{fingerprint('delta', self.job.fingerprint, identity, codebooks)[:16]}"
        inputs: dict[str, Input] = {}
        for kind in _KINDS:
            name = f"knowledge-{kind}"
            if kind in quantizers:
                quantizers[kind].save(workspace, quantizer_folder(folder, name))
            if any(Shard.from_name(shard).kind == kind for shard in self.texts):
                inputs[name] = KnowledgeTexts(self.job.folder, kind)
        # Fits no codebooks; uses the existing ones.
        config = self.encoder.model_copy(update={"semantic_ids": None})
        cards = self.encode(EncodingJob(workspace, folder, config, inputs))
        texts = {Shard.from_name(name): card for name, card in self.texts.items() if card.rows_out}
        mine = {Shard(f"knowledge-{shard.kind}", shard.number).name for shard in texts}
        return folder, {name: card for name, card in cards.items() if name in mine}


@dataclass(frozen=True)
class DeltaRows:
    """Rows of a delta: new texts of items and users, their vectors before those of earlier partitions, behaviors."""

    knowledge: str  # folders, relative to the workspace
    vectors: str
    behaviors: str
    shards: tuple[Shard, ...]  # of items and users with new texts
    moved: tuple[Shard, ...]  # of users with new behaviors
    parent: str
    partitions: int

    def write(self, workspace: Workspace, writer: PartWriter, part: int, n_parts: int) -> None:
        """See releases.build.ReleaseRows.write."""
        for kind in _KINDS:
            common = min(n_parts, workspace.n_shards(kind)) - 1  # bits shared by an id's shard and its part
            mine = [s for s in self.shards if s.kind == kind and s.number & common == part & common]
            if mine:
                self._write_texts(workspace, writer, kind, mine, part, n_parts)
        common = min(n_parts, workspace.n_shards("user")) - 1
        if files := [f"{self.behaviors}/{s.file()}" for s in self.moved if s.number & common == part & common]:
            rows = pa.concat_tables(in_threads(workspace.read_parquet, files))
            mine_of_part = rows.filter(pa.array(shard_of(rows["id"].to_numpy(), n_parts) == part))
            writer.add_behaviors(mine_of_part, name=workspace.path(files[0]))

    def _write_texts(
        self, workspace: Workspace, writer: PartWriter, kind: Kind, shards: Sequence[Shard], part: int, n_parts: int
    ) -> None:
        texts = [f"{self.knowledge}/{shard.file()}" for shard in shards]
        files = [f"{self.vectors}/knowledge-{kind}/{shard_file(shard.number, '.arrow')}" for shard in shards]
        knowledge = pa.concat_tables(in_threads(workspace.read_parquet, texts))
        # Not mapped: each file would keep a descriptor.
        vectors = pa.concat_tables(in_threads(lambda f: pa.ipc.open_file(workspace.open_input(f)).read_all(), files))
        knowledge, vectors = (
            t.filter(pa.array(shard_of(t["id"].to_numpy(), n_parts) == part)) for t in (knowledge, vectors)
        )
        writer.add_knowledge(kind, newest(knowledge), name=workspace.path(texts[0]))
        if kind == "user":
            with open_release(workspace, self.parent, verify=False) as release:
                vectors = stack_partitions(vectors, release.store, self.partitions)
        if vectors.num_rows:
            writer.add_vectors(kind, vectors, name=workspace.path(files[0]))


def stack_partitions(vectors: pa.Table, store: KnowledgeStore, partitions: int) -> pa.Table:
    """Vectors of users followed by those of their earlier partitions; a column `partition` counts from 0.

    vectors: schema.vectors_schema, the rows of a user together, oldest first. Earlier ones have no codes. store: the
    parent release's. partitions: maximum kept per user.
    """
    given = vectors["id"].to_numpy()
    ids, first, place, counts = np.unique(given, return_index=True, return_inverse=True, return_counts=True)
    number = ((first + counts - 1)[place] - np.arange(len(given))).astype(np.int32)
    kept = number < partitions
    new = vectors.filter(pa.array(kept))
    rows, owners, numbers = [vector_matrix(new)], [given[kept]], [number[kept]]
    if len(ids) and partitions > 1:
        earlier, known = store.own_vectors("user", ids, partitions - 1)
        owner, at = np.nonzero(known)
        moved = at + counts[owner]
        owner, at, moved = (column[moved < partitions] for column in (owner, at, moved))
        rows.append(earlier[owner, at].astype(np.float16))
        owners.append(ids[owner])
        numbers.append(moved.astype(np.int32))
    table = vectors_table("user", np.concatenate(owners), np.concatenate(rows))
    codes = [new["codes"].combine_chunks(), table["codes"].combine_chunks().slice(0, len(table) - len(new))]
    column = table.schema.get_field_index("codes")
    table = table.set_column(column, table.schema.field(column), pa.concat_arrays(codes))
    return table.append_column("partition", pa.array(np.concatenate(numbers)))


# States


class SavePartitions(Stage):
    """Shards of users with new texts: stores each text's vector by user and as_of, next to those of earlier refreshes.

    A text's vector stays there after the release has dropped it, because samples of any moment read earlier vectors.
    """

    name = "partitions"

    def __init__(self, vectors: str, encoder: EncoderConfig) -> None:
        """vectors: folder of the plan's vectors."""
        self.folder, self.vectors = partitions_folder(encoder.identity), vectors

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, number = work.workspace, work.shard.number
        new = VectorShard.read(workspace, f"{self.vectors}/knowledge-user/{shard_file(number, '.arrow')}")
        tables = [replace(new, codes=new.codes[:, :0], quantizer="").table()]
        path = work.artifact.path(work.shard.file(".arrow"))
        if workspace.entry(path) is not None:
            tables.append(VectorShard.read(workspace, path).table())
        table = pa.concat_tables(tables)
        keys = [table["id"].to_numpy(), table["as_of"].to_numpy()]
        order = np.lexsort((np.arange(len(table)), *keys[::-1]))
        first = run_starts(*(key[order] for key in keys)) == np.arange(len(table))
        table = table.take(pa.array(order[first])).combine_chunks()
        work.check()
        files = {work.shard.file(".arrow"): workspace.write_arrow(path, table, table.schema)}
        return Result(files, len(table), len(table))


class SettleStage(Stage):
    """Shards with users in the plan: freezes the partitions that were read and holds the others."""

    name = "settle"

    def __init__(self, moved: Moved, knowledge: str) -> None:
        """knowledge: folder of the answers."""
        plan = moved.plan
        self.folder, self.prompts, self.knowledge = plan.part("settled"), plan.part("prompts"), knowledge
        self.state, self.encoder, self.horizon = moved.state, plan.encoder, plan.horizon

    def run(self, work: Work) -> Result:
        """See Stage.run."""
        workspace, shard = work.workspace, work.shard
        asked: dict[int, list[dict[str, Any]]] = {}
        for row in workspace.read_parquet(f"{self.prompts}/partitions/{shard.file()}").to_pylist():
            asked.setdefault(row["user_id"], []).append(row)
        texts = workspace.read_parquet(f"{self.knowledge}/{shard.file()}", ["id", "as_of"])
        answered = set(zip(texts["id"].to_pylist(), texts["as_of"].to_pylist(), strict=True))
        users, renewed = list[UserState](), 0
        for user in self.state.read_users(workspace, shard.number, self.encoder):
            for row in asked.get(user.user_id, ()):
                if (user.user_id, row["as_of"]) not in answered:
                    user = hold(user)
                    break
                interest = as_interest(np.array(row["interest"], dtype=np.float32))
                user = freeze(user, row["length"], row["as_of"], interest, self.horizon)
                renewed += 1
            users.append(user)
        work.check()
        files = {shard.file(): workspace.write_parquet(work.artifact.path(shard.file()), to_table(users))}
        return Result(files, len(users), len(users), counts={"renewed": renewed})


def settle(moved: Moved, renewed: Renewed, encoder: EncoderConfig, run: RunStage) -> State:
    """The state once all answers exist and items and partitions are in their final place."""
    plan, calls = moved.plan, moved.state.calls + moved.state.item_calls
    items = dict.fromkeys(moved.new_items, plan.fingerprint)
    item_cards = run(UpsertItems(plan, renewed.knowledge), items, len(items), "settling items")
    with_vectors = {Shard(PARTITIONS, number): plan.fingerprint for number in renewed.user_shards}
    run(SavePartitions(renewed.vectors, encoder), with_vectors, calls, "storing partitions")
    stage = SettleStage(moved, renewed.knowledge)
    users = {shard: plan.fingerprint for shard in moved.prompts if shard.kind == "user"}
    cards = run(stage, users, calls, "settling")
    shards = dict(moved.state.shards)
    for name in cards:
        shard = Shard.from_name(name)
        update = {"file": f"{stage.folder}/{shard.file()}", "encoder": plan.encoder}
        shards[shard.number] = shards[shard.number].model_copy(update=update)
    counts = {
        "renewed": sum(int(card.counts["renewed"]) for card in cards.values()),
        "items_renewed": sum(int(card.counts["items_renewed"]) for card in item_cards.values()),
    }
    counts = moved.state.counts | counts
    return moved.state.model_copy(update={"shards": shards, "counts": counts, "release": renewed.release})


# Afterwards


def tidy(workspace: Workspace, compact_after: int = COMPACT_AFTER) -> str:
    """Merges a chain of more than `compact_after` deltas and removes old releases; returns a summary, "" for nothing.

    A lookup reads each delta of the chain in turn; merging it costs one pass over all texts and is rarely needed.
    If another release has become current meanwhile, it does nothing: the next refresh does the cleanup.
    """
    current = current_release(workspace)
    if current is None or len(chain(workspace, current)) <= compact_after:
        return ""
    try:
        name, removed = compact(workspace).name, prune(workspace, KEEP_RELEASES)
    except OwlRecError as error:  # a full disk or a HOLD does not undo the refresh
        return f"cleanup failed: {error}"
    return f"deltas merged into release {name}; {len(removed)} old releases removed"
