"""An exported artifact scores as the trainer did, by the model and by the program, whoever asks."""

import dataclasses
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from owlrec import schema
from owlrec.ctr.artifact import (
    CtrArtifact,
    CtrScorer,
    LiveState,
    ModelCard,
    TableKnowledge,
    User,
    artifact_folder,
    export_program,
    finish_artifact,
    read_card,
    write_artifact,
)
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.batches import SplitBatches
from owlrec.ctr.experiment import Arm, CTRConfig, Trial, grid_folder
from owlrec.ctr.features import Split
from owlrec.ctr.knowledge_tables import KnowledgeTable, OwnArm
from owlrec.ctr.trainer import Trained, TrainingData, export_trial, score, train_one, write_vocabularies
from owlrec.errors import SchemaError, WorkspaceError
from owlrec.ids import BEHAVIOR
from owlrec.releases.parts import encode_behaviors
from owlrec.sources.splits import last_behaviors
from owlrec.workspace import Workspace

torch.set_num_threads(1)
CONFIG = CTRConfig(batch_size=256, epochs=1, embed_dim=8, hidden_dims=(16, 8))
GRID = "0123456789abcdef" * 4
OWN = {
    "items_only": OwnArm(items=("knowledge", "collective")),
    "users_only": OwnArm(users=("knowledge",)),
}
NOBODY, NOTHING = 10**12, 10**13  # ids that no table has


@dataclasses.dataclass
class Exported:
    """A workspace with an artifact, and the trial that it was made of."""

    workspace: Workspace
    folder: str
    trained: Trained
    data: TrainingData

    def scorer(self, *, program: bool = False) -> CtrScorer:
        """The artifact, opened."""
        return CtrScorer.open(self.workspace, self.folder, program=program)

    @cached_property
    def live(self) -> LiveState:
        """With the vectors that the trial read, and the interactions' last behaviors."""
        tables = self.data.tables(self.trained.result.trial)
        store: Any = Behaviors(self.data.features.spec.history_length)
        return LiveState(self.trained.model, TableKnowledge(tables) if tables else None, store)


def interactions() -> pa.Table:
    """Of users 0 to 99, 1 to 15 each; at one moment several, so that order by item decides too."""
    rng = np.random.default_rng(5)
    user = np.repeat(np.arange(100), rng.integers(1, 16, 100))
    rating = rng.integers(1, 6, len(user))
    columns = [user, rng.integers(0, 20, len(user)), rating, rng.integers(0, 9, len(user)), rating > 3, rating < 0]
    columns.append(np.ones(len(user)))
    return pa.table(
        [pa.array(c).cast(f.type) for c, f in zip(columns, schema.INTERACTIONS, strict=True)],
        schema=schema.INTERACTIONS,
    )


class Behaviors:
    """In the place of a release: what the interactions say that users did last."""

    def __init__(self, length: int) -> None:
        rows = last_behaviors(interactions(), length)
        self._rows = dict(zip(rows["id"].to_pylist(), encode_behaviors(rows), strict=True))

    def behaviors(self, ids: Any) -> list[np.ndarray | None]:
        rows = map(self._rows.get, ids)
        return [None if value is None else np.frombuffer(value, BEHAVIOR) for value in rows]


