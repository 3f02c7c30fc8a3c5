"""Sets of neurons as packed bits: eight neurons a byte, the lowest number in the lowest bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def n_bytes(n_neurons: int) -> int:
    """Bytes that a set over this many neurons takes."""
    return -(-n_neurons // 8)


def pack(member: Tensor) -> Tensor:
    """Bool ``[…, N]`` to uint8 ``[…, ceil(N / 8)]``, on the device of the input."""
    padded = torch.nn.functional.pad(member, (0, -member.shape[-1] % 8))
    octets = padded.view(*padded.shape[:-1], -1, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=member.device)
    return torch.sum(octets * weights, dim=-1, dtype=torch.uint8)


def unpack(bits: NDArray[np.uint8], n_neurons: int) -> NDArray[np.bool_]:
    """uint8 ``[…, ceil(N / 8)]`` to bool ``[…, N]``, on the host; the inverse of `pack`."""
    return np.unpackbits(bits, axis=-1, count=n_neurons, bitorder="little").astype(np.bool_)


def unpack_layers(bits: NDArray[np.uint8], n_neurons: Sequence[int]) -> NDArray[np.bool_]:
    """Bool ``[…, sum(n_neurons)]`` from sets of several layers, each of which begins at a byte of its own."""
    ends = np.cumsum([n_bytes(n) for n in n_neurons])
    parts = np.split(bits, ends[:-1], axis=-1)
    return np.concatenate([unpack(part, n) for part, n in zip(parts, n_neurons, strict=True)], axis=-1)
