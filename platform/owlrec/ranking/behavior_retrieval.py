"""Semantic user behavior retrieval (SUBR; ReLLa, WWW 2024): the behaviors of a history most similar to some
candidates, in chronological order.

An LLM loses track of a long history; the K most relevant behaviors say more than the K latest in as
few tokens. The paper retrieves for one candidate. Here a set of candidates takes turns: first the nearest behavior of
each, then the second nearest of each, so no candidate is left without its own. (The mean and the maximum of the
cosines, which let a few candidates dominate, predict labels worse: benchmarks/ranking_sets.py.)

The released code ranks by inner product on two of three data sets. On the third it confuses row numbers with ids that
start at 1, so it shows the neighbors of the right behaviors. Here ids are looked up, and all vectors have length 1.

It is exact at any length: one pass over the vectors of a history's distinct items, then over the behaviors of the
items that may be among the nearest. The pass gathers vectors a block at a time and multiplies them while
they are in cache: a copy of all of them would take twice as long as the product. Long histories are split among as many
threads as OMP_NUM_THREADS allows, or the process has cores. A product in float32 rounds differently
from one batch of candidates to the next, so the few relevant ones are recomputed in float64: equal items tie, and the
other candidates change nothing.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from owlrec.encoding.compression import PROJECTION, Projection, ProjectionSettings, fit_projection, unit_rows
from owlrec.encoding.inputs import ItemMetadata, Resources
from owlrec.encoding.stage import EncodeStage
from owlrec.encoding.vectors import EncoderConfig, VectorShards
from owlrec.errors import SchemaError
from owlrec.ids import hash_of, rows_of, run_starts
from owlrec.runner import Pool, run_stage
from owlrec.schema import vector_matrix
from owlrec.shards import Shard, finished_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

# ------------------------------------------------------------------------------------------------------- candidate sets
# Candidate sets for retrieving a sample's behaviors, so that a ranker is tuned on the prompts it serves.
#
# A request has several candidates, and behaviors are retrieved once for all of them. A sample is one candidate;
# the others of its request are, first, the logged impressions of its user at the same moment (an
# impression list, or a positive with its sampled negatives), whose history is exactly the same, and then random
# catalog items in place of those from a recall stage. The random choice depends only on user and moment, so
# samples of one moment share their set however many are drawn, and later behaviors of the user reveal
# nothing.


SET_SIZE = 10  # the cascade's default number of LLM candidates
_DRAWS = 4 * SET_SIZE  # some are duplicates, some already seen


def with_candidates(samples: pa.Table, logged: pa.Table, catalog: np.ndarray) -> pa.Table:
    """`samples` with a column `candidates`: list<int64>, at most SET_SIZE distinct items, ascending, including the
    sample's own. Shorter only if the catalog has too few items that the user has not seen.

    samples: user_id, item_id, timestamp and history; logged: user_id, item_id and timestamp of at least all samples of
    these users at these moments, in any order; catalog: int64 [n], all item ids. From a longer logged list, keeps
    the items that come first by a hash of user, moment and item.
    """
    user, item, time = (logged[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    rank = hash_of(1, user, time, item)
    order = np.lexsort((rank, time, user))
    user, item, time = user[order], item[order], time[order]
    starts = np.flatnonzero(run_starts(user, time) == np.arange(len(user)))
    ends = np.r_[starts[1:], len(user)]
    moment = hash_of(1, user[starts], time[starts])
    by_hash = np.argsort(moment)
    keys = hash_of(1, samples["user_id"].to_numpy(), samples["timestamp"].to_numpy())
    at = by_hash[rows_of(moment[by_hash], keys)]
    histories = samples["history"].to_pylist()
    sets = [
        _candidates(own, item[starts[row] : ends[row]], history or (), catalog, key)
        for own, row, history, key in zip(samples["item_id"].to_numpy(), at, histories, keys.tolist(), strict=True)
    ]
    return samples.append_column("candidates", pa.array(sets, pa.list_(pa.int64())))


def _candidates(own: int, logged: np.ndarray, history: Sequence[int], catalog: np.ndarray, seed: int) -> np.ndarray:
    candidates = dict.fromkeys([int(own), *logged.tolist()])
    if len(candidates) < SET_SIZE:
        drawn = catalog[np.random.default_rng(seed).integers(0, len(catalog), _DRAWS)].tolist()
        met = set(history)
        candidates |= dict.fromkeys(other for other in drawn if other not in met)
    return np.sort(list(candidates)[:SET_SIZE])


# ------------------------------------------------------------------------------------------------------------ retrieval


_PRODUCT_ERROR = 1e-5  # maximum of a float32 cosine; observed: 5e-7 with 128 and 512 dimensions
_SCORES_AT_ONCE = 1 << 24  # cosines held at a time: 64 MB
_BLOCK_BYTES = 1 << 20  # of vectors gathered at a time: within a core's L2, and too small for BLAS to start threads on
_BLOCKS_PER_THREAD = 8  # minimum: a few ms of work, so starting a thread costs little


@dataclass(frozen=True, eq=False)
class History:
    """One user's behaviors, looked up once for many requests to the same retriever."""

    n_behaviors: int
    rows: np.ndarray  # int64 [u], ascending: rows of the distinct items with a vector
    positions: np.ndarray  # int64 [v]: behaviors whose item has a vector, by item, ascending within each
    starts: np.ndarray  # int64 [u + 1]: start of each item in `positions`, and the end