def export(workspace: Workspace, world: Any, backbone: str, arm: Arm) -> Exported:
    for name, table, key in (("users", world.users, "user_id"), ("items", world.items, "item_id")):
        workspace.write_table(name, table, key=key, n_shards=4)
    users, items = world.vectors
    # Some ids have no knowledge: the first tenth of users and the odd items.
    tables = {"user": KnowledgeTable(users.ids[15:], users.vectors[15:], users.as_of[15:]), "item": every_other(items)}
    data = TrainingData(world.data.features, {**world.data.knowledge, "knowledge": tables})
    trial = Trial(backbone=backbone, arm=arm, seed=0, own=OWN.get(arm))
    trained = train_one(trial, data, CONFIG)
    export_trial(workspace, GRID, trained)
    write_vocabularies(workspace, grid_folder(GRID), data.features.vocabularies)
    folder = write_artifact(workspace, GRID, trial, data.features.items)
    made = Exported(workspace, folder, trained, data)
    example = made.scorer().batch(3, [1, 2, 3], made.live)
    workspace.write_bytes(f"{folder}/program.pt2", export_program(made.live.model, example))
    figures = {"valid": trained.result.valid, "test": trained.result.test}
    finish_artifact(workspace, folder, ModelCard(trial=trial, grid=GRID, items=0, reads=None, **figures))
    return made


def every_other(table: KnowledgeTable) -> KnowledgeTable:
    return KnowledgeTable(table.ids[::2], table.vectors[::2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, toy_world: Any) -> Exported:
    return export(Workspace(tmp_path_factory.mktemp("exported")), toy_world, "din", "knowledge")


def requests(world: Any, n: int) -> list[tuple[User, int]]:
    """The first test samples, each as a user who brings their own history."""
    test = world.samples.filter(pc.equal(world.samples["split"], "test")).slice(0, n)
    return [(User.from_sample(r), r["item_id"]) for r in test.to_pylist()]


@pytest.mark.parametrize(
    ("backbone", "arm"),
    [*product(BACKBONES, ("none", "knowledge")), ("din", "items_only"), ("dcnv2", "users_only")],
)
def test_both_paths_score_as_the_trainer_did(workspace: Workspace, toy_world: Any, backbone: str, arm: Arm) -> None:
    made = export(workspace, toy_world, backbone, arm)
    by_model, by_program = (made.scorer(program=p) for p in (False, True))
    asked = requests(toy_world, 25)
    expected = made.trained.test.scores[:25]
    for scorer in (by_model, by_program):
        alone = np.concatenate([scorer.score(user, [item], made.live) for user, item in asked])
        np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
    # A request of many: as the trainer scores the same user's rows one beside the other.
    user, candidates = asked[4][0], np.r_[np.arange(20), 7, 7]
    samples = dataclasses.replace(
        made.data.features.splits["test"].whole().take(np.full(len(candidates), 4)),
        item_ids=candidates,
        items=made.data.features.items.rows(candidates),
    )
    expected = score(
        made.trained.model, SplitBatches(Split.of(samples), made.data.tables(made.trained.result.trial), "cpu")
    )
    for scorer in (by_model, by_program):
        scores = scorer.score(user, candidates, made.live)
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("arm", ["both", "streaming"])
def test_several_vectors_of_an_id_are_fused(workspace: Workspace, toy_world: Any, arm: Arm) -> None:
    made = export(workspace, toy_world, "dcnv2", arm)
    scorer = made.scorer()
    scores = np.concatenate([scorer.score(user, [item], made.live) for user, item in requests(toy_world, 25)])
    np.testing.assert_allclose(scores, made.trained.test.scores[:25], rtol=0, atol=1e-5)


def test_a_user_comes_by_id_with_their_last_behaviors(exported: Exported) -> None:
    scorer, live = exported.scorer(), exported.live
    table = interactions().sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("item_id", "ascending")])
    length = exported.data.features.spec.history_length
    for user_id in (0, 42, 99):
        rows = table.filter(pc.equal(table["user_id"], user_id)).to_pylist()[-length:]
        brought = User(user_id, [r["item_id"] for r in rows], [r["rating"] for r in rows])
        assert scorer.score(user_id, range(20), live).tolist() == scorer.score(brought, range(20), live).tolist()
    # Of user 120 there is a profile and knowledge, but no behavior.
    assert scorer.score(120, [1, 2], live).tolist() == scorer.score(User(120, []), [1, 2], live).tolist()
    longer = scorer.score(User(5, [9, 9, *range(length)]), [3], live)
    assert longer.tolist() == scorer.score(User(5, range(length)), [3], live).tolist()


