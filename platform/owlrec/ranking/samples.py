"""The recipe's `ranking:` section, and the samples that it tunes on (ReiT; ReLLa, WWW 2024).

No torch here: the recipe loads this module at every call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from owlrec.config import Config
from owlrec.ctr.experiment import DistillationConfig
from owlrec.encoding.compression import PROJECTION
from owlrec.errors import RecipeError, SchemaError
from owlrec.generation import EngineConfig, VllmEngineConfig
from owlrec.prompting.frameworks import NO, YES, RankPromptConfig, is_quotable, rank_prompt
from owlrec.ranking.behavior_retrieval import BehaviourRetriever, with_candidates
from owlrec.scenario import Scenario
from owlrec.schema import SAMPLE_ROWS, SAMPLES, by_shard, hash_of
from owlrec.sources.outcomes import POSITIVE, Labels, drawn_negatives, was_taken
from owlrec.sources.splits import ItemCatalog, SplitConfig, id_values, in_histories, read_samples, with_histories
from owlrec.workspace import Workspace

# -------------------------------------------------------------------------------------------------------------- samples
# ReLLa's tuning data (ReiT, WWW 2024): each sample asked twice, once with its most recent behaviours and once with
# retrieved ones: those most like the candidates of a request, or, as in the paper, those most like its own candidate.
#
# Without the mixture the paper loses .008 to .016 AUC. K shots are the first K of one order of the train split, so that
# 64 are among 256; the order is a hash of each sample's own keys, hence the same however the table is sharded, and a
# sample that is added leaves the others in their order.
#
# A sample's history holds strictly earlier behaviours only (see sources.splits), and nothing else is shown.


Shown = Literal["recent", "retrieved", "mixed"]  # mixed: one prompt with both, half of the behaviours each
Behaviours = list[tuple[str, float | None]]  # title and rating, oldest first
TUNING_ROWS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", pa.int64()),
        ("shown", pa.string()),  # see Shown
        ("system", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),  # Yes or No
    ]
)
_ORDER = ("user_id", "item_id", "timestamp")  # what a sample's place among the shots is a hash of


class TuningDataConfig(Config):
    """How many samples, how many behaviours each shows, and in which ways each is asked, in this order."""

    shots: int | None = Field(256, ge=1)  # 256: the smallest setting of the paper's table; None: the whole train split
    behaviours: int = Field(15, ge=1)  # beyond 15 the paper's zero-shot scores rise on one of three data sets only
    shown: tuple[Shown, ...] = Field(("recent", "retrieved"), min_length=1)


@dataclass(frozen=True)
class TuningData:
    """rows: TUNING_ROWS, the ways of asking about one sample next to each other. counts: samples drawn, those skipped
    since their candidate has no title, rows, and rows whose answer is Yes.
    """

    rows: pa.Table
    counts: dict[str, int]


def ask_about(
    samples: pa.Table,
    users: pa.Table,
    catalog: ItemCatalog,
    retriever: BehaviourRetriever,
    scenario: Scenario,
    prompt: RankPromptConfig,
    count_tokens: Callable[[str], int],
    *,
    k: int,
    ways: Sequence[Shown],
) -> TuningData:
    """Rows of all `samples` (schema.SAMPLES and the column of `with_candidates`), of whatever split, each asked in all
    `ways` with at most `k` behaviours.

    users: user_id and profile fields; a user without a row has no profile. A sample whose candidate has no title is
    skipped and counted. A behaviour without a title is passed over before any are chosen. Raises SchemaError for a
    label other than 0 and 1, or ratings that do not match their history.
    """
    profiles = _profiles(users, samples["user_id"], scenario)
    rows: list[dict[str, Any]] = []
    skipped = 0
    for sample in samples.to_pylist():
        answer = _answer(sample)
        target, *titles = catalog.titles(np.array([sample["item_id"], *(sample["history"] or [])], dtype=np.int64))
        if not is_quotable(target):
            skipped += 1
            continue
        profile = profiles.get(sample["user_id"], {})
        together = sample["candidates"] if prompt.retrieved_for == "set" else [sample["item_id"]]
        for shown in ways:
            lists = behaviours_shown(sample, titles, together, retriever, k, shown)
            system, text = rank_prompt(scenario, profile, target, prompt, count_tokens, **lists)
            keys = {name: sample[name] for name in _ORDER}
            rows.append({**keys, "shown": shown, "system": system, "text": text, "answer": answer})
    counts = {
        "samples": samples.num_rows,
        "skipped_without_title": skipped,
        "rows": len(rows),
        "answered_yes": sum(row["answer"] == YES for row in rows),
    }
    return TuningData(pa.Table.from_pylist(rows, schema=TUNING_ROWS), counts)


def draw_shots(samples: pa.Table, shots: int | None, seed: int, split: str = "train") -> np.ndarray:
    """The rows of the first `shots` samples of a split in the seed's order: int64 [shots]; all of them for None.

    Raises RecipeError where there are fewer.
    """
    rows = np.flatnonzero(pc.equal(samples["split"], split).to_numpy(zero_copy_only=False))
    _refuse_fewer(shots or 0, len(rows), split)
    return rows[in_hash_order([samples[name].to_numpy()[rows] for name in _ORDER], seed)][:shots]


def draw_samples(
    workspace: Workspace, split: str, limit: int | None, seed: int, catalog: np.ndarray, *, exactly: bool = False
) -> pa.Table:
    """What `draw_shots` draws of a prepared workspace, with their candidates: at most `limit`, in the seed's order.

    Reads the keys of one shard after the other, holds the `limit` first of them, and then reads the histories of these
    alone. catalog: int64 [n], all item ids (see with_candidates). exactly: raises RecipeError where there are fewer.
    """
    best, total = pa.table({name: pa.array([], pa.int64()) for name in (*_ORDER, "shard", "row")}), 0
    for number in workspace.table_shards("samples"):
        keys = read_samples(workspace, number, [*_ORDER, "split"])
        rows = np.flatnonzero(pc.equal(keys["split"], split).to_numpy(zero_copy_only=False))
        total += len(rows)
        if limit is not None and len(best) == limit:  # most rows come after all that are held
            ranks = (hash_of(seed + 1, *(t[name].to_numpy() for name in _ORDER)) for t in (keys.take(rows), best))
            own, held = ranks
            rows = rows[own <= held.max()]
        drawn = keys.take(rows).select(_ORDER)
        drawn = drawn.append_column("shard", pa.array(np.full(len(rows), number), pa.int64()))
        both = pa.concat_tables([best, drawn.append_column("row", pa.array(rows, pa.int64()))])
        best = both.take(in_hash_order([both[name].to_numpy() for name in _ORDER], seed)[:limit])
    if exactly and limit is not None:
        _refuse_fewer(limit, total, split)
    shards, rows = best["shard"].to_numpy(), best["row"].to_numpy()
    order = np.argsort(shards, kind="stable")
    read = [with_candidates(SAMPLES.empty_table(), SAMPLES.empty_table(), catalog)]
    for number in np.unique(shards):
        of_shard = read_samples(workspace, int(number))
        read.append(with_candidates(of_shard.take(rows[order[shards[order] == number]]), of_shard, catalog))
    return pa.concat_tables(read).take(np.argsort(order))


def read_users(workspace: Workspace, ids: np.ndarray) -> pa.Table:
    """The rows of the users table that are of some ids (int64 [n]), from their shards alone."""
    parts = [
        users.filter(pc.is_in(users["user_id"], pa.array(np.unique(ids[at]))))
        for number, at in by_shard(ids, workspace.n_shards("user"))
        for users in (workspace.read_shard("users", number),)
    ]
    return pa.concat_tables([workspace.read_shard("users", 0).slice(0, 0), *parts])


def in_hash_order(keys: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Rows in an order by the seed and each row's own keys, whatever other rows there are: int64 [n] positions.

    keys: int64 [n] each, together different for every row.
    """
    return np.lexsort((*keys, hash_of(seed + 1, *keys)))


