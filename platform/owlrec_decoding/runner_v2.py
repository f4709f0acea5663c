"""The decoder on vLLM's Model Runner V2: pools searched, drafts verified and chances learned on the device.

Follows V2's own n-gram speculator (vllm/v1/worker/gpu/spec_decode/ngram/speculator.py) and takes its place: the engine
is set up for `ngram_gpu`, which V2 knows, so asynchronous scheduling and full CUDA graphs stay on, and the worker then
replaces the speculator. Nothing on the path of a step waits for the device. V2's adaptive verification, where it is
enabled, takes the controller's place: it reads each draft's chance and decides on the device how many to verify.

With tensor parallelism every rank drafts for itself, so nothing here may depend on a clock or on the order of atomics.
The kernels import Triton itself, since vLLM hides it on a CPU; there only Triton's interpreter runs them.

Missing beside V1 (drafter.py): the live tier of texts finished in this run, the baseline stretches and the engine's
counters. The kernels equal a numpy oracle in Triton's interpreter and have not run on a GPU. vLLM's CPU build refuses
V2, since the released Triton has no backend named "cpu" (vllm/triton_utils/importing.py:44): there, V1 is what runs.
"""
# mypy: disable-error-code="no-untyped-def"
# The arguments of kernels are pointers, which have no types here.

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
import vllm
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, rejection_sample
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator
from vllm.v1.worker.gpu_worker import Worker

from owlrec_decoding import options
from owlrec_decoding.index import BORDER, DEPTH, SealedPool
from owlrec_decoding.options import DEFAULT_POOL, DecodingConfig, DraftLimits, Relaxation, VllmError
from owlrec_decoding.pools import (
    AGREE,
    CELLS,
    EDGES,
    FOLLOWED,
    LEAST,
    LONGEST,
    MEMORY,
    OTHERS,
    PRIOR_WEIGHT,
    SHORTER,
    SILENT,
    SURE,
    WINDOW,
    WRITTEN,
    AcceptanceRates,
    build_pools,
    check_tokens,
    read_texts,
    usable_pools,
)
from owlrec_decoding.verification import rule_numbers

# -------------------------------------------------------------------------------------------------------------- layout
# A row's sources are the lanes of one vector: its own earlier text, its pools, its own prompt and output.

# Constants that kernels read are `tl.constexpr`, elsewhere `.value` of them.
_LANES = tl.constexpr(8)
MAX_POOLS = _LANES.value - 2  # the first lane is the row's own text, the last its context
CLASSES = ("own", "named", "default", "context")  # drafter.py's without the live pool: acceptance is learned by them

# A request's int32 fields on the device: where its own text starts and ends, how long it may become, k of its rule (1 =
# strict), whether it drafts; by lane its pools and groups; end tokens, of which only the first eight count.
_FIELDS, _OWN_START, _OWN_END, _END, _K, _DRAFTS = (tl.constexpr(n) for n in (32, 0, 1, 2, 3, 4))
_POOLS, _GROUPS, _ENDS, _N_ENDS = (tl.constexpr(n) for n in (8, 16, 24, 8))

_DEPTH, _CELLS, _OTHERS, _WRITTEN = (tl.constexpr(n) for n in (DEPTH, CELLS, OTHERS, WRITTEN))
_SILENT, _AGREE, _LONGEST, _SHORTER = (tl.constexpr(n) for n in (SILENT, AGREE, LONGEST, SHORTER))
_WINDOW = tl.constexpr(WINDOW)
_SCANNED = tl.constexpr(256)  # of these by one program
_COUNTED = tl.constexpr(64)  # at a time, for how often a token was written
_LEAST = tl.constexpr(LEAST)
_SURE = tl.constexpr(SURE)
_PRIOR_WEIGHT, _MEMORY = tl.constexpr(PRIOR_WEIGHT), tl.constexpr(MEMORY)
_LEARNED = tl.constexpr(32)  # cells by one program
# Drafts end where the chance to be accepted falls below this, the static threshold. It is low: V2 verifies
# `num_speculative_tokens` per row whatever was found, unless adaptive verification cuts them by the same chances.
FLOOR = tl.constexpr(0.001)
_CHOSEN = tl.constexpr(60000.0)  # a logit above all others, within fp16
_VOCAB = tl.constexpr(4096)  # logits at a time
_HALF = tl.constexpr(1 << 32)  # a length and a position in one number
_KEPT_COUNTS = 4096  # finished requests with unread counts


class DeviceIndex:
    """Sealed pools as one set of tensors on the device; `SealedPool` says what they hold.

    Positions, leaves and nodes are numbered through all pools. A border stands before the first token, so a search
    that steps back from a pool's start ends there. 34 bytes per token.
    tensors: as the arguments of `draft_kernel` from `ranges_ptr` on.
    """

    def __init__(self, pools: Mapping[str, SealedPool], device: torch.device) -> None:
        self.pools, self.places = dict(pools), {name: place for place, name in enumerate(pools)}
        sealed = list(pools.values())
        if sum(len(p.tokens) for p in sealed) > 2**31 - 2:
            raise ValueError("an index on the device holds at most 2^31 tokens: load fewer pools")

        def starts(sizes: Sequence[int]) -> np.ndarray:
            return np.cumsum([0, *sizes], dtype=np.int64)

        def upload(parts: Sequence[np.ndarray], dtype: Any = np.int32) -> torch.Tensor:
            whole = np.concatenate([*parts, [0]]).astype(dtype)  # never empty: Triton needs an address
            return torch.from_numpy(whole).to(device)

        token = 1 + starts([len(p.tokens) for p in sealed])
        leaf, node = starts([len(p.order) for p in sealed]), starts([len(p.nodes) for p in sealed])
        self.starts = dict(zip(pools, token.tolist(), strict=False))
        numbered = list(zip(sealed, token, leaf, node, strict=False))
        self.tokens = upload([np.array([BORDER]), *(p.tokens for p in sealed)])
        self.tensors = (
            upload([np.array([a, b]) for a, b in itertools.pairwise(leaf)]),
            self.tokens,
            upload([p.order + t for p, t, _, _ in numbered]),
            upload([np.array([-1]), *(np.where(p.rank < 0, -1, p.rank + first) for p, _, first, _ in numbered)]),
            upload([p.leaf + n for p, _, _, n in numbered]),
            upload([p.nodes[:, 0] for p in sealed]),
            upload([p.nodes[:, 1] + n for p, _, _, n in numbered]),
            upload([p.nodes[:, 2] + t for p, t, _, _ in numbered]),
            upload([p.chance[: len(p.order)] for p in sealed], np.float32),
            upload([p.chance[len(p.order) :] for p in sealed], np.float32),
        )

    def own_text(self, names: Sequence[str], document: int) -> tuple[int, int]:
        """Start and end in `tokens` of the document in the first pool that has it; two zeros if none does."""
        for name in names:
            documents = self.pools[name].documents
            at = int(np.searchsorted(documents[:, 0], document))
            if document >= 0 and at < len(documents) and documents[at, 0] == document:
                start, end = (int(x) + self.starts[name] for x in documents[at, 1:])
                if end > start:
                    return start, end
        return 0, 0


