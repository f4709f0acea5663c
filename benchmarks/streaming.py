"""Streaming refresh of user knowledge, on a replay of MovieLens-100K in the order of time.

`cost`: a full run on the first 60 % of all behaviors, then a refresh a day, with an engine that answers at once: calls
of each day beside the share of users who acted that day. `worth`: the same with SmolLM2-135M and a refresh a week over
the next fifth: tokens of a refresh's prompts beside those of whole histories, whether drift predicts how far a user's
vector moves, and AUC on the days after: CTR models trained on what came between, which then read, for the same
samples, the texts of the first run (fixed), of the refreshes (streaming) and of a second full run.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.samples import RATED, labeled
from benchmarks.table import Figure, options_parser, show
from owlrec.ctr.dataset import reduced
from owlrec.ctr.experiment import CTRConfig, Trial
from owlrec.ctr.features import build_features
from owlrec.ctr.knowledge_tables import STREAMING, KnowledgeTable, VectorTable, open_vectors
from owlrec.ctr.trainer import TrainingData, train_one
from owlrec.encoding.vectors import PARTITIONS, VectorShards, partitions_folder
from owlrec.evaluation import GridScores, compare_arms
from owlrec.generation import EchoEngineConfig, EngineConfig, VllmEngineConfig, token_counter
from owlrec.generation.engines import PACKAGED
from owlrec.ids import run_starts
from owlrec.prompting.prompts import Prompt, PromptConfig, user_prompts
from owlrec.recipe import Recipe
from owlrec.refresh.state import State
from owlrec.releases.release import open_release
from owlrec.schema import HISTORIES, SAMPLES
from owlrec.shards import finish_stage
from owlrec.sources.datasets import MovieLens100KSource
from owlrec.sources.raw import RawTables
from owlrec.sources.splits import ItemCatalog
from owlrec.workspace import Workspace, shards_for

DAY_MS = 86_400_000
READ = 1000  # behaviors that a full run may read: all that anybody has
HISTORY = 10  # behaviors that a CTR model sees before a sample
BACKBONES, SEEDS = ("din", "dcnv2"), (0, 1, 2)


def main() -> None:
    """Runs what is asked for."""
    parser = options_parser(__doc__)
    parser.add_argument("--only", choices=("cost", "worth"))
    parser.add_argument("--knowledge", type=Path, help="of an earlier run: texts of equal prompts are kept")
    parser.add_argument("--users", type=int, help="as many users, drawn by a seed; default: all 943")
    parser.add_argument("--days", type=int, help="of the cost replay; default: 30, 5 with --quick")
    options = parser.parse_args()
    raw = MovieLens100KSource(type="movielens-100k").load()
    if options.users:
        raw = _sample(raw, options.users)
    figures: list[Figure] = []
    if options.only in (None, "cost"):
        figures += _cost(raw, options.days or (5 if options.quick else 30))
    if options.only == "worth" or (options.only is None and not options.quick):
        figures += _worth(raw, options.knowledge, quick=options.quick)
    show("streaming refresh", figures, options)


def _sample(raw: RawTables, n_users: int) -> RawTables:
    """The tables of some users, and all items."""
    users = raw.users["user_id"].to_numpy()
    kept = np.random.default_rng(0).choice(users, min(n_users, len(users)), replace=False)
    of_kept = lambda table: table.filter(pa.array(np.isin(table["user_id"].to_numpy(), kept)))  # noqa: E731
    return replace(raw, users=of_kept(raw.users), interactions=of_kept(raw.interactions))


def _recipe(workspace: str, engine: dict[str, Any], encoder: dict[str, Any] | None = None) -> Recipe:
    values = {
        "name": "replay",
        "scenario": "movies",
        "workspace": workspace,
        "source": {"type": "movielens-100k"},
        "shard_rows": 128,
        "prompts": {"history_tokens": 128},
        "engine": engine,
        "encoder": encoder or {},
        "sampling": {"max_tokens": 64},
        "quality": {"policy": {"repetition": "keep"}},
        "decoding": {"mode": "strict"},
        "streaming": {"admit": ["users"]},
    }
    return Recipe.model_validate(values)


def _until(raw: RawTables, share: float) -> int:
    """The moment up to which this share of all behaviors has happened."""
    return int(np.quantile(raw.interactions["timestamp"].to_numpy(), share, method="lower"))


def _between(raw: RawTables, after: int, until: int) -> pa.Table:
    time_ = raw.interactions["timestamp"].to_numpy()
    return raw.interactions.filter(pa.array((time_ > after) & (time_ <= until)))


def _full_run(raw: RawTables, recipe: Recipe, until: int) -> Workspace:
    """Tables that end at `until`, whose histories hold all there is, and all stages up to a release."""
    from owlrec.runs.stages import stage_function

    workspace = Workspace(recipe.workspace)
    interactions = labeled(_between(raw, -1, until))
    histories = _histories(interactions)
    tables = {"users": raw.users, "interactions": interactions, "histories": histories}
    for name, table in tables.items():
        workspace.write_table(name, table, key="user_id", n_shards=shards_for(raw.users.num_rows, recipe.shard_rows))
    workspace.write_table("items", raw.items, key="item_id", n_shards=shards_for(raw.items.num_rows, recipe.shard_rows))
    counts = {"users": raw.users.num_rows, "items": raw.items.num_rows, "labels": RATED.model_dump_json()}
    finish_stage(workspace, "prepare", f"{until:064d}", counts=counts)
    for stage in ("generate", "encode", "publish"):
        stage_function(stage)(recipe, workspace)
    return workspace


def _histories(interactions: pa.Table) -> pa.Table:
    rows = []
    for user, user_rows in interactions.to_pandas().sort_values(["timestamp", "item_id"]).groupby("user_id"):
        last = user_rows.tail(READ)
        rows.append(
            {
                "user_id": int(user),
                "as_of": int(last["timestamp"].iloc[-1]),
                "items": last["item_id"].tolist(),
                "ratings": last["rating"].tolist(),
            }
        )
    return pa.Table.from_pylist(rows, schema=HISTORIES)


def _refreshes(
    raw: RawTables, recipe: Recipe, workspace: Workspace, start: int, days: int, step: int
) -> Iterator[tuple[int, pa.Table, State | None]]:
    """Adds the events of `step` days to the log and refreshes, again and again; the moment, the events, the state."""
    from owlrec.runs.upkeep import run

    for day in range(0, days, step):
        low, high = start + day * DAY_MS, start + min(day + step, days) * DAY_MS
        events = _between(raw, low, high)
        if events.num_rows:
            workspace.write_parquet(f"events/{day:04d}.parquet", events)
        print(f"day {day} of {days}: {events.num_rows} events", file=sys.stderr, flush=True)
        if workspace.exists("events"):
            states = run(recipe, workspace, now=high)
            yield high, events, states[-1] if states else None


def _cost(raw: RawTables, days: int) -> list[Figure]:
    start = _until(raw, 0.6)
    over, acting, calls, worst = 0, [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        recipe = _recipe(folder, {"type": "echo"})
        workspace = _full_run(raw, recipe, start)
        for moment, events, state in _refreshes(raw, recipe, workspace, start, days, 1):
            users = len(set(_between(raw, -1, moment)["user_id"].to_pylist()))
            acting.append(len(set(events["user_id"].to_pylist())) / users)
            calls.append((state.calls if state else 0) / users)
            worst = max(worst, calls[-1] - acting[-1])
            over += calls[-1] > acting[-1] + 0.01
        from owlrec.runs.upkeep import run

        again = run(recipe, workspace, now=start + days * DAY_MS)
    measure = f"{len(calls)} days, a refresh a day"
    return [
        Figure(
            measure=measure, method="owlrec", value=round(100 * float(np.mean(acting)), 2), unit="% of users act, mean"
        ),
        Figure(
            measure=measure,
            method="owlrec",
            value=round(100 * float(np.mean(calls)), 2),
            unit="% of a full run's calls, mean",
            ratio_to="acting users",
            ratio=float(np.sum(calls) / np.sum(acting)),
        ),
        Figure(
            measure=measure, method="owlrec", value=round(100 * worst, 2), unit="% calls beyond acting users, worst day"
        ),
        Figure(measure=measure, method="owlrec", value=over, unit="days above acting + 1 %"),
        Figure(measure="refresh once more", method="owlrec", value=sum(state.calls for state in again), unit="calls"),
    ]


def _worth(raw: RawTables, knowledge: Path | None, *, quick: bool) -> list[Figure]:
    start, end = _until(raw, 0.6), _until(raw, 0.8)
    engine: EngineConfig = VllmEngineConfig(type="vllm", model=PACKAGED, max_model_len=1024, max_num_seqs=8)
    encoder = {}
    if quick:
        engine, encoder = EchoEngineConfig(type="echo"), {"model": "hashing"}
    count = token_counter(engine)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        recipe = _recipe(first, engine.model_dump(), encoder)
        if knowledge is not None:
            shutil.copytree(knowledge, Path(first) / "knowledge")
        workspace = _full_run(raw, recipe, start)
        everyone = raw.users["user_id"].to_numpy()
        with open_release(workspace) as release:
            fixed, items = _table(release, "user", everyone), _table(release, "item", raw.items["item_id"].to_numpy())
        tokens: list[tuple[int, int, int]] = []
        moved: list[tuple[float, float]] = []
        calls, seconds, before = 0, time.perf_counter(), fixed
        days = -(-(end - start) // DAY_MS)
        for moment, _, state in _refreshes(raw, recipe, workspace, start, days, 7):
            if state is None or not state.calls:
                continue
            calls += state.calls
            tokens += list(_tokens(raw, recipe, workspace, state, moment, count))
            with open_release(workspace) as release:
                after = _table(release, "user", everyone)
            moved += list(_moves(workspace, state, before, after))
            before = after
        seconds = time.perf_counter() - seconds
        shards = VectorShards(workspace, partitions_folder(recipe.encoder.identity), PARTITIONS)
        partitions = open_vectors(shards)
        assert isinstance(partitions, KnowledgeTable)
        full = _recipe(second, engine.model_dump(), encoder)
        shutil.copytree(Path(first) / "knowledge", Path(second) / "knowledge")  # prompts that stay the same are kept
        with open_release(_full_run(raw, full, end)) as release:
            again = _table(release, "user", everyone)
        figures = [*_token_figures(tokens), *_move_figures(moved)]
        measure = f"{days} days, a refresh a week"
        figures.append(Figure(measure=measure, method="streaming", value=calls, unit=f"calls ({seconds:.0f} s)"))
        tables = {"fixed": fixed, "again": again, "partitions": partitions, "items": items}
        backbones, seeds = (BACKBONES[:1], SEEDS[:1]) if quick else (BACKBONES, SEEDS)
        return [*figures, *_aucs(raw, start, end, tables, backbones, seeds)]


def _table(release: Any, kind: str, ids: np.ndarray) -> KnowledgeTable:
    """The release's vectors, each as of its text."""
    vectors, known = release.store.vectors(kind, ids)
    as_of = np.array([text.as_of for text in release.store.get(kind, ids[known])], dtype=np.int64)
    order = np.argsort(ids[known])
    return KnowledgeTable(ids[known][order], vectors[known][order].astype(np.float16), as_of[order])


