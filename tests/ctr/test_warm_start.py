"""Training that goes on from an artifact: weights by value, what is new as unknown, and what does not fit refused."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from worlds import write_vectors, write_world

from owlrec.ctr.artifact import ModelCard, finish_artifact, write_artifact
from owlrec.ctr.dataset import WarmStart, carried_over, encode_tables, grown, open_features, open_tables, reduce_once
from owlrec.ctr.experiment import CTRConfig, Trial, grid_folder
from owlrec.ctr.features import RESERVED, UNKNOWN, FeatureSchema, Field, Grades, Vocabularies
from owlrec.ctr.trainer import TrainingData, export_trial, read_vocabularies, train_one
from owlrec.encoding.compression import Projection
from owlrec.errors import RecipeError, WorkspaceError
from owlrec.workspace import Workspace

torch.set_num_threads(1)
CONFIG = CTRConfig(batch_size=128, epochs=1, embed_dim=8, hidden_dims=(16, 8), learning_rate=0.01)
GRID, TRIAL = "dada" * 16, Trial(backbone="din", arm="knowledge", seed=0)


@pytest.fixture
def artifact(workspace: Workspace, toy_world: Any) -> str:
    """Of a model that was trained on the toy world without its last five items."""
    known = toy_world.items.slice(0, 15)
    samples = toy_world.samples
    kept = samples.filter(pa.compute.less(samples["item_id"], 15))
    world = dataclasses.replace(toy_world, items=known, samples=kept)
    write_world(workspace, world, n_shards=2)
    for kind, table in zip(("user", "item"), toy_world.vectors, strict=True):
        write_vectors(workspace, "vectors/abc", f"knowledge-{kind}", table)
    data = data_of(workspace, GRID)
    trained = train_one(TRIAL, data, CONFIG)
    export_trial(workspace, GRID, trained)
    folder = write_artifact(workspace, GRID, TRIAL, data.features.items, projection=projection_of(GRID, toy_world))
    figures = {"valid": trained.result.valid, "test": trained.result.test}
    finish_artifact(workspace, folder, ModelCard(trial=TRIAL, grid=GRID, items=15, reads=None, **figures))
    return folder


def projection_of(grid: str, toy_world: Any) -> str:
    """The folder of a grid's projection."""
    return f"{grid_folder(grid)}/vectors/{toy_world.vectors[0].dim}"


def data_of(
    workspace: Workspace, grid: str, before: Vocabularies | None = None, projection: Projection | None = None
) -> TrainingData:
    options: dict[str, Any] = {"min_item_count": 1}
    encode_tables(workspace, grid_folder(grid), before=before, **options)
    sources = {"knowledge": dict.fromkeys(("user", "item"), "vectors/abc")}
    folders = reduce_once(workspace, sources, 0.95, grid, projection=projection)
    return TrainingData(open_features(workspace, grid_folder(grid)), open_tables(workspace, folders))


def test_rows_are_carried_over_by_value_and_new_values_start_as_unknown() -> None:
    table = torch.arange(10.0).reshape(5, 2)  # padding, unknown, then b, d, e
    rows = carried_over(table, pa.array(["b", "d", "e"]), pa.array(["a", "b", "c", "e"]))
    assert rows.tolist() == [[0, 1], [2, 3], [2, 3], [4, 5], [2, 3], [8, 9]]


def test_vocabularies_grow_and_keep_what_the_items_table_still_has() -> None:
    before = Vocabularies(pa.array([3, 5, 9]), {"items/genres": pa.array(["b"])}, FeatureSchema(), Grades(1, 5))
    new = Vocabularies(pa.array([4, 5]), {"items/genres": pa.array(["a"])}, FeatureSchema(), Grades(0, 9))
    both = grown(new, before, np.array([3, 4, 5, 6]))
    assert both.items.to_pylist() == [3, 4, 5]
    assert both.values["items/genres"].to_pylist() == ["a", "b"]
    assert both.grades == before.grades


