"""Index for draft lookups: given texts as suffix trees, just finished ones as hashed contexts, in kernels
compiled by numba.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numba  # type: ignore[import-untyped]
import numpy as np
from llvmlite.binding import ffi  # type: ignore[import-untyped]

# ------------------------------------------------------------------------------------------------------------- compiled
# The only use of numba: kernels of this package are compiled, cached on disk, and run without the GIL.
#
# numba refuses to decorate if it finds no writable folder for its cache (a read-only image without a home),
# so there the kernels are compiled at every start instead.


F = TypeVar("F", bound=Callable[..., Any])


def _answer_without_dict() -> None:
    """vLLM 0.32 asks every value of every module for its `__dict__` when an engine starts.

    See triton_utils/dispatcher.py:138. llvmlite's library object returns a foreign function, which breaks the start
    of any engine after numba is imported.
    """
    lookup = ffi._lib_wrapper.__getattr__

    def getattr_(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return lookup(self, name)

    ffi._lib_wrapper.__getattr__ = getattr_


_answer_without_dict()


def compiled(function: F) -> F:
    """`function` as a numba kernel (nopython, nogil), cached if the disk allows it."""
    try:
        kernel: F = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        kernel = numba.njit(nogil=True)(function)
    return kernel


def typed_list(arrays: list[Any]) -> Any:
    """`arrays` (all of one type, at least one) as the list type of kernels."""
    return numba.typed.List(arrays)


# --------------------------------------------------------------------------------------------------------------- sealed
# The sealed tier of a retrieval pool: token sequences and a suffix tree over them, in memory and immutable.
#
# The tree orders positions by the text before them read *backwards*, because a query starts from the end of a context:
# one binary search finds the longest end of the context that occurs (REST, NAACL 2024, keeps forward order and needs
# one search per match length). Each node holds the most likely token after its occurrences and its chance, blended
# from all shorter contexts by absolute discounting (interpolated Kneser-Ney with raw counts; PPM does the same), so
# a draft reads one node per token. Keys are compared up to `DEPTH` tokens, which limits building to five sorts: a
# match of 32 tokens is as good as a longer one. At most 34 bytes per token, 26 for texts: 4 for the text, 4 for the
# order, 4 for ranks, 8 per leaf, 16 per inner node. Searched, it takes as much again: what a step reads together stands
# together then (see WalkedPool), since waiting for memory is most of a search.


DEPTH = 32
KEYED = 3  # tokens of a search key
_TOKEN_BITS = 21  # of each
NAMELESS = -1  # the id of a document without lookups by id
BORDER = -1  # between documents, so no match crosses from one to the next
# Arrays of a sealed pool, with type and trailing shape.
_ARRAYS: dict[str, tuple[type, tuple[int, ...]]] = {
    "tokens": (np.int32, ()),
    "order": (np.int32, ()),
    "rank": (np.int32, ()),
    "leaf": (np.int32, ()),
    "nodes": (np.int32, (3,)),
    "chance": (np.float32, ()),
    "documents": (np.int64, (3,)),
}
_MAX_TOKENS = 2**31 - 1
_DISCOUNT = 0.8  # of each count, left to shorter contexts; .7 to .9 change tokens per step by less than 1 %


class SealedPool:
    """Documents of one cohort, searchable.

    tokens: int32 [n], documents one after another, each followed by BORDER.
    order: int32 [m], the positions p that have a token before and at them, sorted by the text before p read backwards:
    the leaves. rank: int32 [n], where in `order` a position stands, or -1.
    leaf: int32 [m], the inner node above each leaf. nodes: int32 [k, 3] of depth (tokens that all its leaves share),
    node above and the position of its likeliest follower; node 0 is the root.
    chance: float32 [m + k], of the follower of each leaf, then of each node.
    documents: int64 [d, 3] of id, start and end in `tokens`, sorted by id.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        order: np.ndarray,
        rank: np.ndarray,
        leaf: np.ndarray,
        nodes: np.ndarray,
        chance: np.ndarray,
        documents: np.ndarray,
    ) -> None:
        """Raises ValueError if the arrays' lengths do not fit: kernels read them without a check of bounds."""
        if (len(rank), len(leaf), len(chance)) != (len(tokens), len(order), len(order) + len(nodes)):
            raise ValueError(
                f"a sealed pool of {len(tokens)} tokens, {len(order)} leaves and {len(nodes)} nodes has {len(rank)} "
                f"ranks, {len(leaf)} nodes of leaves and {len(chance)} chances. Make it by build_pool."
            )
        self.tokens, self.order, self.rank, self.documents = tokens, order, rank, documents
        self.leaf, self.nodes, self.chance = leaf, nodes, chance

    def document(self, id_: int) -> np.ndarray:
        """Tokens of document `id_`, int32 [length], empty if the pool does not have it."""
        at = int(np.searchsorted(self.documents[:, 0], id_))
        if id_ == NAMELESS or at == len(self.documents) or self.documents[at, 0] != id_:
            return self.tokens[:0]
        start, end = self.documents[at, 1:]
        return self.tokens[start:end]

    def walked(self) -> "WalkedPool":
        """The tree as a search reads it."""
        m, tokens, order = len(self.order), self.tokens, self.order
        leaves, nodes = np.zeros(m, LEAF), np.zeros(len(self.nodes) if m else 0, NODE)
        keys = np.zeros(m, np.int64)
        if not m:
            return WalkedPool(tokens, order, keys, leaves, nodes)
        followers = self.nodes[:, 2]
        leaves["node"], leaves["token"], leaves["after"] = self.leaf, tokens[order], self.rank[order + 1]
        nodes["depth"], nodes["above"] = self.nodes[:, 0], self.nodes[:, 1]
        nodes["token"], nodes["after"] = tokens[followers], self.rank[followers + 1]
        leaves["chance"], nodes["chance"] = self.chance[:m], self.chance[m:]
        inside = np.ones(m, bool)  # the text before the position has begun
        for i in range(1, KEYED + 1):
            inside &= (order >= i) & (tokens[order - i] != BORDER)
            keys = keys << _TOKEN_BITS | np.where(inside, tokens[order - i] + 1, 0)
        return WalkedPool(tokens, order, keys, leaves, nodes)

    def to_bytes(self) -> list[bytes]:
        """Its arrays, for another process."""
        return [np.ascontiguousarray(getattr(self, name)).tobytes() for name in _ARRAYS]

    @classmethod
    def from_bytes(cls, arrays: Sequence[bytes]) -> "SealedPool":
        """The pool whose `to_bytes` these are."""
        shaped = zip(arrays, _ARRAYS.values(), strict=True)
        return cls(*(np.frombuffer(data, kind).reshape(-1, *shape).copy() for data, (kind, shape) in shaped))


