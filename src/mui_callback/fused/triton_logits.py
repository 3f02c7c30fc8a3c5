"""The source of the kernel over logits; imported where Triton is there."""

from __future__ import annotations

import triton.language as tl

from mui_callback.fused.launching import kernel


@kernel()
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
