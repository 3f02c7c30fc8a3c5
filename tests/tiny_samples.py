"""Random samples of token ids, with prompts of different lengths."""

from __future__ import annotations

import numpy as np

from mui_callback.probe.samples import TokenSample
from tiny import VOCAB


def make_samples(seed: int = 0, lengths: tuple[int, ...] = (11, 7, 14, 9)) -> list[TokenSample]:
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        scored = np.arange(length) >= 1 + number % 4
        samples.append(TokenSample(str(number), rng.integers(3, VOCAB, length), scored))
    return samples