# -------------------------------------------------------------------------------------------------------------- kernels
# `index.py` and `pools.py` say what is computed; here a row is a program and its sources are lanes.


@triton.jit
def _longest_match(text_ptr, begin, end, context_ptr, context_begin, size, first, step):
    """The longest match of the context's end before a position in [begin, end), as length * 2^32 + position - begin:
    the maximum is the longest, and among equals the latest."""
    best = tl.zeros([_SCANNED], tl.int64)
    for start in range(begin + 1 + first, end, step):
        position = start + tl.arange(0, _SCANNED)
        alive = position < end
        shared = tl.zeros([_SCANNED], tl.int32)
        j = 0
        while (j < _DEPTH) & (tl.max(alive.to(tl.int32), axis=0) > 0):
            theirs = tl.load(text_ptr + position - 1 - j, mask=alive & (position - 1 - j >= begin), other=-2)
            ours = tl.load(context_ptr + size - 1 - j, mask=size - 1 - j >= context_begin, other=-3)
            alive = alive & (theirs == ours)
            shared += alive.to(tl.int32)
            j += 1
        found = shared.to(tl.int64) * _HALF + (position - begin).to(tl.int64)
        best = tl.maximum(best, tl.where(shared > 0, found, 0))
    return tl.max(best, axis=0)


