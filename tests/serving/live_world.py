"""A trained model and the release that it was trained on, small: 40 users, 20 items, vectors of eight components."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from worlds import write_world  # type: ignore[import-not-found]

from owlrec.ctr.artifact import ModelCard, finish_artifact, read_by, write_artifact
from owlrec.ctr.batches import SplitTensors
from owlrec.ctr.dataset import center_name, encode_tables, open_features, open_tables, reduce_once, reduced_folders
from owlrec.ctr.experiment import CTRConfig, Trial, grid_folder
from owlrec.ctr.features import UNKNOWN, Histories, SampleFeatures, item_rows
from owlrec.ctr.knowledge_tables import Arm, KnowledgeTable, arm_parts
from owlrec.ctr.trainer import Trained, TrainingData, export_trial, tables_of, train_one
from owlrec.encoding.compression import Projection, Quantizer, SemanticIdConfig, code_vectors, train_quantizer
from owlrec.encoding.vectors import VectorShard, quantizer_folder
from owlrec.releases import ReleaseManifest
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.schema import BEHAVIORS, KNOWLEDGE, MEMBERSHIPS, SAMPLES, vectors_schema
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace, shard_file

USERS, ITEMS, DIM, LENGTH = 40, 20, 8, 3
ENTITY_COUNTS = {"user": USERS, "item": ITEMS}
ENCODER = "toy@256"
CONFIG = CTRConfig(
    batch_size=64,
    epochs=2,
    embed_dim=4,
    hidden_dims=(32, 16),
    knowledge_variance=0.8,
    learning_rate=0.01,
    min_item_count=1,
)
IDS = SemanticIdConfig(levels=2, codes_per_level=4)
Behavior = tuple[int, int, float | None, float]  # time, item, rating, label


def random_vectors(n: int, seed: int) -> np.ndarray:
    """float16 [n, DIM], of length 1."""
    rows = np.random.default_rng(seed).normal(size=(n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@dataclass
class Contents:
    """What a release holds, or a delta."""

    vectors: dict[str, dict[int, list[np.ndarray]]] = field(default_factory=dict)  # kind -> id -> partitions
    behaviors: dict[int, list[Behavior]] = field(default_factory=dict)
    cohorts: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)


def first_contents() -> Contents:
    """Of all users and items but two each; a second partition of even users; two cohorts that everybody is in."""
    contents = Contents()
    for seed, (kind, n) in enumerate(ENTITY_COUNTS.items()):
        newest, older = random_vectors(n, seed), random_vectors(n, seed + 10)
        contents.vectors[kind] = {
            id_: [newest[id_], older[id_]] if kind == "user" and id_ % 2 == 0 else [newest[id_]] for id_ in range(2, n)
        }
        # Every third user has disliked cohort 902, and is in no other; all items are in both.
        contents.cohorts |= {(kind, id_): (901, 902) for id_ in range(n) if kind == "item" or id_ % 3}
        contents.cohorts |= {(kind, id_): (~902,) for id_ in range(0, n, 3) if kind == "user"}
    contents.vectors["cohort"] = {901 + n: [vector] for n, vector in enumerate(random_vectors(2, 5))}
    draw = np.random.default_rng(7)
    for user in range(USERS):
        items = draw.integers(0, ITEMS, LENGTH).tolist()
        contents.behaviors[user] = [
            (100 + n, item, None if n % 2 else 4.0, float(n != 1)) for n, item in enumerate(items)
        ]
    return contents


@dataclass(frozen=True)
class LiveWorld:
    """A workspace with an artifact and its first release."""

    workspace: Workspace
    folder: str  # of the artifact
    trained: Trained
    data: TrainingData
    quantizers: Mapping[str, Quantizer]

    def publish(
        self, contents: Contents, name: str = "first", delta_of: str | None = None, encoder: str = ENCODER
    ) -> ReleaseManifest:
        """Makes contents current."""
        info = ReleaseInfo(
            fingerprint=fingerprint(name),
            model="m",
            encoder="toy",
            encoder_identity=encoder,
            history_length=LENGTH,
            parent=delta_of,
            delta=delta_of is not None,
        )
        defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
        texts, vectors = [], []
        for kind, rows in contents.vectors.items():
            for id_, partitions in rows.items():
                texts.append({**defaults, "kind": kind, "id": id_, "text": f"{kind} {id_}"})
                for number, vector in enumerate(partitions):
                    codes = []
                    if kind in self.quantizers and number == 0:
                        codes = code_vectors(self.quantizers[kind], np.array([id_]), vector[None])[0].tolist()
                    vectors.append({"kind": kind, "id": id_, "vector": vector, "codes": codes, "partition": number})
        behaviors = [
            {"id": user, **{name: [(*row, 0)[at] for row in rows] for at, name in enumerate(BEHAVIORS.names[1:])}}
            for user, rows in contents.behaviors.items()
        ]
        members = [{"kind": kind, "id": id_, "cohorts": named} for (kind, id_), named in contents.cohorts.items()]
        with_partition = vectors_schema(DIM).append(pa.field("partition", pa.int8()))
        return publish(
            self.workspace,
            knowledge=[pa.Table.from_pylist(texts, KNOWLEDGE)],
            vectors=[pa.Table.from_pylist(vectors, with_partition)],
            memberships=[pa.Table.from_pylist(members, MEMBERSHIPS)],
            behaviors=[pa.Table.from_pylist(behaviors, BEHAVIORS)],
            quantizers=None if delta_of else dict(self.quantizers),
            info=info,
        )

    def offline(self, contents: Contents, user: int, candidates: Sequence[int]) -> np.ndarray:
        """The trained model's scores on the same vectors and behaviors, as the trainer computes them: [n].

        contents: all that the release answers with.
        """
        # Items that came later have the code of unknown items, but vectors of their own, in histories too.
        features, model = self.data.features, self.trained.model
        history = np.array([row[1] for row in contents.behaviors.get(user, [])], dtype=np.int64)
        new = np.setdiff1d(history, features.items.ids)
        item_ids = np.concatenate([features.items.ids, new])
        codes = np.concatenate([features.items.codes.astype(np.int64), np.full(len(new), UNKNOWN)])
        model.item_codes = torch.from_numpy(codes)
        trial, knowledge = self.trained.result.trial, self._knowledge(contents)
        tables = tables_of(trial, knowledge, item_ids) if trial.arm != "none" else None
        rows = contents.behaviors.get(user, [])
        n = len(candidates)
        items = item_rows(item_ids, history)
        ratings = np.array([row[2] for row in rows], dtype=float)
        outcomes = features.vocabularies.grades.tokens(ratings, np.array([row[3] for row in rows], dtype=float))
        histories = Histories(
            np.zeros(n, np.int64), np.full(n, len(rows), np.int32), items, outcomes, features.spec.history_length
        )
        ids = np.array(candidates, dtype=np.int64)
        samples = SampleFeatures(
            np.full(n, user),
            ids,
            features.items.rows(ids),
            histories,
            np.zeros((n, 0, 1), np.int32),
            np.zeros((n, 0), np.float32),
            np.zeros(n),
        )
        with torch.inference_mode():
            logits = self.trained.model(SplitTensors(samples, tables, "cpu").batch(torch.arange(n)))
        scores: np.ndarray = logits.double().sigmoid().numpy()
        return scores

    def _knowledge(self, contents: Contents) -> dict[str, dict[str, KnowledgeTable]]:
        """What `encode` and `reduction` would have written of these contents."""
        workspace, grid = self.workspace, self.trained_grid
        projection = Projection.load(workspace, f"{grid_folder(grid)}/vectors/{DIM}", grid)
        tables: dict[str, dict[str, KnowledgeTable]] = {}
        for kind in ENTITY_COUNTS:
            for name, rows in sources_of(contents, kind).items():
                ids, as_of = np.array(sorted(rows), dtype=np.int64).T
                vectors = np.stack([rows[key] for key in sorted(rows)])
                reduced = projection.of(center_name(f"{name}-{kind}")).apply(vectors)
                table = KnowledgeTable(ids, reduced.astype(np.float16), as_of)
                if name == "knowledge" and kind in self.quantizers:
                    quantizer = self.quantizers[kind]
                    codes = code_vectors(quantizer, ids, vectors)[:, :-1]
                    table = replace(table, codes=codes, code_sizes=tuple(quantizer.sizes))
                tables.setdefault(name, {})[kind] = table
        return tables

    @property
    def trained_grid(self) -> str:
        """The fingerprint of its grid."""
        return fingerprint("grid", self.trained.result.arm)


def sources_of(contents: Contents, kind: str) -> dict[str, dict[tuple[int, int], np.ndarray]]:
    """Source -> (id, as_of) -> vector, by hand: a user's earlier partitions are of earlier moments."""
    rows = contents.vectors[kind]
    sources = {"knowledge": {(id_, 0): partitions[0] for id_, partitions in rows.items()}, "collective": {}}
    if kind == "user":
        sources["disliked"] = {}
        sources["streaming"] = {
            (id_, -number): vector
            for id_, partitions in rows.items()
            for number, vector in enumerate(partitions[1:], 1)
        }
    for (named_kind, id_), named in contents.cohorts.items():
        for source, cohorts in (
            ("collective", [c for c in named if c >= 0]),
            ("disliked", [~c for c in named if c < 0]),
        ):
            if named_kind == kind and cohorts:
                mean = np.sum([contents.vectors["cohort"][c][0].astype(np.float32) for c in cohorts], axis=0)
                sources[source][id_, 0] = (mean / np.linalg.norm(mean)).astype(np.float16)
    return sources


