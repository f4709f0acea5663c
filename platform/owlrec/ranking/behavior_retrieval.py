"""Semantic user behaviour retrieval (SUBR; ReLLa, WWW 2024): the behaviours of a history that are most like some
candidates, in the order in which they happened.

An LLM loses the thread of a long history; the K behaviours that bear on the question tell more than the K latest in as
few tokens. The paper retrieves for one candidate. Here a set of them takes turns: what is nearest to each comes first,
then what is second nearest to each, so that no candidate is left without its own (the mean and the maximum of the
cosines, which let some take it all, predict labels worse: benchmarks/ranking_sets.py).

The released code ranks by inner product on two of three data sets, and on the third takes row numbers for ids that
start at 1, so that it shows the neighbours of what it found. Here ids are looked up, and all vectors have length 1.

Exact at any length: one pass over the vectors of a history's distinct items, of whose behaviours only those of the
items that may be among the nearest are looked at. The pass gathers vectors a block at a time and multiplies them while
they are in cache: a copy of them all would take twice as long as the product. Long histories are shared by as many
threads as OMP_NUM_THREADS allows, or the process has cores. A product in float32 rounds differently
from one batch of candidates to the next, so the few that count are computed again in float64: equal items tie, and a
candidate's company changes nothing.
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
from owlrec.runner import Pool, run_stage
from owlrec.schema import hash_of, rows_of, run_starts, vector_matrix
from owlrec.shards import Shard, finished_stage
from owlrec.storage import fingerprint
from owlrec.workspace import Workspace

# ------------------------------------------------------------------------------------------------------- candidate sets
# The candidates among which a sample's behaviors are retrieved, so that a ranker is tuned on what it is served.
#
# A request asks about several candidates, and behaviors are retrieved once for all of them. A sample is one candidate;
# those that its request may have held besides are, first, what was logged for its user at the same moment (an
# impression list, or a positive with its drawn negatives), whose history is the same to the letter, and then items
# drawn from the catalog in place of what a recall stage would have added. The draw hangs on user and moment alone:
# samples of one moment share their set however many are drawn, and nothing that the user did later tells what is
# shown.


SET_SIZE = 10  # as many as a cascade asks the LLM about by default
_DRAWS = 4 * SET_SIZE  # some are drawn twice, some the user has met


def with_candidates(samples: pa.Table, logged: pa.Table, catalog: np.ndarray) -> pa.Table:
    """`samples` with a column `candidates`: list<int64>, at most SET_SIZE different items, ascending, the sample's own
    among them. Shorter only where the catalog has too few items that the user has not met.

    samples: user_id, item_id, timestamp and history; logged: user_id, item_id and timestamp of at least all samples of
    these users at these moments, in any order; catalog: int64 [n], all item ids. Of a longer logged list the sample
    keeps those that come first by a hash of user, moment and item.
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
    found = dict.fromkeys([int(own), *logged.tolist()])
    if len(found) < SET_SIZE:
        drawn = catalog[np.random.default_rng(seed).integers(0, len(catalog), _DRAWS)].tolist()
        met = set(history)
        found |= dict.fromkeys(other for other in drawn if other not in met)
    return np.sort(list(found)[:SET_SIZE])


# ------------------------------------------------------------------------------------------------------------ retrieval


_PRODUCT_ERROR = 1e-5  # of a float32 cosine at most; 5e-7 was seen with 128 and with 512 dimensions
_SCORES_AT_ONCE = 1 << 24  # cosines held at a time: 64 MB
_BLOCK_BYTES = 1 << 20  # of vectors gathered at a time: within a core's L2, and too small for BLAS to start threads on
_BLOCKS_A_THREAD = 8  # at least: some ms of work, beside which the start of a thread is nothing


@dataclass(frozen=True, eq=False)
class History:
    """One user's behaviours, looked up once for many requests of the retriever whose `look_up` made it."""

    n_behaviours: int
    rows: np.ndarray  # int64 [u], ascending: where the retriever holds the vectors of the distinct items that have one
    positions: np.ndarray  # int64 [v]: the behaviours whose item has a vector, item by item, each item's ascending
    starts: np.ndarray  # int64 [u + 1]: where each item's begin in `positions`, and the end


