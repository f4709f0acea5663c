"""The pools that drafts come from, and the search in them for a whole batch in one call.

A request names its pools. Names also come over HTTP, so they are checked before they become paths. A missing pool
is not an error, since a new cohort has none yet: the default pool is used, and the miss is counted. A damaged pool is
rebuilt from its tokens if those are intact, or else renamed, and the job continues.
"""

import contextlib
import logging
import re
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from owlrec_decoding.index import (
    BORDER,
    DEPTH,
    LIVE,
    NOTHING,
    SEALED,
    TEXT,
    CorruptPool,
    LivePool,
    PoolError,
    SealedPool,
    SearchSet,
    build_pool,
    compiled,
    find_node,
    match_live,
    match_sealed,
    match_text,
    open_pool,
    rebuild_pool,
)
from owlrec_decoding.options import DEFAULT_POOL, LEAD_TOKENS, DraftLimits

# ---------------------------------------------------------------------------------------------------------------- pools
# The pools of an engine: sealed ones on disk, mapped on use, and live ones fed by just finished
# texts.


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}")
_log = logging.getLogger(__name__)


def write_pool(
    root: str | Path,
    name: str,
    sequences: Sequence[Sequence[int] | np.ndarray],
    ids: Sequence[int] | None,
    *,
    identity: str,
    max_tokens: int,
) -> SealedPool:
    """Seals one cohort's token sequences as pool `name` under `root`.

    sequences: oldest first; the oldest are dropped if the total exceeds `max_tokens`. ids: see build_pool.
    Raises ValueError for a name that requests could not use.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' is not a valid pool name: use up to 128 letters, digits and ._=+-, not starting with a dot"
        )
    first, room = len(sequences), max_tokens
    while first and room >= len(sequences[first - 1]) + 1:
        first -= 1
        room -= len(sequences[first]) + 1
    pool = build_pool(sequences[first:], None if ids is None else ids[first:])
    pool.save(Path(root) / name, identity)
    return pool


def opening_tokens(tokenizer: Any) -> list[int]:
    """Tokens before an answer in the tokenizer's chat template, at most LEAD_TOKENS."""
    turn = [{"role": "user", "content": "x"}]
    closed, opened = (
        list(tokenizer.apply_chat_template(turn, add_generation_prompt=opened, tokenize=True, return_dict=False))
        for opened in (False, True)
    )
    shared = next((i for i, (a, b) in enumerate(zip(closed, opened, strict=False)) if a != b), len(closed))
    return opened[shared:][-LEAD_TOKENS:]


def answer_tokens(tokenizer: Any, texts: Sequence[str], ended: Sequence[bool]) -> Iterator[np.ndarray]:
    """Each text as the engine wrote it, int32 [n]: after its opening and, if it `ended` by itself, with the end
    token."""
    opening = opening_tokens(tokenizer)
    for ids, done in zip(tokenizer(list(texts), add_special_tokens=False)["input_ids"], ended, strict=True):
        yield np.array([*opening, *ids, *([tokenizer.eos_token_id] if done else [])], np.int32)


