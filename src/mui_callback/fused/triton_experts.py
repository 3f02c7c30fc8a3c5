"""The source of the kernels around the matrix products of experts; imported where Triton is there."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
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


@triton.jit(do_not_specialize=["n_local"])  # type: ignore[untyped-decorator]
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


@triton.jit(do_not_specialize=["n_rows", "n_local", "first"])  # type: ignore[untyped-decorator]
def pairs(
    order: tl.tensor,
    n_scored: tl.tensor,
    number: tl.tensor,
    expert: tl.tensor,
    weight: tl.tensor,
    from_P: tl.tensor,
    expert_P: tl.tensor,
    weight_P: tl.tensor,
    row_P: tl.tensor,
    rank_P: tl.tensor,
    is_row_P: tl.tensor,
    n_rows: tl.tensor,
    n_local: tl.tensor,
    first: tl.tensor,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is BLOCK rows, of which those of scored tokens are written, in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < n_rows
    pair = tl.load(order + row, mask=is_row, other=0)
    token = pair // TOP_K
    k = pair % TOP_K
    scored = tl.load(number + token, mask=is_row, other=-1)
    is_there = scored >= 0
    own = tl.load(expert + pair, mask=is_there, other=0)
    rank = tl.zeros((BLOCK,), dtype=tl.int64)
    for other in tl.static_range(TOP_K):
        expert_of_other = tl.load(expert + token * TOP_K + other, mask=is_there, other=0)
        comes_before = (expert_of_other < own) | ((expert_of_other == own) & (other < k))
        rank += comes_before.to(tl.int64)
    place = tl.load(n_scored + row, mask=is_there, other=1) - 1
    tl.store(from_P + place, scored - first, mask=is_there)
    tl.store(expert_P + place, tl.minimum(own, n_local - 1), mask=is_there)
    tl.store(weight_P + place, tl.load(weight + pair, mask=is_there, other=0.0).to(tl.float32), mask=is_there)
    tl.store(row_P + place, row, mask=is_there)
    tl.store(rank_P + place, rank, mask=is_there)
    tl.store(is_row_P + place, own < n_local, mask=is_there)
