"""The pools that drafts come from, and the search in them for a whole batch in one call.

A request names its pools. Names also come over HTTP. A missing pool is not an error, since a new kind has none yet: the
default pool is used, and the miss is counted.
"""

import csv
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from owlrec_decoding.index import (
    BORDER,
    DEPTH,
    KEYED,
    LIVE,
    NAMELESS,
    NOTHING,
    SEALED,
    TEXT,
    LivePool,
    SealedPool,
    SearchSet,
    build_pool,
    compiled,
    context_key,
    find_node,
    match_from,
    match_live,
    match_sealed,
    match_text,
)
from owlrec_decoding.options import DEFAULT_POOL, LEAD_TOKENS, TEXT_FILES, DecodingError, DraftLimits

_log = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------------------- texts
# Texts as the engine's tokens: what pools are built from.


POOL_TOKENS = 10**7  # of a file of texts: 260 MB in memory. Beyond it the last texts stay.


class Text(NamedTuple):
    """A text to draft from. id: for requests that name it as their own earlier text, None for none. pool: the pool
    that requests name."""

    text: str
    id: int | None = None
    pool: str = DEFAULT_POOL


def read_texts(path: str | Path) -> list[Text]:
    """The rows of a CSV or JSON lines file with a column `text` and, optionally, `id` (integers) and `pool`.

    Raises DecodingError if the file cannot be read, has another ending, or lacks the column.
    """
    file = Path(path)
    readers = dict(zip(TEXT_FILES, (_read_csv, _read_json_lines), strict=True))
    if file.suffix not in readers:
        raise DecodingError(f"texts: {file} is not one of {', '.join(readers)}. Convert it, or pass a table.")
    try:
        rows = readers[file.suffix](file)
        return [
            Text(
                str(row["text"]),
                int(row["id"]) if row.get("id") not in (None, "") else None,
                str(row.get("pool") or DEFAULT_POOL),
            )
            for row in rows
            if row["text"]
        ]
    except (OSError, ValueError) as error:
        raise DecodingError(f"texts: {file} cannot be read ({error}).") from None
    except KeyError as error:
        raise DecodingError(f"texts: {file} has no column {error}. Name the column of texts so.") from None


