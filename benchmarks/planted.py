"""A world in which ids cannot tell what knowledge tells: what a CTR model must find there is known beforehand.

Users and items have traits, each one of two poles, and a user is drawn to an item by the traits that they share. Every
pole is as common as the other and histories are drawn blindly, so neither an item's id, nor its genre, nor what a user
did before says anything of it: that stands in the knowledge vectors alone, as noisy projections of the traits
(`trait_vectors`) or as what an encoder makes of sentences about them (`trait_sentences`). Genres differ in how much
they please anybody, which any model can learn. A gain over no knowledge is therefore the adaptor's and the backbone's
work, and shuffled knowledge is worth nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec import schema
from owlrec.ctr.dataset import reduced
from owlrec.ctr.experiment import CTRConfig
from owlrec.ctr.features import build_features
from owlrec.ctr.knowledge_tables import KnowledgeTable
from owlrec.ctr.trainer import TrainingData
from owlrec.encoding.vectors import Encoder
from owlrec.evaluation import auc

HISTORY = 5
GENRE_LOGITS = (-2.0, -0.7, 0.7, 2.0)
TRAIT_LOGIT = 0.7  # of each trait, for it where user and item share the pole, against it where they do not
NOISE = 0.1  # of a vector's components, where a trait's pole moves the vector by one
SPLIT_AT = (0.5, 0.6)  # shares of users: train before the first, test after the second

# Of each trait its two poles, and ways to put each.
POLES = (
    (
        ("spaceships and distant planets", "life aboard starships", "robots of the far future", "voyages to the stars"),
        ("castles and medieval knights", "courts of old kingdoms", "monks and peasants of the Middle Ages", "crusades"),
    ),
    (
        ("slapstick and jokes", "light-hearted laughs", "witty comedy", "silly, cheerful humor"),
        ("terrifying ghosts", "blood and gore", "nightmarish horror", "dread in dark cellars"),
    ),
    (
        ("tender love stories", "couples falling in love", "romance and weddings", "first kisses"),
        ("soldiers at war", "battles and artillery", "armies and their generals", "life in the trenches"),
    ),
)
TRAITS = len(POLES)
_ABOUT = {
    "user": ("This viewer is fond of {}, of {} and of {}.", "They love films with {}, with {} and with {}."),
    "item": ("A film about {}, {} and {}.", "The story brings together {}, {} and {}."),
}


@dataclass(frozen=True)
class PlantedWorld:
    """The tables that any run has, and the traits that no table shows. Ids count from 0."""

    users: pa.Table
    items: pa.Table
    samples: pa.Table
    user_traits: np.ndarray  # int8 [n_users, TRAITS], -1 or 1
    item_traits: np.ndarray  # int8 [n_items, TRAITS]

    def data(self, user: KnowledgeTable, item: KnowledgeTable) -> TrainingData:
        """What trials train on, with these vectors for knowledge."""
        features = build_features(
            self.users, self.items, self.samples, features={"items": ("genre",), "users": ()}, min_item_count=1
        )
        tables = reduced({"user": user, "item": item}, CTRConfig().knowledge_variance)  # as `train_ctr` does
        truth = {
            kind: KnowledgeTable(np.arange(len(traits)), np.concatenate([traits > 0, traits < 0], 1).astype(np.float16))
            for kind, traits in (("user", self.user_traits), ("item", self.item_traits))
        }
        return TrainingData(features, {"knowledge": tables, "truth": truth})

    def ceiling(self) -> tuple[float, float]:
        """Test AUC of the labels' true probabilities, and of the genre's alone."""
        test = self.samples.filter(pc.equal(self.samples["split"], "test"))
        user, item, label = (test[name].to_numpy() for name in ("user_id", "item_id", "label"))
        genre = np.array(GENRE_LOGITS)[[int(name.split()[1]) for name in self.items["genre"].to_pylist()]][item]
        shared = (self.user_traits[user] * self.item_traits[item]).sum(axis=1)
        return auc(label, genre + TRAIT_LOGIT * shared), auc(label, genre)


def plant(n_users: int, n_items: int, *, rows_per_user: int = 20, seed: int = 0) -> PlantedWorld:
    """A world of n_users x rows_per_user samples, split by user (`SPLIT_AT`)."""
    rng = np.random.default_rng(seed)
    user_traits, item_traits = (rng.choice(np.array([-1, 1], np.int8), (n, TRAITS)) for n in (n_users, n_items))
    genres = rng.integers(len(GENRE_LOGITS), size=n_items)
    n = n_users * rows_per_user
    user_ids, item_ids = np.repeat(np.arange(n_users), rows_per_user), rng.integers(n_items, size=n)
    shared = (user_traits[user_ids] * item_traits[item_ids]).sum(axis=1)
    logits = np.array(GENRE_LOGITS)[genres[item_ids]] + TRAIT_LOGIT * shared
    lengths = rng.integers(HISTORY + 1, size=n)
    offsets = pa.array(np.r_[0, np.cumsum(lengths)], pa.int32())
    ratings = rng.integers(1, 6, size=lengths.sum())
    names = np.array(["train", "valid", "test"])[np.searchsorted(SPLIT_AT, np.arange(n_users) / n_users, side="right")]
    columns = {
        "user_id": user_ids,
        "item_id": item_ids,
        "label": (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(np.float32),
        "timestamp": np.zeros(n, np.int64),
        "history": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(n_items, size=lengths.sum()))),
        "history_ratings": pa.ListArray.from_arrays(offsets, pa.array(ratings.astype(np.float32))),
        "history_labels": pa.ListArray.from_arrays(offsets, pa.array((ratings > 3).astype(np.float32))),
        "split": names[user_ids],
    }
    return PlantedWorld(
        users=pa.table({"user_id": np.arange(n_users), "raw_id": _names(n_users)}),
        items=pa.table(
            {
                "item_id": np.arange(n_items),
                "raw_id": _names(n_items),
                "title": _names(n_items),
                "genre": [f"genre {g}" for g in genres],
            }
        ),
        samples=pa.table(columns).cast(schema.SAMPLES),
        user_traits=user_traits,
        item_traits=item_traits,
    )


def trait_vectors(traits: np.ndarray, *, dim: int = 16, seed: int = 0) -> KnowledgeTable:
    """The first form: traits along random orthogonal directions, the same for users and items, plus noise.

    traits: int8 [n, TRAITS]; seed: of the noise.
    """
    directions = np.linalg.qr(np.random.default_rng(7).normal(size=(dim, TRAITS)))[0].T
    noise = NOISE * np.random.default_rng(seed).normal(size=(len(traits), dim))
    return KnowledgeTable(np.arange(len(traits)), (traits @ directions + noise).astype(np.float16))


def sentence_vectors(traits: np.ndarray, kind: str, encoder: Encoder, *, seed: int = 0) -> KnowledgeTable:
    """The second form: the encoder's vectors of sentences about the traits."""
    vectors = encoder.encode(trait_sentences(traits, kind, seed=seed))
    return KnowledgeTable(np.arange(len(traits)), vectors.astype(np.float16))


def trait_sentences(traits: np.ndarray, kind: str, *, seed: int = 0) -> list[str]:
    """A sentence a user or an item ("user", "item"): its poles in any order, put in one of several ways."""
    rng = np.random.default_rng(seed)
    return [_ABOUT[kind][rng.integers(2)].format(*_phrases(row, rng)) for row in traits]


def _phrases(traits: np.ndarray, rng: np.random.Generator) -> list[str]:
    poles = [POLES[number][int(traits[number] > 0)] for number in rng.permutation(TRAITS)]
    return [ways[rng.integers(len(ways))] for ways in poles]


def _names(n: int) -> Sequence[str]:
    return [str(i) for i in range(n)]
