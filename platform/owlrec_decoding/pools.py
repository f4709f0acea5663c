"""The pools of an engine: sealed ones on disk, the hot ones mapped, and live ones that learn from the texts just
finished.

A request names its pools; names come over HTTP too, so that they are checked before they become paths. A missing pool
is not an error, since a new cohort has none yet: the default pool serves, and the miss is counted. A damaged pool is
rebuilt from its tokens where those are intact, else set aside under another name, and the job goes on.
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
    Shelf,
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

    sequences: oldest first; the oldest are left out where all together exceed `max_tokens`. ids: see build_pool.
    Raises ValueError for a name that requests could not give.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"'{name}' cannot name a pool: letters, digits and ._=+- only, at most 128, not starting with a dot"
        )
    first, room = len(sequences), max_tokens
    while first and room >= len(sequences[first - 1]) + 1:
        first -= 1
        room -= len(sequences[first]) + 1
    pool = build_pool(sequences[first:], None if ids is None else ids[first:])
    pool.save(Path(root) / name, identity)
    return pool


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that stand before an answer in the tokenizer's chat template, at most LEAD_TOKENS of them."""
    turn = [{"role": "user", "content": "x"}]
    closed, opened = (
        list(tokenizer.apply_chat_template(turn, add_generation_prompt=opened, tokenize=True, return_dict=False))
        for opened in (False, True)
    )
    shared = next((i for i, (a, b) in enumerate(zip(closed, opened, strict=False)) if a != b), len(closed))
    return opened[shared:][-LEAD_TOKENS:]


def answer_tokens(tokenizer: Any, texts: Sequence[str], ended: Sequence[bool]) -> Iterator[np.ndarray]:
    """Each text as the engine wrote it, int32 [n]: behind its opening and, where it `ended` by itself, with the end
    token."""
    opening = opening_tokens(tokenizer)
    for ids, done in zip(tokenizer(list(texts), add_special_tokens=False)["input_ids"], ended, strict=True):
        yield np.array([*opening, *ids, *([tokenizer.eos_token_id] if done else [])], np.int32)


class Pools:
    """Opens, closes and feeds pools, and keeps each one's place on the shelf. `version` changes whenever a place was
    freed."""

    def __init__(self, root: str | None, identity: str, limits: DraftLimits | None = None) -> None:
        """root: the folder of sealed pools, None = none. identity: of the model and tokenizer that run. Raises
        PoolError, naming it, where the pools belong to others."""
        self.root, self.identity, self.limits = root, identity, limits or DraftLimits()
        self.shelf, self.version = Shelf(), 0
        self.counts: Counter[str] = Counter()
        self._sealed: OrderedDict[str, tuple[SealedPool, int]] = OrderedDict()
        self._live: OrderedDict[str, tuple[LivePool, int]] = OrderedDict()
        self._missing: set[str] = set()
        self._refuse_foreign()

    def open(self, name: str) -> SealedPool | None:
        """The sealed pool of that name, mapped; None where there is none, or one of another model."""
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
        self._sealed[name] = (pool, self.shelf.add_sealed(pool))
        return pool

    def sources(self, name: str) -> list[tuple[int, int]]:
        """Kind and place of the sealed and the live tier of pool `name`, those that exist."""
        found = []
        if self.open(name) is not None:
            found.append((SEALED, self._sealed[name][1]))
        if name in self._live:
            self._live.move_to_end(name)
            found.append((LIVE, self._live[name][1]))
        return found

    def known(self, name: str) -> bool:
        """Whether requests that name this pool have one: on disk or, where nothing is on disk at all, any valid
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
            self._live[name] = (pool, self.shelf.add_live(pool))
            self.version += 1  # requests of this pool have one source more
        pool, place = self._live[name]
        if pool.insert(tokens):
            self.shelf.renew_live(place, pool)
        self._live.move_to_end(name)

    def tokens(self) -> Mapping[str, int]:
        """Tokens held, mapped and live."""
        return {
            "sealed": sum(len(pool.tokens) for pool, _ in self._sealed.values()),
            "live": sum(len(pool) for pool, _ in self._live.values()),
        }

    def _refuse_foreign(self) -> None:
        """Opens one pool at start, the default one if it is there: a folder of another model's pools is found before
        any request."""
        if self.root is None:
            return
        names = sorted(f.name for f in Path(self.root).iterdir() if _NAME.fullmatch(f.name))
        name = DEFAULT_POOL if DEFAULT_POOL in names else (names[0] if names else None)
        if name is not None:
            with contextlib.suppress(CorruptPool):  # opened again, and repaired, when a request names it
                open_pool(Path(self.root) / name, self.identity)

    def _close(self, tier: OrderedDict, kind: int) -> None:
        _, (_, place) = tier.popitem(last=False)
        self.shelf.remove(kind, place)
        self.version += 1

    def _load(self, folder: Path) -> SealedPool | None:
        if not folder.is_dir():
            return None
        try:
            return open_pool(folder, self.identity)
        except CorruptPool as error:
            _log.warning("%s", error)
            return self._mend(folder)
        except PoolError as error:
            _log.error("%s", error)
            self.counts["refused"] += 1
            return None

    def _mend(self, folder: Path) -> SealedPool | None:
        try:
            pool = rebuild_pool(folder)
            pool.save(folder, self.identity)
            self.counts["rebuilt"] += 1
            return open_pool(folder, self.identity)
        except CorruptPool:
            aside = folder.with_name(f".{folder.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            self.counts["quarantined"] += 1
            _log.warning("pool %s cannot be repaired and was moved to %s; publish again to replace it", folder, aside)
            return None