@triton.jit
def scan_kernel(
    contexts_ptr,  # *int32 [slots, contexts_stride]: prompts and outputs
    contexts_stride,
    idx_mapping_ptr,  # *int64 [rows]: the slot of each row
    total_len_ptr,  # *int32 [slots]
    num_sampled_ptr,  # *int32 [rows]
    requests_ptr,  # *int32 [slots, FIELDS]
    tokens_ptr,  # *int32: DeviceIndex.tokens
    scan_ptr,  # *int64 [rows, 2, N_BLOCKS], written: of the own text, then of the own context
    N_BLOCKS: tl.constexpr,
):
    """Where the end of each row's context occurs in its own earlier text and in itself; a program per row and block."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slot = tl.load(idx_mapping_ptr + row).to(tl.int64)
    own = tl.zeros((), tl.int64)
    context = tl.zeros((), tl.int64)
    if (slot >= 0) & (tl.load(num_sampled_ptr + row) > 0):
        size = tl.load(total_len_ptr + slot)
        first = tl.maximum(size - _WINDOW, 0)
        context_ptr = contexts_ptr + slot * contexts_stride
        request_ptr = requests_ptr + slot * _FIELDS
        if tl.load(request_ptr + _DRAFTS) > 0:
            start = tl.load(request_ptr + _OWN_START)
            end = tl.load(request_ptr + _OWN_END)
            skip = block * _SCANNED
            step = N_BLOCKS * _SCANNED
            own = _longest_match(tokens_ptr, start, end, context_ptr, first, size, skip, step)
            context = _longest_match(context_ptr, first, size, context_ptr, first, size, skip, step)
    tl.store(scan_ptr + row * 2 * N_BLOCKS + block, own)
    tl.store(scan_ptr + (row * 2 + 1) * N_BLOCKS + block, context)


@triton.jit
def _shared_tokens(tokens_ptr, order_ptr, leaf, there, ours):
    """How many tokens before each leaf equal `ours`, which is read backwards: int32 [lanes]."""
    back = tl.arange(0, _DEPTH)[None, :]
    position = tl.load(order_ptr + leaf, mask=there, other=0) - 1
    at = position[:, None] - back
    theirs = tl.load(tokens_ptr + at, mask=there[:, None] & (at >= 0), other=-1)
    return tl.min(tl.where((theirs != ours[None, :]) | (theirs < 0), back, _DEPTH), axis=1)


@triton.jit
def _search(tokens_ptr, order_ptr, low_leaf, end_leaf, wanted, ours):
    """`match_sealed` in the pool of each wanted lane, all at once: leaf (-1: none) and shared tokens, int32 [lanes].

    ours: int32 [DEPTH], the end of the context, read backwards.
    """
    back = tl.arange(0, _DEPTH)[None, :]
    low = tl.where(wanted, low_leaf, 0)
    high = tl.where(wanted, end_leaf, 0)
    while tl.max(high - low, axis=0) > 0:
        open_ = low < high
        middle = low + (high - low) // 2
        position = tl.load(order_ptr + middle, mask=open_, other=0) - 1
        at = position[:, None] - back
        theirs = tl.load(tokens_ptr + at, mask=open_[:, None] & (at >= 0), other=-1)
        stop = tl.min(tl.where((theirs != ours[None, :]) | (ours[None, :] < 0), back, _DEPTH), axis=1)
        their = tl.sum(tl.where(back == stop[:, None], theirs, 0), axis=1)
        our = tl.sum(tl.where(back == stop[:, None], ours[None, :], 0), axis=1)
        low = tl.where(open_ & (their < our), middle + 1, low)
        high = tl.where(open_ & (their >= our), middle, high)
    has_left = wanted & (low > low_leaf)
    has_right = wanted & (low < end_leaf)
    left = tl.where(has_left, _shared_tokens(tokens_ptr, order_ptr, low - 1, has_left, ours), 0)
    right = tl.where(has_right, _shared_tokens(tokens_ptr, order_ptr, low, has_right, ours), 0)
    leaf = tl.where(left > right, low - 1, low)
    return tl.where((left == 0) & (right == 0), -1, leaf), tl.maximum(left, right)


@triton.jit
def _agreement(active, says, hope, length):
    """Lanes that say the same support each other, and one of them speaks for all: expected chance, what the others say
    (as in AcceptanceRates' cells) and whether the lane speaks, each [lanes]."""
    lane = tl.arange(0, _LANES)
    missed = tl.full([_LANES], 1.0, tl.float32)
    leads = active
    agree = lane < 0
    longer = lane < 0
    differ = lane < 0
    for other in tl.static_range(_LANES):
        me = lane == other
        there = tl.max((me & active).to(tl.int32), axis=0) > 0
        other_says = tl.sum(tl.where(me, says, 0), axis=0)
        other_hope = tl.sum(tl.where(me, hope, 0.0), axis=0)
        other_length = tl.sum(tl.where(me, length, 0), axis=0)
        same = there & (says == other_says)
        unlike = there & (says != other_says)
        missed = tl.where(same, missed * (1.0 - other_hope), missed)
        ahead = (hope > other_hope) | ((hope == other_hope) & (lane < other))
        leads = leads & (me | (same == 0) | ahead)
        agree = agree | (same & (me == 0))
        differ = differ | unlike
        longer = longer | (unlike & (other_length > length))
    others = tl.where(agree, _AGREE, tl.where(longer, _SHORTER, tl.where(differ, _LONGEST, _SILENT)))
    return 1.0 - missed, others, leads


@triton.jit
def draft_kernel(
    contexts_ptr,  # *int32 [slots, contexts_stride]
    contexts_stride,
    idx_mapping_ptr,  # *int64 [rows]
    total_len_ptr,  # *int32 [slots]
    prompt_len_ptr,  # *int32 [slots]
    num_sampled_ptr,  # *int32 [rows]
    num_rejected_ptr,  # *int32 [rows]
    last_sampled_ptr,  # *int64 [slots]
    requests_ptr,  # *int32 [slots, FIELDS]
    scan_ptr,  # *int64 [rows, 2, N_BLOCKS]
    ranges_ptr,  # from here to node_chance_ptr: DeviceIndex
    tokens_ptr,
    order_ptr,
    rank_ptr,
    leaf_ptr,
    depth_ptr,
    above_ptr,
    follower_ptr,
    leaf_chance_ptr,
    node_chance_ptr,
    factors_ptr,  # *float32 [groups * cells]
    edges_ptr,  # *float32 [8]
    followed_ptr,  # *float32 [8]
    drafts_ptr,  # *int64 [rows, K], written
    confidence_ptr,  # *float32 [rows, K], written: chance of each token, given that those before it were accepted
    cells_ptr,  # *int32 [slots, K], written
    expected_ptr,  # *float32 [slots, K], written
    count_ptr,  # *int32 [slots], written
    totals_ptr,  # *int32 [slots, 3]: drafted, accepted and relaxed, added to
    K: tl.constexpr,
    K_PO2: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    N_BLOCKS_PO2: tl.constexpr,
):
    """A draft per row: each source proposes a token, the likeliest joins the draft, and again. A program per row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if slot < 0:
        return
    request_ptr = requests_ptr + slot * _FIELDS
    context_ptr = contexts_ptr + slot * contexts_stride
    size = tl.load(total_len_ptr + slot)
    sampled = tl.load(num_sampled_ptr + row)
    lane = tl.arange(0, _LANES)
    back = tl.arange(0, _DEPTH)
    steps = tl.arange(0, K_PO2)

    # The verdict on the row's last draft.
    offered = tl.load(count_ptr + slot)
    passed = tl.maximum(sampled - 1, 0)
    verified = tl.minimum(passed + tl.load(num_rejected_ptr + row), offered)
    total_ptr = totals_ptr + slot * 3
    tl.store(total_ptr, tl.load(total_ptr) + verified)
    tl.store(total_ptr + 1, tl.load(total_ptr + 1) + tl.minimum(passed, verified))

    limit = tl.minimum(tl.load(request_ptr + _END) - size - 1, K)
    limit = tl.where((sampled > 0) & (tl.load(request_ptr + _DRAFTS) > 0), tl.maximum(limit, 0), 0)
    pool = tl.load(request_ptr + _POOLS + lane)
    group = tl.load(request_ptr + _GROUPS + lane)
    ends = tl.load(request_ptr + _ENDS + tl.arange(0, _N_ENDS))
    is_pool = pool >= 0
    low_leaf = tl.load(ranges_ptr + pool * 2, mask=is_pool, other=0)
    end_leaf = tl.load(ranges_ptr + pool * 2 + 1, mask=is_pool, other=0)
    window = tl.maximum(size - _WINDOW, 0)
    written_from = tl.maximum(tl.load(prompt_len_ptr + slot), window)
    edges = tl.load(edges_ptr + tl.arange(0, 8))

    blocks = tl.arange(0, N_BLOCKS_PO2)
    scores = scan_ptr + row * 2 * N_BLOCKS + blocks
    own = tl.max(tl.load(scores, mask=blocks < N_BLOCKS, other=0), axis=0)
    context = tl.max(tl.load(scores + N_BLOCKS, mask=blocks < N_BLOCKS, other=0), axis=0)
    own_length = (own // _HALF).to(tl.int32)
    context_length = (context // _HALF).to(tl.int32)
    own_at = (own % _HALF).to(tl.int32) + tl.load(request_ptr + _OWN_START)
    context_at = (context % _HALF).to(tl.int32) + window

    # Of each lane: where it stands (a leaf of a tree, a position in a text; -1 = nowhere, -2 = to be searched) and how
    # many tokens match there.
    at = tl.where(is_pool, -2, -1)
    at = tl.where((lane == 0) & (own_length > 0), own_at, at)
    at = tl.where((lane == _LANES - 1) & (context_length >= _LEAST), context_at, at)
    length = tl.where(lane == 0, own_length, tl.where(lane == _LANES - 1, context_length, 0))

    draft = tl.full([K_PO2], -1, tl.int32)
    chance = tl.full((), 1.0, tl.float32)
    n = 0
    while n < limit:
        searching = is_pool & (at == -2)
        if tl.max(searching.to(tl.int32), axis=0) > 0:
            # The end of context and draft, read backwards.
            newest = tl.sum(tl.where((n - 1 - back)[:, None] == steps[None, :], draft[None, :], 0), axis=1)
            place = size - 1 - (back - n)
            older = tl.load(context_ptr + place, mask=(back >= n) & (place >= 0), other=-1)
            ours = tl.where(back < n, newest, older)
            leaf, shared = _search(tokens_ptr, order_ptr, low_leaf, end_leaf, searching, ours)
            at = tl.where(searching, leaf, at)
            length = tl.where(searching, shared, length)

        # What each lane says comes next, and its hope.
        active = at >= 0
        tree = is_pool & active
        node = tl.load(leaf_ptr + at, mask=tree, other=0)
        alone = length > tl.load(depth_ptr + node, mask=tree, other=0)
        above = tl.load(above_ptr + node, mask=tree, other=0)
        climbs = tree & (alone == 0) & (tl.load(depth_ptr + above, mask=tree, other=0) >= length)
        while tl.max(climbs.to(tl.int32), axis=0) > 0:
            node = tl.where(climbs, above, node)
            above = tl.load(above_ptr + node, mask=climbs, other=0)
            climbs = climbs & (tl.load(depth_ptr + above, mask=climbs, other=0) >= length)
        by_leaf = tl.load(order_ptr + at, mask=tree & alone, other=0)
        by_node = tl.load(follower_ptr + node, mask=tree & (alone == 0), other=0)
        follower = tl.where(alone, by_leaf, by_node)
        leaf_hope = tl.load(leaf_chance_ptr + at, mask=tree & alone, other=0.0)
        node_hope = tl.load(node_chance_ptr + node, mask=tree & (alone == 0), other=0.0)
        text_hope = tl.load(followed_ptr + tl.minimum(tl.maximum(length, 1), 8) - 1)
        hope = tl.where(is_pool, tl.where(alone, leaf_hope, node_hope), text_hope)
        where = tl.where(is_pool, follower, at)
        in_context = lane == _LANES - 1
        says = tl.load(tokens_ptr + where, mask=active & (in_context == 0), other=-1)
        mine = tl.load(context_ptr + at, mask=active & in_context & (at < size), other=-1)
        drafted = tl.sum(tl.where((at - size)[:, None] == steps[None, :], draft[None, :], 0), axis=1)
        says = tl.where(in_context, tl.where(at < size, mine, drafted), says)

        expected, others, leads = _agreement(active, says, hope, length)

        # How often the row has written the token.
        times = tl.sum(tl.where((steps[None, :] < n) & (draft[None, :] == says[:, None]), 1, 0), axis=1)
        for start in range(written_from, size, _COUNTED):
            place = start + tl.arange(0, _COUNTED)
            text = tl.load(context_ptr + place, mask=place < size, other=-2)
            times += tl.sum((text[None, :] == says[:, None]).to(tl.int32), axis=1)

        bucket = tl.sum((expected[:, None] >= edges[None, :]).to(tl.int32), axis=1)
        cell = (bucket * _OTHERS + others) * _WRITTEN + tl.minimum(times, _WRITTEN - 1) + group * _CELLS
        factor = tl.load(factors_ptr + cell, mask=leads, other=0.0)
        hoped = tl.where(leads, tl.minimum(expected * factor, _SURE), 0.0)
        best = tl.max(hoped, axis=0)
        winner = tl.min(tl.where(leads & (hoped == best), lane, _LANES), axis=0)
        goes_on = (best > 0.0) & (chance * best >= FLOOR)
        chosen = lane == winner
        token = tl.sum(tl.where(chosen, says, 0), axis=0)
        if goes_on:
            chance *= best
            draft = tl.where(steps == n, token, draft)
            tl.store(confidence_ptr + row * K + n, best)
            tl.store(expected_ptr + slot * K + n, tl.sum(tl.where(chosen, expected, 0.0), axis=0))
            tl.store(cells_ptr + slot * K + n, tl.sum(tl.where(chosen, cell, 0), axis=0))
            n += 1
            follows = active & (says == token)
            after = tl.load(rank_ptr + follower + 1, mask=follows & is_pool, other=-1)
            border = tl.load(tokens_ptr + at + 1, mask=follows & (lane == 0), other=0) < 0
            further = tl.where(is_pool, tl.where(after >= 0, after, -2), tl.where(border, -1, at + 1))
            at = tl.where(follows, further, tl.where(is_pool, -2, -1))
            length = tl.where(follows, tl.minimum(length + 1, _DEPTH), length)
            limit = tl.where(tl.max((ends == token).to(tl.int32), axis=0) > 0, n, limit)
        else:
            limit = n

    inside = steps < K
    found = steps < n
    # V2 verifies K tokens per row. The rest are copies of the last token, as in vLLM's speculator: -1 would be read as
    # an input.
    last = tl.load(last_sampled_ptr + slot)
    tl.store(drafts_ptr + row * K + steps, tl.where(found, draft.to(tl.int64), last), mask=inside)
    tl.store(confidence_ptr + row * K + steps, 0.0, mask=inside & (found == 0))
    tl.store(count_ptr + slot, n)


@triton.jit(do_not_specialize=["n_rows"])
def learn_kernel(
    idx_mapping_ptr,  # *int64 [rows]
    num_sampled_ptr,  # *int32 [rows]
    num_rejected_ptr,  # *int32 [rows]
    cells_ptr,  # *int32 [slots, K]
    expected_ptr,  # *float32 [slots, K]
    count_ptr,  # *int32 [slots]
    tried_ptr,  # *float32 [cells] each, read and written
    accepted_ptr,
    hoped_ptr,
    prior_ptr,  # *float32 [cells]
    factors_ptr,  # *float32 [cells], written
    n_rows,
    n_cells,
    K: tl.constexpr,
    K_PO2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """AcceptanceRates.observe for the drafts of the last step: those up to the first rejected one of each row.

    A program per block of cells reads all rows, so the sums are the same on every rank.
    """
    cell = tl.program_id(0) * _LEARNED + tl.arange(0, _LEARNED)
    inside = cell < n_cells
    tried = tl.load(tried_ptr + cell, mask=inside, other=0.0)
    accepted = tl.load(accepted_ptr + cell, mask=inside, other=0.0)
    hoped = tl.load(hoped_ptr + cell, mask=inside, other=0.0)
    item = tl.arange(0, ROWS * K_PO2)
    step = item % K_PO2
    for first in range(0, n_rows, ROWS):
        row = first + item // K_PO2
        there = row < n_rows
        slot = tl.load(idx_mapping_ptr + row, mask=there, other=-1).to(tl.int64)
        there = there & (slot >= 0)
        passed = tl.maximum(tl.load(num_sampled_ptr + row, mask=there, other=0) - 1, 0)
        verified = passed + tl.load(num_rejected_ptr + row, mask=there, other=0)
        seen = tl.minimum(tl.minimum(passed + 1, verified), tl.load(count_ptr + slot, mask=there, other=0))
        observed = there & (step < seen)
        theirs = tl.load(cells_ptr + slot * K + step, mask=observed, other=-1)
        chance = tl.load(expected_ptr + slot * K + step, mask=observed, other=0.0)
        hit = cell[:, None] == theirs[None, :]
        tried += tl.sum(tl.where(hit, 1.0, 0.0), axis=1)
        accepted += tl.sum(tl.where(hit & (step < passed)[None, :], 1.0, 0.0), axis=1)
        hoped += tl.sum(tl.where(hit, chance[None, :], 0.0), axis=1)
    kept = tl.where(tried > _MEMORY, 0.5, 1.0)
    tried *= kept
    accepted *= kept
    hoped *= kept
    prior = tl.load(prior_ptr + cell, mask=inside, other=1.0)
    tl.store(tried_ptr + cell, tried, mask=inside)
    tl.store(accepted_ptr + cell, accepted, mask=inside)
    tl.store(hoped_ptr + cell, hoped, mask=inside)
    tl.store(factors_ptr + cell, (accepted + _PRIOR_WEIGHT * prior) / (hoped + _PRIOR_WEIGHT), mask=inside)


@triton.jit(do_not_specialize=["n_logits"])
def relax_kernel(
    logits_ptr,  # *float [n_logits, vocab]: where the relaxed rule accepts a draft, its logit is raised above all
    logits_stride,
    draft_sampled_ptr,  # *int [n_logits]: the token of each logit row's input; a draft is judged by the row before it
    slots_ptr,  # *int64 [n_logits]: the slot of each logit row
    local_pos_ptr,  # *int32 [n_logits]: 0, 1, ... within a row
    requests_ptr,  # *int32 [slots, FIELDS]
    rules_ptr,  # *float32 [slots, 2]: min_prob and margin
    temperature_ptr,  # *float32 [slots]
    count_ptr,  # *int32 [slots]: drafts that were found; what follows them is filling
    saved_ptr,  # *float32 [n_logits], written: the logit that was replaced
    raised_ptr,  # *int32 [n_logits], written: 1 where one was
    n_logits,
    vocab,
):
    """`relaxed_accept` for the drafts of greedy requests with a relaxed rule, apart from what strict verification
    accepts. End tokens are never relaxed."""
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + i).to(tl.int64)
    local = tl.load(local_pos_ptr + i)
    more = i + 1 < n_logits
    next_slot = tl.load(slots_ptr + i + 1, mask=more, other=-1)
    next_local = tl.load(local_pos_ptr + i + 1, mask=more, other=-1)
    judged = (slot >= 0) & more & (next_slot == slot) & (next_local == local + 1)
    token = tl.load(draft_sampled_ptr + i + 1, mask=judged, other=-1).to(tl.int64)
    request_ptr = requests_ptr + tl.maximum(slot, 0) * _FIELDS
    k = tl.load(request_ptr + _K)
    ends = tl.load(request_ptr + _ENDS + tl.arange(0, _N_ENDS))
    is_end = tl.max((ends == token).to(tl.int32), axis=0) > 0
    judged = judged & (token >= 0) & (k > 1) & (is_end == 0)
    judged = judged & (tl.load(temperature_ptr + tl.maximum(slot, 0)) == 0.0)
    judged = judged & (local < tl.load(count_ptr + tl.maximum(slot, 0)))
    raised = 0
    if judged:
        row_ptr = logits_ptr + i * logits_stride
        theirs = tl.load(row_ptr + token).to(tl.float32)
        top = tl.full((), float("-inf"), tl.float32)
        first = tl.full((), 0, tl.int64)  # of those with the highest logit
        total = tl.full((), 0.0, tl.float32)  # of exp(logit - top)
        better = tl.full((), 0, tl.int32)
        for start in range(0, vocab, _VOCAB):
            column = start + tl.arange(0, _VOCAB)
            logit = tl.load(row_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
            peak = tl.max(logit, axis=0)
            index = tl.min(tl.where(logit == peak, column, 2147483647), axis=0).to(tl.int64)
            first = tl.where(peak > top, index, first)
            higher = tl.maximum(peak, top)
            sums = tl.sum(tl.exp(logit - higher), axis=0)
            total = tl.where(higher > float("-inf"), total * tl.exp(top - higher) + sums, 0.0)
            top = higher
            better += tl.sum((logit > theirs).to(tl.int32), axis=0)
        rules = rules_ptr + slot * 2
        probability = tl.exp(theirs - top) / total
        likely = (better < k) & (probability > tl.load(rules)) & (1.0 / total - probability <= tl.load(rules + 1))
        if likely & (first != token):
            tl.store(saved_ptr + i, theirs)
            tl.store(row_ptr + token, _CHOSEN)
            raised = 1
    tl.store(raised_ptr + i, raised)


@triton.jit
def restore_kernel(
    logits_ptr,
    logits_stride,
    draft_sampled_ptr,
    cu_num_logits_ptr,  # *int32 [rows + 1]
    idx_mapping_ptr,  # *int64 [rows]
    num_sampled_ptr,  # *int32 [rows]
    saved_ptr,
    raised_ptr,
    totals_ptr,  # *int32 [slots, 3], the last added to
    K_PO2: tl.constexpr,
):
    """Puts the logits back, for logprobs, and counts the relaxed tokens among the accepted ones. A program per row."""
    row = tl.program_id(0)
    slot = tl.load(idx_mapping_ptr + row).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + row).to(tl.int64)
    n = tl.load(cu_num_logits_ptr + row + 1) - start - 1
    step = tl.arange(0, K_PO2)
    raised = tl.load(raised_ptr + start + step, mask=step < n, other=0)
    token = tl.load(draft_sampled_ptr + start + step + 1, mask=raised > 0, other=0).to(tl.int64)
    saved = tl.load(saved_ptr + start + step, mask=raised > 0, other=0.0)
    tl.store(logits_ptr + (start + step) * logits_stride + token, saved, mask=raised > 0)
    accepted = tl.load(num_sampled_ptr + row) - 1
    relaxed = tl.sum(tl.where(step < accepted, raised, 0), axis=0)
    if (slot >= 0) & (relaxed > 0):
        tl.store(totals_ptr + slot * 3 + 2, tl.load(totals_ptr + slot * 3 + 2) + relaxed)


# ----------------------------------------------------------------------------------------------------------- speculator


class RetrievalSpeculator(BaseSpeculator):
    """Drafts for V2's runner, from an index on the device. Drafts from a row's own context until `load`.

    enable_adaptive_verification, draft_token_confidence_probs: what the runner's adaptive verification reads.
    """

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        """vllm_config: with the settings of `engine_arguments` in its additional_config. req_states: the runner's."""
        settings = vllm_config.additional_config[options.SETTINGS_KEY]
        self.config = DecodingConfig.model_validate(settings["config"])
        self.limits = DraftLimits(**settings["limits"])
        self.device, self.req_states = device, req_states
        spec = vllm_config.speculative_config
        self.steps: int = spec.num_speculative_tokens
        self.enable_adaptive_verification: bool = spec.enable_adaptive_verification
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.vocabulary: int = vllm_config.model_config.get_vocab_size()
        eos = getattr(vllm_config.model_config.hf_text_config, "eos_token_id", None)
        self._eos: list[int] = [eos] if isinstance(eos, int) else list(eos or ())
        slots, k = vllm_config.scheduler_config.max_num_seqs, self.steps

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # By row of the batch.
        self._n_blocks = triton.cdiv(min(self.max_model_len, _WINDOW.value), _SCANNED.value)
        self._scan = zeros(slots, 2, self._n_blocks, dtype=torch.int64)
        self.drafts = zeros(slots, k, dtype=torch.int64)
        self.draft_token_confidence_probs = zeros(slots, k)
        # By slot, which a request keeps.
        self.requests = StagedWriteTensor((slots, _FIELDS.value), dtype=torch.int32, device=device)
        self.rules = StagedWriteTensor((slots, 2), dtype=torch.float32, device=device)
        self.cells = zeros(slots, k, dtype=torch.int32)
        self.expected = zeros(slots, k)
        self.count = zeros(slots, dtype=torch.int32)
        self.totals = zeros(slots, 3, dtype=torch.int32)
        self.relaxed_slots = np.zeros(slots, dtype=bool)
        # By cell of AcceptanceRates.
        prior = AcceptanceRates(2 * len(CLASSES)).factors
        self.prior = torch.from_numpy(prior.astype(np.float32)).to(device)
        self.factors = self.prior.clone()
        self.tried, self.accepted, self.hoped = (zeros(len(prior)) for _ in range(3))
        self._edges = torch.tensor([*EDGES, float("inf")], dtype=torch.float32, device=device)
        self._followed = torch.tensor(FOLLOWED, dtype=torch.float32, device=device)
        self.unknown_pools = 0
        self.index = DeviceIndex({}, device)

    def load(self, pools: Mapping[str, SealedPool]) -> None:
        """Replaces the index; requests that are under way keep to their own context. Raises DecodingError for a token
        that the model does not have."""
        for name, pool in pools.items():
            check_tokens(name, pool, self.vocabulary)
        self.requests.gpu[:, _OWN_START.value : _OWN_END.value + 1] = 0
        self.requests.gpu[:, _POOLS.value : _GROUPS.value] = -1
        self.index = DeviceIndex(pools, self.device)

    def add_request(self, slot: int, prompt_len: int, params: Any) -> None:
        """Sets up a slot for a request; `apply_staged_writes` brings it to the device."""
        extra: Mapping[str, Any] = (params.extra_args if params is not None else None) or {}
        names = extra.get(options.POOLS) or []
        named = [str(n) for n in (names if isinstance(names, list | tuple) else [names])][: MAX_POOLS - 1]
        known = [n for n in named if n in self.index.places]
        self.unknown_pools += len(named) - len(known)
        default = [DEFAULT_POOL] if DEFAULT_POOL in self.index.places and DEFAULT_POOL not in known else []
        document = extra.get(options.DOCUMENT)
        own = self.index.own_text(known, document) if isinstance(document, int) else (0, 0)
        most = params.max_tokens if params is not None and params.max_tokens else self.max_model_len
        rule = self._rule(extra)
        drafts = extra.get(options.MODE, self.config.mode) != "off"
        request = [*own, min(self.max_model_len, prompt_len + most), rule.k if rule else 1, int(drafts), 0, 0, 0]
        pools = [-1, *(self.index.places[name] for name in [*known, *default])]
        groups = [0, *[1] * len(known), *[2] * (MAX_POOLS - len(known)), 3]
        ends = [*self._eos, *((params.stop_token_ids or ()) if params is not None else ())][: _N_ENDS.value]
        request += pools + [-1] * (_LANES.value - len(pools))
        request += [group + (len(CLASSES) if rule else 0) for group in groups]
        request += ends + [-1] * (_N_ENDS.value - len(ends))
        self.requests.stage_write(slot, 0, request)
        self.rules.stage_write(slot, 0, list(rule_numbers(rule)[1:]))
        self.relaxed_slots[slot] = rule is not None
        self.count[slot].zero_()
        self.totals[slot].zero_()

    def apply_staged_writes(self) -> None:
        """Brings new requests to the device, without waiting for it."""
        self.requests.apply_write()
        self.rules.apply_write()

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Nothing to capture: drafts need no model."""

    def capture(self) -> None:
        """Nothing to capture: drafts need no model."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts for each row of the batch, int64 [rows, steps]; see BaseSpeculator.propose.

        Learns from the verdict on the last drafts first.
        """
        rows = input_batch.num_reqs
        if dummy_run or not rows:
            return self.drafts[:rows]
        slots, states, index = input_batch.idx_mapping, self.req_states, self.index
        contexts, lengths = states.all_token_ids.gpu, states.total_len.gpu
        k_po2 = triton.next_power_of_2(self.steps)
        self.learn(slots, num_sampled, num_rejected)
        scan_kernel[(rows, self._n_blocks)](
            contexts,
            contexts.stride(0),
            slots,
            lengths,
            num_sampled,
            self.requests.gpu,
            index.tokens,
            self._scan,
            N_BLOCKS=self._n_blocks,
        )
        draft_kernel[(rows,)](
            contexts,
            contexts.stride(0),
            slots,
            lengths,
            states.prompt_len.gpu,
            num_sampled,
            num_rejected,
            last_sampled.view(-1),
            self.requests.gpu,
            self._scan,
            *index.tensors,
            self.factors,
            self._edges,
            self._followed,
            self.drafts,
            self.draft_token_confidence_probs,
            self.cells,
            self.expected,
            self.count,
            self.totals,
            K=self.steps,
            K_PO2=k_po2,
            N_BLOCKS=self._n_blocks,
            N_BLOCKS_PO2=triton.next_power_of_2(self._n_blocks),
            num_warps=1,
        )
        return self.drafts[:rows]

    def learn(self, slots: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor) -> None:
        """Takes in the verdict on the last drafts of each row's slot."""
        learn_kernel[(triton.cdiv(len(self.factors), _LEARNED.value),)](
            slots,
            num_sampled,
            num_rejected,
            self.cells,
            self.expected,
            self.count,
            self.tried,
            self.accepted,
            self.hoped,
            self.prior,
            self.factors,
            len(slots),
            len(self.factors),
            K=self.steps,
            K_PO2=triton.next_power_of_2(self.steps),
            ROWS=max(1, 256 // triton.next_power_of_2(self.steps)),
        )

    def _rule(self, extra: Mapping[str, Any]) -> Relaxation | None:
        if extra.get(options.MODE, self.config.mode) != "relaxed":
            return None
        usual = self.config.relaxation
        k, min_prob = extra.get(options.K, usual.k), extra.get(options.MIN_PROB, usual.min_prob)
        try:
            return Relaxation(k=k, min_prob=min_prob, margin=extra.get(options.MARGIN))
        except ValueError:
            return None  # an invalid rule of one request is verified strictly, which is always correct


# --------------------------------------------------------------------------------------------------------- verification


class RelaxedSampler(RejectionSampler):
    """V2's rejection sampler with the relaxed rule: it raises the logit of a token that the rule accepts above all
    others, so that vLLM's kernel takes it for the likeliest, and then puts it back."""

    def __init__(self, sampler: Any, spec_config: Any, device: torch.device, speculator: RetrievalSpeculator) -> None:
        super().__init__(sampler, spec_config, device)
        self.speculator = speculator
        n = len(speculator.count) * (speculator.steps + 1)
        self._saved = torch.zeros(n, dtype=torch.float32, device=device)
        self._raised = torch.zeros(n, dtype=torch.int32, device=device)

    def _verify(self, logits: torch.Tensor, *step: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See RejectionSampler._verify, of which this is a copy with two kernels more."""
        _, draft_sampled, pos, cu_num_logits, slots, slots_np, expanded_slots, local_pos, lengths_np, verified = step
        if not self.speculator.relaxed_slots[slots_np].any():
            return super()._verify(logits, *step)
        states = self.sampler.sampling_states
        processed = self.sampler.apply_sampling_params(
            logits, expanded_slots, slots, slots_np, pos, draft_sampled, local_pos, lengths_np
        )
        self.prefer_relaxed(processed, verified, expanded_slots, local_pos, states.temperature.gpu)
        sampled, num_sampled = rejection_sample(
            processed,
            None,  # drafts are one-hot
            verified,
            cu_num_logits,
            pos,
            slots,
            expanded_slots,
            local_pos,
            states.temperature.gpu,
            states.seeds.gpu,
            self.num_speculative_steps,
            self.synthetic_conditional_rates,
            use_fp64=self.sampler.use_fp64_gumbel,
            use_block_verification=self.use_block_verification,
        )
        self.restore(processed, verified, cu_num_logits, slots, num_sampled)
        return processed, sampled, num_sampled

    def prefer_relaxed(self, logits: Any, draft: Any, slots: Any, local_pos: Any, temperature: Any) -> None:
        """Raises the logits of tokens that only the relaxed rule accepts. See `relax_kernel`."""
        made, raised = self.speculator, (self._saved, self._raised)
        requests = (made.requests.gpu, made.rules.gpu, temperature, made.count)
        n, vocab = logits.shape
        relax_kernel[(n,)](logits, logits.stride(0), draft, slots, local_pos, *requests, *raised, n, vocab)

    def restore(self, logits: Any, draft: Any, cu_num_logits: Any, slots: Any, num_sampled: Any) -> None:
        """Undoes `prefer_relaxed`. See `restore_kernel`."""
        raised, width = (self._saved, self._raised), triton.next_power_of_2(self.speculator.steps + 1)
        step = (draft, cu_num_logits, slots, num_sampled)
        restore_kernel[(len(slots),)](logits, logits.stride(0), *step, *raised, self.speculator.totals, K_PO2=width)


# --------------------------------------------------------------------------------------------------------------- worker

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class RetrievalRunnerV2(_Base):
    """Mixed into a vLLM worker class whose runner is V2's; its "calls" arrive by `collective_rpc`."""

    def init_device(self) -> None:
        """Builds the runner like vLLM, then puts our speculator in place of its n-gram one. Raises VllmError for
        another version of vLLM or a setting that cannot work."""
        installed = vllm.__version__.split("+")[0]
        if installed != options.VLLM_VERSION:
            raise VllmError(f"the retrieval decoder needs vLLM {options.VLLM_VERSION}, but {installed} is installed")
        super().init_device()
        runner: Any = self.model_runner
        parallel = self.parallel_config
        if (
            not self.use_v2_model_runner
            or parallel.pipeline_parallel_size > 1
            or parallel.enable_batch_sharded_sampling
        ):
            raise VllmError(
                "this worker needs model runner V2, without pipeline parallelism or batch-sharded sampling. "
                "Unset VLLM_USE_V2_MODEL_RUNNER and these two."
            )
        self.speculator = RetrievalSpeculator(self.vllm_config, runner.device, runner.req_states)
        runner.speculator = self.speculator
        self._finished: OrderedDict[str, tuple[str, torch.Tensor]] = OrderedDict()  # by the caller's id
        add, remove = runner.add_requests, runner._remove_request

        def add_requests(scheduler_output: Any) -> None:
            add(scheduler_output)
            self._add_requests(scheduler_output.scheduled_new_reqs)

        def remove_request(req_id: str) -> Any:
            self._keep_counts(req_id)
            return remove(req_id)

        runner.add_requests, runner._remove_request = add_requests, remove_request

    def load_model(self, **settings: Any) -> None:
        """Loads like vLLM, then the texts to draft from and the relaxed rule."""
        super().load_model(**settings)
        runner: Any = self.model_runner
        runner.rejection_sampler = RelaxedSampler(
            runner.sampler, runner.speculative_config, runner.device, self.speculator
        )
        texts = self.vllm_config.additional_config[options.SETTINGS_KEY]["texts"]
        if texts is not None:
            from vllm.tokenizers import cached_tokenizer_from_config

            tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
            self.speculator.load(build_pools(read_texts(texts), tokenizer))

    def owlrec_open_pools(self, pools: dict[str, list[bytes]]) -> None:
        """A call: gives requests to come that name them pools. pools: SealedPool.to_bytes, by name. One with tokens
        that the model does not have is left out."""
        opened = {name: SealedPool.from_bytes(arrays) for name, arrays in pools.items()}
        kept = {name: pool for name, pool in self.speculator.index.pools.items() if name not in opened}
        self.speculator.load(kept | usable_pools(opened, self.speculator.vocabulary))

    def owlrec_close_pools(self, names: list[str]) -> None:
        """A call: drops pools that no request names any more."""
        self.speculator.load({n: pool for n, pool in self.speculator.index.pools.items() if n not in names})

    def owlrec_request_counts(self, ids: Sequence[str]) -> dict[str, tuple[int, int, int]]:
        """A call: tokens drafted, accepted, and accepted only by the relaxed rule, by the caller's ids.

        Waits for the device. Of finished requests, only the last few thousand are kept.
        """
        for req_id in self.model_runner.req_states.req_id_to_index:  # vLLM removes a request in the step after its last
            if _given_id(req_id) in ids:
                self._keep_counts(req_id)
        none = ("", torch.zeros(3, dtype=torch.int32))
        counts = {i: self._finished.get(i, none)[1].tolist() for i in ids}
        return {i: (drafted, accepted, relaxed) for i, (drafted, accepted, relaxed) in counts.items()}

    def _add_requests(self, new: Sequence[Any]) -> None:
        slots = self.model_runner.req_states.req_id_to_index
        for request in new:
            self.speculator.add_request(slots[request.req_id], request.prompt_len, request.sampling_params)
        if new:
            self.speculator.apply_staged_writes()

    def _keep_counts(self, req_id: str) -> None:
        slot = self.model_runner.req_states.req_id_to_index.get(req_id)
        if slot is None:
            return
        given, totals = _given_id(req_id), self.speculator.totals[slot]
        counts = totals.clone()
        totals.zero_()
        if given in self._finished and self._finished[given][0] == req_id:
            counts += self._finished[given][1]  # it was asked for before, or preempted
        self._finished[given] = (req_id, counts)
        while len(self._finished) > _KEPT_COUNTS:
            self._finished.popitem(last=False)


def _given_id(request_id: str) -> str:
    """The caller's id: vLLM appends a dash and eight random characters (v1/engine/input_processor.py:354)."""
    return request_id.rsplit("-", 1)[0]


class RetrievalV2Worker(RetrievalRunnerV2, Worker):
    """vLLM's GPU worker with the decoder on runner V2. `engine_arguments` refers to it."""
