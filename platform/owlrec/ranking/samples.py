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
from owlrec.ids import by_shard, hash_of
from owlrec.prompting.frameworks import NO, YES, RankPromptConfig, RetrievedFor, is_quotable, rank_prompt
from owlrec.ranking.behavior_retrieval import BehaviorRetriever, with_candidates
from owlrec.scenario import Scenario
from owlrec.schema import SAMPLE_ROWS, SAMPLES
from owlrec.sources.outcomes import POSITIVE, Labels, drawn_negatives, was_taken
from owlrec.sources.splits import ItemCatalog, SplitConfig, id_values, in_histories, read_samples, with_histories
from owlrec.workspace import Workspace

# -------------------------------------------------------------------------------------------------------------- samples
# ReLLa's tuning data (ReiT, WWW 2024): each sample is used twice, with its most recent behaviors and with
# retrieved ones, which are most similar to the candidates of a request or, as in the paper, to its own candidate.
#
# Without the mixture the paper loses .008 to .016 AUC. K shots are the first K of one order of the train split, so
# 64 are among 256. The order is a hash of each sample's own keys, so it does not depend on sharding, and an
# added sample does not change the order of the others.
#
# A sample's history has only strictly earlier behaviors (see sources.splits), and nothing else is shown.


Shown = Literal["recent", "retrieved", "mixed"]  # mixed: one prompt with both, half of the behaviors each
Behaviors = list[tuple[str, float | None]]  # title and rating, oldest first
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
_ORDER = ("user_id", "item_id", "timestamp")  # hashed to order samples


class TuningDataConfig(Config):
    """Number of samples, number of behaviors per prompt, and prompt types, in this order."""

    shots: int | None = Field(256, ge=1)  # 256: the smallest setting of the paper's table; None: the whole train split
    behaviors: int = Field(15, ge=1)  # beyond 15 the paper's zero-shot scores rise on only one of three data sets
    shown: tuple[Shown, ...] = Field(("recent", "retrieved"), min_length=1)


@dataclass(frozen=True)
class TuningData:
    """rows: TUNING_ROWS, with the prompts of one sample next to each other. counts: samples drawn, samples skipped
    because their candidate has no title, rows, and rows whose answer is Yes.
    """

    rows: pa.Table
    counts: dict[str, int]


def ask_about(
    samples: pa.Table,
    users: pa.Table,
    catalog: ItemCatalog,
    retriever: BehaviorRetriever,
    scenario: Scenario,
    prompt: RankPromptConfig,
    count_tokens: Callable[[str], int],
    *,
    k: int,
    ways: Sequence[Shown],
) -> TuningData:
    """Rows for all `samples` (schema.SAMPLES and the column of `with_candidates`) of any split, each in all
    `ways`, with at most `k` behaviors.

    users: user_id and profile fields; a user without a row has no profile. A sample whose candidate has no title is
    skipped and counted. Behaviors without a title are excluded before any are chosen. Raises SchemaError for a
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
            lists = behaviors_shown(sample, titles, together, retriever, k, shown)
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
    """Rows of the first `shots` samples of a split in the seed's order: int64 [shots]; all of them for None.

    Raises RecipeError if there are fewer.
    """
    rows = np.flatnonzero(pc.equal(samples["split"], split).to_numpy(zero_copy_only=False))
    _refuse_fewer(shots or 0, len(rows), split)
    return rows[in_hash_order([samples[name].to_numpy()[rows] for name in _ORDER], seed)][:shots]


def draw_samples(
    workspace: Workspace, split: str, limit: int | None, seed: int, catalog: np.ndarray, *, exactly: bool = False
) -> pa.Table:
    """Samples that `draw_shots` draws from a prepared workspace, with their candidates: at most `limit`, in the seed's
    order.

    Reads the keys of one shard after another, keeps the first `limit` of them, and then reads only their
    histories. catalog: int64 [n], all item ids (see with_candidates). exactly: raises RecipeError if there are fewer.
    """
    best, total = pa.table({name: pa.array([], pa.int64()) for name in (*_ORDER, "shard", "row")}), 0
    for number in workspace.table_shards("samples"):
        keys = read_samples(workspace, number, [*_ORDER, "split"])
        rows = np.flatnonzero(pc.equal(keys["split"], split).to_numpy(zero_copy_only=False))
        total += len(rows)
        if limit is not None and len(best) == limit:  # most rows come after all kept ones
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
        shard_samples = read_samples(workspace, int(number))
        read.append(with_candidates(shard_samples.take(rows[order[shards[order] == number]]), shard_samples, catalog))
    return pa.concat_tables(read).take(np.argsort(order))


def read_users(workspace: Workspace, ids: np.ndarray) -> pa.Table:
    """Rows of the users table for some ids (int64 [n]), read only from their shards."""
    parts = [
        users.filter(pc.is_in(users["user_id"], pa.array(np.unique(ids[at]))))
        for number, at in by_shard(ids, workspace.n_shards("user"))
        for users in (workspace.read_shard("users", number),)
    ]
    return pa.concat_tables([workspace.read_shard("users", 0).slice(0, 0), *parts])


def in_hash_order(keys: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Rows in an order by the seed and each row's own keys, independent of other rows: int64 [n] positions.

    keys: int64 [n] each, together unique per row.
    """
    return np.lexsort((*keys, hash_of(seed + 1, *keys)))


