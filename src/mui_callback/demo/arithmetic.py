"""Additions: problems whose answers can be checked."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from mui_callback.probe.samples import ProbeSample

_LARGEST = 49
_SLIPS = (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)
"""How far wrong choices are from the right one: a wrong digit, a carry too many or too few."""


def split_additions(random: Random, n_held_out: int) -> tuple[list[ProbeSample], list[ProbeSample]]:
    """All additions of two numbers from 0 to 49 in random order: the training part and the held-out part.

    3+5 and 5+3 are one problem, so both are in the same part. Held-out ones have four choices.
    """
    pairs = [(a, b) for a in range(_LARGEST + 1) for b in range(a, _LARGEST + 1)]
    random.shuffle(pairs)
    held_out = [random.choice([(a, b), (b, a)]) for a, b in pairs[:n_held_out]]
    training = [operands for a, b in pairs[n_held_out:] for operands in {(a, b), (b, a)}]
    return [_addition(a, b) for a, b in training], [_with_choices(_addition(a, b), random) for a, b in held_out]


def _addition(a: int, b: int) -> ProbeSample:
    return ProbeSample(id=f"{a}+{b}", prompt=f"{a}+{b}=", response=str(a + b))


def _with_choices(addition: ProbeSample, random: Random) -> ProbeSample:
    right = addition.response
    slips = [str(abs(int(right) + slip)) for slip in _SLIPS]
    # As long as the right answer: a choice must not be told by its length.
    wrong = sorted({slip for slip in slips if len(slip) == len(right)} - {right})
    choices = random.sample([right, *random.sample(wrong, 3)], 4)
    return replace(addition, choices=tuple(choices), answer=choices.index(right))
