"""Planted knowledge: every backbone finds it, in vectors and in sentences, and finds nothing where it is shuffled.

The world is the benchmark's (`python -m benchmarks.ctr --only planted`), smaller: there a shuffled arm must lie within
.003 of none, here within what a test split of this size can tell.
"""

import itertools

import numpy as np
import pytest
import torch

from benchmarks.planted import (
    GENRE_LOGITS,
    POLES,
    TRAIT_LOGIT,
    TRAITS,
    PlantedWorld,
    plant,
    sentence_vectors,
    trait_sentences,
    trait_vectors,
)
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.experiment import Arm, CTRConfig, Trial
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.encoding.vectors import Encoder, EncoderConfig
from owlrec.evaluation import auc

torch.set_num_threads(1)
CONFIG = CTRConfig(embed_dim=8, hidden_dims=(32, 16), batch_size=256, learning_rate=0.005, epochs=6, patience=2)


@pytest.fixture(scope="module")
def world() -> PlantedWorld:
    return plant(1000, 60)


@pytest.fixture(scope="module")
def data(world: PlantedWorld) -> TrainingData:
    return world.data(trait_vectors(world.user_traits, seed=1), trait_vectors(world.item_traits, seed=2))


def gains(data: TrainingData, backbone: str) -> dict[Arm, float]:
    """Test AUC of the arms with knowledge less that of none."""
    arms: tuple[Arm, ...] = ("none", "knowledge", "shuffled")
    aucs = {arm: train_one(Trial(backbone=backbone, arm=arm, seed=0), data, CONFIG).result.test.auc for arm in arms}
    return {arm: aucs[arm] - aucs["none"] for arm in arms}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_finds_what_true_knowledge_tells(world: PlantedWorld, data: TrainingData, backbone: str) -> None:
    best, blind = world.ceiling()
    gain = gains(data, backbone)
    assert gain["knowledge"] >= 0.9 * (best - blind)
    assert abs(gain["shuffled"]) <= 0.012


def test_sentences_tell_it_as_vectors_do(world: PlantedWorld) -> None:
    encoder = Encoder(EncoderConfig())
    kind_traits = (("user", world.user_traits, 1), ("item", world.item_traits, 2))
    data = world.data(*(sentence_vectors(traits, kind, encoder, seed=seed) for kind, traits, seed in kind_traits))
    gain = gains(data, "dcnv2")
    assert gain["knowledge"] >= 0.02
    assert abs(gain["shuffled"]) <= 0.012


def test_labels_follow_the_traits_and_ids_do_not_show_them(world: PlantedWorld) -> None:
    big = plant(6000, 50, seed=3)
    user, item, label = (big.samples[name].to_numpy() for name in ("user_id", "item_id", "label"))
    shared = (big.user_traits[user] * big.item_traits[item]).sum(axis=1)
    genre = np.array([int(name.split()[1]) for name in big.items["genre"].to_pylist()])
    logits = np.array(GENRE_LOGITS)[genre[item]] + TRAIT_LOGIT * shared
    expected = 1 / (1 + np.exp(-logits))
    for low, high in itertools.pairwise(np.linspace(0, 1, 6)):
        rows = (expected >= low) & (expected < high)
        assert label[rows].mean() == pytest.approx(expected[rows].mean(), abs=0.02)
    # Who knows the genre knows all that ids can tell; the traits are worth far more than the bar of .02.
    assert auc(label, logits) > auc(label, np.array(GENRE_LOGITS)[genre[item]]) + 0.06
    for trait in range(TRAITS):
        for pole in (-1, 1):
            at_pole = big.item_traits[item, trait] == pole
            rest = label[at_pole] - expected[at_pole]
            assert abs(rest.mean()) < 0.01
    assert big.item_traits.shape == (50, TRAITS)
    assert set(np.unique(big.user_traits)) == {-1, 1}


def test_splits_part_users(world: PlantedWorld) -> None:
    splits = {
        split: set(rows["user_id"].to_pylist())
        for split in ("train", "valid", "test")
        if (rows := world.samples.filter(np.array(world.samples["split"].to_pylist()) == split)).num_rows
    }
    assert {split: len(users) for split, users in splits.items()} == {"train": 500, "valid": 100, "test": 400}
    assert not set.intersection(*splits.values())


def test_sentences_name_each_traits_own_pole() -> None:
    traits = np.array(list(itertools.product((-1, 1), repeat=TRAITS)), np.int8)
    for kind in ("user", "item"):
        for row, sentence in zip(traits, trait_sentences(traits, kind, seed=4), strict=True):
            for trait, poles in enumerate(POLES):
                named = [any(way in sentence for way in ways) for ways in poles]
                assert named == [row[trait] < 0, row[trait] > 0]