LEAF = np.dtype([("node", np.int32), ("token", np.int32), ("after", np.int32), ("chance", np.float32)])
NODE = np.dtype([("depth", np.int32), ("above", np.int32), *LEAF.descr[1:]])


class WalkedPool(NamedTuple):
    """A sealed pool's tree as a search reads it.

    tokens, order: of the pool. keys: int64 [m], the last KEYED tokens before each leaf's position, whose order is that
    of the leaves. leaves: LEAF [m], the node above, the token at the position, the leaf of the context that this token
    ends (-1 at the end of a text) and the token's chance. nodes: NODE [k], see SealedPool, and the same of the
    likeliest follower.
    """

    tokens: np.ndarray
    order: np.ndarray
    keys: np.ndarray
    leaves: np.ndarray
    nodes: np.ndarray


def build_pool(
    sequences: Sequence[Sequence[int] | np.ndarray], ids: Sequence[int] | None = None, *, searchable: bool = True
) -> SealedPool:
    """Sorts token sequences into a sealed pool, at about a second per million tokens.

    ids: one per sequence (user or item ids), for `SealedPool.document`; None if all are NAMELESS. searchable: otherwise
    there is no tree, and only documents can be looked up by id.
    Raises ValueError for a token id below 0 or from 2^21 - 1 on, duplicate ids, or more than 2^31 tokens.
    """
    parts = [np.asarray(s, dtype=np.int32) for s in sequences]
    lengths = np.array([len(p) for p in parts], dtype=np.int64)
    ends = np.cumsum(lengths + 1) - 1
    n = int(ends[-1] + 1) if len(parts) else 0
    if n > _MAX_TOKENS:
        raise ValueError(f"a sealed pool holds at most {_MAX_TOKENS} tokens, not {n}: leave some out")
    tokens = np.full(n, BORDER, dtype=np.int32)
    for part, end in zip(parts, ends, strict=True):
        if len(part) and not 0 <= part.min() <= part.max() < (1 << _TOKEN_BITS) - 1:
            raise ValueError(
                f"token ids must not be negative, nor above 2^{_TOKEN_BITS} - 2, but a sequence has {part.min()} to "
                f"{part.max()}"
            )
        tokens[end - len(part) : end] = part
    names = np.full(len(parts), NAMELESS, dtype=np.int64) if ids is None else np.asarray(ids, dtype=np.int64)
    named = names[names != NAMELESS]
    if len(names) != len(parts) or len(np.unique(named)) != len(named):
        raise ValueError(
            f"{len(parts)} sequences need one distinct id each, but {len(names)} ids are given, "
            f"{len(np.unique(named))} of them distinct"
        )
    documents = np.stack([names, ends - lengths, ends], axis=1) if len(parts) else np.zeros((0, 3), dtype=np.int64)
    documents = documents[np.argsort(documents[:, 0], kind="stable")]
    rank = np.full(len(tokens), -1, dtype=np.int32)
    if not searchable:
        none = np.zeros(0, np.int32)
        return SealedPool(tokens, none, rank, none, np.zeros((0, 3), np.int32), np.zeros(0, np.float32), documents)
    order = _sort_backwards(tokens)
    rank[order] = np.arange(len(order), dtype=np.int32)
    leaf, spans, nodes = _nest(_shared_lengths(tokens, order))
    names, followers = np.unique(tokens[order], return_inverse=True)
    chance = _count_followers(order, followers.astype(np.int32), len(names), leaf, spans, nodes)
    return SealedPool(tokens, order, rank, leaf, nodes, chance, documents)