def _refuse_fewer(shots: int, rows: int, split: str) -> None:
    if shots > rows:
        raise RecipeError(
            f"tuning: the recipe asks for {shots} shots, but the {split} split has {rows} samples. Use fewer, "
            "or null for all."
        )


def behaviors_shown(
    sample: Mapping[str, Any],
    titles: Sequence[str],
    candidates: Sequence[int],
    retriever: BehaviorRetriever,
    k: int,
    shown: Shown,
) -> dict[Literal["recent", "retrieved"], Behaviors]:
    """The behaviors in a sample's prompt, at most `k`, as lists for `rank_prompt`.

    sample: user_id, history, history_ratings and history_labels, the last two null or aligned with history;
    titles: aligned with history, "" for none; candidates: item ids; behaviors are retrieved once for all of them.
    Passed-over items are not quoted. A mixed prompt retrieves from behaviors older than its recent half, so none
    appears twice.
    Raises SchemaError if the ratings do not match.
    """
    history = sample["history"] or []
    ratings = sample["history_ratings"] or [None] * len(history)
    if len(ratings) != len(history):
        raise SchemaError(
            f"samples, user {sample['user_id']}: {len(history)} values in history, but {len(ratings)} in "
            "history_ratings. Run `prepare` again."
        )
    outcomes = sample.get("history_labels") or [1.0] * len(history)
    took = list(map(was_taken, ratings, outcomes))
    titled = [i for i, title in enumerate(titles) if took[i] and is_quotable(title)]
    behaviors = [(titles[i], ratings[i]) for i in titled]
    lately = {"recent": k, "retrieved": 0, "mixed": (k + 1) // 2}[shown]
    n_older = max(0, len(behaviors) - lately)
    lists: dict[Literal["recent", "retrieved"], Behaviors] = {}
    if lately:
        lists["recent"] = behaviors[n_older:]
    if k > lately:
        older = np.array([history[i] for i in titled[:n_older]], dtype=np.int64)
        retrieved = retriever.retrieve(older, np.array(candidates, dtype=np.int64), k - lately)
        lists["retrieved"] = [behaviors[i] for i in retrieved]
    return lists


def _answer(sample: Mapping[str, Any]) -> str:
    if sample["label"] not in (0, 1):
        raise SchemaError(
            f"samples, user {sample['user_id']}, item {sample['item_id']}, timestamp {sample['timestamp']}: "
            f"the label is {sample['label']}, but must be 0 or 1. Run `prepare` again, or use labels that "
            "follow the scenario's rule."
        )
    return YES if sample["label"] else NO


def _profiles(users: pa.Table, wanted: pa.ChunkedArray, scenario: Scenario) -> dict[int, dict[str, str]]:
    """Profile fields of the wanted users with a row."""
    fields = [field for field in scenario.profile_fields if field in users.column_names]
    rows = users.filter(pc.is_in(users["user_id"], pc.unique(wanted))).select(["user_id", *fields]).to_pylist()
    return {row["user_id"]: {f: str(row[f]) for f in fields if row[f] is not None} for row in rows}


# ---------------------------------------------------------------------------------------------------------------- pairs
# Pairs for LLM scoring, from which CTR models learn: train samples, plus items that their
# users never saw, at the moments of train samples.
#
# A pair without a label takes the moment of a train sample of its user, and so that sample's split and history:
# nothing is scored or learned at a moment of valid or test or, in a split by item, about their items. All
# random choices are hashes of a row's own keys, so a pair does not change when other data is added.


_KEY = ["user_id", "item_id", "timestamp"]
_HISTORY = ["history_start", "history_end"]


def asked_pairs(
    workspace: Workspace, number: int, config: DistillationConfig, split: SplitConfig, catalog: np.ndarray
) -> pa.Table:
    """The pairs of a shard of users (schema.SAMPLES, every label 0), by user, timestamp and item.

    split: the split of `prepare`; catalog: all item ids, ascending. Raises WorkspaceError if it has not run.
    """
    samples = workspace.read_shard("samples", number, SAMPLE_ROWS.names).to_pandas()
    train = samples[samples["split"] == "train"].drop_duplicates(_KEY)
    if split.method == "item":  # values divide the items: all up to the last train value are train
        train_items = train["item_id"].to_numpy()[train["label"].to_numpy() >= POSITIVE]
        catalog = catalog[id_values(catalog, split) <= id_values(train_items, split).max(initial=-1)]
    train = train[[*_KEY, *_HISTORY]]
    met = workspace.read_shard("interactions", number, ["user_id", "item_id"]).to_pandas()
    met = pd.concat([met, samples[["user_id", "item_id"]]]).drop_duplicates()
    pairs = pd.concat([train, _unlabeled(train, met, config.unlabeled, catalog)])
    pairs = pairs.sort_values(["user_id", "timestamp", "item_id"]).assign(label=0.0, split="train", weight=1.0)
    rows = pa.Table.from_pandas(pairs[SAMPLE_ROWS.names], schema=SAMPLE_ROWS, preserve_index=False)
    return with_histories(rows, in_histories(workspace, number, ["item_id", "rating", "label"])).select(SAMPLES.names)


def _unlabeled(train: pd.DataFrame, met: pd.DataFrame, most: int, catalog: np.ndarray) -> pd.DataFrame:
    """At most `most` pairs per user of `train`, spread evenly over the moments of their samples.

    met: user_id and item_id of all items that users took, passed over, or have a sample of in any split, each once.
    """
    moments = train.drop_duplicates(["user_id", "timestamp"])
    keys = [moments[name].to_numpy() for name in ("user_id", "timestamp")]
    moments = moments.iloc[in_hash_order(keys, 0)].sort_values("user_id", kind="stable")
    users, start, n = np.unique(moments["user_id"].to_numpy(), return_index=True, return_counts=True)
    draw = np.tile(np.arange(most), len(users))
    user_places = np.repeat(np.arange(len(users)), most)
    drawn = moments.iloc[(start[user_places] + draw % n[user_places]).astype(np.int64)]
    labels = Labels(rule="positives_only", rating_above=0, negatives=1, negatives_by="uniform")
    items = drawn_negatives(
        drawn["user_id"].to_numpy(),
        drawn["timestamp"].to_numpy(),
        draw // n[user_places],  # replaces a positive's item, so two draws at one moment differ
        labels,
        took=(met["user_id"].to_numpy(), met["item_id"].to_numpy()),
        catalog=catalog,
    )[:, 0]
    drawn = drawn.assign(item_id=items)[items >= 0]
    return drawn.drop_duplicates(["user_id", "item_id"])


# ----------------------------------------------------------------------------------------------------------- experiment
# The recipe's `ranking:` section: the ranking model, its prompts, tuning and evaluation.
#
# No torch here: every recipe loads this module.


@dataclass(frozen=True)
class TuningSettings:
    """Settings of the adapter's tuning. Rank, alpha, dropout, target modules and learning rate are ReLLa's (sec. 4.4 of
    its code's settings); its batch of 256 would give few shots one step per epoch. A recipe sets those of TuningConfig.
    """

    rank: int = 8  # alpha goes with it
    alpha: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    learning_rate: float = 1e-3  # maximum after the warm-up; then falls linearly to 0
    warmup_share: float = 0.05  # of all steps
    epochs: int = 3  # maximum
    batch_rows: int = 32  # per step, of all workers together
    micro_tokens: int = 2048  # padded tokens per worker and pass; bounds the memory
    max_tokens: int = 2048  # per prompt: longer ones are refused, since truncation would cut the question
    max_grad_norm: float = 1.0
    evaluations_per_epoch: int = 1
    patience: int = 2  # evaluations without a better valid AUC before tuning ends
    checkpoint_steps: int = 20
    dtype: str = "bfloat16"  # of the frozen weights; the adapter's are float32
    gradient_checkpointing: bool = False  # recomputes activations instead of keeping them, for large models
    seed: int = 0
    use_gpu: bool = False


class TuningConfig(Config):
    """A recipe's tuning settings: see TuningSettings."""

    learning_rate: float = Field(TuningSettings.learning_rate, gt=0)
    epochs: int = Field(TuningSettings.epochs, ge=1)

    def settings(self, *, use_gpu: bool = False) -> TuningSettings:
        """All settings. On GPUs models are large, so their activations are not kept."""
        return TuningSettings(**self.model_dump(), use_gpu=use_gpu, gradient_checkpointing=use_gpu)


@dataclass(frozen=True)
class RankerRun:
    """Settings of `owlrec ranker tune` outside the recipe. Valid samples are for early stopping and
    calibration; like test samples they are drawn in the same way as shots, with their own seed.
    """

    tuning: TuningSettings = field(default_factory=TuningSettings)
    seed: int = 0  # of the shots
    ways: tuple[Shown, ...] = ("recent", "retrieved", "mixed")
    valid_samples: int | None = 400  # maximum; None = all
    test_samples: int | None = (
        1000  # that the models are judged on, at most; the standard error of an AUC near .75 is then .015
    )
    evaluation_seed: int = 0
    zero_shot: bool = True  # also evaluate the untuned model


# Distribution over machines and restarts do not require tuning again.
_MACHINERY = ("use_gpu", "micro_tokens", "gradient_checkpointing", "checkpoint_steps")


_TOKENS_PER_BEHAVIOR = 34  # twice what a film's title takes: only lists of long titles lose their oldest


class RankingConfig(Config):
    """The LLM ranker."""

    engine: VllmEngineConfig | None = None  # None = the recipe's own engine, which must then be vLLM
    # set: behaviors are retrieved once for all candidates of a request, whose prompts then share all but the
    # candidate's own title, so that a prefix cache serves them; candidate: for each, as in ReLLa.
    retrieved_for: RetrievedFor = "set"
    data: TuningDataConfig = TuningDataConfig()
    tuning: TuningConfig = TuningConfig()

    @property
    def prompt(self) -> RankPromptConfig:
        """How a prompt is written."""
        tokens = self.data.behaviors * _TOKENS_PER_BEHAVIOR
        return RankPromptConfig(retrieved_for=self.retrieved_for, history_tokens=tokens)

    def ranking_engine(self, recipe_engine: EngineConfig) -> VllmEngineConfig:
        """The ranking engine: this section's own, or else the recipe's. Raises RecipeError if that is not vLLM."""
        engine = self.engine or recipe_engine
        if not isinstance(engine, VllmEngineConfig):
            raise RecipeError(
                f"ranking.engine: the recipe's engine is {engine.type}, but ranking needs vLLM. Set a vLLM engine here."
            )
        return engine

    def decides_adapter(self, run: RankerRun) -> dict[str, Any]:
        """Settings that an adapter depends on, without those of its evaluation."""
        tuning = {name: value for name, value in asdict(run.tuning).items() if name not in _MACHINERY}
        return {
            "prompt": self.prompt.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "projection": asdict(PROJECTION),
            "tuning": tuning,
            "seed": run.seed,
            "valid": [run.valid_samples, run.evaluation_seed],
        }