class BehaviorRetriever:
    """Finds behaviors by the vectors of their items."""

    def __init__(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids: int64 [n], ascending, each once; vectors: float [n, d], of any length.

        A vector that is zero or not finite counts as missing. Raises SchemaError for unsorted or duplicate ids, and for
        a different number of vectors.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if vectors.ndim != 2 or len(ids) != len(vectors):
            raise SchemaError(
                f"item vectors: {len(ids)} ids, but vectors of shape {vectors.shape}. Pass one row per id."
            )
        descents = np.flatnonzero(ids[1:] <= ids[:-1])
        if len(descents):
            row = int(descents[0]) + 1
            raise SchemaError(
                f"item vectors, row {row}: id {ids[row]} follows {ids[row - 1]}. Sort the rows by id, and keep "
                "one row per id."
            )
        unit = unit_rows(vectors)
        usable = unit.any(axis=1)
        self._ids, self._vectors = (ids, unit) if usable.all() else (ids[usable], unit[usable])

    @classmethod
    def from_table(cls, table: pa.Table, projection: Projection | None = None) -> "BehaviorRetriever":
        """Builds it from the item rows of a vectors table (schema.vectors_schema), in any order; with an optional
        projection.

        Raises SchemaError like the constructor and the projection.
        """
        table = table.filter(pc.and_(pc.equal(table["kind"], "item"), pc.is_valid(table["vector"])))
        ids = table["id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        vectors = vector_matrix(table)[order]
        return cls(ids[order], projection.apply(vectors) if projection else vectors)

    def look_up(self, history: np.ndarray) -> History:
        """A history for repeated requests.

        history: int64 [h], item ids, oldest first.
        """
        rows = self._rows(history)
        bits = len(rows).bit_length()
        keys = np.sort(rows << bits | np.arange(len(rows)))  # by row and position: faster than a stable argsort
        keys = keys[np.searchsorted(keys, 0) :]  # a behavior without a vector has row -1
        positions, grouped = keys & ((1 << bits) - 1), keys >> bits
        starts = np.flatnonzero(np.diff(grouped, prepend=-1))
        return History(len(rows), grouped[starts], positions, np.r_[starts, len(positions)])

    def retrieve(self, history: np.ndarray | History, candidates: np.ndarray, k: int) -> np.ndarray:
        """The `k` behaviors nearest to a set of candidates by cosine, in chronological order.

        history: int64 [h], item ids, oldest first, or a result of `look_up`; candidates: int64 [m], item ids, in
        any order, repeats allowed. Returns int64 [min(h, k)]: ascending positions in the history.

        The candidates take turns: first the behaviors that are the nearest to one of them, then
        the second nearest, and so on; within a turn nearer ones come first, and among equals newer ones. Behaviors
        whose item has no vector come after all others, the newest first. Candidates without vectors take no turn, and
        if none has one, the k newest are shown. So a history of k behaviors always shows k. An earlier occurrence of a
        candidate itself is allowed and is nearest: repeat visits are part of the history. Raises ValueError if k < 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}, but must be at least 1")
        opened = history if isinstance(history, History) else self.look_up(history)
        n, rows = opened.n_behaviors, np.unique(self._rows(candidates))
        rows = rows[rows >= 0]
        if n <= k or len(rows) == 0:
            return np.arange(max(0, n - k), n)
        at_once = max(1, _SCORES_AT_ONCE // max(1, len(opened.rows)))
        nearest = []
        for start in range(0, len(rows), at_once):
            queries = self._vectors[rows[start : start + at_once]]
            cosines = self._cosines(queries, opened.rows)
            nearest += [self._nearest(opened, *pair, k) for pair in zip(queries, cosines, strict=True)]
        chosen = _in_turns(nearest)[:k]
        if len(chosen) < k:
            without = np.setdiff1d(np.arange(n), opened.positions, assume_unique=True)
            chosen = np.r_[chosen, without[len(chosen) - k :]]
        return np.sort(chosen)

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: row of each id's vector, -1 if there is none."""
        ids = np.asarray(ids, dtype=np.int64)
        rows = np.empty(len(ids), dtype=np.int64)
        order = np.argsort(ids)  # ordered ids scan the table instead of jumping
        rows[order] = rows_of(self._ids, ids[order])
        return rows

    def _cosines(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float32 [m, u]: rounded products of queries [m, d] with the vectors in `rows` [u]."""
        dim = self._vectors.shape[1]
        block_rows = max(1, _BLOCK_BYTES // (4 * max(1, dim)))
        cosines = np.empty((len(queries), len(rows)), dtype=np.float32)

        def multiply(first: int, end: int) -> None:
            block = np.empty((block_rows, dim), dtype=np.float32)
            for start in range(first, end, block_rows):
                places = rows[start : min(start + block_rows, end)]
                vectors = np.take(self._vectors, places, axis=0, out=block[: len(places)], mode="clip")
                cosines[:, start : start + len(places)] = queries @ vectors.T

        threads = min(_threads(), len(rows) // (_BLOCKS_PER_THREAD * block_rows))
        if threads < 2:
            multiply(0, len(rows))
            return cosines
        ends = np.linspace(0, len(rows), threads + 1).astype(int).tolist()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(multiply, ends[:-1], ends[1:]))
        return cosines

    def _nearest(
        self, history: History, query: np.ndarray, cosines: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of at most k behaviors, the nearest first, and their cosines: int64 and float64 [<= k].

        query: float32 [d]; cosines: float32 [u], its rounded products with the history's items.
        """
        items = np.arange(len(cosines))
        if len(items) > k:  # k items have at least k behaviors, so farther items are not needed
            kth = np.partition(cosines, len(cosines) - k)[len(cosines) - k]
            items = np.flatnonzero(cosines >= kth - 2 * _PRODUCT_ERROR)
        exact = (self._vectors[history.rows[items]].astype(np.float64) * query).sum(axis=1)
        exact = np.round(exact, 12)  # below that, the order of a float64 sum matters
        ends = history.starts[items + 1]
        newest = [history.positions[max(a, b - k) : b] for a, b in zip(history.starts[items], ends, strict=True)]
        positions = np.concatenate([ends[:0], *newest])
        cosine = np.repeat(exact, [len(own) for own in newest])
        order = np.lexsort((-positions, -cosine))[:k]
        return positions[order], cosine[order]


def _in_turns(nearest: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """int64 [n]: each position once. nearest: of each candidate, positions and cosines, the nearest first."""
    positions, cosines = (np.concatenate(columns) for columns in zip(*nearest, strict=True))
    turns = np.concatenate([np.arange(len(own)) for own, _ in nearest])
    ordered = positions[np.lexsort((-positions, -cosines, turns))]
    _, first = np.unique(ordered, return_index=True)
    return ordered[np.sort(first)]


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is for nested loops
    return int(asked) if asked.strip().isdigit() else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------- items
# Vectors for comparing behaviors with a candidate: item texts encoded by shard, projected, found by id.
#
# ReLLa pools the LLM's own last layer. A sentence encoder was trained to distinguish texts, costs a fraction, and stays
# the same when the ranker's model changes. If `encode` has written the vectors of the same texts, they are read
# from there.


_NAME = "metadata-item"  # as `encode` names the vectors of titles and attributes


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of all items on disk, and the space for comparing them."""

    shards: VectorShards
    projection: Projection

    @classmethod
    def encoded(
        cls,
        workspace: Workspace,
        encoder: EncoderConfig,
        projection: ProjectionSettings = PROJECTION,
        pool: Pool | None = None,
    ) -> "ItemVectors":
        """For the workspace's items. encoder: the recipe's.

        A later call encodes items whose texts have changed since; the projection is fitted once for these items
        and settings, on a bounded sample.
        """
        texts = ItemMetadata()
        digests = texts.digests(workspace)
        folder = _encoded_folder(workspace, encoder) or f"ranking/items-{fingerprint(encoder.identity)[:16]}"
        if folder.startswith("ranking/"):
            stage = EncodeStage(folder, Resources(workspace, encoder), {_NAME: texts})
            run_stage(workspace, stage, {Shard(_NAME, number): digest for number, digest in digests.items()}, pool)
        shards = VectorShards(workspace, folder, _NAME)
        fitted_for = fingerprint(encoder.identity, projection, digests)
        kept = f"ranking/projections/{fitted_for[:16]}"
        if not workspace.exists(kept, "projection.json"):
            _, vectors = shards.sample(projection.fit_items, projection.seed)
            fit_projection(vectors, projection).save(workspace, kept, fitted_for)
        return cls(shards, Projection.load(workspace, kept, fitted_for))

    def retriever(self, items: np.ndarray | None = None) -> BehaviorRetriever:
        """Retriever in memory over some items (int64 [n], any order, repeats allowed), or over all of them for None."""
        if items is not None:
            ids = np.unique(items)
            vectors, mask = self.shards.gather(ids)
            return BehaviorRetriever(ids[mask], self.projection.apply(vectors[mask]))
        all_ids, projected = [np.zeros(0, np.int64)], [np.zeros((0, len(self.projection.directions)), np.float32)]
        for number in self.shards.numbers:
            if (shard := self.shards.shard(number)) is not None:
                all_ids.append(np.array(shard.ids))  # a view would keep the file open
                projected.append(self.projection.apply(shard.vectors))
        order = np.argsort(np.concatenate(all_ids), kind="stable")
        return BehaviorRetriever(np.concatenate(all_ids)[order], np.concatenate(projected)[order])


def item_retriever(
    workspace: Workspace, encoder: EncoderConfig, projection: ProjectionSettings = PROJECTION
) -> BehaviorRetriever:
    """The retriever over all of the workspace's items; arguments: see ItemVectors.encoded."""
    return ItemVectors.encoded(workspace, encoder, projection).retriever()


def _encoded_folder(workspace: Workspace, encoder: EncoderConfig) -> str | None:
    """Item vectors that `encode` has written with this encoder; its card is removed when tables are prepared again."""
    card = finished_stage(workspace, "encode")
    if card is None or not workspace.exists(card.outputs["vectors"], _NAME):
        return None
    shards = VectorShards(workspace, card.outputs["vectors"], _NAME)
    first = shards.shard(shards.numbers[0])
    return card.outputs["vectors"] if first is not None and first.encoder == encoder.identity else None