class Pools:
    """Opens, closes and feeds pools, and tracks each one's place in the search set. `version` changes whenever a place
    is freed."""

    def __init__(self, root: str | None, identity: str, limits: DraftLimits | None = None) -> None:
        """root: folder of sealed pools, None = none. identity: the running model and tokenizer. Raises
        PoolError if the pools belong to others."""
        self.root, self.identity, self.limits = root, identity, limits or DraftLimits()
        self.search_set, self.version = SearchSet(), 0
        self.counts: Counter[str] = Counter()
        self._sealed: OrderedDict[str, tuple[SealedPool, int]] = OrderedDict()
        self._live: OrderedDict[str, tuple[LivePool, int]] = OrderedDict()
        self._missing: set[str] = set()
        self._refuse_foreign()

    def open(self, name: str) -> SealedPool | None:
        """The sealed pool of that name, mapped; None if it is missing or belongs to another model."""
        if name in self._sealed:
            self._sealed.move_to_end(name)
            return self._sealed[name][0]
        if self.root is None or name in self._missing or not _NAME.fullmatch(name):
            return None
        pool = self._load(Path(self.root) / name)
        if pool is None:
            self._missing.add(name)
            return None
        while len(self._sealed) >= self.limits.max_open_pools:
            self._close(self._sealed, SEALED)
        self._sealed[name] = (pool, self.search_set.add_sealed(pool))
        return pool

    def sources(self, name: str) -> list[tuple[int, int]]:
        """Kind and place of the existing tiers (sealed and live) of pool `name`."""
        tiers = []
        if self.open(name) is not None:
            tiers.append((SEALED, self._sealed[name][1]))
        if name in self._live:
            self._live.move_to_end(name)
            tiers.append((LIVE, self._live[name][1]))
        return tiers

    def known(self, name: str) -> bool:
        """Whether requests that name this pool have one: on disk or, if nothing is on disk at all, any valid
        name."""
        if self.root is None:
            return bool(_NAME.fullmatch(name))
        return self.open(name) is not None

    def insert(self, name: str, tokens: Sequence[int]) -> None:
        """Adds a finished text to the live tier of pool `name`."""
        if not self.limits.live_tokens or not tokens:
            return
        if name not in self._live:
            while len(self._live) >= self.limits.max_live_pools:
                self._close(self._live, LIVE)
            pool = LivePool(max(self.limits.live_tokens, 1 << 10))
            self._live[name] = (pool, self.search_set.add_live(pool))
            self.version += 1  # requests of this pool have one more source
        pool, place = self._live[name]
        if pool.insert(tokens):
            self.search_set.renew_live(place, pool)
        self._live.move_to_end(name)

    def tokens(self) -> Mapping[str, int]:
        """Tokens in mapped and live pools."""
        return {
            "sealed": sum(len(pool.tokens) for pool, _ in self._sealed.values()),
            "live": sum(len(pool) for pool, _ in self._live.values()),
        }

    def _refuse_foreign(self) -> None:
        """Opens one pool at startup, the default one if it exists, to detect a folder of another model's pools before
        any request."""
        if self.root is None:
            return
        names = sorted(f.name for f in Path(self.root).iterdir() if _NAME.fullmatch(f.name))
        name = DEFAULT_POOL if DEFAULT_POOL in names else (names[0] if names else None)
        if name is not None:
            with contextlib.suppress(CorruptPool):  # reopened and repaired when a request names it
                open_pool(Path(self.root) / name, self.identity)

    def _close(self, tier: OrderedDict, kind: int) -> None:
        _, (_, place) = tier.popitem(last=False)
        self.search_set.remove(kind, place)
        self.version += 1

    def _load(self, folder: Path) -> SealedPool | None:
        if not folder.is_dir():
            return None
        try:
            return open_pool(folder, self.identity)
        except CorruptPool as error:
            _log.warning("%s", error)
            return self._repair(folder)
        except PoolError as error:
            _log.error("%s", error)
            self.counts["refused"] += 1
            return None

    def _repair(self, folder: Path) -> SealedPool | None:
        try:
            pool = rebuild_pool(folder)
            pool.save(folder, self.identity)
            self.counts["rebuilt"] += 1
            return open_pool(folder, self.identity)
        except CorruptPool:
            quarantine = folder.with_name(f".{folder.name}.corrupt")
            shutil.rmtree(quarantine, ignore_errors=True)
            folder.rename(quarantine)
            self.counts["quarantined"] += 1
            _log.warning(
                "pool %s cannot be repaired and was moved to %s; publish again to replace it", folder, quarantine
            )
            return None


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
_EDGES = np.array([0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97])
_PRIOR = np.outer([1.0, 1.0, 0.8, 0.4], [1.0, 0.7, 1.0]).ravel()  # factors before anything was learned
_PRIOR_WEIGHT = 20.0  # expected acceptances that the prior factor counts for
_MEMORY = 512.0  # observations after which a cell's counts are halved
_SURE = 0.999


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

    def observe(self, cell: np.ndarray, expected: np.ndarray, accepted: np.ndarray) -> None:
        """Takes in the fate of n verified tokens: those up to and including the first rejected one of each draft.

        cell: int [n], as in Drafts. expected: float [n], the index's chances. accepted: bool [n].
        """
        np.add.at(self._tried, cell, 1.0)
        np.add.at(self._expected, cell, expected)
        np.add.at(self._accepted, cell, accepted.astype(np.float64))
        touched = np.unique(cell)
        full = touched[self._tried[touched] > _MEMORY]
        for counts in (self._tried, self._expected, self._accepted):
            counts[full] *= 0.5
        learned = self._accepted[touched] + _PRIOR_WEIGHT * self._prior[touched]
        self.factors[touched] = learned / (self._expected[touched] + _PRIOR_WEIGHT)


# ------------------------------------------------------------------------------------------------------------ retrieval