def _sort_backwards(tokens: np.ndarray) -> np.ndarray:
    """Prefix doubling, backwards: ranks by the last 1, 2, 4, … DEPTH tokens before each position, until all differ."""
    before = np.arange(len(tokens)) - np.maximum.accumulate(np.where(tokens == BORDER, np.arange(len(tokens)) + 1, 0))
    before = np.maximum(before, 0)  # tokens between a position and the preceding border
    positions = np.flatnonzero((before > 0) & (tokens != BORDER))
    rank = np.zeros(len(tokens), dtype=np.int64)
    # Positions at a border are never keys or the second half of a key: only p - k with k < before[p]
    # are read.
    rank[1:] = tokens[:-1].astype(np.int64) + 1
    order = positions
    width = 1
    while width <= DEPTH and len(positions):
        if width == 1:
            key = rank[positions]
        else:
            half = width // 2
            beyond = before[positions] > half
            key = rank[positions] * (len(tokens) + 1)
            key[beyond] += rank[positions[beyond] - half]
        by_key = np.argsort(key, kind="stable")
        order, key = positions[by_key], key[by_key]
        new = np.concatenate([[True], key[1:] != key[:-1]])
        rank[order] = np.cumsum(new)
        if new.all():
            break
        width *= 2
    return order.astype(np.int32)


