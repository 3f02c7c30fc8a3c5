"""The source of the kernels; imported where Triton is there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _products(a: tl.tensor, p: tl.tensor, weight: tl.tensor) -> tl.tensor:
    return a.to(tl.float32) * p.to(tl.float32) * weight


@triton.jit  # type: ignore[untyped-decorator]
def summarize(
    act: tl.tensor,
    projected: tl.tensor,
    weight: tl.tensor,
    is_row: tl.tensor,
    mass: tl.tensor,
    highest: tl.tensor,
    n_bad: tl.tensor,
    width: tl.tensor,
    n_chunks: tl.tensor,
    act_stride: tl.tensor,
    projected_stride: tl.tensor,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    IS_SIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is one row, BLOCK chunks of it at a time. IS_SIGNED: Σ f in place of Σ|f|."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight + row)
    n_counted = width
    if HAS_ROWS:
        n_counted = tl.where(tl.load(is_row + row) != 0, width, 0)
    total = 0.0
    bad = 0
    for first in range(0, n_chunks, BLOCK):
        chunks = first + tl.arange(0, BLOCK)
        columns = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        is_there = columns < n_counted
        a = tl.load(act + row * act_stride + columns, mask=is_there, other=0.0)
        p = tl.load(projected + row * projected_stride + columns, mask=is_there, other=0.0)
        f = _products(a, p, factor)
        is_finite = tl.abs(f) < float("inf")  # not for NaN either
        is_entry = is_finite & is_there
        size = f if IS_SIGNED else tl.abs(f)
        total += tl.sum(tl.sum(tl.where(is_entry, size, 0.0), axis=1), axis=0)
        bad += tl.sum(tl.sum((is_there & ~is_finite).to(tl.int32), axis=1), axis=0)
        best = tl.max(tl.where(is_entry, f, float("-inf")), axis=1)
        tl.store(highest + row * n_chunks + chunks, best, mask=chunks < n_chunks)
    tl.store(mass + row, total)
    if bad > 0:
        tl.atomic_add(n_bad, bad)


@triton.jit  # type: ignore[untyped-decorator]
def of_chunks(
    act: tl.tensor,
    projected: tl.tensor,
    weight: tl.tensor,
    is_row: tl.tensor,
    rows: tl.tensor,
    chunks: tl.tensor,
    score: tl.tensor,
    width: tl.tensor,
    act_stride: tl.tensor,
    projected_stride: tl.tensor,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program is one chunk."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number)
    offsets = tl.arange(0, CHUNK)
    columns = tl.load(chunks + number) * CHUNK + offsets
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight + row)
    n_counted = width
    if HAS_ROWS:
        n_counted = tl.where(tl.load(is_row + row) != 0, width, 0)
    is_there = columns < n_counted
    a = tl.load(act + row * act_stride + columns, mask=is_there, other=0.0)
    p = tl.load(projected + row * projected_stride + columns, mask=is_there, other=0.0)
    f = _products(a, p, factor)
    is_entry = is_there & (tl.abs(f) < float("inf"))
    tl.store(score + number * CHUNK + offsets, tl.where(is_entry, f, float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def order_keys(
    score: tl.tensor, key: tl.tensor, n_scores: tl.tensor, n_columns: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """The bits of each score in an order-preserving form above, the complement of its column below."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = place < n_scores
    bits = (tl.load(score + place, mask=is_there, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    column = (place % n_columns).to(tl.int64)
    tl.store(key + place, (ascending << 32) | (0xFFFFFFFF - column), mask=is_there)


@triton.jit  # type: ignore[untyped-decorator]
def predictions(
    logits: tl.tensor,
    targets: tl.tensor,
    loss: tl.tensor,
    is_correct: tl.tensor,
    n_logits: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program is one row, BLOCK logits of it at a time."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    highest = float("-inf")
    best = 0
    total = 0.0  # Σ exp(logit - highest)
    for first in range(0, n_logits, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + columns, mask=columns < n_logits, other=float("-inf")).to(tl.float32)
        highest_here, best_here = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(highest_here > highest, first + best_here, best)
        above = tl.maximum(highest, highest_here)
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift), axis=0)
        highest = above
    of_target = tl.load(logits + row * stride + target).to(tl.float32)
    tl.store(loss + row, highest + tl.log(total) - of_target)
    tl.store(is_correct + row, best == target)


def try_out(one: Tensor) -> None:
    """Run each on one neuron; raises whatever does not work."""
    order_keys[(1,)](one, one.long(), 1, 1, 1024)
    summarize[(1,)](one, one, None, None, one.clone(), one.clone(), one.int(), 1, 1, 1, 1, False, False, False, 64, 1)
    predictions[(1,)](one, one.long() * 0, one.clone(), one.bool(), 1, 1, 1024)
    of_chunks[(1,)](one, one, None, None, one.long() * 0, one.long() * 0, one.new_zeros(64), 1, 1, 1, False, False, 64)