class BehaviourRetriever:
    """Finds behaviours by the vectors of their items."""

    def __init__(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids: int64 [n], ascending, each once; vectors: float [n, d], of any length.

        A vector that is zero or not finite counts as none. Raises SchemaError for unsorted or duplicate ids, and for
        another number of vectors.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if vectors.ndim != 2 or len(ids) != len(vectors):
            raise SchemaError(
                f"item vectors: {len(ids)} ids, but vectors of shape {vectors.shape}. Give one row an id."
            )
        descents = np.flatnonzero(ids[1:] <= ids[:-1])
        if len(descents):
            row = int(descents[0]) + 1
            raise SchemaError(
                f"item vectors, row {row}: id {ids[row]} follows {ids[row - 1]}. Sort the rows by id, and keep one row "
                "an id."
            )
        unit = unit_rows(vectors)
        usable = unit.any(axis=1)
        self._ids, self._vectors = (ids, unit) if usable.all() else (ids[usable], unit[usable])

    @classmethod
    def from_table(cls, table: pa.Table, projection: Projection | None = None) -> "BehaviourRetriever":
        """From the item rows of a vectors table (schema.vectors_schema), in any order; projected where told how.

        Raises SchemaError as the constructor and the projection do.
        """
        table = table.filter(pc.and_(pc.equal(table["kind"], "item"), pc.is_valid(table["vector"])))
        ids = table["id"].to_numpy()
        order = np.argsort(ids, kind="stable")
        vectors = vector_matrix(table)[order]
        return cls(ids[order], projection.apply(vectors) if projection else vectors)

    def look_up(self, history: np.ndarray) -> History:
        """A history to ask about again and again.

        history: int64 [h], item ids, oldest first.
        """
        rows = self._rows(history)
        bits = len(rows).bit_length()
        keys = np.sort(rows << bits | np.arange(len(rows)))  # by row and position: faster than a stable argsort
        keys = keys[np.searchsorted(keys, 0) :]  # a behaviour without a vector has row -1
        positions, grouped = keys & ((1 << bits) - 1), keys >> bits
        starts = np.flatnonzero(np.diff(grouped, prepend=-1))
        return History(len(rows), grouped[starts], positions, np.r_[starts, len(positions)])

    def retrieve(self, history: np.ndarray | History, candidates: np.ndarray, k: int) -> np.ndarray:
        """The `k` behaviours nearest to a set of candidates by cosine, in the order in which they happened.

        history: int64 [h], item ids, oldest first, or what `look_up` made of them; candidates: int64 [m], item ids, in
        any order, repeats allowed. Returns int64 [min(h, k)]: ascending positions in the history.

        The candidates take turns: first come the behaviours that are the nearest to one of them, then those that are
        the second nearest, and so on; within a turn the nearer first, of equally near ones the newer. Behaviours whose
        item has no vector come after all that have one, the newest first; candidates without vectors take no turn, and
        where none has one the k newest are shown. So a history of k behaviours always shows k. An earlier occurrence of
        a candidate itself is allowed, and is nearest: that a user comes back to an item is part of the history. Raises
        ValueError where k < 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}, but at least one behaviour must be asked for")
        opened = history if isinstance(history, History) else self.look_up(history)
        n, rows = opened.n_behaviours, np.unique(self._rows(candidates))
        rows = rows[rows >= 0]
        if n <= k or len(rows) == 0:
            return np.arange(max(0, n - k), n)
        at_once = max(1, _SCORES_AT_ONCE // max(1, len(opened.rows)))
        nearest = []
        for start in range(0, len(rows), at_once):
            queries = self._vectors[rows[start : start + at_once]]
            cosines = self._cosines(queries, opened.rows)
            nearest += [self._nearest(opened, *of_one, k) for of_one in zip(queries, cosines, strict=True)]
        chosen = _in_turns(nearest)[:k]
        if len(chosen) < k:
            without = np.setdiff1d(np.arange(n), opened.positions, assume_unique=True)
            chosen = np.r_[chosen, without[len(chosen) - k :]]
        return np.sort(chosen)

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the row of each id's vector, -1 where it has none."""
        ids = np.asarray(ids, dtype=np.int64)
        rows = np.empty(len(ids), dtype=np.int64)
        order = np.argsort(ids)  # ids in order walk through the table, others jump about in it
        rows[order] = rows_of(self._ids, ids[order])
        return rows

    def _cosines(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float32 [m, u]: the rounded products of queries [m, d] with the vectors in `rows` [u]."""
        dim = self._vectors.shape[1]
        block_rows = max(1, _BLOCK_BYTES // (4 * max(1, dim)))
        cosines = np.empty((len(queries), len(rows)), dtype=np.float32)

        def multiply(first: int, end: int) -> None:
            block = np.empty((block_rows, dim), dtype=np.float32)
            for start in range(first, end, block_rows):
                of_block = rows[start : min(start + block_rows, end)]
                vectors = np.take(self._vectors, of_block, axis=0, out=block[: len(of_block)], mode="clip")
                cosines[:, start : start + len(of_block)] = queries @ vectors.T

        threads = min(_threads(), len(rows) // (_BLOCKS_A_THREAD * block_rows))
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
        """The positions of at most k behaviours, the nearest first, and their cosines: int64 and float64 [<= k].

        query: float32 [d]; cosines: float32 [u], its rounded products with the history's items.
        """
        items = np.arange(len(cosines))
        if len(items) > k:  # k items have at least k behaviours: an item that is farther than all of these shows none
            kth = np.partition(cosines, len(cosines) - k)[len(cosines) - k]
            items = np.flatnonzero(cosines >= kth - 2 * _PRODUCT_ERROR)
        exact = (self._vectors[history.rows[items]].astype(np.float64) * query).sum(axis=1)
        exact = np.round(exact, 12)  # below that the order of a float64 sum shows
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
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list names what nested loops may use
    return int(asked) if asked.strip().isdigit() else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------------- items
# The vectors by which behaviors are compared with a candidate: item texts encoded by shard, projected, found by id.
#
# ReLLa pools the LLM's own last layer. A sentence encoder was trained to tell texts apart, costs a fraction, and stays
# the same where the ranker's model changes; where `encode` has written the vectors of the same texts, they are read
# from there.


_NAME = "metadata-item"  # as `encode` names the vectors of titles and attributes


@dataclass(frozen=True)
class ItemVectors:
    """The vectors of all items on disk, and the space in which they are compared."""

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
        """Of the workspace's items. encoder: the recipe's.

        A later call encodes the items whose texts have changed since; the projection is fitted once for these items
        and settings, on a bounded sample.
        """
        texts = ItemMetadata()
        digests = texts.digests(workspace)
        folder = _of_encode(workspace, encoder) or f"ranking/items-{fingerprint(encoder.identity)[:16]}"
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

    def retriever(self, items: np.ndarray | None = None) -> BehaviourRetriever:
        """Over some items (int64 [n], any order, repeats allowed), or over all of them for None, in memory."""
        if items is not None:
            ids = np.unique(items)
            vectors, mask = self.shards.gather(ids)
            return BehaviourRetriever(ids[mask], self.projection.apply(vectors[mask]))
        all_ids, projected = [np.zeros(0, np.int64)], [np.zeros((0, len(self.projection.directions)), np.float32)]
        for number in self.shards.numbers:
            if (shard := self.shards.shard(number)) is not None:
                all_ids.append(np.array(shard.ids))  # a view would hold the file open
                projected.append(self.projection.apply(shard.vectors))
        order = np.argsort(np.concatenate(all_ids), kind="stable")
        return BehaviourRetriever(np.concatenate(all_ids)[order], np.concatenate(projected)[order])


def item_retriever(
    workspace: Workspace, encoder: EncoderConfig, projection: ProjectionSettings = PROJECTION
) -> BehaviourRetriever:
    """The retriever over all of the workspace's items; arguments: see ItemVectors.encoded."""
    return ItemVectors.encoded(workspace, encoder, projection).retriever()


def _of_encode(workspace: Workspace, encoder: EncoderConfig) -> str | None:
    """Where `encode` has put item vectors of this encoder; its card is forgotten when tables are prepared again."""
    card = finished_stage(workspace, "encode")
    if card is None or not workspace.exists(card.outputs["vectors"], _NAME):
        return None
    shards = VectorShards(workspace, card.outputs["vectors"], _NAME)
    first = shards.shard(shards.numbers[0])
    return card.outputs["vectors"] if first is not None and first.encoder == encoder.identity else None
