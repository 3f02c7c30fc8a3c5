"""The source of the kernels; imported where Triton is there.

Numbers that differ from batch to batch are not specialized: a kernel would be compiled anew in the middle of a pass.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mui_callback.fused.launching import kernel


@triton.jit  # type: ignore[untyped-decorator]
def _products(a: tl.tensor, p: tl.tensor, weight: tl.tensor) -> tl.tensor:
    return a.to(tl.float32) * p.to(tl.float32) * weight


@triton.jit  # type: ignore[untyped-decorator]
def _row(
    row: tl.tensor,
    act_row: tl.tensor,
    weight: tl.tensor,
    is_row: tl.tensor,
    width: tl.tensor,
    HAS_ACT_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Where the activations of a row are, its weight, and how many of its neurons count."""
    of_act = row
    if HAS_ACT_ROW:
        of_act = tl.load(act_row + row)
    factor = 1.0
    if HAS_WEIGHT:
        factor = tl.load(weight + row)
    n_counted = width
    if HAS_ROWS:
        n_counted = tl.where(tl.load(is_row + row) != 0, width, 0)
    return of_act, factor, n_counted


_ACT, _ACT_ROW, _PROJECTED, _WEIGHT, _IS_ROW, _TOKEN, _EXPERT, _RANK, _N_ROWS, _FIRST_ROW = map(tl.constexpr, range(10))
"""Fields of a row of a table, see `mui_callback.fused.scores.kinds_of`: where tensors are, and two numbers."""
_FIELDS = tl.constexpr(10)


@triton.jit  # type: ignore[untyped-decorator]
def _at(table: tl.tensor, field: tl.constexpr, element: tl.constexpr, IS_ALIGNED: tl.constexpr) -> tl.tensor:
    """A pointer of a table."""
    pointer = tl.load(table + field).to(tl.pointer_type(element))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit  # type: ignore[untyped-decorator]