def _joined(*tables: KnowledgeTable) -> KnowledgeTable:
    """The rows of several tables in one; of two as of one moment the first table's stays."""
    columns = [(t.ids, t.vectors, t.as_of) for t in tables]
    ids, vectors, as_of = (np.concatenate(arrays) for arrays in zip(*columns, strict=True))
    order = np.lexsort((as_of, ids))
    first = run_starts(ids[order], as_of[order]) == np.arange(len(ids))
    return KnowledgeTable(*(array[order[first]] for array in (ids, vectors, as_of)))


def _tokens(
    raw: RawTables, recipe: Recipe, workspace: Workspace, state: State, moment: int, count: Any
) -> Iterator[tuple[int, int, int]]:
    """Of each user who is asked about: tokens of the refresh's first prompt, of a full run's, and of one that quotes
    all.
    """
    asked: dict[int, int] = {}
    for name in workspace.names(state.prompts):
        for row in workspace.read_parquet(f"{state.prompts}/{name}").to_pylist():
            asked.setdefault(row["id"], count(row["system"]) + count(row["text"]))
    histories = _histories(_between(raw, -1, moment))
    histories = histories.filter(pa.array(np.isin(histories["user_id"].to_numpy(), list(asked))))
    catalog = ItemCatalog(raw.items)
    lengths: list[dict[int, int]] = []
    for budget in (256, 1 << 20):
        config = PromptConfig(history_tokens=budget)
        prompts = user_prompts(raw.users, histories, catalog, config, recipe.domain, count)
        lengths.append({p.id: count(p.system) + count(p.text) for p in prompts if isinstance(p, Prompt)})
    for user, mine in asked.items():
        yield mine, lengths[0][user], lengths[1][user]


