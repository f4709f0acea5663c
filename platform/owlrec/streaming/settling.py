"""The end of a refresh: the renewed texts as a delta release, then every user's state as the answers left it.

A new text's vector becomes the user's partition 0 and the vectors before it move on by one (LIBER fuses several), as
far as they are kept. Its semantic id comes from the codebooks of the release that the delta stands on: new ones would
leave the ids of all other users without a meaning. A user whose answer failed keeps the text of the parent release and
the short term (see streaming.partitions).
"""

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from owlrec.encoding.coded_vectors import with_codes
from owlrec.encoding.encoder import EncoderConfig
from owlrec.encoding.semantic_ids import code_vectors
from owlrec.encoding.vectors import encode_knowledge
from owlrec.generation import EngineConfig
from owlrec.generation.job import GenerationJob
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.releases.interface import KnowledgeStore
from owlrec.releases.release import Release, open_release
from owlrec.schema import vector_matrix, vectors_table
from owlrec.storage import fingerprint
from owlrec.streaming.journal import ROOT, Plan, Position, commit, sweep
from owlrec.streaming.lineage import parent_release, published_as
from owlrec.streaming.partitions import UserState, freeze, hold
from owlrec.streaming.state import State, read_users, to_table
from owlrec.workspace import Workspace


def publish_delta(
    workspace: Workspace,
    plan: Plan,
    knowledge: pa.Table,
    job: GenerationJob,
    *,
    engine: EngineConfig,
    encoder: EncoderConfig,
    partitions: int,
) -> str:
    """Encodes the renewed texts and publishes them on top of the current release; gives the delta's name.

    Does nothing where that was done before, even if another release has become current since.
    knowledge: schema.KNOWLEDGE, of the plan's `job`. partitions: vectors that a user keeps.
    Raises ReleaseError where the plan's parent was rolled back meanwhile, EngineError where the encoder does not load.
    """
    print_ = fingerprint("delta", job.fingerprint, encoder.identity)
    if published := published_as(workspace, print_):
        return published
    parent = parent_release(workspace, plan.parent, encoder.model)
    vectors = _encode(workspace, knowledge, encoder, f"vectors/{print_[:16]}/knowledge-user.parquet")
    with open_release(workspace, parent.name, verify=False) as release:
        stacked = stack_partitions(_coded(vectors, release), release.store, partitions)
    info = ReleaseInfo(
        fingerprint=print_,
        model=getattr(engine, "model", engine.type),
        encoder=encoder.model,
        parent=parent.name,
        delta=True,
    )
    return publish(workspace, knowledge=[knowledge], vectors=[stacked] if stacked.num_rows else [], info=info).name


def _encode(workspace: Workspace, knowledge: pa.Table, encoder: EncoderConfig, file: str) -> pa.Table:
    """The texts' vectors, from the file that an interrupted refresh has left or else into it."""
    if not workspace.exists(file):
        workspace.write_parquet(file, encode_knowledge(knowledge, encoder.load()))
    return workspace.read_parquet(file)


def _coded(vectors: pa.Table, release: Release) -> pa.Table:
    """The users' vectors with the semantic ids that a release's own quantiser gives them, where it has one."""
    quantiser = release.quantisers().get("user")
    if quantiser is None or not vectors.num_rows:
        return vectors
    return with_codes(vectors, code_vectors(quantiser, vectors["id"].to_numpy(), vector_matrix(vectors)))


def stack_partitions(vectors: pa.Table, store: KnowledgeStore, partitions: int) -> pa.Table:
    """The vectors of users with those of their earlier partitions behind them; a column `partition` counts from 0.

    vectors: schema.vectors_schema, one new vector a user, whose codes it keeps; earlier ones have none. store: the
    parent release's.
    """
    ids = vectors["id"].to_numpy()
    parts, owners, numbers = [vector_matrix(vectors)], [ids], [np.zeros(len(ids), dtype=np.int32)]
    if len(ids) and partitions > 1:
        earlier, known = store.own_vectors("user", ids, partitions - 1)
        rows, at = np.nonzero(known)
        parts.append(earlier[rows, at].astype(np.float16))
        owners.append(ids[rows])
        numbers.append((at + 1).astype(np.int32))
    table = vectors_table("user", np.concatenate(owners), np.concatenate(parts))
    codes = vectors["codes"].to_pylist() + [[]] * (len(table) - len(ids))
    table = table.set_column(3, "codes", pa.array(codes, pa.list_(pa.uint16())))
    return table.append_column("partition", pa.array(np.concatenate(numbers)))


def finish(workspace: Workspace, plan: Plan, release: str, answered: Collection[int]) -> Position:
    """Ends a plan whose texts, where it asked for any, are in force.

    release: the delta, or the parent where nothing was published. answered: the users whose texts were renewed.
    """
    state = _settle(workspace, plan, set(answered))
    if workspace.exists(plan.dead):
        letters = workspace.read_parquet(plan.dead)
        workspace.write_parquet(f"{ROOT}/dead/{plan.fingerprint[:16]}.parquet", letters)
    position = commit(workspace, plan, state, release)
    sweep(workspace, position)
    return position


def _settle(workspace: Workspace, plan: Plan, answered: set[int]) -> State:
    """The plan's state with the partitions that were read, frozen, and those that were not, held."""
    shards = dict(plan.state.shards)
    for shard in plan.asked:
        frozen = {row["user_id"]: row for row in workspace.read_parquet(plan.partition_file(shard)).to_pylist()}
        users: list[UserState] = []
        for user in read_users(workspace, plan.state, shard, plan.encoder):
            row = frozen.get(user.user_id)
            if row is None:
                users.append(user)
            elif user.user_id in answered:
                vector_sum = np.array(row["vector_sum"], dtype=np.float32)
                users.append(freeze(user, vector_sum, row["weight"], plan.horizon))
            else:
                users.append(hold(user))
        file = f"{plan.states}/settled-{shard:05d}.parquet"
        workspace.write_parquet(file, to_table(users))
        shards[shard] = shards[shard].model_copy(update={"file": file, "encoder": plan.encoder})
    return plan.state.model_copy(update={"shards": shards})