def _row_of(
    table: tl.tensor,
    row: tl.tensor,
    width: tl.tensor,
    HAS_ACT_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The same of a row of a layer's table."""
    act_row, weight = _at(table, _ACT_ROW, tl.int64, False), _at(table, _WEIGHT, tl.float32, False)
    is_row = _at(table, _IS_ROW, tl.int8, False)
    of_act, factor, n_counted = _row(row, act_row, weight, is_row, width, HAS_ACT_ROW, HAS_WEIGHT, HAS_ROWS)
    return of_act, factor, n_counted


@kernel(
    do_not_specialize=["n_chunks", "n_ranks", "n_experts", "n_layers", "slots_of_layer", "first_rank"],
)
def scan(
    table: tl.tensor,
    place: tl.tensor,
    highest: tl.tensor,
    row_of_slot: tl.tensor,
    use: tl.tensor,
    n_bad: tl.tensor,
    width: tl.tensor,
    n_chunks: tl.tensor,
    n_ranks: tl.tensor,
    n_experts: tl.tensor,
    n_layers: tl.tensor,
    slots_of_layer: tl.tensor,
    first_rank: tl.tensor,
    act_stride: tl.tensor,
    projected_stride: tl.tensor,
    ACT: tl.constexpr,
    PROJECTED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    HAS_ACT_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is one row of one layer, BLOCK chunks of it at a time."""
    row, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    table += layer * _FIELDS
    if row < tl.load(table + _N_ROWS):
        of_act, factor, n_counted = _row_of(table, row, width, HAS_ACT_ROW, HAS_WEIGHT, HAS_ROWS)
        act = _at(table, _ACT, ACT, IS_ALIGNED) + of_act * act_stride
        projected = _at(table, _PROJECTED, PROJECTED, IS_ALIGNED) + row * projected_stride
        number = tl.where(n_counted > 0, tl.load(_at(table, _EXPERT, tl.int64, False) + row), n_experts)
        of_token = tl.load(_at(table, _TOKEN, tl.int64, False) + row)
        rank = first_rank + tl.load(_at(table, _RANK, tl.int64, False) + row)
        slot = layer * slots_of_layer + tl.load(place + of_token) * n_ranks + rank
        tl.store(row_of_slot + slot, tl.load(table + _FIRST_ROW) + row)
        first_of_slot = highest + slot * (n_chunks + 1)
        total = 0.0
        highest_of_row = float("-inf")
        bad = tl.zeros((), dtype=tl.int64)
        for first in range(0, width, BLOCK * CHUNK):
            chunks = first // CHUNK + tl.arange(0, BLOCK)
            columns = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            is_there = columns < n_counted
            a = tl.load(act + columns, mask=is_there, other=0.0)
            p = tl.load(projected + columns, mask=is_there, other=0.0)
            f = _products(a, p, factor)
            is_finite = tl.abs(f) < float("inf")  # not for NaN either
            is_entry = is_finite & is_there
            bad += tl.sum(tl.sum((is_there & (is_finite == 0)).to(tl.int32), axis=1), axis=0)
            total += tl.sum(tl.sum(tl.where(is_entry, tl.abs(f), 0.0), axis=1), axis=0)
            best = tl.max(tl.where(is_entry, f, float("-inf")), axis=1)
            tl.store(first_of_slot + 1 + chunks, best, mask=chunks * CHUNK < width)
            highest_of_row = tl.maximum(highest_of_row, tl.max(best, axis=0))
        tl.store(first_of_slot, highest_of_row)
        of_use = ((of_token * n_layers + layer) * (n_experts + 1) + number) * 2
        tl.store(use + of_use, total)
        tl.store(use + of_use + 1, 1.0)
        if bad > 0:
            tl.atomic_add(n_bad, bad)


@kernel()
def sums(
    act: tl.tensor,
    act_row: tl.tensor,
    projected: tl.tensor,
    weight: tl.tensor,
    is_row: tl.tensor,
    sum_of_row: tl.tensor,
    width: tl.tensor,
    act_stride: tl.tensor,
    projected_stride: tl.tensor,
    HAS_ACT_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program is one row."""
    row = tl.program_id(0).to(tl.int64)
    of_act, factor, n_counted = _row(row, act_row, weight, is_row, width, HAS_ACT_ROW, HAS_WEIGHT, HAS_ROWS)
    total = 0.0
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        is_there = columns < n_counted
        a = tl.load(act + of_act * act_stride + columns, mask=is_there, other=0.0)
        p = tl.load(projected + row * projected_stride + columns, mask=is_there, other=0.0)
        f = _products(a, p, factor)
        total += tl.sum(tl.where(tl.abs(f) < float("inf"), f, 0.0), axis=0)
    tl.store(sum_of_row + row, total)


@triton.jit  # type: ignore[untyped-decorator]
def _ordered(score: tl.tensor) -> tl.tensor:
    """Numbers of 32 bits in the order of the scores; both zeros are equal."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit  # type: ignore[untyped-decorator]
def _scores(
    of_sample: tl.tensor,
    slots: tl.tensor,
    columns: tl.tensor,
    n_columns: tl.tensor,
    n_chunks: tl.tensor,
    OF_CHUNKS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The highest score of each slot; or, OF_CHUNKS, of each chunk of the slots that are listed; and their numbers."""
    is_there = columns < n_columns
    if OF_CHUNKS:
        slot = tl.load(slots + columns // n_chunks, mask=is_there, other=0)
        chunk = columns % n_chunks
        score = tl.load(of_sample + slot * (n_chunks + 1) + 1 + chunk, mask=is_there, other=float("-inf"))
        number = slot * n_chunks + chunk
    else:
        number = columns.to(tl.int64)
        score = tl.load(of_sample + number * (n_chunks + 1), mask=is_there, other=float("-inf"))
    return score, number


@triton.jit  # type: ignore[untyped-decorator]
def _highest(
    of_sample: tl.tensor,
    slots: tl.tensor,
    chosen: tl.tensor,
    n_columns: tl.tensor,
    n_kept: tl.tensor,
    n_chunks: tl.tensor,
    OF_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store the numbers of the `n_kept` highest scores, of equal ones the first, in ascending order. The lowest of them
    is found by a radix select, 8 bits at a time."""
    digits = tl.arange(0, 256)
    lowest = tl.zeros((), dtype=tl.uint32)
    n_wanted = n_kept
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros((256,), dtype=tl.int32)
        for first in range(0, n_columns, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            score, _ = _scores(of_sample, slots, columns, n_columns, n_chunks, OF_CHUNKS)
            key = _ordered(score)
            counts_too = columns < n_columns
            if shift < 24:
                counts_too = counts_too & ((key >> (shift + 8)) == (lowest >> (shift + 8)))
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=counts_too)
        n_from = tl.cumsum(counts, axis=0, reverse=True)
        digit = tl.max(tl.where(n_from >= n_wanted, digits, 0), axis=0)
        n_wanted -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        lowest = lowest | (digit.to(tl.uint32) << shift)
    n_before = 0
    n_equal_before = 0
    for first in range(0, n_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        score, number = _scores(of_sample, slots, columns, n_columns, n_chunks, OF_CHUNKS)
        key = _ordered(score)
        is_equal = ((key == lowest) & (columns < n_columns)).to(tl.int32)
        is_taken_equal = (is_equal > 0) & (n_equal_before + tl.cumsum(is_equal, axis=0) <= n_wanted)
        is_taken = (((key > lowest) & (columns < n_columns)) | is_taken_equal).to(tl.int32)
        place = n_before + tl.cumsum(is_taken, axis=0) - 1
        tl.store(chosen + place, number, mask=is_taken > 0)
        n_before += tl.sum(is_taken, axis=0)
        n_equal_before += tl.sum(is_equal, axis=0)


@kernel(do_not_specialize=["n_slots", "n_chunks", "n_kept_slots", "n_kept"])
def choose(
    highest: tl.tensor,
    slots: tl.tensor,
    chosen: tl.tensor,
    n_slots: tl.tensor,
    n_chunks: tl.tensor,
    n_kept_slots: tl.tensor,
    n_kept: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program finds the highest slots of one sample, and then the highest chunks of these."""
    sample = tl.program_id(0).to(tl.int64)
    of_sample = highest + sample * n_slots * (n_chunks + 1)
    own_slots = slots + sample * n_kept_slots
    own_chosen = chosen + sample * n_kept
    _highest(of_sample, own_slots, own_slots, n_slots, n_kept_slots, n_chunks, False, BLOCK)
    tl.debug_barrier()  # what is stored above is read below
    _highest(of_sample, own_slots, own_chosen, n_kept_slots * n_chunks, n_kept, n_chunks, True, BLOCK)


@kernel(
    do_not_specialize=[
        *("n_samples", "n_kept", "n_slots", "n_chunks", "n_ranks"),
        *("first_expert", "first_neuron", "n_neurons"),
    ]
)
def finalists(
    table: tl.tensor,
    chosen: tl.tensor,
    highest: tl.tensor,
    row_of_slot: tl.tensor,
    score: tl.tensor,
    place: tl.tensor,
    n_samples: tl.tensor,
    n_kept: tl.tensor,
    n_slots: tl.tensor,
    n_chunks: tl.tensor,
    n_ranks: tl.tensor,
    first_expert: tl.tensor,
    first_neuron: tl.tensor,
    n_neurons: tl.tensor,
    width: tl.tensor,
    act_stride: tl.tensor,
    projected_stride: tl.tensor,
    ACT: tl.constexpr,
    PROJECTED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    HAS_ACT_ROW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program is one chunk of one layer; where it is in the rows of these experts, its contributions are written.
    IS_FIRST: also what stands for no chunk."""
    layer = tl.program_id(1).to(tl.int64)
    table += layer * _FIELDS
    number = layer * n_samples * n_kept + tl.program_id(0)
    column = tl.load(chosen + number)
    offsets = tl.arange(0, CHUNK)
    slot = column // n_chunks
    of_slot = number // n_kept * n_slots + slot
    is_chunk = tl.load(highest + of_slot * (n_chunks + 1) + 1 + column % n_chunks) > float("-inf")
    row = tl.load(row_of_slot + of_slot, mask=is_chunk, other=-1) - tl.load(table + _FIRST_ROW)
    is_here = is_chunk & (row >= 0) & (row < tl.load(table + _N_ROWS))
    row = tl.where(is_here, row, 0)
    of_act, factor, n_counted = _row_of(table, row, width, HAS_ACT_ROW, HAS_WEIGHT, HAS_ROWS)
    n_counted = tl.where(is_here, n_counted, 0)
    columns = (column % n_chunks) * CHUNK + offsets
    is_there = columns < n_counted
    a = tl.load(_at(table, _ACT, ACT, IS_ALIGNED) + of_act * act_stride + columns, mask=is_there, other=0.0)
    p = tl.load(
        _at(table, _PROJECTED, PROJECTED, IS_ALIGNED) + row * projected_stride + columns, mask=is_there, other=0.0
    )
    f = _products(a, p, factor)
    found = tl.where(is_there & (tl.abs(f) < float("inf")), f, float("-inf"))
    own = tl.load(_at(table, _EXPERT, tl.int64, False) + row) - first_expert
    neuron = first_neuron + own * width + (column % n_chunks) * CHUNK
    found_at = tl.where(is_here, (slot // n_ranks) * n_neurons + neuron, 0)
    n_written = tl.where(is_here, CHUNK, 0)
    if IS_FIRST:
        n_written = tl.where(is_chunk, n_written, CHUNK)
    tl.store(score + number * CHUNK + offsets, found, mask=offsets < n_written)
    tl.store(place + number, found_at, mask=n_written > 0)


@kernel(do_not_specialize=["n_scores", "n_columns"])
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


def type_of(tensor: Tensor) -> Any:
    """What Triton calls the type of the elements."""
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))
