"""Token samples that are drawn, and the batches that a plain forward is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from shapes import BatchShape
from torch import nn

from mui_callback.probe.batches import Batch
from mui_callback.probe.samples import TokenSample

Tokens = Literal["uniform", "zipf"]
Scored = Literal["all", "response"]

RESPONSE = 0.25
"""Share of a sample that is its response."""


def draw_ids(rng: np.random.Generator, vocab: int, n: int, tokens: Tokens) -> NDArray[np.int64]:
    """Token ids ``[n]``: each as likely as any other, or the r-th most frequent as often as 1 / r."""
    if tokens == "uniform":
        return rng.integers(0, vocab, n)
    weight = 1 / np.arange(1, vocab + 1)
    return rng.choice(vocab, n, p=weight / weight.sum())


def n_scored(length: int, scored: Scored) -> int:
    """Tokens of a sample that are scored: all but the first, or its response."""
    return length - 1 if scored == "all" else min(length - 1, length - round((1 - RESPONSE) * length))


def draw_samples(
    rng: np.random.Generator, vocab: int, batch: BatchShape, n_batches: int, tokens: Tokens, scored: Scored
) -> list[TokenSample]:
    """Samples of one length that fill batches of one shape."""
    is_scored = np.arange(batch.length) >= batch.length - n_scored(batch.length, scored)
    return [
        TokenSample(str(number), draw_ids(rng, vocab, batch.length, tokens), is_scored)
        for number in range(batch.rows * n_batches)
    ]


def forward_all(model: nn.Module, batches: Sequence[Batch], device: torch.device) -> None:
    """A plain forward of each batch as a user evaluates: no gradients, logits of every position."""
    with torch.no_grad():
        for batch in batches:
            input_ids = torch.from_numpy(batch.input_ids).to(device, non_blocking=True)
            mask = torch.from_numpy(batch.attention_mask).to(device, non_blocking=True)
            model(input_ids=input_ids, attention_mask=mask)