def _token_figures(tokens: list[tuple[int, int, int]]) -> Iterator[Figure]:
    mine, cut, whole = np.array(tokens, dtype=float).T
    for method, method_tokens in (
        ("a full run's prompts, 256 tokens of history", cut),
        ("prompts that quote the whole history", whole),
    ):
        yield Figure(
            measure="tokens a prompt, mean", method=method, value=round(float(method_tokens.mean()), 1), unit="tokens"
        )
        yield Figure(
            measure="tokens a prompt, mean",
            method="refresh",
            value=round(float(mine.mean()), 1),
            unit="tokens",
            ratio_to=method,
            ratio=float(mine.mean() / method_tokens.mean()),
        )


def _moves(
    workspace: Workspace, state: State, before: KnowledgeTable, after: KnowledgeTable
) -> Iterator[tuple[float, float]]:
    """Of each user renewed who had a text before: drift, and one minus the cosine of the two vectors."""
    for name in workspace.names(state.partitions):
        table = workspace.read_parquet(f"{state.partitions}/{name}")
        ids, first = np.unique(table["user_id"].to_numpy(), return_index=True)
        place = before.find(ids), after.find(ids)
        both = (place[0] >= 0) & (place[1] >= 0)
        old, new = (t.vectors_at(rows).astype(np.float32) for t, rows in zip((before, after), place, strict=True))
        cosine = (old * new).sum(axis=1) / np.maximum(np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1), 1e-9)
        for drift, change in zip(table["drift"].to_numpy()[first][both], 1 - cosine[both], strict=True):
            yield float(drift), float(change)


