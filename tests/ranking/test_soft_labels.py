"""The whole stage on a small shop: what is asked, what is written, what is asked again, what training takes of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlrec.ctr.experiment import SoftLabels, read_grid_scores, trials
from owlrec.errors import EngineError, RecipeError, WorkspaceError
from owlrec.generation import ENGINES
from owlrec.generation.engines import Completion, Engine, EngineConfig, EngineStopped, RequestRefused, SamplingConfig
from owlrec.ranking.question_sets import Teacher
from owlrec.ranking.samples import TuningConfig
from owlrec.recipe import Recipe
from owlrec.runner import WorkerLost
from owlrec.runs.models import score_pairs, soft_labels, train_ctr
from owlrec.runs.stages import prepare
from owlrec.runs.upkeep import double_shards
from owlrec.schema import DEAD_LETTERS, SOFT_LABELS
from owlrec.shards import finished_stage, needed_stage
from owlrec.workspace import Workspace
from owlrec_decoding import DecodingConfig

USERS, ITEMS = 60, 20
asked: list[str] = []  # all questions since the test began


class OracleConfig(EngineConfig):
    """What it does: it answers by the number of the film in question, or fails."""

    shapes_output: ClassVar[tuple[str, ...]] = ("type",)

    type: Literal["oracle"] = "oracle"
    refuses: str = ""  # a question that names it fails
    stopped: bool = False

    @property
    def model_identity(self) -> str:
        return "oracle"

    def start(self, decoding: DecodingConfig) -> "Oracle":
        return Oracle(self)

    def token_counter(self) -> Callable[[str], int]:
        return len


class Oracle(Engine):
    """Yes is as likely as the film's number over 100."""

    def __init__(self, config: OracleConfig) -> None:
        self.config = config

    async def complete(
        self, system: str, prompt: str, sampling: SamplingConfig, extra: Mapping[str, Any] | None = None
    ) -> Completion:
        raise NotImplementedError

    async def first_tokens(self, system: str, prompt: str) -> list[tuple[str, float]]:
        if self.config.stopped:
            raise EngineStopped("it is gone")
        asked.append(prompt)
        question = prompt.splitlines()[-2]
        if self.config.refuses and self.config.refuses in question:
            raise RequestRefused("no")
        yes = (1 + int(question.partition("Film ")[2].split('"')[0].split("?")[0])) / 100
        return [(" yes", math.log(yes)), ("No", math.log1p(-yes)), ("Maybe", -9.0)]

    def count_tokens(self, text: str) -> int:
        return len(text)


@pytest.fixture(autouse=True)
def _oracle() -> Iterator[None]:
    ENGINES["oracle"] = f"{__name__}.OracleConfig"
    asked.clear()
    yield
    del ENGINES["oracle"]


def write_shop(folder: Path, users: int = USERS, title: str = "Film") -> None:
    """Each user met 12 of the films, an hour apart, and took every other one."""
    rng = np.random.default_rng(0)
    met = np.array([rng.permutation(ITEMS)[:12] for _ in range(users)])
    log = {"user_id": np.repeat(np.arange(users), 12), "item_id": met.ravel()}
    log["timestamp"] = 1_600_000_000_000 + np.tile(np.arange(12), users) * 3_600_000
    log["label"] = (rng.random(users * 12) < 0.5).astype(np.float32)
    titles = [f"{title} {i}" if i else "" for i in range(ITEMS)]  # item 0 has none
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(log), folder / "log.parquet")
    pq.write_table(pa.table({"item_id": np.arange(ITEMS), "title": titles}), folder / "items.parquet")


def recipe_for(folder: Path, workspace: Workspace, **changes: Any) -> Recipe:
    source = {"type": "table", "items": f"{folder}/items.parquet", "interactions": f"{folder}/log.parquet"}
    values: dict[str, Any] = {"name": "t", "scenario": "movies", "workspace": workspace.root, "source": source}
    values |= {"engine": {"type": "oracle"}, "encoder": {"model": "hashing"}, "shard_rows": 32}
    values |= {"ranking": {"data": {"behaviors": 3}}, "generate": {"max_dead_share": 0.5}}
    values["ctr"] = {"distillation": {"unlabeled": 4}}
    return Recipe.model_validate({**values, **changes})


