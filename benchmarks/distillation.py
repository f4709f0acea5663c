"""What a CTR model gains by an LLM's probabilities where labels are few, with a teacher that knows the truth.

The planted world (benchmarks.planted) is written as tables in which a tenth of the train samples, drawn at random, have
a label. Users and items say their traits in a profile field and in their titles, so a teacher can read them off the
very questions that `owlrec ranker score-pairs` asks, and answers the probability that the world drew its labels by. The
models are compared on one test split: a tenth of the labels alone, a tenth and the teacher, all labels; and, as a
control, a tenth and answers at random. A probability tells more than a label that was drawn by it, so the teacher may
beat all labels. What an LLM would reach is another question: this measures the path, not a model.
"""

import argparse
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch

from benchmarks.planted import GENRE_LOGITS, TRAIT_LOGIT, PlantedWorld, plant, trait_vectors
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.dataset import encode_tables, open_features
from owlrec.ctr.experiment import CTRConfig, DistillationConfig, SoftLabels, Trial
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.encoding.vectors import EncoderConfig
from owlrec.generation import EchoEngineConfig
from owlrec.generation.engines import Completion, Engine, EngineConfig, SamplingConfig
from owlrec.ids import shard_of
from owlrec.ops.console import note
from owlrec.ranking.question_sets import ScorePairs, Teacher, pair_inputs
from owlrec.ranking.samples import RankingConfig, TuningDataConfig
from owlrec.runner import run_stage
from owlrec.scenario import get_scenario
from owlrec.schema import INTERACTIONS, SAMPLE_ROWS
from owlrec.sources.splits import SplitConfig
from owlrec.workspace import Workspace, table_file
from owlrec_decoding import DecodingConfig

USERS, ITEMS, SEEDS = 1000, 100, (0, 1, 2)
SHARE = 0.1  # of the train samples that have a label
PAIRS = DistillationConfig(alpha=0.5, unlabeled=18)  # as many as a user has lost labels
CONFIG = CTRConfig(embed_dim=8, hidden_dims=(32, 16), batch_size=256, learning_rate=5e-3, epochs=15, patience=3)
_SHARDS = 4
_MARK = re.compile(r"\b([a-d])([0-9])\b")  # a trait and its pole; d: the genre


