"""Encoding by shard: every text once, unchanged rows never again, the same codebooks for what comes later."""

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from owlrec.encoding.compression import code_vectors
from owlrec.encoding.inputs import ItemMetadata, KnowledgeTexts, Members, UserMetadata, WithImported, import_vectors
from owlrec.encoding.stage import EncodingJob
from owlrec.encoding.vectors import EncoderConfig, HashingEncoder, VectorShards, read_quantizers, read_reports
from owlrec.errors import SchemaError
from owlrec.ids import shard_of, stable_id
from owlrec.runner import Pool
from owlrec.schema import COHORTS, HISTORIES, KNOWLEDGE
from owlrec.shards import Card
from owlrec.workspace import Workspace, shard_file

CONFIG = EncoderConfig(model="hashing", semantic_ids="2x8")
SHARDS = {"user": 8, "item": 4, "cohort": 1}


class Counting(HashingEncoder):
    """Notes the texts it was asked for."""

    asked: list[str] = []

    def encode(self, texts: Sequence[str], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        Counting.asked += texts
        return super().encode(texts, on_batch)


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("owlrec.encoding.vectors.HashingEncoder", Counting)
    Counting.asked = []
    return Counting.asked


@pytest.fixture
def world(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    workspace.fix_shards(SHARDS)
    return workspace


def write_knowledge(workspace: Workspace, kind: str, texts: dict[int, str]) -> None:
    defaults = {f.name: "kar" if pa.types.is_string(f.type) else 1 for f in KNOWLEDGE}
    ids = np.array(sorted(texts))
    for number in range(SHARDS[kind]):
        rows = ids[shard_of(ids, SHARDS[kind]) == number].tolist()
        table = [{**defaults, "kind": kind, "id": i, "text": texts[i]} for i in rows]
        path = f"knowledge/k/{kind}/{shard_file(number)}"
        if not workspace.exists(path) or workspace.read_parquet(path).to_pylist() != table:
            workspace.write_parquet(path, pa.Table.from_pylist(table, KNOWLEDGE))


def texts_of(n: int, start: int = 0) -> dict[int, str]:
    return {i: f"user {i} likes film {i % 7} and dislikes film {i % 11}" for i in range(start, start + n)}


def knowledge_job(workspace: Workspace, config: EncoderConfig = CONFIG, *kinds: str) -> EncodingJob:
    inputs = {f"knowledge-{kind}": KnowledgeTexts("knowledge/k", kind) for kind in kinds or ("user",)}
    return EncodingJob(workspace, "vectors/v", config, inputs)


def encoded(cards: dict[str, Card]) -> int:
    return sum(int(card.counts["encoded"]) for card in cards.values())


def everything(workspace: Workspace, name: str) -> dict[int, tuple[list[float], list[int]]]:
    shards = VectorShards(workspace, "vectors/v", name)
    rows = {}
    for number in range(shards.n_shards):
        if (shard := shards.shard(number)) is not None:
            assert (np.diff(shard.ids) > 0).all()
            assert (shard_of(shard.ids, shards.n_shards) == number).all()
            values = zip(shard.vectors.tolist(), shard.codes.tolist(), strict=True)
            rows |= dict(zip(shard.ids.tolist(), values, strict=True))
    return rows


@pytest.mark.parametrize("store", ["disk", "objects"])
def test_every_text_is_encoded_once_and_coded(world: Workspace, counted: list[str], store: str) -> None:
    if store == "objects":
        world = Workspace(f"memory://{uuid.uuid4().hex}")
        world.fix_shards(SHARDS)
    texts = texts_of(200) | {500: " ", 501: ""}
    write_knowledge(world, "user", texts)
    cards = knowledge_job(world).run(Pool())
    assert sorted(counted) == sorted(texts_of(200).values())
    assert (sum(c.rows_in for c in cards.values()), sum(c.rows_out for c in cards.values())) == (202, 200)
    rows = everything(world, "knowledge-user")
    assert set(rows) == set(range(200))
    wanted = HashingEncoder().encode([texts[i] for i in rows]).astype(np.float16)
    np.testing.assert_array_equal(np.array([vector for vector, _ in rows.values()], np.float16), wanted)
    [quantizer] = read_quantizers(world, "vectors/v", "knowledge").values()
    np.testing.assert_array_equal([c for _, c in rows.values()], code_vectors(quantizer, np.array(list(rows)), wanted))
    shard = VectorShards(world, "vectors/v", "knowledge-user").shard(0)
    assert shard is not None
    assert (shard.quantizer, shard.encoder, shard.kind) == (quantizer.fingerprint, CONFIG.identity, "user")
    assert read_reports(world, "vectors/v")["knowledge-user"].vectors == 200


def test_cards_say_how_fast_the_encoder_was_without_its_start(
    world: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owlrec.encoding.inputs.Stopwatch", lambda: SimpleNamespace(seconds=10_000.0))  # of its start
    write_knowledge(world, "user", texts_of(200))
    by_name = knowledge_job(world).run(Pool())
    cards = by_name.values()
    assert encoded(by_name) == 0  # by the last pass, which only added codes
    assert sum(int(card.counts["timed_texts"]) for card in cards) == 200
    assert sum(float(card.counts["timed_s"]) for card in cards) == pytest.approx(-10_000, abs=600)


def test_a_finished_job_loads_no_encoder(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    write_knowledge(world, "user", texts_of(30))
    assert knowledge_job(world).pending()
    before = knowledge_job(world).run(Pool())
    monkeypatch.setattr(EncoderConfig, "load", lambda self: pytest.fail("loaded"))
    again = knowledge_job(world, CONFIG.model_copy(update={"gpus": 0.5, "replicas": 5}))
    assert not again.pending()
    assert again.run(Pool()) == before


def test_only_new_and_changed_texts_are_encoded_again(world: Workspace, counted: list[str]) -> None:
    write_knowledge(world, "user", texts_of(200))
    knowledge_job(world).run(Pool())
    before = everything(world, "knowledge-user")
    [codebooks] = read_quantizers(world, "vectors/v", "knowledge").values()
    counted.clear()
    changed = {i: text for i, text in texts_of(203).items() if i != 9} | {7: "something else"}
    write_knowledge(world, "user", changed)
    cards = knowledge_job(world).run(Pool())
    assert sorted(counted) == sorted(["something else", *texts_of(3, 200).values()])
    assert sum(card.rows_out for card in cards.values()) == 202
    after = everything(world, "knowledge-user")
    assert set(after) == set(range(203)) - {9}
    assert {i for i in after if after[i] != before.get(i)} == {7, 200, 201, 202}
    [same] = read_quantizers(world, "vectors/v", "knowledge").values()
    assert same.fingerprint == codebooks.fingerprint


def test_codebooks_are_fitted_on_a_bounded_sample(world: Workspace, counted: list[str]) -> None:
    write_knowledge(world, "user", texts_of(400))
    job = EncodingJob(world, "vectors/v", CONFIG, {"knowledge-user": KnowledgeTexts("knowledge/k", "user")}, sample=60)
    passes: list[str] = []
    job.run(Pool(), lambda card: passes.append(card.shard))
    assert read_reports(world, "vectors/v")["knowledge-user"].vectors == 60
    assert len(counted) == 400  # the sample's vectors were kept
    assert 8 < len(passes) <= 8 + 3  # 60 of 400 texts are in two or three of eight shards
    assert all(len(codes) == 3 for _, codes in everything(world, "knowledge-user").values())


def test_deleted_codebooks_are_fitted_again_without_the_encoder(world: Workspace, counted: list[str]) -> None:
    write_knowledge(world, "user", texts_of(20))
    knowledge_job(world).run(Pool())
    write_knowledge(world, "user", texts_of(200))
    knowledge_job(world).run(Pool())
    before = everything(world, "knowledge-user")
    counted.clear()
    world.delete_dir("vectors/v/quantizers/knowledge-user")
    assert knowledge_job(world).pending()
    knowledge_job(world).run(Pool())
    assert counted == []
    after = everything(world, "knowledge-user")
    [quantizer] = read_quantizers(world, "vectors/v", "knowledge").values()
    vectors = np.array([vector for vector, _ in after.values()])
    np.testing.assert_array_equal([c for _, c in after.values()], code_vectors(quantizer, np.array([*after]), vectors))
    assert {i: vector for i, (vector, _) in after.items()} == {i: vector for i, (vector, _) in before.items()}
    assert after != before


def test_a_damaged_file_is_encoded_again(world: Workspace) -> None:
    write_knowledge(world, "user", texts_of(50))
    knowledge_job(world).run(Pool())
    before = everything(world, "knowledge-user")
    world.write_bytes("vectors/v/knowledge-user/00000003.arrow", b"cut off")
    assert knowledge_job(world).pending()
    knowledge_job(world).run(Pool())
    assert everything(world, "knowledge-user") == before


def test_without_semantic_ids_nothing_is_coded_and_nothing_passed_over_twice(world: Workspace) -> None:
    write_knowledge(world, "user", texts_of(50))
    passes: list[str] = []
    config = CONFIG.model_copy(update={"semantic_ids": None})
    knowledge_job(world, config).run(Pool(), lambda card: passes.append(card.shard))
    assert len(passes) == 8
    assert {tuple(codes) for _, codes in everything(world, "knowledge-user").values()} == {()}


def test_metadata_is_encoded_by_shard_with_titles_of_all_items(world: Workspace, counted: list[str]) -> None:
    items = pa.table({"item_id": [7, 8, 9], "raw_id": ["7", "8", "9"], "title": ["Alien", "Heat", None]})
    users = pa.table({"user_id": [1, 2, 3], "raw_id": ["1", "2", "3"], "gender": ["male", "female", ""]})
    histories = pa.Table.from_pylist(
        [{"user_id": u, "as_of": 5, "items": [8, 7, 9], "ratings": [1.0, 5.0, None]} for u in (1, 2)], HISTORIES
    )
    for name, table, key in (
        ("items", items, "item_id"),
        ("users", users, "user_id"),
        ("histories", histories, "user_id"),
    ):
        world.write_table(name, table, key=key)
    job = EncodingJob(world, "vectors/v", CONFIG, {"metadata-user": UserMetadata(), "metadata-item": ItemMetadata()})
    job.run(Pool())
    assert sorted(counted) == [
        "Alien",
        "Heat",
        "gender: female; history: Alien (5), Heat (1)",
        "gender: male; history: Alien (5), Heat (1)",
    ]
    assert set(everything(world, "metadata-user")) == {1, 2}
    counted.clear()
    world.write_table("items", items.set_column(2, "title", [["Aliens", "Heat", None]]), key="item_id")
    renamed = EncodingJob(world, "vectors/v", CONFIG, job.inputs)
    renamed.run(Pool())
    assert len(counted) == 3  # the item, and both users who took it


def test_members_follow_the_texts_of_their_cohorts(world: Workspace, counted: list[str]) -> None:
    names = ["a", "b", "c"]
    write_knowledge(world, "cohort", {stable_id(name): f"cohort {name}" for name in names[:2]})
    members = {1: ["a"], 2: ["a", "b"], 3: ["c"], 4: ["b", "c"]}
    rows = [
        {"kind": "user", "id": i, "as_of": 0, "cohort": c, "facet": "liked", "source": "global", "distance": None}
        for i, cohorts in members.items()
        for c in cohorts
    ]
    table = pa.Table.from_pylist(rows, COHORTS)
    numbers = shard_of(table["id"].to_numpy(), 8)
    for number in range(8):
        world.write_parquet(f"cohorts/c/user/{shard_file(number)}", table.filter(pa.array(numbers == number)))
    inputs = {
        "collective-user": Members("cohorts/c", "vectors/v", "user"),
        "knowledge-cohort": KnowledgeTexts("knowledge/k", "cohort"),
    }
    EncodingJob(world, "vectors/v", CONFIG, inputs).run(Pool())
    a, b = HashingEncoder().encode(["cohort a", "cohort b"])
    vectors = everything(world, "collective-user")
    assert set(vectors) == {1, 2, 4}
    both = (a + b) / np.linalg.norm(a + b)
    for i, wanted in ((1, a), (2, both), (4, b)):
        assert vectors[i][0] == pytest.approx(wanted.tolist(), abs=1e-3)
        assert vectors[i][1] == []
    write_knowledge(world, "cohort", {stable_id("a"): "cohort a", stable_id("b"): "another text"})
    job = EncodingJob(world, "vectors/v", CONFIG, inputs)
    assert job.pending()
    cards = job.run(Pool())
    assert not EncodingJob(world, "vectors/v", CONFIG, inputs).pending()
    after = everything(world, "collective-user")
    assert {i for i in after if after[i] != vectors[i]} == {2, 4}
    assert encoded({n: c for n, c in cards.items() if n.startswith("collective")}) == 2


def test_imported_vectors_take_the_place_of_texts_and_stand_beside_them(
    world: Workspace, counted: list[str], tmp_path: Path
) -> None:
    write_knowledge(world, "item", texts_of(10))
    np.save(tmp_path / "v.npy", np.eye(256, dtype=np.float32)[:3])
    np.save(tmp_path / "ids.npy", np.array([4, 77, 2]))
    knowledge_job(world, CONFIG, "item").run(Pool())
    own = everything(world, "knowledge-item")
    counted.clear()
    imported = import_vectors(world, "item", tmp_path / "v.npy", tmp_path / "ids.npy")
    inputs = {"knowledge-item": WithImported(KnowledgeTexts("knowledge/k", "item"), imported.folder)}
    job = EncodingJob(world, "vectors/v", CONFIG, inputs)
    assert job.pending()
    job.run(Pool())
    rows = everything(world, "knowledge-item")
    assert set(rows) == {*range(10), 77}
    for at, i in enumerate([4, 77, 2]):
        assert rows[i][0] == np.eye(256)[at].tolist()
        assert len(rows[i][1]) == 3
    assert counted == []
    assert all(rows[i] == own[i] for i in set(range(10)) - {2, 4})


def test_imported_vectors_need_no_texts(world: Workspace, counted: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.eye(256, dtype=np.float32)[:40])
    np.save(tmp_path / "ids.npy", np.arange(40))
    imported = import_vectors(world, "item", tmp_path / "v.npy", tmp_path / "ids.npy")
    inputs = {"knowledge-item": WithImported(KnowledgeTexts("knowledge/k", "item"), imported.folder)}
    EncodingJob(world, "vectors/v", CONFIG, inputs).run(Pool())
    assert set(everything(world, "knowledge-item")) == set(range(40))


def test_ids_that_do_not_ascend_are_refused_with_file_and_row(world: Workspace) -> None:
    write_knowledge(world, "user", texts_of(50))
    path = f"knowledge/k/user/{shard_file(5)}"
    table = world.read_parquet(path)
    world.write_parquet(path, pa.concat_tables([table, table.slice(0, 1)]))
    with pytest.raises(SchemaError, match=rf"00000005\.parquet, row {len(table)}: id"):
        knowledge_job(world).run(Pool())


@pytest.mark.ray
def test_a_pool_of_replicas_writes_what_one_process_does(tmp_path: Path, ray_local: None) -> None:
    written = []
    for place, pool in (("here", Pool()), ("pool", Pool(here=False, min_workers=2, max_workers=2, cpus=0.5))):
        workspace = Workspace(tmp_path / place)
        workspace.fix_shards(SHARDS)
        write_knowledge(workspace, "user", texts_of(100))
        knowledge_job(workspace).run(pool)
        written.append(everything(workspace, "knowledge-user"))
    assert written[0] == written[1]
