"""The source of the kernels; imported where Triton is there."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _products(a: Any, p: Any, weight: Any) -> Any:
    return a.to(tl.float32) * p.to(tl.float32) * weight


@triton.jit  # type: ignore[untyped-decorator]
def summarize(
    act: Any,
    projected: Any,
    weight: Any,
    is_row: Any,
    mass: Any,
    highest: Any,
    n_bad: Any,
    width: Any,
    n_chunks: Any,
    act_stride: Any,
    projected_stride: Any,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is one row, BLOCK chunks of it at a time."""
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight + row)
    counts = True
    if HAS_ROWS:
        counts = tl.load(is_row + row)
    total = 0.0
    bad: Any = 0
    for first in range(0, n_chunks, BLOCK):
        chunks = first + tl.arange(0, BLOCK)
        columns = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        is_there = (columns < width) & counts
        a = tl.load(act + row * act_stride + columns, mask=is_there, other=0.0)
        p = tl.load(projected + row * projected_stride + columns, mask=is_there, other=0.0)
        f = _products(a, p, factor)
        is_finite = tl.abs(f) < float("inf")  # not for NaN either
        is_entry = is_finite & is_there
        total += tl.sum(tl.sum(tl.where(is_entry, tl.abs(f), 0.0), axis=1), axis=0)
        bad += tl.sum(tl.sum((is_there & ~is_finite).to(tl.int32), axis=1), axis=0)
        best = tl.max(tl.where(is_entry, f, float("-inf")), axis=1)
        tl.store(highest + row * n_chunks + chunks, best, mask=chunks < n_chunks)
    tl.store(mass + row, total)
    if bad > 0:
        tl.atomic_add(n_bad, bad.to(tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def of_chunks(
    act: Any,
    projected: Any,
    weight: Any,
    is_row: Any,
    rows: Any,
    chunks: Any,
    score: Any,
    width: Any,
    act_stride: Any,
    projected_stride: Any,
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
    is_there = columns < width
    if HAS_ROWS:
        is_there = is_there & tl.load(is_row + row)
    a = tl.load(act + row * act_stride + columns, mask=is_there, other=0.0)
    p = tl.load(projected + row * projected_stride + columns, mask=is_there, other=0.0)
    f = _products(a, p, factor)
    is_entry = is_there & (tl.abs(f) < float("inf"))
    tl.store(score + number * CHUNK + offsets, tl.where(is_entry, f, float("-inf")))


def try_out(one: Tensor) -> None:
    """Run both on one neuron; raises whatever does not work."""
    summarize[(1,)](one, one, None, None, one.clone(), one.clone(), one.long(), 1, 1, 1, 1, False, False, 64, 1)
    of_chunks[(1,)](one, one, None, None, one.long() * 0, one.long() * 0, one.new_zeros(64), 1, 1, 1, False, False, 64)
