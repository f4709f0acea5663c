"""What a sample of the proof may read, on small tables of the form of its data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.proof_designs import (
    NEGATIVES,
    collaborative_scores,
    missing_files,
    opaque,
    temporal,
    wide,
)
from owlrec.errors import SourceError

USERS, FILMS = 40, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the shapes that docs/proof.md names."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    films = np.arange(1, FILMS + 1)
    tables = {
        "ml1m/items": pd.DataFrame(
            {
                "item_id": films,
                "title": [f"Film {i}, The (1990)" for i in films],
                "genres": [["Drama"]] * FILMS,
                "overview": "About it.",
                "director": None,
                "actors": "A|B",
            }
        ),
        "ml1m/users": pd.DataFrame(
            {"user_id": range(1, USERS + 1), "gender": "F", "age_code": 1, "occupation_code": "3"}
        ),
        "ml1m/user_texts_qwenmax": pd.DataFrame({"id": range(1, USERS + 1), "text": "Likes The Film 3."}),
    }
    for llm in ("deepseek", "qwenmax"):
        tables[f"ml1m/item_texts_{llm}"] = pd.DataFrame({"id": films, "text": [f"{llm} on {i}" for i in films]})
    pairs = pd.DataFrame(
        [(u, i) for u in range(1, USERS + 1) for i in rng.permutation(films)[:20]], columns=["user_id", "item_id"]
    )
    tables["ml1m/watched"] = pairs
    labels = pairs.groupby("user_id").head(5)
    tables["ml1m/labels"] = labels.assign(label=rng.integers(0, 2, len(labels)))
    n = 400
    times = np.sort(rng.integers(0, 60, n))  # many ties
    tables["ml1m/collm"] = pd.DataFrame(
        {
            "user_id": rng.integers(0, 8, n),
            "item_id": np.where(np.arange(n) == 7, np.nan, rng.integers(1, FILMS + 1, n)),
            "collm_item": 3,
            "label": rng.integers(0, 2, n),
            "timestamp": times,
            "split": np.array(["train", "valid", "test"])[np.searchsorted([30, 45], times, side="right")],
        }
    )
    plays = pairs.rename(columns={"item_id": "artist_id"}).groupby("user_id").head(9)
    tables["lastfm/colakg"] = plays.assign(split=np.where(rng.random(len(plays)) < 0.8, "train", "test"))
    tables["lastfm/artists"] = pd.DataFrame({"artist_id": films, "name": "N", "tags": [["rock"]] * FILMS})
    for kind in ("item", "user"):
        tables[f"lastfm/{kind}_texts_deepseek"] = pd.DataFrame({"id": films, "text": "prose"})
    for name, table in tables.items():
        (root / name).parent.mkdir(exist_ok=True)
        table.to_parquet(root / f"{name}.parquet")
    return root


def test_temporal_histories_are_the_users_rows_of_earlier_moments(folder: Path) -> None:
    samples = temporal(folder).samples.to_pandas()
    rows = pd.read_parquet(folder / "ml1m/collm.parquet")
    assert len(samples) == len(rows)
    for row in samples.iloc[::17].itertuples():
        before = rows[(rows["user_id"] == row.user_id) & (rows["timestamp"] < row.timestamp)]
        assert list(row.history_labels) == before["label"].tolist()[-20:]
        assert list(row.history) == before["item_id"].fillna(1_000_003).astype(int).tolist()[-20:]
    assert 1_000_003 in samples["item_id"].to_numpy()  # a row of no film of MovieLens keeps an id of its own


def test_wide_folds_part_users_and_no_history_has_a_sampled_film(folder: Path) -> None:
    folds = [wide(folder, fold) for fold in range(10)]
    tested = [set(d.samples.filter(_is(d.samples, "test"))["user_id"].to_pylist()) for d in folds]
    assert sorted(user for users in tested for user in users) == list(range(1, USERS + 1))
    labels = pd.read_parquet(folder / "ml1m/labels.parquet")
    sampled = {(row.user_id, row.item_id) for row in labels.itertuples()}
    table = folds[0].samples.to_pandas()
    assert len(table) == len(labels)
    assert not any((row.user_id, item) in sampled for row in table.itertuples() for item in row.history)
    assert table["history"].map(len).min() == 15
    test = folds[0].samples.filter(_is(folds[0].samples, "test"))["item_id"].to_numpy()
    assert (folds[0].slices["title not in the user's text"] == (test != 3)).all()


def test_a_share_of_the_training_rows_leaves_the_others_as_they_are(folder: Path) -> None:
    all_, few = (wide(folder, 0, share=share).samples.to_pandas() for share in (1.0, 0.25))
    assert 0.1 < (few["split"] == "train").sum() / (all_["split"] == "train").sum() < 0.4
    assert (few["split"] != "train").sum() == (all_["split"] != "train").sum()


def test_a_cold_film_is_in_no_training_row_and_in_no_history(folder: Path) -> None:
    table = wide(folder, 3, cold=True).samples.to_pandas()
    cold = set(table.loc[table["split"] == "test", "item_id"])
    assert len(cold) == FILMS / 10
    assert not cold & set(table.loc[table["split"] != "test", "item_id"])
    assert not cold & {item for history in table["history"] for item in history}


@pytest.mark.parametrize("cold", [False, True])
def test_negatives_were_never_played_and_no_history_has_its_candidate(folder: Path, cold: bool) -> None:
    design = opaque(folder, cold=cold)
    table, plays = design.samples.to_pandas(), pd.read_parquet(folder / "lastfm/colakg.parquet")
    played = {(row.user_id, row.artist_id) for row in plays.itertuples()}
    assert all(((row.user_id, row.item_id) in played) == (row.label == 1) for row in table.itertuples())
    assert (table["label"] == 0).sum() == NEGATIVES * (table["label"] == 1).sum()
    assert not any(row.item_id in row.history for row in table.itertuples())
    test = table[table["split"] == "test"]
    if cold:
        new = set(test["item_id"])
        assert not new & set(table.loc[table["split"] != "test", "item_id"])
        assert not new & {item for history in table["history"] for item in history}
    scores = collaborative_scores(design)
    train = table[(table["split"] == "train") & (table["label"] == 1)]
    listeners = {item: set(its) for item, its in train.groupby("item_id")["user_id"]}
    for score, row in list(zip(scores, test.itertuples(), strict=True))[::13]:
        mine = listeners.get(row.item_id, set())
        shares = (len(mine & (its := listeners[i])) / np.sqrt(max(len(mine), 1) * len(its)) for i in row.history)
        assert score == pytest.approx(sum(shares), abs=1e-4)


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    assert missing_files(folder, "wide") == []
    assert "ml1m/watched.parquet" in missing_files(tmp_path, "wide")
    with pytest.raises(SourceError, match=r"ml1m/collm\.parquet"):
        temporal(tmp_path)


def _is(samples: object, split: str) -> list[bool]:
    return [name == split for name in samples["split"].to_pylist()]  # type: ignore[index]
