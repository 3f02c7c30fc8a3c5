"""Three tasks with the lengths of GSM8K, ARC and HumanEval, and random tokens.

Lengths are drawn from log-normal distributions that were fitted to 200 samples of GSM8K (its answers with their
reasoning), 200 of ARC (both parts) and the 164 of HumanEval, at 3.5 characters a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from drawn import Tokens, draw_ids
from numpy.typing import NDArray

from mui_callback import ProbeSet
from mui_callback.probe.batches import make_batches
from mui_callback.probe.samples import TokenChoice, TokenSample

_Tokens = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""Token ids, and which are scored."""


@dataclass(frozen=True)
class LogNormal:
    """Of a number of tokens: mean and standard deviation of its natural logarithm."""

    mean: float
    deviation: float

    def draw(self, rng: np.random.Generator) -> int:
        return max(1, round(float(rng.lognormal(self.mean, self.deviation))))


@dataclass(frozen=True)
class Lengths:
    """Of the samples of a task."""

    prompt: LogNormal
    response: LogNormal
    """Of each choice, where there are choices."""
    n_choices: int = 0


LENGTHS = {
    "gsm8k": Lengths(LogNormal(4.233, 0.391), LogNormal(4.117, 0.550)),
    "arc": Lengths(LogNormal(3.591, 0.511), LogNormal(1.917, 0.701), n_choices=4),
    "humaneval": Lengths(LogNormal(4.739, 0.490), LogNormal(3.651, 0.814)),
}


def draw_tasks(rng: np.random.Generator, vocab: int, n_samples: int, tokens: Tokens, context: int) -> ProbeSet:
    """A probe set of all three, whose samples fit into a context of so many tokens."""

    def draw(name: str, lengths: Lengths) -> TokenSample:
        prompt = draw_ids(rng, vocab, lengths.prompt.draw(rng), tokens)
        sizes = [lengths.response.draw(rng) for _ in range(max(1, lengths.n_choices))]
        parts = [draw_ids(rng, vocab, min(size, context - 1), tokens) for size in sizes]
        return _sample(rng, name, [_joined(prompt[: context - max(map(len, parts))], part) for part in parts])

    return ProbeSet(
        {task: [draw(f"{task}-{n}", lengths) for n in range(n_samples)] for task, lengths in LENGTHS.items()}
    )


def _sample(rng: np.random.Generator, name: str, sequences: Sequence[_Tokens]) -> TokenSample:
    """Of one response, or of several choices, one of which is right."""
    if len(sequences) == 1:
        return TokenSample(name, *sequences[0])
    answer = int(rng.integers(len(sequences)))
    choices = tuple(TokenChoice(*sequence) for sequence in sequences)
    return TokenSample(name, *sequences[answer], choices=choices, answer=answer)


def _joined(prompt: NDArray[np.int64], response: NDArray[np.int64]) -> _Tokens:
    ids = np.concatenate([prompt, response])
    return ids, np.arange(len(ids)) >= len(prompt)


def samples_of(probe_set: ProbeSet) -> list[TokenSample]:
    """Those of all tasks."""
    return [sample for task in probe_set.tasks.values() for sample in task if isinstance(sample, TokenSample)]


def padding(sequences: Sequence[TokenSample | TokenChoice], batch_tokens: int) -> dict[str, float]:
    """Batches, positions in them, and the share of these that is padding."""
    batches = make_batches(sequences, batch_tokens)
    positions = sum(batch.n_positions for batch in batches)
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    return {"batches": len(batches), "positions": positions, "padding": 1 - tokens / positions}
