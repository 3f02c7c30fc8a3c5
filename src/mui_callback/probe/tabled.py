"""What is known of samples without running them."""

from __future__ import annotations

import numpy as np

from mui_callback.probe.encode import EncodedProbeSet
from mui_callback.sample_table import SampleTable


def tabled(encoded: EncodedProbeSet) -> SampleTable:
    """The samples of an encoded probe set."""
    samples = encoded.samples
    n_choices = [len(sample.choices) for sample in samples]
    lengths = [
        # one unit for all choices of a sample
        [
            choice.n_bytes if all(c.n_bytes for c in sample.choices) else int(choice.scored.sum())
            for choice in sample.choices
        ]
        for sample in samples
    ]
    return SampleTable(
        id=tuple(sample.id for sample in samples),
        task=encoded.task_of_sample,
        n_tokens=np.array([sample.scored.sum() for sample in samples], dtype=np.int64),
        n_bytes=np.array([-1 if sample.n_bytes is None else sample.n_bytes for sample in samples], dtype=np.int64),
        truncated=np.array([sample.n_truncated > 0 for sample in samples], dtype=np.bool_),
        answer=np.array([-1 if sample.answer is None else sample.answer for sample in samples], dtype=np.int64),
        choice_sample=np.repeat(np.arange(len(samples)), n_choices),
        choice_length=np.array([length for sample in lengths for length in sample], dtype=np.int64),
    )
