"""The pools of an engine: sealed ones on disk, mapped on use, and live ones fed by just finished
texts.

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
from pathlib import Path
from typing import Any

import numpy as np

from owlrec_decoding.index import (
    LIVE,
    SEALED,
    CorruptPool,
    LivePool,
    PoolError,
    SealedPool,
    SearchSet,
    build_pool,
    open_pool,
    rebuild_pool,
)
from owlrec_decoding.options import DEFAULT_POOL, LEAD_TOKENS, DraftLimits

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