def _move_figures(moved: list[tuple[float, float]]) -> Iterator[Figure]:
    from scipy.stats import spearmanr

    drift, change = np.array(moved).T
    correlation = spearmanr(drift, change)
    unit = f"rank correlation (p {correlation.pvalue:.2g}, {len(moved)} renewals)"
    yield Figure(
        measure="drift against the vector's change",
        method="streaming",
        value=round(float(correlation.statistic), 3),
        unit=unit,
    )


def _samples(raw: RawTables, start: int, end: int) -> pa.Table:
    """Every behavior after `start` with the ten before it; the last quarter up to `end` is valid, the rest test."""
    late = _until(raw, 0.75)
    rows: dict[str, list[Any]] = {name: [] for name in SAMPLES.names}
    table = raw.interactions.to_pandas().sort_values(["user_id", "timestamp", "item_id"])
    for user, user_rows in table.groupby("user_id"):
        moments, items, ratings = (user_rows[c].to_numpy() for c in ("timestamp", "item_id", "rating"))
        for i in np.flatnonzero(moments > start):
            first = int(np.searchsorted(moments, moments[i]))  # what happened in the same moment is not its past
            past = slice(max(0, first - HISTORY), first)
            split = "train" if moments[i] <= late else "valid" if moments[i] <= end else "test"
            values = (
                user,
                items[i],
                float(ratings[i] > 3),
                moments[i],
                items[past].tolist(),
                ratings[past].tolist(),
                (ratings[past] > 3).astype(float).tolist(),
                split,
            )
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
    return pa.table([pa.array(rows[f.name], f.type) for f in SAMPLES], schema=SAMPLES)


def _aucs(
    raw: RawTables,
    start: int,
    end: int,
    tables: dict[str, KnowledgeTable],
    backbones: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[Figure]:
    """Each arm's model trained and tested on what was known before each sample, and its difference to `fixed`."""
    features = build_features(
        raw.users, raw.items, _samples(raw, start, end), features={"items": ("genres",), "users": ()}, min_item_count=2
    )
    tables = reduced(tables, CTRConfig().knowledge_variance)  # as `train_ctr` does
    fixed, partitions, items = tables["fixed"], tables["partitions"], tables["items"]
    users: dict[str, dict[str, VectorTable]] = {
        "fixed": {"knowledge": fixed},
        "full": {"knowledge": _joined(fixed, tables["again"])},
        "streaming": {"knowledge": _joined(fixed, partitions)},
        "partitions": {"knowledge": fixed, STREAMING: partitions},
    }
    test = features.splits["test"].whole()
    read = {name: np.mean(sources["knowledge"].find(test.user_ids, test.times) >= 0) for name, sources in users.items()}
    read["partitions"] = np.mean(partitions.find(test.user_ids, test.times) >= 0)
    assert read["partitions"] > 0, "no sample reads a partition"
    for backbone in backbones:
        scores: dict[str, np.ndarray] = {}
        aucs: dict[str, list[float]] = {}
        for seed, (name, sources) in product(seeds, [("no knowledge", {}), *users.items()]):
            arm = "none" if not sources else "streaming" if name == "partitions" else "knowledge"
            knowledge = {source: {"user": table} for source, table in sources.items()}
            knowledge.setdefault("knowledge", {})["item"] = items
            trial = Trial.model_validate({"backbone": backbone, "arm": arm, "seed": seed})
            trained = train_one(trial, TrainingData(features, knowledge), CTRConfig())
            scores[f"{name}/{seed}"] = trained.test.scores
            aucs.setdefault(name, []).append(trained.result.test.auc)
        grid = GridScores(trained.test.user_ids, trained.test.labels, scores)
        pairs = {name: [(f"{name}/{seed}", f"fixed/{seed}") for seed in seeds] for name in aucs if name != "fixed"}
        intervals = compare_arms(grid, pairs)
        for name, method_aucs in aucs.items():
            share = f"; {read[name]:.0%} of samples read one" if name in read else ""
            unit = f"AUC{share}"
            if interval := intervals.get(name):
                difference = float(np.mean(method_aucs)) - float(np.mean(aucs["fixed"]))
                unit += f"; {difference:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}] to fixed"
            value = round(float(np.mean(method_aucs)), 4)
            yield Figure(measure=f"days after, {backbone}", method=name, value=value, unit=unit)


if __name__ == "__main__":
    main()