def _refuse_fewer(shots: int, rows: int, split: str) -> None:
    if shots > rows:
        raise RecipeError(
            f"tuning shots: {shots} are asked for, but the {split} split has {rows} samples. Lower the number, or "
            "set it to null for all."
        )


def behaviours_shown(
    sample: Mapping[str, Any],
    titles: Sequence[str],
    candidates: Sequence[int],
    retriever: BehaviourRetriever,
    k: int,
    shown: Shown,
) -> dict[Literal["recent", "retrieved"], Behaviours]:
    """The at most `k` behaviours that a sample's prompt quotes, as the lists that `rank_prompt` takes.

    sample: user_id, history, history_ratings and history_labels, the last two null or aligned with history;
    titles: aligned with history, "" for none; candidates: item ids, for all of which together behaviors are retrieved.
    What was passed over is not quoted. A mixed prompt retrieves from what is older than its recent half, so that none
    stands twice.
    Raises SchemaError where the ratings do not match.
    """
    history = sample["history"] or []
    ratings = sample["history_ratings"] or [None] * len(history)
    if len(ratings) != len(history):
        raise SchemaError(
            f"samples, user {sample['user_id']}: {len(history)} behaviours in history, but "
            f"{len(ratings)} in history_ratings. Run `prepare` again."
        )
    told = sample.get("history_labels") or [1.0] * len(history)
    took = list(map(was_taken, ratings, told))
    titled = [i for i, title in enumerate(titles) if took[i] and is_quotable(title)]
    behaviours = [(titles[i], ratings[i]) for i in titled]
    lately = {"recent": k, "retrieved": 0, "mixed": (k + 1) // 2}[shown]
    n_older = max(0, len(behaviours) - lately)
    lists: dict[Literal["recent", "retrieved"], Behaviours] = {}
    if lately:
        lists["recent"] = behaviours[n_older:]
    if k > lately:
        older = np.array([history[i] for i in titled[:n_older]], dtype=np.int64)
        found = retriever.retrieve(older, np.array(candidates, dtype=np.int64), k - lately)
        lists["retrieved"] = [behaviours[i] for i in found]
    return lists


def _answer(sample: Mapping[str, Any]) -> str:
    if sample["label"] not in (0, 1):
        raise SchemaError(
            f"samples, user {sample['user_id']}, item {sample['item_id']}, timestamp {sample['timestamp']}: the label "
            f"is {sample['label']}, but 0 or 1 is meant. Run `prepare` again, or write labels by the scenario's rule."
        )
    return YES if sample["label"] else NO


def _profiles(users: pa.Table, wanted: pa.ChunkedArray, scenario: Scenario) -> dict[int, dict[str, str]]:
    """The profile fields of the wanted users that have a row."""
    fields = [field for field in scenario.profile_fields if field in users.column_names]
    rows = users.filter(pc.is_in(users["user_id"], pc.unique(wanted))).select(["user_id", *fields]).to_pylist()
    return {row["user_id"]: {f: str(row[f]) for f in fields if row[f] is not None} for row in rows}


# ---------------------------------------------------------------------------------------------------------------- pairs
# Which pairs of user and item an LLM is asked about, for CTR models to learn from: train samples, and items that their
# users never met, at the moments of train samples.
#
# A pair without a label takes the moment of a train sample of its user, and with it that sample's split and history:
# nothing is asked, or learned, about a moment of valid or test; nor, in a split by item, about the items of these. All
# draws are hashes of a row's own keys, so a pair stays whatever else is prepared with it.


_KEY = ["user_id", "item_id", "timestamp"]
_HISTORY = ["history_start", "history_end"]


def asked_pairs(
    workspace: Workspace, number: int, config: DistillationConfig, split: SplitConfig, catalog: np.ndarray
) -> pa.Table:
    """The pairs of a shard of users (schema.SAMPLES, every label 0), by user, timestamp and item.

    split: by which `prepare` split; catalog: all item ids, ascending. Raises WorkspaceError where it has not run.
    """
    samples = workspace.read_shard("samples", number, SAMPLE_ROWS.names).to_pandas()
    train = samples[samples["split"] == "train"].drop_duplicates(_KEY)
    if split.method == "item":  # values divide the items: up to one of train, all are of train
        of_train = train["item_id"].to_numpy()[train["label"].to_numpy() >= POSITIVE]
        catalog = catalog[id_values(catalog, split) <= id_values(of_train, split).max(initial=-1)]
    train = train[[*_KEY, *_HISTORY]]
    met = workspace.read_shard("interactions", number, ["user_id", "item_id"]).to_pandas()
    met = pd.concat([met, samples[["user_id", "item_id"]]]).drop_duplicates()
    pairs = pd.concat([train, _unlabeled(train, met, config.unlabeled, catalog)])
    pairs = pairs.sort_values(["user_id", "timestamp", "item_id"]).assign(label=0.0, split="train", weight=1.0)
    rows = pa.Table.from_pandas(pairs[SAMPLE_ROWS.names], schema=SAMPLE_ROWS, preserve_index=False)
    return with_histories(rows, in_histories(workspace, number, ["item_id", "rating", "label"])).select(SAMPLES.names)


def _unlabeled(train: pd.DataFrame, met: pd.DataFrame, most: int, catalog: np.ndarray) -> pd.DataFrame:
    """At most `most` pairs of each user of `train`, spread evenly over the moments of their samples.

    met: user_id and item_id of all that users took, passed over, or have a sample of in any split, each once.
    """
    moments = train.drop_duplicates(["user_id", "timestamp"])
    keys = [moments[name].to_numpy() for name in ("user_id", "timestamp")]
    moments = moments.iloc[in_hash_order(keys, 0)].sort_values("user_id", kind="stable")
    users, start, n = np.unique(moments["user_id"].to_numpy(), return_index=True, return_counts=True)
    draw = np.tile(np.arange(most), len(users))
    of_user = np.repeat(np.arange(len(users)), most)
    drawn = moments.iloc[(start[of_user] + draw % n[of_user]).astype(np.int64)]
    labels = Labels(rule="positives_only", rating_above=0, negatives=1, negatives_by="uniform")
    items = drawn_negatives(
        drawn["user_id"].to_numpy(),
        drawn["timestamp"].to_numpy(),
        draw // n[of_user],  # in place of a positive's item: two draws at one moment differ
        labels,
        took=(met["user_id"].to_numpy(), met["item_id"].to_numpy()),
        catalog=catalog,
    )[:, 0]
    drawn = drawn.assign(item_id=items)[items >= 0]
    return drawn.drop_duplicates(["user_id", "item_id"])


# ----------------------------------------------------------------------------------------------------------- experiment
# The recipe's `ranking:` section: which model ranks, what it is shown, how it is tuned and judged.
#
# No torch here: the recipe loads this module at every call.


@dataclass(frozen=True)
class TuningSettings:
    """How the adapter is tuned. Rank, alpha, dropout, target modules and learning rate are ReLLa's (sec. 4.4 of its
    code's settings); its batch of 256 would leave few shots with a step an epoch. A recipe sets those of TuningConfig.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-3  # its highest, after the warm-up; it falls to 0 along a line
    warmup_share: float = 0.05  # of all steps
    epochs: int = 3  # at most
    batch_rows: int = 32  # per step, of all workers together
    micro_tokens: int = 2048  # padded tokens that a worker computes at once: it bounds the memory
    max_tokens: int = 2048  # of a prompt: a longer one is refused, since cutting it would cut the question
    max_grad_norm: float = 1.0
    evaluations_per_epoch: int = 1
    patience: int = 2  # evaluations without a better valid AUC before tuning ends
    checkpoint_steps: int = 20
    dtype: str = "bfloat16"  # of the frozen weights; the adapter's are float32
    gradient_checkpointing: bool = False  # computes activations twice instead of keeping them, for large models
    seed: int = 0
    num_workers: int = 1
    use_gpu: bool = False


class TuningConfig(Config):
    """What a recipe says of tuning: see TuningSettings."""

    rank: int = Field(TuningSettings.rank, ge=1)
    learning_rate: float = Field(TuningSettings.learning_rate, gt=0)
    epochs: int = Field(TuningSettings.epochs, ge=1)
    num_workers: int = Field(TuningSettings.num_workers, ge=1)
    use_gpu: bool = TuningSettings.use_gpu

    @property
    def settings(self) -> TuningSettings:
        """With the constants. On GPUs models are large, so their activations are not kept."""
        return TuningSettings(**self.model_dump(), gradient_checkpointing=self.use_gpu)


@dataclass(frozen=True)
class RankerRun:
    """What a run of `owlrec ranker tune` does besides what the recipe says. Valid samples stop the tuning and
    calibrate; like test samples they are drawn as shots are, by their own seed.
    """

    tuning: TuningSettings = field(default_factory=TuningSettings)
    seed: int = 0  # of the shots
    judged: tuple[Shown, ...] = ("recent", "retrieved", "mixed")
    valid_samples: int | None = 400  # at most; None = all
    judging_seed: int = 0
    zero_shot: bool = True  # whether the model as it is is judged too


class JudgingConfig(Config):
    """What a tuned model is judged on."""

    test_samples: int | None = Field(1000, ge=1)  # at most; None = all


# How tuning is spread over machines, or restarted: no reason to tune again.
_MACHINERY = ("num_workers", "use_gpu", "micro_tokens", "gradient_checkpointing", "checkpoint_steps")


class RankingConfig(Config):
    """The LLM ranker."""

    engine: VllmEngineConfig | None = None  # None = the recipe's own engine, which must then be vLLM
    prompt: RankPromptConfig = RankPromptConfig()
    data: TuningDataConfig = TuningDataConfig()
    tuning: TuningConfig = TuningConfig()
    judging: JudgingConfig = JudgingConfig()

    def ranking_engine(self, of_recipe: EngineConfig) -> VllmEngineConfig:
        """The engine that ranks: this section's own, else the recipe's. Raises RecipeError where that is not vLLM."""
        engine = self.engine or of_recipe
        if not isinstance(engine, VllmEngineConfig):
            raise RecipeError(f"ranking.engine: the recipe's engine is {engine.type}, but vLLM must rank. Name one.")
        return engine

    def decides_adapter(self, run: RankerRun) -> dict[str, Any]:
        """The settings that an adapter depends on: not how it is judged once it is tuned."""
        tuning = {name: value for name, value in asdict(run.tuning).items() if name not in _MACHINERY}
        return {
            "prompt": self.prompt.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "projection": asdict(PROJECTION),
            "tuning": tuning,
            "seed": run.seed,
            "valid": [run.valid_samples, run.judging_seed],
        }
