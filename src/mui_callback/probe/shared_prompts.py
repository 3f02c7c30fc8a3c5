"""Prompts that are run once for all of their choices, and what follows them in each choice.

Shapes: B choices of a batch, of T positions; M prompts, padded on the left to P positions; S positions of
what follows, padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mui_callback.probe.batches import Batch, one_batch
from mui_callback.probe.packing import packed
from mui_callback.probe.samples import IntArray, TokenChoice

_WORTH = 1024
"""Positions to be saved, from which a forward pass more is worth it."""
_PADDING = 0.5
"""Share of padding among prompts. They have fewer positions than what follows them, and many in a pass make few."""


@dataclass(frozen=True, eq=False)
class Followers:
    """Choices, and what of them follows prompts."""

    batch: Batch
    """The choices in full, ``[B, T]``."""
    rest: Batch
    """What follows, ``[B, S]``: the same rows, with the same scored tokens."""
    prompt: IntArray
    """int64 ``[B]``, which of the prompts each choice follows."""


@dataclass(frozen=True, eq=False)
class PromptGroup:
    """Prompts of one forward pass, each once, and all that follows them."""

    prompts: Batch
    """``[M, P]``, padded on the left, with nothing to score."""
    followers: tuple[Followers, ...]

    @property
    def in_full(self) -> list[Batch]:
        """The same choices without sharing anything."""
        return [one.batch for one in self.followers]

    @property
    def passes(self) -> list[Batch]:
        """What is run, one after the other."""
        return [self.prompts, *(one.rest for one in self.followers)]

    @property
    def is_worth_it(self) -> bool:
        """Whether more is saved than a forward pass costs."""
        saved = sum(batch.n_positions for batch in self.in_full) - sum(batch.n_positions for batch in self.passes)
        return saved >= _WORTH


def share_prompts(
    choices: Sequence[TokenChoice], samples: Sequence[Sequence[int]], batch_tokens: int
) -> list[PromptGroup]:
    """Find prompts that are worth to be run by themselves.

    A prompt ends before the last token that all choices of a sample begin with and that none has scored: what follows
    it begins with a token that predicts the first scored one, so that nothing is wanted of the prompt but what later
    positions need.

    Args:
        choices: of a decoder alone, each with a scored token.
        samples: the choices of each sample, by their numbers.
        batch_tokens: the most positions of a batch, those of the prompts that it follows included.

    Returns:
        What is run so, the longest prompts first. `sample` of a batch numbers the choices; those that are in none are
        better run in full.
    """
    length_of = {tuple(sample): _shared_length([choices[number] for number in sample]) for sample in samples}
    sharing = sorted((sample for sample in length_of if length_of[sample]), key=length_of.__getitem__)
    rounds = packed([(length_of[sample], 0) for sample in sharing], batch_tokens, 1, padding=_PADDING)
    packs = ({sample: length_of[sample] for sample in sharing[pack.start : pack.stop]} for pack in rounds)
    groups = [_group(choices, pack, batch_tokens) for pack in packs]
    return [group for group in reversed(groups) if group.is_worth_it]


def _shared_length(choices: Sequence[TokenChoice]) -> int:
    """Tokens of the prompt of these; 0 if they share none."""
    shortest = min(len(choice.input_ids) for choice in choices)
    differs_T = np.any([choice.input_ids[:shortest] != choices[0].input_ids[:shortest] for choice in choices], axis=0)
    first_scored = min(int(choice.scored.argmax()) for choice in choices)
    common = int(differs_T.argmax()) if differs_T.any() else shortest
    return max(min(common, first_scored) - 1, 0)


def _group(choices: Sequence[TokenChoice], length_of: dict[tuple[int, ...], int], batch_tokens: int) -> PromptGroup:
    """Of some samples, by the numbers of their choices, and the lengths of their prompts."""
    prompts = _padded_on_the_left([choices[sample[0]].input_ids[:length] for sample, length in length_of.items()])
    prompt_of = {number: prompt for prompt, sample in enumerate(length_of) for number in sample}
    rest_of = {number: _after(choices[number], length) for sample, length in length_of.items() for number in sample}
    members = sorted(rest_of, key=lambda number: len(rest_of[number].input_ids))
    longest = prompts.input_ids.shape[1]
    rounds = packed([(len(rest_of[number].input_ids), longest) for number in members], batch_tokens, 1)
    followers = []
    for pack in (members[r.start : r.stop] for r in rounds):
        rest = one_batch([rest_of[number] for number in pack], range(len(pack)))
        batch = one_batch(choices, pack)
        prompt_B = np.array([prompt_of[number] for number in pack], dtype=np.int64)
        followers.append(Followers(batch, replace(rest, sample=batch.sample), prompt_B))
    return PromptGroup(prompts, tuple(followers))


def _after(choice: TokenChoice, length: int) -> TokenChoice:
    """What follows so many tokens."""
    return TokenChoice(choice.input_ids[length:], choice.scored[length:])


def _padded_on_the_left(rows: list[IntArray]) -> Batch:
    """A batch with nothing to score."""
    longest = max(map(len, rows))
    none = np.zeros(0, dtype=np.int64)
    return Batch(
        input_ids=np.stack([np.pad(row, (longest - len(row), 0)) for row in rows]),
        attention_mask=np.stack([np.pad(np.ones_like(row), (longest - len(row), 0)) for row in rows]),
        encoder_ids=None,
        encoder_mask=None,
        sample=np.arange(len(rows), dtype=np.int64),
        flat_position=none,
        row=none,
        order=none,
        target=none,
    )
