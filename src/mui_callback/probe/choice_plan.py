"""Which process runs which choices, and in which batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from mui_callback.parallel.shards import Shards
from mui_callback.probe.batches import Batch, make_batches, make_rounds
from mui_callback.probe.encode import EncodedProbeSet
from mui_callback.probe.shared_prompts import PromptGroup, share_prompts

Part = Batch | PromptGroup
"""Choices that are run in full, or after prompts that are run once for all of them."""


@dataclass(frozen=True, eq=False)
class ChoicePlan:
    """The choices of a probe set, dealt out."""

    parts: tuple[Sequence[Part], ...]
    """What each shard runs. `sample` of a batch numbers the choices of all samples."""

    @classmethod
    def of(cls, encoded: EncodedProbeSet, batch_tokens: int, shards: Shards, *, share: bool) -> ChoicePlan:
        """Deal out the choices.

        Args:
            encoded: the samples.
            batch_tokens: the most positions of a batch.
            shards: who runs them. In step, all run batches of one shape at a time.
            share: whether the choices of a sample are dealt to one shard, to be run after its prompt where that saves
                something. Not in step.
        """
        if share:
            return cls(tuple(_shared(encoded, batch_tokens, shards.n, shard) for shard in range(shards.n)))
        rounds = make_rounds(encoded.choices, batch_tokens, shards.n)
        own = ([batches[shard] for batches in rounds] for shard in range(shards.n))
        return cls(tuple([batch for batch in column if shards.in_step or not batch.is_stand_in] for column in own))

    @classmethod
    def none(cls, shards: Shards) -> ChoicePlan:
        """Nothing to run."""
        return cls(((),) * shards.n)

    def in_full(self, shard: int | None = None) -> Iterator[Batch]:
        """The batches of a shard, or of all, as they are run without sharing prompts."""
        parts = chain.from_iterable(self.parts) if shard is None else self.parts[shard]
        for part in parts:
            yield from [part] if isinstance(part, Batch) else part.in_full

    def passes(self) -> Iterator[Batch]:
        """The forward passes of all shards, as they are planned."""
        for part in chain.from_iterable(self.parts):
            yield from [part] if isinstance(part, Batch) else part.passes


def _shared(encoded: EncodedProbeSet, batch_tokens: int, n_shards: int, shard: int) -> list[Part]:
    """What one shard runs: the samples that have choices are dealt out by their length."""
    choices, first, samples = encoded.choices, 0, []
    for sample in encoded.samples:
        samples.append(range(first, first + len(sample.choices)))
        first = samples[-1].stop
    samples.sort(key=lambda numbers: sum(len(choices[number].input_ids) for number in numbers))
    own = [numbers for numbers in samples if numbers][shard::n_shards]
    groups = share_prompts(choices, own, batch_tokens)
    shared = {int(number) for group in groups for one in group.followers for number in one.batch.sample}
    rest = np.array(sorted(set(chain.from_iterable(own)) - shared), dtype=np.int64)
    in_full = make_batches([choices[number] for number in rest], batch_tokens)
    return [*groups, *(replace(batch, sample=rest[batch.sample]) for batch in in_full)]
