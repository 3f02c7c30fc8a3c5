"""Numbers as signs over the channels of a row, so that a weight on the row leaves them legible.

Shapes: T positions, S rows, b binary digits, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLACK = 0.02
"""Relative difference of two channels of a codeword that rounding can explain, in 16 bits too."""


def codewords(number_T: Tensor, n_bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """One, then the bits of the number over and over again, as signs, ``[T, D]``; zeros for a number of -1."""
    bits_Tb = number_T[:, None].bitwise_right_shift(torch.arange(n_bits, device=number_T.device)) & 1
    signs_Tb = (2 * bits_Tb - 1).masked_fill_(number_T[:, None] < 0, 0).to(dtype)
    is_scored_T1 = (number_T >= 0)[:, None].to(dtype)
    return torch.cat([is_scored_T1, signs_Tb.repeat(1, -(-(width - 1) // n_bits))[:, : width - 1]], dim=1)


def read_codewords(seen_SD: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """The number of each row, -1 for zeros, and whether the row is a codeword or zeros; ``[S]`` each."""
    first_S1 = seen_SD[:, :1]
    is_sign_SD = (seen_SD.abs() - first_S1.abs()).abs() <= SLACK * first_S1.abs()
    is_one_Sb = (seen_SD[:, 1 : 1 + n_bits] > 0) == (first_S1 > 0)
    weights_b = torch.ones(n_bits, dtype=torch.float64, device=seen_SD.device).mul_(2).cumprod(0) / 2
    number_S = (is_one_Sb.double() @ weights_b[: is_one_Sb.shape[1]]).long()
    return number_S.where(first_S1[:, 0] != 0, -1), is_sign_SD.all(-1)


def unlikeness(seen_SD: Tensor, slacks: Sequence[float]) -> Tensor:
    """For each of some relative differences, how many rows have two channels that differ in size by more, int64."""
    size_S = seen_SD[:, 0].abs()
    low_S, high_S = torch.aminmax(seen_SD.abs(), dim=1)
    are_alike = [(high_S - size_S <= slack * size_S) & (size_S - low_S <= slack * size_S) for slack in slacks]
    return torch.stack([(~are_alike_S).sum() for are_alike_S in are_alike])