def rows_of(workspace: Workspace) -> list[dict[str, Any]]:
    folder = needed_stage(workspace, "score_pairs", "").outputs["soft_labels"]
    taught = SoftLabels(folder, 0.5)
    return [row for n in workspace.table_shards("samples") for row in taught.read(workspace, n).to_pylist()]


@pytest.fixture
def shop(tmp_path: Path, workspace: Workspace) -> Recipe:
    write_shop(tmp_path / "shop")
    recipe = recipe_for(tmp_path / "shop", workspace)
    prepare(recipe, workspace)
    return recipe


def test_every_pair_has_the_llms_probability_or_is_a_dead_letter(shop: Recipe, workspace: Workspace) -> None:
    card = score_pairs(shop, workspace)
    rows = rows_of(workspace)
    assert all(row["p"] == pytest.approx((1 + row["item_id"]) / 100, abs=1e-6) for row in rows)
    samples = workspace.read_table("samples").to_pylist()
    train = {(s["user_id"], s["item_id"], s["timestamp"]) for s in samples if s["split"] == "train"}
    keys = {(row["user_id"], row["item_id"], row["timestamp"]) for row in rows}
    titled = {key for key in train if key[1] != 0}
    assert titled <= keys
    assert len(keys) == len(rows) == card.counts["pairs"]
    train_users = {user for user, _, _ in train}
    assert {user for user, _, _ in keys - train} == train_users
    assert 3 * len(train_users) <= len(keys - titled) <= 4 * len(train_users)

    folder = card.outputs["soft_labels"]
    letters = pa.concat_tables(
        [workspace.read_parquet(f"{folder}/dead/user/{name}") for name in workspace.names(folder, "dead", "user")]
    )
    assert letters.schema == DEAD_LETTERS
    untitled = {key for key in train if key[1] == 0}
    assert untitled <= {(row["id"], 0, row["as_of"]) for row in letters.to_pylist()}
    assert {row["error"] for row in letters.to_pylist()} == {"EmptyPrompt"}
    assert len(letters) == card.counts["dead"]


def test_a_question_quotes_what_was_taken_strictly_before_its_pair(shop: Recipe, workspace: Workspace) -> None:
    """With titles that say when their film was met, any later one would show."""
    score_pairs(shop, workspace)
    log = workspace.read_table("interactions").to_pylist()
    past: dict[int, dict[str, tuple[int, float]]] = {}
    for row in log:
        past.setdefault(row["user_id"], {})[f"Film {row['item_id']}"] = (row["timestamp"], row["label"])
    pairs = {(r["user_id"], r["item_id"], r["timestamp"]) for r in rows_of(workspace)}
    assert len(asked) == len(pairs)
    for question in asked:
        lines = question.splitlines()
        item = int(lines[-2].partition("Film ")[2].split('"')[0].split("?")[0])
        quoted = [line.partition("Film ")[2].split('"')[0] for line in lines if line[:1].isdigit()]
        assert len(quoted) <= 3
        # Some pair of this item explains the question: all that it quotes was taken, and earlier.
        assert any(
            all(past[user].get(f"Film {q}", (time, 0))[0] < time and past[user][f"Film {q}"][1] == 1 for q in quoted)
            for user, candidate, time in pairs
            if candidate == item
        )


