"""A recipe with features of all types, from files to HTTP: scores are the trainer's."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from release_rows import Rows, tables

from owlrec.apps.rank import CtrModel
from owlrec.ctr.artifact import CtrArtifact, CtrScorer, LiveState, User
from owlrec.ctr.backbones import BACKBONES
from owlrec.ctr.experiment import finished_trials, trials
from owlrec.ctr.trainer import read_vocabularies
from owlrec.errors import RecipeError, SchemaError
from owlrec.recipe import Recipe, make_recipe
from owlrec.releases.build import ReleaseInfo, publish
from owlrec.runs.models import export_ctr, train_ctr
from owlrec.runs.stages import prepare
from owlrec.serving.guard import Limits, NoTelemetry
from owlrec.serving.keys import KeyRing
from owlrec.serving.rank_api import Cascade, build_rank_api
from owlrec.shards import needed_stage
from owlrec.sources.splits import last_behaviors, read_samples
from owlrec.workspace import Workspace

torch.set_num_threads(1)
USERS, ITEMS, LENGTH = 60, 150, 8
TAGS = ["new", "sale", "eco", "kids", "sport"]
FEATURES: dict[str, Any] = {
    "items": {"genre": "auto", "tags": {"table": "tag"}, "price": "quantiles", "stock": "log"},
    "users": {"user_id": {"hash": 32}, "gender": "auto", "income": "log", "interests": {"table": "tag"}},
    "interactions": ["hour", "weekday", "device", "position"],
    "sequences": {"carts": ["cart", "purchase"]},
}


def write_files(folder: Path) -> dict[str, str]:
    """Shop logs: carts and purchases are positive, and half of the purchases of clicked items are logged as such."""
    rng = np.random.default_rng(0)

    def tags(n: int) -> pa.Array:
        return pa.array([sorted(rng.choice(TAGS, rng.integers(0, 4), replace=False)) for _ in range(n)])

    n = USERS * 40
    user = np.repeat(np.arange(USERS), 40)
    event = rng.choice(["impression", "click", "cart", "purchase"], n, p=[0.5, 0.3, 0.1, 0.1])
    clicked = event != "impression"
    named: dict[str, dict[str, Any]] = {
        "items": {
            "item_id": np.arange(ITEMS), "title": [f"Thing {i}" for i in range(ITEMS)],
            "genre": rng.choice(["a", "b", "c"], ITEMS), "tags": tags(ITEMS),
            "price": np.round(rng.lognormal(3, 1, ITEMS), 2), "stock": rng.integers(0, 500, ITEMS),
        },
        "users": {
            "user_id": np.arange(USERS), "gender": rng.choice(["f", "m"], USERS),
            "income": rng.lognormal(10, 1, USERS), "interests": tags(USERS),
        },
        "interactions": {
            "user_id": user, "item_id": rng.integers(0, ITEMS, n), "event": event,
            "timestamp": 1_700_000_000_000 + 1_234_567 * rng.permutation(n),
            "device": rng.choice(["tv", "web", "app"], n), "position": rng.integers(1, 12, n),
            "bought": np.where(clicked, (event == "purchase").astype(float), np.nan),
        },
    }  # fmt: skip
    paths = {}
    for name, columns in named.items():
        paths[name] = str(folder / f"{name}.parquet")
        arrays = {c: pa.array(v, from_pandas=True) if c == "bought" else pa.array(v) for c, v in columns.items()}
        pq.write_table(pa.table(arrays), paths[name])
    return paths


def recipe_of(paths: dict[str, str], workspace: Workspace, **changes: Any) -> Recipe:
    ctr = {"backbones": list(BACKBONES), "arms": ["none"], "seeds": [0], "epochs": 1, "embed_dim": 8,
           "hidden_dims": [16, 8], "tasks": {"mmoe": ["bought"]}}  # fmt: skip
    values: dict[str, Any] = {
        "name": "shop", "scenario": "ads", "workspace": workspace.root, "source": {"type": "table", **paths},
        "split": {"history_length": LENGTH}, "features": FEATURES, "ctr": ctr, "engine": {"type": "echo"},
        "shard_rows": 20,
    }  # fmt: skip
    return make_recipe({**values, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Workspace]:
    folder = tmp_path_factory.mktemp("shop")
    workspace = Workspace(folder / "ws")
    recipe = recipe_of(write_files(folder), workspace)
    prepare(recipe, workspace)
    train_ctr(recipe, workspace)
    behaviors = [
        last_behaviors(workspace.read_shard("interactions", n), LENGTH) for n in workspace.table_shards("users")
    ]
    info = ReleaseInfo(fingerprint="f" * 64, model="m", encoder="e", history_length=LENGTH)
    publish(workspace, **tables(Rows(texts={("item", 0): (0, "a thing", "ok")})) | {"behaviors": behaviors}, info=info)
    return recipe, workspace


@pytest.fixture(scope="module")
def din(trained: tuple[Recipe, Workspace]) -> str:
    """Folder of an artifact."""
    return export_ctr(*trained, trial="din/none/seed-0").outputs["model"]


def test_twelve_fields_of_all_types_have_tables_and_scales(trained: tuple[Recipe, Workspace]) -> None:
    recipe, workspace = trained
    grid = needed_stage(workspace, "train_ctr", "").outputs["grid"]
    fields = read_vocabularies(workspace, f"ctr/{grid[:16]}").fields
    assert [(f.column, f.type) for f in (*fields.items, *fields.row_fields)] == [
        ("genre", "categorical"), ("tags", "categorical"), ("price", "quantiles"), ("stock", "log"),
        ("user_id", "categorical"), ("gender", "categorical"), ("income", "log"), ("interests", "categorical"),
        ("hour", "categorical"), ("weekday", "categorical"), ("device", "categorical"), ("position", "categorical"),
    ]  # fmt: skip
    assert fields.items[1].table == fields.users[3].table == "tag"
    assert fields.sequences == {"carts": (3, 6)}
    for result in finished_trials(workspace, grid, trials(recipe.ctr)):
        assert result.tasks.keys() == {"bought"}
        assert 0 <= result.tasks["bought"]["test"] <= 1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_artifact_and_program_of_every_backbone_score_as_the_trainer(
    trained: tuple[Recipe, Workspace], backbone: str
) -> None:
    recipe, workspace = trained
    card = export_ctr(recipe, workspace, trial=f"{backbone}/none/seed-0")  # compares 200 samples
    assert all(float(card.counts[f"{path}_difference"]) < 1e-5 for path in ("model", "program"))


def test_http_scores_are_the_trainers(trained: tuple[Recipe, Workspace], din: str) -> None:
    _, workspace = trained
    grid = needed_stage(workspace, "train_ctr", "").outputs["grid"]
    scored = workspace.read_parquet(f"ctr/{grid[:16]}/din/none/seed-0/test_scores.parquet")
    names = [*("user_id", "item_id", "timestamp", "split", "history", "history_ratings", "history_labels"),
             *("history_events", "interactions/device", "interactions/position")]  # fmt: skip
    parts = [read_samples(workspace, number, names) for number in workspace.table_shards("samples")]
    test = pa.concat_tables(parts).filter(pc.equal(pa.concat_tables(parts)["split"], "test"))
    rows = test.slice(0, 40).to_pylist()

    async def ask() -> list[dict[str, Any]]:
        model = CtrModel(workspace, NoTelemetry())
        await model.open(din)

        async def ready() -> str | None:
            return model.problem()

        app = build_rank_api(Cascade(model, None), KeyRing(None), Limits(), NoTelemetry(), ready)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            answers = []
            for row in rows:
                user = User.from_sample(row)
                assert user.history is not None
                assert user.events is not None
                history = [
                    {"item_id": item, "taken": took, "event": event}
                    for item, took, event in zip(user.history, user.taken or (), user.events, strict=True)
                ]
                context = {"device": user.context["device"], "position": int(str(user.context["position"]))}
                body = {"user_id": row["user_id"], "history": history, "context": context, "time": row["timestamp"],
                        "candidates": [row["item_id"]], "labels": True, "deadline_ms": 20000}  # fmt: skip
                response = await client.post("/v1/rank", json=body)
                assert response.status_code == 200, response.text
                answers.append(response.json()["results"][0])
        return answers

    answers = asyncio.run(ask())
    np.testing.assert_allclose([a["score"] for a in answers], scored["score"].to_numpy()[:40], rtol=0, atol=1e-5)
    assert all(a["labels"].keys() == {"label", "bought"} and a["labels"]["label"] == a["score"] for a in answers)


def test_a_request_sets_what_it_knows(trained: tuple[Recipe, Workspace], din: str) -> None:
    scorer = CtrScorer.open(trained[1], din)
    live = LiveState(scorer.model, None)

    def score(user_id: int | None = 3, **about: Any) -> float:
        return float(scorer.score(User(user_id, history=[1, 2], time=0, **about), [5], live)[0])

    base = score()
    others = {
        "device": {"context": {"device": "tv"}}, "position": {"context": {"position": 3}},
        "income": {"profile": {"income": 20000.0}}, "interests": {"profile": {"interests": ["eco", "kids"]}},
        "events": {"events": ["cart", "click"]}, "nobody": {"user_id": None}, "somebody new": {"user_id": 10**9},
    }  # fmt: skip
    assert base == score(context={"device": "fridge"})  # unknown, as without one
    assert score(context={"position": 3}) == score(context={"position": "3"})
    for name, about in others.items():
        assert score(**about) != base, name
    assert score(profile={"interests": []}) == score(profile={"interests": ["?"]})
    at_six = scorer.score(User(3, history=[1, 2], time=6 * 3_600_000), [5], live)[0]
    assert at_six != base
    with pytest.raises(SchemaError, match="2 behaviors, 2 ratings, 2 outcomes and 1 events"):
        score(events=["cart"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": {"interactions": ["devise"]}}, SchemaError, "interactions.parquet.*no column 'devise'.*'device'"),
        ({"features": {"interactions": ["event"]}}, SchemaError, r"features\.interactions: 'event' is an outcome"),
        ({"features": {"items": {"genre": "log"}}}, SchemaError, r"features\.items\.genre: .*holds text such as 'a'"),
        ({"features": {"users": {"gender": "onehot"}}}, RecipeError, r"features\.users\.gender"),
        ({"features": {"sequences": {"carts": ["basket"]}}}, RecipeError, r"features\.sequences\.carts"),
        ({"ctr": {"tasks": {"mmoe": ["device"]}}}, SchemaError, r"row 0: the label device is '(tv|web|app)'"),
        ({"ctr": {"tasks": {"mmoe": ["bougt"]}}}, SchemaError, r"no column 'bougt', which .*ctr\.tasks"),
        ({"ctr": {"tasks": {"mmoe": []}}}, RecipeError, r"ctr\.tasks: must hold one network"),
    ],
)
def test_bad_features_and_labels_are_named(
    workspace: Workspace, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    def run() -> None:
        recipe = recipe_of(write_files(tmp_path), workspace, **{"ctr": {}, **changes})
        prepare(recipe, workspace)
        train_ctr(recipe.model_copy(update={"ctr": recipe.ctr.model_copy(update={"arms": ("none",)})}), workspace)

    with pytest.raises(error, match=message):
        run()


def test_an_artifact_opens_with_its_profiles(trained: tuple[Recipe, Workspace], din: str) -> None:
    opened = CtrArtifact.open(trained[1], din)
    assert opened.scorer.profiles is not None
    codes, numbers = opened.scorer.profiles.find(3) or (None, None)
    assert codes is not None
    assert numbers is not None
    assert codes.shape == (3 * 3,)  # user_id, gender and interests, of which training has at most three
    assert numbers.shape == (1,)