_CANDIDATES = 8
_NEAR = 1  # tokens by which a live match may fall short of the longest and still count as evidence
_WINDOW = 8192  # tokens of a row's own context that are searched: beyond it the scan would cost more than it finds
_HALVES = 0.5 ** np.arange(64)
# The chance that a match of one place goes on, by its length in tokens (1 to 7, and more), before anything was learned.
_FOLLOWED = np.array([0.2, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7])
_FEW = 0.6  # of a live pool's votes, before anything was learned
_LEAST = 2  # tokens that must match before a row's own context is followed: one alone is chance


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
    pools: tuple[Any, ...] = (*search_set.lists[SEALED], *search_set.lists[LIVE], *search_set.lists[TEXT])
    arrays: tuple[Any, ...] = (out.tokens, out.chance, out.expected, out.cell, out.count)
    _draft_rows(contexts, rows, lengths, prompts, limits, sources, groups, *pools, factors, floor, *arrays)  # type: ignore[call-arg]
    return out


@compiled
def _chance_bucket(chance: float) -> int:
    bucket = 0
    while bucket < CHANCES - 1 and chance >= _EDGES[bucket]:
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
        votes, near, supported = 0.0, 0, 0
        for other in range(found):
            if text[positions[other]] == text[positions[c]]:
                votes += _HALVES[min(longest - lengths[other], 63)]
                near += lengths[other] >= longest - _NEAR
                supported = max(supported, lengths[other])
        total += lengths[c] >= longest - _NEAR
        if votes > best:
            token, best, agreeing, length = np.int64(text[positions[c]]), votes, near, supported  # type: ignore[assignment]
    if found == 0:
        return BORDER, 0.0, 0
    # One place in all is worth as much as a match of that length; of several, the share that agrees counts. Few texts
    # are no fair sample.
    alone = float(_FOLLOWED[min(length, 8) - 1])
    return token, _FEW * (agreeing - 1 + alone) / max(total, 1) if agreeing > 0 else 0.1, length


@compiled
def _draft_rows(
    contexts: np.ndarray,
    rows: np.ndarray,
    row_lengths: np.ndarray,
    prompts: np.ndarray,
    limits: np.ndarray,
    sources: np.ndarray,
    groups: np.ndarray,
    sealed_tokens: Any,
    sealed_order: Any,
    sealed_rank: Any,
    sealed_leaf: Any,
    sealed_nodes: Any,
    sealed_chance: Any,
    live_tokens: Any,
    live_heads: Any,
    live_earlier: Any,
    texts: Any,
    factors: np.ndarray,
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
    follower = np.zeros(n_sources, np.int64)  # the position of a tree's proposal
    places = np.zeros((n_sources, _CANDIDATES), np.int64)
    shares = np.zeros((n_sources, _CANDIDATES), np.int64)
    tail = np.zeros(DEPTH + depth, np.int32)  # the end of the context and the draft behind it
    for i in range(len(rows)):
        limit = min(depth, limits[i])
        if limit <= 0:
            continue
        context = contexts[rows[i], max(0, row_lengths[i] - _WINDOW) : row_lengths[i]]
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
                    tokens, leaf, nodes = sealed_tokens[place], sealed_leaf[place], sealed_nodes[place]
                    if at[s] == -2:
                        at[s], length[s] = match_sealed(tokens, sealed_order[place], end)
                    if at[s] >= 0:
                        node = find_node(leaf, nodes, at[s], length[s])
                        follower[s] = nodes[node, 2] if node >= 0 else sealed_order[place][at[s]]
                        hopes[s] = sealed_chance[place][len(leaf) + node if node >= 0 else at[s]]
                        says[s] = tokens[follower[s]]
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
                        at[s], length[s] = match_text(text, end, 1 if kind == TEXT else _LEAST)
                    if at[s] >= 0:
                        says[s] = text[at[s]] if at[s] < len(text) else tail[kept + at[s] - len(text)]
                        hopes[s] = _FOLLOWED[min(length[s], 8) - 1]
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
                hope = min(_SURE, expected * factors[cell])
                if hope > best:
                    best, best_expected, best_cell, token = hope, expected, cell, says[s]
            chance *= best
            if best == 0.0 or chance < floor:
                break
            out_tokens[i, n], out_chance[i, n], out_expected[i, n] = token, chance, best_expected
            out_cell[i, n] = best_cell
            tail[kept + n] = token
            n += 1
            if n == limit:
                break
            for s in range(used):
                kind, place = sources[i, s, 0], sources[i, s, 1]
                if at[s] < 0 or says[s] != token:
                    # A tree is searched again; texts, whose search reads them whole, wait for the next step.
                    at[s] = -2 if kind == SEALED else -1
                elif kind == SEALED:
                    # The leaf after the follower has the longer context: no search.
                    leaf_after = sealed_rank[place][follower[s] + 1]
                    at[s], length[s] = leaf_after if leaf_after >= 0 else -2, min(length[s] + 1, DEPTH)
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
