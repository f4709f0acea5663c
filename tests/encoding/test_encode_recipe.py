"""`encode` as a recipe asks for it: what is encoded, what is not, and when it has nothing to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from owlrec.ctr.dataset import open_tables
from owlrec.encoding.vectors import HashingEncoder, VectorShards
from owlrec.errors import RecipeError, SourceError
from owlrec.ids import TABLE_KINDS, TABLES, shard_of
from owlrec.recipe import Recipe
from owlrec.runs.exchange import import_vectors
from owlrec.runs.models import others_read, written_vectors
from owlrec.runs.stages import encode as run
from owlrec.schema import KNOWLEDGE
from owlrec.shards import finish_stage, finished_stage
from owlrec.workspace import Workspace, shard_file


def recipe_for(workspace: Workspace, **sections: Any) -> Recipe:
    values = {
        "name": "t",
        "scenario": "movies",
        "workspace": workspace.root,
        "source": {"type": "movielens-100k"},
        "engine": {"type": "echo"},
        "encoder": {"model": "hashing", "semantic_ids": "3x4"},
    }
    return Recipe.model_validate({**values, **sections})


@pytest.fixture
def generated(small_world: Workspace) -> Workspace:
    """A text for each of its 40 users and 30 items."""
    defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    for kind, table in TABLES.items():
        ids = np.sort(small_world.read_table(table)[f"{kind}_id"].to_numpy())
        n = small_world.n_shards(TABLE_KINDS[table])
        for number in range(n):
            rows = ids[shard_of(ids, n) == number].tolist()
            texts = [{**defaults, "kind": kind, "id": i, "text": f"the {kind} {i}"} for i in rows]
            path = f"knowledge/k/{kind}/{shard_file(number)}"
            small_world.write_parquet(path, pa.Table.from_pylist(texts, KNOWLEDGE))
    finish_stage(small_world, "generate", "g" * 64, outputs={"knowledge": "knowledge/k"})
    return small_world


def test_knowledge_and_the_control_are_encoded_and_counted(generated: Workspace) -> None:
    card = run(recipe_for(generated), generated)
    assert {
        k: card.counts[k] for k in ("knowledge_user", "knowledge_item", "metadata_user", "metadata_item", "dim")
    } == {
        "knowledge_user": 40,
        "knowledge_item": 30,
        "metadata_user": 40,
        "metadata_item": 30,
        "dim": 256,
    }
    assert 0 < card.counts["metadata_item_ids_unique_rate"] <= 1
    vectors, mask = VectorShards(generated, card.outputs["vectors"], "metadata-item").gather(np.array([100, 5]))
    assert mask.tolist() == [True, False]
    assert np.linalg.norm(vectors[0].astype(float)) == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("arms", "names"),
    [
        (["none", "knowledge"], {"knowledge-item", "knowledge-user"}),
        (["none", "metadata+codes"], {"knowledge-item", "knowledge-user", "metadata-item", "metadata-user"}),
    ],
)
def test_a_control_that_no_arm_reads_is_not_encoded(generated: Workspace, arms: list[str], names: set[str]) -> None:
    card = run(recipe_for(generated, ctr={"arms": arms}), generated)
    assert set(generated.names(card.outputs["vectors"])) - {"cards", "gathered", "quantizers"} == names


def test_a_second_run_changes_nothing_and_a_new_text_the_stage(generated: Workspace) -> None:
    first = run(recipe_for(generated), generated)
    assert run(recipe_for(generated), generated) == first
    path = f"knowledge/k/user/{shard_file(0)}"
    table = generated.read_parquet(path)
    generated.write_parquet(path, table)  # the same content, written again
    again = run(recipe_for(generated), generated)
    assert again.fingerprint == first.fingerprint
    column = table.schema.get_field_index("text")
    generated.write_parquet(path, table.set_column(column, "text", [["new", *table["text"].to_pylist()[1:]]]))
    finish_stage(generated, "publish", "p")
    changed = run(recipe_for(generated), generated)
    assert changed.fingerprint != first.fingerprint
    assert changed.outputs == first.outputs
    assert finished_stage(generated, "publish") is None


def test_imported_vectors_are_preferred_and_of_the_encoders_dimension(generated: Workspace, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("100\n101\n102\n")
    np.save(tmp_path / "v.npy", np.eye(256, dtype=np.float32)[:3])
    run(recipe_for(generated), generated)
    assert import_vectors(generated, "item", str(tmp_path / "v.npy"), str(tmp_path / "ids.txt")) == 3
    card = run(recipe_for(generated), generated)
    vectors, _ = VectorShards(generated, card.outputs["vectors"], "knowledge-item").gather(np.array([102, 103]))
    assert vectors[0].tolist() == np.eye(256)[2].tolist() != vectors[1].tolist()
    np.save(tmp_path / "v.npy", np.zeros((3, 8), np.float32))
    import_vectors(generated, "item", str(tmp_path / "v.npy"), str(tmp_path / "ids.txt"))
    with pytest.raises(SourceError, match="vectors of 8 components, but the recipe's encoder has 256"):
        run(recipe_for(generated), generated)


def test_own_arms_have_their_columns_encoded_and_read_imported_vectors_where_they_are(
    generated: Workspace, tmp_path: Path
) -> None:
    own = {"mine": {"items": ["title"]}}, {"pictures": {"items": ["images"]}}
    recipe = recipe_for(generated, ctr={"arms": ["none", *own]})
    with pytest.raises(RecipeError, match=r"there is no source 'images' of items: .*--source images"):
        run(recipe, generated)
    (tmp_path / "ids.txt").write_text("100\n101\n102\n")
    np.save(tmp_path / "v.npy", np.eye(8, dtype=np.float32)[:3])  # of another size than the encoder's
    import_vectors(generated, "item", str(tmp_path / "v.npy"), str(tmp_path / "ids.txt"), source="images")
    card = run(recipe, generated)
    assert "metadata-user" not in generated.names(card.outputs["vectors"])
    titles = generated.read_table("items").to_pylist()[4]
    encoded, _ = VectorShards(generated, card.outputs["vectors"], "title-item").gather(np.array([titles["item_id"]]))
    expected = HashingEncoder().encode([titles["title"]]).astype(np.float16)
    np.testing.assert_array_equal(encoded, expected)
    folders = written_vectors(recipe, generated, card)
    images = open_tables(generated, {"images": folders["images"]})["images"]["item"]
    assert folders["images"].keys() == {"item"}
    assert (images.dim, images.encoder) == (8, "imported as images")
    np.testing.assert_array_equal(images.gather(np.array([102, 103]))[1], [True, False])
    before = others_read(recipe, generated)
    np.save(tmp_path / "v.npy", 2 * np.eye(8, dtype=np.float32)[:3])
    import_vectors(generated, "item", str(tmp_path / "v.npy"), str(tmp_path / "ids.txt"), source="images")
    assert others_read(recipe, generated) != before
