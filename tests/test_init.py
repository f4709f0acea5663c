"""`owlrec init`: the recipe that it writes for tables as people have them, and what it asks or refuses."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from owlrec.cli import app
from owlrec.errors import RecipeError
from owlrec.recipe import draft, find_tables, load_recipe

SECONDS = 1_700_000_000


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `shop` with a log in two files, in seconds, with columns under names of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shop"
    folder.mkdir()
    n = np.arange(120)
    log = pd.DataFrame({"CustomerID": n % 12, "sku": [f"B{k % 9}" for k in n], "stars": n % 5 + 1.0, "ts": SECONDS + n})
    log[:60].to_parquet(folder / "clicks-1.parquet")
    log[60:].to_parquet(folder / "clicks-2.parquet")
    pd.DataFrame({"sku": [f"B{k}" for k in range(9)], "name": "Tea", "brand": "Owl"}).to_csv(
        folder / "products.csv", index=False
    )
    pd.DataFrame({"id": range(12), "age": 30}).to_json(folder / "customers.jsonl", orient="records", lines=True)
    return folder


def refused(question: str, answers: object, *, guess: bool) -> str:
    raise AssertionError(question)


def test_the_recipe_runs_as_it_is(shop: Path) -> None:
    wrote = CliRunner().invoke(app, ["init", str(shop), "--yes"])
    assert wrote.exit_code == 0, wrote.output
    recipe = load_recipe("shop.yaml")
    raw = recipe.source.load()
    assert (len(raw.users), len(raw.items), len(raw.interactions)) == (12, 9, 120)
    assert raw.interactions["timestamp"].to_numpy().min() == SECONDS * 1000
    assert recipe.scenario.text_fields == ("brand",)
    ran = CliRunner().invoke(app, ["run", "shop.yaml", "--only", "prepare", "--json"])
    assert ran.exit_code == 0, ran.output
    assert '"interactions": 120' in ran.stdout


def test_a_recipe_that_is_there_stays(shop: Path) -> None:
    Path("shop.yaml").write_text("mine")
    again = CliRunner().invoke(app, ["init", str(shop), "--yes"])
    assert (again.exit_code, Path("shop.yaml").read_text()) == (1, "mine")
    assert CliRunner().invoke(app, ["init", str(shop), "--yes", "--output", "other.yaml"]).exit_code == 0
    assert load_recipe("other.yaml").name == "other"


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units_of_time_are_told_by_their_size(tmp_path: Path, unit: str, factor: int) -> None:
    log = pd.DataFrame({"user": [1], "movieId": [2], "rating": [3.0], "timestamp": [SECONDS * factor]})
    log.to_csv(tmp_path / "ratings.csv", index=False)
    pd.DataFrame({"movieId": [2], "title": ["Heat"]}).to_csv(tmp_path / "movies.csv", index=False)
    made = draft(find_tables(tmp_path), refused)
    assert (made.unit, made.domain) == (unit, "movies")
    assert made.columns["interactions"] == {"user_id": "user", "item_id": "movieId"}


def test_what_cannot_be_guessed_is_asked(tmp_path: Path) -> None:
    log = pd.DataFrame({"user_id": [1], "item_id": [2], "when": [SECONDS]})
    log.to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame({"item_id": [2], "title": ["Heat"]}).to_csv(tmp_path / "films.csv", index=False)
    asked = {}

    def ask(question: str, answers: list[str], *, guess: bool) -> str:
        asked[question] = guess
        return "when" if "when" in answers else answers[0]

    made = draft(find_tables(tmp_path), ask)
    assert made.columns["interactions"] == {"timestamp": "when"}
    assert list(asked.values()) == [False, False]


def test_a_folder_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no table of interactions"):
        draft(find_tables(tmp_path), refused)


def test_run_without_a_recipe_says_what_to_do(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tables = CliRunner().invoke(app, ["run"])
    assert (with_tables.exit_code, "`owlrec init`" in with_tables.stderr) == (1, True)
    CliRunner().invoke(app, ["init", str(shop), "--yes"])
    assert "`owlrec run shop.yaml`" in CliRunner().invoke(app, ["run"]).stderr
    (shop / "empty").mkdir()
    monkeypatch.chdir(shop / "empty")
    assert "`owlrec init FOLDER`" in CliRunner().invoke(app, ["run"]).stderr


def test_keys_that_are_gone_lead_to_init(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(
        "{name: old, scenario: books, workspace: w, source: {type: movielens-100k}, engine: {type: echo}, zzzz: 1}"
    )
    refused = CliRunner().invoke(app, ["run", str(tmp_path / "old.yaml"), "--dry-run"])
    assert (refused.exit_code, "`owlrec init`" in refused.stderr) == (1, True)
