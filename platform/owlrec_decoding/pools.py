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
# Drafts for a whole batch in one call: searches each row's sources, continues the row from each, and keeps the best
# continuation.
#
# A chain is drafted token by token: the earlier occurrences vote for their next token, each shared token doubling a
# vote, and those that disagree with the winner drop out. The reliability of such a vote depends on the kind of source,
# the length of the match and the share of the vote. These three select a cell in a table of acceptance rates (see
# controller.py), which the caller keeps up to date. In a replay of 128 greedy texts of SmolLM2-135M, 16 candidates and
# doubling votes gave as many tokens per step as any setting tried.


# ----------------------------------------------------------------------------------------------------------- acceptance
# Acceptance rates of drafts, learned while decoding, by the kind of evidence behind a token.
#
# A cell is a pair of match length (1, 2, 3, 4, 5-6, 7-9, 10-15, 16 and more tokens) and vote (a single occurrence;
# under 35, 55, 75, 95 % of several; unanimous with 2-3 or with 4 and more). Counts alone mislead: one occurrence of a
# long match is accepted far more often than a split vote, and much depends on the model and the texts. Rates start
# from SmolLM2-135M's knowledge texts and follow the verifier; old observations fade, since
# refreshed texts drift.


LENGTHS, VOTES = 8, 7
CELLS = LENGTHS * VOTES
_PRIOR_WEIGHT = 8.0  # weight of the prior, in observations
_MEMORY = 512.0  # observations after which a cell's counts are halved
_PRIOR = np.array(
    [
        [0.35, 0.15, 0.30, 0.35, 0.35, 0.40, 0.40],
        [0.65, 0.25, 0.35, 0.40, 0.45, 0.70, 0.75],
        [0.65, 0.25, 0.35, 0.45, 0.55, 0.75, 0.80],
        [0.70, 0.25, 0.40, 0.45, 0.55, 0.80, 0.85],
        [0.75, 0.25, 0.40, 0.50, 0.60, 0.85, 0.90],
        [0.80, 0.25, 0.40, 0.50, 0.60, 0.90, 0.95],
        [0.80, 0.25, 0.40, 0.55, 0.65, 0.90, 0.95],
        [0.90, 0.25, 0.40, 0.55, 0.75, 0.90, 0.95],
    ]
)


class AcceptanceRates:
    """Acceptance rates by group (a kind of source under a kind of verification) and cell.

    rates: float64 [groups, CELLS], the estimated probability that a token is accepted, given that all
    tokens before it in its draft were.
    """

    def __init__(self, groups: int) -> None:
        self._prior = np.tile(_PRIOR.reshape(1, CELLS), (groups, 1))
        self._tried = np.zeros((groups, CELLS))
        self._accepted = np.zeros((groups, CELLS))
        self.rates = self._prior.copy()

    def observe(self, group: np.ndarray, cell: np.ndarray, accepted: np.ndarray) -> None:
        """Records the verdicts on n verified tokens, up to and including the first rejected one of each draft.

        group, cell: int [n]. accepted: bool [n].
        """
        np.add.at(self._tried, (group, cell), 1.0)
        np.add.at(self._accepted, (group, cell), accepted.astype(np.float64))
        if self._tried.max() > _MEMORY:
            fade = np.where(self._tried > _MEMORY, 0.5, 1.0)
            self._tried *= fade
            self._accepted *= fade
        self.rates = (self._accepted + _PRIOR_WEIGHT * self._prior) / (self._tried + _PRIOR_WEIGHT)


# ------------------------------------------------------------------------------------------------------------ retrieval


_CANDIDATES = 16
_NEAR = 1  # tokens by which a match may be shorter than the longest and still count
_WINDOW = 8192  # searched tokens of a row's own context; a longer scan would not pay off
_HALVES = 0.5 ** np.arange(64)


@dataclass(frozen=True)
class Drafts:
    """Drafts of a call. tokens: int32 [rows, depth]; chance: float64 [rows, depth], probability that a token and
    all before it are accepted; cell: int16 [rows, depth]; count: int64 [rows]; source: int64 [rows], place in
    the row's
    sources or -1."""

    tokens: np.ndarray
    chance: np.ndarray
    cell: np.ndarray
    count: np.ndarray
    source: np.ndarray


def draft_rows(
    contexts: np.ndarray,
    rows: np.ndarray,
    lengths: np.ndarray,
    limits: np.ndarray,
    sources: np.ndarray,
    groups: np.ndarray,
    search_set: SearchSet,
    rates: np.ndarray,
    *,
    depth: int,
    floor: float,
) -> Drafts:
    """Drafts for each of n rows.

    contexts: int32 [any, max_len]; row i's context is contexts[rows[i], :lengths[i]]. limits: int64 [n], maximum tokens
    to draft for it. sources: int64 [n, m, 2] of kind and place in the search set, NOTHING after the last; among equals,
    the earlier wins. groups: int64 [n, m], the row of `rates` for each source. rates: float64 [groups, CELLS]. floor:
    a draft ends before the first token with a lower chance, which would not pay off.
    """
    n = len(rows)
    out = Drafts(
        np.full((n, depth), BORDER, np.int32),
        np.zeros((n, depth)),
        np.zeros((n, depth), np.int16),
        np.zeros(n, np.int64),
        np.full(n, -1, np.int64),
    )
    pools: tuple[Any, ...] = (*search_set.lists[SEALED], *search_set.lists[LIVE], *search_set.lists[TEXT])
    arrays: tuple[Any, ...] = (out.tokens, out.chance, out.cell, out.count, out.source)
    _draft_rows(contexts, rows, lengths, limits, sources, groups, *pools, rates, floor, *arrays)  # type: ignore[call-arg]
    return out