class PlantedTeacherConfig(EngineConfig):
    """A teacher that knows how the world draws its labels."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type",)

    type: Literal["planted-teacher"] = "planted-teacher"

    @property
    def model_identity(self) -> str:
        """See EngineConfig.model_identity."""
        return "planted-teacher"

    def start(self, decoding: DecodingConfig) -> "PlantedTeacher":
        """See EngineConfig.start."""
        return PlantedTeacher()

    def token_counter(self) -> Callable[[str], int]:
        """A token is what stands between blanks."""
        return lambda text: len(text.split())


class PlantedTeacher(Engine):
    """Reads the marks of user and item in a question, and nothing else."""

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        """It has no words."""
        raise NotImplementedError

    async def first_tokens(self, system: str, prompt: str) -> list[tuple[str, float]]:
        """See Engine.first_tokens."""
        profile, question = prompt.split("\n", 1)
        user, item = dict(_MARK.findall(profile)), dict(_MARK.findall(question))
        shared = sum(1 if user[trait] == item[trait] else -1 for trait in "abc")
        yes = 1 / (1 + math.exp(-(GENRE_LOGITS[int(item["d"])] + TRAIT_LOGIT * shared)))
        return [("Yes", math.log(yes)), ("No", math.log1p(-yes))]

    def count_tokens(self, text: str) -> int:
        """What stands between blanks."""
        return len(text.split())


MODELS = {
    "labels": "a tenth of the labels",
    "guessed": "a tenth and answers at random",
    "taught": "a tenth and the teacher",
    "all": "all labels",
}
TEACHERS = {"guessed": EchoEngineConfig(type="echo"), "taught": PlantedTeacherConfig()}


def write_planted(workspace: Workspace, world: PlantedWorld, share: float, seed: int) -> None:
    """The world's tables, with a share of its train samples, drawn by the seed. Histories are empty; users and items
    carry their traits as words.
    """
    genres = [int(name.rpartition(" ")[2]) for name in world.items["genre"].to_pylist()]
    titles = [f"Film {_marks(t)} d{g}" for t, g in zip(world.item_traits, genres, strict=True)]
    items = world.items.set_column(world.items.column_names.index("title"), "title", pa.array(titles))
    workspace.write_table("items", items, key="item_id", n_shards=_SHARDS)
    users = world.users.append_column("taste", pa.array(list(map(_marks, world.user_traits))))
    workspace.write_table("users", users, key="user_id", n_shards=_SHARDS)
    train = world.samples["split"].to_numpy() == "train"
    kept = ~train | (np.random.default_rng(seed).random(len(train)) < share)
    rows = world.samples.filter(pa.array(kept)).select(["user_id", "item_id", "label", "split"])
    rows = rows.append_column("timestamp", pa.array(np.flatnonzero(kept)))
    shards = shard_of(rows["user_id"].to_numpy(), _SHARDS)
    for number in range(_SHARDS):
        own = rows.filter(pa.array(shards == number))
        none = pa.array(np.zeros(len(own)), pa.int32())
        own = own.append_column("weight", pa.array(np.ones(len(own))))
        samples = own.append_column("history_start", none).append_column("history_end", none)
        workspace.write_parquet(table_file("samples", number), samples.select(SAMPLE_ROWS.names).cast(SAMPLE_ROWS))
        log = own.drop_columns("split").append_column("split", pa.nulls(len(own), pa.int8()))
        log = log.append_column("rating", pa.nulls(len(own), pa.float32()))
        workspace.write_parquet(table_file("interactions", number), log.select(INTERACTIONS.names).cast(INTERACTIONS))


def model_aucs(world: PlantedWorld, pairs: DistillationConfig, config: CTRConfig, seed: int) -> dict[str, float]:
    """Test AUC of the models, by MODELS. seed: of the labels that are kept and of training."""
    aucs = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            workspace = Workspace(folder)
            write_planted(workspace, world, 1.0 if name == "all" else SHARE, seed)
            soft_labels = _soft_labels(workspace, TEACHERS[name], pairs) if name in TEACHERS else None
            encode_tables(
                workspace,
                "grid",
                features={"items": ("genre",), "users": ()},
                min_item_count=1,
                soft_labels=soft_labels,
            )
            kind_tables = {
                "user": trait_vectors(world.user_traits, seed=1),
                "item": trait_vectors(world.item_traits, seed=2),
            }
            data = TrainingData(open_features(workspace, "grid"), {"knowledge": kind_tables})
            trial = Trial(backbone="dcnv2", arm="knowledge", seed=seed)
            aucs[name] = train_one(trial, data, config).result.test.auc
    return aucs


def _soft_labels(workspace: Workspace, engine: EngineConfig, pairs: DistillationConfig) -> SoftLabels:
    """What `ranker score-pairs` does."""
    scenario = get_scenario("movies").model_copy(update={"profile_fields": ("taste",)})
    ranking = RankingConfig(data=TuningDataConfig(shown=("recent",)))
    teacher = Teacher(engine, ranking, scenario, EncoderConfig())
    run_stage(workspace, ScorePairs(teacher, pairs, SplitConfig(), None), pair_inputs(workspace, pairs))
    return SoftLabels(teacher.folder, pairs.alpha)


def _marks(traits: Sequence[int]) -> str:
    """Such as "a1 b0 c1"."""
    return " ".join(f"{name}{int(trait > 0)}" for name, trait in zip("abc", traits, strict=True))


def _figures(options: argparse.Namespace) -> Iterator[Figure]:
    users = USERS // 4 if options.quick else USERS
    world, seeds = plant(users, ITEMS), []
    for seed in SEEDS[:1] if options.quick else SEEDS:
        seeds.append(model_aucs(world, PAIRS, CONFIG, seed))
        note(", ".join(f"{MODELS[name]}: {auc:.4f}" for name, auc in seeds[-1].items()) + f" (seed {seed})")
    for name, method in MODELS.items():
        aucs = [seed_aucs[name] for seed_aucs in seeds]
        gaps = [
            (seed_aucs[name] - seed_aucs["labels"]) / (seed_aucs["all"] - seed_aucs["labels"]) for seed_aucs in seeds
        ]
        each = ", ".join(f"{auc:.4f}" for auc in aucs)
        closed = f"; share of the gap {', '.join(f'{gap:.2f}' for gap in gaps)}" if name == "taught" else ""
        yield Figure(
            measure=f"planted traits, {users:,} users, DCN-V2 with knowledge",
            method=method,
            value=round(statistics.fmean(aucs), 4),
            unit=f"test AUC (seeds {each}{closed})",
        )


def main() -> None:
    """Compares the three models."""
    options = options_parser(__doc__).parse_args()
    torch.set_num_threads(1)  # layers so small gain nothing by a second one
    show("Distillation", list(_figures(options)), options)


if __name__ == "__main__":
    main()