def write_live_world(workspace: Workspace, arm: Arm = "knowledge", backbone: str = "din") -> LiveWorld:
    """Trains on the first contents, exports, and publishes them."""
    torch.set_num_threads(1)
    contents, draw, grid = first_contents(), np.random.default_rng(1), fingerprint("grid", arm)
    rows = []
    for user in range(USERS):
        split = "train" if user < 24 else "valid" if user < 32 else "test"
        history = draw.integers(0, ITEMS, LENGTH).tolist()
        for item in range(ITEMS):
            label = float((item + user) % 2)
            rows.append((user, item, label, 1000, history, [1.0, 5.0, None], [0.0, 1.0, 0.0], split))
    ids = {kind: pa.array(range(n), pa.int64()) for kind, n in ENTITY_COUNTS.items()}
    world = SimpleNamespace(
        users=pa.table({"user_id": ids["user"], "raw_id": [str(n) for n in range(USERS)]}),
        items=pa.table({"item_id": ids["item"], "raw_id": [str(n) for n in range(ITEMS)], "title": ["A"] * ITEMS}),
        samples=pa.table([list(column) for column in zip(*rows, strict=True)], schema=SAMPLES),
    )
    write_world(workspace, world, n_shards=1)
    quantizers: dict[str, Quantizer] = {}
    sources: dict[str, dict[str, str]] = {}
    for kind in ENTITY_COUNTS:
        for name, vectors_by_key in sources_of(contents, kind).items():
            known, as_of = np.array(sorted(vectors_by_key), dtype=np.int64).T
            vectors = np.stack([vectors_by_key[key] for key in sorted(vectors_by_key)])
            digests, codes = np.zeros((len(known), 16), np.uint8), np.zeros((len(known), 0), np.uint16)
            shard = VectorShard(kind, known, as_of, vectors, digests, codes, encoder=ENCODER)
            if name == "knowledge" and arm_parts(arm).form != "vectors":
                quantizers[kind] = train_quantizer(vectors.astype(np.float32), IDS)
                quantizers[kind].save(workspace, quantizer_folder("vectors/v", f"{name}-{kind}"))
                coded = code_vectors(quantizers[kind], known, vectors)
                shard = replace(shard, codes=coded, quantizer=quantizers[kind].fingerprint)
            table = shard.table()
            workspace.write_arrow(f"vectors/v/{name}-{kind}/{shard_file(0, '.arrow')}", table, table.schema)
            sources.setdefault(name, {})[kind] = "vectors/v"
    encode_tables(workspace, grid_folder(grid), features={"items": (), "users": ()}, min_item_count=1)
    folders = reduce_once(workspace, sources, CONFIG.knowledge_variance, grid)
    data = TrainingData(open_features(workspace, grid_folder(grid)), open_tables(workspace, folders))
    trial = Trial(backbone=backbone, arm=arm, seed=0)
    trained = train_one(trial, data, CONFIG)
    export_trial(workspace, grid, trained)
    projection = f"{grid_folder(grid)}/vectors/{DIM}" if arm != "none" else None
    folder = write_artifact(workspace, grid, trial, data.features.items, projection=projection)
    figures = {"valid": trained.result.valid, "test": trained.result.test}
    reads = read_by(workspace, trial, reduced_folders(workspace, sources, grid))
    finish_artifact(workspace, folder, ModelCard(trial=trial, grid=grid, items=ITEMS, reads=reads, **figures))
    made = LiveWorld(workspace, folder, trained, data, quantizers)
    made.publish(contents)
    return made