@compiled
def _shared_lengths(tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
    shared = np.zeros(len(order), dtype=np.uint8)
    for i in range(1, len(order)):
        a, b, n = order[i - 1] - 1, order[i] - 1, 0
        while n < DEPTH and a >= 0 and b >= 0 and tokens[a] == tokens[b] and tokens[a] != BORDER:
            a -= 1
            b -= 1
            n += 1
        shared[i] = n
    return shared


@compiled
def _nest(shared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The intervals of equal shared lengths as a tree: the node above each leaf, and each node's leaves (first, end)
    and SealedPool.nodes, the position still open."""
    m = len(shared)
    leaf, spans, nodes = np.zeros(m, np.int32), np.zeros((m + 1, 2), np.int32), np.zeros((m + 1, 3), np.int32)
    path = np.zeros(DEPTH + 2, np.int64)  # the nodes that are still open, by depth
    n, top = 1, 0
    for i in range(m):
        after = np.int64(shared[i + 1]) if i + 1 < m else np.int64(0)
        if after > nodes[path[top], 0]:
            nodes[n, 0], nodes[n, 1], spans[n, 0] = after, path[top], i
            top += 1
            path[top] = n
            n += 1
        leaf[i] = path[top]
        while nodes[path[top], 0] > after:
            closed = path[top]
            top -= 1
            spans[closed, 1] = i + 1
            if nodes[path[top], 0] < after:
                nodes[n, 0], nodes[n, 1], spans[n, 0] = after, path[top], spans[closed, 0]
                nodes[closed, 1] = n
                top += 1
                path[top] = n
                n += 1
    spans[0, 1] = m
    return leaf, spans[:n].copy(), nodes[:n].copy()


@compiled
def _count_followers(
    order: np.ndarray, followers: np.ndarray, n_names: int, leaf: np.ndarray, spans: np.ndarray, nodes: np.ndarray
) -> np.ndarray:
    """SealedPool.chance; sets the nodes' positions. followers: int32 [m], of each leaf, numbered below n_names.

    Nodes above come first, so that the row of each level still holds the chances of the node above.
    """
    m, k = len(leaf), len(nodes)
    chance = np.zeros(m + k, np.float32)
    chances = np.zeros((DEPTH + 2, n_names), np.float32)
    counts, level = np.zeros(n_names, np.int64), np.zeros(k, np.int64)
    for node in np.argsort(spans[:, 0].astype(np.int64) * (DEPTH + 1) + nodes[:, 0]):
        first, end = spans[node, 0], spans[node, 1]
        if node > 0:
            level[node] = level[nodes[node, 1]] + 1
        distinct = 0
        for i in range(first, end):
            distinct += counts[followers[i]] == 0
            counts[followers[i]] += 1
        best = 0.0
        for i in range(first, end):
            token, row = followers[i], level[node]
            if counts[token] > 0:
                shorter = chances[row - 1, token] if node > 0 else 1.0 / n_names
                mine = (counts[token] - _DISCOUNT + _DISCOUNT * distinct * shorter) / (end - first)
                chances[row, token] = mine
                counts[token] = 0
                if mine > best:
                    best = mine
                    nodes[node, 2], chance[m + node] = order[i], mine
            if leaf[i] == node:
                chance[i] = 1 - _DISCOUNT + _DISCOUNT * chances[row, token]
    return chance


# ----------------------------------------------------------------------------------------------------------------- live
# The live tier of a retrieval pool: an n-gram index to which finished texts are added one at a time.
#
# For each of the `LEVELS` n, a table has the latest position after each hash of n tokens, and every position links
# to the previous one with the same hash: inserting a token is a few stores, and the latest texts are found first.
# Hash collisions are harmless, since the search compares the tokens themselves. 36 bytes per token when full, 72 right
# after growing; bounded, dropping the oldest texts first.


LEVELS = (1, 2, 4, 8)
_NO_POSITION = -1
_FIRST_CAPACITY = 1 << 10
_KEPT_SHARE = 0.75  # of max_tokens kept when full; dropping single texts would rebuild on each insert


class LivePool:
    """Recent texts of one cohort, searchable immediately.

    tokens: int32 [capacity], each text followed by BORDER. size: int64 [1], tokens in use.
    heads: int32 [levels, capacity], latest position by hash. earlier: int32 [levels, capacity], the position before it.
    """

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: bound on tokens held, including borders; beyond it the oldest texts are dropped."""
        if max_tokens < _FIRST_CAPACITY:
            raise ValueError(f"a live pool needs room for at least {_FIRST_CAPACITY} tokens, not {max_tokens}")
        self.max_tokens = max_tokens
        self.dropped = 0  # number of texts
        self._allocate(_FIRST_CAPACITY)

    def __len__(self) -> int:
        return int(self.size[0])

    def insert(self, sequence: Sequence[int] | np.ndarray) -> bool:
        """Adds one text; returns whether the arrays were replaced by larger ones, so that users of the old ones must
        fetch them again.

        A text longer than half the pool is cut to its end. Raises ValueError for a negative token id.
        """
        new = np.asarray(sequence, dtype=np.int32)[-(self.max_tokens // 2) :]
        if len(new) == 0:
            return False
        if new.min() < 0:
            raise ValueError(f"token ids must not be negative, but a text has {new.min()}")
        replaced = self._make_room(len(new) + 1)
        _insert(self.tokens, self.size, self.heads, self.earlier, new)
        return replaced

    def sequences(self) -> list[np.ndarray]:
        """Texts in the pool, oldest first, each int32 [length]."""
        used = self.tokens[: len(self)]
        return [part[:-1] for part in np.split(used, np.flatnonzero(used == BORDER) + 1) if len(part)]

    def _make_room(self, extra: int) -> bool:
        needed = len(self) + extra
        if needed <= min(len(self.tokens), self.max_tokens):
            return False
        kept = self.sequences()
        if needed > self.max_tokens:
            room = int(self.max_tokens * _KEPT_SHARE) - extra
            first = len(kept)
            while first and room >= len(kept[first - 1]) + 1:
                first -= 1
                room -= len(kept[first]) + 1
            self.dropped += first
            kept = kept[first:]
            needed = sum(len(k) + 1 for k in kept) + extra
        capacity = len(self.tokens)
        while capacity < needed:
            capacity *= 2
        kept = [k.copy() for k in kept]
        self._allocate(capacity)
        for sequence in kept:
            _insert(self.tokens, self.size, self.heads, self.earlier, sequence)
        return True

    def _allocate(self, capacity: int) -> None:
        self.tokens = np.full(capacity, BORDER, dtype=np.int32)
        self.size = np.zeros(1, dtype=np.int64)
        self.heads = np.full((len(LEVELS), capacity), _NO_POSITION, dtype=np.int32)
        self.earlier = np.full((len(LEVELS), capacity), _NO_POSITION, dtype=np.int32)


@compiled
def hash_before(tokens: np.ndarray, end: int, n: int, mask: int) -> int:
    """Hash of the `n` tokens before position `end`, within `mask` (a power of two less one)."""
    value = np.uint64(0x9E3779B97F4A7C15)
    for i in range(end - n, end):
        value = (value ^ np.uint64(tokens[i])) * np.uint64(0xBF58476D1CE4E5B9)
        value ^= value >> np.uint64(29)
    return np.int64(value & np.uint64(mask))  # type: ignore[return-value]  # numba knows no Python integers


@compiled
def _insert(tokens: np.ndarray, size: np.ndarray, heads: np.ndarray, earlier: np.ndarray, new: np.ndarray) -> None:
    start, mask = size[0], heads.shape[1] - 1
    tokens[start : start + len(new)] = new
    tokens[start + len(new)] = BORDER
    for position in range(start + 1, start + len(new)):  # positions with a token before and at them
        for level, n in enumerate(LEVELS):
            if position - start >= n:
                slot = hash_before(tokens, position, n, mask)
                earlier[level, position] = heads[level, slot]
                heads[level, slot] = position
    size[0] = start + len(new) + 1


# ------------------------------------------------------------------------------------------------------------- matching
# Earlier occurrences of a context: the longest match of its end in a sealed pool, a live pool or a single text.
#
# A sealed pool names the leaf, whose node knows what follows. A live pool gives up to as many candidates as the
# caller's arrays hold, each the position that follows an earlier occurrence and the number of tokens it shares with the
# context's end, longest first; shorter ones are included where there is room, since a single long match is often worth
# less than several shorter ones that agree.


@compiled
def shared_length(tokens: np.ndarray, position: int, context: np.ndarray) -> int:
    """Number of tokens before `position` that equal the end of `context`, at most DEPTH, stopping at a border."""
    n, size = 0, len(context)
    limit = min(DEPTH, position, size)
    while n < limit and tokens[position - 1 - n] == context[size - 1 - n]:
        n += 1
    return n


@compiled
def match_sealed(tokens: np.ndarray, order: np.ndarray, keys: np.ndarray, context: np.ndarray) -> tuple[int, int]:
    """A leaf of a sealed pool (see WalkedPool) whose text shares most with the end of `context`, and how many tokens;
    -1 and 0 where none shares any."""
    key, low, high = context_key(context), 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return match_from(tokens, order, keys, context, key, low)


@compiled
def context_key(context: np.ndarray) -> int:
    """The key (see WalkedPool) of the last tokens of a context."""
    size, key = len(context), np.int64(0)
    for i in range(KEYED):
        key = key << _TOKEN_BITS | (np.int64(context[size - 1 - i]) + 1 if i < size else 0)
    return key  # type: ignore[return-value]  # numba knows no Python integers


@compiled
def match_from(
    tokens: np.ndarray, order: np.ndarray, keys: np.ndarray, context: np.ndarray, key: int, first: int
) -> tuple[int, int]:
    """See match_sealed. key: of the context; first: the first of the keys that is not below it."""
    size, m, low, high = len(context), len(keys), first, first
    if low < m and keys[low] == key:
        # The leaves of this key end beyond `high`: few, so it is looked for from here.
        step, high = 1, low + 1
        while high < m and keys[high] == key:
            high += step
            step *= 2
        below, high = high - step // 2, min(high, m)
        while below < high:
            middle = (below + high) // 2
            if keys[middle] == key:
                below = middle + 1
            else:
                high = middle
    while low < high:
        middle = (low + high) // 2
        at, less = order[middle] - 1, False
        for i in range(KEYED, DEPTH):
            theirs = tokens[at - i] if at - i >= 0 else BORDER
            ours = context[size - 1 - i] if i < size else BORDER
            if theirs != ours:
                less = theirs < ours
                break
            if ours == BORDER:
                break
        if less:
            low = middle + 1
        else:
            high = middle
    left = shared_length(tokens, order[low - 1], context) if low > 0 else 0
    right = shared_length(tokens, order[low], context) if low < m else 0
    if left == 0 and right == 0:
        return -1, 0
    return (low - 1, left) if left > right else (low, right)


@compiled
def find_node(leaves: np.ndarray, nodes: np.ndarray, at: int, length: int) -> int:
    """The node of the `length` tokens that lead to leaf `at`; -1 where that leaf alone has them."""
    node = leaves[at].node
    if length > nodes[node].depth:
        return -1
    while node > 0:
        above = nodes[node].above
        if nodes[above].depth < length:
            break
        node = above
    return node


@compiled
def keep_longest(positions: np.ndarray, lengths: np.ndarray, matches: int, position: int, length: int) -> int:
    """Inserts a candidate into the `matches` longest so far, sorted by length; among equals, earlier insertions
    come first."""
    room = len(positions)
    if matches == room and lengths[matches - 1] >= length:
        return matches
    at = min(matches, room - 1)
    while at > 0 and lengths[at - 1] < length:
        positions[at], lengths[at] = positions[at - 1], lengths[at - 1]
        at -= 1
    positions[at], lengths[at] = position, length
    return min(matches + 1, room)


@compiled
def match_live(
    tokens: np.ndarray,
    heads: np.ndarray,
    earlier: np.ndarray,
    context: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
) -> int:
    """The longest matches of the end of `context` among the latest texts of a live pool (see LivePool for the first
    three).

    At each level it checks the latest len(positions) occurrences, so it may miss a longer match older than those
    among very repetitive texts; what it finds is then at least as long as that level.
    """
    mask, size, matches, above = heads.shape[1] - 1, len(context), 0, DEPTH + 1
    for level in range(len(LEVELS) - 1, -1, -1):
        n = LEVELS[level]
        if size < n or matches == len(positions):
            continue
        position = heads[level, hash_before(context, size, n, mask)]
        for _ in range(len(positions)):
            if position < 0:
                break
            length = shared_length(tokens, position, context)
            if n <= length < above:  # shorter: a collision; longer: found at the level above
                matches = keep_longest(positions, lengths, matches, position, length)
            position = earlier[level, position]
        above = n
    return matches


_BLOCK = 32


@compiled
def match_text(text: np.ndarray, context: np.ndarray, least: int) -> tuple[int, int]:
    """The position in `text` after the longest match of the end of `context`, and its length; of equal ones the
    latest. -1 and 0 where none has `least` tokens."""
    best, at, size = 0, -1, len(context)
    if size == 0 or len(text) < 2:
        return at, best
    last, end = context[size - 1], len(text) - 1
    # Few tokens equal the last one: whole blocks are compared at once (LLVM makes vectors of it), the latest first.
    while end > 0 and best < DEPTH:
        start = max(0, end - _BLOCK)
        some = False
        for position in range(start, end):
            some |= text[position] == last
        if some:
            for position in range(end, start, -1):
                if text[position - 1] == last and text[position] != BORDER:
                    length = shared_length(text, position, context)
                    if length > best:
                        best, at = length, position
        end = start
    return (at, best) if best >= least else (-1, 0)


# ----------------------------------------------------------------------------------------------------------- search set
# The texts that a retrieval call may search, in the arrays that compiled kernels need.
#
# A row refers to its sources by kind and place, so one call serves rows with any pools. Sealed pools stand one after
# another in common arrays: taking an array out of a list costs a kernel 13 ns, several times per drafted token. Live
# pools and single texts come and go with every request, so their arrays are in lists, whose places are reused.


NOTHING, SEALED, LIVE, TEXT, CONTEXT = -1, 0, 1, 2, 3  # kinds of source; CONTEXT is the row's own prompt and output

_NO_TOKENS = np.zeros(0, np.int32)
_STAND_INS: dict[int, tuple[np.ndarray, ...]] = {
    LIVE: (_NO_TOKENS, np.zeros((1, 0), np.int32), np.zeros((1, 0), np.int32)),
    TEXT: (_NO_TOKENS,),
}
_NO_POOL = build_pool([], searchable=False).walked()


class SearchSet:
    """Places for sealed pools, live pools and single texts."""

    def __init__(self) -> None:
        # Place 0 of each kind is a stand-in that nothing refers to: numba cannot pass an empty list.
        self.lists: dict[int, tuple[Any, ...]] = {
            k: tuple(typed_list([a]) for a in arrays) for k, arrays in _STAND_INS.items()
        }
        self._free: dict[int, list[int]] = {kind: [] for kind in (SEALED, *_STAND_INS)}
        self._pools: list[WalkedPool] = [_NO_POOL]
        self._sealed: tuple[np.ndarray, ...] | None = None

    @property
    def sealed(self) -> tuple[np.ndarray, ...]:
        """The arrays of all sealed pools, one pool after another, see WalkedPool; and int64 [places, 5]: where a pool's
        tokens begin and end, where its leaves begin and end, where its nodes begin.
        """
        if self._sealed is None:
            pools = self._pools
            tokens, leaves, nodes = (
                np.cumsum([0, *(len(getattr(pool, name)) for pool in pools)]) for name in ("tokens", "leaves", "nodes")
            )
            bounds = np.stack([tokens[:-1], tokens[1:], leaves[:-1], leaves[1:], nodes[:-1]], axis=1)
            self._sealed = (*map(np.concatenate, zip(*pools, strict=True)), np.ascontiguousarray(bounds))
        return self._sealed

    def add_sealed(self, pool: SealedPool) -> int:
        """Gives a sealed pool a place."""
        self._sealed = None
        if self._free[SEALED]:
            place = self._free[SEALED].pop()
            self._pools[place] = pool.walked()
            return place
        self._pools.append(pool.walked())
        return len(self._pools) - 1

    def add_live(self, pool: LivePool) -> int:
        """Gives a live pool a place."""
        return self._add(LIVE, (pool.tokens, pool.heads, pool.earlier))

    def renew_live(self, place: int, pool: LivePool) -> None:
        """Replaces a live pool's arrays at its place."""
        self._set(LIVE, place, (pool.tokens, pool.heads, pool.earlier))

    def add_text(self, tokens: np.ndarray) -> int:
        """Gives a single text a place. tokens: int32 [n]."""
        # A border at the end: only a row's own context may be read beyond its end, into its draft.
        return self._add(TEXT, (np.append(tokens, np.int32(BORDER)),))

    def remove(self, kind: int, place: int) -> None:
        """Frees a place."""
        if kind == SEALED:
            self._pools[place], self._sealed = _NO_POOL, None
        else:
            self._set(kind, place, _STAND_INS[kind])
        self._free[kind].append(place)

    def _add(self, kind: int, arrays: tuple[np.ndarray, ...]) -> int:
        if self._free[kind]:
            place = self._free[kind].pop()
            self._set(kind, place, arrays)
            return place
        for list_, array in zip(self.lists[kind], arrays, strict=True):
            list_.append(array)
        return len(self.lists[kind][0]) - 1

    def _set(self, kind: int, place: int, arrays: tuple[np.ndarray, ...]) -> None:
        for list_, array in zip(self.lists[kind], arrays, strict=True):
            list_[place] = array