def test_buckets_and_scales_stay_those_of_the_artifact() -> None:
    def fitted(edge: float, mean: float, width: int = 1, column: str = "price") -> Vocabularies:
        fields = FeatureSchema(
            items=(Field(column=column, type="quantiles", table="items/price", edges=(edge,)),
                   Field(column="tags", type="categorical", table="tag", width=width)),
            users=(Field(column="income", type="log", mean=mean),),
        )  # fmt: skip
        return Vocabularies(pa.array([3]), {"tag": pa.array(["a"])}, fields, Grades(1, 5))

    before = fitted(3.0, 2.0)
    assert grown(fitted(9.0, 7.0, width=4), before, np.array([3])).fields == before.fields
    other = fitted(9.0, 7.0, column="cost")
    assert grown(other, before, np.array([3])).fields == other.fields  # which load_into refuses


def test_a_model_goes_on_from_the_weights_of_an_artifact(workspace: Workspace, artifact: str, toy_world: Any) -> None:
    warm, grid = WarmStart.open(workspace, artifact), "feed" * 16
    write_world(workspace, toy_world, n_shards=2)
    projection = Projection.load(workspace, artifact, GRID)
    data = data_of(workspace, grid, warm.vocabularies, projection)
    kept = Projection.load(workspace, projection_of(grid, toy_world), grid)
    np.testing.assert_array_equal(kept.directions, projection.directions)
    vocabularies = read_vocabularies(workspace, grid_folder(grid))
    assert vocabularies.items.to_pylist() == list(range(20))
    begun: dict[str, torch.Tensor] = {}

    def begin(model: Any, grid_vocabularies: Vocabularies) -> None:
        warm.load_into(model, grid_vocabularies)
        begun.update({name: value.clone() for name, value in model.state_dict().items()})

    trained = train_one(TRIAL, data, CONFIG, begin=begin)
    assert begun["item.weight"].shape == (22, 8)
    torch.testing.assert_close(begun["item.weight"][: 15 + RESERVED], warm.weights["item.weight"])
    unknown = warm.weights["item.weight"][UNKNOWN]
    torch.testing.assert_close(begun["item.weight"][17:], unknown.expand(5, -1))
    same = [name for name in warm.weights if name != "item.weight"]
    assert same
    for name in same:
        torch.testing.assert_close(begun[name], warm.weights[name])
    cold = train_one(TRIAL, data, CONFIG)
    assert trained.result.valid.log_loss < cold.result.valid.log_loss  # one epoch is not enough from nothing


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"embed_dim": 4}, "embed_dim"),
        ({"hidden_dims": (8,)}, "hidden_dims"),
        ({"expert_dim": 8}, "expert_dim"),
    ],
)
def test_other_dimensions_are_refused(workspace: Workspace, artifact: str, changes: dict[str, Any], key: str) -> None:
    warm = WarmStart.open(workspace, artifact)
    config, data = CONFIG.model_copy(update=changes), data_of(workspace, GRID)
    with pytest.raises(RecipeError, match=f"ctr: {key} is"):
        train_one(TRIAL, data, config, begin=warm.load_into)


def test_another_backbone_or_other_fields_are_refused(workspace: Workspace, artifact: str) -> None:
    warm, data = WarmStart.open(workspace, artifact), data_of(workspace, GRID)
    with pytest.raises(RecipeError, match="ctr: backbone is"):
        train_one(Trial(backbone="dcnv2", arm="knowledge", seed=0), data, CONFIG, begin=warm.load_into)
    options: dict[str, Any] = {"features": {"items": ()}, "min_item_count": 1}
    encode_tables(workspace, grid_folder("beef" * 16), **options)
    other = dataclasses.replace(data, features=open_features(workspace, grid_folder("beef" * 16)))
    with pytest.raises(RecipeError, match=r"features are users\.gender"):
        train_one(TRIAL, other, CONFIG, begin=warm.load_into)


def test_an_artifact_that_is_not_there_is_named(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="models/none"):
        WarmStart.open(workspace, "models/none")
