"""The source of the kernels around the matrix products of experts; imported where Triton is there.

Shapes: S pairs of a token and an expert, P those of scored tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mui_callback.fused.launching import kernel

_AT_ONCE = tl.constexpr(2048)
"""Pairs that are counted at a time."""


@kernel()
def gated(
    up: tl.tensor,
    bias: tl.tensor,
    expert: tl.tensor,
    act: tl.tensor,
    width: tl.tensor,
    up_stride: tl.tensor,
    alpha: tl.tensor,
    limit: tl.tensor,
    HAS_BIAS: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is BLOCK neurons of one row.

    IS_INTERLEAVED: the gate and the up factor of a neuron are next to each other, and become those of GPT-OSS.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < width
    if IS_INTERLEAVED:
        of_gate = 2 * columns
        of_factor = 2 * columns + 1
    else:
        of_gate = columns
        of_factor = width + columns
    gate = tl.load(up + row * up_stride + of_gate, mask=is_there, other=0.0)
    factor = tl.load(up + row * up_stride + of_factor, mask=is_there, other=0.0)
    kind = gate.dtype
    if HAS_BIAS:
        first = tl.load(expert + row).to(tl.int64) * 2 * width  # ids may have 8 bits
        gate = (gate + tl.load(bias + first + of_gate, mask=is_there, other=0.0)).to(kind)
        factor = (factor + tl.load(bias + first + of_factor, mask=is_there, other=0.0)).to(kind)
    gate = gate.to(tl.float32)
    factor = factor.to(tl.float32)
    if IS_INTERLEAVED:  # compared and not clamped, so that NaN stays NaN
        gate = tl.where(gate > limit, limit, gate)
        factor = tl.where(factor > limit, limit, tl.where(factor < -limit, -limit, factor))
        product = (factor + 1.0) * (gate / (1.0 + tl.exp(-alpha * gate)))
    else:
        product = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * factor
    tl.store(act + row * width + columns, product.to(kind), mask=is_there)


@kernel(do_not_specialize=["n_local"])
def combined(
    raw: tl.tensor,
    bias: tl.tensor,
    row: tl.tensor,
    expert: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    n_local: tl.tensor,
    HAS_BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is BLOCK channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        number = tl.load(expert + pair)
        factor = tl.load(weight + pair).to(tl.float32)
        value = tl.load(raw + tl.load(row + pair) * width + columns, mask=is_there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            first = tl.minimum(number, n_local - 1).to(tl.int64) * width
            value += tl.load(bias + first + columns, mask=is_there, other=0.0).to(tl.float32)
        total += tl.where(number < n_local, factor, 0.0) * value
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _local(expert: tl.tensor, n_local: tl.tensor) -> tl.tensor:
    """Numbers of experts of this process, int32; the last one for none, and no number is beyond."""
    return tl.maximum(tl.minimum(expert, n_local - 1), 0).to(tl.int32)


@kernel(do_not_specialize=["n_pairs", "n_local"])
def count(
    expert: tl.tensor,
    number: tl.tensor,
    counts: tl.tensor,
    n_pairs: tl.tensor,
    n_local: tl.tensor,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program counts the experts of BLOCK pairs, and those of the pairs of scored tokens apart."""
    block = tl.program_id(0).to(tl.int64)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    is_pair = pair < n_pairs
    own = _local(tl.load(expert + pair, mask=is_pair, other=0), n_local)
    own_counts = counts + block * BINS + tl.arange(0, BINS)
    tl.store(own_counts, tl.histogram(own, BINS, mask=is_pair))
    is_scored = tl.load(number + pair // TOP_K, mask=is_pair, other=-1) >= 0
    tl.store(own_counts + (tl.num_programs(0) + 1) * BINS, tl.histogram(own, BINS, mask=is_scored))


@kernel(do_not_specialize=["n_blocks"])
def accumulate(
    counts: tl.tensor, n_blocks: tl.tensor, BINS: tl.constexpr, BINS_HERE: tl.constexpr, TILE: tl.constexpr
) -> None:
    """One program turns what `count` found of some experts into what was found before each program, and in all behind
    these."""
    own = counts + tl.program_id(0) * (n_blocks + 1) * BINS + tl.program_id(1) * BINS_HERE
    before = tl.zeros((BINS_HERE,), dtype=tl.int32)
    for first in range(0, n_blocks, TILE):
        blocks = first + tl.arange(0, TILE)
        places = blocks[:, None] * BINS + tl.arange(0, BINS_HERE)[None, :]
        found = tl.load(own + places, mask=blocks[:, None] < n_blocks, other=0)
        up_to = before[None, :] + tl.cumsum(found, axis=0)
        tl.store(own + places, up_to - found, mask=blocks[:, None] < n_blocks)
        before += tl.sum(found, axis=0)
    tl.store(own + n_blocks * BINS + tl.arange(0, BINS_HERE), before)


@triton.jit  # type: ignore[untyped-decorator]
def _accumulated(counts: tl.tensor, BINS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """How many pairs each expert has, and how many of these come before those of this program."""
    block, n_blocks, bins = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, BINS)
    return tl.load(counts + n_blocks * BINS + bins), tl.load(counts + block * BINS + bins)


@triton.jit  # type: ignore[untyped-decorator]
def _counted(
    expert: tl.tensor,
    number: tl.tensor,
    n_pairs: tl.tensor,
    n_local: tl.tensor,
    ONLY_SCORED: tl.constexpr,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The same, counted by this program, which looks at all pairs."""
    total = tl.zeros((BINS,), dtype=tl.int32)
    before = tl.zeros((BINS,), dtype=tl.int32)
    for first in range(0, n_pairs, _AT_ONCE):
        pair = first + tl.arange(0, _AT_ONCE)
        counts = pair < n_pairs
        own = _local(tl.load(expert + pair, mask=counts, other=0), n_local)
        if ONLY_SCORED:
            counts = tl.load(number + pair // TOP_K, mask=counts, other=-1) >= 0
        total += tl.histogram(own, BINS, mask=counts)
        before += tl.histogram(own, BINS, mask=counts & (pair < tl.program_id(0) * BLOCK))
    return total, before


@triton.jit  # type: ignore[untyped-decorator]
def _store_starts(
    total: tl.tensor, before: tl.tensor, starts: tl.tensor, ends: tl.tensor, n_local: tl.tensor, BINS: tl.constexpr
) -> None:
    """Where the rows of each expert begin that this program finds; the last one also says where all rows of it end."""
    block, bins = tl.program_id(0).to(tl.int64), tl.arange(0, BINS)
    end = tl.cumsum(total, axis=0)
    tl.store(starts + block * BINS + bins, end - total + before)
    if block == tl.num_programs(0) - 1:
        tl.store(ends + bins, end, mask=bins < n_local)


@kernel(do_not_specialize=["n_pairs", "n_local", "first"])
def sort(
    expert: tl.tensor,
    weight: tl.tensor,
    number: tl.tensor,
    counts: tl.tensor,
    starts: tl.tensor,
    ends: tl.tensor,
    order: tl.tensor,
    from_S: tl.tensor,
    expert_S: tl.tensor,
    row: tl.tensor,
    from_P: tl.tensor,
    expert_P: tl.tensor,
    weight_P: tl.tensor,
    row_P: tl.tensor,
    rank_P: tl.tensor,
    is_row_P: tl.tensor,
    n_pairs: tl.tensor,
    n_local: tl.tensor,
    first: tl.tensor,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    ARE_COUNTED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program finds the rows of BLOCK pairs, and where those of scored tokens are among their own. ARE_COUNTED:
    after `count` and `accumulate`."""
    block, n_blocks = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    starts_of_scored = starts + n_blocks * BINS
    if ARE_COUNTED:
        total, before = _accumulated(counts, BINS)
    else:
        total, before = _counted(expert, number, n_pairs, n_local, False, TOP_K, BINS, BLOCK)
    _store_starts(total, before, starts, ends, n_local, BINS)
    if ARE_COUNTED:
        total, before = _accumulated(counts + (n_blocks + 1) * BINS, BINS)
    else:
        total, before = _counted(expert, number, n_pairs, n_local, True, TOP_K, BINS, BLOCK)
    _store_starts(total, before, starts_of_scored, ends + n_local, n_local, BINS)
    tl.debug_barrier()  # what is stored above is read below
    offsets = tl.arange(0, BLOCK)
    pair = block * BLOCK + offsets
    is_pair = pair < n_pairs
    token = pair // TOP_K
    chosen = tl.load(expert + pair, mask=is_pair, other=0)
    own = _local(chosen, n_local)
    scored = tl.load(number + token, mask=is_pair, other=-1)
    n_before = tl.zeros((BLOCK,), dtype=tl.int32)
    n_scored_before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, BLOCK, TILE):
        others = start + tl.arange(0, TILE)
        other = block * BLOCK + others
        of_other = _local(tl.load(expert + other, mask=other < n_pairs, other=0), n_local)
        comes_before = (of_other[None, :] == own[:, None]) & (others[None, :] < offsets[:, None])
        n_before += tl.sum(comes_before.to(tl.int32), axis=1)
        is_scored = tl.load(number + other // TOP_K, mask=other < n_pairs, other=-1) >= 0
        n_scored_before += tl.sum((comes_before & is_scored[None, :]).to(tl.int32), axis=1)
    at = (tl.load(starts + block * BINS + own, mask=is_pair, other=0) + n_before).to(tl.int64)
    tl.store(order + at, pair, mask=is_pair)
    tl.store(from_S + at, token, mask=is_pair)
    tl.store(expert_S + at, own.to(tl.int64), mask=is_pair)
    tl.store(row + pair, at, mask=is_pair)
    is_there = scored >= 0
    rank = tl.zeros((BLOCK,), dtype=tl.int64)
    for k in tl.static_range(TOP_K):
        of_other = tl.load(expert + token * TOP_K + k, mask=is_there, other=0)
        rank += ((of_other < chosen) | ((of_other == chosen) & (k < pair % TOP_K))).to(tl.int64)
    place = tl.load(starts_of_scored + block * BINS + own, mask=is_there, other=0) + n_scored_before
    tl.store(from_P + place, scored - first, mask=is_there)
    tl.store(expert_P + place, own.to(tl.int64), mask=is_there)
    tl.store(row_P + place, at, mask=is_there)
    tl.store(rank_P + place, rank, mask=is_there)
    tl.store(weight_P + place, tl.load(weight + pair, mask=is_there, other=0.0).to(tl.float32), mask=is_there)
    tl.store(is_row_P + place, chosen < n_local, mask=is_there)
