"""The samples of a probe, as far as they are known without running them: plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class SampleTable:
    """What is known of the samples without running them; N samples, C choices of all of them."""

    id: tuple[str, ...]
    task: NDArray[np.int64]
    """Index into the report's tasks, ``[N]``."""
    n_tokens: NDArray[np.int64]
    """Response tokens, ``[N]``."""
    n_bytes: NDArray[np.int64]
    """UTF-8 bytes of the response, -1 where they are not known, ``[N]``."""
    truncated: NDArray[np.bool_]
    """Whether the sample was longer than the context, ``[N]``."""
    answer: NDArray[np.int64]
    """Index of the right choice, -1 where there are no choices, ``[N]``."""
    choice_sample: NDArray[np.int64]
    """Sample of each choice, ascending, ``[C]``."""
    choice_length: NDArray[np.int64]
    """UTF-8 bytes of each choice, or its tokens where the text is not known, ``[C]``."""