def _read_csv(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def opening_tokens(tokenizer: Any) -> list[int]:
    """Tokens before an answer in the tokenizer's chat template, at most LEAD_TOKENS; none without a template."""
    if not tokenizer.chat_template:
        return []
    turn = [{"role": "user", "content": "x"}]
    closed, opened = (
        list(tokenizer.apply_chat_template(turn, add_generation_prompt=opened, tokenize=True, return_dict=False))
        for opened in (False, True)
    )
    shared = next((i for i, (a, b) in enumerate(zip(closed, opened, strict=False)) if a != b), len(closed))
    return opened[shared:][-LEAD_TOKENS:]


def answer_tokens(tokenizer: Any, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Each text as the engine writes it, int32 [n]: after its opening and with the end token."""
    opening, end = opening_tokens(tokenizer), [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if texts:
        for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
            yield np.array([*opening, *ids, *end], np.int32)


def build_pools(texts: Sequence[Text], tokenizer: Any, *, max_tokens: int = POOL_TOKENS) -> dict[str, SealedPool]:
    """Pools by name. Of several texts with one pool and id the last counts; beyond max_tokens (of all pools) the first
    texts are left out."""
    last = {(t.pool, at if t.id is None else -1, t.id): t for at, t in enumerate(texts)}
    rows, room = list(last.values()), max_tokens
    tokens = list(answer_tokens(tokenizer, [row.text for row in rows]))
    first = len(rows)
    while first and room > len(tokens[first - 1]):
        first -= 1
        room -= len(tokens[first]) + 1
    by_pool: dict[str, list[int]] = {}
    for at in range(first, len(rows)):
        by_pool.setdefault(rows[at].pool, []).append(at)
    return {
        name: build_pool(
            [tokens[at] for at in members], [NAMELESS if (id_ := rows[at].id) is None else id_ for at in members]
        )
        for name, members in by_pool.items()
    }


# ---------------------------------------------------------------------------------------------------------------- pools
# The pools of an engine: sealed ones, handed over as a whole, and live ones, to which finished texts are added.


def check_tokens(name: str, pool: SealedPool, vocabulary: int) -> None:
    """Raises DecodingError for a token that a model of so many does not have: it would read beyond its embeddings."""
    highest = int(pool.tokens.max(initial=BORDER))
    if highest >= vocabulary:
        raise DecodingError(
            f"pool {name}: token {highest} is not one of the model's {vocabulary}. Use the tokenizer that the model "
            "was trained with."
        )


def usable_pools(pools: Mapping[str, SealedPool], vocabulary: int) -> dict[str, SealedPool]:
    """The pools that `check_tokens` passes; logs why the others are left out."""
    usable = {}
    for name, pool in pools.items():
        try:
            check_tokens(name, pool, vocabulary)
            usable[name] = pool
        except DecodingError as error:
            _log.warning("requests go without %s", error)
    return usable


class Pools:
    """Keeps the place of each pool in the search set. `version` changes whenever the sources of a request may have
    changed."""

    def __init__(self, limits: DraftLimits | None = None, *, vocabulary: int = 1 << 31) -> None:
        """vocabulary: how many tokens the model has."""
        self.limits, self.vocabulary = limits or DraftLimits(), vocabulary
        self.search_set, self.version = SearchSet(), 0
        self._sealed: dict[str, tuple[SealedPool, int]] = {}
        self._live: dict[str, tuple[LivePool, int]] = {}

    def open(self, name: str, pool: SealedPool) -> None:
        """Makes a pool known to requests that name it, in place of an earlier one of that name. Raises DecodingError
        for a token that the model does not have."""
        check_tokens(name, pool, self.vocabulary)
        if name in self._sealed:
            self.search_set.remove(SEALED, self._sealed[name][1])
        self._sealed[name] = (pool, self.search_set.add_sealed(pool))
        self.version += 1

    def close(self, name: str) -> None:
        """Drops a pool with what was added to it; nothing if there is none."""
        for tiers, kind in ((self._sealed, SEALED), (self._live, LIVE)):
            if name in tiers:
                self.search_set.remove(kind, tiers.pop(name)[1])
                self.version += 1

    def known(self, name: str) -> bool:
        """Whether there is a pool of that name."""
        return name in self._sealed or name == DEFAULT_POOL

    def document(self, names: Sequence[str], id_: int) -> np.ndarray:
        """The text of that id in the first of the pools that has it, int32 [n]; empty if none has."""
        for name in names:
            if name in self._sealed and len(text := self._sealed[name][0].document(id_)):
                return text
        return np.zeros(0, np.int32)

    def sources(self, name: str) -> list[tuple[int, int]]:
        """Kind and place of the searchable tiers (sealed and live) of pool `name`."""
        tiers = []
        if name in self._sealed and len(self._sealed[name][0].order):
            tiers.append((SEALED, self._sealed[name][1]))
        if name in self._live:
            tiers.append((LIVE, self._live[name][1]))
        return tiers

    def insert(self, name: str, tokens: Sequence[int]) -> None:
        """Adds a finished text to the live tier of pool `name`, which must be known."""
        if not self.limits.live_tokens or not tokens:
            return
        if name not in self._live:
            pool = LivePool(max(self.limits.live_tokens, 1 << 10))
            self._live[name] = (pool, self.search_set.add_live(pool))
            self.version += 1  # requests of this pool have one more source
        pool, place = self._live[name]
        if pool.insert(tokens):
            self.search_set.renew_live(place, pool)

    def tokens(self) -> Mapping[str, int]:
        """Tokens in sealed and live pools."""
        return {
            "sealed": sum(len(pool.tokens) for pool, _ in self._sealed.values()),
            "live": sum(len(pool) for pool, _ in self._live.values()),
        }


# ------------------------------------------------------------------------------------------------------------ retrieval
# Drafts for a whole batch in one call: each row's sources propose a token, the likeliest joins the draft, and again.
#
# A pool's suffix tree proposes what most often follows the longest context that it knows, with a chance that is blended
# from all shorter ones; a row's own earlier text, and what it has written so far, are followed where they match; the
# texts just finished vote. Sources that agree support each other. How far each may be trusted is learned from what the
# verifier says, and a draft ends where its chance to be accepted no longer pays. `benchmarks/replay.py` measures it on
# real texts beside the plain vote of the longest suffix.


# ----------------------------------------------------------------------------------------------------------- acceptance
# How often drafted tokens are accepted beside what the index expected, learned while decoding.
#
# A cell is a group (a kind of source under a kind of verification), the index's chance (below .15, .3, .45, .6, .75,
# .9, .97 and above), whether other sources say nothing, the same, or something else after a shorter or after a longer
# match, and whether the row has written the token before (never, once, more often): a text rarely names the same thing
# twice, and how rarely is a matter of its kind. A cell's factor corrects the index's own chance, which stays as fine as
# it is. Old observations fade, since models change and refreshed texts drift.


CHANCES, OTHERS, WRITTEN = 8, 4, 3
CELLS = CHANCES * OTHERS * WRITTEN
SILENT, AGREE, LONGEST, SHORTER = range(OTHERS)
EDGES = np.array([0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97])
_PRIOR = np.outer([1.0, 1.0, 0.8, 0.4], [1.0, 0.7, 1.0]).ravel()  # factors before anything was learned
PRIOR_WEIGHT = 20.0  # expected acceptances that the prior factor counts for
MEMORY = 512.0  # observations after which a cell's counts are halved
SURE = 0.999


class AcceptanceRates:
    """Corrections of the index's chances, by group and cell.

    factors: float64 [groups * CELLS], of the index's chance that a token is accepted, given that all before it in its
    draft were.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self._tried, self._accepted, self._expected = (np.zeros(groups * CELLS) for _ in range(3))
        self._prior = np.tile(_PRIOR, groups * CHANCES)
        self.factors = self._prior.copy()

    def observe(self, cells: np.ndarray, expected: np.ndarray, seen: np.ndarray, accepted: np.ndarray) -> None:
        """Takes in the fate of n drafts.

        cells: int64 [n, depth], as in Drafts. expected: float64 [n, depth], the chances of the index. seen: int64 [n],
        judged tokens: the accepted ones and the first rejected one. accepted: int64 [n].
        """
        counts = (self._tried, self._expected, self._accepted)
        _learn(cells, expected, seen, accepted, *counts, self._prior, self.factors)


@compiled
def _learn(
    cells: np.ndarray,
    expected: np.ndarray,
    seen: np.ndarray,
    accepted: np.ndarray,
    tried: np.ndarray,
    hoped: np.ndarray,
    taken: np.ndarray,
    prior: np.ndarray,
    factors: np.ndarray,
) -> None:
    for i in range(len(seen)):
        for j in range(seen[i]):
            cell = cells[i, j]
            tried[cell] += 1
            hoped[cell] += expected[i, j]
            taken[cell] += j < accepted[i]
    for i in range(len(seen)):
        for j in range(seen[i]):
            cell = cells[i, j]
            if tried[cell] > MEMORY:
                tried[cell] *= 0.5
                hoped[cell] *= 0.5
                taken[cell] *= 0.5
            factors[cell] = (taken[cell] + PRIOR_WEIGHT * prior[cell]) / (hoped[cell] + PRIOR_WEIGHT)


# ------------------------------------------------------------------------------------------------------------ retrieval


_CANDIDATES = 8
_NEAR = 1  # tokens by which a live match may fall short of the longest and still count as evidence
WINDOW = 8192  # tokens of a row's own context that are searched: beyond it the scan would cost more than it finds
_HALVES = 0.5 ** np.arange(64)
# The chance that a match of one place goes on, by its length in tokens (1 to 7, and more), before anything was learned.
FOLLOWED = np.array([0.2, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7])
_FEW = 0.6  # of a live pool's votes, before anything was learned
_NO_ENDS = np.zeros(0, np.int32)
LEAST = 2  # tokens that must match before a row's own context is followed: one alone is chance


@dataclass(frozen=True)
class Drafts:
    """What a call found. tokens: int32 [rows, depth]; chance: float64 [rows, depth], probability that a token is
    accepted together with all before it; expected: float64 [rows, depth], the index's chance of the token alone; cell:
    int64 [rows, depth], group * CELLS + cell of the source that proposed it; count: int64 [rows]."""

    tokens: np.ndarray
    chance: np.ndarray
    expected: np.ndarray
    cell: np.ndarray
    count: np.ndarray


def draft_rows(
    contexts: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    prompts: np.ndarray,
    limits: np.ndarray,
    sources: np.ndarray,
    groups: np.ndarray,
    search_set: SearchSet,
    factors: np.ndarray,
    ends: np.ndarray = _NO_ENDS,
    *,
    depth: int,
    floor: float,
) -> Drafts:
    """Drafts for each of n rows.

    contexts: int32 [any, max_len]; row i's context is contexts[rows[i], :lengths[i]], of which the
    first prompts[i] are its prompt. limits: int64 [n], most tokens to draft for it.
    sources: int64 [n, m, 2] of kind and place in the search set, NOTHING after the last; where two expect as much, the
    earlier wins.
    groups: int64 [n, m], which group of `factors` (AcceptanceRates) each source's acceptance follows.
    floor: tokens whose chance is below it are not worth their cost: a draft ends before them.
    """
    n = len(rows)
    out = Drafts(
        np.full((n, depth), BORDER, np.int32),
        np.zeros((n, depth)),
        np.zeros((n, depth)),
        np.zeros((n, depth), np.int64),
        np.zeros(n, np.int64),
    )
    pools: tuple[Any, ...] = (*search_set.sealed, *search_set.lists[LIVE], *search_set.lists[TEXT])
    arrays: tuple[Any, ...] = (out.tokens, out.chance, out.expected, out.cell, out.count)
    _draft_rows(contexts, rows, lengths, prompts, limits, sources, groups, *pools, factors, ends, floor, *arrays)  # type: ignore[call-arg]
    return out


@compiled
def _chance_bucket(chance: float) -> int:
    bucket = 0
    while bucket < CHANCES - 1 and chance >= EDGES[bucket]:
        bucket += 1
    return bucket


@compiled
def _vote(text: np.ndarray, found: int, positions: np.ndarray, lengths: np.ndarray) -> tuple[int, float, int]:
    """What `found` candidates of a live pool say comes next, each shared token doubling a vote: the token (BORDER if
    none), its chance and the longest match behind it."""
    longest, token, best, length = 0, BORDER, 0.0, 0
    agreeing, total = 0, 0
    for c in range(found):
        longest = max(longest, lengths[c])
    for c in range(found):
        says, counted = text[positions[c]], False
        total += lengths[c] >= longest - _NEAR
        for other in range(c):
            if text[positions[other]] == says:
                counted = True
                break
        if counted:
            continue
        votes, near, supported = 0.0, 0, 0
        for other in range(c, found):
            if text[positions[other]] == says:
                votes += _HALVES[min(longest - lengths[other], 63)]
                near += lengths[other] >= longest - _NEAR
                supported = max(supported, lengths[other])
        if votes > best:
            token, best, agreeing, length = np.int64(says), votes, near, supported  # type: ignore[assignment]
    if found == 0:
        return BORDER, 0.0, 0
    # One place in all is worth as much as a match of that length; of several, the share that agrees counts. Few texts
    # are not a fair sample.
    alone = float(FOLLOWED[min(length, 8) - 1])
    return token, _FEW * (agreeing - 1 + alone) / max(total, 1) if agreeing > 0 else 0.1, length


@compiled
def _first_keys(
    contexts: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    limits: np.ndarray,
    sources: np.ndarray,
    keys: np.ndarray,
    bounds: np.ndarray,
) -> np.ndarray:
    """Where the keys of each row's sealed sources begin that are not below the key of its context: int64 [n, m].

    One halving of all rows after the other: a processor waits for the memory of several rows at once, where one row's
    search waits for each of its halvings.
    """
    n, m = sources.shape[0], sources.shape[1]
    wanted, low, left = np.empty(n * m, np.int64), np.empty(n * m, np.int64), np.empty(n * m, np.int64)
    owner, used, largest = np.empty(n * m, np.int64), 0, 0
    for i in range(n):
        if limits[i] <= 0:
            continue
        key = context_key(contexts[rows[i], max(0, lengths[i] - KEYED) : lengths[i]])
        for s in range(m):
            if sources[i, s, 0] == NOTHING:
                break
            if sources[i, s, 0] == SEALED:
                place = sources[i, s, 1]
                owner[used], wanted[used] = i * m + s, key
                low[used], left[used] = bounds[place, 2], bounds[place, 3] - bounds[place, 2]
                largest = max(largest, left[used])
                used += 1
    while largest > 0:
        for j in range(used):
            half = left[j] >> 1
            # Without a branch: its guess would be wrong half of the time.
            below = left[j] > 0 and keys[low[j] + half] < wanted[j]
            low[j] += (half + 1) * below
            left[j] = left[j] - half - 1 if below else half
        largest >>= 1
    first = np.zeros((n, m), np.int64)
    for j in range(used):
        i, s = owner[j] // m, owner[j] % m
        first[i, s] = low[j] - bounds[sources[i, s, 1], 2]
    return first


@compiled
def _draft_rows(
    contexts: np.ndarray,
    rows: np.ndarray,
    row_lengths: np.ndarray,
    prompts: np.ndarray,
    limits: np.ndarray,
    sources: np.ndarray,
    groups: np.ndarray,
    sealed_tokens: np.ndarray,
    order: np.ndarray,
    keys: np.ndarray,
    leaves: np.ndarray,
    nodes: np.ndarray,
    bounds: np.ndarray,
    live_tokens: Any,
    live_heads: Any,
    live_earlier: Any,
    texts: Any,
    factors: np.ndarray,
    ends: np.ndarray,
    floor: float,
    out_tokens: np.ndarray,
    out_chance: np.ndarray,
    out_expected: np.ndarray,
    out_cell: np.ndarray,
    out_count: np.ndarray,
) -> None:
    depth, n_sources = out_tokens.shape[1], sources.shape[1]
    # Of each source: where it stands (a leaf of a tree, a position in a text, how many places of a live pool; -1 =
    # nowhere, -2 = to be looked up), how many tokens match there, and what it proposes with which chance.
    at, length = np.zeros(n_sources, np.int64), np.zeros(n_sources, np.int64)
    says, hopes = np.zeros(n_sources, np.int64), np.zeros(n_sources)
    after = np.zeros(n_sources, np.int64)  # the leaf of the context that a tree's proposal ends
    places = np.zeros((n_sources, _CANDIDATES), np.int64)
    shares = np.zeros((n_sources, _CANDIDATES), np.int64)
    first = _first_keys(contexts, rows, row_lengths, limits, sources, keys, bounds)
    tail = np.zeros(DEPTH + depth, np.int32)  # the end of the context and the draft behind it
    for i in range(len(rows)):
        limit = min(depth, limits[i])
        if limit <= 0:
            continue
        context = contexts[rows[i], max(0, row_lengths[i] - WINDOW) : row_lengths[i]]
        size, kept, used, n, chance = len(context), min(DEPTH, len(context)), 0, 0, 1.0
        output = context[max(0, size - (row_lengths[i] - prompts[i])) :]
        tail[:kept] = context[size - kept :]
        while used < n_sources and sources[i, used, 0] != NOTHING:
            used += 1
        for s in range(used):
            at[s] = -2
        while True:
            end = tail[max(0, kept + n - DEPTH) : kept + n]
            for s in range(used):
                kind, place = sources[i, s, 0], sources[i, s, 1]
                if kind == SEALED:
                    leaf_0, leaf_1, node_0 = bounds[place, 2], bounds[place, 3], bounds[place, 4]
                    if at[s] == -2:
                        pool = (
                            sealed_tokens[bounds[place, 0] : bounds[place, 1]],
                            order[leaf_0:leaf_1],
                            keys[leaf_0:leaf_1],
                        )
                        if n == 0:
                            at[s], length[s] = match_from(*pool, end, context_key(end), first[i, s])
                        else:
                            at[s], length[s] = match_sealed(*pool, end)
                    if at[s] >= 0:
                        node = find_node(leaves[leaf_0:leaf_1], nodes[node_0:], at[s], length[s])
                        if node >= 0:
                            inner = nodes[node_0 + node]
                            says[s], hopes[s], after[s] = inner.token, inner.chance, inner.after
                        else:
                            outer = leaves[leaf_0 + at[s]]
                            says[s], hopes[s], after[s] = outer.token, outer.chance, outer.after
                elif kind == LIVE:
                    text = live_tokens[place]
                    if at[s] == -2:
                        found = match_live(text, live_heads[place], live_earlier[place], end, places[s], shares[s])
                        at[s] = found if found > 0 else -1
                    if at[s] > 0:
                        says[s], hopes[s], length[s] = _vote(text, at[s], places[s], shares[s])
                else:
                    text = texts[place] if kind == TEXT else context
                    if at[s] == -2:
                        at[s], length[s] = match_text(text, end, 1 if kind == TEXT else LEAST)
                    if at[s] >= 0:
                        says[s] = text[at[s]] if at[s] < len(text) else tail[kept + at[s] - len(text)]
                        hopes[s] = FOLLOWED[min(length[s], 8) - 1]
            best, best_expected, best_cell, token = 0.0, 0.0, 0, BORDER
            for s in range(used):
                if at[s] < 0:
                    continue
                missed, leads, others = 1.0, True, SILENT
                for other in range(used):
                    if at[other] < 0:
                        continue
                    if says[other] == says[s]:
                        missed *= 1 - hopes[other]
                        if other != s:
                            others = AGREE
                            leads &= hopes[s] > hopes[other] or (hopes[s] == hopes[other] and s < other)
                    elif others != AGREE:
                        others = SHORTER if others == SHORTER or length[other] > length[s] else LONGEST
                if not leads:
                    continue
                expected = 1 - missed
                written = 0
                for j in range(len(output)):
                    written += output[j] == says[s]
                for j in range(kept, kept + n):
                    written += tail[j] == says[s]
                cell = (_chance_bucket(expected) * OTHERS + others) * WRITTEN + min(written, WRITTEN - 1)
                cell += groups[i, s] * CELLS
                hope = min(SURE, expected * factors[cell])
                if hope > best:
                    best, best_expected, best_cell, token = hope, expected, cell, says[s]
            chance *= best
            if best == 0.0 or chance < floor:
                break
            out_tokens[i, n], out_chance[i, n], out_expected[i, n] = token, chance, best_expected
            out_cell[i, n] = best_cell
            tail[kept + n] = token
            n += 1
            ended = False
            for end_token in ends:
                ended |= token == end_token
            if n == limit or ended:
                break
            for s in range(used):
                kind, place = sources[i, s, 0], sources[i, s, 1]
                if at[s] < 0 or says[s] != token:
                    # A tree is searched again; texts, whose search reads them whole, wait for the next step.
                    at[s] = -2 if kind == SEALED else -1
                elif kind == SEALED:
                    # The leaf after the proposal has the longer context: no search.
                    at[s], length[s] = after[s] if after[s] >= 0 else -2, min(length[s] + 1, DEPTH)
                elif kind == LIVE:
                    found, text = 0, live_tokens[place]
                    for c in range(at[s]):
                        if text[places[s, c]] == token and text[places[s, c] + 1] != BORDER:
                            places[s, found], shares[s, found] = places[s, c] + 1, shares[s, c] + 1
                            found += 1
                    at[s] = found if found > 0 else -1
                elif kind == TEXT and texts[place][at[s] + 1] == BORDER:
                    at[s] = -1
                else:
                    at[s], length[s] = at[s] + 1, min(length[s] + 1, DEPTH)
        out_count[i] = n


@compiled
def take_likeliest(
    chance: np.ndarray, count: np.ndarray, seconds: np.ndarray, at_least: int, worth: float, shares: np.ndarray
) -> None:
    """See controller.allocate, whose answer is left in `shares`. worth: of plain speed, which drafts must promise."""
    rows = len(chance)
    flat, row, n = np.empty(count.sum()), np.empty(count.sum(), np.int64), 0
    for i in range(rows):
        lowest = np.inf
        for j in range(count[i]):
            lowest = min(lowest, chance[i, j])
            flat[n], row[n] = -lowest, i
            n += 1
    order = np.argsort(flat)[: len(seconds) - 1]
    first = min(at_least, len(order))
    expected, best, speed = float(rows), 0, rows / seconds[0] if first == 0 else -1.0
    plain = rows / seconds[0]
    for taken in range(1, len(order) + 1):
        expected -= flat[order[taken - 1]]
        if taken >= first and expected / seconds[taken] > speed:
            best, speed = taken, expected / seconds[taken]
    if at_least == 0 and speed <= worth * plain:
        best = 0
    for taken in range(best):
        shares[row[order[taken]]] += 1
