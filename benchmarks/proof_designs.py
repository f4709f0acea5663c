"""The designs of docs/proof.md as tables: who is asked about what, what a sample may read, and which texts there are.

Data is read from a folder (--data) of Parquet files that are public and may not be shipped; docs/proof.md names them.
Each design is a function of that folder and of seeds alone. No label of a valid or test row reaches a history.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.samples import RATED
from owlrec import schema
from owlrec.errors import SourceError
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.sources.splits import SplitConfig, build_samples

Texts = Mapping[int, str]

FOLDS = 10
TEMPORAL_HISTORY, WIDE_HISTORY = 20, 50
NEGATIVES = 3  # per positive
COLD_SHARE = 0.2  # of LastFM's artists
VALID_SHARE = 0.1  # of LastFM's training positives
FILES = {
    "temporal": ("ml1m/collm", "ml1m/items", "ml1m/item_texts_deepseek", "ml1m/item_texts_qwenmax"),
    "wide": (
        "ml1m/labels",
        "ml1m/watched",
        "ml1m/users",
        "ml1m/items",
        "ml1m/item_texts_deepseek",
        "ml1m/item_texts_qwenmax",
        "ml1m/user_texts_qwenmax",
    ),
    "opaque": ("lastfm/artists", "lastfm/colakg", "lastfm/item_texts_deepseek", "lastfm/user_texts_deepseek"),
    "dose": (),
}


@dataclass(frozen=True)
class Design:
    """Tables of one experiment, as training reads them.

    users, items: with the columns that models read as categories. samples: schema.SAMPLES. item_texts, user_texts: by
    arm. slices: bool [test rows], parts of the test split that are reported by themselves.
    """

    users: pa.Table
    items: pa.Table
    samples: pa.Table
    item_texts: Mapping[str, Texts]
    user_texts: Mapping[str, Texts] = field(default_factory=dict)
    slices: Mapping[str, np.ndarray] = field(default_factory=dict)


def missing_files(folder: Path, design: str) -> list[str]:
    """Files that a design needs and the folder does not have."""
    return [f"{name}.parquet" for name in FILES[design] if not (folder / f"{name}.parquet").exists()]


def temporal(folder: Path) -> Design:
    """CoLLM's slice of MovieLens-1M: its own split by time, histories of a user's strictly earlier rows."""
    rows = _read(folder, "ml1m/collm").sort_values(["user_id", "timestamp"], kind="stable", ignore_index=True)
    # Rows without a film of MovieLens keep an id of their own, and have no text.
    rows["item_id"] = rows["item_id"].fillna(rows["collm_item"] + 1_000_000).astype(np.int64)
    films = _films(folder)
    unknown = sorted(set(rows["item_id"]) - set(films["item_id"]))
    films = pd.concat([films, pd.DataFrame({"item_id": unknown, "title": ""})], ignore_index=True)
    user, time = rows["user_id"].to_numpy(), rows["timestamp"].to_numpy()
    first_of_user = np.searchsorted(user, user)
    moment = pd.MultiIndex.from_arrays([user, time])
    # Rows of the same moment do not see each other.
    end = pd.Series(np.arange(len(rows))).groupby(moment.factorize()[0]).transform("min").to_numpy()
    start = np.maximum(first_of_user, end - TEMPORAL_HISTORY)
    samples = _samples(
        rows["user_id"],
        rows["item_id"],
        rows["label"],
        rows["split"],
        _ranges(start, end, rows["item_id"].to_numpy()),
        _ranges(start, end, rows["label"].to_numpy().astype(np.float32)),
        time,
    )
    users = pa.table({"user_id": np.unique(user)})
    return Design(users, _item_table(films), samples, _item_texts(folder, films))


def wide(folder: Path, fold: int, *, share: float = 1.0, cold: bool = False, seed: int = 0) -> Design:
    """The 187,490 labels of MovieLens-1M by user: fold `fold` of ten is the test split, the next one the valid split.

    share: of the training rows that are kept. cold: folds are of films instead, which then stand in no history.
    """
    labels = _read(folder, "ml1m/labels")
    films, people = _films(folder), _read(folder, "ml1m/users")
    keys = labels["item_id"] if cold else labels["user_id"]
    folds = _folds(keys.to_numpy(), seed)
    split = np.where(folds == fold, "test", np.where(folds == (fold + 1) % FOLDS, "valid", "train"))
    watched = _read(folder, "ml1m/watched")
    sampled = pd.MultiIndex.from_frame(labels[["user_id", "item_id"]])
    watched = watched[~pd.MultiIndex.from_frame(watched.astype(np.int64)).isin(sampled)]
    if cold:
        held_out = labels["item_id"][split != "train"].unique()
        watched = watched[~watched["item_id"].isin(held_out)]
    rng = np.random.default_rng(seed)
    taken = watched.iloc[rng.permutation(len(watched))].groupby("user_id")["item_id"]
    history = {int(user): items.to_numpy()[:WIDE_HISTORY].astype(np.int64) for user, items in taken}
    kept = (split != "train") | (rng.random(len(labels)) < share)
    labels, split = labels[kept].reset_index(drop=True), split[kept]
    items = [history.get(int(user), np.zeros(0, np.int64)) for user in labels["user_id"]]
    samples = _samples(labels["user_id"], labels["item_id"], labels["label"], split, items)
    people = people.assign(
        age_code=people["age_code"].astype(str), occupation_code=people["occupation_code"].astype(str)
    )
    by_llm = _texts(folder, "ml1m/user_texts_qwenmax")
    test = labels[split == "test"]
    titles = dict(zip(films["item_id"], films["title"].map(_bare_title), strict=True))
    named = [titles[item] in by_llm.get(user, "") for user, item in zip(test["user_id"], test["item_id"], strict=True)]
    return Design(
        pa.Table.from_pandas(people, preserve_index=False),
        _item_table(films),
        samples,
        _item_texts(folder, films),
        {"llm_b": by_llm},
        {"title not in the user's text": ~np.array(named)},
    )


def dose(false_share: float, seed: int = 0) -> Design:
    """MovieLens-100K with genres and year hidden: they are told in sentences, a share of which is of another film."""
    raw = MovieLens100KSource(type="movielens-100k").load()
    made = build_samples(raw.interactions, SplitConfig(cuts=("kar",)), RATED)
    films = raw.items.to_pandas()
    facts = [_sentence(row) for row in films.to_dict("records")]
    rng = np.random.default_rng(seed)
    false = np.flatnonzero(rng.random(len(facts)) < false_share)
    told = list(facts)
    for at in false:
        told[at] = facts[int(rng.integers(len(facts)))]
    return Design(
        raw.users.select(["user_id"]),
        pa.table({"item_id": raw.items["item_id"], "genres": raw.items["genres"], "year": raw.items["year"]}),
        made.samples,
        {"sentences": dict(zip(films["item_id"], told, strict=True))},
    )


def opaque(folder: Path, *, cold: bool, seed: int = 0) -> Design:
    """LastFM: plays are positive, negatives are drawn by popularity among artists that the user never played.

    cold: a fifth of the artists stands in no training row and no history, and test rows are of those alone.
    """
    plays = _read(folder, "lastfm/colakg").drop_duplicates(["user_id", "artist_id"])
    rng = np.random.default_rng(seed)
    artists = np.sort(plays["artist_id"].unique())
    new = set(rng.choice(artists, int(len(artists) * COLD_SHARE), replace=False).tolist()) if cold else set()
    is_new = plays["artist_id"].isin(new)
    train = plays[(plays["split"] == "train") & ~is_new]
    test = plays[is_new] if cold else plays[plays["split"] == "test"]
    valid = rng.random(len(train)) < VALID_SHARE
    known = train[~valid]
    history = {int(user): its.to_numpy() for user, its in known.groupby("user_id")["artist_id"]}
    ever = {int(user): set(its.tolist()) for user, its in plays.groupby("user_id")["artist_id"]}
    drawn = {
        "train": _with_negatives(known, artists[~np.isin(artists, list(new))], known, ever, rng),
        "valid": _with_negatives(train[valid], artists[~np.isin(artists, list(new))], known, ever, rng),
        "test": _with_negatives(test, np.array(sorted(new)) if cold else artists, plays, ever, rng),
    }
    rows = pd.concat([part.assign(split=split) for split, part in drawn.items()], ignore_index=True)
    items = [
        (its := history.get(int(user), np.zeros(0, np.int64)))[its != item][-WIDE_HISTORY:]
        for user, item in zip(rows["user_id"], rows["artist_id"], strict=True)
    ]
    samples = _samples(rows["user_id"], rows["artist_id"], rows["label"], rows["split"], items)
    about = _read(folder, "lastfm/artists").rename(columns={"artist_id": "item_id"})
    about = about[about["item_id"].isin(artists)].sort_values("item_id", ignore_index=True)
    tags = about["tags"].map(lambda given: ", ".join(given))
    ids = about["item_id"].tolist()
    return Design(
        pa.table({"user_id": np.unique(rows["user_id"])}),
        pa.table({"item_id": pa.array(ids, pa.int64())}),
        samples,
        {
            "names": dict(zip(ids, about["name"], strict=True)),
            "tags": {id_: text for id_, text in zip(ids, tags, strict=True) if text},
            "prose": _texts(folder, "lastfm/item_texts_deepseek"),
        },
        {"prose": _texts(folder, "lastfm/user_texts_deepseek")},
    )


def collaborative_scores(design: Design) -> np.ndarray:
    """Item CF, without training: of each test row the sum of cosines of co-listening between its item and the history.

    float64 [test rows]; 0 where nobody of the training set took the item.
    """
    table = design.samples.to_pandas()
    train = table[(table["split"] == "train") & (table["label"] == 1)]
    users, user_codes = np.unique(train["user_id"], return_inverse=True)
    items = design.items["item_id"].to_numpy()
    taken = np.zeros((len(users), len(items)), np.float32)
    taken[user_codes, np.searchsorted(items, train["item_id"])] = 1
    norms = np.sqrt(taken.sum(axis=0))
    cosines = taken.T @ taken / np.maximum(np.outer(norms, norms), 1e-9)
    test = table[table["split"] == "test"]
    at = np.searchsorted(items, test["item_id"])
    return np.array([cosines[i, np.searchsorted(items, h)].sum() for i, h in zip(at, test["history"], strict=True)])


def _read(folder: Path, name: str) -> pd.DataFrame:
    path = folder / f"{name}.parquet"
    if not path.exists():
        raise SourceError(f"{path} does not exist. docs/proof.md names the public files; other designs may still run.")
    return pq.read_table(path).to_pandas()


def _texts(folder: Path, name: str) -> Texts:
    table = _read(folder, name)
    return dict(zip(table["id"].astype(int), table["text"], strict=True))


def _films(folder: Path) -> pd.DataFrame:
    return _read(folder, "ml1m/items")


def _item_table(films: pd.DataFrame) -> pa.Table:
    genres = [[] if given is None or isinstance(given, float) else list(given) for given in films["genres"]]
    return pa.table(
        {
            "item_id": pa.array(films["item_id"], pa.int64()),
            "title": pa.array(films["title"], pa.string()),
            "genres": pa.array(genres, pa.list_(pa.string())),
        }
    )


def _item_texts(folder: Path, films: pd.DataFrame) -> dict[str, Texts]:
    rows = films[films["title"] != ""].to_dict("records")
    titles = {row["item_id"]: row["title"] for row in rows}
    facts = {row["item_id"]: text for row in rows if (text := _facts(row))}
    return {
        "title": titles,
        "metadata": {row["item_id"]: f"{row['title']}. Genres: {', '.join(row['genres'])}." for row in rows},
        "facts": facts,
        "llm_a": _texts(folder, "ml1m/item_texts_deepseek"),
        "llm_b": _texts(folder, "ml1m/item_texts_qwenmax"),
    }


def _facts(row: Mapping[str, object]) -> str:
    parts = [str(row["overview"] or "")]
    if row["director"]:
        parts.append(f"Directed by {row['director']}.")
    if row["actors"]:
        parts.append(f"With {str(row['actors']).replace('|', ', ')}.")
    return " ".join(part for part in parts if part)


def _sentence(row: Mapping[str, object]) -> str:
    genres = row["genres"]
    kinds = " and ".join(map(str, genres)) if isinstance(genres, Iterable) and len(list(genres)) else "uncategorized"
    year = row["year"]
    return f"A film of the kind {kinds}" + (f", released in {year}." if year == year and year else ".")


def _bare_title(title: str) -> str:
    """Without the year, and with its article in front, as prose names a film."""
    name = title.rsplit(" (", 1)[0]
    for article in ("The", "A", "An"):
        if name.endswith(f", {article}"):
            return f"{article} {name.removesuffix(f', {article}')}"
    return name


def _folds(keys: np.ndarray, seed: int) -> np.ndarray:
    distinct, codes = np.unique(keys, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(distinct)) % FOLDS)[codes]


def _with_negatives(
    positives: pd.DataFrame,
    candidates: np.ndarray,
    counted: pd.DataFrame,
    ever: Mapping[int, set[int]],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """The positives, and NEGATIVES for each, drawn from `candidates` by how often `counted` has them; fewer for users
    who played nearly all."""
    popularity = counted["artist_id"].value_counts().reindex(candidates, fill_value=0).to_numpy(float)
    users, items, labels = [], [], []
    for user, its in positives.groupby("user_id", sort=False)["artist_id"]:
        unplayed = ~np.isin(candidates, list(ever[int(user)])) & (popularity > 0)
        left, chances = candidates[unplayed], popularity[unplayed] / popularity[unplayed].sum()
        for item in its:
            drawn = rng.choice(left, min(NEGATIVES, len(left)), replace=False, p=chances).tolist()
            users += [user] * (1 + len(drawn))
            items += [item, *drawn]
            labels += [1, *[0] * len(drawn)]
    return pd.DataFrame({"user_id": users, "artist_id": items, "label": labels})


def _ranges(starts: np.ndarray, ends: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    return [values[start:end] for start, end in zip(starts, ends, strict=True)]


def _samples(
    users: Iterable[int],
    items: Iterable[int],
    labels: Iterable[float],
    splits: Iterable[str],
    histories: Sequence[np.ndarray],
    outcomes: Sequence[np.ndarray] | None = None,
    times: np.ndarray | None = None,
) -> pa.Table:
    """schema.SAMPLES. outcomes: labels of the histories, None where all of them were taken."""
    offsets = pa.array(np.r_[0, np.cumsum([len(h) for h in histories])], pa.int32())
    flat = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
    of_history = np.ones(len(flat), np.float32) if outcomes is None else np.concatenate(list(outcomes))
    columns = {
        "user_id": np.asarray(users, np.int64),
        "item_id": np.asarray(items, np.int64),
        "label": np.asarray(labels, np.float32),
        "timestamp": np.zeros(len(histories), np.int64) if times is None else times,
        "history": pa.ListArray.from_arrays(offsets, pa.array(flat)),
        "history_ratings": pa.ListArray.from_arrays(offsets, pa.array(np.full(len(flat), np.nan, np.float32))),
        "history_labels": pa.ListArray.from_arrays(offsets, pa.array(of_history)),
        "split": pa.array(list(splits), pa.string()),
    }
    return pa.table(columns).cast(schema.SAMPLES)
