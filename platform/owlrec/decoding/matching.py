"""Where a context has occurred before: the longest matches of its end in a sealed pool, a live pool or a single text.

All three give the same thing, so that one drafting rule serves them: up to as many candidates as the caller's arrays
hold, each the position that follows an earlier occurrence and the number of tokens it shares with the context's end,
longest first. Shorter matches are included where there is room: a single long match is often worth less than several
shorter ones that agree.
"""

import numpy as np

from owlrec.decoding.compiled import compiled
from owlrec.decoding.live import LEVELS, hash_before
from owlrec.decoding.sealed import BORDER, DEPTH


@compiled
def shared_length(tokens: np.ndarray, position: int, context: np.ndarray) -> int:
    """How many tokens before `position` equal the end of `context`, at most DEPTH, stopping at a border."""
    n, size = 0, len(context)
    limit = min(DEPTH, position, size)
    while n < limit and tokens[position - 1 - n] == context[size - 1 - n]:
        n += 1
    return n


@compiled
def match_sealed(
    tokens: np.ndarray,
    order: np.ndarray,
    shared: np.ndarray,
    context: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
) -> int:
    """The longest matches of the end of `context` in a sealed pool (see SealedPool for the first three).

    positions, lengths: int64 [at most this many], filled. Returns how many were found.
    """
    low, high, size = 0, len(order), len(context)
    while low < high:
        middle = (low + high) // 2
        at, less = order[middle] - 1, False
        for i in range(DEPTH):
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
    left, right = low - 1, low
    left_length = shared_length(tokens, order[left], context) if left >= 0 else 0
    right_length = shared_length(tokens, order[right], context) if right < len(order) else 0
    found = 0
    while found < len(positions) and (left_length > 0 or right_length > 0):
        if left_length >= right_length:
            positions[found], lengths[found] = order[left], left_length
            left_length = min(left_length, int(shared[left]))
            left -= 1
        else:
            positions[found], lengths[found] = order[right], right_length
            right += 1
            right_length = min(right_length, int(shared[right])) if right < len(order) else 0
        found += 1
    return found


@compiled
def keep_longest(positions: np.ndarray, lengths: np.ndarray, found: int, position: int, length: int) -> int:
    """Inserts a candidate into the `found` longest so far, sorted by length; of equal ones the earlier inserted
    stand first."""
    room = len(positions)
    if found == room and lengths[found - 1] >= length:
        return found
    at = min(found, room - 1)
    while at > 0 and lengths[at - 1] < length:
        positions[at], lengths[at] = positions[at - 1], lengths[at - 1]
        at -= 1
    positions[at], lengths[at] = position, length
    return min(found + 1, room)


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

    At each level the latest len(positions) occurrences are looked at, so a longer match that is older than those may be
    missed among texts that repeat themselves much; what is found is then at least as long as that level.
    """
    mask, size, found, above = heads.shape[1] - 1, len(context), 0, DEPTH + 1
    for level in range(len(LEVELS) - 1, -1, -1):
        n = LEVELS[level]
        if size < n or found == len(positions):
            continue
        position = heads[level, hash_before(context, size, n, mask)]
        for _ in range(len(positions)):
            if position < 0:
                break
            length = shared_length(tokens, position, context)
            if n <= length < above:  # shorter ones are collisions, longer ones were found at the level above
                found = keep_longest(positions, lengths, found, position, length)
            position = earlier[level, position]
        above = n
    return found


@compiled
def match_text(text: np.ndarray, end: int, context: np.ndarray, positions: np.ndarray, lengths: np.ndarray) -> int:
    """The longest matches of the end of `context` in one text, at positions before `end`; of equal ones the latest
    stand first."""
    found, size = 0, len(context)
    if size == 0:
        return 0
    last = context[size - 1]
    for position in range(end - 1, 0, -1):
        if text[position - 1] == last:
            found = keep_longest(positions, lengths, found, position, shared_length(text, position, context))
    return found