@compiled
def _cell(length: int, votes: int, total: int) -> int:
    if length <= 4:
        bucket = length - 1
    elif length <= 6:
        bucket = 4
    elif length <= 9:
        bucket = 5
    elif length <= 15:
        bucket = 6
    else:
        bucket = 7
    if total <= 1:
        vote = 0
    elif 20 * votes < 7 * total:
        vote = 1
    elif 20 * votes < 11 * total:
        vote = 2
    elif 20 * votes < 15 * total:
        vote = 3
    elif 20 * votes < 19 * total:
        vote = 4
    elif total < 4:
        vote = 5
    else:
        vote = 6
    return bucket * VOTES + vote


@compiled
def _continue(
    text: np.ndarray,
    matches: int,
    positions: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    tokens: np.ndarray,
    cells: np.ndarray,
) -> int:
    """Drafts up to `limit` tokens from `matches` candidates, which it consumes; returns the count. Past the end of
    `text`, a candidate reads the draft itself, so a repetitive row can be continued
    indefinitely."""
    n, end = 0, len(text)
    votes = np.zeros(_CANDIDATES)
    ballot = np.zeros(_CANDIDATES, np.int64)
    following = np.zeros(_CANDIDATES, np.int64)
    while n < limit and matches > 0:
        longest = 0
        for c in range(matches):
            longest = max(longest, lengths[c])
        choices = 0
        for c in range(matches):
            position = positions[c]
            token = np.int64(text[position]) if position < end else np.int64(tokens[position - end])
            following[c] = token
            if token == BORDER:
                continue
            at = 0
            while at < choices and ballot[at] != token:
                at += 1
            if at == choices:
                ballot[at], votes[at] = token, 0.0
                choices += 1
            votes[at] += _HALVES[min(longest - lengths[c], 63)]
        if choices == 0:
            break
        best = 0
        for at in range(1, choices):
            if votes[at] > votes[best]:
                best = at
        token, total, agreeing, supported, kept = ballot[best], 0, 0, 0, 0
        for c in range(matches):
            near = lengths[c] >= longest - _NEAR
            total += near
            if following[c] == token:
                agreeing += near
                supported = max(supported, lengths[c])
                positions[kept], lengths[kept] = positions[c] + 1, lengths[c] + 1
                kept += 1
        tokens[n], cells[n] = token, _cell(supported, agreeing, total)
        n += 1
        matches = kept
    return n


@compiled
def _draft_rows(
    contexts: np.ndarray,
    rows: np.ndarray,
    row_lengths: np.ndarray,
    limits: np.ndarray,
    sources: np.ndarray,
    groups: np.ndarray,
    sealed_tokens: Any,
    sealed_order: Any,
    sealed_shared: Any,
    live_tokens: Any,
    live_heads: Any,
    live_earlier: Any,
    texts: Any,
    rates: np.ndarray,
    floor: float,
    out_tokens: np.ndarray,
    out_chance: np.ndarray,
    out_cell: np.ndarray,
    out_count: np.ndarray,
    out_source: np.ndarray,
) -> None:
    positions, lengths = np.zeros(_CANDIDATES, np.int64), np.zeros(_CANDIDATES, np.int64)
    depth = out_tokens.shape[1]
    tokens, cells = np.zeros(depth, np.int32), np.zeros(depth, np.int64)
    for i in range(len(rows)):
        context = contexts[rows[i], max(0, row_lengths[i] - _WINDOW) : row_lengths[i]]
        best = 0.0
        for s in range(sources.shape[1]):
            kind, place = sources[i, s, 0], sources[i, s, 1]
            if kind == NOTHING or limits[i] <= 0:
                break
            text = context
            if kind == SEALED:
                text = sealed_tokens[place]
                matches = match_sealed(text, sealed_order[place], sealed_shared[place], context, positions, lengths)
            elif kind == LIVE:
                text = live_tokens[place]
                matches = match_live(text, live_heads[place], live_earlier[place], context, positions, lengths)
            elif kind == TEXT:
                text = texts[place]
                matches = match_text(text, len(text), context, positions, lengths)
            else:
                matches = match_text(context, len(context), context, positions, lengths)
            n = _continue(text, matches, positions, lengths, min(depth, limits[i]), tokens, cells)
            expected, chance, worthwhile = 0.0, 1.0, 0
            while worthwhile < n:
                chance *= rates[groups[i, s], cells[worthwhile]]
                if chance < floor:
                    break
                expected += chance
                worthwhile += 1
            if expected > best:
                best = expected
                out_count[i], out_source[i] = worthwhile, s
                chance = 1.0
                for j in range(worthwhile):
                    chance *= rates[groups[i, s], cells[j]]
                    out_tokens[i, j], out_chance[i, j], out_cell[i, j] = tokens[j], chance, cells[j]