def test_what_was_answered_is_not_asked_again(shop: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    first = score_pairs(shop, workspace)
    n = len(asked)
    assert score_pairs(shop, workspace).fingerprint == first.fingerprint
    assert len(asked) == n
    # More pairs of each user: the new ones alone, and of those that read alike one.
    more = recipe_for(tmp_path / "shop", workspace, ctr={"distillation": {"unlabeled": 7}})
    card = score_pairs(more, workspace)
    assert 0 < len(asked) - n == card.counts["asked"] <= card.counts["pairs"] - first.counts["pairs"]
    assert card.fingerprint != first.fingerprint
    # Another wording: all of them, in a folder of their own.
    other = recipe_for(tmp_path / "shop", workspace, ranking={"data": {"behaviors": 3}, "retrieved_for": "candidate"})
    n = len(asked)
    assert score_pairs(other, workspace).outputs != first.outputs
    assert len(asked) - n == first.counts["pairs"]


def test_a_damaged_file_is_asked_about_again(shop: Recipe, workspace: Workspace) -> None:
    first = score_pairs(shop, workspace)
    n = len(asked)
    path = f"{first.outputs['soft_labels']}/user/00000000.parquet"
    rows = workspace.count_rows(path)
    workspace.write_bytes(path, b"PAR1 and nothing else")
    assert score_pairs(shop, workspace).fingerprint == first.fingerprint
    assert len(asked) - n == rows


def test_refused_pairs_are_dead_until_they_are_retried(shop: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    failing = recipe_for(tmp_path / "shop", workspace, engine={"type": "oracle", "refuses": "Film 7"})
    card = score_pairs(failing, workspace)
    assert all(row["item_id"] != 7 for row in rows_of(workspace))
    n = len(asked)
    assert score_pairs(shop, workspace).counts["dead"] == card.counts["dead"]
    assert len(asked) == n
    retried = score_pairs(shop, workspace, retry_dead=True)
    assert retried.counts["pairs"] - card.counts["pairs"] == len(asked) - n > 0
    assert any(row["item_id"] == 7 for row in rows_of(workspace))


def test_too_many_dead_pairs_end_the_stage(tmp_path: Path, workspace: Workspace, shop: Recipe) -> None:
    strict = recipe_for(tmp_path / "shop", workspace, generate={"max_dead_share": 0.0})
    with pytest.raises(EngineError, match="EmptyPrompt"):
        score_pairs(strict, workspace)
    assert finished_stage(workspace, "score_pairs") is None


def test_an_engine_that_is_gone_ends_the_worker(tmp_path: Path, workspace: Workspace, shop: Recipe) -> None:
    with pytest.raises(WorkerLost, match="it is gone"):
        score_pairs(recipe_for(tmp_path / "shop", workspace, engine={"type": "oracle", "stopped": True}), workspace)


def test_retrieved_behaviors_are_those_of_the_ranker(tmp_path: Path, workspace: Workspace, shop: Recipe) -> None:
    """By default a served question shows retrieved behaviors; `recent` shows others and needs no vectors."""
    score_pairs(shop, workspace)
    assert all("most like the movies in question" in question for question in asked if "1. " in question)
    assert any("1. " in question for question in asked)
    asked.clear()
    recent = {"data": {"behaviors": 3, "shown": ["recent"]}}
    score_pairs(recipe_for(tmp_path / "shop", workspace, ranking=recent), workspace)
    assert not any("most like" in question for question in asked)


def test_training_takes_soft_labels_of_its_own_tables_and_pairs_only(
    shop: Recipe, workspace: Workspace, tmp_path: Path
) -> None:
    prepared = needed_stage(workspace, "prepare", "")
    assert soft_labels(recipe_for(tmp_path / "shop", workspace, ctr={}), workspace, prepared) is None
    with pytest.raises(WorkspaceError, match="no soft labels yet"):
        soft_labels(shop, workspace, prepared)
    card = score_pairs(shop, workspace)
    assert soft_labels(shop, workspace, prepared) == card
    other_alpha = recipe_for(tmp_path / "shop", workspace, ctr={"distillation": {"unlabeled": 4, "alpha": 0.9}})
    assert soft_labels(other_alpha, workspace, prepared) == card
    with pytest.raises(WorkspaceError, match="Run `ranker score-pairs` again"):
        soft_labels(recipe_for(tmp_path / "shop", workspace, ctr={"distillation": {}}), workspace, prepared)
    write_shop(tmp_path / "shop", users=USERS + 5)
    later = prepare(shop, workspace)
    with pytest.raises(WorkspaceError, match="Run `ranker score-pairs` again"):
        soft_labels(shop, workspace, later)


def test_a_grid_learns_from_soft_labels_and_is_another_one(shop: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    """Half of the labels are 1, and the LLM says at most .2: a model that learns from it alone says so, too."""
    ctr = {"backbones": ["dcnv2"], "arms": ["none"], "seeds": [0], "epochs": 2, "learning_rate": 0.02}

    def trained(**distillation: Any) -> tuple[str, float]:
        taught = {"distillation": distillation} if distillation else {}
        recipe = recipe_for(tmp_path / "shop", workspace, ctr={**ctr, **taught})
        grid = train_ctr(recipe, workspace).outputs["grid"]
        scores = read_grid_scores(workspace, grid, trials(recipe.ctr))
        assert scores is not None
        return grid, float(np.mean(list(scores.scores.values())))

    with pytest.raises(WorkspaceError, match="no soft labels yet"):
        trained(alpha=1.0, unlabeled=4)
    score_pairs(shop, workspace)
    plain, taught, half = trained(), trained(alpha=1.0, unlabeled=4), trained(alpha=0.5, unlabeled=4)
    assert len({plain[0], taught[0], half[0]}) == 3
    assert taught[1] < 0.2 < half[1] < 0.4 < plain[1]


def test_reshard_splits_soft_labels_and_asks_nothing(shop: Recipe, workspace: Workspace) -> None:
    score_pairs(shop, workspace)
    before = sorted((r["user_id"], r["item_id"], r["timestamp"], r["p"]) for r in rows_of(workspace))
    n = len(asked)
    double_shards(workspace, ["user"])
    assert sorted((r["user_id"], r["item_id"], r["timestamp"], r["p"]) for r in rows_of(workspace)) == before
    score_pairs(shop, workspace)
    assert len(asked) == n


def test_an_object_store_holds_what_a_local_disk_holds(
    shop: Recipe, workspace: Workspace, s3_root: str, tmp_path: Path
) -> None:
    score_pairs(shop, workspace)
    remote = Workspace(s3_root)
    recipe = recipe_for(tmp_path / "shop", remote)
    prepare(recipe, remote)
    score_pairs(recipe, remote)
    assert rows_of(remote) == rows_of(workspace)


def test_a_recipe_without_distillation_is_refused(shop: Recipe, workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ctr\.distillation"):
        score_pairs(recipe_for(tmp_path / "shop", workspace, ctr={}), workspace)


def test_an_engine_that_tells_no_probabilities_is_named(
    shop: Recipe, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Oracle, "first_tokens")
    with pytest.raises(EngineError, match="Oracle does not return"):
        score_pairs(shop, workspace)


def test_the_folder_names_all_that_answers_depend_on(shop: Recipe) -> None:
    assert shop.ranking is not None
    usual = Teacher(shop.engine, shop.ranking, shop.domain, shop.encoder)

    def folder(**changes: Any) -> str:
        return Teacher(**{**{f: getattr(usual, f) for f in usual.__dataclass_fields__}, **changes}).folder

    assert folder() == usual.folder
    ranking = shop.ranking
    assert folder(config=ranking.model_copy(update={"tuning": TuningConfig(epochs=7)})) == usual.folder
    for change in (
        {"adapter_sha256": "a"},
        {"engine": ENGINES.load("echo").model_validate({"type": "echo"})},
        {"config": ranking.model_copy(update={"data": ranking.data.model_copy(update={"behaviors": 4})})},
        {"scenario": shop.domain.model_copy(update={"nouns": ("picture", "pictures")})},
    ):
        assert folder(**change) != usual.folder
    assert SOFT_LABELS.names == ["user_id", "item_id", "timestamp", "p"]