def test_whom_and_what_nobody_knows_gets_defaults(exported: Exported) -> None:
    scorer, live = exported.scorer(), exported.live
    scores = scorer.score(NOBODY, [3, NOTHING, NOTHING + 1], live)
    assert np.isfinite(scores).all()
    assert scores[1] == scores[2]
    assert scores.tolist() == scorer.score(User(), [3, NOTHING, NOTHING], live).tolist()
    assert scores.tolist() == scorer.score(User(history=[]), [3, NOTHING, NOTHING], live).tolist()
    assert np.isfinite(scorer.score(User(history=[NOTHING, 3], ratings=[None, 99.0]), [3], live)).all()
    assert scorer.score(3, [], live).tolist() == []


def test_an_id_without_knowledge_gets_the_learned_default(exported: Exported, toy_world: Any) -> None:
    adaptor = exported.trained.model.adaptor
    assert adaptor is not None
    with torch.no_grad():
        for kind, tower, known in (("user", adaptor.user[0], 20), ("item", adaptor.item[0], 4)):
            index = ("user", "item").index(kind)
            vector = torch.from_numpy(toy_world.vectors[index].gather(np.array([known]))[0]).float()[:, None]
            known_fields = tower(vector, torch.ones(1, 1, dtype=torch.bool), adaptor.shared)
            missing = tower(torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.bool), adaptor.shared)
            fields = exported.live.fields(kind, np.array([known, 3, NOBODY]))
            np.testing.assert_allclose(fields, torch.cat([known_fields, missing, missing]).numpy(), atol=1e-6)


def test_profile_is_taken_from_the_request_where_it_names_a_field(exported: Exported, toy_world: Any) -> None:
    scorer, live = exported.scorer(), exported.live
    known = toy_world.users["gender"].to_pylist()[7]
    other = {"f": "m", "m": "f"}[known]
    assert scorer.score(User(7, profile={"gender": known}), [3], live) == scorer.score(7, [3], live)
    assert scorer.score(User(7, profile={"gender": other}), [3], live) != scorer.score(7, [3], live)
    assert scorer.score(User(7, profile={"gender": "?"}), [3], live) != scorer.score(7, [3], live)
    assert scorer.score(User(7, profile={"shoes": "44"}), [3], live) == scorer.score(7, [3], live)


def test_a_history_and_ratings_of_two_lengths_are_refused(exported: Exported) -> None:
    scorer, live = exported.scorer(), exported.live
    with pytest.raises(SchemaError, match="2 behaviors, 1 ratings, 2 outcomes"):
        scorer.score(User(1, [1, 2], [3.0]), [3], live)


def test_unfinished_and_damaged_artifacts_are_refused(workspace: Workspace, toy_world: Any) -> None:
    made = export(workspace, toy_world, "dcnv2", "knowledge")
    folder = made.folder
    assert folder == artifact_folder(GRID, made.trained.result.trial)
    assert read_card(workspace, folder).trial == made.trained.result.trial
    path = f"{folder}/profiles/00000000.arrow"
    workspace.write_bytes(path, workspace.read_bytes(path)[:-5])
    with pytest.raises(WorkspaceError, match=r"profiles/00000000.arrow cannot be read"):
        CtrArtifact.open(workspace, folder)
    workspace.delete_file(path)
    with pytest.raises(WorkspaceError, match=r"has 3 user shards.*export"):
        CtrArtifact.open(workspace, folder)
    workspace.write_bytes(f"{folder}/items.safetensors", b"no tensors")
    with pytest.raises(WorkspaceError, match=r"items.safetensors is damaged"):
        CtrArtifact.open(workspace, folder)
    workspace.delete_file(f"{folder}/model.json")
    with pytest.raises(WorkspaceError, match=r"finished artifact"):
        CtrArtifact.open(workspace, folder)
